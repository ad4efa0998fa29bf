"""Self-Rewarding on the micro world: what its records hold, where its prompts come from, what it refuses."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from micro_runs import micro, micro_run

from jaxsi.cli.tables import iterations_table
from jaxsi.methods import seeded
from jaxsi.methods.seeded import SeedData, next_prompts
from jaxsi.runs.config_file import load_config
from jaxsi.runs.records import Judgment, Prompt, RankedResponses, SFTExample, read_jsonl
from jaxsi.runs.run import Run, RunError, Scope, StaleRecordsError
from jaxsi.stages.judge_quality import judge_quality
from jaxsi.stages.rankings import RankingFile
from jaxsi.stages.self_instruct import PromptFile

pytestmark = pytest.mark.xdist_group("self_rewarding")  # the worker of all tests of its finished run

MICRO = micro("self_rewarding")


@pytest.fixture(scope="module")
def whole() -> Path:
    return micro_run("self_rewarding").whole


@pytest.mark.slow
def test_summary_has_what_readers_expect(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["method"] == "self_rewarding"
    assert [line["iteration"] for line in summary["iterations"]] == [1, 2]
    first, second = summary["iterations"]
    assert first["seconds"]["sft"] > 0
    assert isinstance(second["alarms"], list)
    assert first["pairs"] is None and second["pairs"] > 0
    assert first["fingerprint"] != second["fingerprint"]
    low, high = second["quality"]["ci95"]
    assert 0 <= low <= second["quality"]["mean"] <= high <= 100
    assert set(second["seconds"]) >= {"prompts", "candidates", "judgments", "pairs", "dpo", "evaluation"}
    assert {"judge_agreement", "judge_agreement_without_ties", "judge_tie_share"} <= set(second)


@pytest.mark.slow
def test_pairs_come_from_the_current_weights(whole):
    fingerprints = [line["fingerprint"] for line in json.loads((whole / "summary.json").read_text())["iterations"]]
    candidates = [json.loads(line) for line in (whole / "iter_2" / "candidates.jsonl").read_text().splitlines()]
    judgments = [json.loads(line) for line in (whole / "iter_2" / "judgments.jsonl").read_text().splitlines()]
    assert {record["fingerprint"] for record in candidates + judgments} == {fingerprints[0]}
    scores = {record["id"]: record["score"] for record in judgments}
    for line in (whole / "iter_2" / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        assert scores[pair["chosen"]["id"]] > scores[pair["rejected"]["id"]]


def test_prompts_of_a_file_never_repeat_even_when_iterations_are_added(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Question {i}?"}) + "\n" for i in range(7)))

    def dealt(directory, iterations, repeat=False):
        cfg = dataclasses.replace(
            load_config(MICRO), prompts=PromptFile(path=str(file), repeat=repeat), iterations=iterations
        )
        with Run.open(directory, cfg) as run:
            parts = []
            for t in range(2, iterations + 1):
                it = run.at(f"iter_{t}")
                parts.append(it.counted("prompts", next_prompts, cfg, None, run, t, of=Prompt)[0])
        return [[prompt.id for prompt in part] for part in parts]

    assert dealt(tmp_path / "run", 3) == [["p0", "p1", "p2", "p3"], ["p4", "p5", "p6"]]
    with pytest.raises(ValueError, match="earlier iterations have used all of its 7 prompts"):
        dealt(tmp_path / "run", 4)
    file.write_text(file.read_text() + json.dumps({"id": "p7", "prompt": "One more?"}) + "\n")
    assert dealt(tmp_path / "run", 4)[2] == ["p7"]
    assert dealt(tmp_path / "again", 3, repeat=True) == [[f"p{i}" for i in range(8)]] * 2


def test_new_prompts_are_neither_held_out_nor_those_of_earlier_iterations(tmp_path, monkeypatch):
    excluded = []
    monkeypatch.setattr(seeded, "new_prompts", lambda *args, **named: excluded.append(named) or [])
    lm = SimpleNamespace(mesh=None)
    micro = load_config(MICRO)
    held_out = lambda: [Prompt.of("h", "Held out?")]  # noqa: E731
    cfg = dataclasses.replace(micro, seed_data=dataclasses.replace(micro.seed_data, held_out=held_out))
    tested = [ranked.messages[-1]["content"] for ranked in micro.seed_data.judge_test()]
    with Run.open(tmp_path / "run", micro) as run:
        run.at("iter_1").records("ift", micro.seed_data.ift, of=SFTExample)
        run.at("iter_2").records("prompts", lambda: [Prompt.of("a", "Asked before?")], of=Prompt)
        seeded.next_prompts(cfg, lm, run, 3)
        assert excluded[0]["earlier"] == ["Asked before?"]
        assert excluded[0]["held_out"] == ["Held out?", *tested]
        (tmp_path / "run" / "iter_2" / "prompts.jsonl").unlink()
        with pytest.raises(RunError, match=r"iter_2/prompts\.jsonl is gone, and later iterations need it"):
            seeded.next_prompts(cfg, lm, run, 3)


def test_replaced_model_is_refused_also_without_sft(tmp_path):
    import tiny
    from jaxsi import lm as lmlib
    from jaxsi.methods.self_rewarding import PromptFile, self_rewarding

    model = tmp_path / "model"
    micro = load_config(MICRO)
    eight_rows = dataclasses.replace(micro.dpo, train=dataclasses.replace(micro.dpo.train, batch_size=8))
    cfg = dataclasses.replace(
        micro, model=str(model), sft=None, dpo=eight_rows, prompts=PromptFile(path="none"), evaluate=None, iterations=1
    )
    lmlib.export(tiny.make_lm("1x8x1"), model, dtype="float32")
    with Run.open(tmp_path / "run", cfg) as run:
        first = self_rewarding(cfg, run)
    stored = json.loads((tmp_path / "run" / "iter_0" / "model.json").read_text())
    assert stored == {"path": str(model), "fingerprint": first.fingerprint}
    lmlib.export(tiny.make_lm("1x8x1", seed=1), tmp_path / "other", dtype="float32")
    (tmp_path / "other" / "model.safetensors").replace(model / "model.safetensors")
    with Run.open(tmp_path / "run", cfg) as run, pytest.raises(StaleRecordsError, match="this run began with"):
        self_rewarding(cfg, run)


def test_held_out_prompts_of_a_file_are_left_out(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Question {i}?"}) + "\n" for i in range(3)))
    data = SeedData(ift=list, held_out=lambda: [Prompt.of("h", "question  1?")])
    cfg = load_config(MICRO)
    with Run.open(tmp_path / "run", cfg) as run:
        cfg = dataclasses.replace(cfg, seed_data=data, prompts=PromptFile(path=str(file)))
        assert [prompt.id for prompt in next_prompts(cfg, None, run, 2)[0]] == ["p0", "p2"]


@pytest.mark.slow
def test_every_model_is_measured_as_a_judge(whole):
    ranked = read_jsonl(whole / "iter_1" / "judge_test.jsonl", RankedResponses)
    lines = json.loads((whole / "summary.json").read_text())["iterations"]
    for line in lines:
        judgments = read_jsonl(whole / f"iter_{line['iteration']}" / "judge_test_judgments.jsonl", Judgment)
        assert {judgment.fingerprint for judgment in judgments} == {line["fingerprint"]}
        assert line["judge_quality"] == judge_quality(ranked, judgments)
        assert line["judge_quality"]["pairs"] == 36
    assert "on human rankings" in iterations_table({"iterations": lines})
    trained = [read_jsonl(whole / "iter_1" / f"{name}.jsonl", SFTExample) for name in ("ift", "eft")]
    texts = [message["content"] for examples in trained for example in examples for message in example.messages]
    assert texts and not [text for record in ranked for text in texts if record.messages[-1]["content"] in text]


def test_prompts_that_measure_the_judge_are_in_no_training_data(tmp_path):
    """A demonstration of such a prompt would be learnt by heart."""
    cfg = load_config(MICRO)
    ranked = cfg.seed_data.judge_test()
    shown = SFTExample(id="x", messages=ranked[0].messages, response="Seen.")
    ift = [shown, *cfg.seed_data.ift()]
    with Run.open(tmp_path / "run", cfg) as run:
        test = seeded.judge_test(cfg.seed_data, run)
        assert test == ranked
        assert seeded.demonstrations(lambda: ift, test) == ift[1:]
        assert seeded.judge_test(None, run) == seeded.judge_test(SeedData(), run) == []


def test_rankings_alone_are_seed_data():
    """They had to come with demonstrations."""
    micro = load_config(MICRO)
    alone = SeedData(rankings=micro.seed_data.rankings)
    file = PromptFile(path="none")
    assert dataclasses.replace(micro, seed_data=alone, prompts=file).sft is not None  # SFT on EFT
    test = SeedData(judge_test=RankingFile("rankings.jsonl"))
    assert dataclasses.replace(micro, seed_data=test, prompts=file, sft=None).seed_data is test
    with pytest.raises(ValueError, match="seed_data has neither ift nor rankings to train on"):
        dataclasses.replace(micro, seed_data=test, prompts=file)
    with pytest.raises(ValueError, match="seed_data has no ift for new prompts to imitate"):
        dataclasses.replace(micro, seed_data=alone)


def test_eft_of_rankings_alone_is_written_by_the_given_model(tmp_path, monkeypatch):
    cfg = load_config(MICRO)
    data = dataclasses.replace(cfg.seed_data, ift=None, judge_test=None)
    judged = []

    def sharded(self, name, items, *args, **named):
        judged.append((name, args[2]))
        return []

    monkeypatch.setattr(Scope, "sharded", sharded)
    monkeypatch.setattr(Scope, "counted", lambda self, name, *args, **named: (["eft"], {}))
    with Run.open(tmp_path / "run", cfg) as run:
        assert seeded.evaluation_examples(cfg, data, cfg.sft, "base", run, []) == ["eft"]
    assert judged == [("eft_judgments", "base")]


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_values_out_of_range_are_refused_by_the_config(share):
    from jaxsi.methods.self_rewarding import PairConfig

    with pytest.raises(ValueError, match="max_share is"):
        SeedData(ift=list, max_share=share)
    with pytest.raises(ValueError, match="length_control is"):
        PairConfig(length_control=0.5 + share)
    with pytest.raises(ValueError, match="min_gap -1"):
        PairConfig(min_gap=-1.0)
