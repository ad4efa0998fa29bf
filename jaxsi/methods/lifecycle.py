"""What every method does around its iterations: begin with the model it was given, and say what came of each one."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxsi.lm import LM, load
from jaxsi.model import mesh as meshlib
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import StaleRecordsError
from jaxsi.training.train import TrainConfig


def begin(run: Run, model: str, mesh: MeshConfig, dtype: str, *trainings: TrainConfig | None) -> LM:
    """Loads M_0 with float32 weights, to sample in ``dtype``; a run goes on with the M_0 it began with.

    Raises: MeshError where a batch of one of ``trainings`` does not divide among the devices. StaleRecordsError where
      ``model`` has other weights than when the run began.
    """
    base = load(model, meshlib.make_mesh(mesh), dtype, weights_dtype="float32")
    for training in trainings:
        if training is not None:
            training.check(base.mesh)
    given = run.at("iter_0").value("model", lambda: {"path": model, "fingerprint": base.fingerprint})
    if given["fingerprint"] != base.fingerprint:
        raise StaleRecordsError(
            f"{model} now has the weights {base.fingerprint}, this run began with {given['fingerprint']}; give it "
            "back the model it began with, or start a new run directory"
        )
    return base


def report(
    run: Run,
    it: Scope,
    t: int | Literal["base"],
    lm: LM,
    figures: Mapping[str, Any],
    *,
    method: str,
    semantics: Mapping[str, str],
    **counts: Any,
) -> None:
    """Writes the line of M_t in summary.json, of what was measured (``figures``, of the method's evaluation) and
    counted; that of the model as given, ``t`` = "base", stands beside the iterations."""
    line = {
        "iteration": t,
        "quality": figures.get("quality"),
        "greedy": figures.get("greedy"),
        "judge_agreement": figures.get("judge_agreement"),
        "parse_rate": figures.get("parse_rate"),
        "pairs": None,
        "ties": None,
        "alarms": None,
        "mean_length": figures.get("mean_length"),
        "fingerprint": lm.fingerprint,
        "seconds": it.seconds(),
        **counts,
    }
    if t == "base":
        run.update_summary({"method": method, "semantics": dict(semantics), "base": line})
        return
    before = [entry for entry in run.summary.get("iterations", []) if entry["iteration"] < t]
    run.update_summary({"method": method, "semantics": dict(semantics), "iterations": [*before, line]})
