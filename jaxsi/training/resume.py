"""What training writes to disk: resume points, the result (valid once it is complete), and the log."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.runs import checkpoint
from jaxsi.runs.run import Scope

Restored = TypeVar("Restored")


def finished(lm: LM, scope: Scope) -> LM | None:
    """The scope's trained model, if an earlier run has finished it; else None."""
    folder = scope.path / "checkpoint"
    if not checkpoint.is_complete(folder / "weights"):
        return None
    remove(scope.path / "resume")  # left behind if a run was killed just before it removed it
    return lm.replace(checkpoint.restore(folder / "weights", jax.tree.map(_abstract, lm.weights)))


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def resumed(start: Restored, folder: Path, step: int | None = None) -> Restored:
    """The newest intact state in ``folder`` (or that of ``step``); ``start`` if there is none."""
    saved = checkpoint.latest(folder) if step is None else folder / f"{step:08d}"
    if saved is None:
        return start
    abstract = jax.tree.map(_abstract, start)
    jax.tree.map(lambda x: x.delete(), start)  # first: a run that just fits in memory must be able to resume
    return checkpoint.restore(saved, abstract)


def moments_of(scope: Scope, like: Restored) -> Restored:
    """The optimizer's moments at the end of the training in ``scope``, laid out as ``like``. Raises: CheckpointError if
    there are none."""
    abstract = jax.tree.map(_abstract, {"moments": like, "step": jnp.int32(0)})
    return checkpoint.restore(scope.path / "checkpoint" / "optimizer", abstract)["moments"]


def compared(folder: Path) -> int:
    """The step of the model that early stopping compared last, by the newest intact point in ``folder``; or 0."""
    saved = checkpoint.latest(folder)
    return 0 if saved is None else checkpoint.read_meta(saved)["compared"] or 0


def save_resume(folder: Path, state: Any, *, done: int, compared: int | None = None) -> None:
    """Saves a resume point after ``done`` steps, then removes the older ones, except for that of ``compared``."""
    target = folder / f"{done:08d}"
    checkpoint.save(target, state, {"step": done, "compared": compared})
    for old in folder.iterdir():
        if old not in (target, folder / f"{compared or 0:08d}"):
            remove(old)


def save_result(trained: LM, state: Any, scope: Scope, meta: dict[str, Any]) -> None:
    """The scope's checkpoint, with the moments of ``state`` (a train.State or None). The weights are
    written last: once they are there, the checkpoint counts as complete."""
    folder = scope.path / "checkpoint"
    remove(folder / "optimizer")  # complete if a run was killed between the two saves
    if state is not None:
        moments = {"moments": state.moments, "step": state.step}
        checkpoint.save(folder / "optimizer", moments, {"data_position": int(state.step)})
    lmlib.save_checkpoint(trained, folder, meta)
    remove(scope.path / "resume")


def remove(folder: Path) -> None:
    """Removes a folder that a killed process left behind or that is no longer needed (process 0 only)."""
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)


class Log:
    """train.jsonl, one line every few steps. On resume, lines after the checkpoint are dropped."""

    def __init__(self, path: Path, done: int, total: int) -> None:
        self.path, self.total = path, total
        if jax.process_index() != 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        valid_lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        path.write_text("".join(line + "\n" for line in valid_lines))

    def write(self, step: int, learning_rate: float, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        row = {"step": step, "of": self.total, "learning_rate": learning_rate, **values}
        if jax.process_index() == 0:
            with self.path.open("a") as file:
                safe = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
                file.write(json.dumps(safe) + "\n")
