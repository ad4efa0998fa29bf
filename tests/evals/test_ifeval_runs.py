"""IFEval as the evaluation of a run's iterations. A stand-in takes the place of lm-eval's checkers, which need not be
installed: an instruction "names:word" asks for a word, and its loose rule takes capitals, too."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_runs import lines_of_models

import tiny
from jaxsi.cli.tables import iterations_table
from jaxsi.evals import ifeval
from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.held_out import Evaluations, HeldOutWinRate, everyday_prompts, refined_response
from jaxsi.evals.ifeval import IFEval
from jaxsi.methods import preflight
from jaxsi.report.figures import QUALITY, iteration_panels
from jaxsi.report.model_card import _evaluation
from jaxsi.report.page import headline
from jaxsi.report.run_files import read_run
from jaxsi.report.samples import samples_of
from jaxsi.report.trackers import events_of
from jaxsi.runs.metrics import mean_ci, ratio_ci, share_ci
from jaxsi.runs.records import Prompt, RecordError, Response
from jaxsi.runs.run import Run
from jaxsi.runs.status import sentence, so_far
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import CritiqueConfig
from jaxsi.stages.judge import judge_by
from jaxsi.stages.prompts.critique import load_critique_template

SAMPLING = SamplingConfig(num_samples=4, temperature=1.0, top_p=0.9, max_new_tokens=4, batch_size=2, dtype="float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


def _follow(example: Any, response: str) -> Any:
    return SimpleNamespace(follow_instruction_list=[kwargs["word"] in response for kwargs in example.kwargs])


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    package = SimpleNamespace(
        InputExample=SimpleNamespace,
        instructions_registry=SimpleNamespace(INSTRUCTION_DICT={"names:word": None, **dict.fromkeys(NEED)}),
        test_instruction_following_strict=_follow,
        test_instruction_following_loose=lambda example, response: _follow(example, response.lower()),
    )
    monkeypatch.setattr(ifeval, "_package", lambda: package)
    monkeypatch.setattr(ifeval, "has_nltk_data", lambda: False)


NEED = ifeval.NEED_NLTK_DATA
WORDS = (("cat",), ("dog", "owl"), ("axe",), ("pie", "saw", "red"))


def data_in(folder, *words: tuple[str, ...], kind: str = "names:word") -> str:
    rows = [
        {
            "key": 1000 + i, "prompt": f"Reverse: {' '.join(asked)} blue", "instruction_id_list": [kind] * len(asked),
            "kwargs": [{"word": word} for word in asked],
        }
        for i, asked in enumerate(words)
    ]  # fmt: skip
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Written:
    """Models that write ``texts[t]``; ``asked`` is what they were asked, (t, ids) of each part. Before the part
    ``dies`` the process dies."""

    def __init__(self, *texts: list[str], dies: int | None = None):
        self.texts, self.dies, self.asked = texts, dies, list[tuple[int, list[str]]]()

    def __call__(self, prompts: Any, lm: Any, config: Any, sampling: SamplingConfig, *_: object) -> list[Response]:
        assert (sampling.num_samples, sampling.temperature) == (1, 0.0), "one greedy response"
        if self.dies == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append((lm.number, [prompt.id for prompt in prompts]))
        places = [int(prompt.id.removeprefix("ifeval-")) - 1000 for prompt in prompts]
        return [
            Response.of(f"{prompt.id}#0", prompt.id, 0, self.texts[lm.number][place])
            for prompt, place in zip(prompts, places, strict=True)
        ]


def evaluated(run: Run, evaluation: Any, scopes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The lines of models 0, 1, ... in ``scopes``, as a method reports them."""
    monkeypatch.setattr(ifeval, "with_room", lambda lm, prompts, longest: prompts)
    return lines_of_models(run, evaluation, scopes, SAMPLING)


TEXTS = (
    ["no", "<think>owl dog</think>\n\ndog", "AXE", "pie saw red"],
    ["cat", "dog and owl", "AXE", "pie saw"],
    ["cat", "dog and owl", "axe", "saw"],
)


@pytest.mark.parametrize("scopes", [("iter_1", "iter_2", "iter_3"), ("base", "iter_0", "iter_1")])
def test_figures_and_gains_over_the_first_and_the_previous_model(tmp_path, monkeypatch, scopes):
    respond = Written(*TEXTS)
    evaluation = IFEval(data_in(tmp_path, *WORDS), respond=respond)
    with Run.open(tmp_path / "run", Config()) as run:
        lines = [line["evals"]["ifeval"] for line in evaluated(run, evaluation, scopes, monkeypatch)]
    strict = [[0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 0]]  # whole prompts
    parts = [[0, 1, 0, 3], [1, 2, 0, 2], [1, 2, 1, 1]]  # of 1, 2, 1, 3 instructions
    for line, whole, some in zip(lines, strict, parts, strict=True):
        mean, *ends = mean_ci(whole)
        assert line["prompt_strict"] == {"mean": mean, "ci95": ends}
        mean, *ends = ratio_ci(some, [1, 2, 1, 3])
        assert line["instruction_strict"] == {"mean": mean, "ci95": ends}
        assert (line["prompts"], line["left_out"]) == (4, 0)
    assert [line["prompt_loose"]["mean"] for line in lines] == [0.5, 0.75, 0.75]
    assert [line["instruction_loose"]["mean"] for line in lines] == pytest.approx([5 / 7, 6 / 7, 5 / 7])
    assert not {"over_first", "over_previous"} & lines[0].keys()
    names = [scope.removeprefix("iter_") for scope in scopes]
    for name, t, before in (("over_first", 1, 0), ("over_previous", 2, 1), ("over_first", 2, 0)):
        gain = lines[t][name]
        assert (gain["iteration"], gain["prompts"]) == (names[before], 4)
        gains = [a - b for a, b in zip(strict[t], strict[before], strict=True)]
        _, low, high = share_ci((np.asarray(gains) + 1) / 2)
        expected = pytest.approx([np.mean(gains), 2 * low - 1, 2 * high - 1])
        assert [gain["prompt_strict"]["mean"], *gain["prompt_strict"]["ci95"]] == expected
        assert -1 <= gain["prompt_strict"]["ci95"][0] < gain["prompt_strict"]["ci95"][1] <= 1
        moved = sum(parts[t]) - sum(parts[before])
        assert gain["instruction_strict"]["mean"] == pytest.approx(moved / 7)
    assert lines[1]["over_first"] == lines[1]["over_previous"]
    assert [t for t, _ in respond.asked] == [0, 0, 1, 1, 2, 2], "each model answers once, in parts of a batch"


def test_models_that_follow_the_same_are_not_proved_to_be_equal(tmp_path, monkeypatch):
    evaluation = IFEval(data_in(tmp_path, *WORDS), respond=Written(TEXTS[1], TEXTS[1]))
    with Run.open(tmp_path / "run", Config()) as run:
        gain = evaluated(run, evaluation, ("iter_1", "iter_2"), monkeypatch)[1]["evals"]["ifeval"]["over_first"]
    assert gain["prompt_strict"]["mean"] == 0 and gain["instruction_strict"] == {"mean": 0, "ci95": [None, None]}
    low, high = gain["prompt_strict"]["ci95"]
    assert low < -0.1 and high == pytest.approx(-low)


def test_killed_evaluation_goes_on_and_asks_nothing_twice(tmp_path, monkeypatch):
    data = data_in(tmp_path, *WORDS, ("fox",))
    texts = [[*row, "fox"] for row in TEXTS]
    whole, scopes = IFEval(data, respond=Written(*texts)), ("iter_1", "iter_2")
    with Run.open(tmp_path / "whole", Config()) as run:
        expected = evaluated(run, whole, scopes, monkeypatch)
    killed = Written(*texts, dies=5)
    with Run.open(tmp_path / "run", Config()) as run, pytest.raises(KeyboardInterrupt):
        evaluated(run, IFEval(data, respond=killed), scopes, monkeypatch)
    resumed = Written(*texts)
    with Run.open(tmp_path / "run", Config()) as run:
        lines = evaluated(run, IFEval(data, respond=resumed), scopes, monkeypatch)
    assert [line["evals"] for line in lines] == [line["evals"] for line in expected]
    assert resumed.asked == [(1, ["ifeval-1004"])], "what was on disk is neither sampled again nor checked"
    assert killed.asked + resumed.asked == whole.respond.asked  # type: ignore[attr-defined]


def test_most_and_prompts_without_data_of_nltk(tmp_path, monkeypatch):
    data = data_in(tmp_path, ("cat",), ("dog",), kind=min(NEED))
    with pytest.raises(EvaluationError, match="in a config without_nltk_data=True"):
        IFEval(data).check_installed()
    with (tmp_path / "data.jsonl").open("a") as file:
        row = {"key": 1002, "prompt": "x", "instruction_id_list": ["names:word"], "kwargs": [{"word": "axe"}]}
        file.write(json.dumps(row) + "\n" + json.dumps(row | {"key": 1003}) + "\n")
    evaluation = IFEval(data, most=3, respond=Written(["", "", "an axe", ""]), without_nltk_data=True)
    evaluation.check_installed()
    with Run.open(tmp_path / "run", Config()) as run:
        [line] = evaluated(run, evaluation, ("iter_1",), monkeypatch)
    found = line["evals"]["ifeval"]
    assert (found["prompts"], found["left_out"], found["prompt_strict"]["mean"]) == (1, 2, 1.0)
    with pytest.raises(ValueError, match="most is 0"):
        IFEval(data, most=0)


def test_run_without_what_it_needs_is_refused_before_any_work(tmp_path):
    missing = IFEval(str(tmp_path / "none.jsonl"))
    parts = Evaluations((HeldOutWinRate(), missing))
    assert isinstance(missing, preflight.NeedsInstalled) and not isinstance(parts, preflight.NeedsInstalled)
    lm = tiny.make_lm()
    from jaxsi import lm as lmlib
    from jaxsi.model.mesh import MeshConfig

    lmlib.export(lm, tmp_path / "model", dtype="float32")

    @dataclasses.dataclass(frozen=True)
    class Method:
        model: str
        evaluate: Any
        mesh: MeshConfig = MeshConfig()

    with pytest.raises(RecordError, match=r"none\.jsonl: no such file"):
        preflight.check(Method(str(tmp_path / "model"), parts), tmp_path)


def test_beside_win_rates_in_the_table_the_report_the_trackers_and_the_card(tmp_path, monkeypatch):
    from jaxsi.evals import held_out

    monkeypatch.setattr(held_out, "with_room", lambda lm, prompts, longest: prompts)
    respond = Written(*TEXTS)

    def everyday(prompts: list[Prompt], lm: Any, *_: object) -> list[Response]:
        return [Response.of(f"{p.id}#0", p.id, 0, "x" * lm.number) for p in prompts]

    longer = judge_by(lambda prompt, response: float(len(response)))
    evaluation = Evaluations(
        (HeldOutWinRate(judging=longer, respond=everyday, most=3), IFEval(data_in(tmp_path, *WORDS), respond=respond))
    )
    with Run.open(tmp_path / "run", Config()) as run:
        first, second = evaluated(run, evaluation, ("iter_1", "iter_2"), monkeypatch)
        summary = run.summary
    assert second["evals"].keys() == {"held-out", "ifeval"}
    table = iterations_table(summary)
    assert "IFEval" in table and "0.50 (" in table and "wins over first" in table
    assert "IFEval 0.50 (" in sentence(second) and "IFEval 0.25 (" in sentence(first)
    alone = [{"iteration": line["iteration"], "evals": {"ifeval": line["evals"]["ifeval"]}} for line in (first, second)]
    assert so_far({"iterations": alone}) == "IFEval 0.25 → 0.50"

    files = read_run(tmp_path / "run")
    panels, once = iteration_panels([files], QUALITY)
    assert "ifeval, prompt strict" in [panel.title for panel in panels]
    assert "ifeval, over previous, prompt strict" in [row[0] for row in once.rows]
    assert "wins over the first one on 100 %" in headline(files)
    for line in files.summary["iterations"]:
        del line["evals"]["held-out"]
    shown = headline(dataclasses.replace(files, scopes={}))
    assert shown.startswith("The newest model follows all instructions of 50 % (")
    sent = {(event.name, event.step): event.value for event in events_of(read_run(tmp_path / "run"))}  # type: ignore[union-attr]
    assert sent["iteration/evals.ifeval.prompt_strict", 2] == 0.5
    assert ("iteration/evals.ifeval.prompt_strict.low", 2) in sent
    columns, rows, _ = _evaluation(read_run(tmp_path / "run"))
    assert rows[1][columns.index("ifeval.prompt strict")].startswith("0.5 (")

    samples, _ = samples_of([read_run(tmp_path / "run")], limit=100)
    [sample] = [one for one in samples if one.id == "ifeval-1001"]
    assert (sample.group, sample.prompt) == ("evaluation", "Reverse: dog owl blue")
    assert [entry.text for entry in sample.entries] == [TEXTS[0][1], TEXTS[1][1]]
    assert [entry.score for entry in sample.entries] == [0.0, 1.0]
    assert ["eval_ifeval_judgments, score 0", "names:word, strict"] in sample.entries[0].notes
    assert everyday_prompts()[0].id in {one.id for one in samples}


def test_a_model_responds(tmp_path):
    cfg = SimpleNamespace(sampling=SAMPLING, model="given")
    evaluation = IFEval(data_in(tmp_path, *WORDS))
    with Run.open(tmp_path / "run", Config()) as run:
        run.update_summary({"iterations": []})
        lm = tiny.make_lm()
        figures = evaluation(lm, cfg, run.at("iter_1"))
        longest = lm.config.max_positions - 6
        with pytest.raises(EvaluationError, match="leave no room for max_new_tokens"):
            IFEval(evaluation.data, sampling=dataclasses.replace(SAMPLING, max_new_tokens=longest))(
                lm, cfg, run.at("iter_2")
            )
    rows = (tmp_path / "run" / "iter_1" / "eval_ifeval_responses.jsonl").read_text().splitlines()
    assert {json.loads(row)["fingerprint"] for row in rows} == {lm.fingerprint}
    assert figures["evals"]["ifeval"]["prompts"] == len(rows) == 4
    assert figures["mean_length"] > 0 and 0 <= figures["cut_off"] <= 1


def test_an_srt_model_answers_with_its_refinement(tmp_path):
    cfg = SimpleNamespace(
        sampling=SAMPLING, template=load_critique_template(), critique=CritiqueConfig(max_new_tokens=4, batch_size=2),
        first_stage=SimpleNamespace(refinement_only=False),
    )  # fmt: skip
    evaluation = IFEval(data_in(tmp_path, *WORDS), 2, respond=refined_response)
    with Run.open(tmp_path / "run", Config()) as run:
        run.update_summary({"iterations": []})
        for t, refines in enumerate((False, True)):
            figures = evaluation(tiny.make_lm(), cfg, run.at(f"iter_{t}"), refines)
            run.update_summary({"iterations": [{"iteration": t}]})
        first, second = (run.at(f"iter_{t}").finished("eval_ifeval_responses", of=Response) for t in (0, 1))
    assert [response.prompt_id for response in first] == [response.prompt_id for response in second]
    assert figures["evals"]["ifeval"]["over_first"]["prompts"] == len(second) == 2
