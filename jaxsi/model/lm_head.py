"""The head over tiles of tokens: log-probabilities and entropies without the logits of a whole batch.

Dimension letters as in decoder.py; t tokens of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsi.model.cpu_matmul import settle
from jaxsi.model.tiles import over_tiles

TILE_BYTES = 2**27  # of float32 logits, on each device


def logps_and_entropies(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, tile_bytes: int = TILE_BYTES
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, T] float32 of ``targets_BT`` (int32), and entropies [B, T] in nats.

    Both are under the softmax of ``hidden_BTD @ head_DV`` at temperature 1. The backward pass keeps two numbers per
    token from the forward pass and computes the logits of a tile again. An unused output costs nothing.

    Args:
      tile_bytes: the largest float32 tile of logits, over all devices.
    """
    B, T, _ = hidden_BTD.shape
    most = max(1, tile_bytes // (4 * B * head_DV.shape[1]))
    # As few tiles as possible, all of the same size, with padding at the end: T may be prime (the length of a shifted
    # sequence often is). Matrix units prefer multiples of 8.
    step = 8 if 8 <= most < T else 1
    tiles = max(1, -(-T // (most // step * step)))
    tile = -(-T // (tiles * step)) * step
    padding = ((0, 0), (0, tiles * tile - T))
    hidden_BTD, targets_BT = jnp.pad(hidden_BTD, (*padding, (0, 0))), jnp.pad(targets_BT, padding)
    logps_BT, entropies_BT = _by_tiles(hidden_BTD, head_DV, targets_BT, tile)
    return logps_BT[:, :T], entropies_BT[:, :T]


def _logits(hidden_BtD: jax.Array, head_DV: jax.Array) -> jax.Array:
    return jnp.matmul(hidden_BtD, head_DV, preferred_element_type=jnp.float32)


def _is_target(targets_Bt: jax.Array, V: int) -> jax.Array:
    """[B, t, V] bool. A mask, not a gather: each device needs only its own shard of the vocabulary."""
    return jnp.arange(V)[None, None] == targets_Bt[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_tiles(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, tile: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [B, T]."""

    def step(_: None, start: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        hidden_BtD, targets_Bt = inputs
        logits_BtV = _logits(hidden_BtD, head_DV)
        chosen_Bt = jnp.sum(jnp.where(_is_target(targets_Bt, head_DV.shape[1]), logits_BtV, 0.0), axis=-1)
        mass_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
        logps_BtV = logits_BtV - mass_Bt[..., None]
        return None, (chosen_Bt - mass_Bt, -jnp.sum(jnp.exp(logps_BtV) * logps_BtV, axis=-1))

    return over_tiles(step, None, (hidden_BTD, targets_BT), tile, axis=1)[1]


def _forward(hidden: Any, head: Any, targets: Any, tile: int) -> Any:
    logps, entropies = _by_tiles(hidden.value, head.value, targets.value, tile)
    return (logps, entropies), (hidden.value, head.value, targets.value, entropies)


def _backward(tile: int, saved: Any, by_outputs: Any) -> Any:
    """The gradients by the logits of a token with shares p: onehot - p of its logp, -p (ln p + H) of its entropy H."""
    hidden_BTD, head_DV, targets_BT, entropies_BT = saved
    by_logps, by_entropies = by_outputs

    def step(by_head_DV: jax.Array, start: Any, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BtD = inputs["hidden"]
        logps_BtV = jax.nn.log_softmax(_logits(hidden_BtD, head_DV), axis=-1)
        shares_BtV = jnp.exp(logps_BtV)
        by_logits_BtV = jnp.zeros_like(shares_BtV)
        if "by_logps" in inputs:
            is_target_BtV = _is_target(inputs["targets"], head_DV.shape[1])
            by_logits_BtV += inputs["by_logps"][..., None] * (is_target_BtV - shares_BtV)
        if "by_entropies" in inputs:
            surprise_BtV = logps_BtV + inputs["entropies"][..., None]
            by_logits_BtV -= inputs["by_entropies"][..., None] * shares_BtV * surprise_BtV
        hidden_BtD, by_logits_BtV = settle((hidden_BtD, by_logits_BtV.astype(head_DV.dtype)))
        by_head_DV += jnp.einsum("BtD,BtV->DV", hidden_BtD, by_logits_BtV, preferred_element_type=jnp.float32)
        return settle((by_head_DV, by_logits_BtV @ head_DV.T))

    tiled = {"hidden": hidden_BTD, "targets": targets_BT}
    if not isinstance(by_logps, SymbolicZero):
        tiled["by_logps"] = by_logps
    if not isinstance(by_entropies, SymbolicZero):
        tiled |= {"by_entropies": by_entropies, "entropies": entropies_BT}
    by_head_DV, by_hidden_BTD = over_tiles(step, jnp.zeros(head_DV.shape, jnp.float32), tiled, tile, axis=1)
    return by_hidden_BTD, by_head_DV.astype(head_DV.dtype), None


_by_tiles.defvjp(_forward, _backward, symbolic_zeros=True)
