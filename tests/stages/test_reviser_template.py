"""The adaptive reviser's prompt and the parser of its answers."""

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from jaxsi.stages.prompts.reviser import ReviserTemplate, load_reviser_template
from jaxsi.toyworld.reviser import TEMPLATE as TOY

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATE = load_reviser_template()
QUESTION = ({"role": "user", "content": "Name three rivers."},)


def test_request_matches_the_golden_file():
    (message,) = TEMPLATE.ask(QUESTION, "Rhine, Elbe.")
    assert message["role"] == "user"
    assert message["content"] + "\n" == (GOLDEN / "seft_reviser.txt").read_text(encoding="utf-8")
    for label in TEMPLATE.labels:
        assert label in message["content"]


def test_draft_without_a_slot_becomes_a_turn_of_the_conversation():
    template = ReviserTemplate(name="chat", template="Label for {prompt}:", warm_up="Better:")
    assert template.ask(QUESTION, "Rhine.") == (
        *QUESTION,
        {"role": "assistant", "content": "Rhine."},
        {"role": "user", "content": "Label for Name three rivers.:"},
    )
    assert template.ask_warm_up(QUESTION, "Rhine.")[-1]["content"] == "Better:"


def test_slot_names_inside_texts_stay_text():
    (message,) = TEMPLATE.ask(({"role": "user", "content": "{response}"},), "{prompt}")
    assert "### Task\n{response}\n\n### Draft\n{prompt}\n" in message["content"]


@given(st.text(), st.integers(0, 2), st.sampled_from([TEMPLATE, TOY]))
def test_parse_reads_what_write_wrote(text, place, template):
    label = template.labels[place]
    assert template.parse(template.write(label, text)) == (label, text.strip() or None)


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("[No Revise]\nAs it is.", ("[No Revise]", "As it is.")),
        ("\n [major revise]  New\ntext ", ("[Major Revise]", "New\ntext")),
        ("[Minor Revise]", ("[Minor Revise]", None)),
        ("[Minor Revise]Mended.", ("[Minor Revise]", "Mended.")),
        ("Sure! [No Revise]\nAs it is.", (None, None)),  # not at the beginning: text
        ("[Some Revise]\nText", (None, None)),
        ("[No Revise", (None, None)),
        ("", (None, None)),
        ("[No Revise]\n[Major Revise]", ("[No Revise]", "[Major Revise]")),
    ],
)
def test_label_counts_only_at_the_beginning(generated, expected):
    assert TEMPLATE.parse(generated) == expected


def test_longest_matching_label_wins():
    template = ReviserTemplate(
        name="t", template="x", warm_up="y", labels=("redo", "redo a bit", "good"), separator=" "
    )
    assert template.parse("redo a bit of it") == ("redo a bit", "of it")
    assert template.parse("redo all") == ("redo", "all")
    assert template.parse("goodness") == (None, None)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"template": "{response} alone"}, "exactly once each"),
        ({"warm_up": "{prompt}{prompt}{response}"}, "warm_up.*exactly once each"),
        ({"labels": ("a", "A", "b")}, "three different ones"),
        ({"labels": ("a", "", "b")}, "three different ones"),
        ({"labels": ("a", " c", "b")}, "white space at their ends"),
        ({"separator": ""}, "separator"),
        ({"separator": ": "}, "separator"),
    ],
)
def test_invalid_templates_are_errors(wrong, reason):
    good = {"name": "t", "template": "{prompt}{response}", "warm_up": "{prompt}{response}"}
    with pytest.raises(ValueError, match=reason):
        ReviserTemplate(**(good | wrong))
