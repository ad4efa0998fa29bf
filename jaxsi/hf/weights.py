"""Hugging Face folders: reads safetensors into our tree of weights; each device reads its own slices.

Only this folder knows Hugging Face's names. Code in a model folder is never run, and a pickle is never opened.
"""

import contextlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh

from jaxsi.hf.config import HFError, read_json
from jaxsi.model import mesh as meshlib
from jaxsi.model.decoder import ModelConfig, Parameter, Weights, parameters, weight_shardings

HEAD = "lm_head.weight"
ROWS = 4096  # rows of the vocabulary that are compared at a time
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}

# ---------------------------------------------------------------------------------------------------------------- names


class Layout(NamedTuple):
    """How the layout of a tensor in the file relates to that of our layer.

    ``file_shape(shape)`` is the file's shape for our shape. ``read(tensor, index, shape)`` cuts our ``index`` (one
    slice per dimension) out of the file's tensor, which is sliced lazily. ``write(array)`` returns the file's array.
    """

    file_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    read: Callable[[Any, tuple[slice, ...], tuple[int, ...]], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _heads(index: slice, head_dim: int) -> slice:
    return slice(index.start * head_dim, index.stop * head_dim)


def _read_out_of_embed(tensor: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    embed, heads, dim = index
    block = tensor[_heads(heads, shape[2]), embed]
    return block.reshape(-1, shape[2], block.shape[1]).transpose(2, 0, 1)[:, :, dim]


def _read_into_embed(tensor: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    heads, dim, embed = index
    block = tensor[embed, _heads(heads, shape[1])]
    return block.reshape(block.shape[0], -1, shape[1]).transpose(1, 2, 0)[:, dim]


SAME = Layout(lambda s: s, lambda tensor, index, _: tensor[index], lambda x: x)
TRANSPOSED = Layout(lambda s: (s[1], s[0]), lambda tensor, index, _: tensor[index[1], index[0]].T, lambda x: x.T)
ONE_ROW = Layout(lambda s: (1, *s), lambda tensor, index, _: tensor[0:1, index[0]][0], lambda x: x[None])
# [D, H, C] <- [H*C, D]; [H, C, D] <- [D, H*C]; [H, C] <- [H*C]. The halves of a head stay in place: our rotations pair
# them as Hugging Face's do.
OUT_OF_EMBED = Layout(
    lambda s: (s[1] * s[2], s[0]), _read_out_of_embed, lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0])
)
INTO_EMBED = Layout(
    lambda s: (s[2], s[0] * s[1]), _read_into_embed, lambda x: x.transpose(2, 0, 1).reshape(x.shape[2], -1)
)
HEADS_BIAS = Layout(
    lambda s: (s[0] * s[1],),
    lambda tensor, index, s: tensor[_heads(index[0], s[1])].reshape(-1, s[1])[:, index[1]],
    lambda x: x.reshape(-1),
)

Names = Mapping[str, tuple[str, Layout]]  # our name -> the file's name ({} is the layer number) and the layout

_BASE_NAMES: Names = {
    "embed": ("model.embed_tokens.weight", SAME),
    "final_norm": ("model.norm.weight", SAME),
    "lm_head": ("lm_head.weight", TRANSPOSED),
    "score": ("score.weight", ONE_ROW),
    "attention_norm": ("model.layers.{}.input_layernorm.weight", SAME),
    "q": ("model.layers.{}.self_attn.q_proj.weight", OUT_OF_EMBED),
    "k": ("model.layers.{}.self_attn.k_proj.weight", OUT_OF_EMBED),
    "v": ("model.layers.{}.self_attn.v_proj.weight", OUT_OF_EMBED),
    "o": ("model.layers.{}.self_attn.o_proj.weight", INTO_EMBED),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", SAME),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", TRANSPOSED),
    "up": ("model.layers.{}.mlp.up_proj.weight", TRANSPOSED),
    "down": ("model.layers.{}.mlp.down_proj.weight", TRANSPOSED),
}
_QKV_BIASES: Names = {
    "q_bias": ("model.layers.{}.self_attn.q_proj.bias", HEADS_BIAS),
    "k_bias": ("model.layers.{}.self_attn.k_proj.bias", HEADS_BIAS),
    "v_bias": ("model.layers.{}.self_attn.v_proj.bias", HEADS_BIAS),
}
_O_BIAS: Names = {"o_bias": ("model.layers.{}.self_attn.o_proj.bias", SAME)}
_QK_NORMS: Names = {
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", SAME),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", SAME),
}
NAMES: Mapping[str, Names] = {
    "llama": {**_BASE_NAMES, **_QKV_BIASES, **_O_BIAS},
    "mistral": _BASE_NAMES,
    "qwen2": {**_BASE_NAMES, **_QKV_BIASES},
    "qwen3": {**_BASE_NAMES, **_QKV_BIASES, **_O_BIAS, **_QK_NORMS},
}


# ----------------------------------------------------------------------------------------------------------------- load


class Tensor(NamedTuple):
    """One entry of a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def load_weights(
    folder: Path,
    config: ModelConfig,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    rules: meshlib.Rules = meshlib.TRAINING_RULES,
) -> Weights:
    """The stacked tree of weights; each array is built shard by shard from slices of the files.

    Args:
      folder: with model.safetensors, or shards and their index. Tensors are float32, float16 or bfloat16, or a mix.
      dtype: of the result.

    Raises:
      HFError: if there are no safetensors, a file is broken, or a tensor is missing, unknown, of the wrong shape or
        dtype, or not finite.
      MeshError: if the mesh does not divide a dimension.
    """
    shardings = weight_shardings(config, mesh, rules)
    expected = expected_tensors(config)
    tensors = _read_headers(Path(folder), len(expected))
    _check_tensors(Path(folder), config, expected, tensors)
    dtype = np.dtype(dtype)
    with contextlib.ExitStack() as stack:
        files = {file: _open(stack, file) for file in {tensor.file for tensor in tensors.values()}}
        if config.tie_embeddings and (head := tensors.get(HEAD)) is not None:
            name = NAMES[config.family]["embed"][0]
            embed = tensors[name]
            same = head.shape == embed.shape and _equal(
                files[head.file].get_slice(HEAD), files[embed.file].get_slice(name), head.shape[0]
            )
            if not same:
                raise HFError(
                    f"{head.file}: tensor {HEAD} differs from the embedding, but config.json has tie_word_embeddings = "
                    "true, which says that they are one; set it to false there to use this head"
                )

        def read(name: str, parameter: Parameter, sharding: jax.sharding.Sharding) -> jax.Array:
            pattern, layout = NAMES[config.family][name]
            stacked = "{}" in pattern
            shape = parameter.shape[1:] if stacked else parameter.shape
            cache: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # replicas ask for the same slices

            def callback(index: tuple[slice, ...] | None) -> np.ndarray:
                bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), parameter.shape, strict=True))
                if bounds not in cache:
                    inner = tuple(slice(*b) for b in (bounds[1:] if stacked else bounds))
                    layers = range(*bounds[0]) if stacked else [0]
                    block = np.empty([stop - start for start, stop in bounds], dtype)
                    for layer, target in zip(layers, block if stacked else [block], strict=True):
                        file_name = pattern.format(layer)
                        tensor = files[tensors[file_name].file].get_slice(file_name)
                        target[...] = layout.read(tensor, inner, shape).astype(dtype)
                        if not np.isfinite(target).all():
                            raise HFError(
                                f"{tensors[file_name].file}: tensor {file_name} has values not finite in {dtype}"
                            )
                    cache[bounds] = block
                return cache[bounds]

            return jax.make_array_from_callback(parameter.shape, sharding, callback)

        tree = parameters(config)
        weights: Weights = {
            name: read(name, p, shardings[name]) for name, p in tree.items() if isinstance(p, Parameter)
        }
        layers = {name: read(name, p, shardings["layers"][name]) for name, p in tree["layers"].items()}
        return weights | {"layers": layers}


def _equal(one: Any, other: Any, rows: int) -> bool:
    """Whether two lazily read tensors have the same numbers."""
    parts = [slice(i, min(i + ROWS, rows)) for i in range(0, rows, ROWS)]
    return all(np.array_equal(one[part], other[part]) for part in parts)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder of this model."""
    names, tree = NAMES[config.family], parameters(config)
    expected: dict[str, tuple[int, ...]] = {}
    for name, p in [(n, p) for n, p in tree.items() if isinstance(p, Parameter)]:
        pattern, layout = names[name]
        expected[pattern] = layout.file_shape(p.shape)
    for name, p in tree["layers"].items():
        pattern, layout = names[name]
        expected |= {pattern.format(i): layout.file_shape(p.shape[1:]) for i in range(config.num_layers)}
    return expected


def _read_headers(folder: Path, tensors: int) -> dict[str, Tensor]:
    """All tensors of the folder's files, by name. Names of tensors are never used as paths."""
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HFError(f"{folder / INDEX}: has no weight_map; download it again")
        for name in set(map(str, weight_map.values())):
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                raise HFError(f"{folder / INDEX}: {name!r} is not a safetensors file of this folder; download it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / WEIGHTS).is_file():
        weight_map, files = None, [folder / WEIGHTS]
    else:
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        reason = (
            f"there is {pickles[0]}, a pickle, which can run code; convert it to safetensors"
            if pickles
            else "no weights"
        )
        raise HFError(f"{folder}: has neither {WEIGHTS} nor {INDEX}: {reason}")
    by_name: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_header(file, tensors).items():
            if name in by_name:
                raise HFError(f"{file}: tensor {name} is also in {by_name[name].file.name}")
            if weight_map is not None and weight_map.get(name) != file.name:
                raise HFError(f"{file}: contains tensor {name}, but the index says {weight_map.get(name)}")
            by_name[name] = tensor
    missing = sorted(set(weight_map or ()) - set(by_name))
    if missing:
        raise HFError(
            f"{folder / INDEX}: tensor {missing[0]} (and {len(missing) - 1} more) is not in the file that it says"
        )
    return by_name


def _read_header(file: Path, tensors: int) -> dict[str, Tensor]:
    """The header of one file; its size is limited by the number of tensors that the model has."""
    limit = 2**16 + 1024 * tensors
    size = file.stat().st_size
    with open(file, "rb") as f:
        start = f.read(8)
        if start == b"version ":
            raise HFError(f"{file}: a Git LFS pointer, not the weights themselves; run `git lfs pull` in the folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise HFError(f"{file}: its header claims {length} bytes of {size}: truncated, or not safetensors")
        if length > limit:
            raise HFError(
                f"{file}: its header has {length} bytes, over the {limit} that this model's {tensors} tensors need"
            )
        text = f.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name appears twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
        header.pop("__metadata__", None)
        entries = {name: Tensor(file, t["dtype"], tuple(t["shape"])) for name, t in header.items()}
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise HFError(f"{file}: its header is not that of a safetensors file: {error!r}") from error
    if end != size - 8 - length:
        raise HFError(
            f"{file}: has {size} bytes, but its header says {end + 8 + length}: truncated or extended; "
            "download it again"
        )
    return entries


def _check_tensors(
    folder: Path, config: ModelConfig, expected: Mapping[str, tuple[int, ...]], tensors: dict[str, Tensor]
) -> None:
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise HFError(f"{folder}: {len(missing)} of {len(expected)} tensors are missing: {_few(missing)}")
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # computed from the config
    if config.tie_embeddings:
        ignored |= {HEAD} & set(tensors)  # a copy of the embedding
    extra = sorted(set(tensors) - set(expected) - ignored)
    if extra:
        raise HFError(
            f"{folder}: {len(extra)} tensors do not belong to a {config.family} model of this config: {_few(extra)}"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise HFError(f"{tensor.file}: tensor {name} has shape {tensor.shape}, the config asks for {shape}")
        if tensor.dtype not in DTYPES:
            raise HFError(f"{tensor.file}: tensor {name} has dtype {tensor.dtype}; supported are {', '.join(DTYPES)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _open(stack: contextlib.ExitStack, file: Path) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, "np"))
    except (safetensors.SafetensorError, OSError) as error:
        raise HFError(f"{file}: {error}") from error
