"""`jaxsi improve` with a tiny model: the files it writes, how it goes on after a kill, and the input it refuses."""

import json

import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import improve
from jaxsi.cli.main import main
from jaxsi.runs.config_snapshot import describe_config
from jaxsi.runs.records import Improvement, read_jsonl
from jaxsi.stages.improve import rounds, self_refine
from jaxsi.toyworld import careless, critic, reviser, seed, world
from jaxsi.training import reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, templates and prompts; one prompt is longer than the context."""
    folder = tmp_path_factory.mktemp("improve")
    lmlib.export(tiny.make_lm(), folder / "model", dtype="float32")
    lmlib.export(reward.with_scalar_head(tiny.make_lm(seed=1)), folder / "rm", dtype="float32")
    rows = [{"id": p.id, "prompt": p.text} for p in world.prompts(5, seed=3, held_out=True)]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows.append({"id": "long", "prompt": "cat " * 300})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, template in (("critique", critic.TEMPLATE), ("reviser", reviser.TEMPLATE)):
        (folder / f"{name}.json").write_text(json.dumps(describe_config(template)))
    refine = {"feedback": "What is wrong?\nGood", "refine": "Again:", "enough": "Good"}
    (folder / "refine.json").write_text(json.dumps(refine))
    return folder


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch):
    """Eight devices give the same responses, but compile for longer."""
    monkeypatch.setattr(improve, "mesh_for", lambda model, given: tiny.mesh())


def called(capsys, folder, method, *options, model="model", prompts="prompts.jsonl"):
    """(exit code, stdout, stderr) of the command. A word that is the name of a file in the folder becomes its path."""
    argv = ["improve", method, model, "--prompts", prompts, "--max-new-tokens", "8", "--dtype", "float32", *options]
    argv = [str(folder / word) if (folder / word).exists() else word for word in map(str, argv)]
    if "--batch-size" not in options:
        argv += ["--batch-size", "1"]  # one shape, so one program
    code = main(argv)
    return code, *capsys.readouterr()


def value_of(capsys, folder, *words, **names):
    code, out, err = called(capsys, folder, *words, "--json", **names)
    assert code == 0, err
    return json.loads(out)


def responses(out, round):
    return read_jsonl(out / f"round_{round}" / "responses.jsonl", Improvement)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("srt", ("--template", "critique.json", "--feedback-tokens", "8")),
        ("seft", ("--reviser", "model", "--template", "reviser.json")),
        ("pit", ("--improver", "model", "--gap-rm", "rm")),
        ("self-refine", ("--template", "refine.json")),
        ("best-of-n", ("--reward-rm", "rm", "--num-samples", "2")),
    ],
)
def test_every_method_writes_its_rounds(capsys, folder, tmp_path, method, options):
    out = tmp_path / "out"
    value = value_of(capsys, folder, method, *options, "-o", out, "--rounds", "2")
    assert [line["iteration"] for line in value["rounds"]] == [0, 1, 2]
    assert [line["outcomes"].get("too long", 0) for line in value["rounds"][:1]] == [1]
    assert all(sum(line["outcomes"].values()) == 6 for line in value["rounds"])
    for round in range(3):
        records = responses(out, round)
        assert [r.prompt_id for r in records][-1] == "long" and len(records) == 6
        assert sum(r.tokens for r in records) == value["rounds"][round]["tokens"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["base"] == value["rounds"][0]
    assert summary["iterations"] == value["rounds"][1:]
    assert main(["status", str(out)]) == 0
    assert "complete, 2 of 2 iterations" in capsys.readouterr().out


def test_folder_of_srt_keeps_the_rule_by_which_it_accepts(capsys, folder, tmp_path):
    out = tmp_path / "out"
    words = ("srt", "--template", "critique.json", "--feedback-tokens", "8", "-o", out, "--rounds", "0")
    value_of(capsys, folder, *words)
    assert json.loads((out / "config.json").read_text())["settings"]["gate"] is False, "as in the paper"
    code, _, err = called(capsys, folder, *words, "--gate")
    assert code == 2 and "settings.gate: False -> True" in err


def test_killed_command_goes_on_and_computes_nothing_twice(capsys, folder, tmp_path, monkeypatch):
    drafts, calls = [], []
    real_draft, real_round = rounds.draft_round, self_refine.self_refine_round

    def draft(lm, prompts, *rest, **names):
        drafts.extend(p.id for p in prompts)
        return real_draft(lm, prompts, *rest, **names)

    def round(lm, items, *rest, **names):
        if len(calls) == 1 and items[0][1][-1].round == 1:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append([past[-1].round for _, past in items])
        records = real_round(lm, items, *rest, **names)
        return [rounds.next_record(past, "accepted", 1.0, response=past[-1].response) for _, past in items] or records

    monkeypatch.setattr(rounds, "draft_round", draft)
    monkeypatch.setattr(self_refine, "self_refine_round", round)
    out = tmp_path / "out"
    words = ("self-refine", "--template", "refine.json", "-o", out)
    code, _, err = called(capsys, folder, *words, "--rounds", "2")
    assert code == 130 and "goes on from there" in err
    assert len(drafts) == 6 and calls == [[0] * 5, "killed"]
    first = value_of(capsys, folder, *words, "--rounds", "2")
    assert len(drafts) == 6 and calls == [[0] * 5, "killed", [1] * 5]
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl") if path.name == "responses.jsonl"}
    again = value_of(capsys, folder, *words, "--rounds", "2", "--batch-size", "2")
    assert again["rounds"] == first["rounds"] and len(drafts) == 6 and len(calls) == 3
    assert before == {path: path.read_bytes() for path in before}
    more = value_of(capsys, folder, *words, "--rounds", "3")
    assert more["rounds"][:3] == first["rounds"] and calls[3:] == [[2] * 5]
    for options, difference in (
        (("--temperature", "0.5"), "settings.sampling.temperature: 0.7 -> 0.5"),
        (("--seed", "1"), "seed: 0 -> 1"),
        (("--max-prompts", "2"), "prompts: '6 prompts"),
        (("--rounds", "1"), "iterations: 3 -> 1"),
    ):
        code, _, err = called(capsys, folder, *words, "--rounds", "3", *options)
        assert code == 2 and difference in err
    code, _, err = called(capsys, folder, "pit", "--improver", "model", "-o", out, "--rounds", "3")
    assert code == 2 and "method: 'self-refine' -> 'pit'" in err


def test_more_rounds_keep_the_dtype_of_the_first(capsys, folder, tmp_path, monkeypatch):
    loaded, load = [], lmlib.load
    monkeypatch.setattr(lmlib, "load", lambda path, mesh, dtype, **o: loaded.append(dtype) or load(path, mesh, dtype))
    words = ["self-refine", "--template", "refine.json", "--dtype", "auto", "-o", tmp_path / "out", "--rounds"]
    for more, fast in (("0", "float32"), ("1", "bfloat16")):
        monkeypatch.setattr("jaxsi.model.compute_dtype._announced", lambda fast=fast: fast)
        code, _, err = called(capsys, folder, *words, more)
        assert code == 0, err
    assert loaded == ["float32", "float32"] and "dtype auto: float32, as this run began" in err
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["settings"]["sampling"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pit", "--improver", "rm"), "reward model, which writes no text"),
        (("pit", "--improver", "model", "--gap-rm", "model"), "no scalar head"),
        (("best-of-n", "--reward-rm", "model"), "no scalar head"),
        (("best-of-n", "--num-samples", "1"), "at least 2"),
        (("best-of-n", "--critic", "model", "--reward-rm", "rm"), "give one of the two"),
        (("self-refine", "--grade", "toy"), "not an instruction of the embedded world"),
        (("self-refine", "--grade", "toy", "--judge", "model"), "give one of the two"),
        (("self-refine", "--rounds", "-1"), "--rounds -1"),
        (("self-refine", "--temperature", "-1"), "temperature is -1.0"),
        (("self-refine", "--max-new-tokens", "256"), "leaves no room for a prompt"),
        (("self-refine", "--template", "critique.json"), "give the fields of SelfRefineTemplate"),
        (("self-refine", "--template", "prompts.jsonl"), "broken JSON"),
        (("self-refine", "--template", "nowhere.json"), "cannot be read"),
        (("srt", "--prompts", "nowhere.jsonl"), "no such file"),
    ],
)
def test_input_that_cannot_work_is_refused_before_anything_is_written(capsys, folder, tmp_path, words, message):
    code, out, err = called(capsys, folder, *words, "-o", tmp_path / "out")
    assert code in (1, 2) and out == "" and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_run_of_finds_the_config_of_a_run(tmp_path):
    run = {"__type__": "jaxsi.methods.seft.Config", "reviser": {"template": describe_config(reviser.TEMPLATE)}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    (tmp_path / "journal.jsonl").touch()
    for place in (tmp_path, f"{tmp_path}@2", tmp_path / "reviser" / "checkpoint"):
        found = improve._run_of(str(place), "jaxsi.methods.seft.Config")
        assert found == run
    template = improve._template(type(reviser.TEMPLATE), None, run["reviser"]["template"], reviser.TEMPLATE.__class__)
    assert template == reviser.TEMPLATE
    assert improve._run_of(str(tmp_path), "jaxsi.methods.srt.Config") is None
    assert improve._run_of("Qwen/Qwen3-0.6B", "jaxsi.methods.srt.Config") is None


@pytest.mark.slow
def test_best_of_two_responses_is_not_worse(capsys, folder, tmp_path):
    words = ("--critic", seed.SHIPPED, "--rubric", seed.SHIPPED.parent / "judge.txt", "--judge-tokens", "24")
    words += ("--grade", "toy", "--judgments", "1", "--max-new-tokens", "16", "--num-samples", "2")
    words += ("--batch-size", "8", "-o", tmp_path / "out")
    value = value_of(capsys, folder, "best-of-n", *words, model=careless.SHIPPED, prompts="toy.jsonl")
    before, after = value["rounds"]
    assert 0 < before["quality"]["mean"] <= after["quality"]["mean"] <= 100
    assert after["mean_score"] > 0 and before["mean_score"] is None
    texts = {p.id: p.text for p in world.prompts(5, seed=3, held_out=True)}
    for record in responses(tmp_path / "out", 1):
        assert record.quality == pytest.approx(10 * world.grade(texts[record.prompt_id], record.response.text).total)


def test_improve_takes_a_mesh(capsys):
    assert main(["improve", "srt", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--mesh.{axis}" in out for axis in ("data", "fsdp", "tensor"))
