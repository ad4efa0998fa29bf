"""Arena-Hard: weighted games worked out by hand, its formats, real battles, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxsi.cli.main import main
from jaxsi.evals import arena_hard
from jaxsi.evals.answer_cache import AnswerCache, EvaluationError
from jaxsi.evals.arena_hard import Games, battle_scores, label_of, read_judgments, scores
from jaxsi.runs.records import RecordError, Response
from jaxsi.stages.verdicts import JudgeConfig

DATA = Path(__file__).parents[3] / "shared" / "data" / "arena_hard"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="Arena-Hard's data are not here")
CFG = JudgeConfig(num_samples=1, temperature=0.0, top_p=1.0, batch_size=2)


class Speaker:
    """Writes by a function of the user's message, and keeps what it was asked."""

    fingerprint = template = name = "speaker"

    def __init__(self, speak):
        self.speak, self.asked = speak, []

    def write(self, requests, cfg, key, num_samples, forced=()):
        self.asked += [request.messages for request in requests]
        return {r.id: [Response.of(f"{r.id}#0", r.id, 0, self.speak(r.messages[-1]["content"]))] for r in requests}


@pytest.fixture(autouse=True)
def _speakers_have_names(monkeypatch):
    from jaxsi.evals import judging

    monkeypatch.setattr(judging, "describe_config", lambda judge: judge.name)


def games(first, second, uid="1", **changes):
    return Games(**{"uid": uid, "model": "m", "judge": "j", "category": "c", "labels": (first, second)} | changes)


def judgment(uid, first, second, model="m", **more):
    return {"uid": uid, "model": model, "judge": "j", "games": [{"score": first}, {"score": second}]} | more


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_score_is_the_mean_over_weighted_games():
    found = scores([games("A>>B", "A>B", "1"), games("B>A", "A=B", "2"), games("A=B", "B>>A", "3")])["m"]
    # The baseline is A in the first game: A>>B is three losses. 0*3 + 1 + 1 + 1/2 + 1/2 + 0*3 of 4 + 2 + 4 games.
    assert found["games"] == 10 and found["score"] == pytest.approx(3 / 10)
    assert found["consistent"] == 0
    assert found["interval"][0] <= found["score"] <= found["interval"][1]
    assert scores([games("B>>A", "A>>B")])["m"] == scores([games("B>A", "A>B")])["m"] | {"games": 6}
    # The other spellings of the same verdicts.
    assert scores([games("B<<A", "B<A")])["m"]["score"] == scores([games("A>>B", "A>B")])["m"]["score"] == 0.25


def test_games_without_a_label_are_dropped_and_counted_and_a_later_judgment_replaces_one(tmp_path):
    rows = [
        judgment("1", "A>B", "B>A"),
        judgment("1", "B>A", "A>B"),
        judgment("2", None, "A>B"),
        judgment("3", "A", "A=B"),
    ]
    found = scores(read_judgments([written(tmp_path / "j.jsonl", rows)]))["m"]
    assert (found["score"], found["judged"], found["errors"], found["duplicates"]) == (1.0, 1, 2, 1)
    nothing = scores([games(None, "A>B")])["m"]
    assert (nothing["score"], nothing["interval"], nothing["errors"]) == (None, None, 1)


def test_interval_covers_the_truth_and_prompts_are_wider_than_games():
    rng = np.random.default_rng(0)
    labels = ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
    mirrored = {"A>>B": "B>>A", "A>B": "B>A", "A=B": "A=B", "B>A": "A>B", "B>>A": "A>>B"}
    rows = [games(mirrored[label], label, str(i)) for i, label in enumerate(rng.choice(labels, 400))]
    found = scores(rows)["m"]
    assert found["consistent"] == 1
    wide = found["interval_by_prompt"][1] - found["interval_by_prompt"][0]
    assert wide > 1.3 * (found["interval"][1] - found["interval"][0])
    assert found["interval_by_prompt"][0] < 0.5 < found["interval_by_prompt"][1]


@needs_data
def test_real_battles_have_the_mean_of_their_weighted_games():
    found = battle_scores(DATA / "battles_20240718.jsonl.gz")
    assert sum(row["games"] for row in found.values()) == 2136
    total = sum(row["games"] * row["score"] for row in found.values())
    assert total == pytest.approx(347 + 31 / 2)
    assert all(row["interval"][0] < row["score"] < row["interval"][1] for row in found.values())


@needs_data
@pytest.mark.parametrize(("version", "count"), [("v0.1", 500), ("v2.0", 750)])
def test_official_questions_are_read(version, count):
    questions = arena_hard.read_questions(DATA / f"arena-hard-{version}" / "question.jsonl.gz")
    assert len(questions) == count
    if version == "v0.1":
        model, answers = arena_hard.read_answers(DATA / "arena-hard-v0.1" / "model_answer" / "gpt-4-0314.jsonl.gz")
        assert model == "gpt-4-0314" and answers.keys() == questions.keys()
        assert len(arena_hard.game_requests(questions, answers, answers)) == 1000


@needs_data
def test_judge_prompt_has_the_official_markers_in_the_official_order():
    official = (DATA / "config" / "arena-hard-v2.0.yaml").read_text(encoding="utf-8")
    line = next(line for line in official.splitlines() if line.startswith("prompt_template"))
    template = json.loads(line.partition(": ")[2]).replace("{QUESTION}", "q").replace("{ANSWER_A}", "x")
    request, swapped = arena_hard.game_requests({"1": ("q", "c")}, {"1": "y"}, {"1": "x"})
    assert request.messages[1]["content"] == template.replace("{ANSWER_B}", "y")
    assert swapped.messages[1]["content"] == request.messages[1]["content"].replace("x\n<", "z\n<").replace(
        "y\n<", "x\n<"
    ).replace("z\n<", "y\n<")


def test_both_orders_are_judged_once_and_kept(tmp_path):
    questions = {"1": ("q {1}", "hard"), "2": ("r", "hard")}
    answers, baseline = {"1": "good", "2": "good"}, {"1": "bad", "2": "bad"}

    def fair(text):
        return "so [[A>>B]]" if text.index("good\n<") < text.index("bad\n<") else "so [[B>>A]]"

    judge = Speaker(fair)
    for _ in range(2):
        rows = arena_hard.judge_games(
            AnswerCache(tmp_path / "a.jsonl"), judge, questions, answers, baseline, CFG, model="m", judge="j"
        )
    assert len(judge.asked) == 4 and "q {1}" in judge.asked[0][1]["content"]
    found = scores(read_judgments([written(tmp_path / "j.jsonl", rows)]))["m"]
    assert (found["score"], found["consistent"], found["games"]) == (1.0, 1.0, 12)
    with pytest.raises(EvaluationError, match="the baseline has no answer to the prompt 2"):
        arena_hard.game_requests(questions, answers, {"1": "bad"})


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("[[A>B]]", "A>B"), ("first [[A>B]], no: [[B>>A]]", "B>>A"), ("[A=B]", "A=B"), ("[B>A] but [[A>B]]", "A>B"),
        ("[[AB]]", None), ("none", None),
    ],
)  # fmt: skip
def test_label_is_the_last_one_in_double_brackets_else_in_single_ones(text, label):
    assert label_of(text) == label


@given(st.text(alphabet="[]AB<>= x"))
def test_no_text_breaks_the_parser(text):
    assert label_of(text) is None or games(label_of(text), label_of(text)).weighted is not None


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (lambda path: read_judgments([path]), {"uid": "1", "model": "m", "games": []}, ":1: a judgment has a uid"),
        (arena_hard.read_questions, {"uid": 3}, ":1: a question has the texts uid and prompt"),
        (arena_hard.read_answers, {"uid": "1", "messages": []}, ":1: an answer has a uid, and messages"),
        (battle_scores, {"model_a": "x", "winner": "y"}, ":1: a battle has model_a"),
        (battle_scores, [1], ":1: a row is a JSON object"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(reader, row, message, tmp_path):
    with pytest.raises(RecordError, match=message):
        reader(written(tmp_path / "rows.jsonl", [row]))


def test_answers_are_read_as_they_were_written(tmp_path):
    rows = arena_hard.answer_rows("m", {"1": ("q", "c")}, {"1": "text"}, now=0.0)
    assert arena_hard.read_answers(written(tmp_path / "a.jsonl", rows)) == ("m", {"1": "text"})


def test_command_scores_judgments_and_battles(tmp_path, capsys):
    path = written(tmp_path / "j.jsonl", [judgment("1", "B>A", "A>>B", category="hard"), judgment("2", "A>B", "A=B")])
    assert main(["eval", "arena-hard", "--judgments", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]["m"]
    assert found["score"] == pytest.approx((4 + 0.5) / 6)
    assert found["categories"] == {"hard": 1.0, "": pytest.approx(0.25)}
    battles = written(tmp_path / "b.jsonl", [{"model_a": "x", "model_b": "y", "winner": "tie"}])
    assert main(["eval", "arena-hard", "--battles", str(battles)]) == 0
    assert "x vs y" in capsys.readouterr().out
    assert main(["eval", "arena-hard", "MODEL"]) == 2
    assert "--data, --baseline and --out are needed" in capsys.readouterr().err
