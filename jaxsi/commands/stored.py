"""The config that a run directory holds, for commands that go on from one of its models."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar, cast

Value = TypeVar("Value")


def stored_config(model: str) -> dict[str, Any] | None:
    """The config.json of the run that MODEL (RUN_DIR or RUN_DIR@t) names; None where it names no run."""
    folder = Path(model)
    for run in (folder, Path(model.rpartition("@")[0] or model)):
        if (run / "journal.jsonl").is_file() and (run / "config.json").is_file():
            return json.loads((run / "config.json").read_text("utf-8"))
    return None


def stored_value(cls: type[Value], value: dict[str, Any]) -> Value:
    """A dataclass of plain values from its JSON in a run's config."""
    fields = dataclasses.fields(cast(Any, cls))
    return cls(**{field.name: value[field.name] for field in fields})
