"""A method's config as JSON values, and the question whether a run may go on with another one.

Configs are frozen dataclasses, nested, with callables as values: no string selects code. On disk a callable is its
qualified name.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsi.runs.errors import InputError


class RunError(Exception):
    """A run directory that cannot be used or written; the message says what is kept and what to do."""


class RunConfigError(RunError, InputError):
    """The directory holds a run of another config; `differences` are lines "field: stored -> given"."""

    def __init__(self, message: str, differences: Sequence[str] = ()):
        super().__init__("\n  ".join([message, *differences]))
        self.differences = tuple(differences)


def describe_config(value: Any, field: str = "config") -> Any:
    """A config as JSON values: nested dataclasses as objects with "__type__", callables and types by qualified name.

    Raises: RunConfigError naming the field whose value has no name that lasts (lambdas, local functions, objects).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f.name: describe_config(getattr(value, f.name), f"{field}.{f.name}") for f in dataclasses.fields(value)}
        return {"__type__": _qualified_name(type(value), field), **own}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [describe_config(item, f"{field}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, frozenset | set):
        return sorted((describe_config(item, field) for item in value), key=repr)
    if isinstance(value, dict):
        return {str(key): describe_config(item, f"{field}.{key}") for key, item in value.items()}
    return _qualified_name(value, field)


def _qualified_name(value: Any, field: str) -> str:
    try:
        name = f"{value.__module__}.{value.__qualname__}"
    except AttributeError:
        name = ""
    if not name or "<" in name or hasattr(value, "__self__"):  # <lambda>, <locals>, bound methods
        raise RunConfigError(
            f"{field} is {value!r:.200}, which a resumed run cannot compare; give a value or a function of a module"
        )
    return name


def parts_of(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The configs inside a config, by their dotted names."""
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield name, value
            yield from parts_of(value, f"{name}.")


def check_config(path: Path, stored: dict[str, Any], given: dict[str, Any], resumable: frozenset[str]) -> None:
    """Raises RunConfigError where `given` may not resume the run of `stored` (both of `describe_config`).

    Fields named in `resumable` (dotted; a name stands for all below it) may differ, and `iterations` may be raised.
    """
    old, new = _flat(stored), _flat(given)
    differences = []
    for field in dict.fromkeys([*old, *new]):
        before, after = old.get(field, _ABSENT), new.get(field, _ABSENT)
        parts = field.split(".")
        if before == after or any(".".join(parts[:depth]) in resumable for depth in range(1, len(parts) + 1)):
            continue
        if field == "iterations" and isinstance(before, int) and isinstance(after, int) and after > before:
            continue
        differences.append(f"{field}: {_short(before)} -> {_short(after)}")
    if differences:
        free = ", ".join(sorted(resumable)) or "nothing else"
        raise RunConfigError(
            f"{path} holds a run of another config (on resume, iterations may be raised and {free} may change); "
            "give the stored values or another directory. Stored -> given:",
            differences,
        )


_ABSENT = "(absent)"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flat(item, f"{prefix}.{key}" if prefix else key).items()
    }


def _short(value: Any) -> str:
    text = str(value) if value is _ABSENT else repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
