"""The decoder: causality, invariances, tiled log-probabilities, meshes."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig, ModelError, Rope
from jaxsi.model.mesh import MeshConfig, make_mesh

# Everything at once: biases, q/k norms, yarn, one layer with a window and one without, head_dim not embed / heads.
CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=98,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=48,
    max_positions=64,
    qkv_bias=True,
    o_bias=True,
    qk_norm=True,
    windows=(5, None),
    norm_eps=1e-6,
    rope=Rope(theta=10_000.0, scaling=("yarn", 4.0, 32.0, 1.0, 16, 1.1386, True)),
)
PLAIN = dataclasses.replace(CONFIG, qkv_bias=False, o_bias=False, qk_norm=False, windows=None, rope=Rope())
WINDOWED = dataclasses.replace(PLAIN, windows=(3, 3), tie_embeddings=True)
CONFIGS = {"everything": CONFIG, "windowed": WINDOWED}

hidden_states = functools.partial(jax.jit, static_argnames=("config", "dtype", "remat", "mesh"))(decoder.hidden_states)
full_logits = functools.partial(decoder.full_logits, dtype=jnp.dtype("float32"))


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


@functools.cache
def weights_of(config: ModelConfig) -> decoder.Weights:
    """Weights far from their initial values: norms and biases matter, and attention is not flat."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, p: decoder.Parameter) -> np.ndarray:
        return (0.2 * rng.normal(size=p.shape) + ("norm" in jax.tree_util.keystr(path))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(
        draw, decoder.parameters(config), is_leaf=lambda x: isinstance(x, decoder.Parameter)
    )


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"windows": (5,)}, "1 entries for 2 layers"),
    ],
)
def test_bad_config_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_unknown_rope_scaling_is_refused() -> None:
    with pytest.raises(ModelError, match="dynamic"):
        decoder.rope_frequencies(dataclasses.replace(CONFIG, rope=Rope(scaling=("dynamic", 2.0))))


@pytest.mark.parametrize("name", CONFIGS)
def test_declared_parameters_match_the_weights(name: str) -> None:
    config = CONFIGS[name]
    shapes = decoder.map_parameters(lambda p: p.shape, config)
    weights = weights_of(config)
    assert jax.tree.map(lambda w: w.shape, weights) == shapes
    assert decoder.count_parameters(config) == sum(w.size for w in jax.tree.leaves(weights))
    assert ("lm_head" in weights) != config.tie_embeddings


# ---------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", CONFIGS)
def test_causality_by_gradients(name: str) -> None:
    """Output t depends on input s exactly if s <= t and s is within the reach of the windows."""
    config, T = CONFIGS[name], 12
    weights = weights_of(config)
    row = np.random.default_rng(1).permutation(config.vocab_size)[:T].astype(np.int32)  # each token once

    def outputs(embed: jax.Array) -> jax.Array:
        hidden = decoder.hidden_states(weights | {"embed": embed}, config, jnp.asarray(row[None]))
        return hidden[0] @ jnp.asarray(np.random.default_rng(2).normal(size=config.embed_dim), jnp.float32)

    gradients_TVD = jax.jit(jax.jacrev(outputs))(weights["embed"])
    depends_TS = np.abs(gradients_TVD[:, row]).max(axis=-1) > 0
    t, s = np.mgrid[:T, :T]
    windows = config.windows or (None,) * config.num_layers
    reach = sum(T if w is None else w - 1 for w in windows)
    np.testing.assert_array_equal(depends_TS, (s <= t) & (t - s <= reach))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_other_rows_do_not_change_the_output(name: str) -> None:
    config, n = CONFIGS[name], 9
    weights, row = weights_of(config), tokens(1, 9)
    alone = hidden_states(weights, config, row)[0]
    T = 16
    for start in (0, T - n, 3):  # padded on the right, on the left, on both sides
        batch = tokens(3, T, seed=start + 1)
        batch[1, start : start + n] = row[0]
        segments, positions = np.ones((3, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (3, 1))
        segments[1] = (np.arange(T) >= start) & (np.arange(T) < start + n)
        positions[1] = np.maximum(np.arange(T) - start, 0)
        among = hidden_states(weights, config, batch, positions, segments)
        np.testing.assert_allclose(among[1, start : start + n], alone, atol=1e-5)
        assert np.isfinite(among).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences_do_not_see_each_other(name: str) -> None:
    config, lengths = CONFIGS[name], (7, 4, 9)
    weights, row = weights_of(config), tokens(1, 24)
    segments, positions = np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32)
    ends = np.cumsum(lengths)
    for i, (end, n) in enumerate(zip(ends, lengths, strict=True), start=1):
        segments[0, end - n : end], positions[0, end - n : end] = i, np.arange(n)
    packed = hidden_states(weights, config, row, positions, segments)
    for end, n in zip(ends, lengths, strict=True):
        np.testing.assert_allclose(packed[0, end - n : end], full_hidden(config, row[:, end - n : end]), atol=1e-5)


def full_hidden(config: ModelConfig, rows: np.ndarray) -> jax.Array:
    return hidden_states(weights_of(config), config, rows)[0]


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.slow
def test_remat_changes_the_number_of_products_but_not_the_gradient() -> None:
    """A layer has seven products forward and fourteen backward. "full" computes the first six again (the output of the
    seventh is not needed), "products" computes none again."""
    weights, rows = weights_of(CONFIG), jnp.asarray(tokens(2, 11))

    def loss(weights: decoder.Weights, remat: decoder.Remat) -> jax.Array:
        hidden = decoder.hidden_states(weights, CONFIG, rows, remat=remat)
        return jnp.mean(jnp.square(decoder.logits(weights, CONFIG, hidden)))

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = value_and_grad(weights, "none")
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain[1])) > 0  # every weight has a gradient

    def products(remat: decoder.Remat) -> int:
        """Number of products of activations and weights, recognised by the number of tokens and the MLP's width."""
        text = value_and_grad.lower(weights, remat).as_text()
        return len(re.findall(rf"dot_general.*tensor<2x11x\d+xf32>, tensor<\d+x{CONFIG.mlp_dim}xf32>\)", text))

    for remat, again in (("full", 2), ("products", 0)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), plain, value_and_grad(weights, remat)
        )
        assert products(remat) - products("none") == again  # gate and up


@pytest.mark.parametrize("config", [PLAIN, WINDOWED], ids=["untied", "tied"])
def test_token_logps_equal_log_softmax_for_every_tile(config: ModelConfig) -> None:
    B, T = 2, 29  # a prime: only tiles of 1 and 29 divide it
    weights = weights_of(config)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, config.embed_dim)), jnp.float32)
    targets, pull = tokens(B, T), np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)

    def whole(weights: decoder.Weights, hidden: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(decoder.logits(weights, config, hidden), axis=-1)
        return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]

    expected, vjp = jax.vjp(whole, weights, hidden)
    expected_gradients = vjp(pull)
    one_token = 4 * B * config.vocab_size
    for tile in (1, 5, 13, 29):

        def tiled(weights: decoder.Weights, hidden: jax.Array, tile_bytes: int = tile * one_token) -> jax.Array:
            return decoder.token_logps(weights, config, hidden, targets, tile_bytes=tile_bytes)

        def run(weights: decoder.Weights, hidden: jax.Array, tiled: Callable[..., jax.Array] = tiled) -> tuple:
            logps, vjp = jax.vjp(tiled, weights, hidden)
            return logps, vjp(jnp.asarray(pull))

        logps, gradients = jax.jit(run)(weights, hidden)
        assert logps.dtype == jnp.float32
        np.testing.assert_allclose(logps, expected, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), gradients, expected_gradients)


def test_token_logps_gradient_never_holds_the_logits_of_the_whole_batch() -> None:
    config = dataclasses.replace(PLAIN, vocab_size=4999)  # a prime, so that its buffers are recognised by their shape
    B, T, tile = 2, 120, 8
    abstract = decoder.abstract_weights(config, one_device())
    hidden = jax.ShapeDtypeStruct((B, T, config.embed_dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def compiled(tile_bytes: int) -> jax.stages.Compiled:
        def loss(weights: decoder.Weights, hidden: jax.Array, targets: jax.Array) -> jax.Array:
            return jnp.sum(decoder.token_logps(weights, config, hidden, targets, tile_bytes=tile_bytes))

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(abstract, hidden, targets).compile()

    def largest_logits(program: jax.stages.Compiled) -> int:
        shapes = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
        sizes = [tuple(map(int, shape.split(","))) for shape in shapes]
        vocabulary = [s for s in sizes if config.vocab_size in s and config.embed_dim not in s]
        return max(math.prod(s) for s in vocabulary)

    one_token = 4 * B * config.vocab_size
    tiled, whole = compiled(tile * one_token), compiled(T * one_token)
    assert largest_logits(whole) == B * T * config.vocab_size  # the test does find the buffer
    assert largest_logits(tiled) == B * tile * config.vocab_size
    logits_bytes = 4 * B * T * config.vocab_size
    assert tiled.memory_analysis().temp_size_in_bytes < logits_bytes / 2 < whole.memory_analysis().temp_size_in_bytes


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logps() -> None:
    weights, rows = weights_of(CONFIG), tokens(2, 9)
    hidden = hidden_states(weights, CONFIG, rows[:, :-1], dtype=jnp.dtype("bfloat16"))
    exact = hidden_states(weights, CONFIG, rows[:, :-1])
    assert hidden.dtype == jnp.bfloat16
    logps = jax.jit(functools.partial(decoder.token_logps, config=CONFIG, targets_BT=rows[:, 1:]))
    assert logps(weights, hidden_BTD=hidden).dtype == jnp.float32
    np.testing.assert_allclose(logps(weights, hidden_BTD=hidden), logps(weights, hidden_BTD=exact), atol=0.3)


# --------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_logits_and_logps_are_the_same_on_every_mesh(sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    weights, rows = weights_of(CONFIG), tokens(8, 13)

    @functools.partial(jax.jit, static_argnames="mesh")
    def run(weights: decoder.Weights, rows: jax.Array, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
        hidden = decoder.hidden_states(weights, CONFIG, rows, mesh=mesh)
        targets = jnp.roll(rows, -1, axis=1)
        return decoder.logits(weights, CONFIG, hidden), decoder.token_logps(
            weights, CONFIG, hidden, targets, tile_bytes=4000
        )

    def on(mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
        placed = jax.device_put(weights, decoder.weight_shardings(CONFIG, mesh))
        return run(placed, jax.device_put(rows, meshlib.sharding(mesh, ("batch", None))), mesh)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), on(mesh), on(one_device()))


@pytest.mark.slow
def test_initial_weights_are_sharded_and_the_same_on_every_mesh() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    config = dataclasses.replace(PLAIN, tie_embeddings=True)
    weights = decoder.initialise(config, mesh, jax.random.key(3))
    shardings = decoder.weight_shardings(config, mesh)
    jax.tree.map(
        lambda w, s: w.sharding.is_equivalent_to(s, w.ndim) or pytest.fail(str(w.sharding)), weights, shardings
    )
    assert weights["layers"]["q"].addressable_shards[0].data.shape == (2, 16, 2, 6)
    alone = decoder.initialise(config, one_device(), jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, weights, alone)
    assert float(jnp.std(alone["embed"])) == pytest.approx(0.02, rel=0.1)
    assert float(jnp.std(alone["layers"]["o"])) == pytest.approx(0.02 / math.sqrt(2 * config.num_layers), rel=0.1)
    abstract = decoder.abstract_weights(config, mesh)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(lambda w: (w.shape, w.dtype), weights)


def test_module_equals_the_functions() -> None:
    config, rows = CONFIG, tokens(2, 7)
    weights = weights_of(config)
    module = decoder.decoder(config, weights)
    np.testing.assert_allclose(module(jnp.asarray(rows)), full_logits(weights, config, rows), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, module.weights, weights)
