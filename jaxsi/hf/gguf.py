"""GGUF files, as llama.cpp and its relatives use them: turned into a Hugging Face folder once, and loaded like one.

The package `gguf` reads the file and undoes its quantisation; the weights of the folder are float32, without further
rounding. Folders are kept in the user's cache, by the digest of the file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from jaxsi.hf.config import HFError
from jaxsi.hf.gguf_tokenizer import write_tokenizer
from jaxsi.hf.weights import INDEX
from jaxsi.runs.cache import cache_home

# GGUF's architecture -> model_type, class, and whether its files keep the two halves of a head interleaved.
FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM", True),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", False),
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama 3.1's scaling of positions stands in GGUF as a factor for each frequency: {largest factor: other constants}.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _File(NamedTuple):
    path: Path
    reader: Any
    arch: str

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the file's metadata; `{arch}` stands for the architecture."""
        field = self.reader.fields.get(key.replace("{arch}", self.arch))
        value = default if field is None else field.contents()
        return value.item() if isinstance(value, np.generic) else value

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise HFError(f"{self.path}: no {key.replace('{arch}', self.arch)} in it; convert the model again")
        return value


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def as_folder(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file, made at its first use.

    Raises:
      HFError: if the package `gguf` is absent, the file is damaged, or its architecture, its tokenizer or one of its
        tensors is not supported.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = cache_home() / "jaxsi" / "gguf"
    folder = cache / digest
    if (folder / "config.json").is_file():
        return folder
    opened = _open(path)
    target = cache / f".{digest}.{os.getpid()}.partial"
    target.mkdir(parents=True)
    try:
        _write_weights(opened, target)
        _write_tokenizer(opened, target)
        (target / "config.json").write_text(json.dumps(_config(opened), indent=2))
        try:
            target.replace(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return folder


def _open(path: Path) -> _File:
    try:
        import gguf
    except ImportError as error:
        raise HFError(f"{path}: reading GGUF files needs the package gguf: pip install 'jaxsi[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
        arch = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise HFError(f"{path}: not a whole GGUF file ({error}); download it again") from error
    if arch not in FAMILIES:
        raise HFError(f"{path}: architecture {arch!r} is not supported; supported are {', '.join(FAMILIES)}")
    return _File(path, reader, arch)


def _config(file: _File) -> dict[str, Any]:
    model_type, architecture, _ = FAMILIES[file.arch]
    heads, embed = file.need("{arch}.attention.head_count"), file.need("{arch}.embedding_length")
    names = {tensor.name for tensor in file.reader.tensors}
    config = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": int(next(t.shape[1] for t in file.reader.tensors if t.name == "token_embd.weight")),
        "hidden_size": embed,
        "intermediate_size": file.need("{arch}.feed_forward_length"),
        "num_hidden_layers": file.need("{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("{arch}.attention.head_count_kv", heads),
        "head_dim": file.get("{arch}.attention.key_length", embed // heads),
        "max_position_embeddings": file.need("{arch}.context_length"),
        "rms_norm_eps": file.need("{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.get("{arch}.rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }
    dim = file.get("{arch}.rope.dimension_count", config["head_dim"])
    if dim != config["head_dim"]:
        raise HFError(f"{file.path}: rope.dimension_count {dim} is not the head's {config['head_dim']}")
    if window := file.get("{arch}.attention.sliding_window"):
        raise HFError(f"{file.path}: sliding_window {window} is not supported in GGUF files; use the model's folder")
    if (scaling := _rope_scaling(file, config)) is not None:
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(file: _File, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = file.get("{arch}.rope.scaling.type", "none")
    factor = file.get("{arch}.rope.scaling.factor")
    original = file.get("{arch}.rope.scaling.original_context_length")
    factors = next((t.data for t in file.reader.tensors if t.name == "rope_freqs.weight"), None)
    if factors is not None:
        return _llama3_scaling(file, config, np.asarray(factors, np.float64))
    if kind == "none":
        return None
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and original:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise HFError(f"{file.path}: rope.scaling.type {kind!r} is not supported; supported are linear and yarn")


def _llama3_scaling(file: _File, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's scaling, recognised by the factor of every frequency."""
    low, high, original = _LLAMA3.values()
    dim = config["head_dim"]
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    factor = float(factors.max())
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between))
    if not np.allclose(factors.reshape(-1), expected, rtol=1e-3):
        raise HFError(f"{file.path}: rope_freqs.weight is not Llama 3.1's scaling; use the model's folder")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _hugging_face_name(file: _File, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise HFError(f"{file.path}: tensor {name} is not known for architecture {file.arch!r}")


def _halves_together(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Rows of a head from pairs (0, 1), (2, 3), ... to halves (0, n/2), (1, n/2 + 1), ..., as Hugging Face has them."""

    def reorder(array: np.ndarray) -> np.ndarray:
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return reorder


def _arrays(file: _File) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in float32, under its name in Hugging Face's folders."""
    from gguf.quants import dequantize

    interleaved = FAMILIES[file.arch][2]
    heads = file.need("{arch}.attention.head_count")
    reorder = {
        "attn_q": _halves_together(heads),
        "attn_k": _halves_together(file.get("{arch}.attention.head_count_kv", heads)),
    }
    for tensor in file.reader.tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        name = _hugging_face_name(file, tensor.name)
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise HFError(
                f"{file.path}: tensor {tensor.name} has a quantisation that gguf cannot undo ({error})"
            ) from error
        array = np.asarray(array, np.float32).reshape([int(n) for n in reversed(tensor.shape)])
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        yield name, reorder[part](array) if interleaved and part in reorder else array


def _write_weights(file: _File, target: Path) -> None:
    """One file for each layer, so that a large model is never in memory as a whole."""
    index: dict[str, str] = {}
    part: dict[str, np.ndarray] = {}
    key = number = 0

    def flush() -> None:
        nonlocal part, number
        if part:
            name = f"model-{number:05d}.safetensors"
            save_file({n: np.ascontiguousarray(a) for n, a in part.items()}, target / name, metadata={"format": "pt"})
            index.update(dict.fromkeys(part, name))
            part, number = {}, number + 1

    for name, array in _arrays(file):
        layer = name.split(".")[2] if name.startswith("model.layers.") else "top"
        if layer != key:
            flush()
            key = layer
        part[name] = array
    flush()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_tokenizer(file: _File, target: Path) -> None:
    try:
        write_tokenizer(file.get, target)
    except Exception as error:  # `tokenizers` raises nothing more exact
        raise HFError(f"{file.path}: its tokenizer cannot be read: {error}") from error
