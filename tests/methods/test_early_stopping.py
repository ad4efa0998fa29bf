"""Early stopping between iterations: the standing of each, what the summary says, the result, and resuming."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.methods import cream, grpo, lifecycle, online_dpo, self_rewarding, spin, temporal
from jaxsi.methods.lifecycle import Standing, compared, is_better_by, keep
from jaxsi.methods.start import carry_out
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import Prompt, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.early_stop import EarlyStop, WinRate, does_not_win
from jaxsi.stages.judge import JudgeConfig, judge_by
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import DPOConfig, TrainConfig

WIN, LOSS = WinRate(0.8, 0.7, 0.9, 50), WinRate(0.2, 0.1, 0.3, 50)
TIES, DOUBT = WinRate(0.5, 0.5, 0.5, 50), WinRate(0.45, 0.3, 0.6, 50)
STOP = EarlyStop(prompts=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


def settings(stop: EarlyStop | None) -> Any:
    return SimpleNamespace(early_stop=stop, sampling=SamplingConfig(), judge=JudgeConfig())


class Planned:
    """Win rates in the place of comparisons, and who was compared: fingerprints of (judge, now, before)."""

    def __init__(self, *rates: WinRate | None):
        self.rates, self.seen = list(rates), []

    def __call__(self, stop: EarlyStop, judge: LM, now: LM, before: LM, *_: object) -> WinRate | None:
        self.seen.append((judge.fingerprint, now.fingerprint, before.fingerprint))
        return self.rates.pop(0)


def model(t: int) -> LM:
    return tiny.make_lm(seed=t)


def iterated(run: Run, stop: EarlyStop | None, first: int = 0, last: int = 5) -> list[Standing]:
    """The loop of a method, whose M_t is ``model(t)``."""
    best, standings = first, []
    for t in range(first + 1, last + 1):
        keep(model(t), run.at(f"iter_{t}"))
        standings.append(compared(settings(stop), run, t, model(t), model(t - 1), best))
        best = standings[-1].best
        if standings[-1].lost:
            break
    return standings


def run_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *rates: WinRate | None, stop: EarlyStop | None = STOP
) -> tuple[list[Standing], Planned, dict[str, Any]]:
    planned = Planned(*rates)
    monkeypatch.setattr(lifecycle, "win_rate", planned)
    with Run.open(folder, Config()) as run:
        keep(model(0), run.at("iter_0"))
        return iterated(run, stop, last=len(rates)), planned, run.summary


def told(over: int, rate: WinRate) -> dict[str, Any]:
    return {"over": over} | rate._asdict()


def test_best_iteration_is_the_one_that_the_next_is_compared_with(tmp_path, monkeypatch):
    standings, planned, summary = run_with(tmp_path, monkeypatch, WIN, DOUBT, TIES, LOSS)
    assert [(s.best, s.lost) for s in standings] == [(1, False), (1, False), (3, False), (3, True)]
    names = [model(t).fingerprint for t in range(5)]
    assert planned.seen == [(names[t - 1], names[t], names[over]) for t, over in ((1, 0), (2, 1), (3, 1), (4, 3))]
    assert [s.win_rate for s in standings] == [told(0, WIN), told(1, DOUBT), told(1, TIES), told(3, LOSS)]
    assert (summary["best"], summary["stopped_early"]) == (3, True)


def test_run_ends_by_the_rule_alone(tmp_path, monkeypatch):
    standings, *_ = run_with(tmp_path / "a", monkeypatch, TIES, DOUBT)
    assert [s.lost for s in standings] == [False, False]
    paper = dataclasses.replace(STOP, rule=does_not_win)
    standings, _, summary = run_with(tmp_path / "b", monkeypatch, TIES, WIN, stop=paper)
    assert [(s.best, s.lost) for s in standings] == [(1, True)], "ties end the run, and lose nothing"
    assert (summary["best"], summary["stopped_early"]) == (1, True)


def test_iteration_without_a_verdict_is_the_best_and_the_run_goes_on(tmp_path, monkeypatch):
    standings, _, summary = run_with(tmp_path, monkeypatch, WIN, None)
    assert standings[-1] == Standing(2, False, {"over": 1})
    assert (summary["best"], summary["stopped_early"]) == (2, False), "not the one that was best before"


@pytest.mark.parametrize("stop", [None, dataclasses.replace(STOP, iterations=False)])
def test_nothing_is_compared_unless_asked_for(tmp_path, monkeypatch, stop):
    standings, planned, summary = run_with(tmp_path, monkeypatch, LOSS, LOSS, stop=stop)
    assert standings == [Standing(1, False, None), Standing(2, False, None)] and not planned.seen
    assert "best" not in summary and not (tmp_path / "iter_1" / "win_rate.json").exists()


def test_resumed_run_decides_from_what_is_stored(tmp_path, monkeypatch):
    first, _, summary = run_with(tmp_path, monkeypatch, WIN, DOUBT, LOSS)
    monkeypatch.setattr(lifecycle, "win_rate", None)  # nothing is compared again
    with Run.open(tmp_path, Config()) as run:
        assert iterated(run, STOP) == first and run.summary == summary
        (tmp_path / "iter_3" / "win_rate.json").unlink()
        again = Planned(LOSS)
        monkeypatch.setattr(lifecycle, "win_rate", again)
        assert iterated(run, STOP) == first
    assert again.seen == [tuple(model(t).fingerprint for t in (2, 3, 1))]


def test_checkpoints_are_compared_by_the_judge_of_the_iteration(tmp_path):
    def shorter(prompt: str, response: str) -> float:
        return -len(response)

    stop = EarlyStop(prompts=list, judging=judge_by(shorter))
    with Run.open(tmp_path, Config()) as run:
        it = run.at("iter_2")
        assert is_better_by(settings(None), model(1), it) is None
        assert is_better_by(settings(dataclasses.replace(stop, checkpoints=False)), model(1), it) is None
        better: Any = is_better_by(settings(stop), model(1), it)
        assert dataclasses.replace(better.args[0], prompts=list) == stop and better.args[0].prompts() == []
        assert better.args[1].fingerprint == model(1).fingerprint
        assert better.args[4] == it.key("early_stop") != it.key("early_stop", "iterations")


# ------------------------------------------------------------------------------- whole methods, with a stub as training

SAMPLING = SamplingConfig(num_samples=2, temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=8, dtype="float32")
TASKS = ("cat red", "dog", "axe pie saw", "blue owl", "sun tree", "loop", "red owl", "pie axe")
RL = RLConfig(optim=OptimConfig(learning_rate=1e-3), steps=1, prompts_per_step=8, group_size=2, batch_size=16)
FIRST = {grpo: 0, online_dpo: 0, spin: 0, self_rewarding: 1, cream: 1, temporal: 1}


def tasks() -> list[Prompt]:
    return [Prompt.of(task, task) for task in TASKS]


def demonstrations() -> list[SFTExample]:
    return [SFTExample(id=task, messages=({"role": "user", "content": task},), response="sun") for task in TASKS]


def length(prompt: str, response: str) -> float:
    return len(response)


def config_of(module: Any, model: Path, stop: EarlyStop | None) -> Any:
    common = {"model": str(model), "sampling": SAMPLING, "early_stop": stop, "mesh": MeshConfig(data=1, fsdp=8)}
    if module is spin:
        opponents = dataclasses.replace(SAMPLING, num_samples=1)
        dpo = DPOConfig(train=TrainConfig(batch_size=8, max_length=128))
        return spin.Config(**common | {"sampling": opponents}, demonstrations=demonstrations, dpo=dpo, iterations=4)
    if FIRST[module] == 0:
        return module.Config(**common, prompts=tasks, rl=RL, iterations=4)
    judging = {} if module is cream else {"judging": judge_by(length)}
    return module.Config(**common, prompts=TASKS, iterations=5, **judging)


@pytest.fixture
def trains(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Puts a stub in the place of a method's training: it makes ``model(t)`` in iter_t. Returns the list of folders
    that it was called for."""

    def stub(module: Any) -> list[str]:
        called: list[str] = []

        def training(lm: LM, *args: Any, **_: Any) -> LM:
            scope = next(part for part in args if isinstance(part, Scope))
            called.append(scope.name)
            kind, t = scope.name.split("_")
            return keep(tiny.make_lm("1x8x1", seed=int(t) + 20 * (kind == "future")), scope)

        if module is spin:  # the tiny model's responses have no end
            monkeypatch.setattr(spin, "against_demonstrations", lambda *_: [])
        online = module in (grpo, online_dpo)
        home, name = (module.learner, module.__name__.split(".")[-1]) if online else (module, "dpo")
        monkeypatch.setattr(home, name, training)
        return called

    return stub


@pytest.mark.parametrize("module", FIRST, ids=lambda module: module.__name__.split(".")[-1])
def test_method_ends_by_the_rule_and_returns_its_best_model(tmp_path, monkeypatch, trains, module):
    lmlib.export(tiny.make_lm(seed=9), tmp_path / "model", dtype="float32")
    first, called, planned = FIRST[module], trains(module), Planned(WIN, LOSS)
    monkeypatch.setattr(lifecycle, "win_rate", planned)
    cfg = config_of(module, tmp_path / "model", STOP)
    with Run.open(tmp_path / "run", Config()) as run:
        result, summary = carry_out(cfg, run), run.summary
    assert [name for name in called if name.startswith("iter")] == [f"iter_{first + 1}", f"iter_{first + 2}"]
    names = [tiny.make_lm(seed=9).fingerprint, *(model(first + k).fingerprint for k in (1, 2))]
    assert result.fingerprint == lmlib.load(tmp_path / "run").fingerprint == names[1]
    assert planned.seen == [(names[0], names[1], names[0]), (names[1], names[2], names[1])]
    assert (summary["best"], summary["stopped_early"]) == (first + 1, True)
    lines = summary["iterations"]
    assert [line["iteration"] for line in lines] == [first, first + 1, first + 2]
    assert [line.get("win_rate") for line in lines] == [None, told(first, WIN), told(first + 1, LOSS)]
    monkeypatch.setattr(lifecycle, "win_rate", None)  # a second look at a finished run compares nothing
    with Run.open(tmp_path / "run", Config()) as run:
        assert carry_out(cfg, run).fingerprint == result.fingerprint


def test_result_without_early_stopping_is_the_last_model(tmp_path, monkeypatch, trains):
    lmlib.export(tiny.make_lm(seed=9), tmp_path / "model", dtype="float32")
    called, planned = trains(grpo), Planned()
    monkeypatch.setattr(lifecycle, "win_rate", planned)
    with Run.open(tmp_path / "run", Config()) as run:
        result = carry_out(config_of(grpo, tmp_path / "model", None), run)
        assert "best" not in run.summary
    assert called == ["iter_1", "iter_2", "iter_3", "iter_4"] and result.fingerprint == model(4).fingerprint
