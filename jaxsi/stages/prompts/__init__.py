"""The papers' prompt templates as text files, and the parsers of what models write in reply.

A template is data: `Rubric` fills it and `parse_score` reads the reply. Parsers get only generated text, never the
prompt, so judged responses need no stripping or escaping. Text that does not parse gives None, never a number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import ClassVar

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Message

# The word "score", then a mandatory separator. ASCII keeps IGNORECASE from matching look-alikes such as "ſcore".
_SCORE = r"(?<![A-Za-z0-9])score[* \t]*[:：=]"
_MARKER = re.compile(_SCORE, re.IGNORECASE | re.ASCII)
# A marker at the beginning of its line, after marks and up to two words: "**Final score:**".
_FIRST = re.compile(r"[^A-Za-z]*(?:[A-Za-z]+[^A-Za-z0-9]+){0,2}?" + _SCORE, re.IGNORECASE | re.ASCII)
# No line break between marker and number: "Score:\n1. The response ..." is an empty verdict followed by a list.
_NUMBER = re.compile(r"[* \t\u00a0\u3000\[({<]*(0|[1-9][0-9]{0,3})(?![0-9A-Za-z_%])")
_SUM = re.compile(r"([0-9]{1,4}(?:[ \t]*\+[ \t]*[0-9]{1,4})+)(?:[ \t]*=[ \t]*([0-9]{1,4}))?(?![0-9])")
_DECIMALS = re.compile(r"[.,·٫][0-9]")
_RANGE = re.compile(r"[\])}>*\s]*(?:[-‐‑‒–—~+×=]|to\b|or\b)[\s\[({<*]*[0-9]", re.IGNORECASE)
_OUT_OF = re.compile(r"[\])}>*\s]*(?:/|out of\b)[\s\[({<*]*([0-9]+(?:[.,][0-9]+)?)", re.IGNORECASE)
_UNIT = re.compile(r"[\])}>*\"'”’]*[ \t]*(?:points?\b|分|点)?", re.IGNORECASE)
_CLOSING = re.compile(r"(?:[ ]*/[ ]*[0-9]+)?[\])}>*.]*")
_CLOSED = re.compile(r"[\s\])}>*_.\"'”’]+")
_SLOT = re.compile(r"\{(prompt|response|response_a|response_b|responses)\}")


@stored_as("prompts.Rubric")
@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A pointwise judge prompt and the range of its scores.

    `template` has the slots `{prompt}` and `{response}` once each (other braces are plain text) and tells the judge to
    end in `marker` and a whole number from `low` to `high`. Example: `Rubric(name="short", marker="Score:", low=0,
    high=5, template="Q: {prompt} A: {response} Reason, then Score: 0-5")`.
    """

    name: str
    template: str
    marker: str = "Score:"
    low: int = 0
    high: int = 5
    step: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_slots(f"rubric {self.name!r}", self.template)
        if not 0 <= self.low < self.high <= 9999:
            raise ValueError(
                f"rubric {self.name!r}: low={self.low}, high={self.high}; it needs 0 <= low < high <= 9999"
            )
        if parse_score(f"{self.marker} {self.low}", self.low, self.high) != self.low:
            raise ValueError(
                f"rubric {self.name!r}: parse_score does not read the marker {self.marker!r}; "
                "use the word Score and a colon"
            )

    @property
    def choices(self) -> dict[str, float]:
        """What may follow `marker`, and its score: `{" 0": 0.0, ..., " 5": 5.0}`, lowest first."""
        return {f" {value}": float(value) for value in range(self.low, self.high + 1)}

    def render(self, prompt_text: str, response_text: str) -> str:
        """The judge prompt."""
        return fill_slots(self.template, prompt_text, response_text)

    def parse(self, generated: str, *, cut_off: bool = False) -> int | None:
        """`parse_score` within this rubric's range."""
        return parse_score(generated, self.low, self.high, cut_off=cut_off)

    def forced(self, text: str) -> str:
        """A judge's text up to where one of the `choices` follows."""
        return force_marker(text, self.marker)


def slots_of(template: str) -> list[str]:
    """The names of the slots of a template, in the order of the alphabet."""
    return sorted(_SLOT.findall(template))


def check_slots(name: str, template: str, needed: Sequence[str] = ("prompt", "response")) -> None:
    """Raises: ValueError: if a template does not have each of the slots once, and no other."""
    slots = slots_of(template)
    if slots != sorted(needed):
        names = " and ".join(f"{{{slot}}}" for slot in needed)
        raise ValueError(f"{name}: the template has the slots {slots}; it needs {names} exactly once each")


def fill_slots(template: str, prompt_text: str, response_text: str) -> str:
    """`fill` for the slots `{prompt}` and `{response}`."""
    return fill(template, prompt=prompt_text, response=response_text)


def fill(template: str, **values: str) -> str:
    """A template with the texts inserted unchanged, in one pass: a slot name inside a text stays text."""
    return _SLOT.sub(lambda slot: values.get(slot[1], slot[0]), template)


def load_rubric() -> Rubric:
    """The rubric of the Self-Rewarding paper, with scores 0 to 5. `comparison.read_rubric` reads others."""
    return Rubric(name="self_rewarding_judge", template=load_template("self_rewarding_judge"))


def load_template(name: str) -> str:
    """The text of a shipped template, without the newline at the end of its file."""
    return (_folder() / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def parse_score(text: str, low: int = 0, high: int = 5, *, cut_off: bool = False) -> int | None:
    """The verdict in a judge's generated text, or None if it is not valid.

    A verdict is the marker `score` in any case, a mandatory `:`, `：` or `=`, then on the same line optional `*`,
    spaces or opening brackets, then a whole number in `low..high`. The last verdict on a line of its own counts;
    without one, the last marker of the text.
    None for "Score: 10", "3.5", "4.0", "-1", "05", "4-5", "4 would be too high", "Score: n/a", no marker, or text cut
    off after the marker. "4/5" and "4 out of 5" are 4 if 5 is `high`; "4/10" is on another scale and None. A sum counts
    as its total, "1 + 1 + 1 = 3" as 3; a wrong sum is None.
    The marker is that of the Self-Rewarding judge prompt (arXiv 2401.10020, figure 2); the rule is ours.

    Args:
      cut_off: the token limit ended the text, so that a number at its very end may not be whole.
    """
    marker = _marker_of_verdict(text, low, high)
    return None if marker is None else _value(text, marker, low, high, cut_off=cut_off)[0]


def up_to_verdict(text: str) -> str | None:
    """A judge's text up to and with the number of its verdict; None if there is no number.

    A judge is trained to write this: the justification, the verdict, and then the end.
    """
    marker = _marker_of_verdict(text, 0, 9999)
    number = None if marker is None else _NUMBER.match(text, marker)
    if number is None:
        return None
    total = _SUM.match(text, number.start(1))
    closing = _CLOSING.match(text, number.end() if total is None else total.end())
    assert closing is not None  # it matches the empty text, too
    return text[: closing.end()].strip()


def force_marker(text: str, marker: str) -> str:
    """A judge's text up to and with its last score marker, or with `marker` added on a new line if it has none.

    The caller appends a score string such as " 4" and scores it.
    """
    last = _last_marker(text)
    if last is not None:
        return text[: last.end()]
    return f"{text.rstrip()}\n{marker}".lstrip("\n")


def question_text(messages: Sequence[Mapping[str, str]]) -> str:
    """The question as a judge reads it: a single user message unchanged, a longer conversation with its roles named."""
    if len(messages) == 1:
        return messages[0]["content"]
    first, *rest = (f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    return "\n\n".join([first.removeprefix("User: "), *rest])


def ask_to_improve(messages: Sequence[Message], response: str, request: str) -> tuple[Message, ...]:
    """The conversation that PIT's improver answers and its gap reward model reads: the prompt, a response, and the
    request to improve it. {prompt} in the request stands for the prompt's text. The paper's layout is not known."""
    text = request.replace("{prompt}", question_text(messages))
    return (*messages, {"role": "assistant", "content": response}, {"role": "user", "content": text})


def _last_marker(text: str) -> re.Match[str] | None:
    return next(reversed(list(_MARKER.finditer(text))), None)


def _marker_of_verdict(text: str, low: int, high: int) -> int | None:
    """Where the marker that counts ends; None if there is no marker."""
    position = 0
    own = None
    for line in text.splitlines(keepends=True):
        first = _FIRST.match(line)
        if first is not None:
            marker = position + first.end()
            end = _value(text, marker, low, high)[1]
            if end == marker or not _CLOSED.sub("", text[end : position + len(line)]):  # no number, or nothing after it
                own = marker
        position += len(line)
    if own is not None and _value(text, own, low, high)[0] is not None:
        return own
    last = _last_marker(text)
    return None if last is None else last.end()


def _value(text: str, marker: int, low: int, high: int, *, cut_off: bool = False) -> tuple[int | None, int]:
    """The number after a marker that ends at ``marker``, None if it is not valid; and where it ends."""
    number = _NUMBER.match(text, marker)
    if number is None:
        return None, marker
    value, end = int(number[1]), number.end()
    if (total := _SUM.match(text, number.start(1))) is not None:
        value, end = sum(map(int, total[1].split("+"))), total.end()
        if total[2] is not None and int(total[2]) != value:
            return None, end
    if text[end : end + 1].isnumeric() or _DECIMALS.match(text, end) or _RANGE.match(text, end):
        return None, end
    scale = _OUT_OF.match(text, end)
    if scale is not None:
        if scale[1] != str(high):
            return None, end
        end = scale.end()
    if cut_off and not text[end:].strip(" \t./+="):
        return None, end
    unit = _UNIT.match(text, end)
    assert unit is not None  # it matches the empty text, too
    if text[unit.end() : unit.end() + 1].isalpha():  # "4 would be too high"
        return None, end
    return (value if low <= value <= high else None), unit.end()


def _folder() -> Traversable:
    return resources.files(__name__)
