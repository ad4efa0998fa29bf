"""A config's run: finds the method that the config is of, carries it out, and says when nothing is left."""

import inspect
import json
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsi.lm import LM, load, resolve
from jaxsi.methods.preflight import check
from jaxsi.model.compute_dtype import settled
from jaxsi.runs import progress, provenance
from jaxsi.runs.run import Run, RunError

Method = Callable[[Any, Run], LM]


def run(config: Any, run_dir: Path | str) -> LM:
    """Runs the method of ``config`` in ``run_dir``, or goes on where an earlier run of it stopped.

    Args:
      config: a Config of this package or of your own, see ``method_of``.

    Returns: the method's result, the model of the last iteration or of the one that the method found to be best.

    Raises: PreflightError and others if the run is bound to fail; RunConfigError if ``run_dir`` holds a run of another
      config; what the method raises.
    """
    directory = Path(run_dir)
    config = _ready(config, directory)
    model = _finish(config, directory)
    return model if model is not None else load(directory, dtype=config.sampling.dtype, weights_dtype="float32")


def finish(config: Any, directory: Path) -> LM | None:
    """``run``, which returns None if nothing was left to do: then no model was loaded.

    Raises: LoadError if nothing is left but the checkpoint of the result is gone or damaged.
    """
    return _finish(_ready(config, directory), directory)


def _ready(config: Any, directory: Path) -> Any:
    """``config``, checked, with the dtypes that the run has or gets in place of "auto"."""
    if not nothing_is_left(directory, config):
        # Before the directory exists: a config that is mended after an error here is not yet that of a run.
        check(config, directory)
    return settled(config, directory)


def _finish(config: Any, directory: Path) -> LM | None:
    with Run.open(directory, config) as opened:
        if not opened.complete:
            return carry_out(config, opened)
        if any(directory.glob("iter_*/checkpoint")):  # a method of your own may keep none
            resolve(directory)
        return None


def carry_out(config: Any, run: Run) -> LM:
    """Carries out the method of ``config`` in a run that is open, and marks the run as complete."""
    method = method_of(config)
    run.update_summary({"method": method.__name__})
    provenance.note(run.path)
    with progress.of_run(vars(config).get("iterations")):
        model = method(config, run)
    run.update_summary({"status": "complete"})
    return model


def method_of(config: Any) -> Method:
    """The method that ``config`` is of: the function ``(cfg: Config, run: Run)`` in the file of its class.

    Raises: RunError if there is not exactly one.
    """
    cls = type(config)
    home = sys.modules[cls.__module__]
    found = [value for value in vars(home).values() if inspect.isfunction(value) and _takes(value, home, cls)]
    if len(found) != 1:
        names = ", ".join(function.__name__ for function in found) or "none"
        raise RunError(
            f"{cls.__module__} has to define one function (cfg: {cls.__name__}, run: Run), the method of this config; "
            f"it has {names}"
        )
    return found[0]


def _takes(function: Any, home: Any, cls: type) -> bool:
    if function.__module__ != home.__name__ or list(inspect.signature(function).parameters)[2:]:
        return False
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    return list(hints.values()) == [cls, Run]


def nothing_is_left(directory: Path, config: Any) -> bool:
    """Whether the run in ``directory`` is complete, with at least as many iterations as ``config`` asks for."""
    try:
        status = json.loads((directory / "summary.json").read_text())["status"]
        stored = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return status == "complete" and stored.get("iterations", 0) >= vars(config).get("iterations", 0)
