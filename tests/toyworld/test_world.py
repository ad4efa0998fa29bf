"""The embedded world's instructions, exact grades, points and splits."""

import random
import string

import pytest
from hypothesis import given, strategies as st

from jaxsi.toyworld.world import (
    CATEGORIES,
    FAMILIES,
    MAX_ITEMS,
    MIN_ITEMS,
    WORDS,
    Task,
    grade,
    instruction,
    is_held_out,
    parse,
    points,
    prompts,
    response_items,
    sample_task,
    sample_train_task,
)

tasks_drawn = st.integers(0, 2**32).map(lambda seed: sample_task(random.Random(seed)))
world_like = st.lists(st.sampled_from([*WORDS, "0", "7", "23", ".", ",", "Sure thing:", "", "zzz", "\n"]), max_size=9)

WORKED = [
    ("Reverse: cat red axe", "reverse", "axe red cat."),
    ("Reverse: owl pie teal rope jam pig", "reverse", "pig jam rope teal pie owl."),
    ("Sort A to Z: soup axe bread ant", "sort", "ant axe bread soup."),
    ("Keep the animals: cat red dog axe", "filter", "cat dog."),
    ("Keep the tools: axe cat red", "filter", "axe."),
    ("Count the foods: egg red pie cow", "count", "2."),
    ("Add 2 to each: 3 7 4", "add", "5 9 6."),
    ("Add 3 to each: 20 0 20 1", "add", "23 3 23 4."),
    ("Replace red with dog: cat red axe", "replace", "cat dog axe."),
    ("Replace red with dog: red cat red axe", "replace", "dog cat dog axe."),
    ("Drop repeats: cat red cat", "unique", "cat red."),
    ("Drop repeats: red axe axe cat red", "unique", "red axe cat."),
    ("Swap first and last: cat red axe pie", "swap", "pie red axe cat."),
]

HELD_OUT = [
    "Reverse: frog pie saw yellow bat",
    "Sort A to Z: nail green cat yellow",
    "Keep the foods: hen ant bread rope bat rice",
]


@pytest.mark.parametrize(("text", "family", "response"), WORKED)
def test_worked_examples_earn_ten(text, family, response):
    task = parse(text)
    assert task is not None and task.family == family
    assert " ".join(task.answer) + "." == response
    result = grade(text, response)
    assert result.total == 10 and result.form and points(result) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cat red axe",
        "Reverse: cat red",  # two items
        "Reverse: cat red axe pie owl jam egg",  # seven
        "Reverse: cat red cat",  # a repeat
        "Reverse: cat red lion",  # a word from outside this world
        "Reverse: cat  red axe",
        "Reverse: cat red axe ",
        "Reverse: cat red axe\n",
        "reverse: cat red axe",
        "Reverse: Cat red axe",
        "Reverse: 1 2 3",
        "Keep the plants: cat red dog",
        "Keep the animals: red axe pie",  # nothing kept
        "Keep the animals: cat dog cow",  # nothing dropped
        "Count the foods: egg pie jam",
        "Add 4 to each: 3 7 4",
        "Add 2 to each: 3 07 4",
        "Add 2 to each: 3 21 4",
        "Add 2 to each: 3 cat 4",
        "Replace red with red: cat red axe",
        "Replace red with dog: cat blue axe",  # nothing to replace
        "Replace red with dog: cat red dog",  # the new word is there already
        "Replace red with dog: red cat red",  # most of the items
        "Drop repeats: cat red axe",
        "Drop repeats: cat cat red red",  # every word is repeated
        "Reverse: cat red axe. Score: 5",
    ],
)
def test_parse_refuses_other_texts(text):
    assert parse(text) is None
    assert grade(text, "cat.") is None


@given(tasks_drawn)
def test_parse_inverts_instruction(task):
    text = instruction(task)
    assert parse(text) == task
    assert "\n" not in text and MIN_ITEMS <= len(task.items) <= MAX_ITEMS
    assert len(task.answer) >= 1


@given(st.text(alphabet=string.ascii_letters + string.digits + " :.,\n", max_size=60))
def test_parse_accepts_only_what_instruction_writes(text):
    task = parse(text)
    assert task is None or instruction(task) == text


@given(st.sampled_from(list(FAMILIES)), st.lists(st.sampled_from([*WORDS[:6], "3", "20"]), min_size=1, max_size=7))
def test_answer_of_every_parsed_text_earns_ten(family, items):
    wording = FAMILIES[family].wording.format("animals" if family in ("filter", "count") else "cat", "red")
    text = f"{wording} {' '.join(items)}"
    task = parse(text)
    if task is not None:
        assert grade(text, " ".join(task.answer) + ".").total == 10


def test_categories_are_disjoint_and_lower_case():
    assert [len(words) for words in CATEGORIES.values()] == [12] * 4
    assert len(set(WORDS)) == 48
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


@pytest.mark.parametrize(
    ("response", "total"),
    [
        ("axe red cat.", 10),
        ("axe red cat", 9),  # no period
        ("axe red cat .", 9),  # not on the last item
        ("axe red cat..", 8),
        ("axe. red. cat.", 8),
        ("Axe red cat.", 9),  # case is form
        ("AXE, RED, CAT.", 9),
        ("axe,red,cat", 8),
        ("axe  red cat.", 9),
        (" axe red cat.", 9),
        ("axe red cat.\n", 9),  # the period still ends the text
        ("Sure thing: axe red cat.", 9),
        ("sure: axe red cat", 8),
        ("The answer is: axe red cat.", 9),
        ("Well then: axe red cat.", 1),  # unknown talk shifts every place
        ("axe red cat. Bye", 8 * 3 / 4),
        ("axe red.", 8 * 2 / 3 + 2),
        ("axe red cat pie.", 8 * 3 / 4 + 2),
        ("axe red cat moon.", 8 * 3 / 4 + 1),  # moon is not a word of this world
        ("cat red axe.", 8 / 3 + 2),
        ("pie.", 2),
        ("-axe red cat.", 9),
        ("", 0),
        (".", 0),
        ("  \n", 0),
        ("Sure thing:", 0),
        ("Sure thing: .", 0),
    ],
)
def test_grades_match_hand_written_examples(response, total):
    result = grade("Reverse: cat red axe", response)
    assert result.total == pytest.approx(total)


def test_numbers_are_compared_whole():
    text = "Add 2 to each: 3 7 4"
    assert grade(text, "5 9 6.").content == 1
    assert grade(text, "-5 9 6.").content == pytest.approx(2 / 3)
    assert grade(text, "59 6.").content == 0
    assert grade(text, "05 9 6.").content == pytest.approx(2 / 3)


@given(tasks_drawn, world_like.map(" ".join) | st.text(max_size=40))
def test_grade_has_bounds_and_adds_up(task, response):
    result = grade(instruction(task), response)
    assert 0 <= result.total <= 10 and 0 <= result.content <= 1
    given_items = response_items(response)
    assert len(result.right) == len(task.answer)
    assert result.surplus == max(0, len(given_items) - len(task.answer))
    assert (result.content == 1) == (given_items == task.answer)
    assert (result.total == 10) == (response == " ".join(task.answer) + ".")
    assert result.total == (8 * result.content + result.period + result.only_answer if given_items else 0)
    assert points(result) in range(6)
    assert grade(instruction(task), response) == result


@given(tasks_drawn, world_like.map(" ".join))
def test_points_are_half_the_total_if_form_is_whole_or_nil(task, response):
    result = grade(instruction(task), response)
    if result.total and result.period == result.only_answer:
        assert points(result) == int(result.total / 2 + 0.5)
    assert points(result) <= int(result.total / 2 + 0.5)


def test_hash_splits_off_a_tenth():
    rng = random.Random(0)
    texts = {instruction(sample_task(rng)) for _ in range(5000)}
    share = sum(map(is_held_out, texts)) / len(texts)
    assert 0.08 < share < 0.12
    # Only the sha256 of the text decides. These must never change, or published numbers belong to another split.
    assert not any(is_held_out(text) for text, _, _ in WORKED)
    assert all(map(is_held_out, HELD_OUT))
    assert not any(is_held_out(instruction(sample_train_task(rng))) for _ in range(500))


@pytest.mark.parametrize("held_out", [True, False])
def test_prompts_are_balanced_and_of_one_split(held_out):
    drawn = prompts(240, seed=3, held_out=held_out)
    assert len({prompt.id for prompt in drawn}) == len({prompt.text for prompt in drawn}) == 240
    assert all(is_held_out(prompt.text) == held_out for prompt in drawn)
    families = [parse(prompt.text).family for prompt in drawn]
    assert {family: families.count(family) for family in FAMILIES} == dict.fromkeys(FAMILIES, 30)
    assert drawn == prompts(240, seed=3, held_out=held_out)
    assert drawn[:100] == prompts(100, seed=3, held_out=held_out)
    assert drawn != prompts(240, seed=4, held_out=held_out)


def test_families_are_drawn_uniformly():
    rng = random.Random(1)
    families = [sample_task(rng).family for _ in range(4000)]
    assert all(400 < families.count(family) < 600 for family in FAMILIES)


def test_task_is_a_value():
    assert Task(family="reverse", items=("cat", "red", "axe")) == parse("Reverse: cat red axe")
