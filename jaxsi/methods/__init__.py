"""One file per method: its paper's algorithm box, its Config, and one function that is named like the file."""

import importlib
from collections.abc import Callable
from typing import Any


def method_of(config: Any) -> Callable[..., Any]:
    """The function of the method whose ``Config`` this is: it stands beside it, and is named like the module."""
    name = type(config).__module__
    return getattr(importlib.import_module(name), name.rpartition(".")[2])
