"""``jaxsi status``: what is done in a run directory."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxsi.cli.command import Report, parse
from jaxsi.cli.tables import iterations_table
from jaxsi.runs.metrics import table

DESCRIPTION = """What is done in a run directory and what is left; a run that is going on is not disturbed.

Examples:
  jaxsi status runs/toy
  jaxsi status runs/toy --json"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]


def status(argv: list[str]) -> Report:
    """The state of a run."""
    from jaxsi.runs import run

    value = run.status(parse(Status, argv, "jaxsi status", DESCRIPTION).run_dir)
    of = (
        ""
        if value["iterations"] is None
        else f", {len(value['summary'].get('iterations', []))} of {value['iterations']} iterations"
    )
    live = "a process is at work on it" if value["live"] else "no process is at work on it"
    head = f"{value['directory']}: {value['status']}{of}; {live}"
    columns = ["scope", "stage", "state", "records", "shards", "seconds"]
    stages = table(value["stages"], columns) if value["stages"] else "no stage has begun"
    return Report(value, f"{head}\n\n{stages}\n\n{iterations_table(value['summary'])}")
