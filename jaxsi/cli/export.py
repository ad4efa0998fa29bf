"""``jaxsi export``: writes a model as a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxsi.cli.arguments import FixedDtype, Model
from jaxsi.cli.command import Report, parse
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.tables import figures_table

DESCRIPTION = """Writes a Hugging Face folder: safetensors, config, generation config, tokenizer, chat template, model
card.

Examples:
  jaxsi export runs/toy exported/toy
  jaxsi export runs/toy@2 exported/toy-2 --dtype float32"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    model: Model
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A folder that does not exist yet."""
    dtype: FixedDtype = "bfloat16"
    mesh: Mesh = Mesh()


def export(argv: list[str]) -> Report:
    """Writes a Hugging Face folder."""
    args = parse(Export, argv, "jaxsi export", DESCRIPTION)
    from jaxsi import lm as lmlib
    from jaxsi.model.decoder import count_parameters

    lm = lmlib.load(args.model, mesh_for(args.model, args.mesh), args.dtype, weights_dtype="float32")
    card = f"""# {args.out.name}

Exported by jaxsi from `{args.model}` (weights {lm.fingerprint}) in {args.dtype}.

* architecture: {lm.config.family}, {count_parameters(lm.config):,} parameters, {lm.config.max_positions} positions
* made by a self-improvement method from another model: that model's licence and limits hold for this one too
"""
    if lm.config.scalar_head:
        card += "* a reward model: its one label is the reward, for a conversation that ends with the end of a turn\n"

    def write_card(folder: Path) -> None:
        (folder / "README.md").write_text(card, encoding="utf-8")

    lmlib.export(lm, args.out, dtype=args.dtype, extras=write_card)
    files = sorted(path.name for path in args.out.iterdir())
    value = {"out": str(args.out), "dtype": args.dtype, "fingerprint": lm.fingerprint, "files": files}
    return Report(value, figures_table(value | {"files": ", ".join(files)}))
