"""``jaxsi export``: writes a model as a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxsi.cli.arguments import FixedDtype, Model
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.tables import figures_table

DESCRIPTION = """Writes a Hugging Face folder: safetensors, config, generation config, tokenizer, chat template, model
card. The card of a run's model says how it was made and measured. Nothing leaves this machine without --push.

Examples:
  jaxsi export runs/toy exported/toy
  jaxsi export runs/toy@2 exported/toy-2 --dtype float32
  jaxsi export runs/mine exported/mine --push my-name/mine"""


class PushError(RuntimeError):
    """The hub did not take the folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    model: Model
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A folder that does not exist yet."""
    dtype: FixedDtype = "bfloat16"
    mesh: Mesh = Mesh()
    push: str | None = None
    """Also upload the folder to this repository of the hub, NAME/MODEL. It is created as a private one if it is new.
    Needs the login of the `hf` command or the variable HF_TOKEN."""
    public: bool = False
    """Create the repository of --push as a public one."""


def export(argv: list[str]) -> Report:
    """Writes a Hugging Face folder."""
    args = parse(Export, argv, "jaxsi export", DESCRIPTION)
    from jaxsi import lm as lmlib
    from jaxsi.model.decoder import count_parameters
    from jaxsi.report.model_card import model_card
    from jaxsi.runs.progress import processes

    if args.push is not None:
        _check_repository(args.push)
    elif args.public:
        raise UsageError("--public is about --push REPO; give that as well")
    lm = lmlib.load(args.model, mesh_for(args.model, args.mesh), args.dtype, weights_dtype="float32")
    facts = {
        "exported from": f"weights {lm.fingerprint}, as {args.dtype}",
        "architecture": f"{lm.config.family}, {count_parameters(lm.config):,} parameters, "
        f"{lm.config.max_positions:,} positions",
    }
    card = model_card(
        args.out.name, model=args.model, checkpoint=lmlib.resolve(args.model), facts=facts,
        scalar_head=lm.config.scalar_head,
    )  # fmt: skip

    def write_card(folder: Path) -> None:
        (folder / "README.md").write_text(card, encoding="utf-8")

    lmlib.export(lm, args.out, dtype=args.dtype, extras=write_card)
    files = sorted(path.name for path in args.out.iterdir())
    value = {"out": str(args.out), "dtype": args.dtype, "fingerprint": lm.fingerprint, "files": files}
    if args.push is not None:
        value["pushed"] = _pushed(args.out, args.push, private=not args.public) if processes()[0] == 0 else args.push
    return Report(value, figures_table(value | {"files": ", ".join(files)}))


def _check_repository(name: str) -> None:
    """Raises: UsageError before the work if ``name`` cannot be a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push {name}: {error}") from None
    if name.count("/") != 1:
        raise UsageError(f"--push {name}: give the owner as well, as in my-name/{name}")


def _pushed(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads the folder; returns the address. Raises: PushError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Exported by jaxsi")
    except Exception as error:  # of the network, of the hub, or of a login that is missing
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PushError(
            f"{repository}: cannot be pushed ({reason}). The folder {folder} is complete: log in (`hf auth login`) and "
            f"upload it with `hf upload {repository} {folder}`"
        ) from error
    return address
