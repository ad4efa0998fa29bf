"""A run that the code before the rooms began goes on: it stored module paths where stored ids are now."""

import json
import shutil
from typing import Any

import pytest
from micro_runs import artefacts, micro, micro_run
from processes import ended, start_command

from jaxsi.runs import config_snapshot
from jaxsi.runs.config_file import load_config


def as_earlier(value: Any) -> Any:
    """A stored config as it was stored then: the ids are what the module paths were, without the package."""
    if isinstance(value, dict):
        return {name: as_earlier(item) for name, item in value.items()}
    return f"jaxsi.{value}" if value in config_snapshot._IDS.values() else value


@pytest.mark.slow
@pytest.mark.xdist_group("self_rewarding")  # its worker has the micro run
def test_run_of_earlier_code_goes_on_to_the_same_bytes(tmp_path):
    whole = micro_run("self_rewarding").whole
    load_config(micro("self_rewarding"))  # so that the ids are known
    directory = shutil.copytree(whole, tmp_path / "run")
    config = as_earlier(json.loads((directory / "config.json").read_text()))
    assert config["judging"] == "jaxsi.feedback.judge" and config["iterations"] == 2
    del config["dpo"]["reference"], config["dpo"]["optimizer"]
    # As it was after iteration 1, with iterations=1.
    shutil.rmtree(directory / "iter_2")
    (directory / "config.json").write_text(json.dumps(config | {"iterations": 1}))
    summary = json.loads((directory / "summary.json").read_text())
    semantics = {"init_from": "M_{t-1}", "reference": "M_{t-1}", "data": "current", "optimizer": "reset"}
    lines = {"semantics": semantics, "iterations": summary["iterations"][:1]}
    (directory / "summary.json").write_text(json.dumps(summary | lines))

    [(code, _, err)] = ended(start_command("run", micro("self_rewarding"), "--run-dir", directory, count=1, devices=1))
    assert code == 0, err
    assert artefacts(directory) == artefacts(whole)
    assert json.loads((directory / "config.json").read_text())["judging"] == "feedback.judge"
    assert [line["iteration"] for line in json.loads((directory / "summary.json").read_text())["iterations"]] == [1, 2]
