"""`jaxsi eval alpaca-eval` and `jaxsi eval compare` with a tiny model: what they write, how they go on, what they
refuse.

JAXSI_UPDATE_GOLDEN=1 python -m pytest tests/cli/test_eval_judged.py    writes the flags anew
"""

import csv
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import endpoint_server
import numpy as np
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import eval_answers, eval_judge
from jaxsi.cli.agreement import agreement
from jaxsi.cli.arena_hard import arena
from jaxsi.cli.eval_alpaca import alpaca
from jaxsi.cli.eval_compare import compare
from jaxsi.cli.ifeval import ifeval
from jaxsi.cli.lm_eval import harness
from jaxsi.cli.main import main
from jaxsi.cli.mt_bench import mtbench
from jaxsi.evals import alpaca_assets
from jaxsi.evals.alpaca_judging import is_switched
from jaxsi.runs.records import Prompt
from jaxsi.sampling.scoring import score_continuations
from jaxsi.stages.verdicts import LocalWriter
from jaxsi.text.chat import render_request, render_response

CHOICE_LOGPS = LocalWriter.choice_logps
GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATE = "<|im_start|>user\n{instruction}\nm: {output_1}\nM: {output_2}\n<|im_end|>\n"
TASKS = [f"Reverse: {a} {b}" for a in ("cat", "dog", "egg") for b in ("axe", "pie", "sun", "saw")]
pytestmark = pytest.mark.xdist_group("judged evaluations")  # they share a folder of responses


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch):
    """Eight devices give the same responses, but compile for longer."""
    for module in (eval_answers, eval_judge):
        monkeypatch.setattr(module, "mesh_for", lambda *_: tiny.mesh())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a judge, a set of instructions in the official format, and a short template."""
    folder = tmp_path_factory.mktemp("judged")
    lmlib.export(tiny.make_lm(), folder / "model", dtype="float32")
    lmlib.export(tiny.make_lm(seed=1), folder / "judge", dtype="float32")
    assets = folder / "assets"
    assets.mkdir()
    rows = [{"dataset": "d", "instruction": t, "output": "axe " * (i + 1), "generator": "base"}
            for i, t in enumerate(TASKS)]  # fmt: skip
    (assets / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    rng = np.random.default_rng(0)
    lines = ["index,std_delta_len,instruction_difficulty,preference"]
    lines += [f"{i},{rng.normal():.9f},{i / 10},{rng.random():.9f}" for _ in range(2) for i in range(len(TASKS))]
    (assets / "df_gamed_reconstructed.csv").write_text("\n".join(lines) + "\n")
    (folder / "template.txt").write_text(TEMPLATE)
    (folder / "judges.py").write_text("def longest(prompt, response):\n    return len(response)\n")
    return folder


@pytest.fixture(autouse=True)
def _own_instructions(world, monkeypatch):
    content = (world / "assets" / "alpaca_eval_gpt4_baseline.json").read_bytes()
    name = "alpaca_eval_gpt4_baseline.json"
    monkeypatch.setitem(alpaca_assets.SHA256, name, hashlib.sha256(content).hexdigest())


def called(capsys, *words) -> tuple[int, dict[str, Any], str]:
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else {}, err


SMALL = ("--dtype", "float32", "--max-new-tokens", 8, "--batch-size", 8, "--judge-batch", 4, "--c", 1)


def alpaca_words(world, out, *more) -> list[Any]:
    given = ["--assets", world / "assets", "--template", world / "template.txt", "-o", out]
    return ["eval", "alpaca-eval", *given, *SMALL, *more]


def counted(monkeypatch, stop_after: int | None = None) -> list[str]:
    """The texts that the local judge is asked about; after some parts the process is interrupted."""
    asked: list[str] = []
    parts = [0]

    def choice_logps(self, requests, choices, cfg):
        if parts[0] == stop_after:
            raise KeyboardInterrupt
        parts[0] += 1
        asked.extend(request.text for request in requests)
        return CHOICE_LOGPS(self, requests, choices, cfg)

    monkeypatch.setattr(LocalWriter, "choice_logps", choice_logps)
    return asked


@pytest.mark.slow
def test_a_model_is_judged_and_a_killed_command_judges_nothing_twice(world, tmp_path, capsys, monkeypatch):
    """Interrupted after two of three parts; the second command asks for the third alone; a third asks for nothing.
    The preferences are the probabilities of the judge, in the order of the coin."""
    out = tmp_path / "out"
    words = alpaca_words(world, out, world / "model", "--judge", world / "judge")
    asked = counted(monkeypatch, stop_after=2)
    assert called(capsys, *words)[0] == 130 and len(asked) == 8
    then = counted(monkeypatch)
    code, value, err = called(capsys, *words)
    assert code == 0, err
    assert len(then) == 4 and not set(then) & set(asked)
    more = counted(monkeypatch)
    assert called(capsys, *words)[1] | {"judged": 4, "reused": 8} == value and more == []
    assert (value["judged"], value["reused"], value["failed"]) == (4, 8, 0) and value["n_total"] == 12
    lines = [json.loads(line) for line in (out / "judge_answers.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 12 == len({line["id"] for line in lines})

    annotations = json.loads((out / "annotations.json").read_text())
    outputs = json.loads((out / "model_outputs.json").read_text())
    assert [row["instruction"] for row in outputs] == TASKS == [row["instruction"] for row in annotations]
    assert {row["generator"] for row in outputs} == {"model"} and outputs[0]["dataset"] == "d"
    assert any("the length-controlled fit is calibrated" in text for text in value["warnings"])
    judge = tiny.make_lm(seed=1)
    for row in annotations[:3]:
        sides = [row["output_1"], row["output_2"]]
        switched = is_switched(row["instruction"])
        first, second = sides[::-1] if switched else sides
        text = f"{row['instruction']}\nm: {first}\nM: {second}"
        head = render_request(judge.tokenizer, Prompt.of("x", text).messages)
        ends = [render_response(judge.tokenizer, choice)[:-1] for choice in "mM"]
        m, other = np.exp(score_continuations(judge, [head, head], ends).astype(np.float64))
        expected = 2 - m / (m + other)
        assert row["preference"] == pytest.approx(3 - expected if switched else expected, rel=1e-4)
    (row,) = csv.DictReader((out / "leaderboard.csv").read_text().splitlines())
    assert row[""] == "model" and float(row["win_rate"]) == value["win_rate"]
    assert float(row["length_controlled_winrate"]) == value["length_controlled_winrate"]
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 12
    again = called(capsys, "eval", "alpaca-eval", "--annotations", out / "annotations.json",
                   "--assets", world / "assets", "--c", 1)[1]  # fmt: skip
    assert {name: value[name] for name in again} == again

    stored = json.loads((out / "responses" / "config.json").read_text())
    assert "{%" in stored["settings"]["chat"] or "{{" in stored["settings"]["chat"]
    code, _, err = called(capsys, *words, "--seed", 1)
    assert code == 2 and "seed" in err and not (out / "annotations_1.json").exists()


@pytest.mark.slow
def test_dry_run_counts_what_is_missing_and_asks_nothing(world, tmp_path, capsys, monkeypatch):
    asked = counted(monkeypatch)
    out, judge = tmp_path / "out", ("--judge", world / "judge")
    rows = [{"instruction": t, "output": f"egg {i}", "generator": "mine"} for i, t in enumerate(TASKS)]
    (tmp_path / "o.json").write_text(json.dumps(rows))
    words = alpaca_words(world, out, "--outputs", tmp_path / "o.json", *judge, "--judge-seeds", 2)
    plan = called(capsys, *words, "--dry-run")[1]["judge"]
    both = sum(is_switched(t) == is_switched(t, 1) for t in TASKS)  # the same question by both seeds
    assert (plan["questions"], plan["cached"], asked) == (24, 0, []) and plan["completion_tokens"] == plan["calls"]
    assert plan["calls"] in (24, 24 - both) and plan["prompt_tokens"] > 20 * plan["calls"]
    value = called(capsys, *words)[1]
    assert len(asked) == len(set(asked)) == 24 - both  # an equal question has the same answer
    assert value["seeds"]["win_rate"]["low"] <= value["win_rate"] <= value["seeds"]["win_rate"]["high"]
    assert (out / "annotations_1.json").exists()
    plan = called(capsys, *words, "--dry-run")[1]["judge"]
    assert (plan["calls"], plan["cached"], plan["prompt_tokens"]) == (0, 24, 0)


def test_outputs_for_other_prompts_are_refused_before_anything_is_judged(world, tmp_path, capsys, monkeypatch):
    asked = counted(monkeypatch)
    rows = [{"instruction": t, "output": "egg", "generator": "mine"} for t in [*TASKS[1:], "Reverse: cat  axe"]]
    (tmp_path / "o.json").write_text(json.dumps(rows))
    words = alpaca_words(world, tmp_path / "out", "--outputs", tmp_path / "o.json", "--judge", world / "judge")
    code, _, err = called(capsys, *words)
    assert code == 2 and "do not belong together: 12 and 12 prompts, of which 11 are the same" in err and asked == []


def test_judges_without_a_text_and_wrong_words(world, tmp_path, capsys):
    rows = [{"instruction": t, "output": "egg" * (2 * (i % 2) + 1) * i, "generator": "mine"}
            for i, t in enumerate(TASKS)]  # fmt: skip
    (tmp_path / "o.json").write_text(json.dumps(rows))
    given = alpaca_words(world, tmp_path / "out", "--outputs", tmp_path / "o.json")
    value = called(capsys, *given, "--judge", f"function:{world / 'judges.py'}:longest")[1]
    expected = [(3 * (2 * (i % 2) + 1) * i > 4 * (i + 1)) for i in range(12)]
    assert value["n_wins"] == sum(expected) and value["n_wins"] + value["n_wins_base"] + value["n_draws"] == 12
    for words, fault in (
        (["eval", "alpaca-eval"], "nothing given; give one of MODEL, --outputs FILE and --annotations FILE"),
        (["eval", "alpaca-eval", "m", "--outputs", "o"], "model and outputs given"),
        (given, "--outputs needs --judge"),
        ([*given, "--judge", "self"], "--judge self: there is no MODEL here"),
        ([*given, "--judge", "x", "--judge-seeds", 0], "--judge-seeds is 0; it must be at least 1"),
        (["eval", "alpaca-eval", "--annotations", "a.json", "--c", -1], "--c is -1.0; it must be a number above 0"),
        (["eval", "alpaca-eval", "--annotations", tmp_path / "absent.json"], r"absent\.json: no such file"),
        (["eval", "compare", "a", "b", "-o", tmp_path / "c"], "--judge is missing; name who judges"),
        (["eval", "compare", "a", "b", "-o", tmp_path / "c", "--judge", "x"], "a: give --prompts"),
        (
            ["eval", "compare", tmp_path / "o.json", "b", "-o", tmp_path / "c", "--judge", "self"],
            "there is no MODEL here",
        ),
    ):
        code, _, err = called(capsys, *words)
        assert code == 2 and re.search(fault, err), err


def play_weighted(name: str, before: int) -> endpoint_server.Reply:
    """An endpoint that names log-probs: m is three times as likely as M; "sun" gets other tokens alone."""
    status, headers, body = endpoint_server.replied("m")
    value = json.loads(body)
    tokens = {"The": -1.0} if "sun" in name else {"m": np.log(0.6), "M": np.log(0.2), "The": -3.0}
    top = [{"token": token, "logprob": float(logp), "bytes": None} for token, logp in tokens.items()]
    value["choices"][0]["logprobs"] = {"content": [top[0] | {"top_logprobs": top}], "refusal": None}
    return status, headers, json.dumps(value).encode()


def test_an_endpoint_is_asked_for_log_probs_once_and_failed_rows_again(world, tmp_path, capsys, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", endpoint_server.KEY)
    rows = [{"instruction": t, "output": "egg", "generator": "mine"} for t in TASKS]
    (tmp_path / "o.json").write_text(json.dumps(rows))
    with endpoint_server.serving(play_weighted) as server:
        judge = f"endpoint:gpt-4-1106-preview,base_url={server.url},concurrency=1"
        words = alpaca_words(world, tmp_path / "out", "--outputs", tmp_path / "o.json", "--judge", judge)
        code, value, err = called(capsys, *words)
        assert code == 0, err
        assert server.bodies[0]["top_logprobs"] == 5 and server.bodies[0]["max_tokens"] == 1
        assert (value["judged"], value["failed"], value["n_total"], value["n_not_annotated"]) == (9, 3, 9, 3)
        assert any("3 of 12 rows are not annotated" in text for text in value["warnings"])
        assert "none of the choices is among the tokens that the judge names" in value["failures"]
        preferences = {row["instruction"]: row["preference"]
                       for row in json.loads((tmp_path / "out" / "annotations.json").read_text())}  # fmt: skip
        for task in TASKS:
            expected = None if "sun" in task else pytest.approx(1.75 if is_switched(task) else 1.25)
            assert preferences[task] == expected
        first = len(server.bodies)
        value = called(capsys, *words)[1]
        assert (value["judged"], value["failed"]) == (0, 3) and len(server.bodies) <= first + 3


@pytest.mark.slow
def test_two_models_are_compared_and_a_second_command_judges_nothing(world, tmp_path, capsys):
    """Two models on a file of prompts, by a function; then their outputs, by a model in both orders."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": t}) + "\n" for i, t in enumerate(TASKS)))
    out, function = tmp_path / "out", f"function:{world / 'judges.py'}:longest"
    words = ["eval", "compare", world / "model", world / "judge", "--prompts", prompts, "--judge", function,
             "--dtype", "float32", "--max-new-tokens", 8, "-o", out]  # fmt: skip
    plan = called(capsys, *words, "--dry-run")[1]
    assert (plan["judge"]["questions"], plan["judge"]["calls"], plan["judge"]["prompt_tokens"]) == (12, 24, 0)
    assert plan["responses_a"] == plan["responses_b"] and plan["responses_a"]["completion_tokens"] == 12 * 8
    assert plan["total"]["calls"] == 48 and not (out / "responses_a").exists()
    code, value, err = called(capsys, *words)
    assert code == 0, err
    assert value["wins"] + value["losses"] + value["ties"] == value["prompts"] == 12
    assert value["interval"][0] <= value["win_rate"] <= value["interval"][1] and 0 <= value["p_value"] <= 1
    assert value["judged"] + value["equal"] == 12
    again = called(capsys, *words)[1]
    assert again | {"judged": value["judged"], "reused": 0} == value and again["judged"] == 0
    outcomes = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in outcomes] == [f"p{i}" for i in range(12)]

    sides = []
    for place in "ab":
        records = (out / f"responses_{place}" / "answers" / "responses.jsonl").read_text().splitlines()
        sides.append([json.loads(record)["text"] for record in records])
        rows = [{"instruction": t, "output": text} for t, text in zip(TASKS, sides[-1], strict=True)]
        (tmp_path / f"{place}.json").write_text(json.dumps(rows))
    lengths = [[len(a) - len(b)] for a, b in zip(*sides, strict=True)]
    assert value["wins"] == sum(gap > 0 for (gap,) in lengths)
    (tmp_path / "pairwise.txt").write_text("{prompt}\nA: {response_a}\nB: {response_b}\n")
    by_model = ["--judge", world / "judge", "--rubric", tmp_path / "pairwise.txt", "--expected", "--judge-tokens", 1]
    by_model += ["--dtype", "float32"]
    one = called(capsys, "eval", "compare", tmp_path / "a.json", tmp_path / "b.json", *by_model, "-o", tmp_path / "x")[
        1
    ]
    other = called(
        capsys, "eval", "compare", tmp_path / "b.json", tmp_path / "a.json", *by_model, "-o", tmp_path / "y"
    )[1]
    assert one["win_rate"] == pytest.approx(100 - other["win_rate"], abs=0.01) and one["win_rate"] != 50
    assert one["controlled"] == pytest.approx(100 - other["controlled"], abs=0.1)


def test_sides_with_other_prompts_are_refused(tmp_path, capsys, world):
    for name, tasks in (("a", TASKS), ("b", TASKS[1:])):
        rows = [{"instruction": t, "output": name} for t in tasks]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    words = ["eval", "compare", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "out"]
    code, _, err = called(capsys, *words, "--judge", f"function:{world / 'judges.py'}:longest")
    assert code == 2 and "12 and 11 prompts, of which 11 are the same" in err


EVALUATIONS = {
    "agreement": agreement, "alpaca_eval": alpaca, "arena_hard": arena, "compare": compare, "ifeval": ifeval,
    "lm_eval": harness, "mt_bench": mtbench,
}  # fmt: skip


def flags(name: str, capsys, monkeypatch) -> set[str]:
    """The flags of an evaluation, each with its type, as --help shows them."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        EVALUATIONS[name](["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown and f"jaxsi eval {name.replace('_', '-')} " in shown
    lines = [line.strip(" │|") for line in shown.splitlines()]
    return {re.split(r" {2,}", line)[0] for line in lines if re.match(r"--?[a-z]", line)}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_help_has_examples_and_the_recorded_flags(name, capsys, monkeypatch):
    text = "".join(f"{flag}\n" for flag in sorted(flags(name, capsys, monkeypatch)))
    golden = GOLDEN / f"cli_eval_{name}.txt"
    if os.environ.get("JAXSI_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "flags changed; JAXSI_UPDATE_GOLDEN=1 records them"


def test_all_evaluations_have_the_same_options_for_the_same_thing(capsys, monkeypatch):
    found = {name: flags(name, capsys, monkeypatch) for name in EVALUATIONS}
    judged = {"--judge {None}|STR", "--judge-temperature FLOAT", "--judge-tokens INT", "--judge-seeds INT",
              "--judge-batch INT", "--cache {None}|PATH", "--dry-run"}  # fmt: skip
    answered = {"--top-p FLOAT", "--max-new-tokens INT", "--max-prompts {None}|INT"}
    computed = {"--dtype {auto,bfloat16,float32,float16}", "--mesh.data {None}|INT"}
    sampled = {"--seed INT", "--batch-size INT", "--chat.thinking {off,keep,strip}", "--chat.date {None}|STR"}
    by_rubric = {"--rubric {None}|STR", "--judge-samples INT", "--expected"}
    for name, given in found.items():
        assert computed <= given and any(flag.startswith("-o ") for flag in given)
        assert (judged <= given) == (name not in ("ifeval", "lm_eval"))
        assert (answered <= given) == (name not in ("agreement", "lm_eval"))
        assert (sampled <= given) == (name != "agreement")
        assert (by_rubric <= given) == (name in ("agreement", "alpaca_eval", "compare"))
