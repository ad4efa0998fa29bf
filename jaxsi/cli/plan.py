"""``jaxsi plan``: what a config needs on hardware that this machine does not have."""

import argparse
import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

from jaxsi.cli.command import EVERY_COMMAND, Report, UsageError
from jaxsi.cli.run import configure

DESCRIPTION = f"""Predicts the memory per chip, the roofline time, and the hours and chip-hours of an iteration. For a
TPU slice it compiles every program of the config, on any machine (pip install "jaxsi[plan]"); for GPUs it estimates the
programs by arithmetic. If the config does not fit, it says why and what would make it fit.

Examples:
  jaxsi plan configs/self_rewarding/llama2_70b_v5p128.py --topology v5p:4x4x4
  jaxsi plan configs/self_rewarding/llama2_70b_v5p128.py --topology v5p-256 --search
  jaxsi plan configs/self_rewarding/qwen3_0p6b_1gpu.py --topology rtx4090 --num-prompts 5000
  jaxsi plan configs/seft/nectar_8b_8xh100.py --topology h100:8 --sft.accumulate 8 --json

CONFIG.py and its fields are the same as for jaxsi run. Further options:
  --topology T        v5p:4x4x4, v5e:8x8, v6e:4x4, v4:2x2x2, or v5p-128, v5litepod-64; h100:8, h200:1, b200:8, rtx4090
  --search            try every mesh data x fsdp x tensor of the topology, and find the fastest that fits
  --arithmetic        estimate TPUs as well: takes a second and needs no compiler
  --num-prompts N     prompts of an iteration, if the config does not say (1000)
  --num-examples N    examples in the training data, if the config does not say (1000)
  --prompt-tokens N   tokens of a prompt with its template (512)
  --fill F            length of a response as a share of its limit (1.0)

The memory is the compiler's own figure; "beside" is the memory of the other models that the method holds at that time.
The roofline time is the longest of three: FLOPs, memory traffic and messages, each at the chip's peak rate. It is a
lower bound.

{EVERY_COMMAND}"""


def plan(argv: list[str]) -> Report:
    """Plans a config for a topology."""
    parser = argparse.ArgumentParser(
        prog="jaxsi plan", usage="jaxsi plan CONFIG.py --topology T [options]", add_help=False, allow_abbrev=False
    )
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
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan neither needs nor takes the devices of this machine
    from jaxsi.perf.planned_stages import Assumptions
    from jaxsi.perf.topologies import TopologyError, topology

    cfg = configure(path, rest)
    numbers = {
        "prompts": options.num_prompts,
        "examples": options.num_examples,
        "prompt_tokens": options.prompt_tokens,
        "fill": options.fill,
    }
    try:
        hardware = topology(options.topology)
        assumptions = Assumptions(**{name: value for name, value in numbers.items() if value is not None})
    except (TopologyError, ValueError) as error:
        raise UsageError(str(error)) from error
    compiled = hardware.chip.kind == "tpu" and not options.arithmetic
    if compiled and importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "the TPU compiler is not installed: pip install 'jaxsi[plan]' (libtpu; Linux), or give --arithmetic"
        )
    from jaxsi.perf import plan as planner

    if options.search:
        found = planner.search(cfg, hardware, assumptions, architecture, compiled=compiled)
        best = found[0][1]
        return Report(
            value_of(path, best, assumptions) | {"search": [candidate(result) for _, result in found]},
            f"{candidates_text(found)}\n\n{text_of(path, best, assumptions)}",
        )
    result = planner.plan(cfg, hardware, assumptions, architecture, compiled=compiled)
    return Report(value_of(path, result, assumptions), text_of(path, result, assumptions))


def architecture(name: str) -> Any:
    """The architecture in a folder's config.json, or that of a published model."""
    from jaxsi import lm
    from jaxsi.hf.config import read_config
    from jaxsi.perf.architectures import published

    return read_config(lm.resolve(name)) if Path(name).exists() else published(name)


# ------------------------------------------------------------------------------------------------------------- the plan


def value_of(path: Path, plan: Any, assumptions: Any) -> dict[str, Any]:
    """The object that --json prints."""
    hours = plan.hours
    return {
        "config": str(path),
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "hosts": plan.topology.hosts,
        "mesh": dict(zip(("data", "fsdp", "tensor"), plan.mesh, strict=True)),
        "parameters": plan.parameters,
        "fits": plan.fits,
        "compiled": plan.compiled,
        "usable_gib": plan.topology.chip.usable_gib,
        "programs": [program(row) for row in distinct(plan.rows)],
        "stages": [
            {
                "name": stage.name,
                "each_iteration": stage.each,
                "hours": plan.seconds_of(stage) / 3600,
                **training_of(stage),
            }
            for stage in plan.stages
        ],
        "hours": hours,
        "hours_once": plan.hours_once,
        "iterations": plan.iterations,
        "hours_in_all": plan.hours_once + plan.iterations * hours,
        "chip_hours": hours * plan.topology.chips,
        "checkpoint_gib": plan.checkpoint_gib,
        "assumed": vars(assumptions),
        "advice": plan.advice,
        "compile_seconds": round(plan.compile_seconds, 1),
    }


def training_of(stage: Any) -> dict[str, Any]:
    """Optimizer steps, examples in each, and the share of warm-up of a stage that trains; nothing for the others."""
    from jaxsi.perf.planned_stages import Training

    if not isinstance(stage, Training):
        return {}
    return {"steps": stage.steps, "examples_a_step": stage.settings.batch_size, "warmup": stage.warmup_share}


def distinct(rows: list[Any]) -> list[Any]:
    """One row for each program, named after the first stage that runs it, with the most memory that other models take
    beside it in any stage."""
    programs: dict[Any, Any] = {}
    for row in rows:
        first = programs.setdefault(row.shape, row)
        if row.held_gib > first.held_gib:
            programs[row.shape] = dataclasses.replace(first, held_gib=row.held_gib, fits=first.fits and row.fits)
    return list(programs.values())


def program(row: Any) -> dict[str, Any]:
    build = row.build
    memory = {} if build.memory is None else build.memory._asdict() | {"program": None}
    cost = build.cost
    return {
        "name": f"{row.stage.name}: {row.name}",
        "fits": row.fits,
        "hbm_gib": None if build.memory is None else build.memory.total,
        "arguments_gib": memory.get("arguments"),
        "temporaries_gib": memory.get("temporaries"),
        "outputs_gib": memory.get("outputs"),
        "held_gib": row.held_gib,
        "refused": build.refusal,
        "flops": row.flops,
        "hbm_bytes": None if cost is None else cost.hbm_bytes,
        "collectives": {}
        if cost is None
        else {kind: {"count": t.count, "bytes": t.wire} for kind, t in cost.collectives.items()},
        "seconds": row.seconds,
        "bound": row.bound,
        "mfu": row.mfu,
        "compile_seconds": build.compile_seconds,
    }


def text_of(path: Path, plan: Any, assumptions: Any) -> str:
    """The tables."""
    from jaxsi.runs.metrics import table

    hardware, mesh = plan.topology, "x".join(map(str, plan.mesh))
    source = f"compiled in {plan.compile_seconds:.0f} s" if plan.compiled else "estimated, nothing was compiled"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    head = (
        f"{path} on {hardware.name} ({_counted(hardware.chips, 'chip')}, {_counted(hardware.hosts, 'host')}), "
        f"mesh data x fsdp x tensor = {mesh}: {verdict}\n"
        f"{_weights(plan.parameters)} weights; {source}; {hardware.chip.usable_gib:.1f} GiB of each chip are usable"
    )
    programs = [_program_row(row, hardware) for row in distinct(plan.rows) if row.build.memory or row.build.refusal]
    stages = [
        {
            "stage": stage.name,
            "runs": "each iteration" if stage.each else "once",
            "hours": _hours(plan.seconds_of(stage) / 3600),
            **_training_cells(training_of(stage)),
        }
        for stage in plan.stages
    ]
    total = plan.hours_once + plan.iterations * plan.hours
    foot = (
        f"An iteration takes {_hours(plan.hours)} h, {plan.hours * hardware.chips:,.0f} chip-hours and a checkpoint of "
        f"{plan.checkpoint_gib:,.0f} GiB. The run of {plan.iterations} iterations takes {_hours(total)} h, "
        f"{total * hardware.chips:,.0f} chip-hours. These are lower bounds, at peak rates.\n"
        f"Assumed if the config does not say: {assumptions.prompts} prompts per iteration, {assumptions.examples} "
        f"examples, {assumptions.prompt_tokens} tokens per prompt, responses {assumptions.fill:.0%} of their limits."
    )
    if any(row.build.refusal for row in plan.rows):
        foot += "\nThe hours leave out the programs that the compiler refused."
    advice = "\n".join(f"- {line}" for line in plan.advice)
    parts = [head, *([f"What does not fit:\n{advice}"] if advice else []), table(programs), table(stages), foot]
    return "\n\n".join(parts)


def _training_cells(training: dict[str, Any]) -> dict[str, str]:
    shown = {"steps": "{:,}", "examples_a_step": "{:,}", "warmup": "{:.1%}"}
    return {name.replace("_", " "): form.format(training[name]) if training else "" for name, form in shown.items()}


def _program_row(row: Any, hardware: Any) -> dict[str, Any]:
    cost, memory = row.build.cost, row.build.memory
    return {
        "program": f"{row.stage.name}: {row.name}",
        "GiB": row.build.refusal if memory is None else f"{memory.total:.1f}",
        "beside": f"{row.held_gib:.1f}",
        "of chip": "-" if memory is None else f"{(memory.total + row.held_gib) / hardware.chip.usable_gib:.0%}",
        "TFLOP": f"{row.flops / 1e12:,.4g}",
        "GB moved": "-" if cost is None else f"{cost.hbm_bytes / 1e9:,.3g}",
        "GB sent": "-" if cost is None else f"{cost.wire_bytes / 1e9:,.3g}",
        "ms": f"{1e3 * row.seconds:,.4g}",
        "bound by": row.bound,
        "MFU": "-" if row.mfu is None else f"{row.mfu:.0%}",
        "compiled s": "-" if row.build.compile_seconds is None else f"{row.build.compile_seconds:.0f}",
    }


def _counted(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _weights(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e8 else f"{n / 1e6:.2f}M"


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


# ----------------------------------------------------------------------------------------------------------- the search


def candidate(plan: Any) -> dict[str, Any]:
    """A mesh of the search in a few numbers."""
    largest = max(plan.rows, key=lambda row: row.size)
    return {
        "mesh": "x".join(map(str, plan.mesh)),
        "fits": plan.fits,
        "compiled": plan.compiled,
        "most_gib": None if largest.build.refusal else largest.gib + largest.held_gib,
        "refused": largest.build.refusal,
        "hours": plan.hours,
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
        for entry in (candidate(plan) for _, plan in found)
    ]
    best = found[0][1]
    mesh = dict(zip(("data", "fsdp", "tensor"), best.mesh, strict=True))
    flags = " ".join(f"--mesh.{name} {size}" for name, size in mesh.items())
    verdict = f"The fastest mesh that fits: {flags}" if best.fits else "No mesh of this topology fits; the best follows"
    return f"{table(rows)}\n\n{verdict}"
