"""Named keys: randomness that depends on names alone, so it is the same on every host and every resume."""

import hashlib
import operator
from typing import Any

import numpy as np


def name_words(name: str | int) -> np.ndarray:
    """The stable 64-bit hash of a name as two uint32 words; a number and its decimal text are different names."""
    text = f"s:{name}" if isinstance(name, str) else f"i:{operator.index(name)}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return np.frombuffer(digest[:8], dtype=">u4").astype(np.uint32)


def fold(key: Any, *names: str | int) -> Any:
    """`key` folded with names, one after the other: fold(fold(key, a), b) == fold(key, a, b); see `name_words`."""
    import jax

    for name in names:
        for word in name_words(name):
            key = jax.random.fold_in(key, word)
    return key
