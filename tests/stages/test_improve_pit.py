"""PIT's improver: a response to every draft, in order, and when it is believed."""

import dataclasses

import jax
import numpy as np
import pytest

import tiny
from jaxsi.model import decoder
from jaxsi.runs.records import Prompt, Response
from jaxsi.sampling import generate
from jaxsi.stages.improve.pit import accepted, improve
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.training.reward import with_scalar_head

PROMPTS = [Prompt.of(f"p{i}", f"Reverse: {word} red axe") for i, word in enumerate(("cat", "dog", "egg"))]
REQUEST = "{prompt} again:"
SETTINGS = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "batch_size": 4}


def said(prompt: Prompt, sample: int, text: str) -> Response:
    return dataclasses.replace(
        tiny.response(prompt, sample, [5]), text=text, token_ids=tuple(render_response(tiny.tokenizer(), text))
    )


def conversation(prompt: Prompt, draft: str) -> tuple[dict[str, str], ...]:
    return (
        *prompt.messages,
        {"role": "assistant", "content": draft},
        {"role": "user", "content": f"{prompt.text} again:"},
    )


def test_one_revision_of_each_draft_in_its_order():
    lm = tiny.make_lm()
    drafts = [said(PROMPTS[2], 0, "axe."), said(PROMPTS[0], 1, "red."), said(PROMPTS[0], 0, "cat."),
              said(PROMPTS[1], 0, "axe.")]  # fmt: skip
    made = improve(lm, PROMPTS, drafts, REQUEST, jax.random.key(3), **SETTINGS)
    assert [(r.id, r.prompt_id) for r in made] == [("p2#0", "p2"), ("p0#1", "p0"), ("p0#0", "p0"), ("p1#0", "p1")]
    by_id = {prompt.id: prompt for prompt in PROMPTS}
    asked = [Prompt(id=d.id, messages=conversation(by_id[d.prompt_id], d.text)) for d in drafts]
    expected = [r.token_ids for r in generate.generate(lm, asked, key=jax.random.key(3), **SETTINGS)]
    assert [r.response.token_ids for r in made] == expected
    assert len(set(expected)) == 4 and all(r.label is None and r.label_probs is None for r in made)
    again = improve(lm, PROMPTS, drafts[::-1], REQUEST, jax.random.key(3), **SETTINGS)
    assert [r.response.token_ids for r in again[::-1]] == expected, "the noise is that of the draft, not of its place"


def test_a_draft_without_room_comes_back_as_it_is():
    lm = tiny.make_lm()
    head = len(render_prompt(lm.tokenizer, conversation(PROMPTS[0], "cat ")))
    fits, over = (said(PROMPTS[0], i, "cat " * (256 - 8 - head + 1 + i)) for i in (0, 1))
    lengths = [len(render_prompt(lm.tokenizer, conversation(PROMPTS[0], d.text))) for d in (fits, over)]
    assert lengths == [248, 249], "one token more than what leaves room for 8"
    made = improve(lm, PROMPTS, [over, fits, over], REQUEST, jax.random.key(0), **SETTINGS)
    assert [r.label for r in made] == ["TOO LONG", None, "TOO LONG"]
    assert made[0].response is over and made[1].response is not fits and made[1].response.token_ids
    assert [r.id for r in made] == [over.id, fits.id, over.id]


def test_nothing_fits():
    made = improve(tiny.make_lm(), PROMPTS, [said(PROMPTS[0], 0, "cat " * 300)], REQUEST, jax.random.key(0), **SETTINGS)
    assert [r.label for r in made] == ["TOO LONG"]


def test_a_draft_to_an_unknown_prompt_is_named():
    stranger = said(Prompt.of("q9", "x"), 0, "cat.")
    with pytest.raises(ValueError, match="'q9#0' answers prompt 'q9', not one of the 3 given"):
        improve(tiny.make_lm(), PROMPTS, [stranger], REQUEST, jax.random.key(0), **SETTINGS)


def scored(sign: float):
    lm = with_scalar_head(tiny.make_lm(seed=1))
    head = sign * np.random.default_rng(0).normal(size=lm.config.embed_dim).astype(np.float32)
    return lm.replace(lm.weights | {"score": jax.device_put(head, lm.weights["score"].sharding)})


def gap(lm, prompt: Prompt, response: str, reference: str) -> float:
    """The definition: the head on the last hidden state of the improver's conversation and a response."""
    head = render_prompt(lm.tokenizer, conversation(prompt, reference))
    tokens = np.asarray([[*head, *render_response(lm.tokenizer, response)]], np.int32)
    return float(decoder.hidden_states(lm.weights, lm.config, tokens)[0, -1] @ lm.weights["score"])


def test_a_response_is_accepted_where_it_gains():
    lm, texts = scored(1.0), ["axe red cat.", "axe red", "cat cat.", "Sure thing: axe.", "axe."]
    drafts = [said(PROMPTS[0], i, "cat red.") for i in range(5)]
    improved = [said(PROMPTS[0], 10 + i, text) for i, text in enumerate(texts)]
    gains = [gap(lm, PROMPTS[0], text, "cat red.") - gap(lm, PROMPTS[0], "cat red.", "cat red.") for text in texts]
    assert min(gains) < -0.01 and max(gains) > 0.01, "some gain and some lose"
    assert accepted(lm, PROMPTS, drafts, improved, REQUEST) == [gain > 0 for gain in gains]
    assert accepted(scored(-1.0), PROMPTS, drafts, improved, REQUEST) == [gain < 0 for gain in gains]
    middle = float(np.median([gain for gain in gains if gain > 0]))
    over = accepted(lm, PROMPTS, drafts, improved, REQUEST, delta=middle - 1e-3, batch_size=2)
    assert over == [gain > middle - 1e-3 for gain in gains]
    assert not any(accepted(lm, PROMPTS, drafts, improved, REQUEST, delta=max(gains) + 1.0))


def test_an_unchanged_draft_is_no_gain():
    drafts = [said(prompt, 0, "axe.") for prompt in PROMPTS]
    assert accepted(scored(1.0), PROMPTS, drafts, drafts, REQUEST) == [False] * 3
    assert accepted(scored(1.0), PROMPTS, drafts, drafts, REQUEST, delta=-0.5) == [True] * 3
    with pytest.raises(ValueError):
        accepted(scored(1.0), PROMPTS, drafts, drafts[:2], REQUEST)
