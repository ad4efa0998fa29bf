"""Loaders on small files of each format, their errors, and the judge's training data (EFT)."""

import csv
import json
from collections import Counter

import pytest

from jaxsi.runs.records import Judgment, RankedResponses, SFTExample
from jaxsi.stages import datasets
from jaxsi.stages.datasets import SourceError, as_responses, eft_examples, transcript_messages
from jaxsi.stages.prompts import Rubric

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    from datasets import config, disable_progress_bars

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    disable_progress_bars()


def write(folder, rows, suffix="jsonl"):
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return str(path)


def oasst_row(id, parent, role, text, rank=None, lang="en"):
    return {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": lang, "tree": 1}


OASST = [
    oasst_row("r1", None, "prompter", "Why?"),
    oasst_row("a1", "r1", "assistant", "worse", 1.0),
    oasst_row("a2", "r1", "assistant", "best", 0.0),
    oasst_row("a3", "r1", "assistant", "unranked"),
    oasst_row("f1", "a2", "prompter", "And then?"),
    oasst_row("f2", "f1", "assistant", "a second turn", 0.0),
    oasst_row("r2", None, "prompter", "\u00bfPor qu\u00e9?", lang="es"),
    oasst_row("a4", "r2", "assistant", "porque", 0.0, lang="es"),
    oasst_row("r3", None, "prompter", "How?"),
    oasst_row("a5", "r3", "assistant", "only", 0.0),
    oasst_row("r4", None, "prompter", "No reply"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_oasst(tmp_path, suffix):
    path = write(tmp_path, OASST, suffix)
    assert datasets.oasst(path) == [
        SFTExample(id="r1", messages=({"role": "user", "content": "Why?"},), response="best"),
        SFTExample(id="r3", messages=({"role": "user", "content": "How?"},), response="only"),
    ]
    (ranked,) = datasets.oasst_rankings(path)
    assert (ranked.id, ranked.responses, ranked.ranks) == ("r1", ("best", "worse"), (0, 1))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_tulu2_mixture(tmp_path, suffix):
    system = {"role": "system", "content": "Be brief"}
    rows = [
        {"id": "a", "messages": [USER, REPLY]},
        {"id": "b", "messages": [system, USER, REPLY, USER, {"role": "assistant", "content": "Again?"}, USER]},
        {"id": "c", "messages": [USER]},
        {"id": "d", "messages": [USER, {"role": "assistant", "content": " "}]},
    ]
    assert datasets.tulu2_mixture(write(tmp_path, rows, suffix)) == [
        SFTExample(id="a", messages=(USER,), response="Hello"),
        SFTExample(id="b", messages=(system, USER, REPLY, USER), response="Again?"),
    ]


def test_nectar(tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: "
    answers = [{"answer": text, "rank": rank, "model": "m"} for text, rank in [("b", 2.0), ("a", 1.0), ("d", 4.0)]]
    (ranked,) = datasets.nectar(write(tmp_path, [{"prompt": prompt, "answers": answers}]))
    assert ranked.messages == (USER,)
    assert (ranked.responses, ranked.ranks) == (("a", "b", "d"), (0, 1, 2))


def test_ultrafeedback(tmp_path):
    completions = [
        {"response": r, "overall_score": s} for r, s in [("low", 2.5), ("high", 9.0), ("too", 9.0), ("mid", 4.0)]
    ]
    (ranked,) = datasets.ultrafeedback(write(tmp_path, [{"instruction": "Hi", "completions": completions}]))
    assert ranked.messages == (USER,)
    assert (ranked.responses, ranked.ranks) == (("high", "too", "mid", "low"), (0, 0, 1, 2))


def test_ultrafeedback_leaves_out_wrong_scores_and_empty_rows(tmp_path, caplog):
    """In the published set some overall scores of 1 became 10; the fine-grained ones show it."""
    scored = [("bad", 10.0, 1.0), ("good", 8.5, 4.5), ("fair", 6.0, 3.0), ("unrated", 9.0, None)]
    completions = [{"response": r, "overall_score": s, "fine-grained_score": f} for r, s, f in scored]
    rows = [{"instruction": "Hi", "completions": completions}, {"instruction": "Ho", "completions": []}]
    (ranked,) = datasets.ultrafeedback(write(tmp_path, rows))
    assert ranked.responses == ("unrated", "good", "fair")
    assert "1 completions with a wrong overall score are left out" in caplog.text
    assert "1 instructions without completions are left out" in caplog.text


def test_ultrafeedback_reads_scores_as_people_store_them(tmp_path, caplog):
    """As texts, absent, or wrong in the other direction; a row without completions may hold null."""
    scored = [
        ("bad", "10", "1.25"),
        ("good", "8.5", "4.5"),
        ("none", "N/A", "3"),
        ("swapped", 1, 5.0),
        ("poor", 3, 1.5),
    ]
    completions = [{"response": r, "overall_score": str(s), "fine-grained_score": str(f)} for r, s, f in scored]
    rows = [{"instruction": "Hi", "completions": completions}, {"instruction": "Ho", "completions": None}]
    (ranked,) = datasets.ultrafeedback(write(tmp_path, rows))
    assert (ranked.responses, ranked.ranks) == (("good", "poor"), (0, 1))
    assert "2 completions with a wrong overall score are left out, the first in row 0" in caplog.text
    assert "1 completions without an overall score are left out" in caplog.text
    assert "1 instructions without completions are left out, the first in row 1" in caplog.text


def test_nectar_leaves_out_rows_that_are_no_prompts(tmp_path, caplog):
    answers, turn = [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2.0}], "\n\nHuman: Hi\n\nAssistant: "
    rows = [{"prompt": "Hi", "answers": answers}, {"prompt": turn, "answers": answers}, {"prompt": turn, "answers": []}]
    rows.append({"prompt": "\n\nHuman: Hi\n\nAssistant: Half an", "answers": answers})
    (ranked,) = datasets.nectar(write(tmp_path, rows))
    assert ranked.id == "nectar-1"
    assert '2 prompts without a turn of "Human:" at the end are left out, the first in row 0' in caplog.text
    assert "1 prompts without answers are left out, the first in row 2" in caplog.text


def test_hh_rlhf(tmp_path, caplog):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Human: a colon\nAssistant: in a line"
    rows = [
        {"chosen": f"{start}\n\nAssistant: good", "rejected": f"{start}\n\nAssistant: bad"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: x", "rejected": "\n\nHuman: Ho\n\nAssistant: y"},
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Ho"},
        {"chosen": "", "rejected": ""},
    ]
    (ranked,) = datasets.hh_rlhf(write(tmp_path, rows))
    last = {"role": "user", "content": "Human: a colon\nAssistant: in a line"}
    assert ranked.messages == (USER, REPLY, last)
    assert (ranked.responses, ranked.ranks) == (("good", "bad"), (0, 1))
    assert "3 pairs without a prompt in common are left out, the first in row 1" in caplog.text


def test_transcript_keeps_blank_lines_inside_turns():
    assert transcript_messages("note\n\nHuman: one\n\ntwo\n\nAssistant: ") == (
        {"role": "user", "content": "one\n\ntwo"},
        {"role": "assistant", "content": ""},
    )


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path, [{"question": "Hi", "completions": [{"response": "x", "overall_score": 1}]}])
    with pytest.raises(
        SourceError, match=r"no column 'instruction'; it has question, completions.*columns=\{'instruction'"
    ):
        datasets.ultrafeedback(path)
    assert datasets.ultrafeedback(path, columns={"instruction": "question"})[0].messages == (USER,)
    with pytest.raises(SourceError, match=r"columns maps \['answer'\]"):
        datasets.ultrafeedback(path, columns={"answer": "x"})


@pytest.mark.parametrize(
    ("loader", "rows", "message"),
    [
        (datasets.nectar, [{"prompt": "x", "answers": "y"}], "nectar: row 0, column 'answers' holds str"),
        (datasets.nectar, [{"prompt": "x", "answers": [{"answer": "y"}]}], "no usable 'rank'"),
        (datasets.nectar, [{"prompt": "Hi", "answers": [{"answer": "y", "rank": 1}]}], "row 0 .* without .*Human:"),
        (datasets.ultrafeedback, [{"instruction": "Hi", "completions": []}], "row 0 .*: instructions without compl"),
        (datasets.hh_rlhf, [{"chosen": "x", "rejected": "y"}], "row 0 .*: pairs without a prompt in common"),
        (datasets.tulu2_mixture, [{"id": "a", "messages": [{"role": "tool", "content": "x"}]}], "row a.*role 'tool'"),
        (datasets.ultrafeedback, [{"instruction": None, "completions": []}], "row 0 has no 'instruction'"),
        (datasets.oasst, [oasst_row("a", None, "prompter", "Hi", lang="es")], "no row became a record"),
    ],
)
def test_error_names_a_row_of_another_shape(tmp_path, loader, rows, message):
    with pytest.raises(SourceError, match=message):
        loader(write(tmp_path, rows))


def test_unreadable_sources_are_errors(tmp_path):
    with pytest.raises(SourceError, match=r"the file .*nope\.jsonl does not exist"):
        datasets.oasst(str(tmp_path / "nope.jsonl"))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(SourceError, match=r"rows\.txt is not a \.json"):
        datasets.oasst(str(tmp_path / "rows.txt"))
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SourceError, match=r"pointer\.parquet is a Git LFS pointer, not the data"):
        datasets.oasst(str(tmp_path / "pointer.parquet"))
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(SourceError, match=r"oasst: cannot read .*broken\.jsonl.*check that the file is whole"):
        datasets.oasst(str(tmp_path / "broken.jsonl"))


RUBRIC = Rubric(name="test", template="Q: {prompt} A: {response}")


def ranked(id, *ranks):
    messages = ({"role": "user", "content": f"question {id}"},)
    return RankedResponses(
        id=id, messages=messages, responses=tuple(f"answer {i}" for i in range(len(ranks))), ranks=ranks
    )


def judgments(id, *texts):
    """One judgment per response; each is a tuple of K texts (or one text)."""
    rows = [(row,) if isinstance(row, str) else row for row in texts]
    return [
        Judgment(
            id=f"{id}#{i}",
            prompt_id=id,
            scores=(None,) * len(row),
            score=None,
            texts=row,
            fingerprint="weights",
            template="template",
        )
        for i, row in enumerate(rows)
    ]


def eft(pairs, **arguments):
    """eft_examples of [(ranked, judgments), ...]."""
    flat = [judgment for _, group in pairs for judgment in group]
    return eft_examples([record for record, _ in pairs], flat, RUBRIC, **({"max_share": 1.0} | arguments))


def test_as_responses_have_the_ids_that_judgments_join():
    prompts, responses = as_responses([ranked("a", 0, 1)])
    assert [p.id for p in prompts] == ["a"] and prompts[0].text == "question a"
    assert [(r.id, r.prompt_id, r.sample, r.text) for r in responses] == [
        ("a#0", "a", 0, "answer 0"),
        ("a#1", "a", 1, "answer 1"),
    ]


def test_eft_keeps_responses_that_judge_and_humans_order_alike():
    examples, counts = eft(
        [
            (ranked("a", 0, 1, 2), judgments("a", "Great. Score: 5, and so on", "Fine.\nScore: 3", "Poor. Score: 1")),
            (ranked("b", 0, 1), judgments("b", "Poor. Score: 1", "Great. Score: 4")),
            (ranked("c", 0, 1), judgments("c", "Great. Score: 4", "Great. Score: 4")),
            (ranked("d", 0, 1, 2), judgments("d", "Great. Score: 4", "Great. Score: 4", "Fine. Score: 3")),
            (ranked("e", 0, 0, 1), judgments("e", "Great. Score: 4", "Poor. Score: 1", "Hm.")),
            (ranked("f", 0, 1), judgments("f", "Great. Score: 4", "cut off")),
        ]
    )
    assert [e.id for e in examples] == ["a#0", "a#1", "a#2", "d#0", "d#1", "d#2"]
    assert [e.response for e in examples[:3]] == ["Great. Score: 5", "Fine.\nScore: 3", "Poor. Score: 1"]
    assert examples[0].messages == ({"role": "user", "content": "Q: question a A: answer 0"},)
    assert (counts["prompts"], counts["agree"], counts["disagree"], counts["examples"]) == (6, 2, 4, 6)


def test_eft_takes_the_first_agreeing_judgment_whole():
    texts = judgments(
        "a", ("No. Score: 1", "Yes. Score: 4", "Oh. Score: 5"), ("Yes. Score: 2", "No. Score: 3", "Eh. Score: 0")
    )
    examples, _ = eft([(ranked("a", 0, 1), texts)])
    assert [e.response for e in examples] == ["Yes. Score: 4", "No. Score: 3"]


def test_eft_leaves_out_bare_scores():
    examples, counts = eft([(ranked("a", 0, 1), judgments("a", "**Score: 4**", "Weak. Score: 1"))])
    assert [e.id for e in examples] == ["a#1"] and counts["no_justification"] == 1


def test_eft_leaves_out_prompts_of_the_ift_set():
    ift = [SFTExample(id="x", messages=({"role": "user", "content": " Question  A "},), response="y")]
    pairs = [(ranked(id, 0, 1), judgments(id, "Yes. Score: 4", "No. Score: 1")) for id in "ab"]
    examples, counts = eft(pairs, ift=ift)
    assert {e.id[0] for e in examples} == {"b"} and counts["in_ift"] == 1


def many():
    """120 examples: 60 of score 4, 40 of 3, 12 of 2 and 8 of 5."""
    scores = [(4, 3)] * 40 + [(4, 2)] * 12 + [(5, 4)] * 8
    return [
        (ranked(str(i), 0, 1), judgments(str(i), f"x{i}. Score: {a}", f"y{i}. Score: {b}"))
        for i, (a, b) in enumerate(scores)
    ]


def shares(examples):
    counts = Counter(e.response[-1] for e in examples)
    return {score: count / len(examples) for score, count in counts.items()}


def test_resampling_lets_no_score_dominate():
    raw, _ = eft(many())
    assert shares(raw)["4"] == 0.5
    thinned, counts = eft(many(), max_share=0.4)
    assert max(shares(thinned).values()) <= 0.4
    sizes = Counter(e.response[-1] for e in thinned)
    assert sizes == {"4": 40, "3": 40, "2": 12, "5": 8}  # the rare scores stay whole
    assert counts["thinned"] == 20 and counts["examples"] == 100


def test_resampling_depends_on_the_seed_and_not_on_the_order():
    first, _ = eft(many(), max_share=0.4, seed=1)
    again, _ = eft(many()[::-1], max_share=0.4, seed=1)
    other, _ = eft(many(), max_share=0.4, seed=2)
    assert sorted(e.id for e in first) == sorted(e.id for e in again) != sorted(e.id for e in other)


def test_share_that_cannot_be_met_is_raised_to_the_least_possible():
    pairs = [(ranked("a", 0, 1), judgments("a", "Yes. Score: 4", "No. Score: 1"))]
    examples, counts = eft(pairs, max_share=0.4)
    assert len(examples) == 2 and counts["thinned"] == 0 and counts["max_share_raised_to"] == 0.5
    assert "max_share_raised_to" not in eft(many(), max_share=0.4)[1]
    with pytest.raises(ValueError, match="max_share is 0"):
        eft(pairs, max_share=0.0)
    assert eft([], max_share=0.4)[0] == []


def test_judgments_that_do_not_fit_are_errors():
    pair = (ranked("a", 0, 1), judgments("a", "Yes. Score: 4"))
    with pytest.raises(ValueError, match="a#1 has no judgment"):
        eft([pair])
    with pytest.raises(ValueError, match="repeat an id"):
        eft([(pair[0], pair[1] * 2)])
