"""A run that stops wherever a run can be taken up again, in one process: the programs are compiled once.

    python tests/stop_everywhere.py CONFIG.py FOLDER

makes FOLDER/whole without a stop, then FOLDER/stopped, which it takes up until no stop is left, then FOLDER/stops.json:
[[scope, stage, place], ...], in order. The places:
    start    the journal says that the stage has begun, nothing else has happened
    shard    the first of a stage's shards is on disk
    records  a stage's file of records is on disk; a file that counts them is not, and the journal does not say so
    resume   the first resume point of a training is on disk
    end      the stage's result is on disk, the journal does not say so yet
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from micro_runs import run_method

from jaxsi.runs import run as run_module
from jaxsi.runs.config_file import load_config
from jaxsi.runs.run import Run
from jaxsi.training import resume


class Stop(BaseException):
    """In place of a kill. No error, so that nothing catches it."""


def main(config_file: Path, folder: Path) -> None:
    config = load_config(config_file)
    run_method(config, folder / "whole")
    stops: list[tuple[str, str, str]] = []

    def stop_once(*stop: str) -> None:
        if stop not in stops:
            stops.append(stop)
            raise Stop(*stop)

    write_entry, write_records, save_resume = Run.journal, run_module.write_jsonl, resume.save_resume

    def journal(run: Run, scope: str, stage: str, event: str, **figures: Any) -> None:
        if event == "done":
            stop_once(scope, stage, "end")
        write_entry(run, scope, stage, event, **figures)
        if event == "start":
            stop_once(scope, stage, "start")

    def write_jsonl(path: Path, records: Any) -> None:
        write_records(path, records)
        if path.parent.suffix == ".shards":
            stop_once(path.parent.parent.name, path.parent.stem, "shard")
        else:
            stop_once(path.parent.name, path.stem, "records")

    def save_point(points: Path, state: Any, **meta: Any) -> None:
        save_resume(points, state, **meta)
        stop_once(points.parent.name, "", "resume")

    with (
        mock.patch.object(Run, "journal", journal),
        mock.patch.object(run_module, "write_jsonl", write_jsonl),
        mock.patch.object(resume, "save_resume", save_point),
    ):
        while True:
            try:
                run_method(config, folder / "stopped")
            except Stop:
                continue
            break
    unfinished = folder / "stops.json.tmp"
    unfinished.write_text(json.dumps(stops))
    unfinished.rename(folder / "stops.json")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
