"""LM: fingerprints, loading from every kind of MODEL argument, saving, and errors."""

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
from jaxsi.hf.config import HFError
from jaxsi.lm import (
    HubError,
    LoadError,
    borrowed,
    export,
    fingerprint,
    load,
    make_room,
    resolve,
    save_checkpoint,
    tokens_array,
)
from jaxsi.runs import checkpoint
from jaxsi.runs.checkpoint import CheckpointError
from jaxsi.runs.run import Run
from jaxsi.training import resume, train
from jaxsi.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The smallest config of a run."""

    seed: int = 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder, float32."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    export(tiny.make_lm(), folder, dtype="float32")
    return folder


# ---------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_does_not_depend_on_the_mesh() -> None:
    prints = {name: tiny.make_lm(name).fingerprint for name in ("1x1x1", "2x2x2", "1x8x1")}
    assert len(set(prints.values())) == 1
    assert len(prints["1x1x1"]) == 16 and int(prints["1x1x1"], 16) >= 0


def test_every_single_bit_changes_the_fingerprint() -> None:
    lm = tiny.make_lm()
    seen = {lm.fingerprint}
    for path, w in jax.tree_util.tree_leaves_with_path(lm.weights):
        for index in (0, w.size - 1):
            bits = np.array(w).view(np.uint32).reshape(-1)
            bits[index] ^= 1
            flipped = jnp.asarray(bits.view(np.float32).reshape(w.shape))
            changed = jax.tree_util.tree_map_with_path(lambda p, x, at=path, y=flipped: y if p == at else x, lm.weights)
            seen.add(fingerprint(changed))
    leaves = jax.tree.leaves(lm.weights)
    assert len(seen) == 1 + sum(2 if w.size > 1 else 1 for w in leaves)


def test_exchanged_values_change_the_fingerprint() -> None:
    lm = tiny.make_lm()
    swapped = np.array(lm.weights["embed"])
    swapped[[3, 4]] = swapped[[4, 3]]
    assert fingerprint(lm.weights | {"embed": jnp.asarray(swapped)}) != lm.fingerprint
    layers = lm.weights["layers"]  # k and v have the same shape
    exchanged = layers | {"k": layers["v"], "v": layers["k"]}
    assert fingerprint(lm.weights | {"layers": exchanged}) != lm.fingerprint
    assert fingerprint(jax.tree.map(lambda w: w.astype(jnp.bfloat16), lm.weights)) != lm.fingerprint


# --------------------------------------------------------------------------------------------------------------- models


def test_logits_on_meshes_and_in_dtypes() -> None:
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
def test_sampling_weights_are_cast_and_unstacked(mesh: str) -> None:
    lm = tiny.make_lm(mesh, dtype=jnp.bfloat16)
    weights = lm.sampling_weights
    assert weights is lm.sampling_weights, "created only once"
    assert len(weights["layers"]) == tiny.CONFIG.num_layers
    for i, layer in enumerate(weights["layers"]):
        for name, w in layer.items():
            assert w.dtype == jnp.bfloat16
            np.testing.assert_array_equal(w, lm.weights["layers"][name][i].astype(jnp.bfloat16))
    embed_shards = {shard.data.shape for shard in weights["layers"][0]["up"].addressable_shards}
    assert embed_shards == {(16, 32) if mesh == "1x1x1" else (16, 16)}, "each fsdp device has whole rows"


# ------------------------------------------------------------------------------------------------------- load and save


def test_export_then_load_returns_the_same_model_on_any_mesh(exported: Path) -> None:
    lm = tiny.make_lm()
    for mesh in ("1x1x1", "2x2x2"):
        loaded = load(exported, tiny.mesh(mesh), "float32")
        assert loaded.fingerprint == lm.fingerprint and loaded.config == lm.config
        assert loaded.tokenizer.template_hash == lm.tokenizer.template_hash
        assert loaded.tokenizer.stop_ids == lm.tokenizer.stop_ids
    with pytest.raises(HFError, match="not an empty folder"):
        export(lm, exported)


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_weights_are_in_the_fast_dtype_unless_weights_dtype_says_float32(
    exported: Path, monkeypatch: pytest.MonkeyPatch, fast: str
) -> None:
    monkeypatch.setattr("jaxsi.model.compute_dtype.fast_dtype", lambda: fast)
    lm = jaxsi.load(str(exported), tiny.mesh())
    assert lm.dtype == jnp.dtype(fast) and {w.dtype for w in jax.tree.leaves(lm.weights)} == {jnp.dtype(fast)}
    masters = load(exported, tiny.mesh(), "bfloat16", weights_dtype="float32")
    assert masters.dtype == jnp.bfloat16 and masters.fingerprint == tiny.make_lm().fingerprint


def test_checkpoint_round_trip_on_another_mesh(tmp_path: Path) -> None:
    lm = tiny.make_lm("2x2x2")
    save_checkpoint(lm, tmp_path / "c", {"step": 3})
    meta = checkpoint.read_meta(tmp_path / "c" / "weights")
    assert meta == {"step": 3, "fingerprint": lm.fingerprint}
    loaded = load(tmp_path / "c", tiny.mesh("1x8x1"), "float32")
    assert loaded.fingerprint == lm.fingerprint and loaded.config == lm.config
    half = load(tmp_path / "c", tiny.mesh(), "bfloat16")
    assert {w.dtype for w in jax.tree.leaves(half.weights)} == {jnp.dtype("bfloat16")}


def test_inference_rounds_stored_float32_while_reading_and_ignores_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.make_lm("1x8x1")
    with Run.open(tmp_path / "run", Config()) as run:
        state = train.initial_state(lm.weights, OptimConfig(learning_rate=1e-2))
        resume.save_result(lm, state, run.at("iter_1"), {"step": 0})
    folder = tmp_path / "run" / "iter_1" / "checkpoint"
    shutil.rmtree(folder / "optimizer")
    trees: list[Any] = []
    restore = checkpoint.restore

    def restore_and_note(*arguments: Any, **options: Any) -> Any:
        trees.append(restore(*arguments, **options))
        return trees[-1]

    monkeypatch.setattr(checkpoint, "restore", restore_and_note)
    loaded = load(folder, tiny.mesh("2x2x2"), "bfloat16")
    assert {w.dtype for w in jax.tree.leaves(trees)} == {jnp.dtype("bfloat16")}, "no float32 reached a device"
    for half, whole in zip(jax.tree.leaves(loaded.weights), jax.tree.leaves(lm.weights), strict=True):
        np.testing.assert_array_equal(np.asarray(half), np.asarray(whole).astype(jnp.bfloat16))
    assert loaded.fingerprint == lm.fingerprint


def test_checkpoint_keeps_its_fingerprint_in_every_dtype(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    save_checkpoint(lm, tmp_path, {})
    for dtype in ("bfloat16", "float16", "float32"):
        loaded = load(tmp_path, tiny.mesh(), dtype)
        assert loaded.fingerprint == lm.fingerprint
        changed = loaded.replace(jax.tree.map(lambda w: w + 1, loaded.weights))
        assert changed.fingerprint == fingerprint(changed.weights) != lm.fingerprint


def test_interrupted_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tiny.make_lm(), tmp_path, {"step": 3})
    (tmp_path / "weights" / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="interrupted"):
        load(tmp_path, tiny.mesh())


# -------------------------------------------------------------------------------------------------------------- resolve


def make_run(path: Path, complete: tuple[int, ...], incomplete: tuple[int, ...] = ()) -> Path:
    """A run directory with iterations, whose checkpoints are only a config and a manifest."""
    with Run.open(path, Config()) as run:
        for t in (*complete, *incomplete):
            folder = run.at(f"iter_{t}").path / "checkpoint"
            (folder / "weights").mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            if t in complete:
                checkpoint._write_manifest(folder / "weights", {"meta": {}, "leaves": {}, "files": {}})
    return path


def test_resolve_run_directories_and_iterations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1, 2, 10), (11,))
    assert resolve(run) == run / "iter_10" / "checkpoint", "the newest complete iteration, by number"
    assert resolve(f"{run}/") == run / "iter_10" / "checkpoint"
    assert resolve(f"{run}@2") == run / "iter_2" / "checkpoint"
    assert resolve(run / "iter_1" / "checkpoint") == run / "iter_1" / "checkpoint"
    for number in (11, 3):
        with pytest.raises(LoadError, match=rf"iteration {number} not complete; .* iterations: 1, 2, 10"):
            resolve(f"{run}@{number}")


def test_run_without_a_complete_iteration_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ())
    with pytest.raises(LoadError, match=r"no iteration complete.*none yet"):
        resolve(run)


def test_paths_may_contain_an_at_sign(tmp_path: Path, exported: Path) -> None:
    run = make_run(tmp_path / "run@3", (1, 2))
    assert resolve(run) == run / "iter_2" / "checkpoint"
    assert resolve(f"{run}@1") == run / "iter_1" / "checkpoint"
    folder = tmp_path / "model@2"
    folder.symlink_to(exported)
    assert resolve(folder) == folder
    with pytest.raises(LoadError, match="not a run directory"):
        resolve(f"{exported}@2")


def test_argument_that_names_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match=r"no config\.json in it"):
        resolve(tmp_path / "empty")
    for absent in (tmp_path / "absent", "gpt2", "./a/b"):
        with pytest.raises(LoadError, match="no such folder; give a Hugging Face folder"):
            resolve(absent)
    with pytest.raises(
        HubError, match=r"somebody/some-model: no such folder, and it could not be downloaded from the hub"
    ):
        resolve("somebody/some-model")


def test_hub_name_may_have_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    requests = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        requests.append((repository, revision))
        assert not [p for p in allow_patterns if "bin" in p or "pt" in p or "py" in p]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/model@abc123") == tmp_path and resolve("org/model") == tmp_path
    assert requests == [("org/model", "abc123"), ("org/model", None)]


def test_tokens_array_pads_on_the_right() -> None:
    np.testing.assert_array_equal(tokens_array([[1, 2], [3]], 3, 9), [[1, 2, 9], [3, 9, 9]])


def test_checkpoint_has_a_hugging_face_config(tmp_path: Path) -> None:
    save_checkpoint(tiny.make_lm(), tmp_path, {"step": 0})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_all_stop_ids_survive_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export(tiny.make_lm(), folder, dtype="float32")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    loaded = load(folder, dtype="float32")
    assert set(loaded.tokenizer.stop_ids) == {2, 7}
    save_checkpoint(loaded, tmp_path / "checkpoint", {})
    again = load(tmp_path / "checkpoint", dtype="float32")
    assert again.tokenizer.stop_ids == loaded.tokenizer.stop_ids
    assert again.tokenizer.template_hash == loaded.tokenizer.template_hash
    export(again, tmp_path / "exported")
    assert load(tmp_path / "exported").tokenizer.stop_ids == loaded.tokenizer.stop_ids
    configs = [tmp_path / name / "generation_config.json" for name in ("checkpoint", "exported")]
    assert json.loads(configs[0].read_text()) == json.loads(configs[1].read_text())


def test_eos_list_of_config_json_counts_without_a_generation_config(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 7]}))
    assert set(load(folder).tokenizer.stop_ids) == {2, 7}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert load(folder).tokenizer.stop_ids == (2,)


def test_sampling_defaults_of_the_makers_are_kept(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    makers = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(makers | {"eos_token_id": 2, "_from_model_config": True}))
    lm = load(folder, dtype="float32")
    assert lm.generation == makers
    save_checkpoint(lm, tmp_path / "checkpoint", {})
    again = load(tmp_path / "checkpoint", dtype="float32")
    export(again.replace(again.weights), tmp_path / "exported")
    kept = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert kept.items() >= makers.items() and kept["eos_token_id"] == [2]


def test_tokenizer_of_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    """Beyond the embedding JAX would take its last row. A special token that no prompt contains may lie there."""
    folder = shutil.copytree(exported, tmp_path / "model")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    size = tiny.CONFIG.vocab_size
    added = {"id": size, "content": "<mask>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    tokens["added_tokens"].append(added | {"normalized": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert load(folder).tokenizer.vocab_size == size + 1
    tokens["added_tokens"][-1]["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(LoadError, match=rf"tokenizer has {size + 1} ids, the model an embedding of {size}"):
        load(folder)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    lm = tiny.make_lm()
    for ids in ([[0, lm.config.vocab_size]], [[-1, 3]]):
        with pytest.raises(ValueError, match=r"token_ids go from .* the vocabulary has"):
            lm.logits(ids)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    broken = lm.replace(lm.weights | {"final_norm": lm.weights["final_norm"].at[0].set(jnp.nan)})
    with pytest.raises(CheckpointError, match=r"1 of the model's weights are not finite.* \['final_norm'\]"):
        save_checkpoint(broken, tmp_path / "checkpoint", {})
    assert not (tmp_path / "checkpoint").exists()


def test_damaged_newest_iteration_is_not_replaced_by_an_older_one_in_silence(tmp_path: Path, caplog: Any) -> None:
    for t in (1, 2):
        save_checkpoint(tiny.make_lm(), tmp_path / f"iter_{t}" / "checkpoint", {"step": t})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text(json.dumps({"iterations": [{"iteration": 1}, {"iteration": 2}]}))
    assert resolve(tmp_path) == tmp_path / "iter_2" / "checkpoint"
    assert f"{tmp_path}: iteration 2 is used" in caplog.text
    shutil.rmtree(tmp_path / "iter_2" / "checkpoint" / "weights")
    with pytest.raises(LoadError, match=rf"counts iteration 2, but its checkpoint is gone or damaged; .*{tmp_path}@1"):
        resolve(tmp_path)
    assert resolve(f"{tmp_path}@1") == tmp_path / "iter_1" / "checkpoint"
    (tmp_path / "summary.json").write_text(json.dumps({"iterations": [{"iteration": 1}]}))  # the run is in iteration 2
    assert resolve(tmp_path) == tmp_path / "iter_1" / "checkpoint"


def test_complete_run_is_the_iteration_that_its_method_found_to_be_best(tmp_path: Path) -> None:
    for t in (1, 2):
        save_checkpoint(tiny.make_lm(), tmp_path / f"iter_{t}" / "checkpoint", {"step": t})
    (tmp_path / "config.json").write_text("{}")
    summary = {"iterations": [{"iteration": 1}, {"iteration": 2}], "best": 1, "status": "complete"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert resolve(tmp_path) == tmp_path / "iter_1" / "checkpoint"
    assert resolve(f"{tmp_path}@2") == tmp_path / "iter_2" / "checkpoint"
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"status": "running"}))  # it goes on after round 2
    assert resolve(tmp_path) == tmp_path / "iter_2" / "checkpoint"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    shutil.rmtree(tmp_path / "iter_1" / "checkpoint" / "weights")
    with pytest.raises(LoadError, match="counts iteration 1, but its checkpoint is gone"):
        resolve(tmp_path)


def live_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_only_one_model_has_sampling_weights_at_a_time() -> None:
    make_room()
    model, other = tiny.make_lm(dtype=jnp.bfloat16), tiny.make_lm(seed=1, dtype=jnp.bfloat16)
    before, half = live_bytes(), sum(w.nbytes for w in jax.tree.leaves(model.weights)) // 2
    for lm in (model, model, other):
        assert lm.sampling_weights is lm.sampling_weights
        assert live_bytes() == before + half
    make_room()
    assert live_bytes() == before
    make_room()  # it is not an error if there is nothing to free


def test_sampling_weights_are_freed_with_their_model() -> None:
    make_room()
    before = live_bytes()
    tiny.make_lm(dtype=jnp.bfloat16).sampling_weights  # noqa: B018
    assert live_bytes() == before


def test_borrowed_model_stays_until_make_room(tmp_path: Path) -> None:
    for seed in (0, 1):
        export(tiny.make_lm(seed=seed), tmp_path / str(seed), dtype="float32")
    first = borrowed(str(tmp_path / "0"), "float32", tiny.mesh())
    assert borrowed(str(tmp_path / "0"), "float32", tiny.mesh()) is first
    make_room()
    assert borrowed(str(tmp_path / "0"), "float32", tiny.mesh()) is not first
    assert borrowed(str(tmp_path / "1"), "float32", tiny.mesh()).fingerprint != first.fingerprint


def test_bfloat16_folder_has_the_same_fingerprint_in_every_dtype(tmp_path: Path) -> None:
    export(tiny.make_lm(), tmp_path / "model", dtype="bfloat16")
    first, second = (load(tmp_path / "model", dtype=dtype).fingerprint for dtype in ("bfloat16", "float32"))
    assert first == second
