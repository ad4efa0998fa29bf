"""The model card of an export."""

import json
import subprocess

import pytest
from made_runs import HOSTILE, made_run, write_value

from jaxsi.report.model_card import licence_of, model_card
from jaxsi.runs import provenance


def card_of(run, t=2, **facts):
    return model_card("toy", model=f"{run}@{t}", checkpoint=run / f"iter_{t}" / "checkpoint", facts=facts)


def test_card_of_a_run_says_method_data_iterations_evaluation_command_and_commit(tmp_path):
    run = made_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    write_value(
        run / "config.json",
        config
        | {"prompts": {"path": "/home/me/secret/prompts.jsonl"}, "judging": "feedback.judge", "evaluate": "my.exact"},
    )
    entry = {
        "command": "jaxsi run /home/me/secret/toy.py --prompts /home/me/secret/prompts.jsonl", "commit": "0123abc",
        "python": "3.11.9", "packages": {"jax": "0.10.2"}, "devices": "1 x cpu", "time": "2026-11-27T18:00:00+00:00",
    }  # fmt: skip
    write_value(run / provenance.FILE, [entry])
    card = card_of(run, architecture="llama, 7 parameters")
    for part in (
        "base_model: some/model", "library_name: transformers", "- self-rewarding", "arxiv.org/abs/2401.10020",
        "the model after iteration 2 of 2", "| prompts | `prompts.jsonl` |", "| judge | `feedback.judge` |",
        "| command | `jaxsi run toy.py --prompts prompts.jsonl` |", "| commit of jaxsi | `0123abc` |",
        "| versions | Python 3.11.9, jax 0.10.2 |", "| architecture | llama, 7 parameters |",
        "| 1 | 60 (58 to 62) |", "| 2 | 70 (68 to 72) |", "Measured by `my.exact`.", "80 % of its verdicts the score 5",
        "could not be read from its files",
    ):  # fmt: skip
        assert part in card, (part, card)
    assert "secret" not in card


def test_card_of_another_model_claims_no_method(tmp_path):
    card = model_card("copy", model="some/model", checkpoint=tmp_path, facts={})
    assert (
        "Exported by jaxsi from [some/model]" in card and "Evaluation" not in card and "base_model: some/model" in card
    )


@pytest.mark.parametrize(
    ("name", "content", "licence"),
    [
        ("README.md", "---\nlicense: mit\ntags: [x]\n---\nlicense: other", "mit"),
        ("README.md", "# no head\nlicense: mit", None),
        ("README.md", '---\nlicense: "evil\\nvalue: 1"\n---\n', None),
        ("LICENSE", "   Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("LICENSE", "You may do nothing.", None),
    ],
)
def test_licence_is_that_of_the_base_models_files(tmp_path, name, content, licence):
    (tmp_path / name).write_text(content)
    assert licence_of(str(tmp_path)) == licence


@pytest.mark.parametrize("text", [*HOSTILE, "a | b ` c\nd"])
def test_texts_of_a_run_stay_in_their_cell(tmp_path, text):
    run = made_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    write_value(run / "config.json", config | {"judging": text, "model": f"{text}/x/y"})
    rows = [line for line in card_of(run).splitlines() if line.startswith("| judge |")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 3 and rows[0].count("`") in (0, 2)


def test_provenance_lists_every_time_a_run_was_taken_up_and_damage_is_no_error(tmp_path):
    provenance.note(tmp_path)
    provenance.note(tmp_path)
    entries = provenance.read(tmp_path)
    assert len(entries) == 2 and entries[0]["python"] and "jaxsi" in entries[0]["packages"]
    (tmp_path / provenance.FILE).write_text("{")
    assert provenance.read(tmp_path) == []
    provenance.note(tmp_path)
    assert len(provenance.read(tmp_path)) == 1


def test_commit_is_that_of_the_package_wherever_a_command_runs(tmp_path, monkeypatch):
    """An environment inside of another repository is not its code."""
    here = provenance.commit()
    monkeypatch.chdir(tmp_path)
    assert provenance.commit() == here
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "__init__.py").write_text("")
    assert provenance.commit(tmp_path) is None  # not tracked
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["add", "."], [*author, "commit", "-qm", "m"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    found = provenance.commit(tmp_path)
    assert found is not None and len(found) == 12
    (tmp_path / "__init__.py").write_text("x = 1\n")
    assert provenance.commit(tmp_path) == f"{found}-dirty"
