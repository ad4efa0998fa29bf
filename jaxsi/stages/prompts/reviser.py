"""The adaptive reviser's prompt: a task and a draft in, a label and the final answer out (SEFT, arXiv 2406.10813).

The wording is ours; the label strings are from memory, without a source (see methods/seft.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Message
from jaxsi.stages.prompts import ask_to_improve, check_slots, fill_slots, load_template, question_text


@stored_as("prompts.reviser.ReviserTemplate")
@dataclass(frozen=True, kw_only=True)
class ReviserTemplate:
    """The requests to a reviser, and the form of its answer: ``label + separator + answer``.

    `template` is the request to the adaptive reviser, `warm_up` the one to the reviser without labels. A text with the
    slots `{prompt}` and `{response}` once each is the whole request. A text without `{response}` is the user's message
    after a conversation in which the draft was the assistant's answer. `labels`: rewrite, correct, keep, in this order.
    Example:
    `ReviserTemplate(name="short", template="Q: {prompt} A: {response} Label, then answer:",
    warm_up="Q: {prompt} A: {response} Better:", labels=("wrong", "bad", "good"), separator=" ")`.
    """

    name: str
    template: str
    warm_up: str
    labels: tuple[str, str, str] = ("[Major Revise]", "[Minor Revise]", "[No Revise]")
    separator: str = "\n"

    def __post_init__(self) -> None:
        for name, text in (("template", self.template), ("warm_up", self.warm_up)):
            if "{response}" in text:
                check_slots(f"reviser template {self.name!r}, {name}", text)
        if len({label.casefold() for label in self.labels}) != 3 or any(not x or x != x.strip() for x in self.labels):
            raise ValueError(
                f"reviser template {self.name!r}: the labels are {self.labels}; give three different ones, not empty "
                "and without white space at their ends"
            )
        if not self.separator or self.separator.strip():
            raise ValueError(
                f"reviser template {self.name!r}: separator {self.separator!r} is not white space; give a space or a "
                "line break"
            )

    @property
    def major(self) -> str:
        """The label of a draft to be rewritten."""
        return self.labels[0]

    @property
    def minor(self) -> str:
        """The label of a draft to be corrected."""
        return self.labels[1]

    @property
    def no(self) -> str:
        """The label of a draft that stays as it is."""
        return self.labels[2]

    def ask(self, messages: Sequence[Message], response: str) -> tuple[Message, ...]:
        """The request to the adaptive reviser."""
        return _ask(self.template, messages, response)

    def ask_warm_up(self, messages: Sequence[Message], response: str) -> tuple[Message, ...]:
        """The request to the warm-up reviser, which writes only the better answer."""
        return _ask(self.warm_up, messages, response)

    def write(self, label: str, text: str) -> str:
        """The text that the adaptive reviser is trained to write."""
        return f"{label}{self.separator}{text}"

    def parse(self, generated: str) -> tuple[str | None, str | None]:
        """(label, answer) of a reviser's generated text; None for a part that is missing.

        The text must begin with a label, in any case, after optional white space. A label inside the answer is text. A
        word that only begins like a label ("goodness") is not a label.
        """
        text = generated.lstrip()
        for label in sorted(self.labels, key=len, reverse=True):  # one label may be the beginning of another
            rest = text[len(label) :]
            runs_on = label[-1].isalnum() and re.match(r"\w", rest)
            if text[: len(label)].casefold() == label.casefold() and not runs_on:
                return label, rest.strip() or None
        return None, None


def _ask(template: str, messages: Sequence[Message], response: str) -> tuple[Message, ...]:
    if "{response}" in template:
        return ({"role": "user", "content": fill_slots(template, question_text(messages), response)},)
    return ask_to_improve(messages, response, template)


def load_reviser_template(name: str = "seft") -> ReviserTemplate:
    """The template of the files NAME_reviser.txt and NAME_warm_reviser.txt shipped in this package."""
    return ReviserTemplate(
        name=name, template=load_template(f"{name}_reviser"), warm_up=load_template(f"{name}_warm_reviser")
    )
