"""The programs of a plan, compiled ahead of time or estimated by arithmetic: what each needs of a chip."""

import concurrent.futures
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxsi.model.decoder import ModelConfig
from jaxsi.perf import estimates, hlo_cost
from jaxsi.perf.hlo_cost import Cost
from jaxsi.perf.programs import MOVE, Memory, Program, Sizes, memory_of, sampling_programs, training_programs
from jaxsi.runs.progress import progress

COMPILERS = 2  # programs that compile at the same time: one of a 70B takes 2 to 5 GiB of memory
SAMPLING = (MOVE, "prefill", "extend", "extend in place", "first tokens", "fill", "refill", "grow", "shrink", "decode")


class Shape(NamedTuple):
    """Everything that a program is compiled for. Equal shapes are compiled once."""

    name: str
    config: ModelConfig
    sizes: Sizes


class Build(NamedTuple):
    """A compiled program, or an estimated one (``compile_seconds`` is None). If the compiler refused it for lack of
    memory, ``memory`` is None and ``refusal`` says why."""

    memory: Memory | None
    cost: Cost | None
    compile_seconds: float | None = None
    refusal: str | None = None


def estimate_all(shapes: Sequence[Shape], mesh: Any) -> dict[Shape, Build]:
    """Estimates by arithmetic. Programs that only move rows have no estimate."""
    builds = {}
    for shape in shapes:
        try:
            builds[shape] = Build(*estimates.estimate(shape.name, shape.config, mesh, shape.sizes))
        except KeyError:
            builds[shape] = Build(None, None)
    return builds


def compile_all(shapes: Sequence[Shape], mesh: Mesh) -> dict[Shape, Build]:
    """Compiles for the mesh's devices, COMPILERS at a time, the slowest programs first."""
    slowest_first = sorted(shapes, key=lambda shape: shape.name not in estimates.SEQUENCES)
    builds = {}
    cache_enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot load programs for chips that are not here
    try:
        with concurrent.futures.ThreadPoolExecutor(COMPILERS) as threads, progress("compiling", len(shapes)) as advance:
            futures = {threads.submit(_compile, shape, mesh): shape for shape in slowest_first}
            try:
                for future in concurrent.futures.as_completed(futures):
                    builds[futures[future]] = future.result()
                    advance(1, True)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)  # else the rest would compile before the error shows
                raise
    finally:
        jax.config.update("jax_enable_compilation_cache", cache_enabled)
    return builds


def _compile(shape: Shape, mesh: Mesh) -> Build:
    start = time.monotonic()
    try:
        compiled = program_of(shape, mesh).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Build(None, None, time.monotonic() - start, refusal_of(str(error)))
    memory, text = memory_of(shape.name, compiled), compiled.as_text()
    return Build(memory, hlo_cost.read(text or ""), time.monotonic() - start)


def program_of(shape: Shape, mesh: Mesh) -> Program:
    family = sampling_programs if shape.name in SAMPLING else training_programs
    return family(shape.config, mesh, shape.sizes)[shape.name]


def refused_gib(refusal: str) -> float:
    """The GiB that a refusal names; 0 if it names no size."""
    found = re.match(r"needs ([\d.]+)([KMGT])iB", refusal)
    return float(found[1]) * 1024.0 ** ("KMGT".index(found[2]) - 2) if found else 0.0


def refusal_of(message: str) -> str:
    """The sizes in the compiler's message about memory, or else its first line."""
    found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    if found is None:
        found = re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    return f"needs {found[1]}iB of {found[2]}iB" if found else message.splitlines()[0][:160]
