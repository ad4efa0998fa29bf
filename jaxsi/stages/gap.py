"""PIT's gap reward g(x, y, y_ref): how much better a response is than a reference (Wang et al. 2024, arXiv 2310.00898,
section 3.3). It is the reward of a response in a conversation that shows the reference and asks for a better one.
"""

from collections.abc import Sequence

import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.records import Message, Response
from jaxsi.stages.pairs import Preference
from jaxsi.stages.prompts import ask_to_improve
from jaxsi.text.tokenizer import Tokenizer
from jaxsi.training.batches import Sequence_
from jaxsi.training.reward import reward_sequence, rewards

GAP_ORDER = ("wl", "ww", "ll", "lw")  # (y1, y2) of the four gaps g(y1, y2) that are compared: w better, l worse


def gap_sequence(
    tokenizer: Tokenizer, messages: Sequence[Message], response: Response | str, reference: str, request: str
) -> Sequence_:
    """The improver's conversation and its response as tokens, for g(x, y, y_ref)."""
    return reward_sequence(tokenizer, ask_to_improve(messages, reference, request), response)


def gap_group(tokenizer: Tokenizer, preference: Preference, request: str) -> tuple[Sequence_, ...]:
    """The four ordered pairs of a preference, in ``GAP_ORDER``."""
    side = {"w": preference.chosen, "l": preference.rejected}
    return tuple(
        gap_sequence(tokenizer, preference.messages, side[y1], side[y2], request) for y1, y2 in GAP_ORDER
    )  # fmt: skip


def reward_group(tokenizer: Tokenizer, preference: Preference) -> tuple[Sequence_, ...]:
    """The chosen and the rejected response of a preference."""
    return tuple(
        reward_sequence(tokenizer, preference.messages, text) for text in (preference.chosen, preference.rejected)
    )


Item = tuple[Sequence[Message], Response | str, str]  # messages, response, reference


def gaps(lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """g(x, y, y_ref) and g(x, y_ref, y_ref), each [N] float32. The loss does not settle the zero point of g, and an
    unchanged reference is what no gap means: their difference is the gain of y over y_ref."""
    keys = [(_key(messages), reference) for messages, _, reference in items]
    unchanged = {
        key: gap_sequence(lm.tokenizer, messages, reference, reference, request)
        for key, (messages, _, reference) in zip(keys, items, strict=True)
    }
    own = [gap_sequence(lm.tokenizer, *item, request) for item in items]
    values = rewards(lm, [*own, *unchanged.values()], batch_size=batch_size)
    zero = dict(zip(unchanged, values[len(own) :], strict=True))
    return values[: len(own)], np.asarray([zero[key] for key in keys], np.float32)


def gains(lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64) -> np.ndarray:
    """g(x, y, y_ref) - g(x, y_ref, y_ref) [N] float32: PIT's reward, with its zero point."""
    gap_N, zero_N = gaps(lm, items, request, batch_size=batch_size)
    return gap_N - zero_N


def _key(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """A conversation as something that a dict can be keyed by."""
    return tuple((message["role"], message["content"]) for message in messages)
