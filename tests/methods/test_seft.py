"""SEFT on the micro world: phases, rounds, the stopping rule, and what a finished run keeps."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from micro_runs import micro, micro_run

from jaxsi.lm import load
from jaxsi.methods import seft as method
from jaxsi.methods.seft import Config, Round, Stopping, seft, stopped
from jaxsi.methods.start import carry_out
from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import RunConfigError
from jaxsi.runs.records import Prompt, RankedResponses, Response, Revision, SFTExample, read_jsonl
from jaxsi.runs.run import Run
from jaxsi.stages.reviser import always_revise, revise
from jaxsi.toyworld.methods_table import IN_COMMON

pytestmark = pytest.mark.xdist_group("seft")  # the worker of all tests of its finished run


@pytest.fixture(scope="module")
def cfg() -> Config:
    return load_config(micro("seft"))


@pytest.fixture(scope="module")
def whole() -> Path:
    return micro_run("seft").whole


def read(directory: Path, name: str, of: type) -> list:
    return read_jsonl(directory / name, of)


def value(path: Path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_summary_has_what_readers_expect(whole):
    summary = value(whole / "summary.json")
    assert (summary["status"], summary["method"]) == ("complete", "seft")
    lines = summary["iterations"]
    assert [line["iteration"] for line in lines] == list(range(len(lines))) and len(lines) >= 2
    assert summary["rounds"] == len(lines) - 1 and summary["stopped"] in (True, False)
    shares = [line["no_share"] for line in lines]
    assert summary["best"] == shares.index(max(shares))
    assert load(whole).fingerprint == lines[summary["best"]]["fingerprint"]
    assert summary["base"]["quality"] == lines[0]["quality"]  # the policy as given is where evolution begins
    for line in lines:
        assert line["quality"]["ci95"][0] <= line["quality"]["mean"] <= line["quality"]["ci95"][1]
        assert 0 <= line["no_share"] <= 1 and 0 <= line["judge_agreement"] <= 1
    assert all(line["targets"] > 0 for line in lines[1:])
    assert len({line["fingerprint"] for line in lines}) == len(lines)
    assert set(summary["reviser"]) >= {
        "labels",
        "no_on_best",
        "major_on_worst",
        "good_drafts",
        "by_label",
        "parse_rate",
    }


@pytest.mark.slow
def test_each_model_of_a_run_has_a_checkpoint(whole):
    for scope in ("iter_0", "iter_1", "warm_reviser", "reviser"):
        assert (whole / scope / "checkpoint" / "weights" / "jaxsi.json").exists()


@pytest.mark.slow
def test_drafts_come_from_the_current_policy_and_revisions_from_the_reviser(whole):
    fingerprints = [line["fingerprint"] for line in value(whole / "summary.json")["iterations"]]
    reviser = value(whole / "reviser" / "checkpoint" / "weights" / "jaxsi.json")["meta"]["fingerprint"]
    for t in range(1, len(fingerprints)):
        drafts = {r.id: r for r in read(whole, f"iter_{t}/drafts.jsonl", Response)}
        assert {draft.fingerprint for draft in drafts.values()} == {fingerprints[t - 1]}
        for revision in read(whole, f"iter_{t}/revisions.jsonl", Revision):
            if revision.label == "good" or t == 1:  # unchanged, or chosen among the policy's own
                assert revision.response == drafts[revision.id]
            else:
                assert revision.response.fingerprint == reviser


@pytest.mark.slow
def test_internal_round_takes_one_draft_of_each_prompt_and_prompts_never_repeat(whole, cfg):
    first = read(whole, "iter_1/revisions.jsonl", Revision)
    assert len({r.prompt_id for r in first}) == len(first)
    drafts = read(whole, "iter_1/drafts.jsonl", Response)
    assert len(drafts) == cfg.internal.num_samples * len(read(whole, "iter_1/prompts.jsonl", Prompt))
    parts = [
        {p.id for p in read(whole, f"iter_{t}/prompts.jsonl", Prompt)}
        for t in range(1, len(value(whole / "summary.json")["iterations"]))
    ]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert not {p.text for p in cfg.stop.held_out()} & {p.text for p in cfg.prompts()}


@pytest.mark.slow
def test_targets_are_the_usable_revisions(whole):
    targets = {e.id: e for e in read(whole, "iter_1/targets.jsonl", SFTExample)}
    for revision in read(whole, "iter_1/revisions.jsonl", Revision):
        if revision.response.finish_reason == "stop" and revision.response.text.strip():
            assert targets[revision.id].response == revision.response.text
        else:
            assert revision.id not in targets


@pytest.mark.slow
def test_finished_run_does_no_work(whole, tmp_path, cfg, monkeypatch):
    for stage in ("generate", "sample"):
        monkeypatch.setattr(method, stage, None)
    directory = shutil.copytree(whole, tmp_path / "run")
    with Run.open(directory, cfg) as run:
        seft(cfg, run)
    assert (directory / "summary.json").read_text() == (whole / "summary.json").read_text()


def test_internal_rounds_are_never_the_reason_to_skip_the_external_ones(cfg):
    full, empty = ({f"p{i}": value for i in range(30)} for value in (True, False))
    longer = dataclasses.replace(cfg, internal_rounds=3, iterations=5, stop=Stopping(held_out=list, patience=1))
    kept = [full, empty, empty, empty, empty]
    assert [stopped(longer, kept[: t + 1]) for t in range(5)] == [False, False, False, False, True]
    # Without external rounds there is nothing to skip.
    assert stopped(dataclasses.replace(longer, iterations=3), kept[:2])
    assert not stopped(dataclasses.replace(longer, stop=Stopping()), kept)


def labels_of(monkeypatch, shares):
    """Plants what the reviser says of 40 held-out responses of each policy."""
    values = iter(shares)

    def labelled(cfg, policy, reviser, run):
        share = next(values)
        return [
            Revision(
                id=f"h{i}#0", prompt_id=f"h{i}", label="good" if i < 40 * share else "bad", label_probs=None,
                response=Response.of(f"h{i}#0", f"h{i}", 0, "cat."),
            )
            for i in range(40)
        ]  # fmt: skip

    monkeypatch.setattr(method, "labelled_held_out", labelled)


def unfinished(whole: Path, directory: Path, cfg: Config) -> Run:
    """A run that has its reviser already and differs in the evolution."""
    run = Run.open(directory, cfg)
    for scope in IN_COMMON["seft"].shared:
        if (whole / scope).exists():
            shutil.copytree(whole / scope, directory / scope)
    (directory / "iter_0" / "held_out.jsonl").unlink()
    return run


@pytest.mark.slow
def test_run_stops_early_and_returns_the_best_policy(whole, tmp_path, cfg, monkeypatch):
    longer = dataclasses.replace(cfg, iterations=3, external=Round(target=always_revise), evaluate=None)
    labels_of(monkeypatch, [0.2, 0.7, 0.3, 0.9])
    directory = tmp_path / "run"
    with unfinished(whole, directory, longer) as run:
        result = carry_out(longer, run)
        summary = run.summary
    assert [line["no_share"] for line in summary["iterations"]] == [0.2, 0.7, 0.3]
    assert (summary["rounds"], summary["stopped"], summary["status"]) == (2, True, "complete")
    labels = {r.label for r in read(directory, "iter_2/revisions.jsonl", Revision)}
    assert labels <= {"wrong", "bad"}
    assert summary["best"] == 1
    best = summary["iterations"][1]["fingerprint"]
    assert result.fingerprint == load(directory).fingerprint == best


@pytest.mark.slow
def test_rounds_borrow_drafts_and_a_stronger_reviser_and_all_run_without_held_out_prompts(whole, tmp_path, cfg):
    stronger = str(whole / "warm_reviser" / "checkpoint")
    external = Round(target=revise, drafts=cfg.model, reviser=stronger)
    plain = dataclasses.replace(cfg, stop=Stopping(), evaluate=None, internal_rounds=0, external=external)
    directory = tmp_path / "run"
    with unfinished(whole, directory, plain) as run:
        result = seft(plain, run)
        summary = run.summary
    assert (summary["rounds"], summary["stopped"], summary["best"]) == (plain.iterations, False, plain.iterations)
    assert result.fingerprint == summary["iterations"][-1]["fingerprint"]
    given, revises = summary["iterations"][0]["fingerprint"], load(stronger).fingerprint
    assert value(directory / "external_reviser" / "model.json") == {"path": stronger, "fingerprint": revises}
    for t in (1, 2):
        drafts = {r.id: r for r in read(directory, f"iter_{t}/drafts.jsonl", Response)}
        assert {draft.fingerprint for draft in drafts.values()} == {given}
        written = [
            revision.response.fingerprint
            for revision in read(directory, f"iter_{t}/revisions.jsonl", Revision)
            if revision.label != "good"
        ]
        assert written and set(written) == {revises}


def test_reviser_that_a_round_borrows_may_move_but_not_change(tmp_path, cfg):
    directory = tmp_path / "run"
    first = dataclasses.replace(cfg, external=Round(target=revise, reviser="HERE"))
    Run.open(directory, first).close()
    Run.open(directory, dataclasses.replace(cfg, external=Round(target=revise, reviser="THERE"))).close()
    with pytest.raises(RunConfigError, match=r"external\.num_samples: 1 -> 2"):
        Run.open(directory, dataclasses.replace(cfg, external=Round(target=revise, num_samples=2, reviser="HERE")))


def useless() -> list[RankedResponses]:
    prompt = Prompt.of("x", "Reverse: cat dog")
    equal, empty = ("cat.", "cat."), ("", " ")
    return [
        RankedResponses(id=f"{i}", messages=prompt.messages, responses=texts, ranks=(0, 1))
        for i, texts in enumerate([equal, empty, ("cat. " * 80, "dog.")])
    ]


def test_rankings_without_a_usable_pair_are_an_error_with_counts(tmp_path, cfg):
    bad = dataclasses.replace(cfg, reviser=dataclasses.replace(cfg.reviser, rankings=useless))
    with (
        Run.open(tmp_path / "run", bad) as run,
        pytest.raises(ValueError, match="'empty': 2, 'equal': 1, 'too_long': 2"),
    ):
        seft(bad, run)


def test_impossible_configs_are_refused(cfg):
    with pytest.raises(ValueError, match="iterations is 0"):
        dataclasses.replace(cfg, iterations=0)
    with pytest.raises(ValueError, match="internal_rounds -1"):
        dataclasses.replace(cfg, internal_rounds=-1)
    with pytest.raises(ValueError, match="go together"):
        dataclasses.replace(cfg, start=cfg.sft)
    with pytest.raises(ValueError, match="num_samples is 0"):
        Round(target=revise, num_samples=0)
    with pytest.raises(ValueError, match="patience is 0"):
        Stopping(patience=0)
