"""``jaxsi report``: one HTML page of runs."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from jaxsi.cli.command import Report, UsageError, parse

DESCRIPTION = """Writes one HTML page of one or several runs, finished or not: quality, the judge, pairs, training,
time, config, and a browser of samples. The page needs no other file and no network.

Examples:
  jaxsi report runs/toy                             writes runs/toy/report.html
  jaxsi report runs/toy runs/permuted -o both.html  two runs side by side
  jaxsi report runs/toy --watch                     writes it again while the run goes on, until it is complete"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The HTML file; report.html in the run directory by default, in the current folder for several runs."""
    samples: int = 20_000
    """The most samples in the page; beyond, every iteration keeps evenly spaced ones."""
    watch: bool = False
    """Write the page again when a run has changed, until all are complete. The page loads itself again."""
    every: float = 20.0
    """Seconds between two looks at the runs, with --watch."""


def report(argv: list[str]) -> Report:
    """Writes the page."""
    args = parse(ReportOptions, argv, "jaxsi report", DESCRIPTION)
    from jaxsi.report.run_files import signature

    if not args.run_dirs:
        raise UsageError("give at least one run directory: jaxsi report RUN_DIR")
    if args.samples < 1 or args.every <= 0:
        raise UsageError(f"--samples is {args.samples} and --every {args.every:g}; give at least 1, and more than 0")
    for path in args.run_dirs:
        if not path.is_dir():
            raise UsageError(f"{path} is not a run directory: there is no such folder; check the path")
    single = args.run_dirs[0] / "report.html" if len(args.run_dirs) == 1 else Path("report.html")
    out = args.out or single
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: it has to be a file in a folder that exists")
    while True:
        before = [signature(path) for path in args.run_dirs]
        value = _written(args, out)
        if not args.watch or value["complete"]:
            break
        while [signature(path) for path in args.run_dirs] == before:
            time.sleep(args.every)
    lines = [f"{out}: {value['runs']} run{'s' if value['runs'] > 1 else ''}, {value['samples']} samples"]
    lines += [f"could not be read: {line}" for line in value["damage"][:5]]
    if len(value["damage"]) > 5:
        lines.append(f"and {len(value['damage']) - 5} more; the page names them")
    return Report(value, "\n".join(lines))


def _written(args: ReportOptions, out: Path) -> dict:
    from jaxsi.report.page import write_page
    from jaxsi.report.run_files import read_runs
    from jaxsi.runs.progress import progress

    with progress("reading", len(args.run_dirs)) as advance:
        runs = read_runs(list(args.run_dirs), advance=advance)
    complete = all(run.status == "complete" for run in runs)
    samples = write_page(out, runs, samples=args.samples, refresh=args.every if args.watch and not complete else None)
    damage = [f"{run.path / line}" for run in runs for line in run.damage]
    return {
        "out": str(out), "runs": len(runs), "samples": samples, "complete": complete, "damage": damage,
    }  # fmt: skip
