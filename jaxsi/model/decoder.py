"""The decoder: Llama-shaped transformers as a Flax NNX module over pure functions of a tree of weights.

Dimension letters, used as suffixes of names and in einsums:
  B batch · T tokens (queries) · S keys (cache length) · V vocabulary · D embed · H heads · K kv heads
  G heads per kv head · C head dim · F mlp · L layers

The canonical tree of weights stacks the layers on a leading axis L, so that training scans over them. Sampling
takes a list of layers instead: a scan would copy the weights and the cache at every decoded token.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxsi.model import lm_head, mesh as meshlib
from jaxsi.model.attention import attend_causally
from jaxsi.model.cpu_matmul import PRODUCT, multiply
from jaxsi.runs.errors import InputError

Weights = dict[str, Any]
Remat = Literal["none", "products", "full"]
NO_WINDOW = 2**30  # a window longer than any text: full attention


class ModelError(InputError, ValueError):
    """A model configuration that the decoder cannot run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: the base and, if the model was stretched to longer texts, the rule for that.

    ``scaling`` is None, ("linear", factor), ("llama3", factor, low_freq_factor, high_freq_factor, original_positions)
    or ("yarn", factor, beta_fast, beta_slow, original_positions, attention_factor, truncate).
    """

    theta: float = 10_000.0
    scaling: tuple[Any, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the decoder's function, in our own names (``hf/config.py`` reads it from config.json).

    ``windows`` has one entry per layer: how many positions back it sees, its own included; None means no limit. With
    ``scalar_head`` the model outputs one number at each token in place of logits: a reward or a value.
    """

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] | None = None
    scalar_head: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd: rotary embeddings need pairs")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise ModelError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")


class Parameter(NamedTuple):
    """The declaration of a weight: its shape, the logical name of each dimension, and its initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Callable[..., jax.Array]


def parameters(config: ModelConfig) -> dict[str, Any]:
    """The declaration of every weight, as a tree of the same form as the weights."""
    c = config
    one = nnx.initializers.ones_init()
    zero = nnx.initializers.zeros_init()
    normal = nnx.initializers.normal(0.02)
    # Projections back into the residual stream start smaller, or its variance grows with depth (GPT-2, section 2.3).
    into_residual = nnx.initializers.normal(0.02 / math.sqrt(2 * c.num_layers))

    def layered(shape: tuple[int, ...], axes: tuple[str, ...], init: Callable[..., jax.Array]) -> Parameter:
        return Parameter((c.num_layers, *shape), ("layers", *axes), init)

    layers = {
        "attention_norm": layered((c.embed_dim,), ("embed",), one),
        "q": layered((c.embed_dim, c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), normal),
        "k": layered((c.embed_dim, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), normal),
        "v": layered((c.embed_dim, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), normal),
        "o": layered((c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed"), into_residual),
        "mlp_norm": layered((c.embed_dim,), ("embed",), one),
        "gate": layered((c.embed_dim, c.mlp_dim), ("embed", "mlp"), normal),
        "up": layered((c.embed_dim, c.mlp_dim), ("embed", "mlp"), normal),
        "down": layered((c.mlp_dim, c.embed_dim), ("mlp", "embed"), into_residual),
    }
    if c.qkv_bias:
        layers["q_bias"] = layered((c.num_heads, c.head_dim), ("heads", "head_dim"), zero)
        layers["k_bias"] = layered((c.num_kv_heads, c.head_dim), ("kv_heads", "head_dim"), zero)
        layers["v_bias"] = layered((c.num_kv_heads, c.head_dim), ("kv_heads", "head_dim"), zero)
    if c.o_bias:
        layers["o_bias"] = layered((c.embed_dim,), ("embed",), zero)
    if c.qk_norm:
        layers["q_norm"] = layered((c.head_dim,), ("head_dim",), one)
        layers["k_norm"] = layered((c.head_dim,), ("head_dim",), one)
    tree: dict[str, Any] = {
        "embed": Parameter((c.vocab_size, c.embed_dim), ("vocab", "embed"), normal),
        "layers": layers,
        "final_norm": Parameter((c.embed_dim,), ("embed",), one),
    }
    if c.scalar_head:
        # Zeros: an untrained reward model has no preferences, so its loss at step 0 is known exactly.
        tree["score"] = Parameter((c.embed_dim,), ("embed",), zero)
    elif not c.tie_embeddings:
        tree["lm_head"] = Parameter((c.embed_dim, c.vocab_size), ("embed", "vocab"), normal)
    return tree


def map_parameters(f: Callable[[Parameter], Any], config: ModelConfig) -> Weights:
    """The tree of weights with ``f(declaration)`` at each leaf."""
    return jax.tree.map(f, parameters(config), is_leaf=lambda x: isinstance(x, Parameter))


def count_parameters(config: ModelConfig) -> int:
    """Number of weights (a tied head counts once)."""
    return sum(jax.tree.leaves(map_parameters(lambda p: math.prod(p.shape), config)))


def weight_shardings(config: ModelConfig, mesh: Mesh, rules: meshlib.Rules = meshlib.TRAINING_RULES) -> Weights:
    """The sharding of every weight on ``mesh``.

    Raises:
      MeshError: if a dimension is not a multiple of the mesh axes that divide it.
    """

    def shard(p: Parameter) -> jax.sharding.NamedSharding:
        for size, axis in zip(p.shape, p.axes, strict=True):
            parts = meshlib.axis_size(mesh, axis, rules)
            if size % parts:
                raise meshlib.MeshError(
                    f"{axis} = {size} of the model is not divisible by {parts} (mesh axis {rules[axis]}); "
                    f"choose a mesh whose {rules[axis]} size divides {size}"
                )
        return meshlib.sharding(mesh, p.axes, rules)

    return map_parameters(shard, config)


def abstract_weights(config: ModelConfig, mesh: Mesh, dtype: Any = jnp.float32) -> Weights:
    """Shapes, dtypes and shardings of the weights, without the weights."""
    shapes = map_parameters(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), config)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        weight_shardings(config, mesh),
    )


class Layers(nnx.Module):
    """The weights of all layers, each stacked on a leading axis."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        for name, p in parameters(config)["layers"].items():
            setattr(self, name, nnx.Param(p.init(rngs.params(), p.shape), axes=p.axes))


class Decoder(nnx.Module):
    """A causal language model. ``weights`` is its state as a plain tree, which the functions of this module take."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.layers = Layers(config, rngs=rngs)
        for name, p in parameters(config).items():
            if isinstance(p, Parameter):
                setattr(self, name, nnx.Param(p.init(rngs.params(), p.shape), axes=p.axes))

    @property
    def weights(self) -> Weights:
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """[B, T] int32 -> logits [B, T, V] float32."""
        return logits(self.weights, self.config, hidden_states(self.weights, self.config, tokens_BT))


def initialise(config: ModelConfig, mesh: Mesh, key: jax.Array) -> Weights:
    """Fresh float32 weights, created directly in their shardings."""

    def make(key: jax.Array) -> Weights:
        return Decoder(config, rngs=nnx.Rngs(params=key)).weights

    return jax.jit(make, out_shardings=weight_shardings(config, mesh))(key)


def decoder(config: ModelConfig, weights: Weights) -> Decoder:
    """The NNX module that holds ``weights``."""
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


# ---------------------------------------------------------------------------------------------------------------- parts


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


def rope_frequencies(config: ModelConfig) -> tuple[list[float], float]:
    """Angular frequency of each of the C / 2 pairs of dimensions, and the factor on cos and sin (1 except for yarn)."""
    theta, scaling, dim = config.rope.theta, config.rope.scaling, config.head_dim
    plain = [theta ** (-i / dim) for i in range(0, dim, 2)]
    match scaling:
        case None:
            return plain, 1.0
        case ("linear", factor):
            return [f / factor for f in plain], 1.0
        case ("llama3", factor, low, high, original):
            return [_llama3_frequency(f, factor, low, high, original) for f in plain], 1.0
        case ("yarn", factor, beta_fast, beta_slow, original, attention_factor, truncate):

            def dimension_at(rotations: float) -> float:  # that turns this often over the original length
                return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

            first, last = dimension_at(beta_fast), dimension_at(beta_slow)
            if truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            last = last + 0.001 if first == last else last
            share = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(dim // 2)]  # 1: interpolate
            return [f / factor * s + f * (1 - s) for f, s in zip(plain, share, strict=True)], attention_factor
    raise ModelError(f"unknown rope scaling {scaling!r}")


def _llama3_frequency(f: float, factor: float, low: float, high: float, original: int) -> float:
    wavelength = 2 * math.pi / f
    if wavelength < original / high:
        return f
    if wavelength > original / low:
        return f / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


def rotate(x_BTHC: jax.Array, positions_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary embedding of queries or keys; the two halves of the head dimension form the pairs."""
    frequencies, factor = rope_frequencies(config)
    angles = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None]
    cos, sin = (jnp.cos(angles) * factor)[:, :, None], (jnp.sin(angles) * factor)[:, :, None]
    a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHC.dtype)


def _project(h_BTD: jax.Array, w_DHC: jax.Array) -> jax.Array:
    """Heads [B, T, H, C], by one matrix product."""
    D, H, C = w_DHC.shape
    return multiply(h_BTD, w_DHC.reshape(D, H * C)).reshape(*h_BTD.shape[:2], H, C)


def qkv(
    layer: Weights, config: ModelConfig, x_BTD: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, C] and keys and values [B, K, T, C] of one layer, rotated."""
    dtype = x_BTD.dtype
    h_BTD = rms_norm(x_BTD, layer["attention_norm"], config.norm_eps)
    q, k, v = (_project(h_BTD, layer[name].astype(dtype)) for name in "qkv")
    if config.qkv_bias:
        q, k, v = (x + layer[f"{name}_bias"].astype(dtype)[None, None] for x, name in ((q, "q"), (k, "k"), (v, "v")))
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config.norm_eps), rms_norm(k, layer["k_norm"], config.norm_eps)
    q, k = rotate(q, positions_BT, config), rotate(k, positions_BT, config)
    return q, k.swapaxes(1, 2), v.swapaxes(1, 2)


def after_attention(layer: Weights, config: ModelConfig, x_BTD: jax.Array, attended_BTHC: jax.Array) -> jax.Array:
    """Output projection, residual and the gated MLP."""
    dtype = x_BTD.dtype
    B, T, H, C = attended_BTHC.shape
    x_BTD = x_BTD + multiply(attended_BTHC.reshape(B, T, H * C), layer["o"].astype(dtype).reshape(H * C, -1))
    if config.o_bias:
        x_BTD = x_BTD + layer["o_bias"].astype(dtype)[None, None]
    h_BTD = rms_norm(x_BTD, layer["mlp_norm"], config.norm_eps)
    gate_BTF, up_BTF = (multiply(h_BTD, layer[name].astype(dtype)) for name in ("gate", "up"))
    return x_BTD + multiply(jax.nn.silu(gate_BTF) * up_BTF, layer["down"].astype(dtype))


def windows(config: ModelConfig) -> list[int]:
    return [NO_WINDOW if w is None else w for w in config.windows or (None,) * config.num_layers]


def embed(weights: Weights, tokens: jax.Array, dtype: Any) -> jax.Array:
    return weights["embed"][tokens].astype(dtype)


# ------------------------------------------------------------------------------------------------------ whole sequences


def hidden_states(
    weights: Weights,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    lengths_B: jax.Array | None = None,
    forked: bool = False,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Normalised last hidden states [B, T, D] of whole sequences, from stacked weights.

    A row holds one sequence with padding behind it (pass ``lengths_B``, which fused attention on GPU needs), or several
    sequences (pass positions and segments), or T tokens of one sequence (pass neither). Fused attention on TPU and GPU
    needs a static window: if the windows of the layers differ, they use XLA's attention.

    Args:
      tokens_BT: int32.
      positions_BT: int32, default 0, 1, ...
      segments_BT: int32. Tokens see only their own segment and ``attention.SHARED``; padding is segment 0.
      lengths_B: int32. If segments are passed too, both must say the same.
      forked: as in ``attend_causally``.
      dtype: of the computation; norms, softmax and rotations are in float32.
      remat: what the backward pass computes again instead of keeping it: nothing ("none"); all of a layer except its
        products with weights ("products"); all of a layer ("full").
    """
    B, T = tokens_BT.shape
    columns_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if positions_BT is None:
        positions_BT = columns_BT
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
        if lengths_B is not None:
            segments_BT = (columns_BT < lengths_B[:, None]).astype(jnp.int32)
    layer_windows = windows(config)
    one_window = len(set(layer_windows)) == 1
    attention = functools.partial(attend_causally, lengths_B=lengths_B, forked=forked, mesh=mesh)

    def place(x_BTD: jax.Array) -> jax.Array:
        return x_BTD if mesh is None else meshlib.constrain(x_BTD, mesh, ("batch", "sequence", None))

    def block(x_BTD: jax.Array, layer_and_window: tuple[Weights, jax.Array]) -> tuple[jax.Array, None]:
        layer, window = layer_and_window
        q_BTHC, k_BKSC, v_BKSC = qkv(layer, config, x_BTD, positions_BT)
        window = layer_windows[0] if one_window else window
        attended_BTHC = attention(q_BTHC, k_BKSC, v_BKSC, segments_BT, positions_BT, window)
        return place(after_attention(layer, config, x_BTD, attended_BTHC)), None

    match remat:
        case "full":
            block = jax.checkpoint(block)
        case "products":
            block = jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))
        case "none":
            pass
        case _:
            raise ModelError(f"remat is {remat!r}; it must be one of {', '.join(get_args(Remat))}")
    x_BTD = place(embed(weights, tokens_BT, dtype))
    x_BTD, _ = jax.lax.scan(block, x_BTD, (weights["layers"], jnp.asarray(layer_windows, jnp.int32)))
    return rms_norm(x_BTD, weights["final_norm"], config.norm_eps)


def logits(weights: Weights, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Next-token logits [..., V] float32 of hidden states [..., D].

    Raises: ModelError: if the model has a scalar head.
    """
    _check_text_head(config)
    return jnp.matmul(hidden, _head(weights, config, hidden.dtype), preferred_element_type=jnp.float32)


def _check_text_head(config: ModelConfig) -> None:
    if config.scalar_head:
        raise ModelError(
            "this model has a scalar head (a reward or value model), so it cannot write or score text; "
            "use a model with a language-model head"
        )


def _head(weights: Weights, config: ModelConfig, dtype: Any) -> jax.Array:
    return (weights["embed"].T if config.tie_embeddings else weights["lm_head"]).astype(dtype)


def token_logps(
    weights: Weights,
    config: ModelConfig,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    tile_bytes: int = lm_head.TILE_BYTES,
) -> jax.Array:
    """Log-probability [B, T] float32 of ``targets_BT`` under the untruncated softmax at temperature 1.

    Works by tiles of tokens: a [B, T, V] array never exists.

    Args:
      tile_bytes: the largest float32 tile of logits, over all devices.

    Raises: ModelError: if the model has a scalar head.
    """
    _check_text_head(config)
    matrix_DV = _head(weights, config, hidden_BTD.dtype)
    return lm_head.logps_and_entropies(hidden_BTD, matrix_DV, targets_BT, tile_bytes=tile_bytes)[0]


def predicted_logps(
    weights: Weights,
    config: ModelConfig,
    hidden_BTD: jax.Array,
    places_BR: jax.Array,
    targets_BR: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Log-probability [B, R] float32 of the tokens ``targets_BR`` after the hidden states in the columns ``places_BR``.

    It is 0 if the target is -1. The head runs on these columns only.

    Raises: ModelError: if the model has a scalar head.
    """
    hidden_BRD = jnp.take_along_axis(hidden_BTD, places_BR[..., None], axis=1)
    tile_bytes = lm_head.TILE_BYTES * (1 if mesh is None else mesh.size)
    logps_BR = token_logps(weights, config, hidden_BRD, jnp.maximum(targets_BR, 0), tile_bytes=tile_bytes)
    return jnp.where(targets_BR >= 0, logps_BR, 0.0)


def sequence_logps(
    weights: Weights,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    lengths_B: jax.Array | None = None,
    dtype: Any,
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Log-probability [B, T] float32 of each token after those before it, for rows as in ``hidden_states``.

    Column 0, which is never predicted, is 0.
    """
    hidden_BTD = hidden_states(
        weights, config, tokens_BT, positions_BT, segments_BT, lengths_B=lengths_B, dtype=dtype, remat=remat, mesh=mesh
    )
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    tile_bytes = lm_head.TILE_BYTES * (1 if mesh is None else mesh.size)
    logps_BT = token_logps(weights, config, hidden_BTD, targets_BT, tile_bytes=tile_bytes)
    return jnp.roll(logps_BT, 1, axis=1).at[:, 0].set(0.0)


def scalar_values(
    weights: Weights,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    lengths_B: jax.Array | None = None,
    dtype: Any,
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> jax.Array:
    """The output [B, T] float32 of the scalar head at each token, for rows as in ``hidden_states``.

    It depends on that token and those before it.
    """
    hidden_BTD = hidden_states(
        weights, config, tokens_BT, positions_BT, segments_BT, lengths_B=lengths_B, dtype=dtype, remat=remat, mesh=mesh
    )
    return jnp.einsum("BTD,D->BT", hidden_BTD.astype(jnp.float32), weights["score"].astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def full_logits(weights: Weights, config: ModelConfig, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """[B, T] int32 -> [B, T, V] float32, for inspection: training and scoring never build this array."""
    return logits(weights, config, hidden_states(weights, config, tokens_BT, dtype=dtype))
