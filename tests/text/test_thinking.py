"""Reasoning models: thoughts are asked for or not, kept apart from answers, and what is trained is what is sampled."""

import dataclasses
import datetime

import numpy as np
import pytest
from byte_models import MARKS, shown, speaking, tokenizer_of

import tiny
from jaxsi.runs.records import PreferencePair, Prompt, SFTExample
from jaxsi.sampling.generate import generate
from jaxsi.stages.judge import JudgeConfig, judge
from jaxsi.stages.prompts import load_rubric
from jaxsi.text import chat_template
from jaxsi.text.chat import read_response, render_prompt, render_request, render_response, written_response
from jaxsi.text.chat_config import ChatConfig, split_thought
from jaxsi.text.chat_template import ChatTemplateError
from jaxsi.text.tokenizer import Tokenizer
from jaxsi.training.batches import encode_example, encode_pair
from jaxsi.training.reward import reward_sequence

# As Qwen3's: an empty block in the prompt turns thoughts off; past thoughts are left out; the last turn has a block.
SWITCHED = (
    "{%- for m in messages %}{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n' }}"
    "{{- (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '') }}"
    "{{- '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
PLAIN = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As R1's: every prompt begins a thought.
OPENING = PLAIN.replace("assistant\n' }}{%- endif %}", "assistant\n<think>\n' }}{%- endif %}")
DATED = "{{- '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + PLAIN
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def switched(tmp_path_factory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("t") / "switched", SWITCHED)


@pytest.fixture(scope="module")
def opening(tmp_path_factory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("t") / "opening", OPENING)


# ---- one splitter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opened", "thought"),
    [
        ("Yes.", False, ("", "Yes.", True)),
        ("<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.", True)),
        ("Hm.\n</think>\n\nYes.", True, ("Hm.", "Yes.", True)),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.", True)),
        ("<think>a</think>b<think>c</think>d", False, ("a</think>b<think>c", "d", True)),
        ("<think>\nScore: 5", False, ("Score: 5", "", False)),
        ("Score: 5", True, ("Score: 5", "", False)),
        ("  <think>x", False, ("x", "", False)),
        ("Write <think> first.", False, ("", "Write <think> first.", True)),
    ],
)
def test_answer_follows_the_last_closing_tag(text, opened, thought):
    assert split_thought(text, opened=opened) == thought


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_thoughts_are_off_unless_asked_for(switched):
    off = shown(switched, render_prompt(switched, HI))
    assert off == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for thinking in ("keep", "strip"):
        on = switched.with_chat(ChatConfig(thinking=thinking))
        assert shown(on, render_prompt(on, HI)) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert on.template_hash != switched.template_hash


def test_variables_reach_the_template_and_its_hash(switched):
    told = switched.with_chat(ChatConfig(template_kwargs={"enable_thinking": True}))
    assert "think" not in shown(told, render_prompt(told, HI))
    assert told.template_hash != switched.template_hash
    assert ChatConfig(template_kwargs={"b": 1, "a": 2}) == ChatConfig(template_kwargs='{"a": 2, "b": 1}')
    with pytest.raises(ChatTemplateError, match=r"does not read enable_thought of chat\.template_kwargs; .*enable_t"):
        switched.with_chat(ChatConfig(template_kwargs={"enable_thought": True}))
    for bad in ("[1]", "{", "5"):
        with pytest.raises(ValueError, match="template_kwargs is "):
            ChatConfig(template_kwargs=bad)
    with pytest.raises(ValueError, match="date is 'today'"):
        ChatConfig(date="today")


def test_trained_text_is_sampled_text(switched):
    """The prompt with the empty block is the beginning of the finished turn, so the block is outside the loss."""
    prompt, response = render_prompt(switched, HI), render_response(switched, "Yes.")
    whole = render_prompt(switched, [*HI, {"role": "assistant", "content": "Yes."}], add_generation_prompt=False)
    assert prompt + response == whole[: len(prompt) + len(response)]
    row = encode_example(switched, SFTExample(id="a", messages=tuple(HI), response="Yes."))
    assert shown(switched, row.tokens[~row.loss_mask]).endswith("<think>\n\n</think>\n\n")
    assert shown(switched, row.tokens[row.loss_mask]) == "Yes.<|im_end|>"


def test_thoughts_of_earlier_turns_are_left_out_as_in_transformers(switched, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer_of(tmp_path / "t", SWITCHED)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "t"))
    turns = [
        *HI,
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."},
        {"role": "user", "content": "So?"},
    ]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False, return_dict=False)
    assert render_prompt(switched, turns) == ids
    assert "Hm." not in shown(switched, ids)


def test_begun_thought_is_closed_before_an_answer_that_is_learnt(opening):
    assert opening.opens_thought
    assert shown(opening, render_request(opening, HI)).endswith("assistant\n<think>\n</think>\n\n")
    row = encode_example(opening, SFTExample(id="a", messages=tuple(HI), response="Yes."))
    assert shown(opening, row.tokens[row.loss_mask]) == "Yes.<|im_end|>"
    assert shown(opening, row.tokens[~row.loss_mask]).endswith("<think>\n</think>\n\n")
    thinks = encode_example(opening, SFTExample(id="a", messages=tuple(HI), response="Hm.\n</think>\n\nYes."))
    assert shown(opening, thinks.tokens[~thinks.loss_mask]).endswith("<think>\n")


@pytest.mark.parametrize("kind", ["header alone", "whole turn"])
def test_thought_of_a_row_goes_on_where_the_prompt_begins_it(kind, tmp_path):
    """One block, whether or not the template writes an empty one into finished turns, as Qwen3's thinking models do."""
    block = "{{- '<think>\n\n</think>\n\n' if m.role == 'assistant' and '</think>' not in m.content else '' }}"
    turn = "{{- '<|im_start|>' + m.role + '\n' }}" + block + "{{- m.content + '<|im_end|>\n' }}"
    whole = "{%- for m in messages %}" + turn + "{%- endfor %}" + OPENING.partition("{%- endfor %}")[2]
    tokenizer = tokenizer_of(tmp_path / "t", OPENING if kind == "header alone" else whole)
    assert tokenizer.opens_thought
    for text, learnt in (
        ("<think>\nHm.\n</think>\n\nYes.", "Hm.\n</think>\n\nYes.<|im_end|>"),
        ("Hm.\n</think>\n\nYes.", "Hm.\n</think>\n\nYes.<|im_end|>"),
        ("Yes.", "Yes.<|im_end|>"),
    ):
        row = encode_example(tokenizer, SFTExample(id="a", messages=tuple(HI), response=text))
        assert shown(tokenizer, row.tokens[row.loss_mask]) == learnt
        head = "<|im_start|>assistant\n<think>\n"
        assert shown(tokenizer, row.tokens[~row.loss_mask]).endswith(head + ("</think>\n\n" if text == "Yes." else ""))
        written = written_response(tokenizer, "a#0", "a", text)
        assert [*render_prompt(tokenizer, HI), *written.token_ids] == row.tokens.tolist()
        assert written.text == "Yes."


@pytest.mark.parametrize("special", [False, True])
def test_response_is_read_in_two_parts(special, tmp_path):
    tokenizer = tokenizer_of(tmp_path / "t", SWITCHED, special_tags=special)
    ids = tokenizer._library.encode("<think>\nHm, 5?\n</think>\n\nYes.<|im_end|>")
    assert read_response(tokenizer, ids) == ("Hm, 5?", "Yes.", True)
    assert read_response(tokenizer, tokenizer.encode_text("Yes.")) == ("", "Yes.", True)


def test_line_breaks_and_tags_are_text(switched):
    """They are added tokens that the template writes, but they do not mark turns."""
    text = "One\n\nTwo <think> three </think>\n"
    assert switched.decode(switched.encode_text(text)) == text
    assert switched.control_ids == {switched.controls.ids[mark] for mark in MARKS}


# ---- the date, and templates without effect --------------------------------------------------------------------------


def test_date_is_part_of_the_hash_and_can_be_fixed(tmp_path, monkeypatch):
    tokenizer = tokenizer_of(tmp_path / "t", DATED)
    assert tokenizer.reads_date
    fixed = tokenizer.with_chat(ChatConfig(date="2026-11-27"))
    assert "27 Nov 2026" in shown(fixed, render_prompt(fixed, HI))
    assert datetime.date.today().strftime("%d %b %Y") in shown(tokenizer, render_prompt(tokenizer, HI))
    other = tokenizer.with_chat(ChatConfig(date="2026-11-28"))
    assert other.template_hash != fixed.template_hash
    monkeypatch.setattr(chat_template, "today", lambda: "2031-01-01")
    assert "27 Nov 2026" in shown(fixed, render_prompt(fixed, HI))


def test_template_that_ignores_the_generation_prompt_is_refused(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "t", PLAIN.replace("{%- if add_generation_prompt %}", "{%- if false %}"))
    with pytest.raises(ChatTemplateError, match=r"ignores add_generation_prompt: it writes '<\|im_start\|>assistant'"):
        assert tokenizer.stop_ids


# ---- sampling, judging, training -------------------------------------------------------------------------------------


def test_thought_and_answer_are_two_fields(switched, monkeypatch):
    lm = speaking(monkeypatch, switched, ["<think>\nHm.\n</think>\n\nYes.<|im_end|>", "<think>\nHm."])
    first, second = generate(lm, ["Hi", "Ho"], max_new_tokens=64)
    assert (first.reasoning, first.text, first.finish_reason) == ("Hm.", "Yes.", "stop")
    assert switched.decode(first.token_ids) == "<think>\nHm.\n</think>\n\nYes."
    assert (second.reasoning, second.text, second.finish_reason) == ("Hm.", "", "length")


def test_judge_reads_no_thought_and_gives_no_score_in_one(switched, monkeypatch):
    texts = ["<think>\nThe rubric has Score: 5.\n</think>\n\nGood. Score: 3<|im_end|>", "<think>\nIt says Score: 5"]
    lm = speaking(monkeypatch, switched, texts)
    prompt = Prompt.of("0", "Hi")
    responses = [dataclasses.replace(tiny.response(prompt, i, [5]), text="Yes.", reasoning="SECRET") for i in (0, 1)]
    asked: list[str] = []
    render = type(load_rubric()).render
    monkeypatch.setattr(type(load_rubric()), "render", lambda *a: asked.append(render(*a)) or asked[-1][:50])
    judgments = judge(lm, [prompt], responses, load_rubric(), JudgeConfig(num_samples=1, max_new_tokens=8))
    assert [j.score for j in judgments] == [3.0, None]
    assert len(asked) == 2 and not any("SECRET" in text for text in asked)


def test_stripped_thoughts_are_not_learnt(switched):
    on = switched.with_chat(ChatConfig(thinking="strip"))

    def response(number: int, answer: str):
        ids = tuple(switched._library.encode(f"<think>\nHm.\n</think>\n\n{answer}<|im_end|>"))
        thought = read_response(on, ids)
        base = tiny.response(Prompt.of("0", "Hi"), number, list(ids[:1]))
        return dataclasses.replace(
            base, token_ids=ids, text=thought.answer, reasoning=thought.reasoning, template=on.template_hash
        )

    pair = PreferencePair(
        id="0", messages=tuple(HI), chosen=response(0, "Yes."), rejected=response(1, "No."), chosen_score=1.0,
        rejected_score=0.0,
    )  # fmt: skip
    chosen, _ = encode_pair(on, pair)
    assert shown(on, chosen.tokens[chosen.loss_mask]) == "Yes.<|im_end|>"
    assert shown(on, chosen.tokens[~chosen.loss_mask]).endswith("<think>\n\n</think>\n\n")
    keep = switched.with_chat(ChatConfig(thinking="keep"))
    kept = dataclasses.replace(
        pair,
        chosen=dataclasses.replace(pair.chosen, template=keep.template_hash),
        rejected=dataclasses.replace(pair.rejected, template=keep.template_hash),
    )
    chosen, _ = encode_pair(keep, kept)
    np.testing.assert_array_equal(chosen.tokens[chosen.loss_mask], pair.chosen.token_ids)
    scored = reward_sequence(switched, HI, pair.chosen)
    assert shown(switched, scored.tokens[scored.loss_mask]) == "Yes.<|im_end|>"
