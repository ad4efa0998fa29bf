"""``jaxsi plan``: what a config needs of a topology that this machine does not have."""

import argparse
import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

from jaxsi.cli.command import EVERY_COMMAND, Report, UsageError
from jaxsi.cli.run import configure

DESCRIPTION = f"""Compiles every program that the config runs for a TPU slice, on any machine (pip install
"jaxsi[plan]"), or estimates them by arithmetic for GPUs: memory of a chip, time by the roofline, and the hours and
chip-hours of an iteration. Says what does not fit and what would make it fit.

Examples:
  jaxsi plan configs/self_rewarding/llama2_70b_v5p128.py --topology v5p:4x4x4
  jaxsi plan configs/self_rewarding/llama2_70b_v5p128.py --topology v5p-256 --search
  jaxsi plan configs/self_rewarding/qwen3_0p6b_1gpu.py --topology rtx4090 --num-prompts 5000
  jaxsi plan configs/seft/nectar_8b_8xh100.py --topology h100:8 --sft.accumulate 8 --json

CONFIG.py and its fields as for jaxsi run; beside them:
  --topology T        v5p:4x4x4, v5e:8x8, v6e:4x4, v4:2x2x2, or v5p-128, v5litepod-64; h100:8, h200:1, b200:8, rtx4090
  --search            every mesh data x fsdp x tensor of the topology, and the fastest that fits
  --arithmetic        estimate a TPU, too: no compiler, a second
  --num-prompts N     prompts of an iteration, where the config does not say (1000)
  --num-examples N    examples of training data, where the config does not say (1000)
  --prompt-tokens N   of a prompt with its template (512)
  --fill F            the share of its limit that a response takes (1.0)

Memory is the compiler's own figure; "beside" are the models that the method holds meanwhile. The roofline time is the
longest of FLOPs at the chip's peak, memory traffic and messages at their peak rates: a lower bound.

{EVERY_COMMAND}"""


def plan(argv: list[str]) -> Report:
    """Plans a config for a topology."""
    parser = argparse.ArgumentParser(prog="jaxsi plan", usage="jaxsi plan CONFIG.py --topology T [options]",
                                     add_help=False, allow_abbrev=False)  # fmt: skip
    parser.add_argument("--topology")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--arithmetic", action="store_true")
    for name, kind in (("--num-prompts", int), ("--num-examples", int), ("--prompt-tokens", int), ("--fill", float)):
        parser.add_argument(name, type=kind)
    options, rest = parser.parse_known_args(argv)
    place = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
    if place is None:
        if any(word in ("-h", "--help") for word in argv):
            print(f"usage: jaxsi plan CONFIG.py --topology T [options]\n\n{DESCRIPTION}")
            raise SystemExit(0)
        raise UsageError("give a config first: jaxsi plan CONFIG.py --topology v5p:4x4x4")
    path = Path(rest.pop(place))
    if not options.topology and not {"-h", "--help"} & set(rest):
        raise UsageError(f"give the topology: jaxsi plan {path} --topology v5p:4x4x4 (or v5p-128, h100:8, ...)")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device of this machine is needed, or taken
    from jaxsi.perf.method_stages import Assumed
    from jaxsi.perf.topologies import TopologyError, topology

    cfg = configure(path, rest)
    given = {
        "prompts": options.num_prompts, "examples": options.num_examples, "prompt_tokens": options.prompt_tokens,
        "fill": options.fill,
    }  # fmt: skip
    try:
        where = topology(options.topology)
        assumed = Assumed(**{name: value for name, value in given.items() if value is not None})
    except (TopologyError, ValueError) as error:
        raise UsageError(str(error)) from error
    compiled = where.chip.kind == "tpu" and not options.arithmetic
    if compiled and importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "there is no TPU compiler here: pip install 'jaxsi[plan]' (libtpu; Linux), or give --arithmetic"
        )
    from jaxsi.perf import plan as planner

    if options.search:
        found = planner.search(cfg, where, assumed, architecture, compiled=compiled)
        best = found[0][1]
        return Report(
            value_of(path, best, assumed) | {"search": [candidate(made) for _, made in found]},
            f"{candidates_text(found)}\n\n{text_of(path, best, assumed)}",
        )
    made = planner.plan(cfg, where, assumed, architecture, compiled=compiled)
    return Report(value_of(path, made, assumed), text_of(path, made, assumed))


def architecture(name: str) -> Any:
    """Of a folder's config.json, else of the published models."""
    from jaxsi import lm
    from jaxsi.hf import weights as hf
    from jaxsi.perf.architectures import published

    return hf.read_config(lm.resolve(name)) if Path(name).exists() else published(name)


# ------------------------------------------------------------------------------------------------------------- the plan


def value_of(path: Path, made: Any, assumed: Any) -> dict[str, Any]:
    """What --json prints."""
    hours = made.hours
    return {
        "config": str(path),
        "topology": made.topology.name,
        "chips": made.topology.chips,
        "hosts": made.topology.hosts,
        "mesh": dict(zip(("data", "fsdp", "tensor"), made.mesh, strict=True)),
        "parameters": made.parameters,
        "fits": made.fits,
        "compiled": made.compiled,
        "usable_gib": made.topology.chip.usable_gib,
        "programs": [program(row) for row in distinct(made.rows)],
        "stages": [
            {"name": stage.name, "each_iteration": stage.each, "hours": made.seconds_of(stage) / 3600}
            for stage in made.stages
        ],
        "hours": hours,
        "hours_once": made.hours_once,
        "iterations": made.iterations,
        "hours_in_all": made.hours_once + made.iterations * hours,
        "chip_hours": hours * made.topology.chips,
        "checkpoint_gib": made.checkpoint_gib,
        "assumed": vars(assumed),
        "advice": made.advice,
        "compile_seconds": round(made.compile_seconds, 1),
    }


def distinct(rows: list[Any]) -> list[Any]:
    """A row for each program, named by the first stage that runs it, with the most that lies beside it in any."""
    most: dict[Any, Any] = {}
    for row in rows:
        first = most.setdefault(row.shape, row)
        if row.held_gib > first.held_gib:
            most[row.shape] = dataclasses.replace(first, held_gib=row.held_gib, fits=first.fits and row.fits)
    return list(most.values())


def program(row: Any) -> dict[str, Any]:
    made = row.made
    memory = {} if made.memory is None else made.memory._asdict() | {"program": None}
    cost = made.cost
    return {
        "name": f"{row.stage.name}: {row.name}",
        "fits": row.fits,
        "hbm_gib": None if made.memory is None else made.memory.total,
        "arguments_gib": memory.get("arguments"),
        "temporaries_gib": memory.get("temporaries"),
        "outputs_gib": memory.get("outputs"),
        "held_gib": row.held_gib,
        "refused": made.refusal,
        "flops": row.flops,
        "hbm_bytes": None if cost is None else cost.hbm_bytes,
        "collectives": {}
        if cost is None
        else {kind: {"count": t.count, "bytes": t.wire} for kind, t in cost.collectives.items()},
        "seconds": row.seconds,
        "bound": row.bound,
        "mfu": row.mfu,
        "compile_seconds": made.compile_seconds,
    }


def text_of(path: Path, made: Any, assumed: Any) -> str:
    """The tables."""
    from jaxsi.runs.metrics import table

    where, mesh = made.topology, "x".join(map(str, made.mesh))
    how = f"compiled in {made.compile_seconds:.0f} s" if made.compiled else "by arithmetic, nothing compiled"
    verdict = "fits" if made.fits else "DOES NOT FIT"
    head = (
        f"{path} on {where.name} ({_counted(where.chips, 'chip')}, {_counted(where.hosts, 'host')}), "
        f"mesh data x fsdp x tensor = {mesh}: {verdict}\n"
        f"{_weights(made.parameters)} weights; {how}; {where.chip.usable_gib:.1f} GiB of a chip are usable"
    )
    programs = [_program_row(row, where) for row in distinct(made.rows) if row.made.memory or row.made.refusal]
    stages = [
        {
            "stage": stage.name,
            "runs": "each iteration" if stage.each else "once",
            "hours": _hours(made.seconds_of(stage) / 3600),
        }
        for stage in made.stages
    ]
    total = made.hours_once + made.iterations * made.hours
    foot = (
        f"An iteration: {_hours(made.hours)} h, {made.hours * where.chips:,.0f} chip-hours, a checkpoint of "
        f"{made.checkpoint_gib:,.0f} GiB. The run, {made.iterations} iterations: {_hours(total)} h, "
        f"{total * where.chips:,.0f} chip-hours. At peak rates: a lower bound.\n"
        f"Assumed where the config does not say: {assumed.prompts} prompts an iteration, {assumed.examples} examples, "
        f"{assumed.prompt_tokens} tokens of a prompt, responses {assumed.fill:.0%} of their limits."
    )
    if any(row.made.refusal for row in made.rows):
        foot += "\nPrograms that the compiler refused are in no hours."
    advice = "\n".join(f"- {line}" for line in made.advice)
    parts = [head, *([f"What does not fit:\n{advice}"] if advice else []), table(programs), table(stages), foot]
    return "\n\n".join(parts)


def _program_row(row: Any, where: Any) -> dict[str, Any]:
    cost, memory = row.made.cost, row.made.memory
    return {
        "program": f"{row.stage.name}: {row.name}",
        "GiB": row.made.refusal if memory is None else f"{memory.total:.1f}",
        "beside": f"{row.held_gib:.1f}",
        "of chip": "-" if memory is None else f"{(memory.total + row.held_gib) / where.chip.usable_gib:.0%}",
        "TFLOP": f"{row.flops / 1e12:,.4g}",
        "GB moved": "-" if cost is None else f"{cost.hbm_bytes / 1e9:,.3g}",
        "GB sent": "-" if cost is None else f"{cost.wire_bytes / 1e9:,.3g}",
        "ms": f"{1e3 * row.seconds:,.4g}",
        "bound by": row.bound,
        "MFU": "-" if row.mfu is None else f"{row.mfu:.0%}",
        "compiled s": "-" if row.made.compile_seconds is None else f"{row.made.compile_seconds:.0f}",
    }


def _counted(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _weights(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e8 else f"{n / 1e6:.2f}M"


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


# ------------------------------------------------------------------------------------------------------------- a search


def candidate(made: Any) -> dict[str, Any]:
    """A mesh of the search in a few numbers."""
    most = max(made.rows, key=lambda row: row.size)
    return {
        "mesh": "x".join(map(str, made.mesh)),
        "fits": made.fits,
        "compiled": made.compiled,
        "most_gib": None if most.made.refusal else most.gib + most.held_gib,
        "refused": most.made.refusal,
        "hours": made.hours,
    }


def candidates_text(found: list[Any]) -> str:
    from jaxsi.runs.metrics import table

    rows = [
        {
            "mesh": entry["mesh"],
            "fits": "yes" if entry["fits"] else "no",
            "by": "compiler" if entry["compiled"] else "arithmetic",
            "most GiB": entry["refused"] or f"{entry['most_gib']:.1f}",
            "hours an iteration": _hours(entry["hours"]),
        }
        for entry in (candidate(made) for _, made in found)
    ]
    best = found[0][1]
    mesh = dict(zip(("data", "fsdp", "tensor"), best.mesh, strict=True))
    flags = " ".join(f"--mesh.{name} {size}" for name, size in mesh.items())
    said = f"The fastest mesh that fits: {flags}" if best.fits else "No mesh of this topology fits; the nearest follows"
    return f"{table(rows)}\n\n{said}"
