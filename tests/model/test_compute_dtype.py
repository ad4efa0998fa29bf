"""The dtype "auto": chosen by timings, decided once a run, and the same again when the run goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

import tiny
from jaxsi.methods import single
from jaxsi.methods.start import finish
from jaxsi.model import compute_dtype
from jaxsi.model.compute_dtype import (
    LIMIT,
    Measured,
    actual,
    fast_dtype,
    measured,
    product_seconds,
    settled,
    settled_in,
)
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs import first_process
from jaxsi.runs.config_snapshot import RunConfigError, check_config, describe_config
from jaxsi.runs.run import Run, RunError
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import LocalCritic
from jaxsi.toyworld.seed import SHIPPED
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import DPOConfig, TrainConfig

OPTIM = OptimConfig(learning_rate=1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A method's config in which every kind of part has a dtype."""

    model: str = str(SHIPPED)
    sampling: SamplingConfig = SamplingConfig()
    dpo: DPOConfig = DPOConfig(train=TrainConfig(optim=OPTIM, batch_size=8, max_length=64))
    rl: RLConfig | None = None
    critic: LocalCritic | None = None
    mesh: MeshConfig = MeshConfig()
    iterations: int = 1
    seed: int = 0


def noting(cfg: Config, run: Run) -> Any:
    """A method that notes the dtypes that it is given."""
    return run.at(f"iter_{cfg.iterations}").value("dtypes", lambda: [cfg.sampling.dtype, cfg.dpo.train.dtype])


EVERYWHERE = Config(rl=RLConfig(optim=OPTIM, steps=1), critic=LocalCritic(model="other"))
STORED_FLOAT32 = dataclasses.replace(SamplingConfig(), dtype="float32")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets which dtype is fast; None: measuring is an error."""

    def is_fast_in(dtype: str | None) -> None:
        def answer() -> str:
            assert dtype is not None, "nothing was to be measured"
            return dtype

        monkeypatch.setattr(compute_dtype, "_announced", answer)

    return is_fast_in


def dtypes(config: Any) -> list[str]:
    parts = (config.sampling, config.dpo.train, config.rl, config.critic)
    return [part.dtype for part in parts if part is not None]


# ---- the measurement -------------------------------------------------------------------------------------------------


def times(ratio: float, noise: Any = lambda turn: 1.0) -> Any:
    """Timings in which products in bfloat16 take ``ratio`` times as long; ``noise(turn)`` makes turns longer."""
    turns: dict[tuple[int, str], int] = {}

    def seconds(rows: int, dtype: str) -> float:
        turns[rows, dtype] = turns.get((rows, dtype), -1) + 1
        return rows * (ratio if dtype == "bfloat16" else 1.0) * noise(turns[rows, dtype])

    return seconds


def test_timings_choose_the_dtype() -> None:
    assert measured(times(0.5)) == Measured("bfloat16", pytest.approx(0.5))
    assert measured(times(1.0)).dtype == "bfloat16"  # half the memory
    assert measured(times(LIMIT - 0.1)).dtype == "bfloat16" and measured(times(LIMIT + 0.1)).dtype == "float32"
    assert measured(times(3.0)) == Measured("float32", pytest.approx(3.0))


def test_slow_turns_do_not_change_the_answer() -> None:
    for ratio in (0.85, 2.7):
        for quiet in range(compute_dtype.REPEATS):
            found = measured(times(ratio, lambda turn, quiet=quiet: 1.0 if turn == quiet else 20.0))
            assert found.ratio == pytest.approx(ratio)


def test_both_shapes_count() -> None:
    few, many = compute_dtype.ROWS
    slow = {(few, "bfloat16"): 4.0, (few, "float32"): 1.0, (many, "bfloat16"): 1.0, (many, "float32"): 1.0}
    assert measured(lambda rows, dtype: slow[rows, dtype]).ratio == pytest.approx(2.0)


def test_this_device_is_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    compute_dtype._announced.cache_clear()
    answer = fast_dtype()
    assert answer in ("bfloat16", "float32") and fast_dtype() == answer
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dtype auto: {answer} (products in bfloat16 take ")
    seconds = product_seconds()
    assert all(seconds(rows, dtype) > 0 for rows in compute_dtype.ROWS for dtype in ("bfloat16", "float32"))


def test_process_0_decides_for_all(monkeypatch: pytest.MonkeyPatch, device: Any, tmp_path: Path) -> None:
    sent: list[np.ndarray] = []

    def send(value: np.ndarray) -> np.ndarray:
        sent.append(np.array(value))
        return value

    def receive(value: np.ndarray) -> np.ndarray:
        told = sent.pop(0)
        assert np.shape(value) == told.shape, "both know how much there is to tell"
        return told

    monkeypatch.setattr(first_process, "processes", lambda: (0, 2))
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", send)
    device("float32")
    assert fast_dtype() == "float32"
    assert dtypes(settled(EVERYWHERE, tmp_path)) == ["float32"] * 4
    monkeypatch.setattr(first_process, "processes", lambda: (1, 2))
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", receive)
    device(None)  # process 1 does not measure
    assert fast_dtype() == "float32"
    assert dtypes(settled(EVERYWHERE, tmp_path)) == ["float32"] * 4
    assert not sent


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_new_run_gets_the_fast_dtype_everywhere(device: Any, tmp_path: Path) -> None:
    device("float32")
    assert dtypes(EVERYWHERE) == ["auto"] * 4
    assert dtypes(settled(EVERYWHERE, tmp_path / "new")) == ["float32"] * 4
    device("bfloat16")
    assert dtypes(settled(EVERYWHERE, tmp_path / "new")) == ["bfloat16"] * 4
    assert settled({"settings": {"dtype": "auto"}}, tmp_path) == {"settings": {"dtype": "bfloat16"}}


def test_dtype_that_the_user_gave_stays(device: Any, tmp_path: Path) -> None:
    mixed = dataclasses.replace(EVERYWHERE, sampling=SamplingConfig(dtype="float16"))
    device("float32")
    assert dtypes(settled(mixed, tmp_path)) == ["float16", "float32", "float32", "float32"]
    device(None)
    real = dataclasses.replace(mixed, dpo=DPOConfig(train=TrainConfig(dtype="bfloat16")), rl=None, critic=None)
    assert settled(real, tmp_path) is real
    assert actual("float16") == "float16" and actual(jnp.bfloat16) == jnp.bfloat16


def test_text_auto_elsewhere_is_no_dtype(device: Any) -> None:
    device(None)
    assert settled({"mode": "auto", "dtype": None}, Path("nowhere")) == {"mode": "auto", "dtype": None}


def test_resumed_run_keeps_the_dtype_of_each_field(
    device: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device("bfloat16")
    begun = settled(dataclasses.replace(EVERYWHERE, sampling=STORED_FLOAT32), tmp_path)
    write(tmp_path, describe_config(begun), device)
    assert dtypes(settled(EVERYWHERE, tmp_path)) == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    assert capsys.readouterr().err.splitlines()[-1] == "dtype auto: bfloat16 and float32, as this run began"


def write(directory: Path, config: Any, device: Any) -> None:
    """Makes ``directory`` a run with this config.json, on a device where measuring is an error."""
    (directory / "config.json").write_text(json.dumps(config))
    device(None)


def test_field_that_the_run_did_not_store_is_bfloat16(device: Any, tmp_path: Path) -> None:
    described = describe_config(dataclasses.replace(EVERYWHERE, sampling=STORED_FLOAT32))
    del described["critic"]["dtype"], described["rl"], described["dpo"]["train"]["dtype"]
    write(tmp_path, described, device)
    assert dtypes(settled(EVERYWHERE, tmp_path)) == ["float32", "bfloat16", "bfloat16", "bfloat16"]


def test_check_config_takes_auto_for_the_stored_dtype() -> None:
    stored = describe_config(dataclasses.replace(EVERYWHERE, sampling=STORED_FLOAT32))
    for part in (stored["dpo"]["train"], stored["rl"], stored["critic"]):
        part["dtype"] = "bfloat16"
    check_config(Path("run"), stored, EVERYWHERE)
    given = dataclasses.replace(EVERYWHERE, sampling=SamplingConfig(dtype="bfloat16"))
    with pytest.raises(RunConfigError, match=r"sampling\.dtype: 'float32' -> 'bfloat16'"):
        check_config(Path("run"), stored, given)


def test_field_newer_than_the_run_resumes_in_bfloat16_alone() -> None:
    stored = describe_config(dataclasses.replace(Config(), sampling=STORED_FLOAT32))
    del stored["dpo"]["train"]["dtype"]

    def given(dtype: str) -> Config:
        train = dataclasses.replace(Config().dpo.train, dtype=dtype)
        return dataclasses.replace(Config(), sampling=STORED_FLOAT32, dpo=DPOConfig(train=train))

    check_config(Path("run"), stored, given("bfloat16"))
    check_config(Path("run"), stored, given("auto"))
    with pytest.raises(RunConfigError, match=r"dpo\.train\.dtype: 'bfloat16' -> 'float32'"):
        check_config(Path("run"), stored, given("float32"))


# ---- runs ------------------------------------------------------------------------------------------------------------


def noted(directory: Path, iteration: int = 1) -> list[str]:
    return json.loads((directory / f"iter_{iteration}" / "dtypes.json").read_text())


def stored_dtypes(directory: Path) -> list[str]:
    stored = json.loads((directory / "config.json").read_text())
    return [stored["sampling"]["dtype"], stored["dpo"]["train"]["dtype"]]


def test_run_stores_real_dtypes_and_gives_them_to_the_method(device: Any, tmp_path: Path) -> None:
    device("float32")
    finish(Config(), tmp_path / "run")
    assert noted(tmp_path / "run") == stored_dtypes(tmp_path / "run") == ["float32", "float32"]


def test_run_begun_in_bfloat16_goes_on_in_it(device: Any, tmp_path: Path) -> None:
    train = dataclasses.replace(Config().dpo.train, dtype="bfloat16")
    earlier = Config(sampling=SamplingConfig(dtype="bfloat16"), dpo=DPOConfig(train=train))  # the defaults of then
    finish(earlier, tmp_path / "run")
    device("float32")
    finish(Config(iterations=2), tmp_path / "run")
    assert noted(tmp_path / "run", 2) == stored_dtypes(tmp_path / "run") == ["bfloat16", "bfloat16"]
    with pytest.raises(RunConfigError, match=r"sampling\.dtype: 'bfloat16' -> 'float32'"):
        finish(Config(sampling=STORED_FLOAT32, iterations=2), tmp_path / "run")


def test_single_training_goes_on_in_the_dtype_of_its_run(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(single.train, "sft", lambda lm, records, config, scope: given.append(config.dtype))
    monkeypatch.setattr(single.train, "dpo", lambda lm, records, config, *_, **__: given.append(config.train.dtype))
    lm, examples, pairs = tiny.make_lm(), [("Reverse: cat", "cat")], [("Reverse: cat", "cat", "dog")]
    for dtype in ("float32", "bfloat16"):  # the second time the device is fast in another one
        device(dtype)
        single.sft(lm, examples, tmp_path / "sft")
        single.dpo(lm, pairs, tmp_path / "dpo")
    assert given == ["float32"] * 4
    assert json.loads((tmp_path / "dpo" / "config.json").read_text())["training"]["train"]["dtype"] == "float32"


def test_run_is_not_opened_with_auto(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r'sampling\.dtype is "auto", .* call jaxsi\.run\(config, run_dir\)'):
        Run.open(tmp_path / "run", Config())
    assert not (tmp_path / "run").exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nameless:
    seed: int = 0


def test_stage_outside_of_a_method_keeps_its_dtype(device: Any, tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", Nameless()) as run:
        device("bfloat16")
        assert settled_in(run.at("a"), TrainConfig()).dtype == "bfloat16"
        device("float32")
        assert settled_in(run.at("a"), TrainConfig()).dtype == "bfloat16"
        assert settled_in(run.at("b"), TrainConfig()).dtype == "float32"
        device(None)
        assert settled_in(run.at("c"), TrainConfig(dtype="float16")).dtype == "float16"
        assert not (run.path / "c").exists()
