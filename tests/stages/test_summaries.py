"""OpenAI's summarisation preferences, from small files in their format."""

import json

import pytest

from jaxsi.runs.config_snapshot import describe_config
from jaxsi.runs.records import RankedResponses, RecordError
from jaxsi.stages.pairs import preferences
from jaxsi.stages.summaries import openai_summaries


def row(choice: int = 1, split: str = "train", **info) -> dict:
    """A comparison as OpenAI's files have it; ``info`` replaces fields of its post."""
    post = {
        "id": "t3_34xale",
        "post": "My boyfriend and I are long distance.\nWe have a trip planned {this} summer.\n",
        "title": "Mother is mad at me",
        "subreddit": "relationships",
        "site": None,
        "article": None,
    }
    return {
        "info": post | info,
        "split": split,
        "summaries": [
            {"text": " Mum is mad about the trip.", "policy": "sup4_ppo_rm3_kl10", "note": "ok"},
            {"text": " Mum is mad about a trip with my boyfriend.", "policy": "ref", "note": ""},
        ],
        "choice": choice,
        "worker": "NKfIYu5r3p3eEhJTbYmg",
        "batch": "batch3",
        "extra": {"confidence": None},
    }


ARTICLE = {"post": None, "subreddit": None, "article": "The council met.", "title": "Council", "site": "cnn"}
ROWS = [row(), row(0), row(split="valid1"), row(split="valid2", **ARTICLE), row(post=" "), row(choice=0, title=None)]


def write(folder, rows, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_chosen_summary_comes_first(tmp_path, name, caplog):
    ranked = openai_summaries(write(tmp_path, ROWS, name))
    assert [r.id for r in ranked] == ["summaries-0", "summaries-1", "summaries-3"]
    assert "1 comparisons without a text to summarise are left out" in caplog.text
    assert ranked[0] == RankedResponses(
        id="summaries-0",
        messages=(
            {
                "role": "user",
                "content": "Summarize this post from r/relationships in a few sentences.\n\n"
                "Title: Mother is mad at me\n\n"
                "My boyfriend and I are long distance.\nWe have a trip planned {this} summer.",
            },
        ),
        responses=("Mum is mad about a trip with my boyfriend.", "Mum is mad about the trip."),
        ranks=(0, 1),
    )
    assert ranked[1].responses == ranked[0].responses[::-1]
    pairs, counts = preferences(ranked)
    assert len(pairs) == counts["preferences"] == 3 and pairs[0].chosen == ranked[0].responses[0]


def test_validation_has_posts_and_articles(tmp_path):
    post, article = openai_summaries(write(tmp_path, ROWS, "rows.jsonl"), split="validation")
    assert post.messages[0]["content"].startswith("Summarize this post from r/relationships")
    assert article.messages[0]["content"] == (
        "Summarize this news article in a few sentences.\n\nTitle: Council\n\nThe council met."
    )


def test_folder_of_batches_is_read_whole(tmp_path):
    """OpenAI's files are one JSON object a line, under the name of JSON."""
    lines = "".join(json.dumps(r) + "\n" for r in ROWS[:3])
    (tmp_path / "batch10.json").write_text(lines)
    write(tmp_path, ROWS[3:], "train/0000.parquet")
    assert [r.id for r in openai_summaries(str(tmp_path))] == ["summaries-0", "summaries-1", "summaries-3"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"no file of the set in it; give a folder of \.json"):
        openai_summaries(str(tmp_path / "empty"))


def test_name_on_the_hub_is_read_from_its_parquet_files(monkeypatch):
    import datasets

    calls = []

    def load_dataset(kind, *, data_files, split):
        calls.append((kind, data_files, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(openai_summaries()) == 3 and len(openai_summaries(split="validation")) == 2
    place = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons"
    assert calls == [("parquet", f"{place}/{split}/*.parquet", "train") for split in ("train", "validation")]

    def offline(*args, **keywords):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(RecordError, match=r"openai/summarize_from_feedback: cannot be read from the hub .*no route"):
        openai_summaries()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": 2}, r'rows\.jsonl:2: "choice" is 2; it is 0 or 1'),
        ({"choice": None}, r'rows\.jsonl:2: "choice" is None'),
        ({"summaries": [{"text": "one"}]}, r'rows\.jsonl:2: "summaries" is .* list of two objects'),
        ({"summaries": ["one", "two"]}, r'rows\.jsonl:2: "summaries" holds \'one\'.* the text "text"'),
        ({"info": "post"}, r'rows\.jsonl:2: "info" is \'post\''),
        ({"split": None}, r'rows\.jsonl:2: "split" is None; it is train, valid1 or valid2'),
    ],
)
def test_row_of_another_shape_is_named(tmp_path, changes, message):
    path = write(tmp_path, [row(), row() | changes], "rows.jsonl")
    with pytest.raises(RecordError, match=message):
        openai_summaries(path)


def test_source_without_the_split_or_that_is_not_there_is_an_error(tmp_path):
    path = write(tmp_path, [row()], "rows.jsonl")
    with pytest.raises(RecordError, match="no comparison of the split 'validation'; give train or validation"):
        openai_summaries(path, split="validation")
    with pytest.raises(RecordError, match="no such file"):
        openai_summaries(str(tmp_path / "absent.jsonl"))
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(RecordError, match=r"broken\.jsonl:1: broken JSON"):
        openai_summaries(str(tmp_path / "broken.jsonl"))


def test_loader_can_be_the_preferences_of_a_config():
    assert describe_config(openai_summaries) == "summaries.openai_summaries"
