"""Qwen3's own chat template, from the corpus of real ones: what is trained, sampled and judged is one text.

The corpus is not part of this repository; without it the tests are skipped.
"""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from byte_models import shown, speaking, tokenizer_of
from transformers import PreTrainedTokenizerFast

import tiny
from jaxsi.lm import LM
from jaxsi.model import decoder
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, SFTExample
from jaxsi.sampling.generate import generate
from jaxsi.stages.judge import JudgeConfig, judge
from jaxsi.stages.pairs import best_and_worst
from jaxsi.stages.prompts import Rubric
from jaxsi.text.chat import render_prompt, written_response
from jaxsi.text.chat_config import ChatConfig
from jaxsi.text.chat_template import ChatTemplateError
from jaxsi.training.batches import encode_example, encode_examples, encode_pair

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "hf_configs"
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real templates is not here")

THOUGHT = "<think>\nHm, one < two.\n</think>\n\nYes."
HI, SO = {"role": "user", "content": "Hi"}, {"role": "user", "content": "So?"}
CONVERSATIONS = {
    "one turn": (HI,),
    "system": ({"role": "system", "content": "Be brief."}, HI),
    "thoughts in the history": (HI, {"role": "assistant", "content": THOUGHT}, SO),
    "two thoughts": (HI, {"role": "assistant", "content": THOUGHT}, SO, {"role": "assistant", "content": THOUGHT}, HI),
}
EMPTY = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    lines = (CORPUS / "templates.jsonl").read_text(encoding="utf-8").splitlines()
    template = next(row["template"] for row in map(json.loads, lines) if "qwen3-tokenizer" in row["path"])
    folder = tmp_path_factory.mktemp("qwen3") / "t"
    tokenizer_of(folder, template)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from jaxsi.text.tokenizer import load_tokenizer

    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def lm(tokenizer):
    """A tiny Qwen3 with that template."""
    config = dataclasses.replace(
        tiny.CONFIG, family="qwen3", qk_norm=True, vocab_size=tokenizer.vocab_size, max_positions=1024
    )
    weights = jax.device_put(tiny.host_weights(0, config), decoder.weight_shardings(config, tiny.mesh()))
    return LM(config=config, weights=weights, tokenizer=tokenizer, mesh=tiny.mesh(), dtype=jax.numpy.dtype("float32"))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_without_thoughts_ends_with_the_empty_block(name, folder, tokenizer):
    messages = list(CONVERSATIONS[name])
    ids = render_prompt(tokenizer, messages)
    assert shown(tokenizer, ids).endswith(EMPTY) and "Hm" not in shown(tokenizer, ids)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
    assert ids == theirs.apply_chat_template(messages, **options)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("thinking", ["off", "strip"])
@pytest.mark.parametrize("text", ["Yes.", THOUGHT, "Hm, one < two.\n</think>\n\nYes.", "<think>\n\n</think>\n\nYes."])
def test_trained_text_is_sampled_text(name, thinking, text, tokenizer):
    """The thought of a row is left out where the model is to answer without one: a second block would never be
    sampled."""
    told, messages = tokenizer.with_chat(ChatConfig(thinking=thinking)), CONVERSATIONS[name]
    ids = [*render_prompt(tokenizer, messages), *tokenizer._library.encode("Yes.<|im_end|>")]
    row = encode_example(told, SFTExample(id="a", messages=messages, response=text))
    assert row.tokens.tolist() == ids
    assert shown(told, row.tokens[row.loss_mask]) == "Yes.<|im_end|>"
    sides = [written_response(told, f"a#{i}", "a", side) for i, side in enumerate((text, f"{text} No."))]
    assert [side.text for side in sides] == ["Yes.", "Yes. No."]
    pair = PreferencePair(
        id="a", messages=messages, chosen=sides[0], rejected=sides[1], chosen_score=1.0, rejected_score=0.0
    )
    if thinking == "off":
        assert encode_pair(told, pair)[0].tokens.tolist() == ids


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_thoughts_are_learnt_where_they_are_kept(name, folder, tokenizer):
    told, messages = tokenizer.with_chat(ChatConfig(thinking="keep")), CONVERSATIONS[name]
    row = encode_example(told, SFTExample(id="a", messages=messages, response=THOUGHT))
    assert shown(told, row.tokens[row.loss_mask]) == f"{THOUGHT}<|im_end|>"
    whole = [*messages, {"role": "assistant", "content": THOUGHT}]
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert [*row.tokens.tolist(), *theirs.encode("\n")] == theirs.apply_chat_template(whole, return_dict=False)
    assert row.tokens[~row.loss_mask].tolist() == render_prompt(told, messages)


def test_log_counts_thoughts_that_are_left_out_and_a_row_without_an_answer_is_named(tokenizer, caplog):
    rows = [SFTExample(id=str(i), messages=(HI,), response=text) for i, text in enumerate(["Yes.", THOUGHT])]
    encode_examples(tokenizer, rows)
    assert "1 of 2 responses begin with a thought, which is left out, since chat.thinking is off" in caplog.text
    endless = SFTExample(id="7", messages=(HI,), response="<think>\nHm")
    with pytest.raises(ChatTemplateError, match=r"example '7': the response .* is a thought without an end"):
        encode_example(tokenizer, endless)
    quoting = SFTExample(id="8", messages=(HI,), response="The tag </think> ends a thought.")
    row = encode_example(tokenizer, quoting)
    assert shown(tokenizer, row.tokens[row.loss_mask]) == "The tag </think> ends a thought.<|im_end|>"


def test_sampled_response_follows_the_trained_prompt(lm):
    """What a model samples after a prompt is what DPO trains on, id for id, also behind thoughts in the history."""
    messages = CONVERSATIONS["thoughts in the history"]
    first, second = generate(lm, [Prompt(id="a", messages=messages)], num_samples=2, max_new_tokens=6, temperature=1.0)
    pair = PreferencePair(
        id="a", messages=messages, chosen=first, rejected=second, chosen_score=1.0, rejected_score=0.0
    )
    for side, response in zip(encode_pair(lm.tokenizer, pair), (first, second), strict=True):
        assert side.tokens.tolist() == [*render_prompt(lm.tokenizer, messages), *response.token_ids]


def test_judge_reads_answers_alone_and_a_cut_off_thought_is_no_low_score(tokenizer, monkeypatch):
    on = tokenizer.with_chat(ChatConfig(thinking="keep"))
    texts = [f"{THOUGHT}<|im_end|>", "No.<|im_end|>", "<think>\nScore: 1, I thi", "Maybe.<|im_end|>"]
    lm = dataclasses.replace(speaking(monkeypatch, on, texts), tokenizer=on)
    prompt = Prompt(id="a", messages=(HI,))
    responses = generate(lm, [prompt], num_samples=4, max_new_tokens=64)
    assert [r.text for r in responses] == ["Yes.", "No.", "", "Maybe."]
    assert [r.finish_reason for r in responses] == ["stop", "stop", "length", "stop"]

    asked: list[str] = []
    verdicts = ["<think>\nIt could be Score: 1\n</think>\n\nGood. Score: 4<|im_end|>", "<think>\nScore: 1"]
    verdicts += ["Bad. Score: 2<|im_end|>", "Score: 3<|im_end|>"]
    lm = dataclasses.replace(speaking(monkeypatch, on, verdicts), tokenizer=on)
    rubric = Rubric(name="short", template="{prompt} | {response}")
    render = Rubric.render
    monkeypatch.setattr(Rubric, "render", lambda *args: asked.append(render(*args)) or asked[-1])
    foreign = dataclasses.replace(responses[0], id="a#9", text=THOUGHT, reasoning="", token_ids=(), logps=())
    judgments = judge(lm, [prompt], [*responses[:3], foreign], rubric, JudgeConfig(num_samples=1, max_new_tokens=64))
    assert asked[0] == asked[-1] == "Hi | Yes." and not any("Hm" in text for text in asked)
    assert [j.score for j in judgments][:2] == [4.0, None]

    # Whatever a judge says of the empty text: the response was cut off, it is not a bad one.
    scores = [4.0, 3.0, 1.0, 2.0]
    scored = [
        Judgment(id=r.id, prompt_id="a", scores=(s,), score=s, texts=("",), fingerprint="f", template="t")
        for r, s in zip(responses, scores, strict=True)
    ]
    for allowed in (False, True):
        [pair], counts = best_and_worst(responses, scored, [prompt], reject_cut_off=allowed, choose_cut_off=allowed)
        assert (pair.chosen.text, pair.rejected.text) == ("Yes.", "Maybe.") and counts["cut_off"] == 1
