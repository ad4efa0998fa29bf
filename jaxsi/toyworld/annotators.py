"""Annotators of the embedded world: demonstrations of mixed quality for SFT, and rankings with human-like slips.

Each mistake is a mode: one decision with one definite alternative. A model taught on a mixture of modes samples good
and bad responses to the same instruction, even at top-p 0.9, which would cut off noise that is spread over many tokens.
"""

import random
from collections import Counter
from collections.abc import Callable

from jaxsi.runs.records import RankedResponses, SFTExample
from jaxsi.toyworld.world import Items, Task, draw_tasks, grade_task, prompt_of

MODE_WEIGHTS: dict[str, float] = {
    "careful": 0.28,  # exact
    "copies": 0.22,  # the items as they stand
    "misreads": 0.20,  # another operation
    "hurried": 0.12,  # the last item is missing
    "chatty": 0.12,  # exact after some talk
    "unfinished": 0.06,  # exact without the period
}
MODES: Items = tuple(MODE_WEIGHTS)
CHATTER = "Sure thing: "
SLIP = 0.08  # probability that a ranking exchanges two neighbours
MAX_RANKED = 5  # every task has at least five different responses among the modes


def _without_all_repeated(task: Task) -> Items:
    counts = Counter(task.items)
    return tuple(item for item in task.items if counts[item] == 1)


def _subtracted(task: Task) -> Items:
    addend = int(task.argument[0])
    less = [int(item) - addend for item in task.items]
    if min(less) >= 0:
        return tuple(map(str, less))
    return tuple(str(int(item) + addend + 1) for item in task.items)


_MISREAD: dict[str, Callable[[Task], Items]] = {
    "reverse": lambda task: (task.items[-1], *task.items[1:-1], task.items[0]),
    "sort": lambda task: task.answer[::-1],
    "filter": lambda task: tuple(item for item in task.items if item not in task.answer),
    "count": lambda task: (str(int(task.answer[0]) + 1),),
    "add": _subtracted,
    "replace": lambda task: tuple(item for item in task.items if item != task.argument[0]),
    "unique": _without_all_repeated,
    "swap": lambda task: task.items[::-1],
}


def _copied(task: Task) -> Items:
    return (str(len(task.items)),) if task.family == "count" else task.items


def _hurried(task: Task) -> Items:
    answer = task.answer
    if task.family == "count":
        return (str(max(0, int(answer[0]) - 1)),)
    return answer[:-1] if len(answer) > 1 else answer * 2


_ITEMS_OF_MODE: dict[str, Callable[[Task], Items]] = {
    "copies": _copied,
    "misreads": lambda task: _MISREAD[task.family](task),
    "hurried": _hurried,
    "careful": lambda task: task.answer,
    "chatty": lambda task: task.answer,
    "unfinished": lambda task: task.answer,
}


def mode_items(task: Task, mode: str) -> Items:
    """The items an annotator of `mode` writes for `task`; if its mistake has no effect, they are the right ones."""
    return _ITEMS_OF_MODE[mode](task)


def write(items: Items, mode: str) -> str:
    """`items` as a response in the form of `mode`: with talk before them, without the period, or well formed."""
    return (CHATTER if mode == "chatty" else "") + " ".join(items) + ("" if mode == "unfinished" else ".")


def respond(task: Task, mode: str) -> str:
    """The response of an annotator of `mode`."""
    return write(mode_items(task, mode), mode)


def draw_mode(rng: random.Random) -> str:
    """One of `MODES` by its weight."""
    return rng.choices(MODES, weights=tuple(MODE_WEIGHTS.values()))[0]


def demonstrate(task: Task, rng: random.Random) -> tuple[str, str]:
    """A demonstration of mixed quality: (response text, mode)."""
    mode = draw_mode(rng)
    return respond(task, mode), mode


def ift(n: int, seed: int) -> list[SFTExample]:
    """`n` demonstrations of different training instructions: the instruction data of M1."""
    rng = random.Random(f"jaxsi/toyworld/ift/{seed}")
    examples = []
    for task in draw_tasks(n, rng, held_out=False):
        prompt = prompt_of(task)
        examples.append(SFTExample(id=prompt.id, messages=prompt.messages, response=demonstrate(task, rng)[0]))
    return examples


def careful(n: int, seed: int) -> list[SFTExample]:
    """`n` demonstrations of the careful annotator alone: the correct responses to different training instructions."""
    tasks = draw_tasks(n, random.Random(f"jaxsi/toyworld/careful/{seed}"), held_out=False)
    prompts = [(task, prompt_of(task)) for task in tasks]
    return [SFTExample(id=p.id, messages=p.messages, response=respond(task, "careful")) for task, p in prompts]


def rankings(
    n: int, seed: int, per_prompt: int = 4, *, held_out: bool = False, slip: float = SLIP
) -> list[RankedResponses]:
    """`n` instructions of one split, each with `per_prompt` different responses and human-like ranks (0 = best).

    The ranks follow the exact grade, with equal grades in random order. Then, from best to worst, each one changes
    places with its neighbour with probability `slip`. Raises: ValueError: if `per_prompt` is not 2 to 5.
    """
    if not 2 <= per_prompt <= MAX_RANKED:
        raise ValueError(
            f"per_prompt={per_prompt}: a task has 2 to {MAX_RANKED} different responses; choose one of these"
        )
    rng = random.Random(f"jaxsi/toyworld/rankings/{seed}")
    return [_ranking(task, rng, per_prompt, slip) for task in draw_tasks(n, rng, held_out=held_out)]


def _ranking(task: Task, rng: random.Random, per_prompt: int, slip: float) -> RankedResponses:
    texts: list[str] = []
    while len(texts) < per_prompt:
        text, _ = demonstrate(task, rng)
        if text not in texts:
            texts.append(text)
    jitter = [rng.random() for _ in texts]
    best_first = sorted(range(per_prompt), key=lambda i: (-grade_task(task, texts[i]).total, jitter[i]))
    for place in range(per_prompt - 1):
        if rng.random() < slip:
            best_first[place], best_first[place + 1] = best_first[place + 1], best_first[place]
    prompt = prompt_of(task)
    ranks = tuple(best_first.index(i) for i in range(per_prompt))
    return RankedResponses(id=prompt.id, messages=prompt.messages, responses=tuple(texts), ranks=ranks)
