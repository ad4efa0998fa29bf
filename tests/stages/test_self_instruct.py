"""Self-instruct with recorded replies: waves, draws, filters in order, counts, bounds."""

from collections import Counter
from types import SimpleNamespace

import jax
import pytest

from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response
from jaxsi.sampling import generate
from jaxsi.stages import self_instruct
from jaxsi.stages.prompts.few_shot import load_few_shot
from jaxsi.stages.self_instruct import InstructError, SelfInstruct, new_prompts
from jaxsi.text.tokenizer import Tokenizer

KEY = jax.random.key(7)
SEEDS = [Prompt.of(f"seed{i}", f"seed number {i} asks about {w}") for i, w in enumerate("abcdefghij")]
HEAD, TAIL = load_few_shot().template.split("{examples}")
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


UNMARKED = ("", "Here is a new task:", "This line was cut off by the li")


def replies(monkeypatch, give, finish=lambda text: "stop"):
    """Makes `generate` reply with the task give(wave, i, request text); returns the requests of each wave. The marks of
    a task are put around it, except around those that are UNMARKED."""
    rounds = []

    def fake_generate(lm, prompts, *, num_samples, temperature, top_p, max_new_tokens, key, batch_size):
        rounds.append(list(prompts))
        found = []
        for prompt in prompts:
            _, number, i = prompt.id.rsplit("/", 2)
            task = give(int(number), int(i), prompt.text)
            text = task if task in UNMARKED else f"<task>\n{task}\n</task>"
            found.append(
                Response(
                    id=f"{prompt.id}#0",
                    prompt_id=prompt.id,
                    sample=0,
                    text=text,
                    token_ids=(1,),
                    logps=(0.0,),
                    finish_reason=finish(task),
                    fingerprint="weights",
                    template="template",
                )
            )
        return found[::-1]

    monkeypatch.setattr(generate, "generate", fake_generate)
    return rounds


def shots(request):
    assert request.text.startswith(HEAD) and request.text.endswith(TAIL)
    shown = request.text.removeprefix(HEAD).removesuffix(TAIL)
    return [task.split("<task>\n")[1].strip() for task in shown.split("</task>") if task.strip()]


SEED_TEXTS = {prompt.text for prompt in SEEDS}


def test_ids_texts_and_shots(lm, monkeypatch):
    # Half of the replies of the first wave cannot be parsed.
    waves = replies(monkeypatch, lambda number, i, _: "" if number == 0 and i % 2 else DISTINCT[50 * number + i])
    counts = Counter()
    found = new_prompts(lm, SEEDS, SelfInstruct(num_prompts=10, batch_size=32), KEY, prefix="iter2", counts=counts)
    assert [p.id for p in found] == [f"iter2-{i:06d}" for i in range(10)]
    assert [p.text for p in found] == [DISTINCT[i] for i in (0, 2, *range(50, 58))]
    for request in waves[0]:
        assert len(set(shots(request))) == 8 and set(shots(request)) <= SEED_TEXTS
    for request in waves[1]:
        shown = set(shots(request))
        assert len(shown & SEED_TEXTS) == 6 and shown >= {DISTINCT[0], DISTINCT[2]} and len(shown) == 8
    assert len({request.text for request in waves[0]}) == len(waves[0])
    assert [len(requests) for requests in waves] == [4, 16]
    assert counts == Counter(
        requests=20, waves=2, kept=10, unparsable=2, surplus=8, few_generated_shots=4, too_long_request=0
    )


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(8, [1, 4, 16, 32, 32, 16]), (32, [4, 16, 64, 32]), (200, [25, 100]), (1, [1] + [4] * 25)],
)
def test_waves_grow_so_that_few_requests_show_no_generated_prompt(lm, monkeypatch, batch_size, sizes):
    """All requests were made at once, before any prompt was kept: 400 of 634 showed seeds alone."""
    made = iter(DISTINCT)
    waves = replies(monkeypatch, lambda *_: next(made))
    counts = Counter()
    cfg = SelfInstruct(num_prompts=101, batch_size=batch_size)
    assert len(new_prompts(lm, SEEDS, cfg, KEY, counts=counts)) == 101
    assert [len(requests) for requests in waves] == sizes
    few = [request for requests in waves for request in requests if len(set(shots(request)) - SEED_TEXTS) < 2]
    assert counts["few_generated_shots"] == len(few) <= max(sizes[0], 5) and counts["requests"] == sum(sizes)


def test_prompts_of_earlier_iterations_are_shown_and_may_not_come_back(lm, monkeypatch):
    earlier = ["Earlier prompt number one is here", "Quite another one that came before"]
    near = "Earlier prompt number two is here"  # 5 of 6 words
    waves = replies(monkeypatch, lambda number, i, _: [earlier[0], near, *DISTINCT][i])
    counts = Counter()
    cfg = SelfInstruct(num_prompts=2, batch_size=4)
    found = new_prompts(lm, SEEDS, cfg, KEY, earlier=earlier, counts=counts)
    assert [p.text for p in found] == DISTINCT[:2]
    assert all(set(earlier) <= set(shots(request)) for request in waves[0])
    assert counts["few_generated_shots"] == 0 and (counts["duplicate"], counts["similar"]) == (1, 1)


def test_prompts_like_held_out_ones_are_dropped(lm, monkeypatch):
    """One with a ROUGE-L of 0.92 to a held-out prompt was kept: only the same text was dropped."""
    held_out = "Tell me what the tallest mountain in all of South America is called"
    near = held_out.replace("tallest", "highest")
    assert self_instruct.rouge_l([near], [held_out])[0, 0] == pytest.approx(0.92, abs=0.005)
    waves = replies(monkeypatch, lambda number, i, _: [near, held_out.upper(), DISTINCT[0], DISTINCT[1]][i])
    counts = Counter()
    cfg = SelfInstruct(num_prompts=2, batch_size=32, max_rounds=2)
    found = new_prompts(lm, SEEDS, cfg, KEY, held_out=[held_out], counts=counts)
    assert [p.text for p in found] == DISTINCT[:2]
    assert (counts["held_out"], counts["duplicate"]) == (1, 1)
    assert not any(held_out in request.text for requests in waves for request in requests)


def test_draws_depend_on_the_key_only(lm, monkeypatch):

    def give(number, i, _):
        return DISTINCT[i]

    cfg = SelfInstruct(num_prompts=6)
    texts = []
    for seeds, key in [(SEEDS, KEY), (SEEDS[::-1], KEY), (SEEDS, jax.random.key(8))]:
        waves = replies(monkeypatch, give)
        new_prompts(lm, seeds, cfg, key)
        texts.append([request.text for request in waves[0]])
    assert texts[0] == texts[1] and texts[0] != texts[2]


def test_filters_and_their_counts(lm, monkeypatch):
    code = "Fix the bug in this function:\n\ndef f(x):\n    return x +"
    given_texts = [
        "Explain why the sky looks blue",
        "",
        "Too short",
        "word " * 151,
        "Describe the picture of a dog here",
        "Profile the graphics of older computer games",  # "file" and "graph" inside words do not count
        "write a PROGRAM that adds two numbers",
        '"To be or not to be" was written by whom?',
        "Écris un poème sur la pluie d'été",
        "explain   WHY the sky looks blue",
        "Seed number 3 asks about D",
        "This text was held out before",
        "Explain why the sky looks very blue",
        "Seed number 77 asks about d",
        "Here is a new task:",
        "This line was cut off by the li",
        code,
    ]
    replies(monkeypatch, lambda number, i, _: given_texts[i], lambda text: "length" if "cut off" in text else "stop")
    counts = Counter()
    cfg = SelfInstruct(num_prompts=17, max_rounds=1, batch_size=200)
    held_out = ["this text was held out before"]
    found = new_prompts(lm, SEEDS, cfg, KEY, held_out=held_out, counts=counts)
    assert [p.text for p in found] == [given_texts[0], given_texts[5], code]
    reasons = {"unparsable": 2, "length": 2, "blacklist": 1, "duplicate": 3, "similar": 2, "cut_off": 1}
    reasons |= {"banned_start": 1, "punctuation_first": 1, "non_ascii_first": 1}
    assert {name: counts[name] for name in reasons} == reasons
    assert sum(reasons.values()) + counts["kept"] == counts["requests"] == 17
    cfg = SelfInstruct(
        num_prompts=17, max_rounds=1, batch_size=200, banned_starts=(), punctuation_first=True, non_ascii_first=True
    )
    found = new_prompts(lm, SEEDS, cfg, KEY, held_out=held_out, counts=counts)
    assert [p.text for p in found] == [given_texts[0], *given_texts[5:9], code]


def test_threshold_is_exclusive(lm, monkeypatch):
    # 7 of 10 words in common with an earlier one: F = 0.7 exactly.
    first, second = "a b c d e f g h i j", "a b c d e f g x y z"
    replies(monkeypatch, lambda number, i, _: [first, second][i])
    cfg = SelfInstruct(num_prompts=2, max_rounds=1)
    assert [p.text for p in new_prompts(lm, SEEDS, cfg, KEY)] == [first]
    looser = SelfInstruct(num_prompts=2, max_rounds=1, rouge_threshold=0.71)
    assert [p.text for p in new_prompts(lm, SEEDS, looser, KEY)] == [first, second]


def test_requests_are_limited_and_no_new_prompt_is_an_error(lm, monkeypatch):
    waves = replies(monkeypatch, lambda *_: "the same short text again")
    counts = Counter()
    cfg = SelfInstruct(num_prompts=5, max_rounds=3)
    assert len(new_prompts(lm, SEEDS, cfg, KEY, counts=counts)) == 1
    assert [len(requests) for requests in waves] == [8, 7] and counts["requests"] == 15
    assert counts["duplicate"] == 14
    with pytest.raises(InstructError, match=r"kept 0 of 5 prompts in 15 requests .*duplicate"):
        new_prompts(lm, SEEDS, cfg, KEY, held_out=["The same short text again"])


def test_requests_that_do_not_fit_are_counted(lm, monkeypatch):
    lm.config.max_positions = 150
    waves = replies(monkeypatch, lambda *_: "")
    with pytest.raises(InstructError, match="too_long_request 6"):
        new_prompts(lm, SEEDS, SelfInstruct(num_prompts=2, max_rounds=2), KEY, counts=Counter(too_long_request=2))
    assert waves == []


def test_all_seeds_are_shown_if_there_are_few(lm, monkeypatch):
    waves = replies(monkeypatch, lambda number, i, _: DISTINCT[i])
    new_prompts(lm, SEEDS[:3], SelfInstruct(num_prompts=1), KEY)
    assert sorted(shots(waves[0][0])) == sorted(p.text for p in SEEDS[:3])
    with pytest.raises(ValueError, match="0 seeds"):
        new_prompts(lm, [], SelfInstruct(num_prompts=1), KEY)


@pytest.mark.parametrize(
    "fields",
    [{"num_prompts": 0}, {"num_seed_shots": 0}, {"max_rounds": 0}, {"max_words": 2}, {"rouge_threshold": 0.0}],
)
def test_config_rejects_settings_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SelfInstruct(**({"num_prompts": 1} | fields))
