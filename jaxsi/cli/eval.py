"""``jaxsi eval``: measures a model outside of the run that trained it."""

import dataclasses
from typing import Any

from jaxsi.cli.arguments import Model
from jaxsi.cli.command import Report, parse
from jaxsi.cli.judges import rubric_for
from jaxsi.cli.stored import Mesh, mesh_for, stored_config, stored_value
from jaxsi.cli.tables import figures_table

DESCRIPTION = """Exact quality on the held-out instructions of the embedded world, and how well the model judges its own
responses.

A model in a run is measured with the settings of that run, and the figures are those of its summary.json.

Examples:
  jaxsi eval toy runs/toy@2
  jaxsi eval toy exported/toy --json"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    model: Model
    dtype: str | None = None
    """Default: the dtype of MODEL's run, else float32."""
    mesh: Mesh = Mesh()


def toy(argv: list[str]) -> Report:
    """Exact quality on the embedded world."""
    args = parse(Toy, argv, "jaxsi eval toy", DESCRIPTION)
    from jaxsi.lm import load
    from jaxsi.stages.judge import JudgeConfig
    from jaxsi.toyworld.corpus import RUBRIC
    from jaxsi.toyworld.evaluate import ToyEvaluation

    evaluation, rubric, judge = ToyEvaluation(), RUBRIC, JudgeConfig(max_new_tokens=32)
    dtype = "float32"
    stored: dict[str, Any] | None = stored_config(args.model)
    if stored is not None:
        dtype = stored["sampling"]["dtype"]
    if stored is not None and {"rubric", "judge"} <= set(stored):  # only one of the methods has a judge
        rubric, judge = rubric_for(None, args.model), stored_value(JudgeConfig, stored["judge"])
        stored_evaluation = stored["evaluate"]
        if isinstance(stored_evaluation, dict) and stored_evaluation["__type__"].endswith("evals.toy.ToyEvaluation"):
            evaluation = stored_value(ToyEvaluation, stored_evaluation)
    lm = load(args.model, mesh_for(args.model, args.mesh), args.dtype or dtype, weights_dtype="float32")
    figures = evaluation.measure(lm, rubric, judge)
    value = {"model": args.model, "fingerprint": lm.fingerprint, **figures}
    low, high = figures["quality"]["ci95"]
    row = {name: figure for name, figure in value.items() if name != "by_prompt"}
    row["quality"] = f"{figures['quality']['mean']:.2f} ({low:.2f} to {high:.2f})"
    return Report(value, figures_table(row))
