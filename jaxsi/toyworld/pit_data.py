"""The embedded world's preferences for PIT, and the rewards of its control arms."""

import hashlib
import random
from collections.abc import Sequence

import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import RankedResponses, Response
from jaxsi.stages import gap
from jaxsi.stages.gap import Item
from jaxsi.toyworld import careless, world


@stored_as("toyworld.pit_data.pit_preferences")
def pit_preferences() -> list[RankedResponses]:
    """Two careless responses to each instruction, both with a flaw, the better one first except for slips."""
    return careless.preferences(3000, 4, least=1)


@stored_as("toyworld.pit_data.permuted_gaps")
def permuted_gaps(
    lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The gap rewards, shuffled within the batch: rewards without a signal."""
    gap_N, zero_N = gap.gaps(lm, items, request, batch_size=batch_size)
    words = hashlib.sha256("\0".join(_text(response) for _, response, _ in items).encode()).hexdigest()
    order = list(range(len(items)))
    random.Random(words).shuffle(order)
    return (gap_N - zero_N)[order], np.zeros_like(zero_N)


@stored_as("toyworld.pit_data.exact_gaps")
def exact_gaps(lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The exact grade, 0 to 10, of each response minus that of its reference."""
    grades = [
        [world.grade(messages[-1]["content"], text) for text in (_text(response), reference)]
        for messages, response, reference in items
    ]
    totals = np.asarray([[np.nan if grade is None else grade.total for grade in both] for both in grades], np.float32)
    return totals[:, 0] - totals[:, 1], np.zeros(len(items), np.float32)


def _text(response: Response | str) -> str:
    return response.text if isinstance(response, Response) else response
