"""A config as JSON values, and the check whether a run may resume with another config.

Configs are frozen dataclasses, nested, with callables as values: no string selects code. On disk a class or a function
of this package is its stored id, which stays the same when code moves. A class or a function of the user is its module
and name. A user's function also has a hash of its source: a changed judge is noticed as a changed number is.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

from jaxsi.runs.errors import InputError

Stored = TypeVar("Stored")
Config = TypeVar("Config")

_IDS: dict[Any, str] = {}
_PACKAGE = __name__.partition(".")[0]


class RunError(Exception):
    """A run directory that cannot be used or written; the message says what is kept and what to do."""


class RunConfigError(RunError, InputError):
    """The directory holds a run of another config; `differences` are lines "field: stored -> given"."""

    def __init__(self, message: str, differences: Sequence[str] = ()):
        super().__init__("\n  ".join([message, *differences]))
        self.differences = tuple(differences)


def stored_as(id: str) -> Callable[[Stored], Stored]:
    """Gives a class or a function of this package the id under which run directories keep it.

    Never change it, even when the code is renamed or moved: a run stored with another id cannot resume. Ids look like
    the module paths of the time when they were chosen.
    """

    def mark(value: Stored) -> Stored:
        _IDS[value] = id
        return value

    return mark


AUTO = "auto"  # a dtype that a run decides when it begins, and keeps
# What "auto" is in a run that stored no dtype there: everything computed in it by default before "auto" came.
EARLIER_DTYPE = "bfloat16"


def may_change(*parts: str) -> dict[str, Any]:
    """The `metadata` of a config field that a resumed run may change: the whole field, or only `parts` of it."""
    return {"may_change": parts or ("",)}


def may_move(part: str = "", *, identity: str = "", made: str = "") -> dict[str, Any]:
    """The `metadata` of a path, or of the path ``part`` of a field, that may change if the same content lies there.

    What reads the path compares the content, so a changed one is refused even if the path is the same. For a model
    ``identity`` is the file in the run directory that has its fingerprint. Earlier versions did not write that file: if
    it is absent, and files that fit the pattern ``made`` depend on the model, the path may not change.
    """
    return {"may_change": (part,), "may_move": (identity, made)}


def file_content() -> dict[str, Any]:
    """The `metadata` of a path, if what the file, or all files of the folder, hold is part of the config: a run keeps a
    hash of it, and a changed file is refused as a changed number is. The same content may lie elsewhere.

    For what is read again and again, as a judge's known answers are. What a run reads once, it keeps as a stage.
    """
    return {"content": True}


def was(name: str) -> dict[str, Any]:
    """The `metadata` of a field of a part that was the field ``name`` of the whole config in earlier versions. So
    fields of one subject can move into a part of their own, and old runs still resume."""
    return {"was": name}


# ---- description -----------------------------------------------------------------------------------------------------


def describe_config(value: Any, field: str = "config") -> Any:
    """A config as JSON values: dataclasses as objects with "__type__", classes and functions by their names.

    A `functools.partial` is {"__partial__": function, "args": [...], "kwargs": {...}}.

    Raises: RunConfigError naming a field whose value has no lasting name (a lambda, a local function, an object).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {
            f.name: describe_config(getattr(value, f.name), f"{field}.{f.name}") for f in dataclasses.fields(value)
        }
        return {"__type__": _name(type(value), field), **values}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, functools.partial):
        return {
            "__partial__": _name(value.func, field),
            "args": describe_config(value.args, f"{field}.args"),
            "kwargs": describe_config(value.keywords, f"{field}.kwargs"),
        }
    if isinstance(value, list | tuple):
        return [describe_config(item, f"{field}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, frozenset | set):
        return sorted((describe_config(item, field) for item in value), key=repr)
    if isinstance(value, Mapping):
        return {str(key): describe_config(item, f"{field}.{key}") for key, item in value.items()}
    return _name(value, field)


def _name(value: Any, field: str) -> str:
    """The stored id of a class or a function of this package; "module.name#hash of its source" of a user's function."""
    try:
        if value in _IDS:
            return _IDS[value]
        name = f"{value.__module__}.{value.__qualname__}"
    except (AttributeError, TypeError):  # TypeError: not hashable
        name = ""
    if not name or "<" in name or hasattr(value, "__self__"):  # <lambda>, <locals>, bound methods
        raise RunConfigError(
            f"{field} is {value!r:.200}, which a resumed run cannot compare; give a value, a function that a module or "
            "the config file defines with def, or a functools.partial of one"
        )
    if name.startswith(f"{_PACKAGE}."):
        raise RunConfigError(f"{field} is {name}, which has no stored id; write @stored_as(...) above its definition")
    return f"{name}#{source_hash(value)}" if _has_code(value) else name


def _has_code(value: Any) -> bool:
    """Whether it is a function, or a class whose instances are called like one."""
    return isinstance(value, FunctionType) or (isinstance(value, type) and "__call__" in vars(value))


def source_hash(code: Any) -> str:
    """16 hex digits: a hash of the source of a function or a class without comments and layout, of the functions and
    callable classes of its module that it uses, and of the numbers and texts of its module that it reads, alone or in
    containers. It is the same in every version of Python. "" if the source is not available."""
    digest = hashlib.sha256()
    todo, seen = [code], {code}
    namespace = code.__globals__ if isinstance(code, FunctionType) else vars(sys.modules[code.__module__])
    while todo:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(todo.pop(0))))
        except (OSError, TypeError, SyntaxError):  # typed at a prompt, or a module that is no longer on disk
            return ""
        digest.update(repr(_syntax(tree)).encode())
        for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            value = namespace.get(name)
            if _has_code(value) and value.__module__ == code.__module__ and value not in seen:
                seen.add(value)
                todo.append(value)
            elif value is not None and (text := _plain_value(value)) is not None:
                digest.update(f"{name}={text}".encode())
    return digest.hexdigest()[:16]


def _plain_value(value: Any) -> str | None:
    """A constant as text, the same in every process; None if it is not made of numbers and texts alone."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]  # in its own order: a loop over it sees that
    if not isinstance(value, tuple | list | set | frozenset):
        return None
    parts = [_plain_value(item) for item in value]
    ordered = sorted(map(str, parts)) if isinstance(value, set | frozenset) else parts
    return None if None in parts else f"{type(value).__name__}{ordered}"


def _syntax(node: Any) -> Any:
    """A syntax tree as plain values. Versions of Python differ in its empty fields, and 3.12 ends some f-strings in an
    empty text, so both are left out."""
    if isinstance(node, ast.JoinedStr):
        return "JoinedStr", [_syntax(part) for part in node.values if ast.dump(part) != "Constant(value='')"]
    if isinstance(node, ast.AST):
        fields = [(name, _syntax(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, fields
    return [_syntax(item) for item in node] if isinstance(node, list) else node


def parts_of(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The configs inside a config, by their dotted names; those in a tuple by their places, "evaluate.parts.0"."""
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), prefix + field.name
        members = [(f"{name}.{i}", one) for i, one in enumerate(value)] if isinstance(value, tuple) else [(name, value)]
        for place, part in members:
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                yield place, part
                yield from parts_of(part, f"{place}.")


def with_dtypes(config: Config, choose: Callable[[str | None], str], stored: Any = None) -> Config:
    """``config`` with ``choose(dtype)`` in place of every field or key "dtype" that is "auto", where ``dtype`` is what
    the config.json ``stored`` has there, or None.

    Args:
      config: a dataclass or a mapping; those inside it count too, as values of fields and keys, alone or in tuples.
    """
    if type(config) is tuple:
        old = stored if isinstance(stored, list) and len(stored) == len(config) else [None] * len(config)
        members = [with_dtypes(item, choose, before) for item, before in zip(config, old, strict=True)]
        return cast(Any, tuple(members) if any(a is not b for a, b in zip(members, config, strict=True)) else config)
    before = stored if isinstance(stored, Mapping) else {}

    def new(name: str, value: Any) -> Any:
        is_open = name == "dtype" and isinstance(value, str) and value == AUTO
        return choose(before.get(name)) if is_open else with_dtypes(value, choose, before.get(name))

    if isinstance(config, Mapping):
        return cast(Any, {name: new(name, value) for name, value in config.items()})
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        old = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        values = {name: new(name, value) for name, value in old.items()}
        changed = {name: value for name, value in values.items() if value is not old[name]}
        return dataclasses.replace(config, **changed) if changed else config
    return config


def describe_settled(config: Any) -> dict[str, Any]:
    """The described config of a run, and under "files" the hashes of the files that it names (`file_hashes`).

    Raises: RunConfigError if a dtype in it is still "auto".
    """
    described = describe_config(config)
    names = [name for name, value in _flat(described).items() if name.split(".")[-1] == "dtype" and value == AUTO]
    if names:
        raise RunConfigError(
            f'{names[0]} is "auto", which is decided before a run is opened; call jaxsi.run(config, run_dir), or give '
            "settled(config, run_dir) of jaxsi.model.compute_dtype to Run.open and to the method"
        )
    return described | ({_FILES: hashes} if (hashes := file_hashes(config)) else {})


_FILES = "files"


def with_known_files(described: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """``described``, with the ``stored`` hashes of files that are gone: if they come back, they are compared."""
    hashes = stored.get(_FILES, {}) | described.get(_FILES, {})
    return described | ({_FILES: hashes} if hashes else {})


def file_hashes(value: Any, name: str = "") -> dict[str, str]:
    """{dotted name of a field: hash of the content} of all files that fields with `file_content` name, anywhere in a
    config; 16 hex digits. What is no file or folder on this machine, such as the name of a set on the hub, has none."""
    found: dict[str, str] = {}
    for key, member, is_file in _members(value):
        place = f"{name}.{key}" if name else key
        if not is_file:
            found |= file_hashes(member, place)
        elif (content := _content_hash(Path(member))) is not None:
            found[place] = content
    return found


def _members(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """(Name, value, whether it is the path of a file whose content counts) of what a part of a config holds. The names
    are those of the description."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name), field.metadata.get("content", False)
    elif isinstance(value, functools.partial):
        yield "args", value.args, False
        yield "kwargs", value.keywords, False
    elif isinstance(value, list | tuple):
        yield from ((str(index), item, False) for index, item in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((str(key), item, False) for key, item in value.items())


def _content_hash(path: Path) -> str | None:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if not path.is_dir():
        return None
    inner = {str(file.relative_to(path)): _content_hash(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return hashlib.sha256(json.dumps(inner).encode()).hexdigest()[:16]


# ---- comparison ------------------------------------------------------------------------------------------------------


def check_config(path: Path, stored: dict[str, Any], config: Any) -> None:
    """Raises RunConfigError if `config` may not resume the run in `path`, whose config.json is `stored`.

    Fields marked with `may_change` or `may_move` may differ, and `iterations` may be raised. A field that the stored
    config lacks, because it is newer than the run, counts as its default; so do those of a class that was a plain
    function then. A field that has moved (`was`) is found in its old place. A dtype "auto" counts as the stored one.
    Files are compared by their content, if the run has its hash: earlier versions stored none.
    """
    hashes, now = stored.get(_FILES, {}), file_hashes(config)
    stored = {name: value for name, value in stored.items() if name != _FILES}
    config = with_dtypes(config, lambda dtype: dtype or EARLIER_DTYPE, stored)
    moved = dict(_moved(config))
    old, new = _flat({moved.get(name, name): value for name, value in stored.items()}), _flat(describe_config(config))
    old = {f"{field}.__type__" if f"{field}.__type__" in new else field: value for field, value in old.items()}
    defaults, free = _flat(with_dtypes(_defaults(config), lambda _: EARLIER_DTYPE)), _free(config, path)
    free |= {name: True for name in now if hashes.get(name) == now[name]}
    differences = [
        f"{name}: the content of {new[name]} has changed (sha256 {hashes[name]}… -> {now[name]}…)"
        for name in now
        if hashes.get(name, now[name]) != now[name]
    ]
    for field in dict.fromkeys([*old, *new]):
        before, after = old.get(field, defaults.get(field, _ABSENT)), new.get(field, _ABSENT)
        if _same(before, after) or any(field == name or field.startswith(f"{name}.") for name in free):
            continue
        if field == "iterations" and isinstance(before, int) and isinstance(after, int) and after > before:
            continue
        differences.append(f"{field}: {_short(before)} -> {_short(after)}")
    if differences:
        names = ", ".join(name for name in free if not free[name]) or "nothing else"
        paths = ", ".join(name for name in free if free[name])
        moved = f", and {paths} may name another place with the same content" if paths else ""
        raise RunConfigError(
            f"{path} holds a run of another config (on resume, iterations may be raised and {names} may change"
            f"{moved}); give the stored values or another directory. Stored -> given:",
            differences,
        )


def same_name(stored: str, id: str) -> bool:
    """Whether a name in a config.json means the class or function with this id. Earlier versions stored module
    paths in place of ids, and user functions without a hash."""
    return stored == id or stored.removeprefix(f"{_PACKAGE}.") == id or ("#" in id and stored == id.partition("#")[0])


_ABSENT = "(absent)"
_NAME = re.compile(r"[A-Za-z_][\w.]*(#[0-9a-f]*)?")


def _same(before: Any, after: Any) -> bool:
    if before == after:
        return True
    names = isinstance(before, str) and isinstance(after, str) and _NAME.fullmatch(before) and _NAME.fullmatch(after)
    return bool(names) and same_name(before, after)


def _fields(config: Any) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(Dotted name, field) of all fields of a config and of those inside it."""
    for prefix, part in [("", config), *((f"{name}.", part) for name, part in parts_of(config))]:
        yield from ((prefix + field.name, field) for field in dataclasses.fields(part))


def _free(config: Any, path: Path) -> dict[str, bool]:
    """The dotted names of the fields that the run in ``path`` may change on resume, and whether each is a path whose
    content has to stay the same."""
    names: dict[str, bool] = {}
    for name, field in _fields(config):
        identity, made = field.metadata.get("may_move", ("", ""))
        if not made or (path / identity).exists() or not any(path.glob(made)):
            for part in field.metadata.get("may_change", ()):
                names[f"{name}.{part}".rstrip(".")] = "may_move" in field.metadata
    return dict(sorted(names.items()))


def _moved(config: Any) -> Iterator[tuple[str, str]]:
    """(The name in earlier versions, the dotted name now) of each field that has moved."""
    yield from ((field.metadata["was"], name) for name, field in _fields(config) if "was" in field.metadata)


def _defaults(config: Any) -> dict[str, Any]:
    """The described defaults of a config's fields, and of those of the configs inside it."""
    described: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner: dict[str, Any] = _defaults(value) if dataclasses.is_dataclass(value) else {}
        if isinstance(value, tuple):
            inner = {str(i): _defaults(one) for i, one in enumerate(value) if dataclasses.is_dataclass(one)}
        if field.default is not dataclasses.MISSING:
            default = describe_config(field.default, field.name)
            described[field.name] = {**inner, **default} if isinstance(default, dict) else (inner or default)
        elif inner:
            described[field.name] = inner
    return described


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
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
