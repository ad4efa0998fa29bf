"""AlpacaEval 2.0: the official figures of eight models where their annotations are at hand, and made-up ones."""

import csv
import dataclasses
import functools
import gzip
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxsi.evals import alpaca_assets, alpaca_judging
from jaxsi.evals.alpaca_assets import AssetError, read_assets, read_outputs
from jaxsi.evals.alpaca_eval import Annotation, leaderboard, read_annotations, score, win_rate
from jaxsi.evals.alpaca_judging import is_switched, matched, read_template, requests_of
from jaxsi.evals.answer_cache import AnswerCache, EvaluationError
from jaxsi.evals.length_controlled import sigmoid
from jaxsi.stages.verdicts import JudgeConfig

DATA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="AlpacaEval's data (CC BY-NC 4.0) is not here")
COMPAT = "alpaca_eval-0.6.6"


def official() -> dict[str, dict[str, str]]:
    if not DATA.is_dir():
        return {}
    with (DATA / "official_lc_given8.csv").open(encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


ROWS = official()
models = pytest.mark.parametrize("model", list(ROWS) or ["absent"])


@functools.cache
def assets() -> Any:
    return read_assets(DATA)


@functools.cache
def annotations(model: str) -> list[Annotation]:
    return read_annotations(DATA / "annotations" / "given" / f"{model}.annotations.json.gz")


@functools.cache
def scored(model: str, strength: float | None, compat: str | None) -> Any:
    return score(annotations(model), assets(), strength=strength, compat=compat)


def given_c(model: str) -> float:
    return float(ROWS[model]["C_official"])


@needs_data
@models
def test_raw_figures_are_the_official_ones(model):
    """Gate (a)."""
    raw, row = win_rate([a.preference for a in annotations(model)]), ROWS[model]
    for name in ("n_wins", "n_wins_base", "n_draws", "n_total"):
        assert getattr(raw, name) == int(row[name])
    assert raw.win_rate == pytest.approx(float(row["official_win_rate"]), rel=1e-9)
    assert raw.standard_error == pytest.approx(float(row["official_standard_error"]), rel=1e-9)
    assert raw.discrete_win_rate == pytest.approx(float(row["discrete_win_rate"]), rel=1e-9)
    if len(annotations(model)) == 805:  # the official length is that of all outputs, annotated or not
        assert scored(model, given_c(model), COMPAT).avg_length == int(row["avg_length"])


@needs_data
@models
def test_published_coefficients_give_the_published_win_rate(model):
    """Gate (b), over the first rows where some are missing."""
    row = ROWS[model]
    logits = float(row["w_difficulty"]) * assets().difficulty_I + float(row["w_bias"])
    over = [100 * sigmoid(logits[:n]).mean() for n in (805, len(annotations(model)))]
    assert min(abs(rate - float(row["official_lc_win_rate"])) for rate in over) < 1e-5


@needs_data
@models
def test_fit_with_the_official_c_gives_the_official_win_rate(model):
    """Gate (c); the coefficients, too."""
    result, row = scored(model, given_c(model), COMPAT), ROWS[model]
    assert result.controlled.win_rate == pytest.approx(float(row["official_lc_win_rate"]), abs=0.02)
    assert result.controlled.win_rate == pytest.approx(float(row["ours_lc_knownC"]), abs=1e-6)
    if row["official_lc_standard_error"]:
        assert result.controlled.standard_error == pytest.approx(float(row["official_lc_standard_error"]), abs=0.01)
    for name, column in (("length", "w_len"), ("difficulty", "w_difficulty"), ("model", "w_bias")):
        assert getattr(result.controlled, name) == pytest.approx(float(row[column]), abs=0.02)


@needs_data
def test_fit_with_its_own_cross_validation_comes_close():
    """Gate (d), on labels of the gamed rows that are reconstructed."""
    missed = [
        abs(scored(model, None, COMPAT).controlled.win_rate - float(row["official_lc_win_rate"]))
        for model, row in ROWS.items()
    ]
    assert max(missed) < 0.16 and np.mean(np.asarray(missed) < 0.10) >= 0.9
    for model, row in ROWS.items():
        assert scored(model, None, COMPAT).controlled.strength == pytest.approx(float(row["C_cv"]))


@needs_data
@models
def test_each_prediction_is_the_published_one(model):
    """Gate (e): a row's probability from the published coefficients, which the stored ones equal to ten digits."""
    row, result = ROWS[model], scored(model, given_c(model), COMPAT)
    published = sigmoid(float(row["w_difficulty"]) * assets().difficulty_I + float(row["w_bias"]))
    n = len(annotations(model))
    np.testing.assert_allclose(list(result.predictions.values()), published[:n], atol=0.0005)


@needs_data
def test_rows_are_aligned_by_instruction_unless_the_official_order_is_asked_for():
    """Gate (f): two rows of phi-2 are missing, which shifts the difficulty of most others in the official package."""
    aligned, shifted = scored("phi-2", given_c("phi-2"), None), scored("phi-2", given_c("phi-2"), COMPAT)
    assert aligned.controlled.win_rate == pytest.approx(3.89, abs=0.02)
    assert shifted.controlled.win_rate == pytest.approx(4.40, abs=0.02)
    assert any("672 rows are given the difficulty of another instruction" in text for text in shifted.warnings)
    assert any("2 of the 805 instructions have no row" in text for text in aligned.warnings)
    rows = annotations("claude-2")
    mixed = random.Random(0).sample(rows, len(rows))
    again = score(mixed, assets(), strength=given_c("claude-2"))
    assert again.controlled.win_rate == pytest.approx(
        scored("claude-2", given_c("claude-2"), None).controlled.win_rate, abs=1e-9
    )
    assert again.predictions == pytest.approx(scored("claude-2", given_c("claude-2"), None).predictions, abs=1e-9)


@needs_data
def test_all_is_float64_whatever_jax_computes_in():
    """Gate (i): tests run without jax_enable_x64."""
    fit = scored("claude-2", given_c("claude-2"), COMPAT).controlled
    assert fit.predictions_N.dtype == np.float64
    rounded = np.asarray(fit.predictions_N, np.float32).astype(np.float64)
    assert 0 < np.abs(fit.predictions_N - rounded).max() < 1e-7


@needs_data
def test_other_judges_and_baselines_are_named_in_warnings():
    given = scored("claude-2", given_c("claude-2"), None)
    assert [text for text in given.warnings if "calibrated" in text] == []
    other = read_annotations(DATA / "annotations" / "cot_annotator" / "tulu-2-dpo-70b.annotations.json.gz")
    result = score(other, assets())
    assert any("the judge is alpaca_eval_cot_gpt4_turbo_fn" in text for text in result.warnings)
    changed = [dataclasses_replace(row, output_1=row.output_1 + " ") for row in annotations("claude-2")[:400]]
    texts = score(changed, assets(), strength=1.0).warnings
    assert any("400 of its outputs are other texts" in text for text in texts)
    assert any("405 of the 805 instructions have no row" in text for text in texts)
    renamed = [dataclasses_replace(row, generator_1="davinci") for row in annotations("claude-2")]
    assert any("the baseline is davinci" in text for text in score(renamed, assets(), strength=1.0).warnings)


def dataclasses_replace(row: Annotation, **changes: Any) -> Annotation:
    return Annotation(**(row.__dict__ | changes))


@needs_data
def test_baseline_against_itself_is_50_and_other_instructions_have_no_controlled_rate():
    rows = [
        Annotation(
            instruction=o.instruction, output_1=o.output, output_2=o.output, preference=1.5,
            generator_1=o.generator, generator_2=o.generator, annotator="weighted_alpaca_eval_gpt4_turbo",
        )
        for o in assets().baseline
    ]  # fmt: skip
    result = score(rows, assets())
    assert (result.raw.win_rate, result.controlled.win_rate, result.controlled.standard_error) == (50.0, 50.0, 0.0)
    own = [*annotations("claude-2")[:10], dataclasses_replace(annotations("claude-2")[10], instruction="Mine?")]
    result = score(own, assets())
    assert result.controlled is None and result.figures()["length_controlled_winrate"] is None
    assert any("1 instructions are not among the official ones, the first is 'Mine?'" in t for t in result.warnings)
    more = [*annotations("claude-2"), dataclasses_replace(annotations("claude-2")[0], instruction="Mine?")]
    with pytest.raises(EvaluationError, match="806 rows, but only 805 instructions have a difficulty"):
        score(more, assets(), compat=COMPAT)


@needs_data
def test_the_coin_of_the_order_is_the_official_one():
    """In the official annotations the judge's log-probs of m and M show which output stood first."""
    rows = json.loads(gzip.decompress((DATA / "annotations/given/claude-2.annotations.json.gz").read_bytes()))
    seen = 0
    for row in rows:
        if not (row["raw_completion"] or {}).get("logprobs"):
            continue
        (first,) = row["raw_completion"]["logprobs"]["content"]
        shares = {top["token"]: math.exp(top["logprob"]) for top in first["top_logprobs"]}
        unswitched = 2 - shares.get("m", 0.0) / (shares.get("m", 0.0) + shares.get("M", 0.0))
        expected = 3 - unswitched if is_switched(row["instruction"]) else unswitched
        assert row["preference"] == pytest.approx(expected, abs=1e-6)
        seen += 1
    assert seen == 804


@needs_data
def test_the_official_template_is_recognized_and_filled_as_the_official_judge_does():
    path = alpaca_assets.official_template(DATA)
    template = read_template(path)
    assert template.is_official and not read_template().is_official
    system, user = template.render("Say {output_1}", "one", "two")
    assert system["role"] == "system" and system["content"].startswith("You are a highly efficient assistant")
    assert '"instruction": """Say {output_1}"""' in user["content"] and '"output": """two"""' in user["content"]
    assert "<|im_" not in system["content"] + user["content"]


# ------------------------------------------------------------------------------------------------------- made-up files


def folder_of_assets(folder: Path, n: int = 40) -> Path:
    """A small set in the official format, under names that say it is not the official one."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    baseline = [
        {"dataset": "d", "instruction": f"Task {i}", "output": "b" * int(rng.integers(20, 400)), "generator": "base"}
        for i in range(n)
    ]
    lines = ["model,index,std_delta_len,instruction_difficulty,not_gamed_baseline,preference"]
    difficulty = rng.normal(size=n)
    for name, longer in (("verbose", -1.0), ("concise", 1.0)):
        for i in range(n):
            t = float(rng.normal() + longer)
            label = float(sigmoid(np.asarray(-1.5 * math.tanh(t) + difficulty[i])))
            lines.append(f"{name},{i},{t!r},{float(difficulty[i])!r},False,{label!r}")
    (folder / "df_gamed_reconstructed.csv").write_text("\n".join(lines) + "\n")
    path = folder / "alpaca_eval_gpt4_baseline.json"
    path.write_text(json.dumps(baseline))
    return folder


@pytest.fixture
def own_assets(tmp_path, monkeypatch) -> Any:
    folder = folder_of_assets(tmp_path / "assets")
    content = (folder / "alpaca_eval_gpt4_baseline.json").read_bytes()
    monkeypatch.setitem(alpaca_assets.SHA256, "alpaca_eval_gpt4_baseline.json", hashlib.sha256(content).hexdigest())
    return read_assets(folder)


def test_files_with_another_hash_are_refused_under_the_official_name(tmp_path):
    folder = folder_of_assets(tmp_path / "assets")
    with pytest.raises(AssetError, match=r"is not the official alpaca_eval_gpt4_baseline\.json: its sha256 begins"):
        read_assets(folder)
    (folder / "alpaca_eval_gpt4_baseline.json").unlink()
    with pytest.raises(AssetError, match=r"has no alpaca_eval_gpt4_baseline\.json or .*tatsu-lab/alpaca_eval"):
        read_assets(folder)


def test_without_network_and_cache_the_error_names_the_file_and_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match=r"not in the local cache \(offline\); put it into a folder and give --assets"):
        read_assets(offline=True)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace("std_delta_len", "delta"), "has no column 'std_delta_len'"),
        (lambda text: text.replace("False,0.", "False,7.", 1), "a preference lies outside of 0 to 1"),
        (lambda text: text.replace("verbose,3,", "verbose,999,"), "does not count the instructions from 0|others|gap"),
        (
            lambda text: text.replace("verbose,3,", "verbose,3,x"),
            r":5: std_delta_len is 'x-?[0-9.]+'; it must be a num",
        ),
    ],
)
def test_damaged_rows_of_the_fit_are_named(own_assets, tmp_path, change, fault):
    path = tmp_path / "assets" / "df_gamed_reconstructed.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(AssetError, match=fault):
        read_assets(tmp_path / "assets")


def annotation(i: int, preference: float | None, assets: Any, **more: Any) -> dict[str, Any]:
    baseline = assets.baseline[i]
    return {
        "instruction": baseline.instruction, "output_1": baseline.output, "output_2": f"answer {i}" * 3,
        "preference": preference, "generator_1": "base", "generator_2": "mine", "annotator": "judge",
    } | more  # fmt: skip


def written(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_preferences_are_read_as_the_official_package_reads_them(tmp_path, own_assets):
    """0 is a tie; NaN, null and anything outside of 1 to 2 was not annotated, which is counted and said."""
    values: list[Any] = [1.0, 2, 0, 1.5, None, float("nan"), 2.5, -1, 1.75]
    rows = [annotation(i, value, own_assets) for i, value in enumerate(values)]
    read = read_annotations(written(tmp_path / "a.json", rows))
    assert [a.preference for a in read] == [1.0, 2.0, 1.5, 1.5, None, None, None, None, 1.75]
    result = score(read, own_assets, strength=1.0)
    y = np.asarray([0, 1, 0.5, 0.5, 0.75])
    assert result.raw.win_rate == pytest.approx(100 * y.mean())
    assert result.raw.standard_error == pytest.approx(100 * y.std(ddof=1) / math.sqrt(5))
    counts = (result.raw.n_wins, result.raw.n_wins_base, result.raw.n_draws, result.raw.n_total)
    assert counts == (2, 1, 2, 5) and result.raw.discrete_win_rate == 60 and result.not_annotated == 4
    assert "4 of 9 rows are not annotated; they count in no raw figure" in result.warnings
    assert len(result.predictions) == 9
    with pytest.raises(EvaluationError, match="none of the 2 rows has a preference"):
        win_rate([None, None])


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ({}, "not a JSON list of rows"),
        ([], "has no annotation"),
        ([3], "row 0 is 3, not an object"),
        ([{"instruction": "a", "output_1": "b"}], "row 0 has no text 'output_2'"),
        (
            [{"instruction": "a", "output_1": "b", "output_2": "c"}],
            "row 0 has no preference; this is a file of outputs",
        ),
        ([{"instruction": "a", "output_1": "b", "output_2": "c", "preference": "1"}], "the preference is '1'"),
        ([{"instruction": "a", "output_1": "b", "output_2": "c", "preference": True}], "the preference is True"),
        ([{"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1}] * 2, "'a' occurs twice"),
    ],
)
def test_files_that_are_no_annotations_are_refused_with_the_row(tmp_path, rows, fault):
    with pytest.raises(EvaluationError, match=fault):
        read_annotations(written(tmp_path / "a.json", rows))


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": ')
    with pytest.raises(EvaluationError, match="not a JSON file"):
        read_annotations(tmp_path / "a.json")
    with pytest.raises(EvaluationError, match="no such file"):
        read_annotations(tmp_path / "b.json")


def test_two_models_in_one_file_are_refused_whatever_name_is_given(own_assets, tmp_path):
    rows = [annotation(0, 1.0, own_assets), annotation(1, 1.0, own_assets, generator_2="other")]
    for name in (None, "mine"):
        with pytest.raises(EvaluationError, match="more than one model in generator_2: mine, other"):
            score(read_annotations(written(tmp_path / "a.json", rows)), own_assets, name=name)
    rows[1]["generator_2"] = None  # says nothing against the other row
    assert score(read_annotations(written(tmp_path / "a.json", rows)), own_assets, strength=1.0).model == "mine"


def test_a_model_is_its_baseline_by_the_generators_alone(own_assets, tmp_path):
    """Rows without generators are not those of the baseline against itself, nor is a model that is called like it."""
    rows = [annotation(i, 1.1, own_assets) for i in range(20)]
    expected = score(read_annotations(written(tmp_path / "a.json", rows)), own_assets, strength=1.0).controlled.win_rate
    bare = [{k: v for k, v in row.items() if not k.startswith("generator")} for row in rows]
    found = score(read_annotations(written(tmp_path / "b.json", bare)), own_assets, strength=1.0)
    assert (found.model, found.baseline) == ("unknown", "unknown")
    assert found.controlled.win_rate == expected < 40
    named = score(read_annotations(written(tmp_path / "a.json", rows)), own_assets, strength=1.0, name="base")
    assert (named.model, named.controlled.win_rate) == ("base", expected)
    same = [row | {"generator_2": "base"} for row in rows]
    found = score(read_annotations(written(tmp_path / "c.json", same)), own_assets, strength=1.0)
    assert found.controlled.win_rate == 50
    assert any("20 of the model's outputs are other texts; give the model a name" in text for text in found.warnings)


def test_a_row_without_the_key_is_one_that_was_not_annotated(own_assets, tmp_path):
    rows = [annotation(i, 1.5, own_assets) for i in range(4)]
    del rows[1]["preference"]
    found = read_annotations(written(tmp_path / "a.json", rows))
    assert [a.preference for a in found] == [1.5, None, 1.5, 1.5]
    assert score(found, own_assets, strength=1.0).not_annotated == 1


def test_json_lines_are_read_and_a_file_that_was_not_fetched_is_named(own_assets, tmp_path):
    rows = [annotation(i, 1.25, own_assets, output_2="a\u2028b") for i in range(3)]
    lines = tmp_path / "a.json"
    lines.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")
    assert read_annotations(lines) == read_annotations(written(tmp_path / "b.json", rows))
    lines.write_text(json.dumps(rows[0]) + "\n{\n")
    with pytest.raises(EvaluationError, match="not a JSON file"):
        read_annotations(lines)
    lines.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(EvaluationError, match="a Git LFS pointer, not the data"):
        read_annotations(lines)


@pytest.mark.parametrize("name", ["generator_1", "generator_2", "annotator"])
def test_names_are_texts(own_assets, tmp_path, name):
    rows = [annotation(0, 1.0, own_assets), annotation(1, 1.0, own_assets, **{name: ["x"]})]
    with pytest.raises(EvaluationError, match=rf"row 1: {name} is \['x'\]; it must be a text"):
        read_annotations(written(tmp_path / "a.json", rows))


@dataclasses.dataclass(frozen=True)
class Deciding:
    """A writer that always prefers the first output, and keeps what it is asked."""

    asked: list[Any] = dataclasses.field(default_factory=list, repr=False)

    def choice_logps(self, requests: Any, choices: Any, cfg: Any) -> dict[str, list[float]]:
        self.asked.extend(requests)
        return {request.id: [math.log(0.75), math.log(0.25)] for request in requests}


def test_equal_outputs_are_a_tie_that_nobody_is_asked_about(own_assets, tmp_path):
    texts = ["other", *(o.output for o in own_assets.baseline[1:3]), "other"]
    baseline = own_assets.baseline[:4]
    outputs = [
        alpaca_assets.Output(instruction=o.instruction, output=text, generator="mine")
        for o, text in zip(baseline, texts, strict=True)
    ]
    writer = Deciding()
    judge = alpaca_judging.WeightedJudge(
        cache=AnswerCache(tmp_path / "cache.jsonl"), writer=writer, template=read_template(),
        config=JudgeConfig(num_samples=1),
    )  # fmt: skip
    matches = matched(outputs, "o", baseline, "b")
    found = judge.preferences(matches)
    expected = {o.instruction: 1.75 if is_switched(o.instruction) else 1.25 for o in baseline}
    assert found.values == expected | {o.instruction: 1.5 for o in baseline[1:3]}
    assert len(writer.asked) == found.asked == 2


def test_leaderboard_row_has_the_official_columns_best_first(own_assets, tmp_path):
    scores = []
    for name, preference in (("worse", 1.2), ("better", 1.8)):
        rows = [annotation(i, preference, own_assets, generator_2=name) for i in range(12)]
        scores.append(score(read_annotations(written(tmp_path / "a.json", rows)), own_assets, strength=1.0))
    table = list(csv.DictReader(leaderboard(scores).splitlines()))
    assert [row[""] for row in table] == ["better", "worse"]
    assert list(table[0])[1:5] == ["win_rate", "standard_error", "n_wins", "n_wins_base"]
    assert float(table[0]["win_rate"]) == pytest.approx(80.0) and table[0]["n_total"] == "12"
    assert float(table[0]["length_controlled_winrate"]) == scores[1].controlled.win_rate


def test_outputs_are_matched_by_instruction_before_anything_is_judged(own_assets, tmp_path):
    rows = [{"instruction": o.instruction, "output": "x", "generator": "mine"} for o in own_assets.baseline]
    outputs = read_outputs(written(tmp_path / "o.json", rows[::-1]))
    matches = matched(outputs, "o.json", own_assets.baseline, "the baseline")
    assert [m.model.instruction for m in matches] == [o.instruction for o in own_assets.baseline]
    with pytest.raises(
        EvaluationError, match=r"o\.json and the baseline do not belong together: 39 and 40 prompts, of "
    ):
        matched(outputs[1:], "o.json", own_assets.baseline, "the baseline")
    with pytest.raises(EvaluationError, match=r"o\.json: 'Task 39' occurs twice"):
        matched([outputs[0], *outputs], "o.json", own_assets.baseline, "the baseline")
    strange = read_outputs(written(tmp_path / "s.json", [*rows[1:], rows[0] | {"instruction": "Task 0 "}]))
    with pytest.raises(EvaluationError, match=r"'Task 0 ' is in s\.json and not in the baseline"):
        matched(strange, "s.json", own_assets.baseline, "the baseline")


def test_outputs_of_two_models_are_refused_before_anything_is_judged(own_assets):
    outputs = [dataclasses.replace(o, generator=f"model {i % 2}") for i, o in enumerate(own_assets.baseline)]
    for given, baseline, name in ((outputs, own_assets.baseline, "o"), (own_assets.baseline, outputs, "b")):
        with pytest.raises(EvaluationError, match=f"{name} has outputs of more than one generator: model 0, model 1; "):
            matched(given, "o", baseline, "b")


def test_the_judge_sees_the_outputs_in_the_order_of_the_coin(own_assets):
    outputs = [alpaca_assets.Output(instruction=o.instruction, output=f"mine {i}", generator="mine")
               for i, o in enumerate(own_assets.baseline)]  # fmt: skip
    matches = matched(outputs, "o", own_assets.baseline, "b")
    for seed in (0, 1):
        for request, match in zip(requests_of(matches, read_template(), seed), matches, strict=True):
            text = request.messages[-1]["content"]
            mine_first = text.index(match.model.output) < text.index(match.baseline.output)
            assert mine_first == is_switched(match.model.instruction, seed)
    coins = [[is_switched(o.instruction, seed) for o in own_assets.baseline] for seed in (0, 1)]
    assert coins[0] != coins[1] and 5 < sum(coins[0]) < 35


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("plain {instruction}", "its turns stand between"),
        ("<|im_start|>user\n{instruction} {output_1}\n<|im_end|>", "has the slots instruction, output_1; it needs"),
        ("<|im_start|>assistant\n{instruction} {output_1} {output_2}\n<|im_end|>", "the last is the user's"),
    ],
)
def test_templates_in_another_format_are_refused(tmp_path, text, fault):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(EvaluationError, match=fault):
        read_template(tmp_path / "t.txt")
    with pytest.raises(EvaluationError, match="cannot be read"):
        alpaca_judging.read_template(tmp_path / "absent.txt")
