"""Language feedback as text: the request to a critic, and the writing and parsing of feedback (SRT, arXiv 2406.07168).

    {y}
    ### Feedback
    Weaknesses: ...
    Suggestions: ...
    Overall Score: [[7]]
    ### Improved Response
    {r}

The headings and their order are the paper's, the wording of the request is ours. A model learns to write exactly the
text of `write`; `parse` is tolerant and reads only generated text. A missing part is None.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.stages.prompts import check_slots, fill_slots, load_template, parse_score


class Feedback(NamedTuple):
    """The parts of a critic's text."""

    weaknesses: str | None
    suggestions: str | None
    score: int | None
    improved: str | None

    @property
    def complete(self) -> bool:
        """Nothing is missing (the paper's first filter)."""
        return None not in self


@stored_as("prompts.critique.CritiqueTemplate")
@dataclass(frozen=True, kw_only=True)
class CritiqueTemplate:
    """A critic's request with the slots `{prompt}` and `{response}`, and the headings of its feedback. `feedback`
    begins the feedback. `score` has the slot `{score}` for a whole number from `low` to `high`. `separator` stands
    between the last heading and the improved response.

    `parts`: which of weaknesses, suggestions and score a model is trained to write (the ablations of the paper's
    Table 6 leave some out). Every heading begins a line.
    """

    name: str
    request: str
    feedback: str = "### Feedback"
    weaknesses: str = "Weaknesses:"
    suggestions: str = "Suggestions:"
    score: str = "Overall Score: [[{score}]]"
    improved: str = "### Improved Response"
    separator: str = "\n"
    low: int = 1
    high: int = 10
    parts: tuple[str, ...] = ("weaknesses", "suggestions", "score")

    def __post_init__(self) -> None:
        check_slots(f"critique template {self.name!r}", self.request)
        words = [_words(heading) for heading in self._headings.values()]
        if len(set(words)) < len(words) or "" in words:
            raise ValueError(f"critique template {self.name!r}: the headings {words} are not all different words")
        if not 0 <= self.low < self.high <= 9999:
            raise ValueError(
                f"critique template {self.name!r}: low={self.low}, high={self.high}; 0 <= low < high <= 9999"
            )
        if unknown := set(self.parts) - {"weaknesses", "suggestions", "score"}:
            raise ValueError(f"critique template {self.name!r}: {sorted(unknown)} are not parts of feedback")
        if parse_score(self.score.replace("{score}", str(self.high)), self.low, self.high) != self.high:
            raise ValueError(
                f"critique template {self.name!r}: parse_score does not read a score written as {self.score!r}; use "
                'the word "score", a colon and {score}'
            )

    @property
    def _headings(self) -> dict[str, str]:
        return {
            "feedback": self.feedback,
            "weaknesses": self.weaknesses,
            "suggestions": self.suggestions,
            "score": self.score.partition("{score}")[0],
            "improved": self.improved,
        }

    def without(self, *parts: str) -> "CritiqueTemplate":
        """The template of an ablation."""
        return replace(self, parts=tuple(part for part in self.parts if part not in parts))

    def render(self, prompt_text: str, response_text: str) -> str:
        """The request to a critic."""
        return fill_slots(self.request, prompt_text, response_text)

    def marked(self, response_text: str) -> str:
        """A response up to where its feedback begins."""
        return f"{response_text}\n{self.feedback}"

    def unmarked(self, text: str) -> str | None:
        """The response in a generated text that ends with the heading `feedback`; None if it ends otherwise."""
        body = text.removesuffix(self.feedback)
        return body.rstrip("\n") if body != text and body.endswith("\n") else None

    def write(self, weaknesses: str, suggestions: str, score: int, improved: str) -> str:
        """The text after a marked response: a line break, the feedback by `parts`, and the improved response."""
        lines = {
            "weaknesses": f"{self.weaknesses} {weaknesses}",
            "suggestions": f"{self.suggestions} {suggestions}",
            "score": self.score.replace("{score}", str(score)),
        }
        return "\n".join(
            ["", *(lines[part] for part in lines if part in self.parts), self.improved + self.separator + improved]
        )

    def parse(self, generated: str, *, cut_off: bool = False) -> Feedback:
        """The parts of a critic's text. The first three may come in any order, and headings in any case and with any
        marks. The improved response is everything after its heading, up to the next heading `feedback`. A score at the
        very end of a text that the token limit ``cut_off`` may not be whole, so it does not count.
        """
        text = "\n" + generated
        spans: dict[str, tuple[int, int]] = {}
        for name, heading in self._headings.items():
            match = _heading(heading).search(text)
            if match is not None:
                spans[name] = match.span()
        starts = [*sorted(start for name, (start, _) in spans.items() if name != "feedback"), len(text)]

        def section(name: str) -> str | None:
            if name not in spans:
                return None
            start, end = spans[name]
            following = next(s for s in starts if s > start)
            return text[end:following].strip() or None

        improved = None
        if "improved" in spans:
            rest = text[spans["improved"][1] :]
            again = _heading(self.feedback).search(rest)
            improved = (rest[: again.start()] if again else rest).strip() or None
        early = "improved" not in spans or all(
            spans[name][0] < spans["improved"][0] for name in ("weaknesses", "suggestions", "score") if name in spans
        )
        if not early:  # a heading inside the improved response is text, or the parts are in another order
            before = self.parse(text[: spans["improved"][0]])  # not cut off: another heading follows
            return before._replace(improved=improved)
        score = None
        if "score" in spans:
            start = spans["score"][0]
            end = next(s for s in starts if s > start)
            score = parse_score(text[start:end], self.low, self.high, cut_off=cut_off and end == len(text))
        return Feedback(section("weaknesses"), section("suggestions"), score, improved)


def load_critique_template() -> CritiqueTemplate:
    """The template shipped in this package, after the paper's Table 1."""
    return CritiqueTemplate(name="srt", request=load_template("srt_critic"))


def _words(heading: str) -> str:
    return " ".join(re.findall(r"\w+", heading)).casefold()


def _heading(heading: str) -> re.Pattern[str]:
    """A line that begins with the heading's words, with any marks around them."""
    marks = r"[#*_\s\d.)-]*?"
    words = r"\W+".join(map(re.escape, re.findall(r"\w+", heading)))
    return re.compile(rf"\n{marks}{words}\b[*_]*[ \t]*[:：]?[*_]*", re.IGNORECASE)
