"""MT-Bench: published judgments score as published, FastChat's formats, and a run that is killed asks nothing twice."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from jaxsi.cli.main import main
from jaxsi.evals import mt_bench
from jaxsi.evals.answer_cache import AnswerCache, EvaluationError
from jaxsi.evals.judging import plan_texts
from jaxsi.evals.mt_bench_prompts import TEMPLATES, read_templates
from jaxsi.evals.mt_bench_scores import pair_scores, rating, read_judgments, single_scores, verdict
from jaxsi.runs.records import RecordError, Response
from jaxsi.stages.verdicts import JudgeConfig

DATA = Path(__file__).parents[3] / "shared" / "data" / "mt_bench"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published judgments are not here")
CFG = JudgeConfig(num_samples=1, temperature=0.0, top_p=1.0, batch_size=2)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Writes by a function of the messages, and keeps what it was asked and at which temperature."""

    name: str
    speak: object
    asked: list = dataclasses.field(default_factory=list, compare=False)

    @property
    def fingerprint(self):
        return self.name

    @property
    def template(self):
        return ""

    def write(self, requests, cfg, key, num_samples, forced=()):
        self.asked.extend((request.messages, cfg.temperature) for request in requests)
        texts = {request.id: self.speak(request.messages) for request in requests}
        return {id: [Response.of(f"{id}#0", id, 0, text)] for id, text in texts.items() if text is not None}


@pytest.fixture(autouse=True)
def _speakers_have_names(monkeypatch):
    from jaxsi.evals import judging

    monkeypatch.setattr(judging, "describe_config", lambda judge: judge.name)


def folder_of(path, categories=("writing", "math")):
    """A folder of data with one question of each category."""
    questions = [
        {"question_id": 81 + i, "category": category, "turns": [f"first {i}", f"second {i}"]}
        for i, category in enumerate(categories)
    ]
    references = mt_bench.answer_rows("gpt-4", {q["question_id"]: ("ref one", "ref two") for q in questions}, now=0.0)
    (path / "reference_answer").mkdir(parents=True)
    for name, rows in (("question.jsonl", questions), ("reference_answer/gpt-4.jsonl", references)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judgment(question_id, turn, score, model="m", judge="j"):
    return {"question_id": question_id, "turn": turn, "model": model, "score": score, "judge": [judge, "single-v1"]}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------- published figures


def published(name):
    text = gzip.decompress((DATA / "judgments" / f"{name}_gpt-4_single.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.split("\n") if line]


@needs_data
@pytest.mark.parametrize(
    ("file", "model", "figures"),
    [
        ("llama2chat7b", "llama-2-chat-7b", (6.86875, 5.94375, 6.40625)),
        ("orpo", "mistral-orpo-capybara", (7.125, 6.5125, 6.81875)),
        ("orpo", "mistral-orpo-trl", (7.73125, 6.600, 7.165625)),
        ("orpo", "mistral-orpo-mix", (6.43125, 5.575, 6.003125)),
    ],
)
def test_published_judgments_have_the_published_scores(file, model, figures):
    grades, _ = read_judgments([DATA / "judgments" / f"{file}_gpt-4_single.jsonl.gz"])
    found = single_scores(grades)[model]
    assert (found["turn_1"], found["turn_2"], found["score"]) == figures
    assert found["by_rows"]["score"] == found["score"]
    assert (found["judgments"], found["errors"], found["duplicates"]) == (160, 0, 0)
    assert len(found["categories"]) == 8


@needs_data
def test_a_model_judged_twice_has_the_score_of_the_last_time_and_fastchats_beside_it():
    grades, _ = read_judgments([DATA / "judgments" / "orpo_gpt-4_single.jsonl.gz"])
    found = single_scores(grades)["mistral-orpo"]
    assert found["score"] == pytest.approx(6.328, abs=5e-4)
    assert found["by_rows"]["score"] == pytest.approx(5.859, abs=5e-4)
    assert (found["judgments"], found["duplicates"]) == (160, 160)


@needs_data
def test_scores_and_winners_are_read_from_texts_as_fastchat_reads_them():
    rows = [row for name in ("llama2chat7b", "orpo") for row in published(name)]
    assert len(rows) == 1120
    assert [-1 if (score := rating(row["judgment"])) is None else score for row in rows] == [r["score"] for r in rows]
    for line in (DATA / "judgments" / "skycamp_gpt-4_pair.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        games = [mt_bench.WINNERS[n - 1][verdict(row[f"g{n}_judgment"])] for n in (1, 2)]
        assert games == [row["g1_winner"], row["g2_winner"]]


@needs_data
def test_judge_prompts_have_the_official_markers_in_the_official_order():
    official = read_templates(DATA / "judge_prompts.jsonl")
    for name, ours in TEMPLATES.items():
        instruction = "[Instruction]" in ours.user
        skeleton = [text.split("\n\n", 1)[1] if instruction else text for text in (ours.user, official[name].user)]
        assert skeleton[0] == skeleton[1], name
        for text in (ours.system + ours.user, official[name].system + official[name].user):
            assert ("[[A]]" in text) == name.startswith("pair") and ("[[5]]" in text) == name.startswith("single")
        assert ours.system == official[name].system or ours.system[:40] != official[name].system[:40]


@needs_data
def test_official_questions_answers_and_references_are_read():
    questions = mt_bench.read_questions(DATA)
    assert len(questions) == 80 and sum(q.references is not None for q in questions) == 30
    temperatures = {q.category: q.temperature for q in questions}
    assert temperatures == {
        "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0, "math": 0, "coding": 0,
        "reasoning": 0,
    }  # fmt: skip
    model, answers = mt_bench.read_answers(DATA / "model_answer" / "claude-v1.jsonl.gz")
    assert model == "claude-v1"
    mt_bench.complete(questions, answers, "claude-v1")
    tasks = mt_bench.single_tasks(questions, answers, read_templates(DATA / "judge_prompts.jsonl"))
    assert len(tasks) == 160 and sum(task.template.startswith("single-math") for task in tasks) == 60


@needs_data
def test_requests_with_the_official_prompts_are_those_in_the_published_judgments():
    """The published judgments hold what the judge was sent, and so the model's answers too."""
    rows = [row for row in published("llama2chat7b") if row["model"] == "llama-2-chat-7b"]
    questions = {q.question_id: q for q in mt_bench.read_questions(DATA)}
    answers: dict[int, tuple[str, ...]] = {}
    for row in rows:
        if row["turn"] == 2:  # the second turn shows both answers
            after = row["user_prompt"].split("<|The Start of Assistant A's Conversation with User|>")[1]
            first = after.split("### Assistant A:\n", 1)[1]
            second = first.split("\n\n### User:\n" + questions[row["question_id"]].turns[1] + "\n\n### Assistant A:\n")
            end = "\n\n<|The End of Assistant A's Conversation with User|>"
            answers[row["question_id"]] = second[0], second[1].removesuffix(end)
    tasks = mt_bench.single_tasks(list(questions.values()), answers, read_templates(DATA / "judge_prompts.jsonl"))
    sent = {(task.question.question_id, task.turn): task.request.messages[-1]["content"] for task in tasks}
    assert {(row["question_id"], row["turn"]): row["user_prompt"] for row in rows} == sent


# ------------------------------------------------------------------------------------------------------------ scores


def test_errors_are_dropped_and_counted_and_a_later_judgment_replaces_one(tmp_path):
    rows = [judgment(81, 1, 4), judgment(81, 2, -1), judgment(82, 1, 8), judgment(81, 1, 6), judgment(82, 2, -1)]
    rows.append(judgment(82, 2, 9))
    grades, _ = read_judgments([written(tmp_path / "j.jsonl", rows)])
    found = single_scores(grades)["m"]
    assert (found["turn_1"], found["turn_2"]) == (7.0, 9.0)
    assert found["score"] == pytest.approx((6 + 8 + 9) / 3)
    assert (found["judgments"], found["errors"], found["duplicates"]) == (3, 1, 2)
    assert found["by_rows"]["score"] == pytest.approx((4 + 8 + 6 + 9) / 4)


def test_two_judges_are_no_duplicates(tmp_path):
    grades, _ = read_judgments([written(tmp_path / "j.jsonl", [judgment(81, 1, 4, judge="a"), judgment(81, 1, 8)])])
    assert single_scores(grades)["m"]["duplicates"] == 0
    assert single_scores(grades)["m"]["score"] == 6
    assert single_scores(grades)["m"]["judges"] == ["a", "j"]


def test_a_win_needs_the_same_winner_in_both_orders(tmp_path):
    games = [("model_1", "model_1"), ("model_1", "model_2"), ("tie", "tie"), ("model_2", "model_2"), ("error", "tie")]
    rows = [
        {"question_id": 81 + i, "turn": 1, "model_1": "a", "model_2": "b", "judge": "j"}
        | {"g1_winner": first, "g2_winner": second}
        for i, (first, second) in enumerate([*games, ("model_1", "model_1")])
    ]
    _, matches = read_judgments([written(tmp_path / "j.jsonl", rows)])
    found = pair_scores(matches)
    assert [found["a"][name] for name in ("win", "loss", "tie", "errors")] == [2, 1, 2, 1]
    assert found["a"]["win_rate_adjusted"] == pytest.approx(3 / 5)
    assert found["b"]["win_rate_adjusted"] == pytest.approx(2 / 5)
    assert found["a"]["consistent"] == pytest.approx(4 / 5)
    assert list(pair_scores(matches, "a")) == ["b"]
    # The same match with the models in the other order is judged twice.
    again = dataclasses.replace(matches[0], model_1="b", model_2="a", g1_winner="model_1", g2_winner="model_1")
    assert pair_scores([*matches, again])["a"]["duplicates"] == 1
    assert pair_scores([*matches, again])["a"]["win"] == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7), ("[[7.5]] and [[2]]", 7.5), ("[3] then [[8]]", 8), ("Rating: [6]", 6), ("[[x]] 5", None),
        ("", None), ("[[10]]", 10), ("Rating: 9", None),
    ],
)  # fmt: skip
def test_rating_is_the_first_double_bracket_else_the_first_single_one(text, score):
    assert rating(text) == score


MATCH = {"question_id": 81, "turn": 1, "judge": "j", "g1_winner": "tie", "g2_winner": "tie"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([judgment(81, 1, 7)], ":1: a judgment is a JSON object"),
        (judgment(81, 1, 7, model=None), ":1: model is None; it is the name of a model"),
        (MATCH | {"model_1": "a", "model_2": ""}, ":1: model_2 is ''; it is the name of a model"),
        (MATCH | {"model_1": "a", "model_2": "a"}, ":1: model_1 and model_2 are both 'a'"),
    ],
)
def test_a_judgment_is_about_named_models(tmp_path, row, message):
    with pytest.raises(RecordError, match=message):
        read_judgments([written(tmp_path / "rows.jsonl", [row])])


@given(st.text())
def test_no_text_breaks_the_parsers(text):
    assert rating(text) is None or rating(text) >= 0
    assert verdict(text) in (None, "A", "B", "C")


# ------------------------------------------------------------------------------------------------------ answer, judge


def test_second_turn_sees_the_first_answer_and_each_category_has_its_temperature(tmp_path):
    questions = mt_bench.read_questions(folder_of(tmp_path, ("writing", "math", "stem")))
    asked = []

    def respond(part, prompts, temperature):
        asked.extend((part, prompt.messages[0]["content"], temperature) for prompt in prompts)
        return [f"answer {len(prompt.messages)} to {prompt.messages[-1]['content']}" for prompt in prompts]

    answers = mt_bench.answer(respond, questions)
    assert answers[81] == ("answer 1 to first 0", "answer 3 to second 0")
    assert {text: temperature for _, text, temperature in asked} == {"first 0": 0.7, "first 1": 0.0, "first 2": 0.1}
    parts = [part for part, *_ in asked]
    assert len(set(parts)) == 6 and parts[0] == "turn_1_at_0.7"  # a part of the run for each turn and temperature
    asked.clear()
    mt_bench.answer(respond, questions, 0.3)
    assert {temperature for *_, temperature in asked} == {0.3}


def test_judge_sees_references_only_where_the_category_has_them(tmp_path):
    questions = mt_bench.read_questions(folder_of(tmp_path))
    answers = {81: ("one {answer}", "two"), 82: ("three", "four")}
    tasks = mt_bench.single_tasks(questions, answers, TEMPLATES)
    texts = {(task.question.category, task.turn): task.request.messages[-1]["content"] for task in tasks}
    assert "one {answer}" in texts["writing", 1]  # a slot in an answer stays text
    assert "two" not in texts["writing", 1] and "ref one" not in texts["writing", 1]
    assert "ref one" in texts["math", 1] and "ref two" not in texts["math", 1]
    assert all(text in texts["math", 2] for text in ("ref one", "ref two", "three", "four", "second 1"))


def test_grades_are_written_in_fastchats_format_and_read_again(tmp_path):
    questions = mt_bench.read_questions(folder_of(tmp_path))
    answers = {81: ("one", "long"), 82: ("three", "four")}
    tasks = mt_bench.single_tasks(questions, answers, TEMPLATES)

    def grade(messages):
        text = messages[-1]["content"]
        return None if "long" in text else "no grade" if "four" in text else f"Rating: [[{len(text) % 10}]]"

    rows = mt_bench.grade(AnswerCache(tmp_path / "a.jsonl"), Speaker("j", grade), tasks, CFG, model="m", judge="j")
    assert [row["judge"][1] for row in rows] == [
        "single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn",
    ]  # fmt: skip
    assert [row["score"] for row in rows[2:]] == [-1, -1]
    assert rows[2]["judgment"] == "$ERROR$"
    grades, _ = read_judgments([written(tmp_path / "j.jsonl", rows)])
    assert single_scores(grades)["m"]["errors"] == 2
    # A request that had no room is asked again, a text without a grade is not.
    requests = [task.request for task in tasks]
    assert plan_texts(AnswerCache(tmp_path / "a.jsonl"), Speaker("j", None), requests, CFG)[:3] == (4, 3, 1)
    later = Speaker("j", lambda messages: "[[9]]")
    rows = mt_bench.grade(AnswerCache(tmp_path / "a.jsonl"), later, tasks, CFG, model="m", judge="j")
    assert len(later.asked) == 1 and rows[2]["score"] == 9


def test_pairs_are_judged_in_both_orders_and_a_judge_that_likes_the_first_ties(tmp_path):
    questions = mt_bench.read_questions(folder_of(tmp_path))
    first, second = {81: ("good", "good"), 82: ("good", "good")}, {81: ("bad", "bad"), 82: ("bad", "bad")}
    tasks = mt_bench.pair_tasks(questions, first, second, TEMPLATES)
    assert len(tasks) == 8

    def fair(messages):
        text = messages[-1]["content"]
        return "[[A]]" if text.index("good") < text.index("bad") else "[[B]]"

    found = {}
    for name, speak in (("fair", fair), ("first", lambda _: "[[A]]"), ("silent", lambda _: "hm")):
        cache = AnswerCache(tmp_path / f"{name}.jsonl")
        rows = mt_bench.compare(cache, Speaker(name, speak), tasks, CFG, models=("x", "y"), judge=name)
        found[name] = pair_scores(read_judgments([written(tmp_path / "j.jsonl", rows)])[1])["x"]
    assert (found["fair"]["win"], found["first"]["tie"], found["silent"]["errors"]) == (4, 4, 4)
    assert found["first"]["consistent"] == 0


def test_a_kill_loses_one_part_and_nothing_is_asked_twice(tmp_path):
    questions = mt_bench.read_questions(folder_of(tmp_path, ("writing",) * 10))
    answers = {q.question_id: (f"one {q.question_id}", "two") for q in questions}
    tasks = mt_bench.single_tasks(questions, answers, TEMPLATES)
    first = Speaker("j", lambda messages: "[[5]]")

    def dies(messages):
        if len(first.asked) > 7:
            raise KeyboardInterrupt
        return "[[5]]"

    cache = AnswerCache(tmp_path / "a.jsonl")
    dying = dataclasses.replace(first, speak=dies)
    with pytest.raises(KeyboardInterrupt):
        mt_bench.grade(cache, dying, tasks, CFG, model="m", judge="j")
    later = Speaker("j", lambda messages: "[[5]]")
    rows = mt_bench.grade(AnswerCache(tmp_path / "a.jsonl"), later, tasks, CFG, model="m", judge="j")
    assert len(rows) == 20
    kept = [messages for messages, _ in first.asked[:-2]]  # the part in flight is lost
    assert not [messages for messages, _ in later.asked if messages in kept]
    assert len(kept) + len(later.asked) == 20


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": "x"}, "question_id is 'x'; it is a whole number"),
        ({"question_id": 81, "turns": []}, r"turns is \[\]"),
        ({"question_id": 81, "turns": ["a"]}, "category is None"),
    ],
)
def test_a_bad_question_is_refused_with_its_line(row, message, tmp_path):
    written(tmp_path / "question.jsonl", [row])
    with pytest.raises(RecordError, match=message):
        mt_bench.read_questions(tmp_path)


def test_missing_references_and_answers_are_refused_before_a_token_is_spent(tmp_path):
    folder = folder_of(tmp_path)
    questions = mt_bench.read_questions(folder)
    with pytest.raises(EvaluationError, match="1 of 2 turns of question 82 are answered"):
        mt_bench.complete(questions, {81: ("a", "b"), 82: ("c",)}, "answers.jsonl")
    (folder / "reference_answer" / "gpt-4.jsonl").write_text(
        json.dumps(mt_bench.answer_rows("gpt-4", {81: ("a", "b")})[0])
    )
    with pytest.raises(RecordError, match=r"question 82 .* needs 2 reference answers"):
        mt_bench.read_questions(folder)


def test_judge_prompts_with_other_slots_are_refused(tmp_path):
    rows = [{"name": t.name, "system_prompt": t.system, "prompt_template": t.user} for t in TEMPLATES.values()]
    assert read_templates(written(tmp_path / "p.jsonl", rows)) == TEMPLATES
    with pytest.raises(RecordError, match="no judge prompt 'pair-math-v1-multi-turn'"):
        read_templates(written(tmp_path / "p.jsonl", rows[:-1]))
    rows[0]["prompt_template"] = "{question}"
    with pytest.raises(RecordError, match=r"p.jsonl:1: single-v1 has the slots question; it needs question, answer"):
        read_templates(written(tmp_path / "p.jsonl", rows))


def test_a_dry_run_counts_what_is_missing_and_a_baseline_is_another_model(tmp_path, capsys):
    data = folder_of(tmp_path / "data")
    (data / "model_answer").mkdir()
    for name in ("mine", "theirs"):
        answers = mt_bench.answer_rows(name, {81: (name, "b"), 82: (name, "d")})
        written(data / "model_answer" / f"{name}.jsonl", answers)
    words = ["eval", "mt-bench", "--answers", str(data / "model_answer" / "mine.jsonl"), "--data", str(data)]
    words += ["--judge", "endpoint:judge,base_url=http://127.0.0.1:9/v1", "--out", str(tmp_path / "out"), "--dry-run"]
    pair = ["--mode", "pair", "--baseline", "theirs"]
    assert main([*words, *pair, "--judge-seeds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judge"]["calls"] == 16
    assert main([*words, *pair, "--name", "theirs"]) == 2
    assert "the model and the baseline are both theirs" in capsys.readouterr().err


def test_command_scores_files_of_judgments(tmp_path, capsys):
    path = written(tmp_path / "j.jsonl", [judgment(81, 1, 4), judgment(81, 2, -1)])
    assert main(["eval", "mt-bench", "--judgments", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["single"]["m"]
    assert (found["score"], found["errors"], found["categories"]) == (4.0, 1, {"writing": 4.0})
    assert main(["eval", "mt-bench", "--judgments", str(path)]) == 0
    assert "writing" in capsys.readouterr().out
    assert main(["eval", "mt-bench"]) == 2
    assert main(["eval", "mt-bench", "MODEL"]) == 2
    assert "--data and --out are missing" in capsys.readouterr().err
