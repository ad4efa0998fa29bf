"""PIT's gap reward g(x, y, y_ref): how much better a response is than a reference (Wang et al. 2024, arXiv 2310.00898,
section 3.3). It is the reward of a response in a conversation that shows the reference and asks for a better one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Message, Prompt, Response
from jaxsi.stages.answers import with_room
from jaxsi.stages.judge import number
from jaxsi.stages.pairs import Preference
from jaxsi.stages.prompts import ask_to_improve, question_text
from jaxsi.text.chat import naming, render_response
from jaxsi.text.tokenizer import Tokenizer
from jaxsi.training.batches import Sequence_
from jaxsi.training.reward import reward_sequence, rewards
from jaxsi.training.rl import RLConfig

GAP_ORDER = ("wl", "ww", "ll", "lw")  # (y1, y2) of the four gaps g(y1, y2): w is better, l is worse


def gap_sequence(
    tokenizer: Tokenizer, messages: Sequence[Message], response: Response | str, reference: str, request: str
) -> Sequence_:
    """The improver's conversation and its response as tokens, for g(x, y, y_ref)."""
    return reward_sequence(tokenizer, ask_to_improve(messages, reference, request), response)


def gap_group(tokenizer: Tokenizer, preference: Preference, request: str) -> tuple[Sequence_, ...]:
    """The four ordered pairs of a preference, in ``GAP_ORDER``."""
    side = {"w": preference.chosen, "l": preference.rejected}
    with naming(f"preference {preference.id!r}"):
        return tuple(gap_sequence(tokenizer, preference.messages, side[y1], side[y2], request) for y1, y2 in GAP_ORDER)


def reward_group(tokenizer: Tokenizer, preference: Preference) -> tuple[Sequence_, ...]:
    """The chosen and the rejected response of a preference."""
    with naming(f"preference {preference.id!r}"):
        return tuple(
            reward_sequence(tokenizer, preference.messages, text) for text in (preference.chosen, preference.rejected)
        )


Item = tuple[Sequence[Message], Response | str, str]  # messages, response, reference


@stored_as("reward.gaps")
def gaps(lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """g(x, y, y_ref) and g(x, y_ref, y_ref), each [N] float32. The loss leaves the zero point of g open. An unchanged
    reference has no gap, so the difference of the two is the gain of y over y_ref."""
    keys = [(_key(messages), reference) for messages, _, reference in items]
    unchanged = {
        key: gap_sequence(lm.tokenizer, messages, reference, reference, request)
        for key, (messages, _, reference) in zip(keys, items, strict=True)
    }
    sequences = [gap_sequence(lm.tokenizer, *item, request) for item in items]
    values = rewards(lm, [*sequences, *unchanged.values()], batch_size=batch_size)
    zero = dict(zip(unchanged, values[len(sequences) :], strict=True))
    return values[: len(sequences)], np.asarray([zero[key] for key in keys], np.float32)


def gains(lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64) -> np.ndarray:
    """g(x, y, y_ref) - g(x, y_ref, y_ref) [N] float32: PIT's reward, with its zero point."""
    gap_N, zero_N = gaps(lm, items, request, batch_size=batch_size)
    return gap_N - zero_N


def _key(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """A conversation as a hashable key."""
    return tuple((message["role"], message["content"]) for message in messages)


@stored_as("reward_by")
@dataclasses.dataclass(frozen=True)
class RewardBy:
    """A plain function of texts in place of `gaps`: see `reward_by`."""

    function: Callable[[str, str], float]

    def __call__(
        self, lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64
    ) -> tuple[np.ndarray, np.ndarray]:
        pairs = []
        for messages, response, reference in items:
            prompt, text = question_text(messages), response.text if isinstance(response, Response) else response
            pairs.append([number(self.function, prompt, answer) for answer in (text, reference)])
        values_N2 = np.asarray(pairs, np.float32).reshape(-1, 2)  # None becomes NaN: no reward
        return values_N2[:, 0] - values_N2[:, 1], np.zeros(len(items), np.float32)


def reward_by(function: Callable[[str, str], float]) -> RewardBy:
    """A reward for PIT's ``rewarding``: `function(prompt, response)` rewards a response, and the gap is the reward of
    the response minus that of the reference. The rules for the function of ``judge_by`` apply."""
    return RewardBy(function)


class GapReward:
    """r_gap(x, y, y_ref) - r_gap(x, y_ref, y_ref) for responses to the improver's ``prompts``, one for each reference.
    ``left_out`` counts the references left out: empty ones, and those after which the context has too little room for a
    response, or for the reference itself as the response."""

    def __init__(
        self,
        lm: LM,
        references: Sequence[tuple[Prompt, str]],
        request: str,
        rewarding: Callable[..., tuple[np.ndarray, np.ndarray]],
        config: RLConfig,
    ):
        """Args: ``lm`` is the gap reward model; ``rewarding`` is ``gaps`` or a replacement; ``config`` is that of the
        training, and sets the length of a response and the number of rows that go through a model together."""
        self.lm, self.request, self.rewarding, self.config = lm, request, rewarding, config
        self.zero = 0.0
        self.items: dict[str, tuple[tuple[Message, ...], str]] = {}  # messages and reference of each prompt
        self.prompts: list[Prompt] = []
        for place, (prompt, reference) in enumerate(references):
            id = f"{prompt.id}~{place}"
            conversation = Prompt(id=id, messages=ask_to_improve(prompt.messages, reference, request))
            if reference.strip() and self.fits(conversation, reference):
                self.items[id] = prompt.messages, reference
                self.prompts.append(conversation)
        self.left_out = len(references) - len(self.prompts)

    def fits(self, conversation: Prompt, reference: str) -> bool:
        """Whether the context has room for a response, and for the reference as the response."""
        longest = max(self.config.max_new_tokens, len(render_response(self.lm.tokenizer, reference)))
        return bool(with_room(self.lm, [conversation], longest))

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        items = [(self.items[r.prompt_id][0], r, self.items[r.prompt_id][1]) for r in responses]
        gap_N, zero_N = self.rewarding(self.lm, items, self.request, batch_size=self.config.rows_at_once)
        self.zero = float(np.mean(zero_N))
        return gap_N - zero_N

    def monitor(self, prompts: Sequence[Prompt], responses: Sequence[Response], gains: np.ndarray) -> dict[str, float]:
        """How far the responses are from their references: this exposes a learner that copies, pads or flatters."""
        references = [self.items[response.prompt_id][1] for response in responses]
        return {
            "gained": float(np.mean(gains > 0)),
            "gap_of_references": self.zero,
            **change_from(references, responses),
        }


def change_from(references: Sequence[str], responses: Sequence[Response]) -> dict[str, float]:
    """Responses against references: share of exact copies, edit distance in words, length gap in characters."""
    both = [
        (reference.strip(), response.text.strip()) for reference, response in zip(references, responses, strict=True)
    ]
    return {
        "copied": float(np.mean([a == b for a, b in both])),
        "edit_distance": float(np.mean([metrics.edit_distance(a.split(), b.split()) for a, b in both])),
        "length_gap": float(np.mean([len(b) - len(a) for a, b in both])),
    }
