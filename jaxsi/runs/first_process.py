"""What the first of several processes has found, in all of them."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsi.runs.progress import processes


def from_first(make: Callable[[], Any]) -> Any:
    """``make()`` of process 0, a JSON value, in every process: the others do not call it, and go on with the same. All
    of them have to call this at the same place. Of a single process it is ``make()`` itself."""
    index, count = processes()
    value = make() if index == 0 else None
    if count == 1:
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(text.size)))
    # Each length compiles a program: a power of two, so that there are few.
    text = np.asarray(multihost_utils.broadcast_one_to_all(np.resize(text, 1 << (size - 1).bit_length())))
    return json.loads(text[:size].astype(np.uint8).tobytes())
