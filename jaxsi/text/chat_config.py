"""How conversations are rendered, and how a thought is told from the answer after it.

A reasoning model writes a thought between `<think>` and `</think>`, and then its answer. Judges, critics and all other
readers of texts get the answer alone: see `split_thought`.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxsi.runs.config_snapshot import stored_as

OPENING, CLOSING = "<think>", "</think>"
SWITCHES = ("enable_thinking", "thinking")  # the variables by which templates turn thoughts on and off


@stored_as("chat.ChatConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """What a chat template is told beside the messages.

    ``thinking``: "off" asks for an answer without a thought, if the template has such a switch. "keep" asks for a
    thought and trains on it. "strip" asks for a thought and trains on the answer alone. ``template_kwargs``: other
    variables of the template, as JSON (in Python also as a dict), e.g. '{"enable_thinking": false}'. ``date``: of
    templates that write the date, as "2026-11-27"; by default the day on which a run begins.
    """

    thinking: Literal["off", "keep", "strip"] = "off"
    template_kwargs: str = "{}"
    date: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.template_kwargs, str):
            object.__setattr__(self, "template_kwargs", json.dumps(self.template_kwargs, sort_keys=True))
        if self.thinking not in ("off", "keep", "strip"):
            raise ValueError(f"thinking is {self.thinking!r}; it is off, keep or strip")
        if self.date is not None:
            import datetime

            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"date is {self.date!r}; give it as 2026-11-27") from None
        self.variables()

    def variables(self) -> dict[str, Any]:
        """``template_kwargs`` as a dict. Raises: ValueError if it is not a JSON object."""
        try:
            value = json.loads(self.template_kwargs)
        except ValueError as error:
            raise ValueError(f"template_kwargs is {self.template_kwargs!r}, which is not JSON: {error}") from None
        if not isinstance(value, Mapping):
            raise ValueError(f'template_kwargs is {self.template_kwargs!r}; give an object like {{"name": value}}')
        return dict(value)


class Thought(NamedTuple):
    """A generated text in its two parts. ``closed`` is False if the text ends within the thought: then there is no
    answer."""

    reasoning: str
    answer: str
    closed: bool


def split_thought(text: str, *, opened: bool = False) -> Thought:
    """The thought and the answer of a generated text.

    The answer is what follows the last `</think>`, or the whole text if no thought was begun. ``opened``: the prompt
    has begun the thought already.
    """
    before, closing, after = text.rpartition(CLOSING)
    if closing:
        return Thought(_without_opening(before), after.lstrip("\n"), closed=True)
    if opened or text.lstrip().startswith(OPENING):
        return Thought(_without_opening(text), "", closed=False)
    return Thought("", text, closed=True)


def written_thought(text: str) -> Thought:
    """`split_thought` of a text that no model sampled here: `</think>` within a sentence is a part of it."""
    begun = text.lstrip().startswith(OPENING)
    if begun or (OPENING not in text and _CLOSING_LINE.search(text)):
        return split_thought(text)
    return Thought("", text, closed=True)


_CLOSING_LINE = re.compile(rf"^{CLOSING}\s*$", re.MULTILINE)


def opens_thought(prompt: str) -> bool:
    """Whether the text of a prompt ends within a thought."""
    return prompt.rfind(OPENING) > prompt.rfind(CLOSING) and prompt.rstrip().endswith(OPENING)


def _without_opening(text: str) -> str:
    return text.strip().removeprefix(OPENING).strip()
