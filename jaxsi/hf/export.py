"""Writes our tree of weights as a Hugging Face folder; every process writes its own files."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxsi.hf.config import HFError, config_json
from jaxsi.hf.weights import DTYPES, INDEX, NAMES, WEIGHTS, Layout, expected_tensors
from jaxsi.model import mesh as meshlib
from jaxsi.model.decoder import ModelConfig, Parameter, Weights, parameters
from jaxsi.runs.first_process import from_first

MAX_SHARD_BYTES = 5 * 10**9


def write_folder(
    folder: Path,
    config: ModelConfig,
    weights: Weights,
    *,
    dtype: str = "bfloat16",
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Writes a folder that transformers and ``load_weights`` read. It appears complete or not at all.

    If there are several processes, all must call this, on one shared file system: process i mod n writes file i, and
    process 0 the rest. The bytes do not depend on the processes or the mesh. A host holds the tensors of one file at a
    time.

    Args:
      folder: absent or empty.
      weights: the stacked tree.
      dtype: of the files: float32, float16 or bfloat16.
      generation: contents of generation_config.json; its bos, eos and pad ids also go to config.json.
      max_shard_bytes: larger weights are divided into files of at most this size (a single tensor may exceed it).
      extras: writes other files (the tokenizer) into the folder under construction, its argument.

    Raises:
      HFError: if the folder is not empty, the dtype is unknown, Hugging Face cannot express the config, or the folder
        cannot be written.
    """
    folder = Path(folder)
    if np.dtype(dtype) not in DTYPES.values():
        raise HFError(f"dtype {dtype!r} is not supported; supported are {', '.join(str(d) for d in DTYPES.values())}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HFError(f"{folder}: exists and is not an empty folder; give another name or remove it")
    ids = {f"{name}_token_id": (generation or {}).get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    raw_config = config_json(config, dtype=dtype) | ids
    # All processes of one export share this name; two exports to the same folder at the same time do not.
    word = from_first(lambda: secrets.token_hex(4))
    target = folder.parent / f".{folder.name}.{word}.partial"
    files = _files(config, np.dtype(dtype), max_shard_bytes)
    lead = jax.process_index() == 0
    try:
        if lead:
            target.mkdir(parents=True)
        _barrier(f"folder {folder.name}")
        _write_files(target, files, weights, np.dtype(dtype))
        _barrier(f"files {folder.name}")
        if lead:
            _write_index(target, files, config, np.dtype(dtype))
            _write_json(target / "config.json", raw_config)
            if generation is not None:
                _write_json(target / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
            if extras is not None:
                extras(target)
            for file in target.rglob("*"):
                _sync(file)
            os.replace(target, folder)
            _sync(folder.parent)
        _barrier(f"done {folder.name}")
    except OSError as error:
        raise HFError(
            f"{folder}: cannot be written ({error}); nothing is left there; free some space or name another folder"
        ) from error
    finally:
        if lead:
            shutil.rmtree(target, ignore_errors=True)


class _Tensor(NamedTuple):
    """A tensor of the files and its source in our tree; ``layer`` is None outside the layers."""

    name: str
    ours: str
    layer: int | None
    layout: Layout


def _tensors(config: ModelConfig) -> list[_Tensor]:
    """The tensors in the order of the files: layer by layer."""
    names, tree = NAMES[config.family], parameters(config)
    top = [_Tensor(names[n][0], n, None, names[n][1]) for n, p in tree.items() if isinstance(p, Parameter)]
    return top + [
        _Tensor(names[n][0].format(layer), n, layer, names[n][1])
        for layer in range(config.num_layers)
        for n in tree["layers"]
    ]


def _sizes(config: ModelConfig, dtype: np.dtype) -> dict[str, int]:
    return {name: math.prod(shape) * dtype.itemsize for name, shape in expected_tensors(config).items()}


def _files(config: ModelConfig, dtype: np.dtype, limit: int) -> dict[str, list[_Tensor]]:
    """The tensors of each file."""
    sizes, parts = _sizes(config, dtype), [[]]
    if sum(sizes.values()) <= limit:
        return {WEIGHTS: _tensors(config)}
    for tensor in _tensors(config):
        if parts[-1] and sum(sizes[t.name] for t in parts[-1]) + sizes[tensor.name] > limit:
            parts.append([])
        parts[-1].append(tensor)
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


def _write_files(target: Path, files: dict[str, list[_Tensor]], weights: Weights, dtype: np.dtype) -> None:
    """All processes gather every tensor, because each holds only pieces; one process per file keeps and writes them."""
    for number, (file, tensors) in enumerate(files.items()):
        is_writer = number % jax.process_count() == jax.process_index()
        arrays: dict[str, np.ndarray] = {}
        for tensor in tensors:
            whole = _gathered(tensor, weights)
            # On every process: if one stopped alone, the others would wait for it.
            _check_finite(tensor.name, whole, dtype)
            if is_writer:
                arrays[tensor.name] = _as_in_file(tensor, whole, dtype)
        if is_writer:
            save_file(arrays, target / file, metadata={"format": "pt"})
            _sync(target / file)


def _gathered(tensor: _Tensor, weights: Weights) -> np.ndarray:
    """The whole array on every host; of a stacked array, the one layer."""
    return meshlib.fetch(weights[tensor.ours] if tensor.layer is None else weights["layers"][tensor.ours][tensor.layer])


def _check_finite(name: str, array: np.ndarray, dtype: np.dtype) -> None:
    limit = float(jnp.finfo(dtype).max)
    largest = float(np.abs(array).max(initial=0))
    if not largest <= limit:
        raise HFError(
            f"tensor {name} has a value of {largest:g}, beyond the {limit:g} of {dtype}; "
            + ("export in bfloat16 or float32" if math.isfinite(largest) else "the training of this model has failed")
        )


def _as_in_file(tensor: _Tensor, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(tensor.layout.write(array)).astype(dtype, copy=False)


def _write_index(target: Path, files: dict[str, list[_Tensor]], config: ModelConfig, dtype: np.dtype) -> None:
    if list(files) == [WEIGHTS]:
        return
    total = sum(_sizes(config, dtype).values())
    metadata = {"total_size": total, "total_parameters": total // dtype.itemsize}
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    _write_json(target / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _write_json(file: Path, contents: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxsi export {name}")
