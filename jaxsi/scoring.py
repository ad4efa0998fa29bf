"""Log-probabilities of given responses, without ever making a [B, T, V] array."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi import mesh as meshlib, model
from jaxsi.chat import render_prompt, render_response
from jaxsi.lm import LM, tokens_array
from jaxsi.model import ModelConfig, Weights
from jaxsi.records import Prompt, Response
from jaxsi.sampling import bucket


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _score(
    weights: Weights, tokens_BT: jax.Array, lengths_B: jax.Array, *, config: ModelConfig, dtype: Any, mesh: Mesh
) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    return model.sequence_logps(weights, config, tokens_BT, positions_BT, segments_BT, dtype=dtype, mesh=mesh)


def score_ids(
    lm: LM, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 32
) -> list[np.ndarray]:
    """Log-probability of each token of each continuation after its prefix: float32 arrays as long as the continuations.

    Raises:
      ValueError: the lists differ in length, a prefix is empty, or a text is longer than the model's context.
    """
    if len(prefixes) != len(continuations):
        raise ValueError(f"{len(prefixes)} prefixes and {len(continuations)} continuations: give one for each")
    rows = [[*prefix, *continuation] for prefix, continuation in zip(prefixes, continuations, strict=True)]
    for prefix, row in zip(prefixes, rows, strict=True):
        if not prefix or len(row) > lm.config.max_positions:
            raise ValueError(
                f"a prefix of {len(prefix)} tokens and a text of {len(row)}: the prefix has at least 1, "
                f"the text at most {lm.config.max_positions} (the model's positions)"
            )
    parts = meshlib.axis_size(lm.mesh, "batch")
    size = max(parts, batch_size // parts * parts)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    scored: dict[int, np.ndarray] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        filled = batch + [batch[0]] * (size - len(batch))
        tokens_BT = tokens_array([rows[i] for i in filled], bucket(len(rows[batch[-1]])), 0)
        logps_BT = _score(
            lm.weights,
            jax.device_put(tokens_BT, meshlib.sharding(lm.mesh, ("batch", None))),
            jax.device_put(np.asarray([len(rows[i]) for i in filled], np.int32), meshlib.sharding(lm.mesh, ("batch",))),
            config=lm.config,
            dtype=jnp.dtype(lm.dtype),
            mesh=lm.mesh,
        )
        for i, logps_T in zip(batch, np.asarray(logps_BT), strict=False):
            scored[i] = logps_T[len(prefixes[i]) : len(rows[i])].copy()
    return [scored[i] for i in range(len(rows))]


def score_continuations(
    lm: LM, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> np.ndarray:
    """Summed log-probability [N] float32 of each continuation after its prefix, both given as token ids."""
    return np.asarray([logps.sum(dtype=np.float32) for logps in score_ids(lm, prefixes, continuations)], np.float32)


def score(lm: LM, prompts: Sequence[Prompt | str], responses: Sequence[Response | str]) -> np.ndarray:
    """Summed log-probability [N] float32 of each response to its prompt.

    A ``Response`` is scored on the token ids it was sampled with; a text on its tokens and the end of turn.
    """
    records = [p if isinstance(p, Prompt) else Prompt.of(str(i), p) for i, p in enumerate(prompts)]
    ids = [list(r.token_ids) if isinstance(r, Response) else render_response(lm.tokenizer, r) for r in responses]
    return score_continuations(lm, [render_prompt(lm.tokenizer, p.messages) for p in records], ids)
