"""The eight judge prompts of MT-Bench: one grade or two answers compared, one turn or two, with or without a reference.

Criteria, order and markers are the official ones (Zheng et al. 2023, arXiv 2306.05685, appendix A; FastChat's
`judge_prompts.jsonl`); the wording is ours. Grades and verdicts depend on the wording, so a figure to set beside
published ones needs the official file: `read_templates` takes it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxsi.runs.records import Message, RecordError
from jaxsi.stages.rows import rows

_SLOT = re.compile(r"\{([a-z]+(?:_[a-z]+)*(?:_[12])?)\}")

_GRADE = (
    'After your explanation, grade the answer with a number from 1 to 10, strictly in this form: "[[grade]]". For '
    'example: "Rating: [[5]]".'
)
_VERDICT = (
    'After your explanation, give your final verdict strictly in this form: "[[A]]" if assistant A is better, "[[B]]" '
    'if assistant B is better, or "[[C]]" for a tie.'
)
_FAIR = (
    "Do not let the order in which the answers stand influence you, nor their length, nor the names of the "
    "assistants. Be as objective as you can."
)
_QUALITIES = "its helpfulness, relevance, accuracy, depth, creativity and level of detail"
_SINGLE = (
    "Judge impartially how good the answer of an AI assistant to the user's question below is. Take into account "
    f"{_QUALITIES}."
)
_SINGLE_REFERENCE = (
    "Judge impartially how good the answer of an AI assistant to the user's question below is. Take into account "
    "whether it is correct and helpful. You get a reference answer and the assistant's answer."
)
_PAIR = (
    "Judge impartially how good the answers of two AI assistants to the user's question below are. Choose the "
    "assistant that follows the user's instructions better and answers the question better. Take into account the "
    "helpfulness, relevance, accuracy, depth, creativity and level of detail of the answers."
)
_PAIR_REFERENCE = (
    "Judge impartially how good the answers of two AI assistants to the user's question below are. Take into account "
    "whether they are correct and helpful. You get a reference answer, assistant A's answer and assistant B's answer, "
    "and decide whose answer is better."
)
_SECOND = "Concentrate on the answer to the user's second question."
_SECOND_PAIR = "Concentrate on which assistant answers the user's second question better."
_EXPLAIN = "Begin with a short explanation. Be as objective as you can."
_COMPARE = "Begin by comparing the two answers, and explain shortly."
_CHECK = "Begin by comparing the assistant's answer with the reference answer. Point out mistakes and correct them."
_CHECK_PAIR = "Begin by comparing both answers with the reference answer. Point out mistakes and correct them."


def _block(name: str, slot: str) -> str:
    return f"[The Start of {name}]\n{{{slot}}}\n[The End of {name}]"


def _conversation(title: str, speaker: str, answer: str) -> str:
    turns = [f"### User:\n{{question_{n}}}\n\n### {speaker}:\n{{{answer.format(n)}}}" for n in (1, 2)]
    return "\n\n".join([f"<|The Start of {title}|>", *turns, f"<|The End of {title}|>"])


_A_WITH_USER = _conversation("Assistant A's Conversation with User", "Assistant A", "answer_a_{}")
_B_WITH_USER = _conversation("Assistant B's Conversation with User", "Assistant B", "answer_b_{}")
_ONE_WITH_USER = _conversation("Assistant A's Conversation with User", "Assistant A", "answer_{}")
_REFERENCES = _conversation("Reference Answer", "Reference answer", "ref_answer_{}")
_REFERENCE = _block("Reference Answer", "ref_answer_1")
_ANSWER = _block("Assistant's Answer", "answer")
_TWO_ANSWERS = "\n\n".join(_block(f"Assistant {who.upper()}'s Answer", f"answer_{who}") for who in "ab")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A judge prompt: its official name, the system message, and the user's message with its slots."""

    name: str
    system: str
    user: str

    def messages(self, values: Mapping[str, str]) -> tuple[Message, ...]:
        """The request. The texts are inserted unchanged, in one pass: a slot name inside a text stays text."""
        text = _SLOT.sub(lambda slot: values.get(slot[1], slot[0]), self.user)
        return {"role": "system", "content": self.system}, {"role": "user", "content": text}

    @property
    def slots(self) -> list[str]:
        """The names of its slots, in their order."""
        return _SLOT.findall(self.user)


def _text(*sentences: str) -> str:
    return " ".join(sentences)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="single-v1",
            system="You are a helpful assistant.",
            user=f"[Instruction]\n{_text(_SINGLE, _EXPLAIN, _GRADE)}\n\n[Question]\n{{question}}\n\n{_ANSWER}",
        ),
        Template(
            name="single-math-v1",
            system="You are a helpful assistant.",
            user=f"[Instruction]\n{_text(_SINGLE_REFERENCE, _CHECK, 'Be as objective as you can.', _GRADE)}\n\n"
            f"[Question]\n{{question}}\n\n{_REFERENCE}\n\n{_ANSWER}",
        ),
        Template(name="single-v1-multi-turn", system=_text(_SINGLE, _SECOND, _EXPLAIN, _GRADE), user=_ONE_WITH_USER),
        Template(
            name="single-math-v1-multi-turn",
            system=_text(_SINGLE_REFERENCE, _SECOND, _CHECK, "Be as objective as you can.", _GRADE),
            user=f"{_REFERENCES}\n\n\n{_ONE_WITH_USER}",
        ),
        Template(
            name="pair-v2",
            system=_text(_PAIR, _COMPARE, _FAIR, _VERDICT),
            user=f"[User Question]\n{{question}}\n\n{_TWO_ANSWERS}",
        ),
        Template(
            name="pair-math-v1",
            system=_text(_PAIR_REFERENCE, _CHECK_PAIR, _FAIR, _VERDICT),
            user=f"[User Question]\n{{question}}\n\n{_REFERENCE}\n\n{_TWO_ANSWERS}",
        ),
        Template(
            name="pair-v2-multi-turn",
            system=_text(_PAIR, _SECOND_PAIR, _COMPARE, _FAIR, _VERDICT),
            user=f"{_A_WITH_USER}\n\n\n{_B_WITH_USER}",
        ),
        Template(
            name="pair-math-v1-multi-turn",
            system=_text(_PAIR_REFERENCE, _SECOND_PAIR, _CHECK_PAIR, _FAIR, _VERDICT),
            user=f"{_REFERENCES}\n\n\n{_A_WITH_USER}\n\n\n{_B_WITH_USER}",
        ),
    )
}


def template_name(*, pair: bool, turn: int, reference: bool) -> str:
    """The official name of the prompt for a turn."""
    kind = "pair" if pair else "single"
    version = "math-v1" if reference else "v2" if pair else "v1"
    return f"{kind}-{version}{'-multi-turn' if turn == 2 else ''}"


def read_templates(path: Path | str) -> dict[str, Template]:
    """The eight templates from a file in the format of FastChat's `judge_prompts.jsonl`; others in it are ignored.

    Raises: RecordError: if the file cannot be read, a template is missing, or one has other slots than ours.
    """
    found = {}
    for line, row in rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            name, user = row["name"], row["prompt_template"].replace("{{", "{").replace("}}", "}")
            if name not in TEMPLATES:
                continue
            found[name] = Template(name=name, system=row["system_prompt"], user=user)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(path, line, f"not a judge prompt of FastChat: {error!r}") from None
        if found[name].slots != TEMPLATES[name].slots:
            slots = ", ".join(TEMPLATES[name].slots)
            raise RecordError(path, line, f"{name} has the slots {', '.join(found[name].slots)}; it needs {slots}")
    if missing := [name for name in TEMPLATES if name not in found]:
        raise RecordError(path, None, f"no judge prompt {missing[0]!r}; give FastChat's judge_prompts.jsonl")
    return found


def needs_reference(category: str) -> bool:
    """Whether the judge sees a reference answer to questions of a category, as in FastChat."""
    return category in ("math", "reasoning", "coding")


def turn_values(
    questions: Sequence[str], answers: Mapping[str, Sequence[str]], references: Sequence[str] | None
) -> dict[str, str]:
    """The values of all slots. ``answers``: the turns under "" (one model), or under "a" and "b"."""
    values = {"question": questions[0], **{f"question_{n}": text for n, text in enumerate(questions, start=1)}}
    for who, turns in answers.items():
        name = f"answer_{who}" if who else "answer"
        values |= {name: turns[0], **{f"{name}_{n}": text for n, text in enumerate(turns, start=1)}}
    if references is not None:
        values |= {f"ref_answer_{n}": text for n, text in enumerate(references, start=1)}
    return values
