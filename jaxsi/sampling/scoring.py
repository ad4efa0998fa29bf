"""Log-probabilities of existing responses, without a [B, T, V] array."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi.lm import LM, tokens_array
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig, Weights
from jaxsi.model.tiles import over_tiles
from jaxsi.runs import spent
from jaxsi.runs.progress import piece
from jaxsi.runs.records import Prompt, Response, as_prompts
from jaxsi.sampling import engine
from jaxsi.sampling.generate import bucket
from jaxsi.text.chat import render_prompt, written_response


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def score_batch(
    weights: Weights, tokens_BT: jax.Array, lengths_B: jax.Array, *, config: ModelConfig, dtype: Any, mesh: Mesh
) -> jax.Array:
    """Log-probability [B, T] float32 of each token of right-padded rows, after those before it."""
    return decoder.sequence_logps(weights, config, tokens_BT, lengths_B=lengths_B, dtype=dtype, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("config",))
def _logps_of_choices(
    weights: Weights, hidden_PD: jax.Array, choices_PG: jax.Array, *, config: ModelConfig
) -> jax.Array:
    """Log-probability [P, G] float32 of each choice as the token after the hidden state of its prefix."""
    logps_PV = jax.nn.log_softmax(decoder.logits(weights, config, hidden_PD))
    return jnp.take_along_axis(logps_PV, choices_PG, axis=1)


def score_ids(
    lm: LM, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 32
) -> list[np.ndarray]:
    """Log-probability of each token of each continuation after its prefix, as one float32 array per continuation.

    Raises:
      ValueError: if the lists differ in length, a prefix is empty, or a text is longer than the model's context.
    """
    if len(prefixes) != len(continuations):
        raise ValueError(f"{len(prefixes)} prefixes and {len(continuations)} continuations: give one for each prefix")
    rows = [[*prefix, *continuation] for prefix, continuation in zip(prefixes, continuations, strict=True)]
    _check_lengths(lm, prefixes, rows)
    row_logps: dict[int, np.ndarray] = {}
    with piece("scoring", len(rows)) as advance:
        for batch, tokens_BT, lengths_B in rows_on_mesh(lm, rows, batch_size):
            logps_BT = score_batch(
                lm.weights, tokens_BT, lengths_B, config=lm.config, dtype=jnp.dtype(lm.dtype), mesh=lm.mesh
            )
            for i, logps_T in zip(batch, meshlib.fetch(logps_BT), strict=False):
                row_logps[i] = logps_T[len(prefixes[i]) : len(rows[i])].copy()
            advance(len(batch), True)
    spent.count(scored=sum(map(len, rows)))
    return [row_logps[i] for i in range(len(rows))]


def _check_lengths(lm: LM, prefixes: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> None:
    for prefix, row in zip(prefixes, rows, strict=True):
        if not prefix or len(row) > lm.config.max_positions:
            raise ValueError(
                f"a prefix of {len(prefix)} tokens and a text of {len(row)}: the prefix must have at least 1, "
                f"the text at most {lm.config.max_positions} (the model's positions)"
            )


def rows_on_mesh(
    lm: LM, rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], jax.Array, jax.Array]]:
    """Yields row numbers, their tokens [B, T] and lengths [B] on the mesh.

    The rows of a batch have similar lengths. All batches have the same B: ``batch_size``, or the next power of two if
    there are fewer rows.
    """
    parts = meshlib.axis_size(lm.mesh, "batch")
    fewer = 1 << max(len(rows) - 1, 0).bit_length()
    size = max(parts, min(batch_size, fewer) // parts * parts)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        full_batch = batch + [batch[0]] * (size - len(batch))
        tokens_BT = tokens_array([rows[i] for i in full_batch], bucket(len(rows[batch[-1]])), 0)
        lengths_B = np.asarray([len(rows[i]) for i in full_batch], np.int32)
        yield (
            batch,
            meshlib.put(tokens_BT, lm.mesh, ("batch", None)),
            meshlib.put(lengths_B, lm.mesh, ("batch",)),
        )


def score_choices(
    lm: LM,
    prefixes: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Summed log-probability [N, G] float32 of each of G continuations of each prefix, all as token ids.

    If every continuation is one token, a prefix is read once for all of them, and what prefixes have in common is read
    once for all prefixes.

    Raises:
      ValueError: as ``score_ids``, or if the prefixes have different numbers of continuations.
    """
    if len({len(ends) for ends in choices}) > 1 or len(choices) != len(prefixes):
        raise ValueError(
            f"{len(prefixes)} prefixes have {sorted({len(e) for e in choices})} continuations; "
            "give the same number to each"
        )
    if any(len(end) != 1 for ends in choices for end in ends):
        flat = [prefix for prefix, ends in zip(prefixes, choices, strict=True) for _ in ends]
        logps = score_continuations(lm, flat, [end for ends in choices for end in ends], batch_size=batch_size)
        return logps.reshape(len(prefixes), -1)
    _check_lengths(lm, prefixes, [[*prefix, 0] for prefix in prefixes])
    logps_NG = np.zeros((len(prefixes), len(choices[0]) if choices else 0), np.float32)
    with piece("scoring", len(prefixes)) as advance:
        for numbers, wave in engine.read(lm, prefixes, batch_size=batch_size):
            choices_PG = np.zeros((wave.hidden_PD.shape[0], logps_NG.shape[1]), np.int32)
            choices_PG[: len(numbers)] = np.asarray([choices[i] for i in numbers], np.int32)[:, :, 0]
            choices_PG = meshlib.put(choices_PG, lm.mesh, ("batch", None))
            logps_PG = _logps_of_choices(lm.sampling_weights, wave.hidden_PD, choices_PG, config=lm.config)
            logps_NG[numbers] = meshlib.fetch(logps_PG)[: len(numbers)]
            advance(len(numbers), True)
    spent.count(scored=sum(map(len, prefixes)))
    return logps_NG


def score_continuations(
    lm: LM, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 32
) -> np.ndarray:
    """Summed log-probability [N] float32 of each continuation after its prefix, both as token ids."""
    token_logps = score_ids(lm, prefixes, continuations, batch_size=batch_size)
    return np.asarray([logps.sum(dtype=np.float32) for logps in token_logps], np.float32)


def score(lm: LM, prompts: Sequence[Prompt | str], responses: Sequence[Response | str]) -> np.ndarray:
    """Summed log-probability [N] float32 of each response to its prompt.

    A ``Response`` is scored on its own token ids, a text on its tokens and the end of the turn.
    """
    records = as_prompts(prompts)
    sides = [r if isinstance(r, Response) else written_response(lm.tokenizer, "", "", r) for r in responses]
    heads = [render_prompt(lm.tokenizer, p.messages) for p in records]
    return score_continuations(lm, heads, [list(r.token_ids) for r in sides])


GREEDY_TILE = 8  # positions whose logits exist at a time; divides every `bucket`


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _logps_and_greedy(
    weights: Weights,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    config: ModelConfig,
    dtype: Any,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability [B, T] float32 of each target after its token and those before it, and whether it is the most
    probable one [B, T] bool."""
    hidden_BTD = decoder.hidden_states(weights, config, tokens_BT, lengths_B=lengths_B, dtype=dtype, mesh=mesh)

    def step(_: None, start: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_BtD, targets_Bt = inputs
        logps_BtV = jax.nn.log_softmax(decoder.logits(weights, config, hidden_BtD))
        chosen_Bt = jnp.take_along_axis(logps_BtV, targets_Bt[..., None], axis=-1)[..., 0]
        return None, (chosen_Bt, jnp.argmax(logps_BtV, axis=-1) == targets_Bt)

    return over_tiles(step, None, (hidden_BTD, targets_BT), GREEDY_TILE, axis=1)[1]


def score_greedy(
    lm: LM, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, batch_size: int = 32
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each continuation after its prefix, both as token ids: the log-probability float32 of each of its tokens, and
    whether greedy sampling would take it (bool). The last token is not read, so a text may have one more than the
    model's positions.

    Raises:
      ValueError: if the lists differ in length, a prefix or a continuation is empty, or a text is too long.
    """
    texts = [[*prefix, *rest] for prefix, rest in zip(prefixes, continuations, strict=True)]
    if any(not rest for rest in continuations):
        raise ValueError("a continuation has 0 tokens; it must have at least 1")
    rows = [text[:-1] for text in texts]
    _check_lengths(lm, prefixes, rows)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    with piece("scoring", len(rows)) as advance:
        for batch, tokens_BT, lengths_B in rows_on_mesh(lm, rows, batch_size):
            full_batch = batch + [batch[0]] * (tokens_BT.shape[0] - len(batch))
            targets_BT = tokens_array([texts[i][1:] for i in full_batch], tokens_BT.shape[1], 0)
            logps_BT, greedy_BT = _logps_and_greedy(
                lm.weights,
                tokens_BT,
                meshlib.put(targets_BT, lm.mesh, ("batch", None)),
                lengths_B,
                config=lm.config,
                dtype=jnp.dtype(lm.dtype),
                mesh=lm.mesh,
            )
            for i, logps_T, greedy_T in zip(batch, meshlib.fetch(logps_BT), meshlib.fetch(greedy_BT), strict=False):
                scored = slice(len(prefixes[i]) - 1, len(rows[i]))
                found[i] = logps_T[scored].copy(), greedy_T[scored].copy()
            advance(len(batch), True)
    spent.count(scored=sum(map(len, rows)))
    return [found[i] for i in range(len(rows))]
