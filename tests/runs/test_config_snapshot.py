"""Stored ids, runs of earlier versions, and callables that changed."""

import dataclasses
import functools
import gzip
import importlib
import json
import linecache
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxsi.runs import config_snapshot
from jaxsi.runs.config_file import load_config, load_configs
from jaxsi.runs.config_snapshot import RunConfigError, check_config, describe_config, stored_as, was
from jaxsi.training import losses
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig

ROOT = Path(__file__).parents[2]
# What every shipped config was described as before the code moved into rooms: "file:function" or
# "file:name" of configs() -> the content of config.json, with module paths as names.
BEFORE = json.loads(
    gzip.decompress((ROOT / "tests" / "golden" / "configs_before_the_rooms.json.gz").read_bytes())
    .decode()
    .replace("{root}", str(ROOT))
)


def now(place: str) -> Any:
    file, _, name = place.rpartition(":")
    if name in ("config", "control"):
        return load_config(ROOT / file, name)
    return load_configs(ROOT / file)[name]


# What shipped configs have said otherwise since then: warm-up is a share of the steps, and no longer a number of them;
# all references of PIT's round 1 are the policy's; checkpoints of the paper's run are compared, iterations are not;
# judges are measured on human rankings, real models on held-out prompts; the toy keeps the request for new prompts that
# its model has learnt; SEFT's toy says its batches in examples.
SAID_OTHERWISE = re.compile(
    r"(\w+\.)*optim\.warmup_(steps|ratio): |mix: 0.2 -> 0.0|early_stop.iterations: True -> False"
    r"|seed_data.judge_test: None -> |early_stop.judge[.\w]*: |evaluate[.\w]*: "
    r"|(reviser\.\w+|sft)\.batch_size: |prompts.format.\w+: "
)


@pytest.mark.parametrize("place", BEFORE)
def test_run_stored_before_the_move_resumes(place: str) -> None:
    try:
        check_config(Path("run"), BEFORE[place], now(place))
    except RunConfigError as error:
        if unexpected := [text for text in error.differences if not SAID_OTHERWISE.match(text)]:
            pytest.fail("; ".join(unexpected))


def test_run_stored_before_the_move_of_another_config_does_not_resume() -> None:
    stored = json.loads(json.dumps(BEFORE["configs/self_rewarding/toy.py:config"]))
    stored["judging"] = "jaxsi.toyworld.seed_data.permuted_judge"
    stored["dpo"]["beta"] = 0.5
    with pytest.raises(RunConfigError) as caught:
        check_config(Path("run"), stored, now("configs/self_rewarding/toy.py:config"))
    assert [text for text in caught.value.differences if not SAID_OTHERWISE.match(text)] == [
        "judging: 'jaxsi.toyworld.seed_data.permuted_judge' -> 'feedback.judge'",
        "dpo.beta: 0.5 -> 0.1",
    ]


def test_no_module_path_of_the_package_is_stored() -> None:
    for place in BEFORE:
        assert not re.findall(r'"jaxsi(?:\.\w+)+"', json.dumps(describe_config(now(place))))


def test_stored_ids_are_unique() -> None:
    for file in (ROOT / "jaxsi").rglob("*.py"):
        if file.name != "__main__.py":
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    ids = list(config_snapshot._IDS.values())
    assert len(ids) == len(set(ids)) > 60


# ---- fields that moved -----------------------------------------------------------------------------------------------


@stored_as("test.Part")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    scale: float = dataclasses.field(default=1.0, metadata=was("scale"))
    judge: Callable[..., float] | None = dataclasses.field(default=None, metadata=was("judge"))
    newer: int = 1


@stored_as("test.Moved")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    part: Part = Part()
    seed: int = 0


def test_field_that_moved_into_a_part_is_found_in_its_old_place() -> None:
    judge = describe_config(json.dumps)
    stored = {"__type__": "test.Moved", "scale": 2.0, "judge": judge, "seed": 0}
    check_config(Path("run"), stored, Moved(part=Part(scale=2.0, judge=json.dumps)))
    with pytest.raises(RunConfigError) as caught:
        check_config(Path("run"), stored, Moved(part=Part(scale=3.0, newer=2)))
    assert caught.value.differences == (
        "part.scale: 2.0 -> 3.0",
        f"part.judge: {judge!r} -> None",
        "part.newer: 1 -> 2",
    )
    check_config(Path("run"), describe_config(Moved(part=Part(scale=2.0))), Moved(part=Part(scale=2.0)))


# ---- callables of the user -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    judging: Callable[..., float]
    seed: int = 0


FILE = """
import dataclasses, functools
WEIGHT = {weight}
BONUS = {bonus}

def words(text):
    return len(text.split()){change}

def judge(prompt, response, scale=1.0):
    return WEIGHT * words(response) * scale + len(BONUS)  {comment}

def other(prompt):
    return prompt

def config():
    from jaxsi.training.optim import OptimConfig
    return {value}
"""


def written(folder: Path, **changes: str) -> Any:
    """The callable of a config file; without changes always the same."""
    parts = {"weight": "1.0", "bonus": "('a', 1)", "change": "", "comment": "", "value": "judge"} | changes
    (folder / "mine.py").write_text(FILE.format(**parts))
    importlib.invalidate_caches()

    linecache.clearcache()
    return load_config(folder / "mine.py")


def test_changed_function_of_the_user_is_noticed(tmp_path: Path) -> None:
    stored = describe_config(Config(judging=written(tmp_path)))
    assert stored["judging"].startswith("jaxsi_config_mine.judge#")
    check_config(tmp_path, stored, Config(judging=written(tmp_path, comment="# a comment changes nothing")))
    for changes in ({"weight": "2.0"}, {"bonus": "('b', 1)"}, {"change": " + 1"}, {"value": "other"}):
        with pytest.raises(RunConfigError, match=r"judging: 'jaxsi_config_mine\.judge#"):
            check_config(tmp_path, stored, Config(judging=written(tmp_path, **changes)))


JUDGE = """
import dataclasses

def helper(text):
    return len(text){change}

@dataclasses.dataclass(frozen=True)
class Judge:
    scale: float = 1.0
    def __call__(self, prompt, response):
        return self.scale * helper(response)

def config():
    return Judge()
"""


def test_changed_callable_class_of_the_user_is_noticed(tmp_path: Path) -> None:
    def judge(change: str) -> Any:
        (tmp_path / "judge.py").write_text(JUDGE.format(change=change))
        linecache.clearcache()
        return load_config(tmp_path / "judge.py")

    stored = describe_config(Config(judging=judge("")))
    assert stored["judging"]["__type__"].startswith("jaxsi_config_judge.Judge#")
    check_config(tmp_path, stored, Config(judging=judge("  # a comment")))
    with pytest.raises(RunConfigError, match=r"judging\.__type__: 'jaxsi_config_judge\.Judge#"):
        check_config(tmp_path, stored, Config(judging=judge(" + 1")))
    stored["judging"]["__type__"] = "jaxsi_config_judge.Judge"  # of a version that stored no hash
    check_config(tmp_path, stored, Config(judging=judge("")))


def described(value: list | None = None, *, scale: float = 2.0) -> str:
    """Syntax that versions of Python keep in trees of their own: f-strings, empty lists, type comments."""
    return f"{scale:>{4}} {value!r} {'nested'}" + "".join(x for x in "ab" if x)


def test_source_hash_does_not_depend_on_the_version_of_python() -> None:
    assert config_snapshot.source_hash(described) == "a1d9e06f22324a78"


def test_run_stored_without_a_hash_resumes(tmp_path: Path) -> None:
    stored = describe_config(Config(judging=written(tmp_path)))
    stored["judging"] = stored["judging"].partition("#")[0]
    check_config(tmp_path, stored, Config(judging=written(tmp_path)))


def test_partial_is_stored_with_its_arguments(tmp_path: Path) -> None:
    double = written(tmp_path, value="functools.partial(judge, scale=2.0)")
    stored = describe_config(Config(judging=double))
    assert stored["judging"]["__partial__"].startswith("jaxsi_config_mine.judge#")
    assert (stored["judging"]["args"], stored["judging"]["kwargs"]) == ([], {"scale": 2.0})
    check_config(tmp_path, stored, Config(judging=double))
    triple = functools.partial(double.func, scale=3.0)
    with pytest.raises(RunConfigError, match=r"judging.kwargs.scale: 2.0 -> 3.0"):
        check_config(tmp_path, stored, Config(judging=triple))


def test_function_of_the_package_needs_an_id() -> None:
    with pytest.raises(RunConfigError, match=r"jaxsi\.runs\.config_snapshot\.check_config, which has no stored id"):
        describe_config(Config(judging=check_config))  # type: ignore[arg-type]


# ---- fields that are newer than the run ------------------------------------------------------------------------------


def dpo_config(**changes: Any) -> DPOConfig:
    return DPOConfig(train=TrainConfig(optim=OptimConfig(learning_rate=1e-3), batch_size=8), **changes)


def test_field_newer_than_the_run_counts_as_its_default() -> None:
    stored = describe_config(dpo_config())
    del stored["reference"], stored["train"]["remat"], stored["train"]["optim"]["decay"]
    check_config(Path("run"), stored, dpo_config())
    with pytest.raises(RunConfigError, match=r"reference: 'previous' -> 'first'"):
        check_config(Path("run"), stored, dpo_config(reference="first"))


def test_loss_that_has_become_a_class_is_the_function_of_then() -> None:
    stored = describe_config(dpo_config(loss=losses.simpo())) | {"loss": "jaxsi.losses.simpo"}
    check_config(Path("run"), stored, dpo_config(loss=losses.simpo()))
    with pytest.raises(RunConfigError, match=r"loss.gamma: 1.0 -> 0.5"):
        check_config(Path("run"), stored, dpo_config(loss=losses.simpo(gamma=0.5)))
    with pytest.raises(ValueError, match=r"give simpo\(\), with its settings"):
        dpo_config(loss=losses.simpo)


def test_ids_stay_with_what_they_were_given_to() -> None:
    @stored_as("test.nothing")
    class Nothing:
        pass

    try:
        assert describe_config(Nothing) == "test.nothing"
    finally:
        del config_snapshot._IDS[Nothing]
