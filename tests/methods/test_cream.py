"""CREAM's own part: which models give the rewards, against which reference, and what the pairs learn from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.methods import cream
from jaxsi.methods.cream import Config, Consistency, PairConfig
from jaxsi.methods.lifecycle import keep
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import PreferencePair
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import scored

SAMPLING = SamplingConfig(num_samples=3, temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=8, dtype="float32")
TASKS = ("cat red", "dog", "axe pie saw", "blue owl", "sun", "loop")
# The rewards of a prompt's three samples by each model: M_1, which is given, and M_2.
REWARDS = {9: (1.0, 2.0, 3.0), 2: (1.0, 3.0, 2.0)}
SEEDS = {tiny.make_lm(seed=seed).fingerprint: seed for seed in REWARDS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    seed: int = 0


def config(model: Path, rewarding: Any) -> Config:
    lmlib.export(tiny.make_lm(seed=9), model, dtype="float32")
    return Config(
        model=str(model),
        prompts=TASKS,
        sampling=SAMPLING,
        consistency=Consistency(rewarding=rewarding),
        pairs=PairConfig(cut_off=True),
        mesh=MeshConfig(data=1, fsdp=8),
        iterations=3,
    )


def test_rewards_are_those_of_two_iterations_against_the_first_model(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[tuple[int, int | None]] = []
    learnt: dict[str, list[PreferencePair]] = {}

    def rewarding(items: Any, lm: LM, reference: LM | None, *_: object) -> Any:
        seed = SEEDS[lm.fingerprint]
        asked.append((seed, None if reference is None else SEEDS[reference.fingerprint]))
        responses = [response for item in items for response in item.responses]
        return scored(responses, [REWARDS[seed][response.sample] for response in responses], lm)

    def training(lm: LM, pairs: Any, config: Any, it: Scope, **_: object) -> LM:
        learnt[it.name] = pairs
        return keep(tiny.make_lm("1x8x1", seed=int(it.name.split("_")[1])), it)

    monkeypatch.setattr(cream, "dpo", training)
    cfg = config(tmp_path / "model", rewarding)
    with Run.open(tmp_path / "run", Plain()) as run:
        cream.cream(cfg, run)
    # M_0 is M_1: it has no reference. Then M_2 has it, and M_1, which is the earlier model, has none.
    assert asked == [(9, None), (9, None), (2, 9), (9, None)]
    first, second = learnt["iter_2"], learnt["iter_3"]
    assert len(first) == len(second) == 3, "half of the prompts each"
    assert [pair.agreement for pair in first] == pytest.approx([1.0] * 3)
    assert [pair.agreement for pair in second] == pytest.approx([2 / 3] * 3), "tau is 1/3"
    assert {(pair.chosen.sample, pair.rejected.sample) for pair in first} == {(2, 0)}
    assert {(pair.chosen.sample, pair.rejected.sample) for pair in second} == {(1, 0)}, "by the newer model"
    counts = json.loads((tmp_path / "run" / "iter_3" / "pairs_counts.json").read_text())
    assert counts["consistency"] == pytest.approx(2 / 3) and counts["pairs"] == 3 and counts["judge"]["judged"] == 9


def unscored(items: Any, lm: LM, *_: object) -> Any:
    responses = [response for item in items for response in item.responses]
    return scored(responses, [None] * len(responses), lm)


def test_run_ends_if_hardly_a_response_has_a_reward(tmp_path: Path) -> None:
    """Such as with ``judge_rewards``, if the model writes no verdicts."""
    cfg = config(tmp_path / "model", unscored)
    with (
        Run.open(tmp_path / "run", Plain()) as run,
        pytest.raises(ValueError, match=r"0\.0% of the judgments have a score"),
    ):
        cream.cream(cfg, run)
