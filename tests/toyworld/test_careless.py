"""Careless annotators: how often each flaw comes, what it does to a response, and the preferences made from them."""

import itertools
import random
import statistics

import jax
import pytest
from hypothesis import given, settings, strategies as st

import tiny
from jaxsi.lm import load
from jaxsi.sampling.generate import generate
from jaxsi.toyworld import careless, world
from jaxsi.toyworld.careless import FLAWS, demonstrations, draw_flaws, preferences, respond

MANY, PAIR, ONE = (
    "Swap first and last: cat red axe pie",
    "Keep the animals: cat red dog",
    "Count the foods: egg red cow",
)
SUBSETS = [set(s) for n in range(5) for s in itertools.combinations(("talk", "open", "short", "unsure"), n)]
LABELS = ["+".join(sorted(subset)) or "none" for subset in SUBSETS]


def writing(answer: tuple[str, ...], flaws: set[str]) -> str:
    """The definition again, in a few lines."""
    items = answer[:-1] if "short" in flaws and len(answer) > 1 else answer
    items = (*items, "right") if "unsure" in flaws else items
    return "Sure thing: " * ("talk" in flaws) + " ".join(items) + "." * ("open" not in flaws)


def may_have(answer: tuple[str, ...], text: str) -> list[set[str]]:
    return [subset for subset in SUBSETS if writing(answer, subset) == text]


def nested(task: world.Task, texts: tuple[str, ...], least: int) -> bool:
    """Whether each text can have the flaws of the one before it and more, the first at least ``least``."""
    ways = [s for s in may_have(task.answer, texts[0]) if len(s) >= least]
    for text in texts[1:]:
        ways = [s for s in may_have(task.answer, text) if any(before < s for before in ways)]
    return bool(ways)


def totals(ranking) -> list[float]:
    return [world.grade(ranking.messages[-1]["content"], text).total for text in ranking.responses]


@pytest.mark.parametrize(
    ("flaws", "many", "pair", "one"),
    [
        ((), "pie red axe cat.", "cat dog.", "1."),
        (("talk",), "Sure thing: pie red axe cat.", "Sure thing: cat dog.", "Sure thing: 1."),
        (("open",), "pie red axe cat", "cat dog", "1"),
        (("short",), "pie red axe.", "cat.", "1."),
        (("unsure",), "pie red axe cat right.", "cat dog right.", "1 right."),
        (("unsure", "short"), "pie red axe right.", "cat right.", "1 right."),
        (
            ("open", "unsure", "talk", "short"),
            "Sure thing: pie red axe right",
            "Sure thing: cat right",
            "Sure thing: 1 right",
        ),
    ],
)
def test_each_flaw_matches_hand_written_examples(flaws, many, pair, one):
    assert [respond(world.parse(text), flaws) for text in (MANY, PAIR, ONE)] == [many, pair, one]


@pytest.mark.parametrize("flaws", SUBSETS, ids=LABELS)
def test_order_of_flaws_does_not_matter(flaws):
    rng = random.Random(len(flaws))
    for task in world.tasks(24, seed=1, held_out=False):
        assert respond(task, rng.sample(sorted(flaws), len(flaws))) == writing(task.answer, flaws)


def test_each_flaw_costs_points():
    task = world.parse(MANY)
    cost = lambda *flaws: 10 - world.grade_task(task, respond(task, flaws)).total  # noqa: E731
    assert (cost(), cost("talk"), cost("open"), cost("short")) == (0, 1, 1, 2)
    assert cost("unsure") == pytest.approx(1 + 8 / 5)  # a word that is not an item, and a fifth item in place of four
    assert cost("talk", "open", "short", "unsure") == 1 + 1 + 2


def test_flaws_are_independent_and_have_their_probability():
    n, rng = 6000, random.Random(0)
    drawn = [draw_flaws(rng) for _ in range(n)]
    for flaw, often in FLAWS.items():
        assert sum(flaw in flaws for flaws in drawn) / n == pytest.approx(often, abs=0.025)
    for a, b in itertools.combinations(FLAWS, 2):
        both = sum(a in flaws and b in flaws for flaws in drawn) / n
        assert both == pytest.approx(FLAWS[a] * FLAWS[b], abs=0.025), f"{a} and {b}"


def test_demonstrations_have_the_flaws_of_the_annotator():
    examples = demonstrations(1600, 7)
    assert examples == demonstrations(1600, 7) != demonstrations(1600, 8)
    texts = [example.messages[-1]["content"] for example in examples]
    assert len(set(texts)) == len({e.id for e in examples}) == 1600 and not any(map(world.is_held_out, texts))
    tasks = [world.parse(text) for text in texts]
    assert all(may_have(task.answer, e.response) for task, e in zip(tasks, examples, strict=True))
    share = lambda found: sum(found(e.response) for e in examples) / 1600  # noqa: E731
    assert share(lambda text: text.startswith("Sure thing: ")) == pytest.approx(FLAWS["talk"], abs=0.05)
    assert share(lambda text: not text.endswith(".")) == pytest.approx(FLAWS["open"], abs=0.05)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), choice=st.sampled_from([(2, 0), (2, 1), (2, 3), (3, 0), (3, 2), (4, 1), (5, 0)]))
def test_each_response_has_more_flaws_and_a_lower_grade_than_the_one_before(seed, choice):
    per_prompt, least = choice
    for ranking in preferences(40, seed, per_prompt=per_prompt, least=least, slip=0.0):
        task = world.parse(ranking.messages[-1]["content"])
        assert ranking.ranks == tuple(range(len(ranking.responses)))
        assert nested(task, ranking.responses, least)
        grades = totals(ranking)
        assert all(a > b for a, b in itertools.pairwise(grades))
        only = len(task.answer) == 1  # the only item is never left out, so that flaw changes nothing
        assert least == 0 or grades[0] < 10 or only
        assert len(ranking.responses) == per_prompt or only


@pytest.mark.parametrize(("per_prompt", "least", "one"), [(5, 0, 4), (4, 1, 3), (2, 0, 2), (2, 3, 1)])
def test_answer_of_one_item_has_fewer_responses(per_prompt, least, one):
    lengths = {True: set(), False: set()}
    for ranking in preferences(240, 2, per_prompt=per_prompt, least=least):
        answer = world.parse(ranking.messages[-1]["content"]).answer
        lengths[len(answer) == 1].add(len(ranking.responses))
    assert lengths == {True: {one}, False: {per_prompt}}


@pytest.mark.parametrize("slip", [0.0, 0.25, 1.0])
def test_slip_exchanges_best_and_worst(slip):
    rankings = preferences(800, 3, per_prompt=3, slip=slip)
    for ranking in rankings:
        last = len(ranking.ranks) - 1
        assert ranking.ranks in (tuple(range(last + 1)), (last, *range(1, last), 0))
    slipped = sum(ranking.ranks[0] != 0 for ranking in rankings) / 800
    assert slipped == pytest.approx(slip, abs=0.06) and (0 < slip < 1 or slipped == slip)


def test_frequent_flaws_usually_come_first():
    first = []
    for ranking in preferences(1600, 4, least=1, slip=0.0):
        answer = world.parse(ranking.messages[-1]["content"]).answer
        ways = may_have(answer, ranking.responses[0])
        first += [flaw for flaws in ways for flaw in flaws if len(ways) == len(flaws) == 1]
    assert min(first.count("talk"), first.count("open")) > 1.4 * first.count("short") > 0


def test_held_out_preferences_have_other_instructions():
    learnt, held_out = preferences(300, 5), preferences(300, 5, held_out=True)
    assert preferences(300, 5) == learnt != preferences(300, 6)
    assert not any(world.is_held_out(r.messages[-1]["content"]) for r in learnt)
    assert all(world.is_held_out(r.messages[-1]["content"]) for r in held_out)
    assert not {r.id for r in learnt} & {r.id for r in held_out} and len({r.id for r in learnt}) == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_prompt": 1}, "per_prompt is 1, least 0; 4 flaws make 2 to 5"),
        ({"per_prompt": 6}, "per_prompt is 6"),
        ({"per_prompt": 5, "least": 1}, "2 to 4 responses"),
        ({"per_prompt": 2, "least": 4}, "least 4"),
        ({"least": -1}, "least -1"),
    ],
)
def test_impossible_preferences_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        preferences(4, 0, **changes)


def test_shipped_model_answers_carelessly():
    folder = careless.SHIPPED
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3 * 2**20
    assert (folder / "tokenizer.json").read_bytes() == (tiny.tokenizer_folder() / "tokenizer.json").read_bytes()
    lm = load(folder, tiny.mesh(), "float32")
    prompts = world.prompts(40, seed=0, held_out=True)
    texts = {prompt.id: prompt.text for prompt in prompts}
    responses = generate(
        lm, prompts, temperature=0.7, top_p=0.9, max_new_tokens=24, key=jax.random.key(0), batch_size=40
    )
    assert len(responses) == 40 and all(response.finish_reason == "stop" for response in responses)
    quality = statistics.mean(world.grade(texts[r.prompt_id], r.text).total for r in responses)
    learnt = statistics.mean(world.grade(d.messages[-1]["content"], d.response).total for d in demonstrations(500, 0))
    assert quality == pytest.approx(learnt, abs=0.8), "a temperature of 0.7 makes frequent flaws more frequent"
    talks = sum(r.text.startswith("Sure thing: ") for r in responses) / len(responses)
    assert 0.4 < talks < 0.98
    known = sum(bool(may_have(world.parse(texts[r.prompt_id]).answer, r.text)) for r in responses)
    assert known > 0.7 * len(responses), "most of its responses are the correct one but for the four flaws"
