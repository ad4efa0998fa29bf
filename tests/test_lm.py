"""LM: fingerprints, loading from every kind of MODEL, saving, and what its errors say."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsi
import tiny
from jaxsi import lm as lmlib
from jaxsi.hf.weights import HFError
from jaxsi.lm import LoadError, load
from jaxsi.runs import checkpoint
from jaxsi.runs.checkpoint import CheckpointError
from jaxsi.runs.run import Run
from jaxsi.training import resume, train
from jaxsi.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The least that a run needs."""

    seed: int = 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder, float32."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    lmlib.export(tiny.make_lm(), folder, dtype="float32")
    return folder


# ---------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_of_the_bits_and_not_of_the_mesh() -> None:
    prints = {name: tiny.make_lm(name).fingerprint for name in ("1x1x1", "2x2x2", "1x8x1")}
    assert len(set(prints.values())) == 1
    assert len(prints["1x1x1"]) == 16 and int(prints["1x1x1"], 16) >= 0


def test_one_bit_anywhere_changes_the_fingerprint() -> None:
    lm = tiny.make_lm()
    seen = {lm.fingerprint}
    for path, w in jax.tree_util.tree_leaves_with_path(lm.weights):
        for place in (0, w.size - 1):
            bits = np.array(w).view(np.uint32).reshape(-1)
            bits[place] ^= 1
            flipped = jnp.asarray(bits.view(np.float32).reshape(w.shape))
            changed = jax.tree_util.tree_map_with_path(lambda p, x, at=path, y=flipped: y if p == at else x, lm.weights)
            seen.add(lmlib.fingerprint(changed))
    leaves = jax.tree.leaves(lm.weights)
    assert len(seen) == 1 + sum(2 if w.size > 1 else 1 for w in leaves)


def test_moved_values_change_the_fingerprint() -> None:
    lm = tiny.make_lm()
    swapped = np.array(lm.weights["embed"])
    swapped[[3, 4]] = swapped[[4, 3]]
    assert lmlib.fingerprint(lm.weights | {"embed": jnp.asarray(swapped)}) != lm.fingerprint
    layers = lm.weights["layers"]  # two weights of one shape, exchanged
    exchanged = layers | {"k": layers["v"], "v": layers["k"]}
    assert lmlib.fingerprint(lm.weights | {"layers": exchanged}) != lm.fingerprint
    assert lmlib.fingerprint(jax.tree.map(lambda w: w.astype(jnp.bfloat16), lm.weights)) != lm.fingerprint


# --------------------------------------------------------------------------------------------------------------- models


def test_logits() -> None:
    lm = tiny.make_lm()
    tokens = np.arange(10, 34).reshape(2, 12)
    logits = lm.logits(tokens)
    assert logits.shape == (2, 12, tiny.ENTRIES) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(lm.logits(jnp.asarray(tokens)), logits)
    np.testing.assert_allclose(tiny.make_lm("2x2x2").logits(tokens), logits, atol=1e-4)
    half = dataclasses.replace(lm, dtype=jnp.bfloat16).logits(tokens)
    assert half.dtype == jnp.float32 and 1e-4 < tiny.max_difference(half, logits) < 0.5
    for wrong, message in ((tokens[0], r"shape \(12,\)"), (tokens / 2, "float")):
        with pytest.raises(ValueError, match=message):
            lm.logits(wrong)


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2"])
def test_sampling_weights_are_the_weights_cast_and_unstacked(mesh: str) -> None:
    lm = tiny.make_lm(mesh, dtype=jnp.bfloat16)
    moved = lm.sampling_weights
    assert moved is lm.sampling_weights, "made once"
    assert len(moved["layers"]) == tiny.CONFIG.num_layers
    for i, layer in enumerate(moved["layers"]):
        for name, w in layer.items():
            assert w.dtype == jnp.bfloat16
            np.testing.assert_array_equal(w, lm.weights["layers"][name][i].astype(jnp.bfloat16))
    embed_shards = {shard.data.shape for shard in moved["layers"][0]["up"].addressable_shards}
    assert embed_shards == {(16, 32) if mesh == "1x1x1" else (16, 16)}, "rows whole on each fsdp device"


# ------------------------------------------------------------------------------------------------------- load and save


def test_export_and_load_give_the_same_model_on_any_mesh(exported: Path) -> None:
    lm = tiny.make_lm()
    for mesh in ("1x1x1", "2x2x2"):
        loaded = load(exported, tiny.mesh(mesh), "float32")
        assert loaded.fingerprint == lm.fingerprint and loaded.config == lm.config
        assert loaded.tokenizer.template_hash == lm.tokenizer.template_hash
        assert loaded.tokenizer.stop_ids == lm.tokenizer.stop_ids
    with pytest.raises(HFError, match="not an empty folder"):
        lmlib.export(lm, exported)


def test_default_dtype_is_bfloat16_and_masters_are_asked_for(exported: Path) -> None:
    lm = jaxsi.load(str(exported), tiny.mesh())
    assert lm.dtype == jnp.bfloat16 and {w.dtype for w in jax.tree.leaves(lm.weights)} == {jnp.dtype("bfloat16")}
    masters = load(exported, tiny.mesh(), "bfloat16", weights_dtype="float32")
    assert masters.dtype == jnp.bfloat16 and masters.fingerprint == tiny.make_lm().fingerprint


def test_checkpoint_round_trip_on_another_mesh(tmp_path: Path) -> None:
    lm = tiny.make_lm("2x2x2")
    lmlib.save_checkpoint(lm, tmp_path / "c", {"step": 3})
    meta = checkpoint.read_meta(tmp_path / "c" / "weights")
    assert meta == {"step": 3, "fingerprint": lm.fingerprint}
    loaded = load(tmp_path / "c", tiny.mesh("1x8x1"), "float32")
    assert loaded.fingerprint == lm.fingerprint and loaded.config == lm.config
    half = load(tmp_path / "c", tiny.mesh())
    assert {w.dtype for w in jax.tree.leaves(half.weights)} == {jnp.dtype("bfloat16")}


def test_for_inference_the_stored_float32_is_rounded_as_it_is_read_and_the_optimizer_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.make_lm("1x8x1")
    with Run.open(tmp_path / "run", Config()) as run:
        state = train.initial_state(lm.weights, OptimConfig(learning_rate=1e-2))
        resume.save_result(lm, state, run.at("iter_1"), {"step": 0})
    folder = tmp_path / "run" / "iter_1" / "checkpoint"
    shutil.rmtree(folder / "optimizer")
    restored: list[Any] = []
    restore = checkpoint.restore
    monkeypatch.setattr(checkpoint, "restore", lambda *a, **k: restored.append(restore(*a, **k)) or restored[-1])
    loaded = load(folder, tiny.mesh("2x2x2"), "bfloat16")
    assert {w.dtype for w in jax.tree.leaves(restored)} == {jnp.dtype("bfloat16")}, "no float32 reached a device"
    for half, whole in zip(jax.tree.leaves(loaded.weights), jax.tree.leaves(lm.weights), strict=True):
        np.testing.assert_array_equal(np.asarray(half), np.asarray(whole).astype(jnp.bfloat16))
    assert loaded.fingerprint == lm.fingerprint


def test_a_checkpoint_is_known_by_the_fingerprint_it_was_saved_with(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    lmlib.save_checkpoint(lm, tmp_path, {})
    for dtype in ("bfloat16", "float16", "float32"):
        loaded = load(tmp_path, tiny.mesh(), dtype)
        assert loaded.fingerprint == lm.fingerprint
        changed = loaded.replace(jax.tree.map(lambda w: w + 1, loaded.weights))
        assert changed.fingerprint == lmlib.fingerprint(changed.weights) != lm.fingerprint


def test_an_interrupted_checkpoint_says_so(tmp_path: Path) -> None:
    lmlib.save_checkpoint(tiny.make_lm(), tmp_path, {"step": 3})
    (tmp_path / "weights" / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        load(tmp_path, tiny.mesh())


# -------------------------------------------------------------------------------------------------------------- resolve


def make_run(path: Path, complete: tuple[int, ...], incomplete: tuple[int, ...] = ()) -> Path:
    """A run directory with iterations; a checkpoint here is a config and a manifest."""
    with Run.open(path, Config()) as run:
        for t in (*complete, *incomplete):
            folder = run.at(f"iter_{t}").path / "checkpoint"
            (folder / "weights").mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            if t in complete:
                checkpoint._write_manifest(folder / "weights", {"meta": {}, "leaves": {}, "files": {}})
    return path


def test_run_directories_and_iterations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1, 2, 10), (11,))
    assert lmlib.resolve(run) == run / "iter_10" / "checkpoint", "the newest complete one, by number"
    assert lmlib.resolve(f"{run}/") == run / "iter_10" / "checkpoint"
    assert lmlib.resolve(f"{run}@2") == run / "iter_2" / "checkpoint"
    assert lmlib.resolve(run / "iter_1" / "checkpoint") == run / "iter_1" / "checkpoint"
    for wanted in (11, 3):
        with pytest.raises(LoadError, match=rf"iteration {wanted} not complete; .* iterations: 1, 2, 10"):
            lmlib.resolve(f"{run}@{wanted}")


def test_a_run_that_has_just_begun_is_no_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ())
    with pytest.raises(LoadError, match=r"no iteration complete.*none yet"):
        lmlib.resolve(run)


def test_names_that_hold_an_at_sign(tmp_path: Path, exported: Path) -> None:
    run = make_run(tmp_path / "run@3", (1, 2))
    assert lmlib.resolve(run) == run / "iter_2" / "checkpoint"
    assert lmlib.resolve(f"{run}@1") == run / "iter_1" / "checkpoint"
    folder = tmp_path / "model@2"
    folder.symlink_to(exported)
    assert lmlib.resolve(folder) == folder
    with pytest.raises(LoadError, match="not a run directory"):
        lmlib.resolve(f"{exported}@2")


def test_what_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match=r"no config\.json in it"):
        lmlib.resolve(tmp_path / "empty")
    for absent in (tmp_path / "absent", "gpt2", "./a/b"):
        with pytest.raises(LoadError, match="no such folder; give a Hugging Face folder"):
            lmlib.resolve(absent)
    with pytest.raises(lmlib.HubError, match=r"somebody/some-model: no such folder, and the hub did not give it"):
        lmlib.resolve("somebody/some-model")


def test_hub_names_carry_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert not [p for p in allow_patterns if "bin" in p or "pt" in p or "py" in p]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert lmlib.resolve("org/model@abc123") == tmp_path and lmlib.resolve("org/model") == tmp_path
    assert asked == [("org/model", "abc123"), ("org/model", None)]


def test_tokens_array() -> None:
    np.testing.assert_array_equal(lmlib.tokens_array([[1, 2], [3]], 3, 9), [[1, 2, 9], [3, 9, 9]])


def test_config_of_a_checkpoint_is_a_hugging_face_config(tmp_path: Path) -> None:
    lmlib.save_checkpoint(tiny.make_lm(), tmp_path, {"step": 0})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_all_stop_ids_survive_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    lmlib.export(tiny.make_lm(), folder, dtype="float32")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    loaded = load(folder, dtype="float32")
    assert set(loaded.tokenizer.stop_ids) == {2, 7}
    lmlib.save_checkpoint(loaded, tmp_path / "checkpoint", {})
    again = load(tmp_path / "checkpoint", dtype="float32")
    assert again.tokenizer.stop_ids == loaded.tokenizer.stop_ids
    assert again.tokenizer.template_hash == loaded.tokenizer.template_hash
    lmlib.export(again, tmp_path / "exported")
    assert load(tmp_path / "exported").tokenizer.stop_ids == loaded.tokenizer.stop_ids
    written = [tmp_path / name / "generation_config.json" for name in ("checkpoint", "exported")]
    assert json.loads(written[0].read_text()) == json.loads(written[1].read_text())


def live_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_sampling_weights_are_those_of_one_model_at_a_time() -> None:
    lmlib.make_room()
    model, other = tiny.make_lm(dtype=jnp.bfloat16), tiny.make_lm(seed=1, dtype=jnp.bfloat16)
    before, half = live_bytes(), sum(w.nbytes for w in jax.tree.leaves(model.weights)) // 2
    for lm in (model, model, other):
        assert lm.sampling_weights is lm.sampling_weights
        assert live_bytes() == before + half
    lmlib.make_room()
    assert live_bytes() == before
    lmlib.make_room()  # with nothing to free it is no error


def test_sampling_weights_go_with_their_model() -> None:
    lmlib.make_room()
    before = live_bytes()
    tiny.make_lm(dtype=jnp.bfloat16).sampling_weights  # noqa: B018
    assert live_bytes() == before


def test_borrowed_model_stays_until_there_has_to_be_room(tmp_path: Path) -> None:
    for seed in (0, 1):
        lmlib.export(tiny.make_lm(seed=seed), tmp_path / str(seed), dtype="float32")
    first = lmlib.borrowed(str(tmp_path / "0"), "float32", tiny.mesh())
    assert lmlib.borrowed(str(tmp_path / "0"), "float32", tiny.mesh()) is first
    lmlib.make_room()
    assert lmlib.borrowed(str(tmp_path / "0"), "float32", tiny.mesh()) is not first
    assert lmlib.borrowed(str(tmp_path / "1"), "float32", tiny.mesh()).fingerprint != first.fingerprint


def test_a_bfloat16_folder_has_one_fingerprint_in_every_dtype(tmp_path: Path) -> None:
    lmlib.export(tiny.make_lm(), tmp_path / "model", dtype="bfloat16")
    first, second = (load(tmp_path / "model", dtype=dtype).fingerprint for dtype in ("bfloat16", "float32"))
    assert first == second
