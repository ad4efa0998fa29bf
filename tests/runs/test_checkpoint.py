"""Checkpoints: bit for bit, on any mesh, complete or absent, and damage that is found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxsi.runs import checkpoint
from jaxsi.runs.checkpoint import CheckpointError, is_complete, latest, read_meta, restore, save, verify

REPO = Path(__file__).parents[2]


def tree() -> dict:
    """Every kind of leaf and container that a training state has."""
    weights = {
        "embed": jax.random.normal(jax.random.key(0), (16, 8)),
        "layers": [{"w": jax.random.normal(jax.random.key(n), (8, 8)).astype(jnp.bfloat16)} for n in range(2)],
    }
    return {
        "weights": weights,
        "optimizer": optax.adamw(1e-3).init(weights),
        "step": jnp.int32(7),
        "counts": (np.arange(3, dtype=np.uint8), np.float32(0.1)),
        "mask": jnp.array([True, False]),
        "key": jax.random.key(3),
        "nothing": None,
    }


def abstract(values, sharding=None):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x) if sharding else None)

    return jax.tree.map(leaf, values)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "step_7"
    save(path, tree(), {"iteration": 1, "none": None, "names": ["a", {"b": 0.1}]})
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def data_files(path: Path, group: str) -> list[Path]:
    return [file for file in (path / group).rglob("*") if file.parent.name == "d" and file.is_file()]


# ---- restoring -------------------------------------------------------------------------------------------------------


def test_every_leaf_is_restored_bit_for_bit(saved):
    restored = restore(saved, abstract(tree()))
    assert_same_bits(restored, tree())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert read_meta(saved) == {"iteration": 1, "none": None, "names": ["a", {"b": 0.1}]}
    assert is_complete(saved)


def test_manifest_names_leaves_by_their_paths(saved):
    leaves = json.loads((saved / "jaxsi.json").read_text())["leaves"]
    assert {"weights/layers/1/w", "optimizer/0/mu/embed", "optimizer/0/count", "counts/0", "step", "key"} <= set(leaves)
    assert leaves["weights/layers/1/w"] == {"shape": [8, 8], "dtype": "bfloat16"}
    assert leaves["key"] == {"shape": [], "dtype": "key<fry>"}
    assert_same_bits(restore(saved, {"step": jax.ShapeDtypeStruct((), jnp.int32)}), {"step": jnp.int32(7)})


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1, 1), P()),
        ((8, 1), P("data")),
        ((2, 4), P("data", "fsdp")),
        ((4, 2), P("fsdp", "data")),
        ((1, 8), P(None, "fsdp")),
    ],
)
def test_restore_to_any_mesh(saved, shape, spec):
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    wanted = abstract(tree(), lambda x: NamedSharding(mesh, spec if x.ndim == 2 else P()))
    restored = restore(saved, wanted)
    assert_same_bits(restored, tree())
    assert restored["weights"]["embed"].sharding == NamedSharding(mesh, spec)
    assert restored["step"].sharding == NamedSharding(mesh, P())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_rounds_like_numpy_and_leaves_integers_alone(tmp_path, dtype):
    values = {"weights": {"w": jax.random.normal(jax.random.key(0), (64, 128)), "n": jnp.arange(3)}}
    save(tmp_path / "c", values, {})
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def place(x):
        return NamedSharding(mesh, P("a", "b") if x.ndim == 2 else P())

    wanted = abstract({"weights": {"w": values["weights"]["w"].astype(dtype), "n": values["weights"]["n"]}}, place)
    restored = restore(tmp_path / "c", wanted, cast=True)
    expected = {"w": np.asarray(values["weights"]["w"]).astype(dtype), "n": np.arange(3, dtype=np.int32)}
    assert_same_bits(restored, {"weights": expected})
    assert restored["weights"]["w"].sharding == place(values["weights"]["w"])
    with pytest.raises(CheckpointError, match=f"'weights/w' is float32.* but {dtype}"):
        restore(tmp_path / "c", wanted)
    for wrong in (jax.ShapeDtypeStruct((3,), np.float32), jax.ShapeDtypeStruct((4,), np.int32)):
        with pytest.raises(CheckpointError, match="'weights/n' is int32"):
            restore(tmp_path / "c", {"weights": {"n": wrong}}, cast=True)


def test_sharded_tree_is_restored_on_one_device(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    value = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("fsdp", "data")))}
    save(tmp_path / "c", value, {})
    restored = restore(tmp_path / "c", abstract(value))
    assert_same_bits(restored, value)
    assert restored["w"].devices() == {jax.devices()[0]}


def test_restoring_the_weights_reads_only_their_files(copy):
    shutil.rmtree(copy / "optimizer")
    (copy / "key" / "manifest.ocdbt").write_bytes(b"damaged")
    restored = restore(copy, {"weights": abstract(tree()["weights"])})
    assert_same_bits(restored, {"weights": tree()["weights"]})
    with pytest.raises(CheckpointError, match=r"optimizer/.* is missing"):
        restore(copy, {"optimizer": abstract(tree()["optimizer"])})
    assert not is_complete(copy)


def test_restore_of_a_part_of_an_entry(saved):
    wanted = {"weights": {"layers": [{"w": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)}]}}
    assert_same_bits(restore(saved, wanted), {"weights": {"layers": tree()["weights"]["layers"][:1]}})


# ---- trees that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "says"),
    [
        ("embed", (16, 9), "float32", r"leaf 'weights/embed' is float32\[16, 8\], but float32\[16, 9\] was requested"),
        (
            "embed",
            (16, 8),
            "bfloat16",
            r"leaf 'weights/embed' is float32\[16, 8\], but bfloat16\[16, 8\] was requested",
        ),
        ("head", (16, 8), "float32", r"it has no leaf 'weights/head'; it has \d+ leaves, such as "),
        ("deep/embed", (16, 8), "float32", "no leaf 'weights/deep/embed'.*such as .*weights/embed"),
    ],
)
def test_error_names_a_leaf_that_does_not_fit(saved, name, shape, dtype, says):
    with pytest.raises(CheckpointError, match=says):
        restore(saved, {"weights": {name: jax.ShapeDtypeStruct(shape, dtype)}})


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"a": 1}, "leaf 'a' is 1 of type int, not an array; put Python numbers into `meta`"),
        ({"a": np.zeros(2)}, "leaf 'a' is float64, and jax_enable_x64 is off; use 32 bits"),
        ({"a": {"b": jnp.zeros((0, 2))}}, r"leaf 'a/b' of shape \(0, 2\) is empty"),
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "two leaves are named 'a/b'"),
        ({"metrics": jnp.ones(1)}, "'metrics' cannot name a folder"),
        ({"": jnp.ones(1)}, "cannot name a folder"),
        (jnp.ones(1), "cannot name a folder"),
        ({}, "no leaves"),
    ],
)
def test_invalid_tree_is_an_error_and_nothing_is_written(bad, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        save(tmp_path / "c", bad, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("meta", [{"a": float("nan")}, {"a": (1, 2)}, {1: "a"}, {"a": jnp.ones(1)}])
def test_meta_that_does_not_survive_json_is_an_error(meta, tmp_path):
    with pytest.raises(CheckpointError, match="meta"):
        save(tmp_path / "c", {"a": jnp.ones(1)}, meta)
    assert list(tmp_path.iterdir()) == []


def test_save_never_overwrites_a_sound_checkpoint_or_a_foreign_folder(copy, tmp_path):
    with pytest.raises(CheckpointError, match="already holds a sound checkpoint"):
        save(copy, {"a": jnp.ones(1)}, {})
    assert_same_bits(restore(copy, abstract(tree())), tree())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("words")
    with pytest.raises(CheckpointError, match="something that is not a checkpoint"):
        save(tmp_path / "thesis", {"a": jnp.ones(1)}, {})
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "words"


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(file: Path, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << 3
    file.write_bytes(content)


def test_flipped_bit_in_any_file_is_found(saved, tmp_path):
    names = [file.relative_to(saved) for file in saved.rglob("*") if file.is_file() and file.stat().st_size]
    assert checkpoint.MANIFEST in map(str, names)
    path = Path(shutil.copytree(saved, tmp_path / "c"))
    for number, name in enumerate(names):
        whole = (path / name).read_bytes()
        flip(path / name, at=(number * 0.37) % 1)
        with pytest.raises(CheckpointError, match=r"damaged|cannot be read|of format"):
            verify(path)
        with pytest.raises(CheckpointError):
            restore(path, abstract(tree()))
        (path / name).write_bytes(whole)
    verify(path)


@pytest.mark.parametrize("harm", ["truncate", "delete", "no manifest", "half a manifest", "empty", "absent"])
def test_other_damage_is_found_without_reading_the_data(copy, harm):
    file = data_files(copy, "weights")[0]
    match harm:
        case "truncate":
            os.truncate(file, file.stat().st_size - 1)
        case "delete":
            file.unlink()
        case "no manifest":
            (copy / checkpoint.MANIFEST).unlink()
        case "half a manifest":
            os.truncate(copy / checkpoint.MANIFEST, 100)
        case "empty":
            shutil.rmtree(copy)
            copy.mkdir()
        case "absent":
            shutil.rmtree(copy)
    assert not is_complete(copy)
    with pytest.raises(CheckpointError, match=r"missing|bytes of|interrupted|damaged|does not exist"):
        restore(copy, abstract(tree()))


def test_latest_skips_damaged_checkpoints_with_a_warning(tmp_path, caplog):
    assert latest(tmp_path / "none") is None
    for step in (2, 9, 10, 11):
        save(tmp_path / f"step_{step}", {"a": jnp.full(4, step)}, {"step": step})
    assert latest(tmp_path) == tmp_path / "step_11"
    (tmp_path / "step_12").mkdir()
    (tmp_path / "best").mkdir()
    flip(data_files(tmp_path / "step_11", "a")[0], 0.5)
    assert latest(tmp_path) == tmp_path / "step_10"
    assert "step_12: the save was interrupted" in caplog.text
    assert "step_11: " in caplog.text
    assert "damaged" in caplog.text
    save(tmp_path / "step_11", {"a": jnp.full(4, 11)}, {"step": 11})  # a damaged checkpoint may be replaced
    assert latest(tmp_path) == tmp_path / "step_11"


# ---- killed, and out of space ----------------------------------------------------------------------------------------

PROGRAM = textwrap.dedent("""
    import os, resource, signal, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np
    from jaxsi.runs import checkpoint
    from jaxsi.runs.checkpoint import CheckpointError, save

    def big(step):
        weights = np.random.default_rng(step).normal(size=(8, 1 << 18)).astype(np.float32)  # 8 MiB
        return {"weights": weights, "step": np.int32(step)}
""")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_holds(path: Path, step: int) -> None:
    expected = np.random.default_rng(step).normal(size=(8, 1 << 18)).astype(np.float32)
    restored = restore(path, {"weights": jax.ShapeDtypeStruct((8, 1 << 18), np.float32)})
    assert_same_bits(restored, {"weights": expected})


@pytest.mark.slow
def test_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    code = """
        from pathlib import Path
        root, step, kill_at = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        if kill_at == "data":  # as soon as Orbax has begun to write
            def killer():
                while not any(f.stat().st_size for f in root.glob(f"step_{step}.orbax*/weights*/**/*") if f.is_file()):
                    time.sleep(0.0005)
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=killer).start()
        if kill_at == "manifest":
            checkpoint.write_atomically = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        save(root / f"step_{step}", big(step), {"step": step})
    """
    save(tmp_path / "step_1", {"weights": np.random.default_rng(1).normal(size=(8, 1 << 18)).astype(np.float32)}, {})
    for kill_at in ("data", "manifest"):
        killed = start(code, tmp_path, 2, kill_at)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 2
        assert not is_complete(tmp_path / "step_2")
        assert latest(tmp_path) == tmp_path / "step_1"
        assert_holds(tmp_path / "step_1", 1)
    again = start(code, tmp_path, 2, "never")
    assert again.communicate() == ("", "")
    assert_holds(latest(tmp_path), 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_1", "step_2"]  # without half-written folders


def test_full_disk_is_an_error_and_the_previous_checkpoint_stays(tmp_path):
    code = """
        root = sys.argv[1]
        save(root + "/step_1", big(1), {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        try:
            save(root + "/step_2", big(2), {})
        except CheckpointError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save(root + "/step_3", big(3), {})
    """
    done = start(code, tmp_path)
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert "step_2: " in out
    assert "File too large" in out
    assert "earlier checkpoints are intact" in out
    assert "Traceback" not in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_1", "step_3"]
    verify(tmp_path / "step_1")
    verify(tmp_path / "step_3")


def test_manifest_is_written_last_after_everything_is_synced(tmp_path, monkeypatch):
    synced = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    write = checkpoint.write_atomically

    def last(path, chunks):
        others = {str(file) for file in path.parent.rglob("*") if file.is_file()}
        assert others
        assert others <= synced
        write(path, chunks)

    monkeypatch.setattr(checkpoint, "write_atomically", last)
    save(tmp_path / "c", {"a": jnp.ones(3)}, {})
    manifest = json.loads((tmp_path / "c" / checkpoint.MANIFEST).read_text())
    assert manifest["leaves"] == {"a": {"shape": [3], "dtype": "float32"}}


def test_checkpoint_of_another_format_is_an_error(copy):
    manifest = checkpoint._read_manifest(copy) | {"format": 99}
    (copy / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint._seal(manifest)}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1; use the version"):
        read_meta(copy)


def test_small_model_is_saved_and_restored_quickly(tmp_path):
    value = {"weights": {f"w{n}": jnp.ones((64, 64)) for n in range(50)}}
    begin = time.monotonic()
    save(tmp_path / "c", value, {})
    restore(tmp_path / "c", abstract(value))
    assert time.monotonic() - begin < 20
