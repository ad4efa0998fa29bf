"""Types of arguments that several commands take."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsi.text.chat_config import ChatConfig

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Dtype = Literal["auto", "bfloat16", "float32", "float16"]
FixedDtype = Literal["bfloat16", "float32", "float16"]
KVCache = Literal["exact", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What a command tells MODEL's chat template."""

    chat: ChatConfig = ChatConfig()

    @property
    def model_chat(self) -> ChatConfig | None:
        """What MODEL's chat template is told; None, the checkpoint's own, if the command line says nothing."""
        return None if self.chat == ChatConfig() else self.chat


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How a command reads the rows of a file."""

    column: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The file's own name of a column, as prompt=NAME."""
    split: str = "train"
    """The split of a data set that has several."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and count them, in place of an error."""

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of the readers in `user_data`. Raises: UsageError."""
        from jaxsi.cli.command import UsageError
        from jaxsi.stages.user_data import columns_of

        try:
            columns = columns_of(self.column)
        except ValueError as error:
            raise UsageError(f"--column: {error}") from error
        return {"columns": columns, "split": self.split, "skip_bad_rows": self.skip_bad_rows}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions(RowOptions):
    """A file of prompts."""

    prompts: Path
    """JSONL, JSON, CSV, TSV or Parquet (text also .gz or .zst), a folder that `datasets` saved, or a hub name."""
    max_prompts: int | None = None
    """Only the first prompts."""

    def read(self) -> Any:
        """The prompts. Raises: RecordError, UsageError."""
        from jaxsi.stages.user_data import read_prompts

        return read_prompts(self.prompts, self.max_prompts, **self.reading)
