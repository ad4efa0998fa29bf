"""Rubrics that compare responses to one prompt, two at a time or all at once; and rubrics from files.

The slots of a template say what it does: it grades `{response}`, compares `{response_a}` with `{response_b}`, or ranks
`{responses}`. Verdicts that do not parse are None.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.errors import InputError
from jaxsi.stages.prompts import Rubric, check_slots, fill, load_rubric, load_template, slots_of

Winner = Literal["A", "B", "C"]  # C: a tie

_LEAD = r"^[^A-Za-z\n]*(?:(?:final|overall|my)[^A-Za-z0-9\n]+)?"  # of a verdict on a line of its own
_MARKS = r"[*_`\"'\[({< \t]*"
_VERDICT = re.compile(
    rf"{_LEAD}verdict[*_ \t]*[:：=]{_MARKS}(?:(?:response|assistant|answer)[ _]+)?(A|B|C|tie)[*_`\"'\])}}>. \t]*$",
    re.IGNORECASE | re.MULTILINE | re.ASCII,
)
_BRACKETS = re.compile(r"\[\[[ ]*(A|B|C|tie)[ ]*\]\]", re.IGNORECASE)  # MT-Bench's form
_VERDICT_MARKER = re.compile(r"\bverdict[*_ \t]*[:：=]", re.IGNORECASE | re.ASCII)
_RANKING = re.compile(rf"{_LEAD}ranking[*_ \t]*[:：=](.*)$", re.IGNORECASE | re.MULTILINE | re.ASCII)
_PLACE = re.compile(r"[\[(*_`\"']*(?:response[ _]*)?#?([0-9]{1,3})[\])*_`\"']*", re.IGNORECASE)
_BETWEEN = re.compile(r"\s*(>|=|,|≻)\s*")


class RubricError(InputError, ValueError):
    """A rubric that is not there or does not fit what it is used for; the message names it and says what to do."""


@stored_as("prompts.PairwiseRubric")
@dataclass(frozen=True, kw_only=True)
class PairwiseRubric:
    """A judge prompt that compares two responses. `template` has the slots `{prompt}`, `{response_a}` and
    `{response_b}` once each, and tells the judge to end in "Verdict: A", "Verdict: B", or "Verdict: C" for a tie.

    A response's score is 1 if it wins, 1/2 for a tie and 0 if it loses.
    """

    name: str
    template: str
    low: ClassVar[int] = 0
    high: ClassVar[int] = 1
    step: ClassVar[float] = 0.5
    marker: ClassVar[str] = "Verdict:"
    choices: ClassVar[dict[str, float]] = {" A": 1.0, " B": 0.0, " C": 0.5}  # the score of response A

    def __post_init__(self) -> None:
        check_slots(f"rubric {self.name!r}", self.template, ("prompt", "response_a", "response_b"))

    def render(self, prompt_text: str, response_a: str, response_b: str) -> str:
        """The judge prompt."""
        return fill(self.template, prompt=prompt_text, response_a=response_a, response_b=response_b)

    def parse(self, generated: str, *, cut_off: bool = False) -> Winner | None:
        """The winner: the last verdict on a line of its own, else the last "[[A]]" (MT-Bench's form); "tie" is C.

        Args:
          cut_off: the token limit ended the text, so that a verdict at its very end may not be whole.
        """
        found = list(_VERDICT.finditer(generated)) or list(_BRACKETS.finditer(generated))
        if not found:
            return None
        if cut_off and found[-1].re is _VERDICT and not generated[found[-1].end(1) :].strip(" \t"):
            return None
        letter = found[-1][1].upper()
        return "A" if letter == "A" else "B" if letter == "B" else "C"

    def up_to_verdict(self, text: str) -> str | None:
        """A judge's text up to and with its verdict, which a judge is trained to write; None if there is no verdict."""
        found = list(_VERDICT.finditer(text))
        if found:
            return text[: found[-1].end(1)].strip()
        brackets = list(_BRACKETS.finditer(text))
        return text[: brackets[-1].end()].strip() if brackets else None

    def has_justification(self, text: str) -> bool:
        """Whether a text holds words before its verdict."""
        found = [*_VERDICT.finditer(text), *_BRACKETS.finditer(text)]
        return bool(found) and re.search(r"\w", text[: found[0].start()]) is not None

    def forced(self, text: str) -> str:
        """A judge's text up to where one of the `choices` follows."""
        markers = list(_VERDICT_MARKER.finditer(text))
        return text[: markers[-1].end()] if markers else f"{text.rstrip()}\n{self.marker}".lstrip("\n")


@stored_as("prompts.RankingRubric")
@dataclass(frozen=True, kw_only=True)
class RankingRubric:
    """A judge prompt that ranks all responses to a prompt. `template` has the slots `{prompt}` and `{responses}` once
    each, and tells the judge to end in a line such as "Ranking: 2 > 3 = 1".

    The best response's score is 1, the worst one's 0, and the others lie between them in equal steps.
    """

    name: str
    template: str
    low: ClassVar[int] = 0
    high: ClassVar[int] = 1
    step: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        check_slots(f"rubric {self.name!r}", self.template, ("prompt", "responses"))

    def render(self, prompt_text: str, responses: Sequence[str]) -> str:
        """The judge prompt, in which the responses are numbered from 1."""
        numbered = [f'<response number="{i}">{text}</response>' for i, text in enumerate(responses, start=1)]
        return fill(self.template, prompt=prompt_text, responses="\n\n".join(numbered))

    def parse(self, generated: str, count: int) -> list[float] | None:
        """The scores of responses 1 to `count` (at least 2), from the last ranking on a line of its own; equal ones
        share the mean of their places. None if the ranking does not name each response exactly once."""
        found = list(_RANKING.finditer(generated))
        if not found:
            return None
        places: list[list[int]] = [[]]
        parts = _BETWEEN.split(found[-1][1].strip().rstrip(".").strip("* "))
        for i, part in enumerate(parts):
            if i % 2 == 0:
                if (number := _PLACE.fullmatch(part)) is None:
                    return None
                places[-1].append(int(number[1]))
            elif part != "=":
                places.append([])
        if sorted(number for place in places for number in place) != list(range(1, count + 1)):
            return None
        scores, before = [0.0] * count, 0
        for place in places:
            rank = before + (len(place) - 1) / 2
            for number in place:
                scores[number - 1] = (count - 1 - rank) / (count - 1)
            before += len(place)
        return scores


AnyRubric = Rubric | PairwiseRubric | RankingRubric


def rubric_of(name: str, template: str) -> AnyRubric:
    """The rubric of a template, of the kind that its slots say. Raises: ValueError: if it has other slots."""
    slots = set(slots_of(template))
    if "responses" in slots:
        return RankingRubric(name=name, template=template)
    if slots & {"response_a", "response_b"}:
        return PairwiseRubric(name=name, template=template)
    return Rubric(name=name, template=template)


def shipped_rubrics() -> list[str]:
    """The names of the rubrics in this package."""
    return ["pairwise_judge", "ranking_judge", "self_rewarding_judge"]


def read_rubric(name: str) -> AnyRubric:
    """A shipped rubric by its name, or one from a file: a text file is a template, with scores 0 to 5 if it grades; a
    .json file is an object with the fields of `Rubric`, such as {"template": "...", "low": 1, "high": 10}.

    Raises: RubricError: if there is no such rubric, or if it cannot be used; the message names it.
    """
    path = Path(name)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix != ".json":
                return rubric_of(path.stem, text.removesuffix("\n"))
            fields = json.loads(text)
            known = {field.name for field in dataclasses.fields(Rubric)}
            if not isinstance(fields, dict) or "template" not in fields or not fields.keys() <= known:
                raise ValueError(f"it needs an object with a template; it may have {', '.join(sorted(known))}")
            fields: dict[str, Any] = {"name": path.stem} | fields
            if fields.keys() <= {"name", "template"}:
                return rubric_of(**fields)
            return Rubric(**fields)
        except (OSError, ValueError, TypeError) as error:
            raise RubricError(f"{path}: this rubric cannot be used: {error}") from error
    if name not in shipped_rubrics():
        raise RubricError(
            f"rubric {name!r} is neither a file nor shipped; shipped are {', '.join(shipped_rubrics())}. A rubric file "
            "contains {prompt} and {response}; {prompt}, {response_a} and {response_b}; or {prompt} and {responses}"
        )
    return load_rubric() if name == "self_rewarding_judge" else rubric_of(name, load_template(name))
