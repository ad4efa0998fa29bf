"""What this process has spent so far: seconds, and tokens that models have sampled and scored."""

import time
from typing import NamedTuple


class Spent(NamedTuple):
    """``sampled``: new tokens of responses. ``scored``: tokens of texts whose log-probabilities were computed."""

    seconds: float = 0.0
    sampled: int = 0
    scored: int = 0

    def less(self, other: "Spent") -> "Spent":
        return Spent(self.seconds - other.seconds, self.sampled - other.sampled, self.scored - other.scored)

    def plus(self, other: "Spent") -> "Spent":
        return Spent(self.seconds + other.seconds, self.sampled + other.sampled, self.scored + other.scored)

    @property
    def tokens(self) -> dict[str, int]:
        """{"sampled", "scored"} without those that are zero."""
        counts = {"sampled": self.sampled, "scored": self.scored}
        return {name: count for name, count in counts.items() if count}


_tokens = Spent()


def count(*, sampled: int = 0, scored: int = 0) -> None:
    """Adds tokens to those of this process."""
    global _tokens
    _tokens = _tokens.plus(Spent(0.0, sampled, scored))


def now() -> Spent:
    """What was spent until now; only the difference of two moments has a meaning."""
    return _tokens._replace(seconds=time.monotonic())
