"""`jaxsi pairs`: from responses and judgments to a file that `jaxsi dpo`, `datasets` and others read."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import train
from jaxsi.cli.main import main
from jaxsi.runs.records import Judgment, Prompt, Response, write_jsonl
from jaxsi.stages.user_data import read_pairs

SYSTEM = {"role": "system", "content": "Be brief."}
PROMPTS = [
    {"id": "a", "prompt": "Reverse: cat axe"},
    {"id": "b", "messages": [SYSTEM, {"role": "user", "content": "Reverse: cat dog\u2028pie"}]},
    {"id": "c", "prompt": "Reverse: cat sun"},
]
TEXTS = {"a": ["axe cat.", "cat axe", "axe"], "b": ["dog cat.", "cat dog"], "c": ["sun cat.", "sun cat."]}
SCORES = {"a": [5.0, 1.0, 3.0], "b": [None, 2.0], "c": [4.0, 2.0]}


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(prompt: str, sample: int, text: str, length: int = 2, **changes) -> Response:
    return Response(
        **{
            "id": f"{prompt}#{sample}", "prompt_id": prompt, "sample": sample, "text": text,
            "token_ids": tuple(range(length)), "logps": (0.0,) * length, "finish_reason": "stop", "fingerprint": "f",
            "template": "t", **changes,
        }
    )  # fmt: skip


def judgment(response: Response, score: float | None) -> Judgment:
    return Judgment(
        id=response.id, prompt_id=response.prompt_id, scores=(score,), score=score, texts=("",), fingerprint="f",
        template="t",
    )  # fmt: skip


def judged(folder: Path, *pairs: tuple[Response, float | None]) -> None:
    write_jsonl(folder / "responses.jsonl", [response for response, _ in pairs])
    write_jsonl(folder / "judgments.jsonl", [judgment(*pair) for pair in pairs])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Prompts, responses and judgments: "a" gives a pair, "b" has one score, "c" has two equal texts."""
    lines(tmp_path / "prompts.jsonl", PROMPTS)
    rows = [(record(id, n, t), SCORES[id][n]) for id, texts in TEXTS.items() for n, t in enumerate(texts)]
    judged(tmp_path, *rows)
    return tmp_path


def called(capsys, folder, *more, out="pairs.jsonl"):
    words = ["pairs", "-o", folder / out]
    for name in ("prompts", "responses", "judgments"):
        words += [f"--{name}", folder / f"{name}.jsonl"]
    code = main([str(word) for word in (*words, *more)])
    return code, *capsys.readouterr()


def value_of(capsys, folder, *more, **names):
    code, out, err = called(capsys, folder, *more, "--json", **names)
    assert code == 0, err
    return json.loads(out)


def failure(capsys, folder, *more):
    code, out, err = called(capsys, folder, *more)
    assert (code, out) == (2, "") and "Traceback" not in err
    return next(line for line in err.splitlines() if line.startswith("jaxsi: error: "))


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def sides(folder: Path) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in written(folder)]


def test_best_and_worst_of_each_prompt_with_counts(folder, capsys):
    value = value_of(capsys, folder)
    assert written(folder) == [
        {
            "id": "a",
            "prompt": [{"role": "user", "content": "Reverse: cat axe"}],
            "chosen": [{"role": "assistant", "content": "axe cat."}],
            "rejected": [{"role": "assistant", "content": "cat axe"}],
            "chosen_score": 5.0,
            "rejected_score": 1.0,
        }
    ]
    counts = {"prompts": 3, "pairs": 1, "ties": 0, "too_few": 1, "small_gap": 0, "identical": 1, "unscored": 1}
    assert {name: value[name] for name in counts} == counts
    assert (value["gap"], value["chosen_tokens"], value["length_difference"]) == (4.0, 2.0, 0.0)


@pytest.mark.slow
def test_file_is_read_by_datasets_and_by_dpo(folder, capsys, monkeypatch):
    (folder / "judgments.jsonl").write_text((folder / "judgments.jsonl").read_text().replace("null", "9"))
    value_of(capsys, folder)
    table = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder))
    assert table.column_names == ["id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score"]
    assert [dict(message) for message in table[1]["prompt"]] == PROMPTS[1]["messages"]
    assert table[1]["chosen"] == [{"role": "assistant", "content": "dog cat."}] and table[1]["chosen_score"] == 9.0
    prompt = Prompt(id="b", messages=tuple(PROMPTS[1]["messages"]))
    assert read_pairs(folder / "pairs.jsonl")[1] == (prompt, "dog cat.", "cat dog")
    table.to_parquet(str(folder / "pairs.parquet"))
    assert read_pairs(folder / "pairs.parquet") == read_pairs(folder / "pairs.jsonl")

    monkeypatch.setattr(train, "mesh_for", lambda *_: tiny.mesh())
    lmlib.export(tiny.make_lm(), folder / "model", dtype="float32")
    words = ["dpo", folder / "model", "--data", folder / "pairs.jsonl", "--run-dir", folder / "dpo", "--batch-size", 2]
    words += ["--max-length", 64, "--dtype", "float32", "--json"]
    assert main([str(word) for word in words]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 2


def test_rows_of_other_programs_are_read(folder, capsys):
    """Texts without tokens: lengths are those of the texts, and equal texts are identical."""
    long = "axe cat, and that is all."
    texts = [("a", 0, long, 5), ("a", 1, "axe cat.", 4.9), ("a", 2, "cat", 1), ("c", 0, "sun", 2), ("c", 1, "sun", 1)]
    lines(folder / "responses.jsonl", [{"prompt_id": id, "sample": n, "text": t} for id, n, t, _ in texts])
    lines(folder / "judgments.jsonl", [{"prompt_id": id, "sample": n, "score": s} for id, n, _, s in texts])
    value = value_of(capsys, folder)
    assert sides(folder) == [(long, "cat")] and value["identical"] == 1
    assert (value["chosen_characters"], value["rejected_characters"]) == (len(long), 3)
    value_of(capsys, folder, "--length-control", 0.1, "--overwrite")
    assert sides(folder) == [("axe cat.", "cat")]


def test_length_control_counts_tokens_of_sampled_responses(folder, capsys):
    judged(
        folder, (record("a", 0, "many short words", 9), 5.0), (record("a", 1, "one-very-long-word-indeed", 3), 4.9),
        (record("a", 2, "cat", 3), 1.0),
    )  # fmt: skip
    value = value_of(capsys, folder, "--length-control", 0.1)
    assert sides(folder) == [("one-very-long-word-indeed", "cat")] and value["chosen_tokens"] == 3


def test_gap_cut_off_empty_responses_and_thoughts(folder, capsys):
    judged(
        folder,
        (record("a", 0, "best", finish_reason="length"), 9.0),
        (record("a", 1, "good", reasoning="Let me see."), 7.0),
        (record("a", 2, "bad"), 3.0),
        (record("a", 3, "worst", finish_reason="length"), 1.0),
        (record("a", 4, " "), 0.0),
        (record("b", 0, "better"), 2.0),
        (record("b", 1, "worse"), 1.5),
    )
    value = value_of(capsys, folder, "--min-gap", 1)
    assert sides(folder) == [("good", "bad")]
    names = ("small_gap", "cut_off", "empty", "thoughts", "too_few")
    assert [value[name] for name in names] == [1, 2, 1, 1, 1]
    value_of(capsys, folder, "--min-gap", 1, "--cut-off", "rejected", "--overwrite")
    assert sides(folder) == [("good", "worst")]
    value_of(capsys, folder, "--min-gap", 1, "--cut-off", "both", "--overwrite")
    assert sides(folder) == [("best", "worst")]


def test_bad_input_is_named(folder, capsys):
    assert "length_control is 0.5; it must lie in [0, 0.5)" in failure(capsys, folder, "--length-control", 0.5)
    assert "min_gap is -1.0; it must be at least 0" in failure(capsys, folder, "--min-gap", -1)
    assert "gives no pair (prompts 3, pairs 0" in failure(capsys, folder, "--min-gap", 9)
    responses = (folder / "responses.jsonl").read_text()
    (folder / "responses.jsonl").write_text(responses.replace('"prompt_id": "c"', '"prompt_id": "z"'))
    assert "response 'c#0' is of prompt 'z'" in (message := failure(capsys, folder))
    assert "responses.jsonl" in message and "prompts.jsonl" in message
    (folder / "responses.jsonl").write_text(responses + '{"id": 3}\n')
    assert "responses.jsonl:8: " in failure(capsys, folder)
    (folder / "responses.jsonl").write_text("")
    assert "no lines in this file; jaxsi generate writes them" in failure(capsys, folder)
    (folder / "responses.jsonl").write_text(responses.splitlines()[0] + "\n")
    assert "belongs to no candidate" in failure(capsys, folder)
    lines(folder / "judgments.jsonl", [{"prompt_id": "a", "score": "good"}])
    assert "judgments.jsonl:1: score is 'good'" in failure(capsys, folder)
    assert not (folder / "pairs.jsonl").exists()
    (folder / "pairs.jsonl").write_text("precious")
    assert "exists; give another name, or --overwrite" in failure(capsys, folder)
    code, _, err = called(capsys, folder, "--overwrite", out="responses.jsonl")
    assert code == 2 and "is also read by this command" in err


def test_it_needs_no_jax(folder):
    code = "import sys\nfrom jaxsi.cli.main import main\ncode = main(sys.argv[1:])\n"
    code += "assert not {'jax', 'transformers', 'torch'} & set(sys.modules)\nsys.exit(code)"
    words = ["pairs", "-o", folder / "pairs.jsonl"]
    for name in ("prompts", "responses", "judgments"):
        words += [f"--{name}", folder / f"{name}.jsonl"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "length_difference" in done.stdout
