"""Win rates of a run's models on held-out prompts: against whom, by whom, and what is kept."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_runs import lines_of_models

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli.tables import iterations_table, win_rates
from jaxsi.evals import held_out
from jaxsi.evals.held_out import Evaluations, HeldOutWinRate, everyday_prompts, first_response, refined_response
from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import CritiqueConfig
from jaxsi.stages.judge import judge_by
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import PairwiseRubric
from jaxsi.stages.prompts.critique import load_critique_template
from jaxsi.stages.verdicts import JudgeConfig

SAMPLING = SamplingConfig(num_samples=4, temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=8, dtype="float32")
TASKS = ("cat red", "dog", "axe pie saw", "blue owl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


def prompts() -> list[Prompt]:
    return [Prompt.of(task, task) for task in TASKS]


def length(prompt: str, response: str) -> float:
    return len(response)


def written(*texts: Sequence[str]) -> Any:
    """Models that write ``texts[t]``, and how often they were asked."""
    asked: list[int] = []

    def respond(prompts: Sequence[Prompt], lm: Any, *_: object) -> list[Response]:
        asked.append(lm)
        rows = zip(prompts, texts[lm], strict=True)
        return [Response.of(f"{p.id}#0", p.id, 0, text) for p, text in rows]

    respond.asked = asked  # type: ignore[attr-defined]
    return respond


def evaluated(run: Run, evaluation: Any, scopes: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The lines of models 0, 1, ... in ``scopes``, as a method reports them."""
    monkeypatch.setattr(held_out, "with_room", lambda lm, prompts, longest: prompts)
    return lines_of_models(run, evaluation, scopes, SAMPLING)


class Numbered:
    """Calls ``respond`` with the number of a model in its place."""

    def __init__(self, respond: Any):
        self.respond = respond

    def __call__(self, prompts: Any, lm: Any, *context: Any) -> Any:
        return self.respond(prompts, lm.number, *context)


TEXTS = (["one", "two", "three", "four"], ["longer", "two", "3", "four!"], ["longest", "two", "3", "five!"])


@pytest.mark.parametrize("scopes", [("iter_1", "iter_2", "iter_3"), ("base", "iter_0", "iter_1")])
def test_win_rates_are_over_the_first_and_the_previous_model(tmp_path, monkeypatch, scopes):
    respond = written(*TEXTS)
    evaluation = HeldOutWinRate(prompts=prompts, judging=judge_by(length), respond=Numbered(respond))
    with Run.open(tmp_path, Config()) as run:
        first, second, third = evaluated(run, evaluation, scopes, monkeypatch)
    assert first["evals"] == {"held-out": {}}
    rates = second["evals"]["held-out"]
    assert rates["over_first"] == rates["over_previous"], "compared once"
    assert (rates["over_first"]["mean"], rates["over_first"]["prompts"]) == ((1 + 0.5 + 0 + 1) / 4, 4)
    rates = third["evals"]["held-out"]
    assert (rates["over_first"]["mean"], rates["over_previous"]["mean"]) == (2.5 / 4, (1 + 0.5 + 0.5 + 0.5) / 4)
    assert rates["over_first"]["iteration"] == scopes[0].removeprefix("iter_")
    assert rates["over_previous"]["iteration"] == scopes[1].removeprefix("iter_")
    low, high = rates["over_previous"]["ci95"]
    assert low <= rates["over_previous"]["mean"] <= high
    assert respond.asked == [0, 1, 2], "each model answers once"
    table = iterations_table({"iterations": [first, second, third]})
    assert "wins over first" in table and "0.62 (" in table
    assert not (tmp_path / scopes[1] / "held_out_judgments_over_previous.jsonl").exists()


def test_resumed_run_judges_only_what_is_missing(tmp_path, monkeypatch):
    respond = written(*TEXTS)
    evaluation = HeldOutWinRate(prompts=prompts, judging=judge_by(length), respond=Numbered(respond))
    scopes = ("iter_1", "iter_2", "iter_3")
    with Run.open(tmp_path, Config()) as run:
        whole = evaluated(run, evaluation, scopes, monkeypatch)
        (tmp_path / "iter_2" / "evaluation.json").unlink()
        (tmp_path / "iter_2" / "held_out_judgments_over_first.jsonl").unlink()
        again = evaluated(run, evaluation, scopes, monkeypatch)
    assert [line["evals"] for line in again] == [line["evals"] for line in whole]
    assert respond.asked == [0, 1, 2], "responses that are on disk are not sampled again"


def test_prompts_without_a_verdict_do_not_count(tmp_path, monkeypatch):
    def silent(prompt: str, response: str) -> float | None:
        return None

    evaluation = HeldOutWinRate(prompts=prompts, judging=judge_by(silent), respond=Numbered(written(*TEXTS)))
    with Run.open(tmp_path, Config()) as run:
        _, second = evaluated(run, evaluation, ("iter_0", "iter_1"), monkeypatch)
    rate = second["evals"]["held-out"]["over_first"]
    assert rate == {"iteration": "0", "mean": None, "ci95": [None, None], "prompts": 0}
    assert win_rates(second)["wins over first"] is None


def test_default_judge_is_the_given_model_in_both_orders(tmp_path):
    lmlib.export(tiny.make_lm(seed=9), tmp_path / "model", dtype="float32")
    rubric = PairwiseRubric(name="pair", template="Q {prompt} A {response_a} B {response_b}\n")
    judge = JudgeConfig(num_samples=1, max_new_tokens=2, temperature=0.0, top_p=1.0, expected=True, batch_size=8)
    evaluation = HeldOutWinRate(prompts=prompts, rubric=rubric, judge=judge, most=3)
    cfg = SimpleNamespace(sampling=SAMPLING, model=str(tmp_path / "model"))
    given = lmlib.load(tmp_path / "model", dtype="float32")
    with Run.open(tmp_path / "run", Config()) as run:
        run.update_summary({"iterations": []})
        for t in (0, 1):
            figures = evaluation(tiny.make_lm(seed=t), cfg, run.at(f"iter_{t}"))
            run.update_summary({"iterations": [{"iteration": i} for i in range(t + 1)]})
        rows = (tmp_path / "run" / "iter_1" / "held_out_judgments_over_first.jsonl").read_text().splitlines()
    judgments = [json.loads(row) for row in rows]
    assert {row["fingerprint"] for row in judgments} == {given.fingerprint}, "not the model that is measured"
    assert len(judgments) == 6 and figures["evals"]["held-out"]["over_first"]["prompts"] <= 3
    scores = {row["id"]: row["score"] for row in judgments}
    assert all(scores[f"{task}#now"] + scores[f"{task}#before"] == pytest.approx(1) for task in TASKS[:3]), (
        "both orders"
    )
    assert figures["mean_length"] > 0 and 0 <= figures["cut_off"] <= 1


def test_srt_answers_with_its_refinement_and_the_given_model_by_itself():
    lm = tiny.make_lm()
    cfg: Any = SimpleNamespace(
        template=load_critique_template(),
        critique=CritiqueConfig(max_new_tokens=4, batch_size=8),
        first_stage=SimpleNamespace(refinement_only=False),
    )
    plain = refined_response(prompts(), lm, cfg, SAMPLING, False)
    assert plain == first_response(prompts(), lm, cfg, SAMPLING)
    refined = refined_response(prompts(), lm, cfg, SAMPLING, True)
    assert [response.prompt_id for response in refined] == list(TASKS)


def test_evaluations_are_joined():
    def one(lm: LM, *_: object) -> dict[str, Any]:
        return {"evals": {"one": {"mean": 1}}, "mean_length": 3.0}

    def two(lm: LM, *_: object) -> dict[str, Any]:
        return {"evals": {"two": {"mean": 2}}, "mean_length": 4.0, "quality": {"mean": 5}}

    joined = Evaluations((one, two))(None, None, None)
    assert joined == {
        "evals": {"one": {"mean": 1}, "two": {"mean": 2}},
        "mean_length": 3.0,
        "quality": {"mean": 5},
    }
    with pytest.raises(ValueError, match="parts has HeldOutWinRate 2 times"):
        Evaluations((one, one, HeldOutWinRate(), HeldOutWinRate(most=3)))


def test_everyday_prompts_are_many_kinds_and_none_is_twice():
    found = everyday_prompts()
    assert len({prompt.id for prompt in found}) == len({str(prompt.messages) for prompt in found}) == len(found) == 66
    assert sum(len(prompt.messages) > 1 for prompt in found) == 4
    assert all(prompt.messages[-1]["role"] == "user" for prompt in found)
    with pytest.raises(ValueError, match="most is 0"):
        HeldOutWinRate(most=0)


def test_rubric_of_the_default_compares():
    assert isinstance(HeldOutWinRate().rubric, PairwiseRubric) and HeldOutWinRate(rubric=load_rubric()).most is None
    assert Path(held_out.__file__).with_name("everyday.jsonl").exists()
