"""The table of arms x seeds, on runs whose figures are made up."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest

from jaxsi import bench


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    gain: float
    iterations: int = 3
    seed: int = 0

    RESUMABLE: ClassVar[frozenset[str]] = frozenset()


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
            (folder / "evaluation.json").write_text(json.dumps(figures | {"judge_agreement": None, "parse_rate": 1.0}))
            lines.append(
                {"iteration": t, "pairs": None if t == 1 else 90 + cfg.seed, "seconds": {"sft": 2.0, "eval": 1.0}}
            )
        run.update_summary({"status": "complete", "iterations": lines})

    monkeypatch.setattr(bench, "method_of", lambda cfg: method)
    return calls


def test_it_runs_what_is_not_done_and_tabulates(tmp_path, calls):
    configs = {"method": Config(gain=12.0), "permuted": Config(gain=0.0)}
    value = bench.bench_methods(tmp_path, configs, range(3))
    assert calls == [(12.0, 0), (12.0, 1), (12.0, 2), (0.0, 0), (0.0, 1), (0.0, 2)]
    method, permuted = value["arms"]
    assert method["gain"]["mean"] == pytest.approx(12, abs=1)
    assert method["gain"]["ci95"][0] > 10
    assert permuted["gain"]["ci95"][0] < 0 < permuted["gain"]["ci95"][1]
    assert method["iterations"][2]["quality"] == pytest.approx(np.mean(method["iterations"][2]["quality_of_seeds"]))
    assert method["iterations"][0]["pairs"] is None
    assert method["iterations"][2]["pairs"] == 91
    assert method["iterations"][0]["seconds"] == 3.0
    assert json.loads((tmp_path / "table.json").read_text()) == value
    again = bench.bench_methods(tmp_path, configs, range(3))
    assert len(calls) == 6  # all of them were complete
    assert again == value


def test_the_table_to_read(tmp_path, calls):
    value = bench.bench_methods(tmp_path, {"method": Config(gain=12.0)}, [0])
    rows = bench.rows_of(value)
    assert [(row["arm"], row["M"]) for row in rows] == [("method", "1"), ("method", "2"), ("method", "3")]
    assert [bool(row["gain (95 % interval)"]) for row in rows] == [False, False, True]
    text = (tmp_path / "table.md").read_text()
    assert text == bench.markdown(rows)
    assert {line.count("|") for line in text.splitlines()} == {len(rows[0]) + 1}
