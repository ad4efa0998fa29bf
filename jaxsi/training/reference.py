"""Log-probabilities of preference pairs: of the model that trains, and, before training, of the frozen reference."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi.lm import LM
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig, Remat, Weights
from jaxsi.runs import preemption, spent
from jaxsi.runs.progress import piece
from jaxsi.training.batches import PairBatch, Sequence_, pair_batches


def pair_logps(
    weights: Weights, batch: PairBatch, *, config: ModelConfig, mesh: Mesh, dtype: str, remat: Remat
) -> jax.Array:
    """Summed log-probabilities [B, 2] of the chosen and the rejected responses, in one pass over all rows."""
    B, S, _ = batch.tokens_BST.shape

    def rows(x: jax.Array) -> jax.Array:
        return meshlib.constrain(x.reshape(B * S, -1), mesh, ("batch", None))

    hidden_BTD = decoder.hidden_states(
        weights, config, rows(batch.tokens_BST), rows(batch.positions_BST), rows(batch.segments_BST),
        lengths_B=None if S == 1 else jnp.sum(rows(batch.segments_BST), axis=1), forked=S == 1,
        dtype=jnp.dtype(dtype), remat=remat, mesh=mesh,
    )  # fmt: skip
    places, targets = rows(batch.places_B2R), rows(batch.targets_B2R)
    logps = decoder.predicted_logps(weights, config, hidden_BTD, places, targets, mesh=mesh)
    return jnp.sum(logps.reshape(B, 2, -1), axis=-1)


def digest(encoded: Sequence[tuple[Sequence_, Sequence_]], config: Any) -> str:
    """8 hex digits that identify everything except the weights that the reference's log-probabilities depend on."""
    digest = hashlib.sha256(f"{config.dtype} {config.batch_size // config.accumulate} {config.min_length}".encode())
    for sequence in (side for pair in encoded for side in pair):
        digest.update(f"{len(sequence.tokens)} ".encode() + sequence.tokens.tobytes() + sequence.loss_mask.tobytes())
    return digest.hexdigest()[:8]


def reference_logps(lm: LM, encoded: Sequence[tuple[Sequence_, Sequence_]], config: Any) -> list[list[float]]:
    """The reference's summed log-probabilities (chosen, rejected) of each pair, computed with the program and the
    micro-batch size of training; ``config`` is its TrainConfig."""
    micro = config.batch_size // config.accumulate
    zeros = [(0.0, 0.0)] * len(encoded)
    batches = pair_batches(lm, encoded, zeros, micro, epochs=1, seed=0, min_length=config.min_length)
    out = np.zeros((len(encoded), 2), np.float32)
    with piece("log-probabilities of pairs", len(encoded)) as advance:
        for step in range(len(batches)):
            preemption.check()
            rows = batches.plan[step]
            logps_B2 = reference_pair_logps(
                lm.weights, batches[step], config=lm.config, mesh=lm.mesh, dtype=config.dtype, remat=config.remat
            )
            out[rows] = meshlib.fetch(logps_B2)[: len(rows)]
            advance(len(rows), True)
    spent.count(scored=sum(len(side.tokens) for pair in encoded for side in pair))
    return out.tolist()


reference_pair_logps = jax.jit(pair_logps, static_argnames=("config", "mesh", "dtype", "remat"))
