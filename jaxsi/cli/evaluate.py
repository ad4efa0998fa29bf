"""``jaxsi eval``: measure a model outside the run that made it."""

import dataclasses
from typing import Annotated, Any

import tyro

from jaxsi.cli.command import Report, parse
from jaxsi.cli.stored import Mesh, mesh_for, stored_config, stored_value
from jaxsi.cli.tables import figures_table

DESCRIPTION = """Exact quality on the held-out instructions of the embedded world, and how well the model judges its own
responses.

Of a model in a run this is measured with the settings of that run and gives the figures of its summary.json.

Examples:
  jaxsi eval toy runs/toy@2
  jaxsi eval toy exported/toy --json"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    dtype: str | None = None
    """The run's own, or float32."""
    mesh: Mesh = Mesh()


def toy(argv: list[str]) -> Report:
    """Exact quality on the embedded world."""
    args = parse(Toy, argv, "jaxsi eval toy", DESCRIPTION)
    from jaxsi.lm import load
    from jaxsi.stages.judge import JudgeConfig
    from jaxsi.stages.prompts import Rubric
    from jaxsi.toyworld.corpus import RUBRIC
    from jaxsi.toyworld.evaluate import ToyEvaluation

    evaluation, rubric, judge = ToyEvaluation(), RUBRIC, JudgeConfig(max_new_tokens=32)
    dtype = "float32"
    stored: dict[str, Any] | None = stored_config(args.model)
    if stored is not None:
        dtype = stored["sampling"]["dtype"]
    if stored is not None and {"rubric", "judge"} <= set(stored):  # of the methods, only one has a judge
        rubric, judge = stored_value(Rubric, stored["rubric"]), stored_value(JudgeConfig, stored["judge"])
        measured = stored["evaluate"]
        if isinstance(measured, dict) and measured["__type__"].endswith(".ToyEvaluation"):
            evaluation = stored_value(ToyEvaluation, measured)
    lm = load(args.model, mesh_for(args.model, args.mesh), args.dtype or dtype, weights_dtype="float32")
    figures = evaluation.measure(lm, rubric, judge)
    value = {"model": args.model, "fingerprint": lm.fingerprint, **figures}
    low, high = figures["quality"]["ci95"]
    shown = {name: figure for name, figure in value.items() if name != "by_prompt"}
    return Report(
        value, figures_table(shown | {"quality": f"{figures['quality']['mean']:.2f} ({low:.2f} to {high:.2f})"})
    )
