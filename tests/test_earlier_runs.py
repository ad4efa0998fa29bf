"""A run of earlier code goes on: its config.json has module paths in place of stored ids.

tests/golden/run_before_the_rooms has the config.json and summary.json that commit 9cbb001, the last one before the
rooms, wrote for the micro run of Self-Rewarding with `--iterations 1`; only the path of the model is shortened. The
other files of a run keep names and content, and their bytes depend on the processor, so they come from a run of today.
"""

import json
import shutil
from pathlib import Path

import pytest
from micro_runs import artefacts, micro, micro_run
from processes import ROOT, ended, start_command

from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import describe_config

EARLIER = Path(__file__).parent / "golden" / "run_before_the_rooms"


@pytest.mark.slow
@pytest.mark.xdist_group("self_rewarding")  # its worker has the micro run
def test_run_of_earlier_code_goes_on_to_the_same_bytes(tmp_path):
    whole = micro_run("self_rewarding").whole
    directory = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("iter_2"))
    config = json.loads((EARLIER / "config.json").read_text())
    assert config["judging"] == "jaxsi.feedback.judge" and config["iterations"] == 1
    # What the micro config sets today and that code did not know; of the other new fields it has the defaults.
    today = describe_config(load_config(micro("self_rewarding")))
    for part, field in (("prompts", "format"), ("seed_data", "agrees"), ("seed_data", "judge_test")):
        assert field not in config[part]
        config[part][field] = today[part][field]
    (directory / "config.json").write_text(json.dumps(config | {"model": str(ROOT / config["model"])}))
    shutil.copy(EARLIER / "summary.json", directory)

    [(code, _, err)] = ended(start_command("run", micro("self_rewarding"), "--run-dir", directory, count=1, devices=1))
    assert code == 0, err
    assert artefacts(directory) == artefacts(whole)
    assert json.loads((directory / "config.json").read_text())["judging"] == "feedback.judge"
    assert [line["iteration"] for line in json.loads((directory / "summary.json").read_text())["iterations"]] == [1, 2]
