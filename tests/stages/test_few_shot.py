"""The request for a new task: what it shows, and which part of a reply is the task."""

from pathlib import Path

import pytest

from jaxsi.stages.prompts.few_shot import FewShot, load_few_shot
from jaxsi.toyworld.corpus import NEW_INSTRUCTION

GOLDEN = Path(__file__).parents[1] / "golden"
CODE = "Fix the bug in this function:\n\ndef f(x):\n    return x +"


def test_request_matches_the_golden_file():
    rendered = load_few_shot().render(["Name three rivers.", CODE])
    assert rendered + "\n" == (GOLDEN / "self_instruct.txt").read_text(encoding="utf-8")


def test_examples_are_inserted_unchanged():
    assert "<task>\n{examples}\n</task>" in load_few_shot().render(["{examples}"])
    assert NEW_INSTRUCTION.render(["Reverse: a b", "{examples}"]).endswith("these:\n- Reverse: a b\n- {examples}")


@pytest.mark.parametrize(
    ("generated", "task"),
    [
        ("<task>\nName a river.\n</task>", "Name a river."),
        (f"<task>\n{CODE}\n</task>", CODE),  # it was cut at the empty line
        (f"{CODE}\n</task>", CODE),
        ("Sure! Here is one:\n\n<task>Name a river.</task>\n\nTell me if you want more.", "Name a river."),
        ("<task>\nName a river.\n</task>\n<task>\nName a lake.\n</task>", "Name a river."),
        ("Name a river.</task>\n<task>\nName a lake.", "Name a river."),
        ("<task>\nSort these:\n- pear\n- apple\n</task>", "Sort these:\n- pear\n- apple"),
        ("Sure! Here is a new task:", None),
        ("<task>\nName a river.", None),
        ("<task>\n\n</task>", None),
        ("", None),
    ],
)
def test_task_stands_between_the_marks(generated, task):
    assert load_few_shot().parse(generated) == load_few_shot().parse(generated, cut_off=True) == task


@pytest.mark.parametrize(
    ("generated", "cut_off", "task"),
    [
        ("Reverse: a b", False, "Reverse: a b"),
        ("Reverse: a b", True, None),
        ("- Reverse: a b\n- Sort: c", True, "Reverse: a b"),
        ("\n Reverse: a b \n- Sort: c", False, "Reverse: a b"),
        ("Reverse: 3 - 2", False, "Reverse: 3 - 2"),
        (" \n", False, None),
    ],
)
def test_task_without_a_closing_mark_ends_at_the_next_one(generated, cut_off, task):
    assert NEW_INSTRUCTION.parse(generated, cut_off=cut_off) == task


def test_request_without_examples_or_marks_is_an_error():
    with pytest.raises(ValueError, match="0 examples; it needs at least 1"):
        load_few_shot().render([])
    with pytest.raises(ValueError, match=r"request 'x': the template has the slot \{examples\} 0 times"):
        FewShot(name="x", template="no slot")
    with pytest.raises(ValueError, match="opening is ' '"):
        FewShot(name="x", template="{examples}", opening=" ")
