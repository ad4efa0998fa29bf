"""``jaxsi bench``: tables that compare."""

import dataclasses
from pathlib import Path

from jaxsi.commands import Report, UsageError, parse

ARMS = {"method": "toy.py", "permuted": "toy_permuted.py", "exact": "toy_exact.py"}

DESCRIPTION = """The embedded world over several seeds, with three judges: the model itself (method), its own scores
dealt out at random within each prompt (permuted), and the exact grader (exact). Each run is resumable, and so is the
whole.

Examples:
  jaxsi bench methods
  jaxsi bench methods --seeds 1 --arms method exact --run-dir runs/quick"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Methods:
    seeds: int = 3
    """Seeds 0, 1, ... of each arm."""
    arms: tuple[str, ...] = tuple(ARMS)
    run_dir: Path = Path("runs/bench")
    """Holds <arm>/<seed>, table.json and table.md."""
    configs: Path = Path("configs/self_rewarding")
    """The folder of toy.py, toy_permuted.py and toy_exact.py."""


def methods(argv: list[str]) -> Report:
    """The table of arms x seeds."""
    args = parse(Methods, argv, "jaxsi bench methods", DESCRIPTION)
    if args.seeds < 1 or not args.arms or set(args.arms) - set(ARMS):
        raise UsageError(
            f"--seeds {args.seeds} --arms {' '.join(args.arms)}: at least 1 seed, and arms of {', '.join(ARMS)}"
        )
    from jaxsi.bench import bench_methods, rows_of
    from jaxsi.config_file import load_config
    from jaxsi.metrics import table

    configs = {arm: load_config(args.configs / ARMS[arm]) for arm in args.arms}
    args.run_dir.mkdir(parents=True, exist_ok=True)
    value = bench_methods(args.run_dir, configs, range(args.seeds))
    return Report(value | {"run_dir": str(args.run_dir)}, table(rows_of(value)))
