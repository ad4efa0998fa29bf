"""AlpacaEval 2.0's judge: one token, m or M, weighted by its probability; and any other judge in its place.

The judge sees the two outputs in one order only, which a coin decides for each instruction (`is_switched`): the
position of an output is averaged over the instructions, and it is the same for every model. Another seed is another
coin.
"""

import dataclasses
import functools
import hashlib
import json
import random
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxsi.evals.alpaca_assets import Output
from jaxsi.evals.alpaca_eval import Annotation
from jaxsi.evals.answer_cache import AnswerCache, Answered, EvaluationError
from jaxsi.evals.judging import (
    Plan,
    ask_choices,
    check_aligned,
    choice_asker,
    estimate,
    plan_left,
    questions_of,
    unique,
)
from jaxsi.evals.side_by_side import Row, SideBySide
from jaxsi.runs.records import Message, Prompt
from jaxsi.stages.endpoint import EndpointJudge
from jaxsi.stages.verdicts import JudgeConfig, Writer

CHOICES = ("m", "M")  # the names of the first and the second output in the template
OFFICIAL_MODEL = "gpt-4-1106-preview"
OFFICIAL_TEMPLATE = "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62"  # sha256 of its file
_SLOT = re.compile(r"\{(instruction|output_1|output_2)\}")
_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)\n?<\|im_end\|>", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """A judge prompt in AlpacaEval's format: turns between <|im_start|>ROLE and <|im_end|>, with the slots
    {instruction}, {output_1} and {output_2} once each. The judge answers m (output_1) or M (output_2).

    Raises: EvaluationError: if it has no turn, or other slots.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if not self._turns or self._turns[-1][0] != "user":
            raise EvaluationError(
                f"template {self.name}: its turns stand between <|im_start|>ROLE and <|im_end|>, and the last is the "
                "user's"
            )
        slots = sorted(slot for _, text in self._turns for slot in _SLOT.findall(text))
        if slots != ["instruction", "output_1", "output_2"]:
            raise EvaluationError(
                f"template {self.name} has the slots {', '.join(slots) or 'none'}; it needs {{instruction}}, "
                "{output_1} and {output_2} once each"
            )

    @property
    def is_official(self) -> bool:
        """Whether it is, letter for letter, the template of the calibrated judge."""
        return hashlib.sha256(self.text.encode()).hexdigest() == OFFICIAL_TEMPLATE

    @functools.cached_property
    def _turns(self) -> list[tuple[str, str]]:
        return _TURN.findall(self.text)

    def render(self, instruction: str, output_1: str, output_2: str) -> tuple[Message, ...]:
        """The conversation. Slots inside of a text that fills one stay as they are."""
        values = {"instruction": instruction, "output_1": output_1, "output_2": output_2}
        return tuple(
            {"role": role, "content": _SLOT.sub(lambda slot: values[slot[1]], text)} for role, text in self._turns
        )


def read_template(path: Path | None = None) -> Template:
    """The template in a file, or our own. Raises: EvaluationError: if it cannot be used."""
    try:
        if path is None:
            text = resources.files("jaxsi.evals").joinpath("weighted_judge.txt").read_text("utf-8")
            return Template(name="weighted_judge", text=text)
        return Template(name=path.stem, text=path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: this template cannot be read: {error}") from error


def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether the model's output stands before the baseline's: the coin of the official package, by its seed 0."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True])[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """The outputs of the baseline and of a model for one instruction."""

    baseline: Output
    model: Output


def matched(outputs: Sequence[Output], there: str, baseline: Sequence[Output], here: str) -> list[Match]:
    """The two outputs of each instruction, in the order of the baseline; ``there`` and ``here`` name their files.

    Raises: EvaluationError: if an instruction occurs twice, or is on one side only, or if a side is of several models.
    """
    for side, name in ((outputs, there), (baseline, here)):
        if len(generators := sorted({output.generator for output in side})) > 1:
            raise EvaluationError(
                f"{name} has outputs of more than one generator: {', '.join(generators[:4])}; give one model at a time"
            )
    by_model = unique(((output.instruction, output) for output in outputs), there)
    by_baseline = unique(((output.instruction, output) for output in baseline), here)
    check_aligned(by_model, there, by_baseline, here)
    return [Match(baseline=row, model=by_model[key]) for key, row in by_baseline.items()]


def requests_of(matches: Sequence[Match], template: Template, seed: int = 0) -> list[Prompt]:
    """What the weighted judge is asked; a request's id is its instruction. Equal outputs are a tie without a request,
    as in the official package."""
    requests = []
    for match in matches:
        if match.baseline.output == match.model.output:
            continue
        sides = [match.baseline.output, match.model.output]
        if is_switched(match.model.instruction, seed):
            sides.reverse()
        messages = template.render(match.model.instruction, *sides)
        requests.append(Prompt(id=match.model.instruction, messages=messages))
    return requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedJudge:
    """The official way: one token, m or M, weighted by its probability."""

    cache: AnswerCache
    writer: Writer
    template: Template
    config: JudgeConfig

    def preferences(self, matches: Sequence[Match], seed: int = 0) -> Answered:
        """From 1 (the baseline's output is better) to 2 (the model's), by instruction."""
        requests = requests_of(matches, self.template, seed)
        answered = ask_choices(
            self.cache, self.writer, requests, CHOICES, self.config, template=self.template.text, seed=seed
        )
        ties = {m.model.instruction: 1.5 for m in matches if m.baseline.output == m.model.output}
        values = {
            instruction: 1 + (first if is_switched(instruction, seed) else 1 - first)
            for instruction, (first, _) in answered.values.items()
        }
        return dataclasses.replace(answered, values=ties | values)

    def plan(self, matches: Sequence[Match], seeds: int) -> Plan:
        """What ``preferences`` by that many seeds would ask."""

        def by_seed(seed: int) -> Plan:
            requests = requests_of(matches, self.template, seed)
            asker = choice_asker(self.writer, CHOICES, self.template.text, seed)
            return plan_left(
                self.cache, requests, questions_of(requests), asker, lambda left: estimate(self.writer, left, 1)
            )

        return sum(map(by_seed, range(seeds)), Plan())

    def counts(self) -> dict[str, Any]:
        """What was asked so far, as `AnswerCache.counts`."""
        return self.cache.counts()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparingJudge:
    """`WeightedJudge` by any judge, which compares the two outputs or scores each of them: 2 if the model's is better,
    1.5 if both are equal; a pairwise rubric gives what lies between, from both orders."""

    judge: SideBySide

    def preferences(self, matches: Sequence[Match], seed: int = 0) -> Answered:
        """From 1 to 2, by instruction."""
        answered = self.judge.ask(_rows(matches), seed)
        return dataclasses.replace(answered, values={id: 1 + value for id, value in answered.values.items()})

    def plan(self, matches: Sequence[Match], seeds: int) -> Plan:
        """What ``preferences`` by that many seeds would ask."""
        return self.judge.plan(_rows(matches), seeds)

    def counts(self) -> dict[str, Any]:
        """What was asked so far, as `AnswerCache.counts`."""
        return self.judge.cache.counts()


def _rows(matches: Sequence[Match]) -> dict[str, Row]:
    return {
        match.model.instruction: Row(Prompt.of("", match.model.instruction), match.model.output, match.baseline.output)
        for match in matches
    }


def annotations_of(matches: Sequence[Match], answered: Answered, annotator: str) -> list[Annotation]:
    """The judge's preferences in the official format; None for a row without an answer."""
    return [
        Annotation(
            instruction=match.model.instruction,
            output_1=match.baseline.output,
            output_2=match.model.output,
            preference=answered.values.get(match.model.instruction),
            generator_1=match.baseline.generator,
            generator_2=match.model.generator,
            annotator=annotator,
            dataset=match.baseline.dataset,
        )
        for match in matches
    ]


def annotations_json(annotations: Sequence[Annotation]) -> bytes:
    """Annotations as a file that the official package reads, too."""
    rows = [dataclasses.asdict(annotation) for annotation in annotations]
    return (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def is_official(judge: WeightedJudge) -> bool:
    """Whether it is the judge that the length-controlled win rate is calibrated for: its model and its template."""
    writer = judge.writer
    return isinstance(writer, EndpointJudge) and writer.model == OFFICIAL_MODEL and judge.template.is_official
