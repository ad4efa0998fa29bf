"""PIT's improver: one response to every draft, in order, and the gain that decides whether it is accepted."""

import dataclasses

import jax
import numpy as np
import pytest

import tiny
from jaxsi.model import decoder
from jaxsi.runs.records import Prompt, Response
from jaxsi.sampling.generate import generate
from jaxsi.stages.improve import pit
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.training.reward import with_scalar_head

PROMPTS = [Prompt.of(f"p{i}", f"Reverse: {word} red axe") for i, word in enumerate(("cat", "dog", "egg"))]
REQUEST = "{prompt} again:"
SETTINGS = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "batch_size": 4}


def response(prompt: Prompt, sample: int, text: str) -> Response:
    return dataclasses.replace(
        tiny.response(prompt, sample, [5]), text=text, token_ids=tuple(render_response(tiny.tokenizer(), text))
    )


def conversation(prompt: Prompt, draft: str) -> tuple[dict[str, str], ...]:
    return (
        *prompt.messages,
        {"role": "assistant", "content": draft},
        {"role": "user", "content": f"{prompt.text} again:"},
    )


def improve(lm, drafts: list[Response], seed: int = 0):
    return pit.improve_once(lm, PROMPTS, drafts, REQUEST, jax.random.key(seed), **SETTINGS)


def test_improver_answers_each_draft_in_order():
    lm = tiny.make_lm()
    drafts = [
        response(PROMPTS[2], 0, "axe."),
        response(PROMPTS[0], 1, "red."),
        response(PROMPTS[0], 0, "cat."),
        response(PROMPTS[1], 0, "axe."),
    ]
    revisions = improve(lm, drafts, seed=3)
    ids = [(r.id, r.prompt_id) for r in revisions]
    assert ids == [("p2#0", "p2"), ("p0#1", "p0"), ("p0#0", "p0"), ("p1#0", "p1")]
    by_id = {prompt.id: prompt for prompt in PROMPTS}
    requests = [Prompt(id=d.id, messages=conversation(by_id[d.prompt_id], d.text)) for d in drafts]
    expected = [r.token_ids for r in generate(lm, requests, key=jax.random.key(3), **SETTINGS)]
    assert [r.response.token_ids for r in revisions] == expected
    assert len(set(expected)) == 4 and all(r.label is None and r.label_probs is None for r in revisions)
    again = improve(lm, drafts[::-1], seed=3)
    assert [r.response.token_ids for r in again[::-1]] == expected, "the noise depends on the draft, not on its place"


def test_draft_without_room_comes_back_unchanged():
    lm = tiny.make_lm()
    head = len(render_prompt(lm.tokenizer, conversation(PROMPTS[0], "cat ")))
    fits, over, far_over = (response(PROMPTS[0], i, "cat " * (256 - 8 - head + 1 + i)) for i in (0, 1, 2))
    lengths = [len(render_prompt(lm.tokenizer, conversation(PROMPTS[0], d.text))) for d in (fits, over)]
    assert lengths == [248, 249], "the second is one token too long to leave room for 8"
    revisions = improve(lm, [over, fits, far_over])
    assert [r.label for r in revisions] == ["TOO LONG", None, "TOO LONG"]
    assert revisions[0].response is over
    assert revisions[1].response is not fits and revisions[1].response.token_ids
    assert [r.id for r in revisions] == [over.id, fits.id, far_over.id]


def test_improver_works_when_no_draft_fits():
    revisions = improve(tiny.make_lm(), [response(PROMPTS[0], 0, "cat " * 300)])
    assert [r.label for r in revisions] == ["TOO LONG"]


def test_error_names_a_draft_of_an_unknown_prompt():
    stranger = response(Prompt.of("q9", "x"), 0, "cat.")
    with pytest.raises(ValueError, match="'q9#0' answers prompt 'q9', which is not among the 3 prompts"):
        improve(tiny.make_lm(), [stranger])


def gap_model(sign: float):
    lm = with_scalar_head(tiny.make_lm(seed=1))
    head = sign * np.random.default_rng(0).normal(size=lm.config.embed_dim).astype(np.float32)
    return lm.replace(lm.weights | {"score": jax.device_put(head, lm.weights["score"].sharding)})


def gap(lm, prompt: Prompt, text: str, reference: str) -> float:
    """The definition: the head on the last hidden state of the improver's conversation and a response."""
    head = render_prompt(lm.tokenizer, conversation(prompt, reference))
    tokens = np.asarray([[*head, *render_response(lm.tokenizer, text)]], np.int32)
    return float(decoder.hidden_states(lm.weights, lm.config, tokens)[0, -1] @ lm.weights["score"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gain_follows_its_definition(sign):
    lm, texts = gap_model(sign), ["axe red cat.", "axe red", "cat cat.", "Sure thing: axe.", "axe.", "cat red."]
    prompts = [dataclasses.replace(PROMPTS[0], id=str(i)) for i in range(len(texts))]
    old = response(PROMPTS[0], 0, "cat red.")
    triples = [(p, response(p, 1, text), old) for p, text in zip(prompts, texts, strict=True)]
    gains = pit._gains(lm, lm, triples, REQUEST, 2)
    zero = gap(lm, PROMPTS[0], old.text, old.text)
    expected = [gap(lm, PROMPTS[0], text, old.text) - zero for text in texts]
    assert min(expected) < -0.01 and max(expected) > 0.01, "some gain and some lose"
    assert list(gains) == [p.id for p in prompts]
    assert list(gains.values()) == pytest.approx(expected, abs=1e-4)
    assert gains["5"] == 0, "an unchanged draft gains nothing"
