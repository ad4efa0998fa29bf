"""The table of arms x seeds, on runs whose figures are made up."""

import dataclasses
import json

import numpy as np
import pytest

from jaxsi.toyworld import methods_table
from jaxsi.toyworld.methods_table import InCommon


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    gain: float
    model: str = "given"
    iterations: int = 3
    judged: bool | None = None
    seed: int = 0


@pytest.fixture
def calls(monkeypatch):
    """A method that writes figures in place of training; the list of its calls."""
    calls = []

    def method(cfg, run):
        calls.append((cfg.gain, cfg.seed))
        lines = []
        for t in range(1, cfg.iterations + 1):
            rng = np.random.default_rng([cfg.seed, t])
            by_prompt = 50 + cfg.gain * (t - 1) / 2 + rng.normal(0, 5, 200)
            figures = {"by_prompt": by_prompt.tolist(), "greedy": 60.0, "best_of_samples": 80.0, "mean_length": 6.5}
            folder = run.path / f"iter_{t}"
            folder.mkdir()
            run.journal(folder.name, "sft", "done", seconds=2.0)
            (folder / "evaluation.json").write_text(json.dumps(figures | {"parse_rate": 1.0}))
            lines.append(
                {
                    "iteration": t,
                    "pairs": None if t == 1 else 90 + cfg.seed,
                    "seconds": {"sft": 2.0, "eval": 1.0},
                    "judge_agreement": None,
                    "mean_length": 6.5,
                    "judge_quality": cfg.judged and dict.fromkeys(methods_table.JUDGED, 0.5 + 0.1 * cfg.seed),
                }
            )
        run.at("iter_0").value("model", lambda: {"fingerprint": "given"})
        run.update_summary({"status": "complete", "iterations": lines})

    monkeypatch.setattr(methods_table, "_fingerprint", lambda model: model)
    monkeypatch.setattr(methods_table, "method_of", lambda cfg: method)
    monkeypatch.setattr(methods_table, "carry_out", method)
    monkeypatch.setitem(methods_table.IN_COMMON, "method", InCommon(frozenset({"gain"}), ("start",)))
    return calls


METHOD = methods_table.Arm("m", "method", Config(gain=12.0), (0, 1, 2))
CONTROL = methods_table.Arm("m", "control", Config(gain=0.0), (0, 1, 2))


def test_bench_runs_unfinished_arms_and_tabulates(tmp_path, calls):
    value = methods_table.bench_methods(tmp_path, [METHOD, CONTROL])
    assert calls == [(12.0, 0), (12.0, 1), (12.0, 2), (0.0, 0), (0.0, 1), (0.0, 2)]
    method, control = value["arms"]
    assert method["gain"]["mean"] == pytest.approx(12, abs=1)
    assert method["gain"]["ci95"][0] > 10
    assert control["gain"]["ci95"][0] < 0 < control["gain"]["ci95"][1]
    last = method["iterations"][2]
    assert last["quality"] == pytest.approx(np.mean(last["quality_of_seeds"]))
    assert last["ci95"][0] < last["quality"] < last["ci95"][1]
    assert method["iterations"][0]["pairs"] is None and last["pairs"] == 91
    assert method["seconds"] == pytest.approx(6.0, abs=0.1)
    assert json.loads((tmp_path / "table.json").read_text()) == value
    again = methods_table.bench_methods(tmp_path, [METHOD, CONTROL])
    assert len(calls) == 6  # all of them were complete
    assert again == value


def test_runs_may_stop_at_different_iterations(tmp_path, calls):
    methods_table.bench_methods(tmp_path, [METHOD])
    stopped = tmp_path / "m" / "method" / "1" / "summary.json"
    summary = json.loads(stopped.read_text())
    stopped.write_text(json.dumps(summary | {"iterations": summary["iterations"][:2]}))
    row = methods_table.bench_methods(tmp_path, [METHOD])["arms"][0]
    assert [line["seeds"] for line in row["iterations"]] == [3, 3, 2]
    assert row["gain"]["mean"] == pytest.approx((12 + 6 + 12) / 3, abs=1)


def test_gain_is_that_of_the_iteration_which_the_method_found_to_be_best(tmp_path, calls):
    methods_table.bench_methods(tmp_path, [METHOD])
    for seed in METHOD.seeds:
        file = tmp_path / "m" / "method" / str(seed) / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"best": 2}))
    row = methods_table.bench_methods(tmp_path, [METHOD])["arms"][0]
    assert row["gain"]["mean"] == pytest.approx(6, abs=1) and len(row["iterations"]) == 3


def test_finished_run_of_another_model_is_refused(tmp_path, calls, monkeypatch):
    methods_table.bench_methods(tmp_path, [METHOD])
    monkeypatch.setattr(methods_table, "_fingerprint", lambda model: "other")
    with pytest.raises(methods_table.BenchError, match="from the weights given, given now has other"):
        methods_table.bench_methods(tmp_path, [METHOD])


def test_claims_are_checked(tmp_path, calls):
    value = methods_table.bench_methods(tmp_path, [METHOD, CONTROL])
    assert [claim["held"] for claim in value["claims"]] == [True, True]
    weak = [
        METHOD._replace(method="weak", config=Config(gain=4.0)),
        CONTROL._replace(method="weak", config=METHOD.config),
    ]
    value = methods_table.bench_methods(tmp_path, weak)
    assert [claim["held"] for claim in value["claims"]] == [False, False]


def test_shared_scopes_are_copied_between_arms(tmp_path, calls):
    done, folder = tmp_path / "done", tmp_path / "folder"
    (done / "start").mkdir(parents=True)
    (done / "start" / "prompts.jsonl").write_text("{}")
    (done / "iter_1").mkdir()
    folder.mkdir()
    methods_table.share(Config(gain=1.0), done, Config(gain=2.0, iterations=4), folder)
    assert not list(folder.iterdir())  # another field differs, too
    (folder / ".start.copy").mkdir()  # of a process that died
    (folder / ".start.copy" / "half").touch()
    methods_table.share(Config(gain=1.0), done, Config(gain=2.0), folder)
    assert [path.name for path in folder.iterdir()] == ["start"]
    assert [path.name for path in (folder / "start").iterdir()] == ["prompts.jsonl"]
    (done / "start" / "later").touch()
    methods_table.share(Config(gain=1.0), done, Config(gain=2.0), folder)
    assert not (folder / "start" / "later").exists()  # what is there stays


def test_markdown_table_is_written(tmp_path, calls):
    value = methods_table.bench_methods(tmp_path, [METHOD._replace(seeds=(0,))], {"command": "jaxsi bench methods"})
    rows = methods_table.rows_of(value)
    assert "command: jaxsi bench methods" in (tmp_path / "table.md").read_text()
    assert rows[0]["seconds an arm"] == "6"
    assert [(row["arm"], row["iteration"]) for row in rows] == [("method", "1"), ("", "2"), ("", "3")]
    assert [bool(row["gain"]) for row in rows] == [False, False, True]
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(methods_table.markdown(rows)) and text.endswith("\n")
    assert {line.count("|") for line in methods_table.markdown(rows).splitlines()} == {len(rows[0]) + 1}


def test_judges_have_a_table_of_their_own(tmp_path, calls):
    judged = METHOD._replace(config=Config(gain=1.0, judged=True))
    value = methods_table.bench_methods(tmp_path, [judged, CONTROL])
    rows = methods_table.judge_rows_of(value)
    assert [(row["arm"], row["iteration"]) for row in rows] == [("method", "1"), ("", "2"), ("", "3")]
    assert {row["kendall"] for row in rows} == {"0.600"} and {row["seeds"] for row in rows} == {"3"}, "mean over seeds"
    text = (tmp_path / "table.md").read_text()
    assert f"human rankings:\n\n{methods_table.markdown(rows)}" in text
    plain = methods_table.bench_methods(tmp_path / "plain", [CONTROL])
    assert methods_table.judge_rows_of(plain) == [] and "human" not in (tmp_path / "plain" / "table.md").read_text()


def test_figure_is_drawn(tmp_path, calls):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'jaxsi[plots]'")
    from jaxsi.toyworld.methods_plot import plot

    value = methods_table.bench_methods(tmp_path, [METHOD, CONTROL])
    files = [tmp_path / "quality.png", tmp_path / "quality.svg"]
    plot(value, files)
    assert files[0].read_bytes().startswith(b"\x89PNG") and "the method" in files[1].read_text()
