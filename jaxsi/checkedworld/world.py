"""The tasks of this world: a request of everyday life, and one to three constraints on the response.

Training and held-out tasks share no request, and no combination of two or three kinds of constraints. None is a prompt
of IFEval. The exact grade of a response is the share of its constraints that it meets.
"""

import functools
import hashlib
import itertools
import random
from typing import Literal, NamedTuple

from jaxsi.checkedworld.constraints import KINDS, Arguments, fit
from jaxsi.checkedworld.requests import HELD_OUT, TRAINING
from jaxsi.evals.ifeval import Instructed, check
from jaxsi.runs.records import Message, Prompt

Split = Literal["training", "held_out"]
EACH = {"training": 6, "held_out": 5}  # tasks of a request
HELD_OUT_SHARE = 4  # one in so many combinations of kinds is held out


class Task(NamedTuple):
    """A request and its constraints: (kind, arguments), in the order in which a text is mended."""

    id: str
    request: str
    constraints: tuple[tuple[str, Arguments], ...]

    @property
    def text(self) -> str:
        """The prompt."""
        return " ".join([self.request, *(KINDS[kind].say(a) for kind, a in self.constraints)])

    @property
    def instructed(self) -> Instructed:
        """The task in the form of IFEval's prompts."""
        return Instructed(
            id=self.id,
            prompt=self.text,
            instructions=tuple(KINDS[kind].checker for kind, _ in self.constraints),
            arguments=tuple(a for _, a in self.constraints),
        )


@functools.cache
def combinations(split: Split) -> tuple[tuple[str, ...], ...]:
    """The combinations of kinds in the tasks of a split. A single kind is trained on; held out are two or three."""

    def held_out(kinds: tuple[str, ...]) -> bool:
        digest = hashlib.sha256(" + ".join(kinds).encode()).digest()
        return len(kinds) > 1 and int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0

    possible = [kinds for size in (1, 2, 3) for kinds in itertools.combinations(KINDS, size) if fit(kinds)]
    return tuple(kinds for kinds in possible if held_out(kinds) == (split == "held_out"))


@functools.cache
def tasks(split: Split) -> tuple[Task, ...]:
    """All tasks of a split, the same on every machine: each request in turn, then again with other constraints."""
    requests = TRAINING if split == "training" else HELD_OUT
    found: dict[str, Task] = {}
    for number in range(EACH[split]):
        for place, request in enumerate(requests):
            rng = random.Random(f"jaxsi/checkedworld/{split}/{number}/{place}")
            while (task := _drawn(rng, split, f"{split}-{number}-{place}", request)).text in found:
                pass  # the request has had these constraints
            found[task.text] = task
    return tuple(found.values())


def _drawn(rng: random.Random, split: Split, id: str, request: str) -> Task:
    size = rng.choice(sorted({len(kinds) for kinds in combinations(split)}))
    kinds = rng.choice([kinds for kinds in combinations(split) if len(kinds) == size])
    return Task(id, request, tuple((kind, KINDS[kind].draw(rng, request)) for kind in kinds))


@functools.cache
def _by_text() -> dict[str, Task]:
    return {task.text: task for split in ("training", "held_out") for task in tasks(split)}


def task_of(prompt: Prompt) -> Task:
    """The task of a prompt. Raises: KeyError: if it is not of this world."""
    return _by_text()[prompt.text]


def prompts(split: Split) -> list[Prompt]:
    """The tasks of a split as prompts."""
    return [Prompt(id=task.id, messages=(Message(role="user", content=task.text),)) for task in tasks(split)]


def met(task: Task, response: str) -> tuple[bool, ...]:
    """Which constraints of a task a response meets, by IFEval's strict rule."""
    return check(task.instructed, response).strict


def grade(task: Task, response: str) -> float:
    """The share of the constraints that a response meets."""
    return sum(met(task, response)) / len(task.constraints)


def mended(task: Task, response: str) -> str:
    """The response, changed by rule until it meets its constraints, as far as a program can."""
    text = response.strip()
    for _ in range(len(task.constraints)):  # what mends one constraint can break another, which is then mended in turn
        found = met(task, text)
        if all(found):
            break
        for (kind, arguments), is_met in zip(task.constraints, found, strict=True):
            text = text if is_met else KINDS[kind].mend(text, arguments)
    return text
