"""``jaxsi eval``: measure a model outside the run that made it."""

import dataclasses
from typing import Annotated, Any

import tyro

from jaxsi.commands import Report, parse
from jaxsi.commands.stored import stored_config, stored_value
from jaxsi.commands.tables import figures_table

DESCRIPTION = """Exact quality on the held-out instructions of the embedded world, and how well the model judges its own
responses.

Of a model in a run this is measured with the settings of that run and gives the figures of its summary.json.

Examples:
  jaxsi eval toy runs/toy@2
  jaxsi eval toy exported/toy --json"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """The devices; by default the run's own mesh, or all devices on fsdp."""

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    dtype: str | None = None
    """The run's own, or float32."""
    mesh: Mesh = Mesh()


def toy(argv: list[str]) -> Report:
    """Exact quality on the embedded world."""
    args = parse(Toy, argv, "jaxsi eval toy", DESCRIPTION)
    from jaxsi import mesh as meshlib
    from jaxsi.evals.toy import ToyEvaluation
    from jaxsi.feedback import JudgeConfig
    from jaxsi.lm import load
    from jaxsi.mesh import MeshConfig
    from jaxsi.prompts import Rubric
    from jaxsi.toyworld.corpus import RUBRIC

    evaluation, rubric, judge = ToyEvaluation(), RUBRIC, JudgeConfig(max_new_tokens=32)
    mesh, dtype = MeshConfig(), "float32"
    stored: dict[str, Any] | None = stored_config(args.model)
    if stored is not None:
        rubric, judge = stored_value(Rubric, stored["rubric"]), stored_value(JudgeConfig, stored["judge"])
        mesh, dtype = stored_value(MeshConfig, stored["mesh"]), stored["sampling"]["dtype"]
        measured = stored["evaluate"]
        if isinstance(measured, dict) and measured["__type__"].endswith(".ToyEvaluation"):
            evaluation = stored_value(ToyEvaluation, measured)
    given = {name: size for name, size in dataclasses.asdict(args.mesh).items() if size is not None}
    if given:
        mesh = MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | given)
    lm = load(args.model, meshlib.make_mesh(mesh), args.dtype or dtype, weights_dtype="float32")
    figures = evaluation.measure(lm, rubric, judge)
    value = {"model": args.model, "fingerprint": lm.fingerprint, **figures}
    low, high = figures["quality"]["ci95"]
    shown = {name: figure for name, figure in value.items() if name != "by_prompt"}
    return Report(
        value, figures_table(shown | {"quality": f"{figures['quality']['mean']:.2f} ({low:.2f} to {high:.2f})"})
    )
