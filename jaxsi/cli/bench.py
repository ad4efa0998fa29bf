"""``jaxsi bench``: tables that compare."""

import dataclasses
import importlib.util
from pathlib import Path

from jaxsi.cli.command import Report, UsageError, parse

# method -> the config files of its arms, in configs/<method>/
ARMS = {
    "self_rewarding": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
    "srt": {"method": "toy.py", "control": "toy_coin.py", "exact": "toy_exact.py"},
    "seft": {"method": "toy.py", "control": "toy_coin.py", "exact": "toy_exact.py"},
    "pit": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
    "spin": {"method": "toy.py"},
}
NAMES = ("method", "control", "exact")

DESCRIPTION = """Every method on the embedded world, over several seeds: the method, its control without a signal, and
the exact grader in its judge's or reward model's place; with --ablations what the papers take out, on one seed. Each
run is resumable, and so is the whole; stages that arms have in common are computed once. Writes table.json, table.md
and, with matplotlib, quality.png and quality.svg.

Examples:
  jaxsi bench methods
  jaxsi bench methods --methods srt pit --seeds 1 --arms method exact --run-dir runs/quick
  jaxsi bench methods --ablations"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Methods:
    methods: tuple[str, ...] = tuple(ARMS)
    seeds: int = 3
    """Seeds 0, 1, ... of each arm."""
    arms: tuple[str, ...] = NAMES
    ablations: bool = False
    """Also the configs of toy_ablations.py, with seed 0."""
    run_dir: Path = Path("runs/bench")
    """Holds <method>/<arm>/<seed>, the tables and the figure."""
    configs: Path = Path("configs")
    """The folder of the methods' config folders."""


def methods(argv: list[str]) -> Report:
    """The table of methods x arms x seeds."""
    args = parse(Methods, argv, "jaxsi bench methods", DESCRIPTION)
    if args.seeds < 1 or not args.arms or set(args.arms) - set(NAMES) or set(args.methods) - set(ARMS):
        raise UsageError(
            f"--seeds {args.seeds} --arms {' '.join(args.arms)} --methods {' '.join(args.methods)}: at least 1 seed, "
            f"arms of {', '.join(NAMES)}, methods of {', '.join(ARMS)}"
        )
    from jaxsi.runs.config_file import load_config, load_configs
    from jaxsi.runs.metrics import table
    from jaxsi.toyworld.methods_table import Arm, bench_methods, rows_of

    arms = []
    for method in args.methods:
        for name, file in ARMS[method].items():
            if name in args.arms:
                arms.append(Arm(method, name, load_config(args.configs / method / file), tuple(range(args.seeds))))
        ablations = args.configs / method / "toy_ablations.py"
        if args.ablations and ablations.exists():
            arms += [Arm(method, name, cfg, (0,)) for name, cfg in load_configs(ablations).items()]
    args.run_dir.mkdir(parents=True, exist_ok=True)
    value = bench_methods(args.run_dir, arms, made_by(" ".join(["jaxsi bench methods", *argv])))
    lines = [table(rows_of(value)), ""]
    for claim in value["claims"]:
        lines.append("{0}: {method}: {claim}: {measured}".format("held" if claim["held"] else "NOT HELD", **claim))
    if importlib.util.find_spec("matplotlib") is None:
        lines.append("no figure: pip install 'jaxsi[plots]' for one")
    else:
        from jaxsi.toyworld.methods_plot import plot

        files = [args.run_dir / "quality.png", args.run_dir / "quality.svg"]
        plot(value, files)
        lines.append(f"figure: {files[0]}")
    return Report(value | {"run_dir": str(args.run_dir)}, "\n".join(lines))


def made_by(command: str) -> dict[str, str]:
    """The command, the commit and the versions that figures come from."""
    import platform
    import subprocess

    import jax

    asked = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not in a repository"
    return {
        "command": command,
        "commit": commit,
        "versions": f"JAX {jax.__version__}, Python {platform.python_version()}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
