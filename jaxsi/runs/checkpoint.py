"""Checkpoints: a pytree of arrays on disk, complete or absent, checked by digest, restored to any mesh.

    DIR/weights/ optimizer/ …   one Orbax checkpointable per top-level entry: a flat dict {"weights/a/0": array}
    DIR/jaxsi.json              the manifest, written last: meta, shape and dtype of each leaf, sha256 of each file

A directory without a manifest is an interrupted save. Orbax itself does not notice a flipped bit, hence the digests.
With several hosts every process calls these functions, on one shared file system.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsi.runs.records import write_atomically

FORMAT = 1
MANIFEST = "jaxsi.json"
_ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
_ORBAX_RESERVED = frozenset({"metrics"})  # Orbax uses this name for a handler of its own

_WIDE = frozenset({"float64", "int64", "uint64", "complex128"})

_log = logging.getLogger("jaxsi")


class CheckpointError(Exception):
    """A checkpoint is absent, damaged, does not fit or cannot be written; `str()` is "path: reason; fix"."""

    def __init__(self, path: Path | str, reason: str, fix: str):
        super().__init__(f"{path}: {reason}; {fix}")
        self.path, self.reason, self.fix = Path(path), reason, fix


def save(directory: Path | str, tree: Any, meta: dict[str, Any]) -> None:
    """Writes the arrays of `tree` (any pytree with named entries: dicts, lists, optax states) and `meta` (JSON values).

    Returns when everything is on disk; before that the directory does not count as a checkpoint. An interrupted save or
    a damaged checkpoint in its place is replaced.

    Raises: CheckpointError: if the directory already holds a sound checkpoint or something else, if a leaf is not an
      array, or if the disk fails. Earlier checkpoints are not touched.
    """
    path = Path(directory).absolute()
    groups = _groups(path, tree)
    _check_meta(path, meta)
    if jax.process_index() == 0:
        with _failing(path, "free some space or make the folder writable; earlier checkpoints are intact"):
            _make_room(path)
    _barrier(f"room {path.name}")
    try:
        with _failing(path, "free some space or make the folder writable; earlier checkpoints are intact"):
            with _quiet():
                _orbax().save_checkpointables(path, groups)
            if jax.process_index() == 0:
                leaves = {name: _description(leaf) for group in groups.values() for name, leaf in group.items()}
                files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
                _write_manifest(path, {"meta": meta, "leaves": leaves, "files": _digests(path, files)})
    except CheckpointError:
        if jax.process_index() == 0:
            _remove_unfinished(path)
        raise
    _barrier(f"saved {path.name}")


def restore(directory: Path | str, abstract: Any, *, cast: bool = False) -> Any:
    """The arrays of a checkpoint in the structure of `abstract`, a pytree of jax.ShapeDtypeStruct with shardings (or of
    arrays).

    `abstract` may be a part of the saved tree, such as {"weights": …}: only the files of its top-level entries are
    read. It may use any mesh; a leaf without sharding goes to the first local device. Digests are verified first.
    ``cast``: floating-point leaves are returned in the dtype of `abstract`. Each is rounded on the host as it is read,
    so the devices never hold the stored dtype.

    Raises: CheckpointError: if a leaf is missing or has another shape or dtype, or if a file is damaged; it names the
      leaf or the file.
    """
    path = Path(directory).absolute()
    manifest = _read_manifest(path)
    groups = _groups(path, abstract)
    for group in groups.values():
        for name, leaf in group.items():
            _check_leaf(path, manifest["leaves"], name, leaf, cast)
    _verify(path, manifest, groups)
    ocp = _orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _failing(path, "use another checkpoint"), _quiet(), context:
        loaded = ocp.load_checkpointables(path, {name: _targets(group) for name, group in groups.items()})
    arrays = {name: array for group in loaded.values() for name, array in group.items()}
    for name, array in arrays.items():
        leaf = groups[name.split("/")[0]][name]
        if _description(array) != _description(leaf):  # Orbax does not check this
            reason = f"leaf {name!r} came as {array.dtype}{array.shape}, but {leaf.dtype}{leaf.shape} was requested"
            raise CheckpointError(path, reason, "restore it in a dtype that this platform has")
    names = [_name(key) for key, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), [arrays[name] for name in names])


def read_meta(directory: Path | str) -> dict[str, Any]:
    """The `meta` that was saved. Raises: CheckpointError: if there is no complete checkpoint."""
    return _read_manifest(Path(directory))["meta"]


def is_complete(directory: Path | str) -> bool:
    """Whether a save has finished and all its files have their full length (`verify` also checks their content)."""
    path = Path(directory)
    try:
        return not _misfits(path, _read_manifest(path)["files"])
    except CheckpointError:
        return False


def verify(directory: Path | str) -> None:
    """Reads every file of a checkpoint. Raises: CheckpointError: if one is missing or altered; it names the first."""
    path = Path(directory)
    _verify(path, _read_manifest(path), None)


def latest(directory: Path | str) -> Path | None:
    """The newest sound checkpoint among the sub-folders that end in a number (step_100, iter_2), or None.

    It skips interrupted saves and damaged checkpoints, with a warning in the log.
    """
    root = Path(directory)
    numbered = [(re.search(r"\d+$", step.name), step) for step in (root.iterdir() if root.is_dir() else [])]
    steps = sorted(((int(match[0]), step) for match, step in numbered if match and step.is_dir()), reverse=True)
    for _, step in steps:
        try:
            verify(step)
        except CheckpointError as error:
            _log.warning("skipped: %s", error)
        else:
            return step
    return None


# ---- trees and names -------------------------------------------------------------------------------------------------


def _name(key: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _groups(path: Path, tree: Any) -> dict[str, dict[str, Any]]:
    """{top-level entry: {full name: leaf}}."""
    groups: dict[str, dict[str, Any]] = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(key)
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            reason = f"leaf {name!r} is {leaf!r:.80} of type {type(leaf).__name__}, not an array"
            raise CheckpointError(path, reason, "put Python numbers into `meta`")
        if 0 in leaf.shape:
            raise CheckpointError(path, f"leaf {name!r} of shape {leaf.shape} is empty", "leave it out")
        # Without jax_enable_x64 Orbax would silently round these.
        if str(leaf.dtype) in _WIDE and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise CheckpointError(path, f"leaf {name!r} is {leaf.dtype}, and jax_enable_x64 is off", "use 32 bits")
        group = groups.setdefault(name.split("/")[0], {})
        if name in group:
            raise CheckpointError(path, f"two leaves are named {name!r}", "remove / from the keys of the tree")
        group[name] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf  # Orbax rejects NumPy scalars
    for group_name in groups:
        if not re.fullmatch(r"[\w-]+", group_name) or group_name in _ORBAX_RESERVED:
            raise CheckpointError(
                path, f"top-level entry {group_name!r} cannot name a folder", "use letters, digits, _, -"
            )
    if not groups:
        raise CheckpointError(path, "the tree has no leaves", 'pass arrays, as in {"weights": weights}')
    return groups


def _description(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _is_floating(dtype: str) -> bool:
    return not dtype.startswith("key<") and jax.numpy.issubdtype(jax.numpy.dtype(dtype), np.floating)


def _check_leaf(path: Path, saved: dict[str, Any], name: str, leaf: Any, cast: bool) -> None:
    if name not in saved:
        near = [other for other in saved if other.split("/")[-1] == name.split("/")[-1]] or list(saved)
        shown = ", ".join(near[:3])
        raise CheckpointError(path, f"it has no leaf {name!r}", f"it has {len(saved)} leaves, such as {shown}")
    target = _description(leaf)
    if cast and _is_floating(target["dtype"]) and _is_floating(saved[name]["dtype"]):
        target["dtype"] = saved[name]["dtype"]
    if target != saved[name]:
        stored = f"{saved[name]['dtype']}{saved[name]['shape']}"
        reason = f"leaf {name!r} is {stored}, but {target['dtype']}{target['shape']} was requested"
        raise CheckpointError(path, reason, "restore with the config it was saved with; cast or reshape afterwards")


def _targets(group: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for name, leaf in group.items()
    }


# ---- the manifest ----------------------------------------------------------------------------------------------------


def _check_meta(path: Path, meta: dict[str, Any]) -> None:
    try:
        same = json.loads(json.dumps(meta, allow_nan=False)) == meta
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, f"meta cannot be written as JSON: {error}", "use numbers, texts, lists") from None
    if not same:
        raise CheckpointError(path, f"meta {meta!r:.200} does not survive JSON", "use lists and text keys")


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    manifest = {"format": FORMAT, **content}
    text = json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1) + "\n"
    write_atomically(path / MANIFEST, [text.encode()])


def _read_manifest(path: Path) -> dict[str, Any]:
    fix = "use another checkpoint, or delete it so that it is made again"
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        seal = manifest.pop("sha256")
    except FileNotFoundError:
        reason = "the save was interrupted (no jaxsi.json)" if path.is_dir() else "the checkpoint does not exist"
        raise CheckpointError(path, reason, fix if path.is_dir() else "check the path") from None
    except OSError as error:
        raise CheckpointError(path, f"{MANIFEST} cannot be read: {error.strerror or error}", fix) from None
    except (ValueError, KeyError, AttributeError):
        raise CheckpointError(path, f"{MANIFEST} is damaged", fix) from None
    if seal != _seal(manifest):
        raise CheckpointError(path, f"{MANIFEST} is damaged (its sha256 differs)", fix)
    if manifest["format"] != FORMAT:
        reason = f"it has format {manifest['format']}, this version reads {FORMAT}"
        raise CheckpointError(path, reason, "use the version of jaxsi that wrote it")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        os.fsync(opened.fileno())  # the manifest must not reach the disk before the files it describes
    return {"bytes": file.stat().st_size, "sha256": digest}


def _digests(path: Path, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    files = list(files)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        return dict(zip(files, threads.map(lambda file: _digest(path / file), files), strict=True))


def _misfits(path: Path, files: dict[str, Any]) -> list[str]:
    """The files that are missing or of another length."""
    lengths = {name: (path / name).stat().st_size if (path / name).is_file() else None for name in files}
    return [
        f"{name} is missing" if length is None else f"{name} has {length} bytes of {files[name]['bytes']}"
        for name, length in lengths.items()
        if length != files[name]["bytes"]
    ]


def _problems(path: Path, files: dict[str, Any]) -> list[str]:
    """The files that are missing or altered, by content."""
    if misfits := _misfits(path, files):
        return misfits
    with _failing(path, "use another checkpoint"):
        digests = _digests(path, files)
    return [f"{name} is damaged (its sha256 differs)" for name in files if digests[name] != files[name]]


def _verify(path: Path, manifest: dict[str, Any], groups: Iterable[str] | None) -> None:
    """Every process reads its share of the files (those of the groups, or all), and each learns of a damaged one."""
    names = [name for name in manifest["files"] if groups is None or name.split("/")[0] in groups or "/" not in name]
    share = {name: manifest["files"][name] for name in names[jax.process_index() :: jax.process_count()]}
    problems = _problems(path, share)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        damaged = int(np.sum(multihost_utils.process_allgather(np.asarray(len(problems)))))
        problems = problems or ([f"other processes found {damaged} damaged files"] if damaged else [])
    if problems:
        fix = "use another checkpoint, or delete it so that it is made again"
        raise CheckpointError(path, problems[0], fix)


# ---- Orbax and the disk ----------------------------------------------------------------------------------------------


def _orbax() -> Any:
    from orbax.checkpoint import v1  # `import orbax.checkpoint.v1` does not work

    return v1


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxsi checkpoint {name}")


def _make_room(path: Path) -> None:
    """Makes the parent folder and removes the rest of an interrupted save. It never removes a foreign folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_complete(path) and not _problems(path, _read_manifest(path)["files"]):
        raise CheckpointError(path, "it already holds a sound checkpoint", "save under another name or delete it")
    if path.exists() and any(path.iterdir()) and not any((path / n).exists() for n in (MANIFEST, "orbax.checkpoint")):
        raise CheckpointError(path, "the folder holds something that is not a checkpoint", "save under another name")
    _remove_unfinished(path)


def _remove_unfinished(path: Path) -> None:
    for folder in [path, *path.parent.glob(f"{path.name}{_ORBAX_UNFINISHED}*")]:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _failing(path: Path, fix: str) -> Iterator[None]:
    """Turns every error of Orbax or the disk into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointError(path, reason, fix) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes the log and the tracebacks of Orbax's threads: Orbax also raises their errors in the caller."""
    absl = logging.getLogger("absl")
    before = threading.excepthook, absl.disabled
    threading.excepthook, absl.disabled = lambda arguments: None, True
    try:
        yield
    finally:
        threading.excepthook, absl.disabled = before
