"""Self-Refine's prompts: a request for feedback on a response, then one for a response that follows the feedback.

Madaan et al. 2023, arXiv 2303.17651. The wording is ours and leaves out the examples of the paper's tasks. All of it is
one conversation, so the model sees what it wrote:

    x, y_0, "feedback?" -> fb_0;   x, y_0, "feedback?", fb_0, "again!" -> y_1      (the paper's eq. 2 and 4)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Message
from jaxsi.stages.prompts import load_template


@stored_as("prompts.self_refine.SelfRefineTemplate")
@dataclass(frozen=True, kw_only=True)
class SelfRefineTemplate:
    """The requests for feedback and for a new response. Feedback with a line of only `enough` asks for no change."""

    feedback: str
    refine: str
    enough: str = "Nothing to improve"

    def __post_init__(self) -> None:
        if not _words(self.enough) or self.enough not in self.feedback.splitlines():
            raise ValueError(
                f"the request for feedback lacks the line {self.enough!r}, by which the model says it is satisfied"
            )

    def ask_feedback(self, messages: Sequence[Message], response: str) -> tuple[Message, ...]:
        """The request for feedback on a response."""
        return (*messages, *_turns(response, self.feedback))

    def ask_refine(self, messages: Sequence[Message], history: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
        """The request for a new response after ``history``: (response, feedback) of each round, the newest last."""
        turns = [
            turn
            for response, feedback in history
            for turn in (*_turns(response, self.feedback), *_turns(feedback, self.refine))
        ]
        return (*messages, *turns)

    def is_enough(self, feedback: str) -> bool:
        """Whether a line of the feedback consists of the words of `enough`, in any case and with any marks."""
        return any(_words(line) == _words(self.enough) for line in feedback.splitlines())


def load_self_refine_template() -> SelfRefineTemplate:
    """The template of the files self_refine_feedback.txt and self_refine_refine.txt shipped in this package."""
    return SelfRefineTemplate(
        feedback=load_template("self_refine_feedback"), refine=load_template("self_refine_refine")
    )


def _turns(reply: str, request: str) -> tuple[Message, Message]:
    return {"role": "assistant", "content": reply}, {"role": "user", "content": request}


def _words(line: str) -> str:
    return " ".join(re.findall(r"\w+", line)).casefold()
