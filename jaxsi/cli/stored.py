"""The config and the mesh of the run that a command's MODEL is from."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar, cast

from jaxsi.cli.command import UsageError

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """The devices: data x fsdp x tensor, -1 for all that are left. By default the mesh of MODEL's run, or else all
    devices on fsdp. If one is given, the others are 1."""

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None


def stored_config(model: str) -> dict[str, Any] | None:
    """The config.json of the run of MODEL = RUN_DIR or RUN_DIR@t; None if MODEL is not a run."""
    folder = Path(model)
    for run in (folder, Path(model.rpartition("@")[0] or model)):
        if (run / "journal.jsonl").is_file() and (run / "config.json").is_file():
            return json.loads((run / "config.json").read_text("utf-8"))
    return None


def run_of(model: str) -> dict[str, Any] | None:
    """The config.json of the run that contains MODEL, or another checkpoint such as RUN/reviser/checkpoint."""
    places = [model, *map(str, list(Path(model).parents)[:2])]
    return next((stored for place in places if (stored := stored_config(place)) is not None), None)


def stored_value(cls: type[Value], value: dict[str, Any]) -> Value:
    """A dataclass of plain values from its JSON in a run's config."""
    names = {field.name for field in dataclasses.fields(cast(Any, cls))} & value.keys()  # a newer field has its default
    return cls(**{name: value[name] for name in names})


def check_writes(lm: Any, model: str) -> None:
    """Raises: UsageError: if MODEL is a reward model, which writes no text."""
    if lm.config.scalar_head:
        raise UsageError(f"{model} is a reward model, which writes no text; give a language model")


def mesh_for(model: str, given: Mesh) -> Any:
    """The mesh given on the command line, or else that of MODEL's run, or else all devices on fsdp."""
    from jaxsi.model.mesh import MeshConfig, make_mesh

    sizes = {name: size for name, size in dataclasses.asdict(given).items() if size is not None}
    if sizes:
        return make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes))
    stored = stored_config(model)
    if stored is None or "mesh" not in stored:  # a folder of `jaxsi improve` has a config, and no mesh
        return make_mesh()
    return make_mesh(stored_value(MeshConfig, stored["mesh"]))
