"""An output file that is computed in parts: a command that was killed goes on after its last complete part."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxsi.cli.command import UsageError
from jaxsi.runs.config_snapshot import may_change, stored_as
from jaxsi.runs.progress import processes

CHUNK = 256  # items in a part: the most that a kill can lose
Record = TypeVar("Record")


@stored_as("commands.models.Parts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that the contents of an output file depend on. It is the config of the folder that holds the finished
    parts, so only the same command may go on there. ``prompts`` and ``responses`` are digests, ``model`` is a
    fingerprint."""

    prompts: str
    responses: str | None
    model: str
    settings: dict[str, Any] = dataclasses.field(metadata=may_change("batch_size"))
    seed: int


def check_out(out: Path, *inputs: Path, overwrite: bool) -> None:
    """Checks before the work, not after it, that ``out`` can be written, and that nothing is lost by it.

    Raises: UsageError if ``out`` is one of the ``inputs``, or exists without ``overwrite``.
    """
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a file")
    if any(out.resolve() == file.resolve() for file in inputs):
        raise UsageError(f"--out {out} is also read by this command; give another name")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out} exists; give another name, or --overwrite to replace it")


def dtype_of(out: Path, dtype: str) -> str:
    """The dtype of a command that writes ``out``: ``dtype``, or in place of "auto" the one of its finished parts, or
    else the one that the device is fast in.

    Raises: RunError: if OUT.shards is something else.
    """
    from jaxsi.model.compute_dtype import settled

    return settled({"settings": {"dtype": dtype}}, _parts_folder(out))["settings"]["dtype"]


def _parts_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.shards")


def chat_of(lm: Any) -> dict[str, str]:
    """The chat template of a model as a setting, if it depends on more than the model's folder."""
    from jaxsi.text.chat_config import ChatConfig

    special = lm.tokenizer.chat != ChatConfig() or lm.tokenizer.reads_date
    return {"template": lm.template_hash} if special else {}


def digest(records: Sequence[Any], noun: str) -> str:
    """A short text that changes when a record does: "3 prompts, 0123456789abcdef"."""
    from jaxsi.runs.records import digest as digest_of

    return f"{len(records)} {noun}, {digest_of(records)}"


def write_in_parts(
    out: Path,
    parts: Parts,
    items: Sequence[Any],
    stage: Callable[[Sequence[Any]], Iterable[Record]],
    record_type: type[Record],
    by: Any = None,
) -> list[Record]:
    """Applies ``stage`` to all items, CHUNK at a time, and writes the records to ``out``. Finished parts wait in the
    folder OUT.shards, which is removed when ``out`` is complete. ``by``: the model that samples the records.

    Raises: RunConfigError: if OUT.shards belongs to a command with other settings. StaleRecordsError: if the chat
      template of the model has changed since then.
    """
    from jaxsi.runs.config_snapshot import RunConfigError
    from jaxsi.runs.records import write_jsonl
    from jaxsi.runs.run import Run

    folder = _parts_folder(out)
    try:
        run = Run.open(folder, parts)
    except RunConfigError as error:
        raise RunConfigError(
            f"{folder} holds parts of {out.name} from a command with other settings (only settings.batch_size may "
            "change); give the stored settings, give another --out, or delete that folder. Stored -> given:",
            error.differences,
        ) from None
    with run:
        records = run.at("parts").sharded("records", items, stage, of=record_type, by=by, shard_size=CHUNK)
        if processes()[0] == 0:
            write_jsonl(out, records)
    if processes()[0] == 0:
        shutil.rmtree(folder)
    return records
