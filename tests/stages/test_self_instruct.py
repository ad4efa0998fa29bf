"""Self-instruct with recorded replies: draws, filters in order, counts, bounds; ROUGE-L against a table by hand."""

import math
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response
from jaxsi.sampling import generate
from jaxsi.stages import self_instruct
from jaxsi.stages.prompts import load_template
from jaxsi.stages.self_instruct import InstructError, SelfInstruct, new_prompts, rouge_l
from jaxsi.text.tokenizer import Tokenizer

KEY = jax.random.key(7)
SEEDS = [Prompt.of(f"seed{i}", f"seed number {i} asks about {w}") for i, w in enumerate("abcdefghij")]
HEAD = load_template("self_instruct").split("{examples}")[0]
# Texts that share no two words, so that ROUGE-L keeps them all.
DISTINCT = [" ".join(f"{word}{i}" for word in ("alpha", "beta", "gamma", "delta")) for i in range(200)]


class CharTokenizer(Tokenizer):
    def __init__(self):
        self.template_hash = "template"

    def encode_text(self, text):
        return [ord(c) for c in text]


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.setattr(
        self_instruct, "render_prompt", lambda tokenizer, messages: tokenizer.encode_text(messages[0]["content"])
    )
    lm = object.__new__(LM)
    lm.__dict__.update(config=SimpleNamespace(max_positions=2000), tokenizer=CharTokenizer(), fingerprint="weights")
    return lm


def replies(monkeypatch, give, finish=lambda text: "stop"):
    """Makes `generate` reply give(round, i, request text); returns the requests of each round."""
    rounds = []

    def fake_generate(lm, prompts, *, num_samples, temperature, top_p, max_new_tokens, key, batch_size):
        rounds.append(list(prompts))
        found = []
        for prompt in prompts:
            _, number, i = prompt.id.rsplit("/", 2)
            text = give(int(number), int(i), prompt.text)
            found.append(
                Response(
                    id=f"{prompt.id}#0",
                    prompt_id=prompt.id,
                    sample=0,
                    text=text,
                    token_ids=(1,),
                    logps=(0.0,),
                    finish_reason=finish(text),
                    fingerprint="weights",
                    template="template",
                )
            )
        return found[::-1]

    monkeypatch.setattr(generate, "generate", fake_generate)
    return rounds


def shots(request):
    assert request.text.startswith(HEAD)
    return [line.removeprefix("- ") for line in request.text.removeprefix(HEAD).splitlines()]


@pytest.mark.parametrize(("batch_size", "second"), [(1, 10), (16, 16), (64, 20)])
def test_ids_texts_and_shots(lm, monkeypatch, batch_size, second):
    # Half of the replies of round 0 cannot be parsed, so a second round shows what the first has kept: it asks for the
    # 10 that are needed, or as many as run at a time, or twice all.
    rounds = replies(
        monkeypatch, lambda number, i, _: "" if number == 0 and i % 2 else f"- {DISTINCT[100 * number + i]}\nmore"
    )
    counts = Counter()
    cfg = SelfInstruct(num_prompts=10, batch_size=batch_size)
    found = new_prompts(lm, SEEDS, cfg, KEY, prefix="iter2", counts=counts)
    assert [p.id for p in found] == [f"iter2-{i:06d}" for i in range(10)]
    assert [p.text for p in found] == DISTINCT[0:10:2] + DISTINCT[100:105]
    seeds, first = {p.text for p in SEEDS}, {p.text for p in found[:5]}
    for request in rounds[0]:
        assert len(set(shots(request))) == 8 and set(shots(request)) <= seeds
    for request in rounds[1]:
        shown = set(shots(request))
        assert len(shown & seeds) == 6 and len(shown & first) == 2 and len(shown) == 8
    assert len({request.text for request in rounds[0]}) == len(rounds[0])
    assert counts == Counter(
        requests=10 + second, rounds=2, kept=10, unparsable=5, surplus=second - 5, similar=0, too_long_request=0
    )


def test_draws_depend_on_the_key_only(lm, monkeypatch):

    def give(number, i, _):
        return DISTINCT[i]

    cfg = SelfInstruct(num_prompts=6)
    texts = []
    for seeds, key in [(SEEDS, KEY), (SEEDS[::-1], KEY), (SEEDS, jax.random.key(8))]:
        rounds = replies(monkeypatch, give)
        new_prompts(lm, seeds, cfg, key)
        texts.append([request.text for request in rounds[0]])
    assert texts[0] == texts[1] and texts[0] != texts[2]


def test_filters_and_their_counts(lm, monkeypatch):
    given_texts = [
        "Explain why the sky looks blue",
        "",
        "Too short",
        "word " * 151,
        "Describe the picture of a dog here",
        "Profile the graphics of older computer games",  # "file" and "graph" inside words do not count
        "explain   WHY the sky looks blue",
        "Seed number 3 asks about D",
        "This text was held out before",
        "Explain why the sky looks very blue",
        "Seed number 77 asks about d",
        "This line was cut off by the li",
        "This line is whole but the next\nis cut",
    ]
    cut = set(given_texts[-2:])
    replies(monkeypatch, lambda number, i, _: given_texts[i], lambda text: "length" if text in cut else "stop")
    counts = Counter()
    cfg = SelfInstruct(num_prompts=13, max_rounds=1)
    exclude = frozenset({"this text was held out before"})
    found = new_prompts(lm, SEEDS, cfg, KEY, exclude, counts=counts)
    assert [p.text for p in found] == [given_texts[0], given_texts[5], "This line is whole but the next"]
    reasons = {"unparsable": 1, "length": 2, "blacklist": 1, "duplicate": 3, "similar": 2, "cut_off": 1}
    assert {name: counts[name] for name in reasons} == reasons
    assert sum(reasons.values()) + counts["kept"] == counts["requests"] == 13


def test_threshold_is_exclusive(lm, monkeypatch):
    # 7 of 10 words in common with an earlier one: F = 0.7 exactly.
    first, second = "a b c d e f g h i j", "a b c d e f g x y z"
    replies(monkeypatch, lambda number, i, _: [first, second][i])
    cfg = SelfInstruct(num_prompts=2, max_rounds=1)
    assert [p.text for p in new_prompts(lm, SEEDS, cfg, KEY)] == [first]
    looser = SelfInstruct(num_prompts=2, max_rounds=1, rouge_threshold=0.71)
    assert [p.text for p in new_prompts(lm, SEEDS, looser, KEY)] == [first, second]


def test_rounds_are_limited_and_no_new_prompt_is_an_error(lm, monkeypatch):
    rounds = replies(monkeypatch, lambda *_: "the same short text again")
    counts = Counter()
    cfg = SelfInstruct(num_prompts=5, max_rounds=3)
    assert len(new_prompts(lm, SEEDS, cfg, KEY, counts=counts)) == 1
    assert len(rounds) == 3 and counts["duplicate"] == counts["requests"] - 1
    assert all(len(requests) <= 10 for requests in rounds)
    with pytest.raises(InstructError, match=r"kept 0 of 5 prompts in 3 rounds .*duplicate"):
        new_prompts(lm, SEEDS, cfg, KEY, frozenset({"The same short text again"}))


def test_requests_that_do_not_fit_are_counted(lm, monkeypatch):
    lm.config.max_positions = 150
    rounds = replies(monkeypatch, lambda *_: "")
    with pytest.raises(InstructError, match="too_long_request 8"):
        new_prompts(lm, SEEDS, SelfInstruct(num_prompts=2, max_rounds=2), KEY, counts=Counter(too_long_request=2))
    assert rounds == []


def test_all_seeds_are_shown_if_there_are_few(lm, monkeypatch):
    rounds = replies(monkeypatch, lambda number, i, _: DISTINCT[i])
    new_prompts(lm, SEEDS[:3], SelfInstruct(num_prompts=1), KEY)
    assert sorted(shots(rounds[0][0])) == sorted(p.text for p in SEEDS[:3])
    with pytest.raises(ValueError, match="0 seeds"):
        new_prompts(lm, [], SelfInstruct(num_prompts=1), KEY)


@pytest.mark.parametrize(
    "fields",
    [{"num_prompts": 0}, {"num_seed_shots": 0}, {"max_rounds": 0}, {"max_words": 2}, {"rouge_threshold": 0.0}],
)
def test_config_rejects_settings_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SelfInstruct(**({"num_prompts": 1} | fields))


def by_hand(a, b):
    """F-measure of the longest common subsequence by its textbook table."""
    a, b = a.split(), b.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


sentences = st.lists(st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sentences, sentences)
def test_rouge_l_matches_the_textbook_on_every_path(candidates, pool):
    expected = np.array([[by_hand(a, b) for b in pool] for a in candidates])
    for few in (0, math.inf):  # by tensorflow-text, in NumPy
        with mock.patch.object(self_instruct, "_FEW_PAIRS_OF_WORDS", few):
            found = rouge_l(candidates, pool)
        assert found.dtype == np.float32 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_scripts_without_spaces_have_a_word_in_each_character():
    near = rouge_l(["写一首关于春天的诗"], ["写一首关于秋天的诗"])
    assert near[0, 0] == pytest.approx(8 / 9, abs=1e-5)
    assert rouge_l(["写一首诗"], ["解释重力"])[0, 0] == 0
    assert rouge_l(["วันนี้"], ["วันนี้"])[0, 0] == 1
    texts = {"写一首关于春天的诗": 9, "Write 诗 now": 3, "two words": 2, "한국어 문장": 2}
    assert {text: self_instruct._word_count(text) for text in texts} == texts


@pytest.mark.parametrize("few", [0, math.inf], ids=["tensorflow", "numpy"])
def test_rouge_l_ignores_case_and_punctuation_and_batches(few, monkeypatch):
    monkeypatch.setattr(self_instruct, "_FEW_PAIRS_OF_WORDS", few)
    assert rouge_l(["Name THREE rivers!"], ["name three, rivers"]) == 1.0
    assert rouge_l([], ["a"]).shape == (0, 1) and rouge_l(["a"], []).shape == (1, 0)
    texts = [" ".join(f"w{(i * j) % 7}" for j in range(i % 9)) for i in range(40)]
    whole = rouge_l(texts, texts)
    monkeypatch.setattr(self_instruct, "_PAIRS_PER_CALL", 100)
    np.testing.assert_array_equal(rouge_l(texts, texts), whole)
