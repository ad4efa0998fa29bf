"""Config files: Python with one function ``config() -> Config``, or ``configs()`` for several variants; and files with
a function of the user, such as a reward."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsi.runs.errors import InputError


class ConfigFileError(InputError, ValueError):
    """A file that is not a config; the message names it and what is missing."""


def load_config(path: Path | str, function: str = "config") -> Any:
    """The ``Config`` that ``function`` of a config file gives. A config that derives from another one loads it by its
    path, with this function.

    Raises: ConfigFileError: if the file or the function in it does not exist. Also what the file raises.
    """
    return _call(Path(path), function, "Config: return Config(...)")


def load_configs(path: Path | str) -> dict[str, Any]:
    """The named configs of a file with a function ``configs``. Raises: as ``load_config``."""
    return _call(Path(path), "configs", "dict[str, Config]: return {...}")


def load_function(path: Path | str, name: str) -> Callable[..., Any]:
    """The function ``name`` of a Python file, such as a reward. Raises: as ``load_config``."""
    function = _find(Path(path), "file", name, "...")
    if not callable(function):
        raise ConfigFileError(f"{path}: {name} is {function!r:.80}, which is not a function; write def {name}(...)")
    return function


def _call(path: Path, function: str, shape: str) -> Any:
    return _find(path, "config file", function, shape)()


def _find(path: Path, noun: str, function: str, shape: str) -> Any:
    if not path.is_file():
        raise ConfigFileError(f"{path}: no such {noun}; give a Python file with a function {function}()")
    # Functions of the file are part of the config by their qualified name, so the module's name may not vary.
    name = f"jaxsi_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigFileError(f"{path} is not a Python file; give a .py file with a function {function}()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if function not in vars(module):
        raise ConfigFileError(f"{path} has no function {function}(); write def {function}() -> {shape}")
    return vars(module)[function]
