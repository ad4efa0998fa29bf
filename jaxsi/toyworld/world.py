"""The embedded world: one-line instructions with a known correct response, and the exact grade of any response.

Eight families of small text tasks over 48 words of four categories and the numbers 0 to 20:

    Reverse: cat red axe                 axe red cat.
    Sort A to Z: cat red axe             axe cat red.
    Keep the animals: cat red dog        cat dog.
    Count the foods: egg red pie         2.
    Add 2 to each: 3 7 4                 5 9 6.
    Replace red with dog: cat red axe    cat dog axe.
    Drop repeats: cat red cat            cat red.
    Swap first and last: cat red axe     axe red cat.

A correct, well-formed response is the items of the answer, separated by single spaces, with one period after the last
item and nothing else. Everything here is a pure function of its arguments.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from jaxsi.runs.records import Prompt

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "cow", "pig", "fox", "hen", "owl", "bat", "ant", "bee", "frog", "duck"),
    "foods": ("egg", "pie", "jam", "rice", "bread", "soup", "cake", "milk", "corn", "nut", "plum", "pear"),
    "colours": ("red", "blue", "green", "pink", "gray", "black", "white", "brown", "gold", "purple", "teal", "yellow"),
    "tools": ("saw", "axe", "drill", "hammer", "nail", "rope", "broom", "rake", "spade", "knife", "brush", "chisel"),
}
WORDS: tuple[str, ...] = tuple(word for words in CATEGORIES.values() for word in words)
CATEGORY_OF: dict[str, str] = {word: category for category, words in CATEGORIES.items() for word in words}
MAX_NUMBER = 20  # in an instruction
NUMBERS: tuple[str, ...] = tuple(str(number) for number in range(MAX_NUMBER + 1))
ADDENDS: tuple[str, ...] = ("1", "2", "3")
# Numbers that a response may hold: the largest answer is 20 + 3, and the annotators' wrong ones reach 24.
RESPONSE_NUMBERS: tuple[str, ...] = tuple(str(number) for number in range(MAX_NUMBER + 5))
MIN_ITEMS, MAX_ITEMS = 3, 6
HELD_OUT_SHARE = 10  # one instruction in ten is held out

# Talk that may precede the items. It is removed before the content is graded, and costs a point of form.
TALK = (
    "sure thing",
    "sure",
    "okay",
    "ok",
    "of course",
    "the answer is",
    "answer",
    "here you go",
    "here it is",
    "response",
)

Items = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The parts of an instruction: `Task(family="filter", items=("cat", "red", "dog"), argument=("animals",))`.

    `argument` holds what the instruction names besides the items: nothing, a category, an addend, or (old, new).
    """

    family: str
    items: Items
    argument: Items = ()

    @property
    def answer(self) -> Items:
        """The items of the one correct response, in order."""
        return FAMILIES[self.family].solve(self.items, self.argument)


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The exact grade of a response. `total` = 8 * `content` + `period` + `only_answer`, or 0 without any item.

    `right[i]` tells whether item i of the expected answer is item i of the response. `surplus` counts the items of the
    response beyond the expected number. `content` = sum(right) / max(number expected, number written).
    """

    total: float
    content: float
    period: bool
    only_answer: bool
    right: tuple[bool, ...]
    surplus: int

    @property
    def form(self) -> bool:
        """Whether both points of form are earned."""
        return self.period and self.only_answer


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of instruction: its wording, its solution, how it is drawn, and which tasks are valid."""

    wording: str  # {0}, {1}: the argument
    solve: Callable[[Items, Items], Items]
    draw: Callable[[random.Random], tuple[Items, Items]]
    is_valid: Callable[[Items, Items], bool]


def _sort(items: Items, argument: Items) -> Items:
    return tuple(sorted(items))


def _reverse(items: Items, argument: Items) -> Items:
    return items[::-1]


def _keep(items: Items, argument: Items) -> Items:
    return tuple(item for item in items if CATEGORY_OF[item] == argument[0])


def _count(items: Items, argument: Items) -> Items:
    return (str(len(_keep(items, argument))),)


def _add(items: Items, argument: Items) -> Items:
    return tuple(str(int(item) + int(argument[0])) for item in items)


def _replace(items: Items, argument: Items) -> Items:
    old, new = argument
    return tuple(new if item == old else item for item in items)


def _unique(items: Items, argument: Items) -> Items:
    return tuple(dict.fromkeys(items))


def _swap(items: Items, argument: Items) -> Items:
    return (items[-1], *items[1:-1], items[0])


def _draw_length(rng: random.Random) -> int:
    return rng.randint(MIN_ITEMS, MAX_ITEMS)


def _draw_distinct(rng: random.Random) -> tuple[Items, Items]:
    return tuple(rng.sample(WORDS, _draw_length(rng))), ()


def _draw_of_category(rng: random.Random) -> tuple[Items, Items]:
    length = _draw_length(rng)
    category = rng.choice(tuple(CATEGORIES))
    kept = rng.randint(1, length - 1)
    others = tuple(word for word in WORDS if CATEGORY_OF[word] != category)
    items = rng.sample(CATEGORIES[category], kept) + rng.sample(others, length - kept)
    rng.shuffle(items)
    return tuple(items), (category,)


def _draw_numbers(rng: random.Random) -> tuple[Items, Items]:
    return tuple(rng.choice(NUMBERS) for _ in range(_draw_length(rng))), (rng.choice(ADDENDS),)


def _draw_replaced(rng: random.Random) -> tuple[Items, Items]:
    length = _draw_length(rng)
    old, new, *others = rng.sample(WORDS, length + 1)
    times = rng.randint(1, length // 2)
    items = [old] * times + others[: length - times]
    rng.shuffle(items)
    return tuple(items), (old, new)


def _draw_repeated(rng: random.Random) -> tuple[Items, Items]:
    length = _draw_length(rng)
    words = rng.sample(WORDS, rng.randint(2, length - 1))
    # The first word is never repeated, so that dropping every occurrence of repeated words leaves something.
    items = words + [rng.choice(words[1:]) for _ in range(length - len(words))]
    rng.shuffle(items)
    return tuple(items), ()


def _all_words(items: Items) -> bool:
    return all(item in CATEGORY_OF for item in items)


def _valid_distinct(items: Items, argument: Items) -> bool:
    return _all_words(items) and len(set(items)) == len(items)


def _valid_of_category(items: Items, argument: Items) -> bool:
    if not _valid_distinct(items, argument) or argument[0] not in CATEGORIES:
        return False
    return 0 < len(_keep(items, argument)) < len(items)


def _valid_numbers(items: Items, argument: Items) -> bool:
    return all(item in NUMBERS for item in items) and argument[0] in ADDENDS


def _valid_replaced(items: Items, argument: Items) -> bool:
    old, new = argument
    others = [item for item in items if item != old]
    return (
        _all_words((*items, old, new))
        and new != old
        and new not in items
        and len(set(others)) == len(others)
        and 1 <= len(items) - len(others) <= len(items) // 2
    )


def _valid_repeated(items: Items, argument: Items) -> bool:
    counts = [items.count(item) for item in items]
    return _all_words(items) and 1 in counts and max(counts) > 1


FAMILIES: dict[str, Family] = {
    "reverse": Family(wording="Reverse:", solve=_reverse, draw=_draw_distinct, is_valid=_valid_distinct),
    "sort": Family(wording="Sort A to Z:", solve=_sort, draw=_draw_distinct, is_valid=_valid_distinct),
    "filter": Family(wording="Keep the {0}:", solve=_keep, draw=_draw_of_category, is_valid=_valid_of_category),
    "count": Family(wording="Count the {0}:", solve=_count, draw=_draw_of_category, is_valid=_valid_of_category),
    "add": Family(wording="Add {0} to each:", solve=_add, draw=_draw_numbers, is_valid=_valid_numbers),
    "replace": Family(wording="Replace {0} with {1}:", solve=_replace, draw=_draw_replaced, is_valid=_valid_replaced),
    "unique": Family(wording="Drop repeats:", solve=_unique, draw=_draw_repeated, is_valid=_valid_repeated),
    "swap": Family(wording="Swap first and last:", solve=_swap, draw=_draw_distinct, is_valid=_valid_distinct),
}

_ITEM = r"([a-z]+|[0-9]+)"
_PATTERNS: dict[str, re.Pattern[str]] = {
    name: re.compile(
        family.wording.replace("{0}", _ITEM).replace("{1}", _ITEM)
        + rf" ((?:[a-z]+|[0-9]+)(?: (?:[a-z]+|[0-9]+)){{{MIN_ITEMS - 1},{MAX_ITEMS - 1}}})"
    )
    for name, family in FAMILIES.items()
}
_LEXICON: frozenset[str] = frozenset((*WORDS, *RESPONSE_NUMBERS))
_TALK_PREFIX = re.compile(
    rf"\s*(?:{'|'.join(sorted(map(re.escape, TALK), key=len, reverse=True))})\s*[:,!]", re.IGNORECASE
)
_RESPONSE_ITEM = re.compile(r"(?<![^\W_])-\d+|[^\W_]+")


def instruction(task: Task) -> str:
    """The line that asks for `task`; `parse` is its inverse."""
    return f"{FAMILIES[task.family].wording.format(*task.argument)} {' '.join(task.items)}"


def parse(instruction_text: str) -> Task | None:
    """The task that an instruction asks for; None if the text is not exactly one that `sample_task` can draw."""
    for name, pattern in _PATTERNS.items():
        match = pattern.fullmatch(instruction_text)
        if match:
            *argument, items = match.groups()
            task = Task(family=name, items=tuple(items.split(" ")), argument=tuple(argument))
            return task if FAMILIES[name].is_valid(task.items, task.argument) else None
    return None


def sample_task(rng: random.Random) -> Task:
    """Draws a task: the family uniformly, then 3 to 6 items."""
    return _sample_of(rng.choice(tuple(FAMILIES)), rng)


def sample_train_task(rng: random.Random) -> Task:
    """Draws a task whose instruction is not held out."""
    while True:
        task = sample_task(rng)
        if not is_held_out(instruction(task)):
            return task


def _sample_of(family: str, rng: random.Random) -> Task:
    items, argument = FAMILIES[family].draw(rng)
    return Task(family=family, items=items, argument=argument)


def response_items(response_text: str) -> Items:
    """The items of a response as the grader reads them: without talk, in lower case; anything else separates them."""
    content = _TALK_PREFIX.sub("", response_text, count=1) if _TALK_PREFIX.match(response_text) else response_text
    return tuple(_RESPONSE_ITEM.findall(content.casefold()))


def grade(instruction_text: str, response_text: str) -> Grade | None:
    """The exact grade, 0 to 10, of a response; None if `instruction_text` is not an instruction of this world.

    total = 8 * content + period + only_answer, with

    * content: a known talk prefix (`TALK` before ":", "," or "!") is removed. The rest is case-folded and read as runs
      of letters and digits; a sign before a number belongs to it; commas, dashes and white space only separate.
      content = places in which that list equals the expected answer / the longer of the two lengths;
    * period (1 point): the response has exactly one period and ends with it, apart from trailing white space;
    * only_answer (1 point): apart from that period, the response is lower-case words and numbers of the world,
      separated by single spaces, with nothing before, between or after them.

    A response without any item gets 0, whatever its form.
    """
    task = parse(instruction_text)
    return None if task is None else grade_task(task, response_text)


def grade_task(task: Task, response_text: str) -> Grade:
    """`grade` for a parsed instruction."""
    expected, written = task.answer, response_items(response_text)
    right = tuple(i < len(written) and written[i] == item for i, item in enumerate(expected))
    content = sum(right) / max(len(expected), len(written))
    period = response_text.count(".") == 1 and response_text.rstrip().endswith(".")
    only_answer = all(item in _LEXICON for item in response_text.removesuffix(".").split(" "))
    return Grade(
        total=8 * content + period + only_answer if written else 0.0,
        content=content,
        period=period,
        only_answer=only_answer,
        right=right,
        surplus=max(0, len(written) - len(expected)),
    )


def points(grade: Grade) -> int:
    """The additive five-point score of the toy rubric: up to 4 by the share of right items (half up), 1 for form.

    This is `total / 2`, rounded half up, if both points of form are earned or none. One point of form alone earns
    nothing here. So the score is a function of what the verdict says, and "Sure thing: cat." stays behind "cat.".
    """
    return int(4 * grade.content + 0.5) + grade.form


def is_held_out(instruction_text: str) -> bool:
    """Whether an instruction belongs to the held-out tenth; only the hash of its text decides."""
    return int.from_bytes(hashlib.sha256(instruction_text.encode()).digest()) % HELD_OUT_SHARE == 0


def prompt_of(task: Task) -> Prompt:
    """The prompt of a task; its id comes from the instruction's text, so equal instructions have equal ids."""
    text = instruction(task)
    return Prompt.of(f"toy-{task.family}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text)


def evaluation_prompts(n: int) -> list[Prompt]:
    """The held-out instructions of every evaluation: new ones, by which no setting of a config was chosen."""
    return prompts(n, seed=20, held_out=True)


def tasks(n: int, seed: int, held_out: bool) -> list[Task]:
    """`n` tasks with different instructions, all held out or all for training, the families in turn."""
    return draw_tasks(n, random.Random(f"jaxsi/toyworld/prompts/{seed}/{held_out}"), held_out)


def draw_tasks(n: int, rng: random.Random, held_out: bool) -> list[Task]:
    """`n` different tasks of one split from `rng`, the families in turn."""
    names = tuple(FAMILIES)
    drawn: dict[str, Task] = {}
    while len(drawn) < n:
        task = _sample_of(names[len(drawn) % len(names)], rng)
        text = instruction(task)
        if is_held_out(text) == held_out:
            drawn.setdefault(text, task)
    return list(drawn.values())


def prompts(n: int, seed: int, held_out: bool) -> list[Prompt]:
    """`n` different prompts of one split, balanced over the families; equal arguments give equal prompts."""
    return [prompt_of(task) for task in tasks(n, seed, held_out)]
