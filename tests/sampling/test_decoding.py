"""The decoder one step at a time equals the decoder over whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.model import decoder
from jaxsi.model.kv_cache import Cache, Contents
from jaxsi.sampling import decoding
from tests.model.test_decoder import CONFIGS, full_hidden, tokens, weights_of


def unstack(weights: decoder.Weights, num_layers: int) -> decoder.Weights:
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], weights["layers"]) for i in range(num_layers)]
    return weights | {"layers": layers}


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_forward_pass(name: str) -> None:
    """Right-padded prompts of different lengths, then eight tokens one by one, against one pass over each whole row."""
    config, T, new = CONFIGS[name], 10, 8
    weights, lengths = weights_of(config), np.asarray([10, 4, 1], np.int32)
    rows = [tokens(1, n + new, seed=int(n)) for n in lengths]
    expected = [full_hidden(config, row) for row in rows]
    prompts = np.stack([np.pad(row[0, :n], (0, T - n)) for row, n in zip(rows, lengths, strict=True)])

    split = unstack(weights, config.num_layers)
    prefill = jax.jit(functools.partial(decoding.prefill, config=config, dtype=jnp.float32))
    decode = jax.jit(functools.partial(decoding.decode, config=config, dtype=jnp.float32))
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), prompts.shape)
    segments = (positions < lengths[:, None]).astype(np.int32)
    hidden_BTD, cache = prefill(split, tokens_BT=prompts, segments_BT=segments, positions_BT=positions)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(hidden_BTD[b, n - 1], expected[b][n - 1], atol=1e-5)
    cache = [tuple(jnp.pad(x, ((0, 0), (0, 0), (0, new), (0, 0))) for x in pair) for pair in cache]
    columns = np.arange(T + new)
    in_prompt = np.where(columns < lengths[:, None], columns, -1)
    columns_positions = np.where(columns < T, in_prompt, lengths[:, None] + columns - T).astype(np.int32)
    for i in range(new):
        step = np.asarray([row[0, n + i] for row, n in zip(rows, lengths, strict=True)])
        contents = {window: Contents(columns_positions, jnp.int32(T + i)) for window in decoder.windows(config)}
        hidden_BD, cache = decode(split, tokens_B=step, positions_B=lengths + i, cache=cache, contents=contents)
        for b, n in enumerate(lengths):
            np.testing.assert_allclose(hidden_BD[b], expected[b][n + i], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_extending_a_cache_equals_the_full_forward_pass(name: str) -> None:
    """Rows of 6, 3 and 1 tokens get 4, 0 and 2 more at once."""
    config, T = CONFIGS[name], 6
    weights, held, more = weights_of(config), np.asarray([6, 3, 1], np.int32), np.asarray([4, 0, 2], np.int32)
    rows = [tokens(1, n + m, seed=int(n)) for n, m in zip(held, more, strict=True)]
    split = unstack(weights, config.num_layers)

    def pad(parts: list[np.ndarray], length: int) -> np.ndarray:
        return np.stack([np.pad(x, (0, length - len(x))) for x in parts])

    def prefill(parts: list[np.ndarray], lengths: np.ndarray, T: int) -> Cache:
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (3, T))
        segments = (positions < lengths[:, None]).astype(np.int32)
        return decoding.prefill(split, config, pad(parts, T), segments, positions, dtype=jnp.float32)[1]

    cache = prefill([row[0, :n] for row, n in zip(rows, held, strict=True)], held, T)
    cache = [tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 5), (0, 0))) for x in pair) for pair in cache]
    behind = pad([row[0, n:] for row, n in zip(rows, held, strict=True)], 4)
    hidden_BD, longer = decoding.extend(split, config, behind, more, cache, held, dtype=jnp.float32)
    for b, row in enumerate(rows):
        if more[b]:
            np.testing.assert_allclose(hidden_BD[b], full_hidden(config, row)[-1], atol=1e-5)
    expected = prefill([row[0] for row in rows], held + more, 11)
    for (k, v), (k_whole, v_whole) in zip(longer, expected, strict=True):
        for b, n in enumerate(held + more):
            np.testing.assert_allclose(k[b, :, :n], k_whole[b, :, :n], atol=1e-5)
            np.testing.assert_allclose(v[b, :, :n], v_whole[b, :, :n], atol=1e-5)
