"""`jaxsi eval mt-bench`, `arena-hard` and `compare` with a tiny model: one set of options, files in the formats of
FastChat and arena-hard-auto, and a command that is killed samples and judges nothing twice."""

import json
from typing import Any

import endpoint_server
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import eval_answers, eval_judge
from jaxsi.cli.eval_results import spreads
from jaxsi.cli.main import main
from jaxsi.evals import arena_hard, mt_bench
from jaxsi.evals.answer_cache import AnswerCache
from jaxsi.model import compute_dtype
from jaxsi.runs.records import Response
from jaxsi.sampling import generate as sampling
from jaxsi.stages.verdicts import LocalWriter

GENERATE = sampling.generate
SMALL = ("--dtype", "float32", "--max-new-tokens", 6, "--batch-size", 2, "--judge-batch", 2, "--judge-tokens", 9)
pytestmark = pytest.mark.xdist_group("judged evaluations")


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch):
    """Eight devices give the same responses, but compile for longer."""
    for module in (eval_answers, eval_judge):
        monkeypatch.setattr(module, "mesh_for", lambda *_: tiny.mesh())


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, MT-Bench's and Arena-Hard's files with few questions, and baselines."""
    folder = tmp_path_factory.mktemp("answered")
    lmlib.export(tiny.make_lm(), folder / "model", dtype="float32")
    data = folder / "mt_bench"
    categories = ("writing", "math", "stem", "writing")
    rows = [{"question_id": 81 + i, "category": c, "turns": [f"Reverse: cat {w}", f"Sort: axe {w}"]}
            for i, (c, w) in enumerate(zip(categories, ("axe", "pie", "sun", "saw"), strict=True))]  # fmt: skip
    written(data / "question.jsonl", rows)
    references = mt_bench.answer_rows("gpt-4", {82: ("pie cat", "axe pie")}, now=0.0)
    written(data / "reference_answer" / "gpt-4.jsonl", references)
    baseline = mt_bench.answer_rows("base", {81 + i: ("axe", "pie") for i in range(4)}, now=0.0)
    written(data / "model_answer" / "base.jsonl", baseline)
    questions = {f"u{i}": (f"Reverse: dog {word}", "hard") for i, word in enumerate(("axe", "pie", "sun", "saw"))}
    rows = [{"uid": uid, "category": category, "prompt": text} for uid, (text, category) in questions.items()]
    written(folder / "arena.jsonl", rows)
    texts = {uid: " axe" * (i + 1) for i, uid in enumerate(questions)}
    answers = arena_hard.answer_rows("base", questions, texts, now=0.0)
    written(folder / "baseline.jsonl", answers)
    return folder


def called(capsys, *words) -> tuple[int, dict[str, Any], str]:
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else {}, err


def watched(monkeypatch, *, samples: int | None = None, judges: int | None = None) -> tuple[list[str], list[str]]:
    """The prompts that are sampled and the requests that are judged; after some parts the process is interrupted. The
    judge is unsure about some rows."""
    sampled: list[str] = []
    asked: list[str] = []
    parts = {"samples": 0, "judges": 0}

    def counted(name: str, most: int | None) -> None:
        if parts[name] == most:
            raise KeyboardInterrupt
        parts[name] += 1

    def generate(lm, prompts, **settings):
        counted("samples", samples)
        sampled.extend(f"{prompt.id}: {prompt.text}" for prompt in prompts)
        return GENERATE(lm, prompts, **settings)

    def write(self, requests, cfg, key, num_samples, forced=()):
        counted("judges", judges)
        assert (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.batch_size) == (9, 0.0, 1.0, 2)
        asked.extend(request.text for request in requests)
        texts = {r.id: "hm" if "sun" in r.text else "[[7]] [[A>>B]] [[A]]" for r in requests}
        return {id: [Response.of(f"{id}#0", id, 0, text)] for id, text in texts.items()}

    monkeypatch.setattr(sampling, "generate", generate)
    monkeypatch.setattr(LocalWriter, "write", write)
    return sampled, asked


def command(world, kind: str, out) -> list[Any]:
    """The words of an evaluation of the model by itself."""
    data = ["--data", world / "mt_bench", "--baseline", "base"]
    if kind == "arena-hard":
        data = ["--data", world / "arena.jsonl", "--baseline", world / "baseline.jsonl"]
    mode = ["--mode", "pair"] if kind == "mt-bench pair" else []
    return ["eval", kind.split()[0], world / "model", *data, *mode, "--judge", "self", "-o", out, *SMALL]


@pytest.mark.parametrize(
    ("kind", "samples", "questions", "unreadable"),
    [("mt-bench", 8, 8, 2), ("mt-bench pair", 8, 16, 4), ("arena-hard", 4, 8, 2)],
)
def test_a_killed_command_samples_and_judges_nothing_twice(
    kind, samples, questions, unreadable, world, tmp_path, capsys, monkeypatch
):
    """Interrupted while the model answers, again while the judge reads, then finished, then given once more."""
    out = tmp_path / "out"
    words = command(world, kind, out)
    first = watched(monkeypatch, samples=1)
    assert called(capsys, *words)[0] == 130 and first[1] == []
    second = watched(monkeypatch, judges=2)
    assert called(capsys, *words)[0] == 130 and len(second[1]) == 4
    third = watched(monkeypatch)
    code, value, err = called(capsys, *words)
    assert code == 0, err
    sampled = [text for found, _ in (first, second, third) for text in found]
    asked = [text for _, found in (first, second, third) for text in found]
    assert len(sampled) == len(set(sampled)) == samples and len(asked) == len(set(asked)) == questions
    assert (value["judged"], value["reused"], value["failed"]) == (questions - 4, 4, 0)
    assert value["unreadable"] == unreadable and value["failures"] == [] and value["torn_lines"] == 0
    lines = [json.loads(line) for line in (out / "judge_answers.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == questions
    again = watched(monkeypatch)
    assert called(capsys, *words)[1] | {"judged": questions - 4, "reused": 4} == value and again == ([], [])
    figure = {"mt-bench": "score", "mt-bench pair": "win_rate_adjusted", "arena-hard": "score"}[kind]
    assert value["seeds"][figure]["values"] == [value["seeds"][figure]["mean"]]
    assert value["seeds"][figure]["sd"] is None

    responses = {}
    for file in (out / "responses_model" / "answers").glob("*.jsonl"):
        responses |= {row["prompt_id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}
    if kind == "arena-hard":
        assert arena_hard.read_answers(out / "model_answer" / "model.jsonl") == ("model", responses)
        (row,) = value["models"].values()
        assert (row["judged"], row["errors"], row["score"]) == (3, 1, 0.5)
        assert [g.model for g in arena_hard.read_judgments([out / "model_judgment" / "model" / "model.jsonl"])] == [
            "model"
        ] * 4
    else:
        _, answers = mt_bench.read_answers(out / "model_answer" / "model.jsonl")
        assert answers == {id: (responses[f"{id}, turn 1"], responses[f"{id}, turn 2"]) for id in range(81, 85)}
        mode = "pair" if "pair" in kind else "single"
        assert len((out / "model_judgment" / f"model_{mode}.jsonl").read_text().splitlines()) == 8
        row = value[mode]["model"]
        assert (row["score"], row["errors"]) == (7, 2) if mode == "single" else (row["tie"], row["errors"]) == (6, 2)


def test_a_busy_machine_measures_another_dtype_and_nothing_is_judged_twice(world, tmp_path, capsys, monkeypatch):
    """What "auto" means is measured. A command that goes on keeps what it began with, for the model and the judge."""
    out = tmp_path / "out"
    words = command(world, "arena-hard", out)
    words[words.index("--dtype") + 1] = "auto"
    monkeypatch.setattr(compute_dtype, "_announced", lambda: "float32")
    first = watched(monkeypatch, judges=2)
    assert called(capsys, *words)[0] == 130
    monkeypatch.setattr(compute_dtype, "_announced", lambda: "bfloat16")
    second = watched(monkeypatch)
    code, value, err = called(capsys, *words)
    assert code == 0, err
    assert "dtype auto: float32, as the judge's answers began" in err
    assert second[0] == [] and (value["judged"], value["reused"]) == (4, 4)
    assert len(set(first[1] + second[1])) == len(first[1] + second[1]) == 8
    lines = (out / "judge_answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["judge"].count("float32") for line in lines} == {1}
    assert called(capsys, *words, "--dtype", "bfloat16")[0] == 2  # a dtype that is given is another setting


def test_new_judgments_are_controlled_for_style(world, tmp_path, capsys, monkeypatch):
    """The judge likes the first place: at any style the model wins half of the games."""
    watched(monkeypatch)
    words = [*command(world, "arena-hard", tmp_path / "out"), "--style-control", "length", "markdown"]
    code, _, err = called(capsys, *words, "--style-tokenizer", tmp_path / "absent")
    assert code == 2 and "absent" in err
    code, _, err = called(capsys, *words)
    assert code == 2 and "give --style-tokenizer MODEL" in err and not list((tmp_path / "out").glob("responses*"))
    code, value, err = called(capsys, *words, "--style-tokenizer", world / "model")
    assert code == 0, err
    found = value["style_control"]
    assert found["models"]["model"]["score"] == pytest.approx(0.5) and found["controls"] == ["length", "markdown"]
    assert list(found["coefficients"]) == ["length"] and "with one model the score is" in found["warnings"][0]


def test_a_judge_without_verdicts_is_told(world, tmp_path, capsys, monkeypatch):
    watched(monkeypatch)
    for kind, count in (("mt-bench", 2), ("arena-hard", 2)):
        words = command(world, kind, tmp_path / kind)
        if kind == "arena-hard":
            rows = [json.loads(line) for line in (world / "arena.jsonl").read_text().splitlines()]
            words[words.index("--data") + 1] = written(tmp_path / "arena.jsonl", [rows[2]])
        else:
            rows = [json.loads(line) for line in (world / "mt_bench" / "question.jsonl").read_text().splitlines()]
            words[words.index("--data") + 1] = written(tmp_path / "mt" / "question.jsonl", [rows[2]]).parent
        assert main([*map(str, words)]) == 0
        shown = capsys.readouterr().out
        assert f"judged {count}, reused 0, failed 0, unreadable {count}" in shown
        assert "no verdict could be read: this judge writes none" in shown


@pytest.mark.parametrize("kind", ["mt-bench", "arena-hard"])
def test_other_settings_are_refused_and_another_seed_of_the_judge_asks_anew(kind, world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = command(world, kind, out)
    _, asked = watched(monkeypatch)
    plan = called(capsys, *words, "--dry-run", "--judge-seeds", 2)[1]
    count = 4 if kind == "arena-hard" else 8
    assert plan["responses"]["calls"] == count and plan["responses"]["completion_tokens"] == count * 6
    assert (plan["judge"]["questions"], plan["judge"]["calls"], asked) == (16, 16, [])
    assert plan["judge"]["completion_tokens"] == 16 * 9 and plan["dry_run"] is True
    assert plan["total"]["calls"] == count + 16 and not list(out.glob("responses*"))

    cache = tmp_path / "elsewhere.jsonl"
    value = called(capsys, *words, "--cache", cache, "--judge-seeds", 2)[1]
    assert (value["judged"], value["reused"]) == (16, 0) and len(asked) == 16
    assert len(value["seeds"]["score"]["values"]) == 2 and value["seeds"]["score"]["sd"] == 0
    assert AnswerCache(cache).counts()["judged"] == 0 and len(cache.read_text().splitlines()) == 16
    assert not (out / "judge_answers.jsonl").exists()
    for other in (("--seed", 1), ("--max-new-tokens", 5), ("--top-p", 0.5), ("--temperature", 0.4)):
        code, _, err = called(capsys, *words, *other)
        assert code == 2 and other[0].removeprefix("--").replace("-", "_") in err, err


def test_wrong_words_are_refused_before_anything_is_sampled(world, tmp_path, capsys, monkeypatch):
    sampled, _ = watched(monkeypatch)
    (tmp_path / "judges.py").write_text("def longest(prompt, response):\n    return len(response)\n")
    for kind in ("mt-bench", "arena-hard"):
        words = command(world, kind, tmp_path / "out")
        for more, fault in (
            (["--judge", f"function:{tmp_path / 'judges.py'}:longest"], "writes no text, which this evaluation needs"),
            (["--judge", "endpoint:"], "nothing stands after endpoint:"),
            (["--judge-seeds", 0], "--judge-seeds is 0; it must be at least 1"),
            (["--judge-batch", 0], "--judge-batch is 0; it must be at least 1"),
            (["--max-prompts", 0], "--max-prompts is 0; it must be at least 1"),
            (["--max-new-tokens", 100000], "do not fit into the context of"),
            (["-o", tmp_path / "judges.py"], "is a file; give a folder"),
        ):
            code, _, err = called(capsys, *words, *more)
            assert code == 2 and fault in err, err
    assert sampled == []


def test_an_endpoint_answers_and_judges_once_for_each_seed(world, tmp_path, capsys, monkeypatch):
    """MODEL may be an endpoint for every evaluation; each seed of a judge behind one gets answers of its own."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", endpoint_server.KEY)
    prompts = written(tmp_path / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"Sort {i}|{i}"} for i in range(3)])
    outputs = [{"prompt_id": f"p{i}", "text": f"mine {i}"} for i in range(3)]
    theirs = written(tmp_path / "theirs.jsonl", outputs)

    def play(name: str, before: int) -> endpoint_server.Reply:
        return endpoint_server.replied(f"text {name}" if name.isdigit() else "Verdict: A")

    with endpoint_server.serving(play) as server:
        words = [
            "eval",
            "compare",
            f"endpoint:m,base_url={server.url}",
            theirs,
            "--prompts",
            prompts,
            "--judge",
            "self",
        ]
        words += ["-o", tmp_path / "out", "--judge-seeds", 2, "--temperature", 0.5]
        code, value, err = called(capsys, *words)
        assert code == 0, err
        assert [body["temperature"] for body in server.bodies[:3]] == [0.5] * 3
        assert len(server.bodies) == 3 + 2 * 2 * 3 and (value["judged"], value["ties"]) == (6, 3)
        assert value["a"] == "m" and value["seeds"]["win_rate"]["values"] == [50, 50]
        again = called(capsys, *words)[1]
        assert (again["judged"], again["reused"], len(server.bodies)) == (0, 6, 15)
        code, _, err = called(capsys, *words, "--expected")
        assert code == 2 and "an endpoint gives no expected scores" in err and len(server.bodies) == 15


def test_spread_of_seeds_leaves_out_what_is_not_known():
    figures = [{"score": 3.0, "lc": None}, {"score": 1.0, "lc": 2.0}]
    found = spreads(figures, ("score", "lc"))
    assert found["score"] == {"values": [3, 1], "mean": 2, "sd": pytest.approx(2**0.5), "low": 1, "high": 3}
    assert found["lc"] == {"values": [None, 2], "mean": 2, "sd": None, "low": 2, "high": 2}
    assert spreads([{"x": None}], ("x",))["x"] == {
        "values": [None],
        "mean": None,
        "sd": None,
        "low": None,
        "high": None,
    }
