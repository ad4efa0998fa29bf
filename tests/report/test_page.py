"""The page of runs: what it says, that no text in it is markup, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from made_runs import HOSTILE, judgment, made_run, response, write_lines, write_value

from jaxsi.report import figures, plots, stages
from jaxsi.report.page import headline, overview, page_of, sections
from jaxsi.report.run_files import read_run, read_runs
from jaxsi.report.samples import samples_of
from jaxsi.report.visible import HIDDEN, json_for_script, plain, shown


class Reader(HTMLParser):
    """The elements of a page, and the text outside of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.inside, self.attributes = [], "", "", []
        self.data = {"json": "", "code": ""}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        self.inside = (
            "json" if tag == "script" and dict(attrs).get("type") else "code" if tag in ("script", "style") else ""
        )

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside:
            self.data[self.inside] += data
        else:
            self.text += data

    @property
    def samples(self):
        return json.loads(self.data["json"])["samples"]


LINES, BARS = plots.lines, plots.bars


@pytest.fixture(autouse=True)
def _quick_plots(monkeypatch):
    """Drawing takes most of the time. `test_plots` has its tests."""
    for name in ("lines", "bars"):
        monkeypatch.setattr(plots, name, lambda *series, **settings: "<svg></svg>")


def draw(monkeypatch):
    monkeypatch.setattr(plots, "lines", LINES)
    monkeypatch.setattr(plots, "bars", BARS)


def read(*runs, **settings) -> Reader:
    return Reader(page_of(read_runs(list(runs)), **settings)[0])


def test_the_page_needs_nothing_but_itself(tmp_path, monkeypatch):
    draw(monkeypatch)
    page = read(made_run(tmp_path / "run"))
    loads = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert {value for tag, _, value in loads if tag not in ("a", "use")} == {"data:,"}
    assert all(value.startswith("#") for tag, _, value in loads if tag in ("a", "use"))
    assert "@import" not in page.data["code"] and "url(" not in page.data["code"]


def test_summary_says_what_came_out(tmp_path):
    run = read_run(made_run(tmp_path / "run"))
    assert headline(run) == "Quality rose from 60.0 to 70.0, by 10.0."
    table = overview([run])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    expected = {
        "method": "self_rewarding", "state": "complete", "iterations": "2 of 2", "quality, first": "60.0 ± 2.0",
        "quality, last": "70.0 ± 2.0", "change": "+10.0", "judge agreement": "0.800", "alarms": "1", "time": "16 s",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected and "wins over the first" not in row
    small = read_run(made_run(tmp_path / "small", gain=-1.0))
    assert headline(small) == "Quality fell from 60.0 to 59.0, by 1.0; the two intervals overlap."


def test_summary_of_a_real_model_says_its_win_rate(tmp_path):
    directory = made_run(tmp_path / "run")
    summary = json.loads((directory / "summary.json").read_text())
    for line in [*summary["iterations"], summary.get("base") or {}]:
        line.pop("quality", None)
    for file in directory.glob("*/evaluation.json"):
        write_value(file, {})
    rate = {"iteration": "0", "mean": 0.75, "ci95": [0.42, 1.0], "prompts": 6}
    summary["iterations"][-1]["evals"] = {"held-out": {"over_first": rate}}
    write_value(directory / "summary.json", summary)
    [run] = read_runs([directory])
    assert headline(run) == "The newest model wins over the first one on 75 % (42 to 100 %) of the held-out prompts."
    columns = overview([run]).columns
    assert "wins over the first" in columns and not {"quality, first", "quality, last", "change"} & set(columns)


def test_every_section_has_its_figures(tmp_path):
    page = read(made_run(tmp_path / "run"))
    titles = ("Quality", "Agreement with the truth", "On human rankings: accuracy", "Scores of the judge, %", "Pairs")
    titles += ("Margin", "Log-probabilities", "Learning rate", "Best of the samples")
    assert [title for title in titles if title not in page.text] == []
    assert "18 tokens/s" in page.text  # 36 in 2 s
    assert "1.5 steps/s" in page.text and "4 records/s" in page.text
    plotted = ("Quality", "Best of the samples", "Scores of the judge, %", "Loss", "Margin", "Log-probabilities")
    assert [panel.title for section in sections(read_runs([tmp_path / "run"])) for panel in section["panels"]] == [
        *plotted
    ]


def test_what_needs_no_plot_stands_in_a_table(tmp_path):
    """A point alone, and a line that is level everywhere, say less than their numbers."""
    one, both = made_run(tmp_path / "one"), [made_run(tmp_path / "one"), made_run(tmp_path / "two", gain=5.0)]
    rest = {section["id"]: section["rest"] for section in sections(read_runs([one]))}
    assert rest["pairs"].columns == ["figure", "iteration", "value"]
    assert rest["pairs"].rows == [["Pairs", "2", "5"], ["ties", "2", "1"], ["Gap of the scores in a pair", "2", "4"]]
    assert ["Parse rate", "all", "0.9"] in rest["judge"].rows
    assert rest["training"].rows == [["Learning rate", "0.001"]]
    rest = {section["id"]: section["rest"] for section in sections(read_runs(both))}
    assert ["Parse rate", "all", "all", "0.9"] in rest["judge"].rows
    summary = json.loads((one / "summary.json").read_text())
    write_value(one / "summary.json", summary | {"iterations": summary["iterations"][:1]})
    rest = {section["id"]: section["rest"] for section in sections(read_runs([one]))}
    assert rest["quality"].rows[0] == ["Quality", "1", "60", "58 to 62"]


def test_an_interval_is_one_figure_however_it_is_written():
    entry = {"a": {"mean": 2.0, "ci95": [1.0, 3.0]}, "b": [2.0, 1.0, 3.0], "c": {"mean": 2.0, "low": 1.0, "high": 3.0}}
    assert figures.values_of(entry) == dict.fromkeys("abc", (2.0, 1.0, 3.0))
    assert figures.values_of({"d": {"mean": 2.0, "n": 4}}) == {"d.mean": (2.0, None, None), "d.n": (4, None, None)}


def test_stages_have_their_memory(tmp_path):
    run = made_run(tmp_path / "run")
    assert "memory" not in " ".join(stages.stage_table(read_run(run)).columns)  # a run that did not measure it
    taken = {
        "candidates": {"host": 2**30},
        "judgments": {"host": 2**31, "device": 3 * 2**29},
        "dpo": {"host": 2**30, "device": 3 * 2**29, "at_most": ["device"]},
    }
    path = run / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [line | ({"memory": taken[line["stage"]]} if line["stage"] in taken else {}) for line in lines])
    table = stages.stage_table(read_run(run))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert {row["stage"]: (row["host memory"], row["device memory"]) for row in rows[2:]} == {
        "candidates": ("1.00 GiB", "–"), "judgments": ("2.00 GiB", "1.50 GiB"), "dpo": ("1.00 GiB", "≤ 1.50 GiB"),
    }  # fmt: skip
    assert stages.peak_memory(read_run(run)) == "1.50 GiB device"


def test_an_alarm_is_a_sentence_with_its_cause_and_what_to_do(tmp_path):
    found = stages.guards_of(read_run(made_run(tmp_path / "run")))
    assert [(guard.kind, guard.scope) for guard in found] == [("alarm", "iter_2")]
    assert found[0].sentence == (
        "the judge gives 80 % of its verdicts the score 5, so it hardly tells responses apart; use harder prompts, a "
        "finer rubric or another judge (--judging)"
    )


def test_skipped_updates_dropped_examples_and_restarts_are_told(tmp_path):
    run = made_run(tmp_path / "run")
    write_lines(run / "iter_2" / "train.jsonl", [{"step": 1, "skipped": 2.0, "chosen_shift": -20.0}])
    write_value(run / "iter_2" / "dpo_data.json", {"pairs": 5, "dropped_too_long": 3})
    with (run / "journal.jsonl").open("a") as file:
        file.write(json.dumps(json.loads((run / "journal.jsonl").read_text().splitlines()[0]) | {"process": 2}) + "\n")
    sentences = " ".join(guard.sentence for guard in stages.guards_of(read_run(run)))
    for words in ("up to 2 updates in a row", "less likely, by 20.0", "3 examples were longer", "taken up again once"):
        assert words in sentences


def test_a_sample_has_candidates_judgments_and_the_pair(tmp_path):
    samples, _ = samples_of(read_runs([made_run(tmp_path / "run")]), 100)
    paired = next(one for one in samples if one.id == "iter2-000001")
    assert [entry.tags for entry in paired.entries] == [["chosen"], ["rejected"]]
    assert [entry.score for entry in paired.entries] == [5.0, 1.0]
    assert [entry.tokens for entry in paired.entries] == [3, 3]
    assert paired.entries[0].notes == [
        ["judgments, score 5", "fine Score: 5.0"], ["judgments, score 5", "fine Score: 5.0"],
        ["judgments, no score", "fine Score: None"],
    ]  # fmt: skip
    assert next(one for one in samples if one.id == "iter2-000000").entries[0].tags == []  # a tie


def test_an_evaluation_prompt_has_the_responses_of_all_models_and_runs(tmp_path):
    runs = read_runs([made_run(tmp_path / "a"), made_run(tmp_path / "b")])
    samples, _ = samples_of(runs, 100)
    [evaluated] = [one for one in samples if one.group == "evaluation"]
    assert evaluated.prompt == "Evaluated?"
    assert [(entry.run, entry.text) for entry in evaluated.entries] == [
        (0, "answer of M_1"), (0, "answer of M_2"), (1, "answer of M_1"), (1, "answer of M_2"),
    ]  # fmt: skip
    assert evaluated.qualities[:2] == [[0, "iter_1", 40.0], [0, "iter_2", 80.0]]
    assert evaluated.change == 40.0


def test_judgments_stand_at_what_they_are_about(tmp_path):
    """Temporal judges two sets of responses with the same ids; SRT's checks judge the refined responses."""
    run = made_run(tmp_path / "run", prompts=2)
    it = run / "iter_3"
    for name, text, score in (("candidates", "now", 2.0), ("future_candidates", "later", 4.0)):
        write_lines(it / f"{name}.jsonl", [response("p", 0, text)])
        write_lines(it / f"{name}_judgments.jsonl", [judgment("p", 0, score)])
    critique = {"id": "d#0", "prompt_id": "d", "weaknesses": "w", "suggestions": "s", "finish_reason": "stop"}
    write_lines(it / "drafts.jsonl", [response("d", 0, "draft")])
    write_lines(it / "critiques.jsonl", [critique | {"score": 3.0, "improved": "refined", "text": "it lacks ..."}])
    write_lines(it / "checks.jsonl", [critique | {"score": 8.0, "improved": None, "text": "good"}])
    samples = {one.id: one for one in samples_of([read_run(run)], 100)[0] if one.group == "iter_3"}
    assert {entry.text: entry.score for entry in samples["p"].entries} == {"now": 2.0, "later": 4.0}
    assert {entry.text: entry.score for entry in samples["d"].entries} == {"draft": 3.0, "refined": 8.0}


def test_small_groups_of_samples_stay_whole_when_there_are_too_many(tmp_path):
    samples, left_out = samples_of([read_run(made_run(tmp_path / "run", prompts=50))], 11)
    assert [one.group for one in samples].count("evaluation") == 1
    assert len(samples) == 11 and left_out == {"iter_2": 40}
    assert "Left out, evenly spaced: 40 of iter_2" in re.sub(r"\s+", " ", read(tmp_path / "run", samples=11).text)


def test_texts_of_models_are_never_markup(tmp_path):
    run = made_run(tmp_path / "<script>alert(1)</script>", texts=HOSTILE)
    page = read(run)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert {entry["t"] for sample in page.samples for entry in sample["e"]} >= set(HOSTILE)
    text, _ = page_of([read_run(run)])
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202e\ufeff]", text)
    text.encode("utf-8")  # no half of a surrogate pair


@pytest.mark.parametrize("text", HOSTILE)
def test_hidden_characters_are_shown_as_code_points(text):
    assert not re.search(f"[{HIDDEN}]", plain(text)) and not re.search(f"[{HIDDEN}]", shown(text))
    assert json.loads(json_for_script({"t": text})) == {"t": text}
    assert "<" not in json_for_script({"t": text})


def test_an_ordinary_text_is_shown_as_it_is():
    text = "Grüße, 你好, 👩‍🚀? No: emoji with a joiner show it.\n\ttabs and lines stay"
    assert shown("Grüße, 你好 😀\n\tx") == "Grüße, 你好 😀\n\tx"
    assert "U+200D" in shown(text)
    assert plain("a\x1b[0m") == "a[U+001B][0m"


def test_runs_stand_side_by_side_with_their_differences(tmp_path):
    first, second = made_run(tmp_path / "one"), made_run(tmp_path / "two", gain=0.0)
    config = json.loads((second / "config.json").read_text())
    write_value(second / "config.json", config | {"dpo": {"beta": 0.3}, "seed": 7})
    table = stages.config_differences(read_runs([first, second]))
    assert table.columns == ["field", "one", "two"] and table.rows == [["dpo.beta", "0.1", "0.3"], ["seed", "–", "7"]]
    assert read(first, second).tags.count("figure") == 7  # five of both, and the scores of each


def test_an_empty_run_and_one_that_has_just_begun_have_a_page(tmp_path):
    write_value(tmp_path / "run" / "config.json", {"__type__": "methods.grpo.Config"})
    page = read(tmp_path / "run")
    assert "No quality was measured yet." in page.text and "No stage has begun." in page.text
    unfinished = read(made_run(tmp_path / "other", complete=False), refresh=5.0)
    assert "stopped" in unfinished.text and "load again every 5 seconds" in unfinished.text


def test_the_page_of_the_same_files_is_the_same(tmp_path):
    run = made_run(tmp_path / "run")
    pages = [re.sub(r"Written [^<]* UTC", "", page_of([read_run(run)])[0]) for _ in range(2)]
    assert pages[0] == pages[1]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_runs_the_page_without_an_error(tmp_path, monkeypatch):
    draw(monkeypatch)
    out = tmp_path / "page.html"
    out.write_text(page_of([read_run(made_run(tmp_path / "run", texts=HOSTILE, prompts=40))])[0], encoding="utf-8")
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *switches.split(), profile, "--enable-logging=stderr", "--dump-dom", f"file://{out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr
    page = Reader(done.stdout)
    assert 'id="sample-0"' in done.stdout and done.stdout.count('class="row"') < 30  # only what is in view
    assert "41 samples" in page.text
    assert "taken" not in re.findall("<title>(.*?)</title>", done.stdout)[0] and "img" not in page.tags
