"""Fused attention: Splash (interpreted) and cuDNN (lowered) against XLA's attention, and how one is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jaxsi.model import fused_attention
from jaxsi.model.attention import SHARED, attend_causally, each_branch
from jaxsi.model.fused_attention import cudnn, cudnn_takes, splash, splash_takes

T, C = 200, 64  # 200 is not a multiple of a block
ANY = 10**6


def heads(B: int, H: int, K: int, T: int = T, dtype: str = "float32") -> tuple[jax.Array, ...]:
    """Queries, keys and values."""
    shapes = [(B, T, H, C), (B, K, T, C), (B, K, T, C)]
    keys = jax.random.split(jax.random.key(1), 3)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def rows_of(*lengths: list[int]) -> tuple[jax.Array, jax.Array]:
    """Segments and positions of rows that hold sequences of these lengths, then padding."""
    segments, positions = np.zeros((len(lengths), T), np.int32), np.zeros((len(lengths), T), np.int32)
    for b, row in enumerate(lengths):
        start = 0
        for number, n in enumerate(row, 1):
            segments[b, start : start + n], positions[b, start : start + n] = number, np.arange(n)
            start += n
        positions[b, start:] = np.arange(T - start)
    return jnp.asarray(segments), jnp.asarray(positions)


def value_and_gradients(attention, qkv, segments_BT):
    """The output at the tokens (zeros at the padding), and the gradients of a weighted sum over the tokens."""
    weights = jnp.sin(jnp.arange(qkv[0].size, dtype=jnp.float32)).reshape(qkv[0].shape)

    def loss(qkv):
        real = jnp.where((segments_BT != 0)[:, :, None, None], attention(*qkv).astype(jnp.float32), 0.0)
        return jnp.sum(real * weights), real

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, *gradients


def agree(attention, qkv, segments_BT, positions_BT, window, atol):
    by_xla = functools.partial(
        attend_causally, segments_BT=segments_BT, positions_BT=positions_BT, window=jnp.int32(window), tile=128
    )
    expected = value_and_gradients(by_xla, qkv, segments_BT)
    actual = value_and_gradients(attention, qkv, segments_BT)
    for name, a, b in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=atol, err_msg=name)


@pytest.mark.parametrize(("H", "K", "window"), [(4, 2, ANY), (4, 2, 37), (2, 2, 1)])
def test_splash_equals_the_attention_of_xla(H, K, window):
    segments_BT, positions_BT = rows_of([60, 41, 50], [T], [129])
    attention = functools.partial(splash, segments_BT=segments_BT, window=window, interpret=True)
    agree(attention, heads(3, H, K), segments_BT, positions_BT, window, atol=2e-5)


def test_splash_handles_both_branches_of_a_forked_row():
    segments_BT, positions_BT = (np.zeros((2, T), np.int32) for _ in range(2))
    for b, (prompt, first, second) in enumerate([(60, 41, 50), (1, 130, 69)]):
        segments_BT[b, : prompt + first + second] = np.repeat([SHARED, 1, 2], [prompt, first, second])
        positions_BT[b, : prompt + first] = np.arange(prompt + first)
        positions_BT[b, prompt + first : prompt + first + second] = prompt + np.arange(second)
    kernel = functools.partial(splash, window=ANY, interpret=True)
    attention = functools.partial(each_branch, kernel, segments_BT=segments_BT)
    agree(attention, heads(2, 4, 2), segments_BT, positions_BT, ANY, atol=2e-5)


def test_splash_on_a_mesh_gives_each_device_its_rows_and_heads():
    segments_BT, positions_BT = rows_of([60, 41, 50], [T], [129], [7])
    attention = fused_attention.on_mesh(functools.partial(splash, window=ANY, interpret=True), tiny.mesh("2x2x2"))
    agree(lambda *qkv: attention(*qkv, segments_BT), heads(4, 4, 2), segments_BT, positions_BT, ANY, atol=2e-5)


def test_shapes_that_the_kernels_take():
    def q(T, C, dtype):
        return jax.ShapeDtypeStruct((1, T, 2, C), dtype)

    assert splash_takes(q(128, 64, jnp.bfloat16)) and splash_takes(q(200, 128, jnp.float32))
    assert not any(
        splash_takes(x) for x in (q(64, 64, jnp.bfloat16), q(128, 80, jnp.bfloat16), q(128, 64, jnp.float16))
    )
    assert cudnn_takes(q(16, 80, jnp.bfloat16), ANY) and cudnn_takes(q(16, 128, jnp.float16), 16)
    assert not cudnn_takes(q(16, 128, jnp.float32), ANY)  # cuDNN has no attention in float32
    assert not cudnn_takes(q(16, 256, jnp.bfloat16), ANY)  # Hopper only
    assert not cudnn_takes(q(16, 12, jnp.bfloat16), ANY)
    assert not cudnn_takes(q(16, 64, jnp.bfloat16), 15)  # a window


class ChosenError(Exception):
    """Raised in place of the kernel that was chosen."""


@pytest.mark.parametrize(
    ("platform", "window", "lengths", "kernel"),
    [
        ("tpu", ANY, False, "splash"),
        ("tpu", 5, True, "splash"),
        ("gpu", ANY, True, "cudnn"),
        ("gpu", ANY, False, None),  # rows may be packed
        ("gpu", 5, True, None),
        ("cpu", ANY, True, None),
        ("tpu", jnp.int32(ANY), True, None),  # a window that is data
    ],
)
def test_mesh_and_shapes_choose_the_kernel(monkeypatch, platform, window, lengths, kernel):
    def reached(name):
        def attention(*_, **__):
            raise ChosenError(name)

        return attention

    monkeypatch.setattr(fused_attention.meshlib, "platform", lambda _: platform)
    for name in ("splash", "cudnn"):
        monkeypatch.setattr(fused_attention, name, reached(name))
    segments_BT, positions_BT = rows_of([100])
    arguments = (*heads(1, 2, 2, dtype="bfloat16"), segments_BT, positions_BT, window)
    lengths_B = jnp.asarray([100], jnp.int32) if lengths else None
    if kernel is None:
        assert attend_causally(*arguments, lengths_B=lengths_B, mesh=tiny.mesh()).shape == (1, T, 2, C)
        return
    with pytest.raises(ChosenError, match=kernel):
        attend_causally(*arguments, lengths_B=lengths_B, mesh=tiny.mesh())
    # Without a mesh, or if its devices get unequal parts, XLA's attention is used.
    attend_causally(*arguments, lengths_B=lengths_B)
    attend_causally(*arguments, lengths_B=lengths_B, mesh=tiny.mesh("2x2x2"))


def test_forked_row_with_a_window_uses_the_attention_of_xla(monkeypatch):
    """The columns of the second branch are not its positions."""
    monkeypatch.setattr(fused_attention.meshlib, "platform", lambda _: "tpu")
    monkeypatch.setattr(fused_attention, "splash", lambda *_, **__: pytest.fail("Splash was taken"))
    arguments = (*heads(1, 2, 2, dtype="bfloat16"), *rows_of([100]))
    assert attend_causally(*arguments, T - 1, forked=True, mesh=tiny.mesh()).shape == (1, T, 2, C)


def test_cudnn_lowers(monkeypatch):
    stablehlo = pytest.importorskip(
        "jax._src.cudnn.fused_attention_stablehlo", reason="this JAX keeps its check of cuDNN elsewhere"
    )
    # The version of another machine, which has cuDNN.
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91_000)
    qkv = heads(2, 4, 2, dtype="bfloat16")
    lengths_B = jnp.asarray([T, 7], jnp.int32)

    def loss(qkv):
        return jnp.sum(cudnn(*qkv, lengths_B).astype(jnp.float32))

    text = jax.jit(jax.grad(loss)).trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize(("H", "K"), [(4, 2), (2, 2)])
def test_cudnn_equals_the_attention_of_xla(H, K):
    lengths = [T, 129, 1, 0]
    segments_BT, positions_BT = rows_of(*[[n] for n in lengths])
    attention = functools.partial(cudnn, lengths_B=jnp.asarray(lengths, jnp.int32))
    agree(attention, heads(4, H, K, dtype="bfloat16"), segments_BT, positions_BT, ANY, atol=5e-2)
