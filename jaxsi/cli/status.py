"""``jaxsi status``: the finished and the remaining stages of a run directory."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxsi.cli.command import Report, parse
from jaxsi.cli.tables import iterations_table
from jaxsi.runs.metrics import table

DESCRIPTION = """Shows the finished and the remaining stages of a run directory. It does not disturb a run in progress.

Examples:
  jaxsi status runs/toy
  jaxsi status runs/toy --json"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]


def status(argv: list[str]) -> Report:
    """The state of a run."""
    from jaxsi.runs import status as stored

    value = stored.status(parse(Status, argv, "jaxsi status", DESCRIPTION).run_dir)
    progress = ""
    if value["iterations"] is not None:
        progress = f", {len(value['summary'].get('iterations', []))} of {value['iterations']} iterations"
    live = "a process is working on it" if value["live"] else "no process is working on it"
    head = f"{value['directory']}: {value['status']}{progress}; {live}"
    columns = ["scope", "stage", "state", "records", "shards", "seconds"]
    stages = table(value["stages"], columns) if value["stages"] else "no stage has begun"
    return Report(value, f"{head}\n\n{stages}\n\n{iterations_table(value['summary'])}")
