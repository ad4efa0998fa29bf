"""IFEval: the checkers are those of lm-eval on all prompts, thoughts are taken out, and the checks judge and reward."""

import dataclasses
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="the checkers need lm-eval: pip install 'jaxsi[ifeval]'")
pytest.importorskip("langdetect", reason="the checkers need langdetect: pip install 'jaxsi[ifeval]'")

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import eval_answers
from jaxsi.cli.command import UsageError
from jaxsi.cli.judges import judge_of
from jaxsi.cli.main import main
from jaxsi.evals import ifeval
from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.ifeval import Followed, Instructed, InstructionChecks, check, checkable, figures, read_instructed
from jaxsi.runs.records import Prompt, RecordError, Response
from jaxsi.runs.run import Run
from jaxsi.sampling import generate as sampling
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judges import RewardsBy

DATA = Path(__file__).parents[3] / "shared" / "data" / "ifeval" / "data.json.gz"
needs_data = pytest.mark.skipif(not DATA.is_file(), reason="IFEval's prompts are not here")
NO_COMMA, WORDS = "punctuation:no_comma", "length_constraints:number_words"
ROW = {
    "key": 7, "prompt": "Say hello.", "instruction_id_list": [NO_COMMA, WORDS],
    "kwargs": [{}, {"relation": "at least", "num_words": 3}],
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded:
    seed: int = 0


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def responses_to(prompt):
    """Texts that follow some of a prompt's instructions, each in its way."""
    text = " ".join(str(value) for arguments in prompt.arguments for value in arguments.values())
    return [
        "",
        f"* {prompt.prompt}\n\n{text} {text}\nP.S. * done *",
        f'"<<a title>>\n\n{text.upper()}, [x] [y] [z]\n***\n{text.lower()}\nSECTION 1\n- one\n- two\n* {text} *"',
        "My answer is yes. " * 60,
    ]


def draws(prompt):
    """Whether lm-eval draws a letter at random, because it does not accept the one that is to be counted."""
    return any(arguments.get("letter") in ("#", "!") for arguments in prompt.arguments)


@needs_data
def test_where_lm_eval_draws_a_letter_every_check_of_a_prompt_draws_the_same():
    drawing = [prompt for prompt in read_instructed(DATA) if draws(prompt)]
    assert len(drawing) == 2
    for prompt in drawing:
        random.seed(0)
        state = random.getstate()
        assert len({check(prompt, "aaaa bbbb ccccc dddddd eeeeee") for _ in range(20)}) == 1
        assert random.getstate() == state


@needs_data
@pytest.mark.parametrize("part", range(4))
def test_checks_of_all_prompts_are_those_of_lm_eval(part):
    from lm_eval.tasks.ifeval import utils

    given = read_instructed(DATA)
    assert len(given) == 541
    prompts = [p for p in checkable(given, leave_out=True)[part::4] if not draws(p)]
    docs = {str(doc["key"]): doc for doc in json.loads(gzip.decompress(DATA.read_bytes()))}
    for number in range(4):
        followed, theirs = [], []
        for prompt in prompts:
            response = responses_to(prompt)[number]
            followed.append(check(prompt, response))
            theirs.append(utils.process_results(docs[prompt.id], [response]))
        assert [list(f.strict) for f in followed] == [found["inst_level_strict_acc"] for found in theirs]
        assert [list(f.loose) for f in followed] == [found["inst_level_loose_acc"] for found in theirs]
        ours = figures(prompts, followed)
        for name in ("strict", "loose"):
            whole = [found[f"prompt_level_{name}_acc"] for found in theirs]
            assert ours[f"prompt_{name}"] == pytest.approx(sum(whole) / len(whole))
            flat = utils.agg_inst_level_acc([found[f"inst_level_{name}_acc"] for found in theirs])
            assert ours[f"instruction_{name}"] == pytest.approx(flat)


@needs_data
def test_every_prompt_that_needs_nltks_data_is_known():
    """Whatever the checkers ask of NLTK, the list of those that need its data is complete."""
    given = read_instructed(DATA)
    script = """
import sys
from jaxsi.evals.ifeval import check, checkable, has_nltk_data, read_instructed
import nltk
nltk.data.path[:] = []
prompts = read_instructed(sys.argv[1])
assert not has_nltk_data()
left = checkable(prompts, leave_out=True)
for prompt in left:
    check(prompt, "This is a text. It has two sentences.")
print(len(prompts) - len(left))
"""
    run = subprocess.run([sys.executable, "-c", script, str(DATA)], capture_output=True, text=True, check=True)
    need = sum(bool(ifeval.NEED_NLTK_DATA & set(prompt.instructions)) for prompt in given)
    assert int(run.stdout.split()[-1]) == need > 0


@pytest.mark.skipif(not ifeval.has_nltk_data(), reason="NLTK's data punkt_tab are not here")
def test_sentences_are_counted_with_nltks_data():
    kwargs = ({"relation": "at least", "num_sentences": 3},)
    prompt = Instructed(id="1", prompt="p", instructions=("length_constraints:number_sentences",), arguments=kwargs)
    assert check(prompt, "One. Two. Dr. Smith came.").strict == (True,)
    assert check(prompt, "One. Dr. Smith came.").strict == (False,)


def test_prompts_without_data_are_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(ifeval, "has_nltk_data", lambda: False)
    sentences = Instructed(
        id="1", prompt="p", instructions=("length_constraints:number_sentences",), arguments=({"num_sentences": 1},)
    )
    other = Instructed(id="2", prompt="q", instructions=(NO_COMMA,), arguments=({},))
    with pytest.raises(EvaluationError, match="1 of 2 prompts need NLTK's data punkt_tab"):
        checkable([sentences, other])
    assert checkable([sentences, other], leave_out=True) == [other]
    unknown = Instructed(id="3", prompt="q", instructions=("no:such",), arguments=({},))
    with pytest.raises(EvaluationError, match="prompt 3: no checker for the instruction 'no:such'"):
        checkable([unknown])


def test_import_downloads_nothing_and_leaves_the_environment_as_it_was():
    script = """
import os, socket
def refuse(*a, **k):
    raise AssertionError("the network is used")
socket.socket.connect = refuse
import nltk
nltk.download = refuse
nltk.data.path[:] = []
from jaxsi.evals.ifeval import has_nltk_data
print(has_nltk_data(), os.environ.get("LOCAL_RANK"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split()[-2:] == ["False", "None"]


def test_strict_and_loose_follow_their_own_rules():
    prompt = Instructed(id="1", prompt="p", instructions=(NO_COMMA, WORDS), arguments=({}, ROW["kwargs"][1]))
    assert check(prompt, "one two three") == Followed((True, True), (True, True))
    assert check(prompt, "Sure, here it is:\none two three") == Followed((False, True), (True, True))
    assert check(prompt, "a, b") == Followed((False, False), (False, False))
    assert check(prompt, "") == Followed((False, False), (False, False))


def test_figures_worked_out_by_hand():
    prompts = [
        Instructed(id="1", prompt="p", instructions=("a", "b"), arguments=({}, {})),
        Instructed(id="2", prompt="q", instructions=("a",), arguments=({},)),
    ]
    found = figures(prompts, [Followed((True, False), (True, True)), Followed((True,), (False,))])
    assert (found["prompt_strict"], found["prompt_loose"]) == (0.5, 0.5)
    assert (found["instruction_strict"], found["instruction_loose"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found["kinds"] == {
        "a": {"count": 2, "strict": 1.0, "loose": 0.5}, "b": {"count": 1, "strict": 0.0, "loose": 1.0},
    }  # fmt: skip
    assert figures([], [])["prompt_strict"] is None


def test_checks_judge_and_reward_without_the_thought(tmp_path):
    path = written(tmp_path / "data.jsonl", ROW)
    prompts = [Prompt.of("x", "Say hello.\n")]
    texts = ["one two three", "a, b c d", "<think>\na, b\n</think>\n\none two three", "a, b"]
    responses = [Response.of(f"x#{i}", "x", i, text) for i, text in enumerate(texts)]
    assert [j.score for j in InstructionChecks(str(path))(None, prompts, responses)] == [1, 0, 1, 0]
    partial = judge_of(f"verifier:{path},check=ifeval,partial=true", tmp_path)
    assert partial == InstructionChecks(str(path), partial=True)
    assert [j.score for j in partial(None, prompts, responses)] == [1, 0.5, 1, 0]
    rewards = RewardsBy(judging=InstructionChecks(str(path), loose=True))(prompts, responses)
    assert rewards.tolist() == [1, 0, 1, 0]
    with pytest.raises(EvaluationError, match="has no instructions for the prompt 'other'"):
        InstructionChecks(str(path))(None, [Prompt.of("x", "other")], responses)
    with pytest.raises(UsageError, match="'tight=1' is not a setting; it may have prompts, loose, partial"):
        judge_of(f"verifier:{path},check=ifeval,tight=1", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": None}, "no column 'key'"),
        ({"prompt": 3}, "prompt is 3; it is a text"),
        ({"instruction_id_list": []}, r"instruction_id_list is \[\]"),
        ({"kwargs": [{}]}, r"kwargs is \[{}\]; it has an object for each of the 2 instructions"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(change, message, tmp_path):
    row = {name: value for name, value in (ROW | change).items() if name not in change or change[name] is not None}
    with pytest.raises(RecordError, match=f"data.jsonl:2: {message}"):
        read_instructed(written(tmp_path / "data.jsonl", ROW | {"key": 1}, row))
    with pytest.raises(RecordError, match="key 7 occurs twice"):
        read_instructed(written(tmp_path / "data.jsonl", ROW, ROW))


@needs_data
def test_evaluation_of_a_run_has_the_figures_of_the_command(tmp_path):
    texts = ["one two three", "ONE, TWO", "<<title>> one.\n\nP.S. two", "- one\n- two"]

    def respond(prompts, *_):
        return [Response.of(f"{p.id}#0", p.id, 0, texts[i % 4]) for i, p in enumerate(prompts)]

    evaluation = ifeval.IFEval(DATA, most=40, respond=respond, without_nltk_data=True)
    cfg = SimpleNamespace(sampling=SamplingConfig(max_new_tokens=4, batch_size=512))
    with Run.open(tmp_path, Seeded()) as run:
        found = evaluation(tiny.make_lm(), cfg, run.at("base"))["evals"]["ifeval"]
        stored = run.at("base").finished("eval_ifeval_prompts", of=Prompt)
    given = {f"ifeval-{prompt.id}": prompt for prompt in read_instructed(DATA, 40)}
    prompts = [given[prompt.id] for prompt in stored]
    expected = figures(prompts, [check(prompt, texts[i % 4]) for i, prompt in enumerate(prompts)])
    assert found["prompts"] + found["left_out"] == 40 and found["prompts"] == len(prompts) > 10
    for name in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"):
        assert found[name] == {"mean": expected[name], "ci95": expected[f"{name}_ci95"]}
    assert 0 < found["instruction_strict"]["mean"] <= found["instruction_loose"]["mean"] < 1


def test_command_checks_responses(tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", ROW, ROW | {"key": 8, "prompt": "Say goodbye."})
    responses = written(
        tmp_path / "responses.jsonl",
        {"prompt": "Say hello.", "response": "<think>x, y</think>\none two three"},
        {"prompt": "unknown", "response": "x"},
    )
    words = ["eval", "ifeval", "--data", str(data)]
    assert main([*words, "--responses", str(responses), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt_strict"], found["instruction_strict"], found["no_response"]) == (0.5, 0.5, 1)
    checks = [json.loads(line) for line in (tmp_path / "out" / "checks.jsonl").read_text().splitlines()]
    assert [row["strict"] for row in checks] == [[True, True], [False, False]]
    assert main([*words, "--responses", str(responses)]) == 0
    assert "2 prompts, 4 instructions; left out for want of data: 0; without a response: 1" in capsys.readouterr().out
    assert main(words) == 2


def test_a_killed_command_samples_no_response_twice_and_refuses_other_settings(tmp_path, capsys, monkeypatch):
    lmlib.export(tiny.make_lm(), tmp_path / "model", dtype="float32")
    monkeypatch.setattr(eval_answers, "mesh_for", lambda *_: tiny.mesh())
    rows = [ROW | {"key": i, "prompt": f"Say hello, {name}."} for i, name in enumerate(("cat", "dog", "pie"))]
    out, data = tmp_path / "out", written(tmp_path / "data.jsonl", *rows)
    words = ["eval", "ifeval", tmp_path / "model", "--data", data, "-o", out, "--dtype", "float32", "--batch-size", "2"]
    words = [*map(str, words), "--max-new-tokens", "5", "--json"]
    assert main([*words, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["responses"] == plan["total"] and plan["total"]["completion_tokens"] == 15 and not out.exists()
    sampled, generate = [], sampling.generate

    def watched(lm, prompts, **settings):
        if sampled == ["0", "1"] and stopping:
            raise KeyboardInterrupt
        sampled.extend(prompt.id for prompt in prompts)
        return generate(lm, prompts, **settings)

    monkeypatch.setattr(sampling, "generate", watched)
    stopping = True
    assert main(words) == 130
    stopping = False
    assert main(words) == 0
    assert sampled == ["0", "1", "2"]
    assert json.loads(capsys.readouterr().out)["prompts"] == 3
    found = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [(row["key"], row["prompt"]) for row in found] == [(str(row["key"]), row["prompt"]) for row in rows]
    assert main([*words, "--temperature", "0.5"]) == 2
    assert "temperature: 0.0 -> 0.5" in capsys.readouterr().err
