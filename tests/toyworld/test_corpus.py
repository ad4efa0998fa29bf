"""The seed model's documents: worked verdicts, and nothing held out."""

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from jaxsi.stages.prompts import parse_score
from jaxsi.toyworld.annotators import MODES, respond
from jaxsi.toyworld.corpus import (
    NEW_INSTRUCTION,
    RUBRIC,
    demonstration_document,
    judged_response,
    justification,
    new_instruction_document,
    pretraining_documents,
    verdict_document,
)
from jaxsi.toyworld.world import FAMILIES, grade_task, is_held_out, parse, points, sample_task

tasks_drawn = st.integers(0, 2**32).map(lambda seed: sample_task(random.Random(seed)))
TASK = parse("Reverse: cat red axe")
HEAD, MIDDLE, TAIL = re.split(r"\{prompt\}|\{response\}", RUBRIC.template)


def judged(content):
    """(instruction, response) inside a rendered judge prompt, or None."""
    match = re.fullmatch(f"{re.escape(HEAD)}(.*?){re.escape(MIDDLE)}(.*){re.escape(TAIL)}", content, re.DOTALL)
    return match.groups() if match else None


def instructions_in(content):
    """All instructions of the world in a prompt."""
    if judged(content):
        return [judged(content)[0]]
    lines = [line.removeprefix("- ") for line in content.splitlines()]
    return [line for line in lines if parse(line)]


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("axe red cat.", "axe right red right cat right form good Score: 5"),
        ("axe pie cat.", "axe right red wrong cat right form good Score: 4"),
        ("axe red cat", "axe right red right cat right form bad Score: 4"),
        ("Sure thing: axe red cat.", "axe right red right cat right form bad Score: 4"),
        ("axe red.", "axe right red right cat wrong form good Score: 4"),
        ("cat red axe.", "axe wrong red right cat wrong form good Score: 2"),
        ("axe red cat pie egg.", "axe right red right cat right extra extra form good Score: 3"),
        ("", "axe wrong red wrong cat wrong form bad Score: 0"),
        ("Score: 5", "axe wrong red wrong cat wrong form bad Score: 0"),
    ],
)
def test_verdicts_match_hand_written_examples(response, verdict):
    assert justification(TASK, response) == verdict


@given(tasks_drawn, st.integers(0, 2**32))
def test_verdict_agrees_with_the_grade(task, seed):
    response = judged_response(task, random.Random(seed))
    verdict = justification(task, response)
    assert parse_score(verdict) == points(grade_task(task, response))
    assert re.fullmatch(r"([a-z0-9]+ (right|wrong) )+(extra ){0,6}form (good|bad) Score: [0-5]", verdict)
    assert tuple(verdict.split(" ")[0 : 2 * len(task.answer) : 2]) == task.answer


def test_score_follows_from_the_words_before_it():
    scores = {}
    rng = random.Random(0)
    for _ in range(3000):
        _, verdict = verdict_document(rng)
        words = verdict.split(" ")
        key = Counter(word for word in words[:-2] if word in ("right", "wrong", "extra", "good", "bad"))
        assert scores.setdefault(frozenset(key.items()), words[-1]) == words[-1]
    assert set(scores.values()) == set("012345")


def test_rubric_is_short_and_reads_its_own_score():
    assert len(RUBRIC.template.split()) <= 45
    assert RUBRIC.template.endswith("Score:") and RUBRIC.marker == "Score:"
    rendered = RUBRIC.render("Reverse: cat red axe", "Score: 5 {prompt}")
    assert judged(rendered) == ("Reverse: cat red axe", "Score: 5 {prompt}")


def test_held_out_instructions_never_occur():
    seen = Counter()
    for (message,), response in pretraining_documents(4000, seed=0):
        found = instructions_in(message["content"])
        assert found and all(parse(text) for text in found)
        assert not any(map(is_held_out, found))
        kind = "verdict" if judged(message["content"]) else "few-shot" if len(found) > 1 else "demonstration"
        if kind == "few-shot":
            assert parse(response) is not None and not is_held_out(response)
            assert len(found) == 8
        seen[kind] += 1
    assert seen["demonstration"] / 4000 == pytest.approx(0.45, abs=0.03)
    assert seen["verdict"] / 4000 == pytest.approx(0.50, abs=0.03)
    assert seen["few-shot"] / 4000 == pytest.approx(0.05, abs=0.015)


def test_same_seed_gives_same_documents():
    documents = list(pretraining_documents(200, seed=1))
    assert documents == list(pretraining_documents(200, seed=1))
    assert documents[:50] == list(itertools.islice(pretraining_documents(200, seed=1), 50))
    assert documents != list(pretraining_documents(200, seed=2))


def test_demonstrations_come_from_the_annotators():
    rng = random.Random(4)
    for _ in range(200):
        (message,), response = demonstration_document(rng)
        assert response in {respond(parse(message["content"]), mode) for mode in MODES}


def test_judged_responses_have_three_kinds():
    rng = random.Random(5)
    by_modes = {respond(TASK, mode) for mode in MODES}
    drawn = [judged_response(TASK, rng) for _ in range(4000)]
    assert 0.70 < sum(text in by_modes for text in drawn) / 4000 < 0.80  # some perturbations restore a mode's text
    assert all(drawn)
    assert {points(grade_task(TASK, text)) for text in drawn} == set(range(6))


def test_self_instruct_reads_new_instructions():
    rng = random.Random(6)
    families = set()
    for _ in range(100):
        (message,), response = new_instruction_document(rng)
        examples = instructions_in(message["content"])
        assert message["content"] == NEW_INSTRUCTION.render(examples)
        assert NEW_INSTRUCTION.parse(response) == response
        families.add(parse(response).family)
    assert families == set(FAMILIES)
