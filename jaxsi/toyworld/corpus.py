"""What the seed model is trained on: demonstrations, worked verdicts and new instructions, and nothing held out."""

import random
from collections.abc import Iterator
from importlib import resources

from jaxsi.runs.records import Message
from jaxsi.stages.prompts import Rubric
from jaxsi.stages.prompts.few_shot import FewShot
from jaxsi.toyworld.annotators import draw_mode, mode_items, respond, write
from jaxsi.toyworld.world import MAX_ITEMS, WORDS, Items, Task, grade_task, instruction, points, sample_train_task

RUBRIC = Rubric(
    name="toy",
    template=resources.files("jaxsi.toyworld").joinpath("judge.txt").read_text(encoding="utf-8").removesuffix("\n"),
    marker="Score:",
    low=0,
    high=5,
)

# Tasks of the world are single lines, so a list needs no mark at the end of each.
NEW_INSTRUCTION = FewShot(
    name="toy", template="Write one new task in the style of these:{examples}", opening="\n- ", closing=""
)

DEMONSTRATIONS, VERDICTS = 0.45, 0.50  # shares of the documents; the others are new instructions after eight examples
FEW_SHOT = 8
STRANGE = 0.05  # share of judged responses that answer another task
PERTURBED = 0.25  # share of judged responses with one item changed

Document = tuple[tuple[Message, ...], str]


def justification(task: Task, response: str) -> str:
    """The verdict a careful judge writes: `sun right red wrong cat right form good Score: 4`.

    Each item of the expected answer with right or wrong by its place, then "extra" for each item beyond the expected
    number (at most six times), then the form, then the points. The score is a function of what stands before it.
    """
    grade = grade_task(task, response)
    verdicts = [f"{item} {'right' if right else 'wrong'}" for item, right in zip(task.answer, grade.right, strict=True)]
    surplus = ["extra"] * min(grade.surplus, MAX_ITEMS)
    form = f"form {'good' if grade.form else 'bad'}"
    return " ".join([*verdicts, *surplus, form, f"{RUBRIC.marker} {points(grade)}"])


def demonstration_document(rng: random.Random) -> Document:
    """An instruction and an annotator's response."""
    task = sample_train_task(rng)
    return _ask(instruction(task)), respond(task, draw_mode(rng))


def verdict_document(rng: random.Random) -> Document:
    """The toy rubric over a task and a response, and the worked verdict."""
    task = sample_train_task(rng)
    response = judged_response(task, rng)
    return _ask(RUBRIC.render(instruction(task), response)), justification(task, response)


def new_instruction_document(rng: random.Random) -> Document:
    """Eight instructions in the self-instruct template, and one more of any family."""
    examples = [instruction(sample_train_task(rng)) for _ in range(FEW_SHOT)]
    return _ask(NEW_INSTRUCTION.render(examples)), instruction(sample_train_task(rng))


def judged_response(task: Task, rng: random.Random) -> str:
    """A response to be judged: an annotator's, one with an item changed, or the correct answer to another task."""
    choice, mode = rng.random(), draw_mode(rng)
    if choice < STRANGE:
        return respond(sample_train_task(rng), "careful")
    items = mode_items(task, mode)
    return write(_perturb(items, rng) if choice < STRANGE + PERTURBED else items, mode)


def pretraining_documents(n: int, seed: int) -> Iterator[Document]:
    """`n` documents as (messages of the prompt, response text); no held-out instruction occurs in any of them."""
    rng = random.Random(f"jaxsi/toyworld/corpus/{seed}")
    for _ in range(n):
        choice = rng.random()
        if choice < DEMONSTRATIONS:
            yield demonstration_document(rng)
        elif choice < DEMONSTRATIONS + VERDICTS:
            yield verdict_document(rng)
        else:
            yield new_instruction_document(rng)


def _ask(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _perturb(items: Items, rng: random.Random) -> Items:
    """`items` with one item replaced, dropped, doubled or exchanged with another; never empty."""
    changed = list(items)
    place = rng.randrange(len(changed))
    kind = rng.choice(("replace", "double", "drop", "exchange") if len(changed) > 1 else ("replace", "double"))
    if kind == "replace":
        changed[place] = str(rng.randint(0, 23)) if changed[place].isdigit() else rng.choice(WORDS)
    elif kind == "double":
        changed.insert(place, changed[place])
    elif kind == "drop":
        del changed[place]
    else:
        other = (place + rng.randrange(1, len(changed))) % len(changed)
        changed[place], changed[other] = changed[other], changed[place]
    return tuple(changed)
