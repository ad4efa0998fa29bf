"""jaxsi: language models that improve themselves, in JAX.

The public interface is imported when it is first used, so that ``import jaxsi`` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "jaxsi.lm",
    "generate": "jaxsi.sampling.generate",
    "score": "jaxsi.sampling.scoring",
    "judge": "jaxsi.stages.judge",
    "improve": "jaxsi.stages.improve.rounds",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxsi' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
