"""Generation: responses follow the settings and depend only on the weights, the prompt and the key."""

import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import tiny
from jaxsi.lm import LM
from jaxsi.runs import run
from jaxsi.runs.records import Prompt
from jaxsi.sampling import engine, scoring, slots
from jaxsi.sampling.generate import (
    PromptTooLongError,
    SamplingConfig,
    SamplingError,
    _settings,
    bucket,
    generate,
    generate_ids,
    named_keys,
)
from jaxsi.text.chat import marker_ids

WORDS = ["loop", "tree", "sun moon", "loop tree sun moon", "tree tree"]
PROMPTS = [Prompt.of(f"q{i}", text) for i, text in enumerate(WORDS)]
IDS = [[1, 40 + i, 80 + i, *range(100, 100 + i)] for i in range(5)]
KEYS = [jax.random.key(i) for i in range(5)]


def tokens_of(lm: LM, **options: Any) -> list[list[list[int]]]:
    """Token ids by prompt and sample; without stop ids by default."""
    options = {
        "num_samples": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 12,
        "stop_ids": [],
        "batch_size": 16,
    } | options
    return [[ids for ids, _, _ in samples] for samples in generate_ids(lm, IDS, KEYS, **options)]


class Compilations:
    """Counts the compiled programs by name, inside a ``with`` block."""

    def __enter__(self) -> "Compilations":
        self.names: list[str] = []
        self._open = True
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def _hear(self, event: str, duration: float, **details: Any) -> None:
        if self._open and event.endswith("jaxpr_to_mlir_module_duration"):
            self.names.append(str(details.get("fun_name")))

    def __exit__(self, *exception: object) -> None:
        self._open = False  # listeners cannot be removed

    def count(self, function: str) -> int:
        return sum(function in name for name in self.names)


# ------------------------------------------------------------------------------------------------------------- settings


def test_greedy_takes_the_argmax_of_the_full_forward_pass() -> None:
    lm = tiny.make_lm()
    greedy = tokens_of(lm, temperature=0.0)
    for prompt, (first, second) in zip(IDS, greedy, strict=True):
        assert first == second and len(first) == 12
        row = np.zeros((1, 32), np.int32)
        row[0, : len(prompt) + 12] = prompt + first
        assert np.asarray(lm.logits(row))[0].argmax(-1)[len(prompt) - 1 : len(prompt) + 11].tolist() == first
    for same in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-4}, {"temperature": 0.0, "top_k": 5, "top_p": 0.5}):
        assert tokens_of(lm, **same) == greedy
    assert tokens_of(lm) != greedy


def test_new_settings_do_not_compile_again() -> None:
    lm = tiny.make_lm()
    tokens_of(lm)
    with Compilations() as compiled:
        for change in (
            {"temperature": 0.3},
            {"top_p": 0.5},
            {"top_k": 3},
            {"stop_ids": [5, 6]},
            {"max_new_tokens": 16},
        ):
            tokens_of(lm, **change)
        generate_ids(
            lm,
            IDS[::-1],
            KEYS,
            num_samples=2,
            max_new_tokens=3,
            batch_size=16,
            stop_ids=[9],
            temperature=0.0,
            top_p=0.2,
        )
    assert compiled.count("_slots") == compiled.count("_prompts") == 0, compiled.names
    with Compilations() as compiled:
        tokens_of(lm, max_new_tokens=17)  # the next bucket, which shows that compilations are counted
    assert compiled.count("decode_slots") == 1


def test_lower_limit_cuts_the_same_response() -> None:
    lm = tiny.make_lm()
    long, short = tokens_of(lm), tokens_of(lm, max_new_tokens=5)
    assert [[ids[:5] for ids in samples] for samples in long] == short
    one = generate_ids(lm, IDS[:1], KEYS[:1], num_samples=2, max_new_tokens=1, batch_size=16, stop_ids=[])
    assert [(len(ids), len(logps), stopped) for ids, logps, stopped in one[0]] == [(1, 1, False)] * 2


def test_each_row_ends_at_its_first_stop_id() -> None:
    lm = tiny.make_lm()
    free = tokens_of(lm)
    stops = [free[0][0][0], free[1][1][3], free[2][0][11]]  # at the first token, in the middle, at the very last
    options = {"num_samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "batch_size": 16}
    stopped = generate_ids(lm, IDS, KEYS, stop_ids=stops, **options)
    endings = set()
    for samples, unstopped in zip(stopped, free, strict=True):
        for (ids, logps, ended), whole in zip(samples, unstopped, strict=True):
            at = next((i for i, token in enumerate(whole) if token in stops), None)
            assert ids == (whole if at is None else whole[: at + 1]) and len(logps) == len(ids)
            assert ended == (at is not None)
            endings.add(len(ids))
    assert {1, 12} <= endings and len(endings) > 2


@pytest.mark.parametrize("length", [1, 2, 5])
def test_each_row_ends_at_the_marker(length: int) -> None:
    """The marker is a sequence that a row samples anyway: that row ends behind it, and no other token changes."""
    lm = tiny.make_lm()
    free = [
        ids
        for samples in generate_ids(lm, IDS, KEYS, num_samples=3, max_new_tokens=12, stop_ids=[])
        for ids, _, _ in samples
    ]
    marker = free[4][3 : 3 + length]

    def end(ids: list[int]) -> int | None:
        return next((i + length for i in range(len(ids) - length + 1) if ids[i : i + length] == marker), None)

    ended = [
        sample
        for samples in generate_ids(lm, IDS, KEYS, num_samples=3, max_new_tokens=12, stop_ids=[], marker=marker)
        for sample in samples
    ]
    assert end(free[4]) is not None and any(end(ids) is None for ids in free)
    for before, (ids, logps, stopped) in zip(free, ended, strict=True):
        assert ids == before[: end(before)] and stopped == (end(before) is not None) and len(logps) == len(ids)


def test_marker_ids_are_those_after_a_line_break() -> None:
    tokenizer = tiny.tokenizer()
    ids = marker_ids(tokenizer, "### Feedback")
    written = tokenizer.encode_text("cat red.\n### Feedback\nsun right")
    assert any(tuple(written[i : i + len(ids)]) == ids for i in range(len(written)))
    with pytest.raises(ValueError, match="choose another marker"):
        marker_ids(tokenizer, "")
    with pytest.raises(ValueError, match="has 33 tokens, but at most 32"):
        generate_ids(tiny.make_lm(), IDS[:1], KEYS[:1], max_new_tokens=4, marker=[5] * 33)


def test_absent_stop_text_does_not_change_the_response() -> None:
    lm = tiny.make_lm()
    free = generate(lm, PROMPTS[:1], max_new_tokens=8, temperature=0.0)[0]
    assert free.finish_reason == "length"
    ended = generate(lm, PROMPTS[:1], max_new_tokens=8, temperature=0.0, stop_text="nowhere to be found")[0]
    assert ended == free


# --------------------------------------------------------------------------------------- decode-time log-probabilities


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(0.6, 0.9, 0), (0.6, 1.0, 5), (1.0, 0.9, 5), (1.0, 1.0, 0), (0.0, 1.0, 0)],
)
def test_decoding_and_scoring_agree(temperature: float, top_p: float, top_k: int) -> None:
    """For responses that outgrow the first ring of the cache. Stored logps are untruncated, at temperature 1."""
    n = 96
    assert n > engine.FIRST_RING
    lm = tiny.make_lm()
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": n}
    samples = generate_ids(lm, IDS, KEYS, num_samples=2, stop_ids=[], batch_size=16, **options)
    flat = [(prompt, ids, logps) for prompt, pair in zip(IDS, samples, strict=True) for ids, logps, _ in pair]
    scored = scoring.score_ids(lm, [prompt for prompt, _, _ in flat], [ids for _, ids, _ in flat], batch_size=16)
    assert {len(ids) for _, ids, _ in flat} == {n}
    worst = max(np.abs(np.asarray(logps) - again).max() for (_, _, logps), again in zip(flat, scored, strict=True))
    assert worst < 1e-4
    assert min(min(logps) for _, _, logps in flat) < -0.5


def test_decoding_and_scoring_agree_on_average_in_bfloat16() -> None:
    lm = tiny.make_lm(dtype=jnp.bfloat16)
    samples = generate_ids(
        lm, IDS, KEYS, num_samples=2, temperature=1.0, top_p=1.0, max_new_tokens=40, stop_ids=[], batch_size=16
    )
    flat = [(prompt, ids, logps) for prompt, pair in zip(IDS, samples, strict=True) for ids, logps, _ in pair]
    scored = scoring.score_ids(lm, [prompt for prompt, _, _ in flat], [ids for _, ids, _ in flat], batch_size=16)
    gaps = np.concatenate(
        [np.abs(np.asarray(logps) - again) for (_, _, logps), again in zip(flat, scored, strict=True)]
    )
    assert np.exp(gaps).mean() < 1.05


# ------------------------------------------------------------------------------------------ what a response depends on


def test_responses_do_not_depend_on_the_batch() -> None:
    lm = tiny.make_lm()
    plain = generate(lm, PROMPTS, num_samples=2, max_new_tokens=12, batch_size=16, seed=1)
    assert [r.id for r in plain] == [f"q{i}#{n}" for i in range(5) for n in range(2)]
    by_id = {r.id: r for r in plain}
    shuffled = generate(
        lm, [PROMPTS[i] for i in (3, 0, 4, 1, 2)], num_samples=2, max_new_tokens=12, batch_size=16, seed=1
    )
    assert {r.id: r for r in shuffled} == by_id  # it is the same program, so the log-probabilities are equal too
    alone = {}  # one prompt per batch, with one more sample
    for p in PROMPTS:
        alone |= {r.id: r for r in generate(lm, [p], num_samples=3, max_new_tokens=12, batch_size=3, seed=1)}
    for r in plain:
        assert alone[r.id].token_ids == r.token_ids
        np.testing.assert_allclose(alone[r.id].logps, r.logps, atol=1e-4)


@pytest.mark.parametrize("mesh", ["2x2x2", "1x8x1"])
def test_responses_do_not_depend_on_the_mesh(mesh: str) -> None:
    options = {"num_samples": 2, "max_new_tokens": 12, "batch_size": 16, "seed": 1}
    here, there = generate(tiny.make_lm(), PROMPTS, **options), generate(tiny.make_lm(mesh), PROMPTS, **options)
    assert [r.token_ids for r in there] == [r.token_ids for r in here]
    assert [r.fingerprint for r in there] == [r.fingerprint for r in here]
    assert max(np.abs(np.subtract(a.logps, b.logps)).max() for a, b in zip(here, there, strict=True)) < 1e-4


def test_samples_prompts_and_seeds_differ() -> None:
    lm = tiny.make_lm()
    same_text = [Prompt.of(name, "loop") for name in ("a", "b")]
    responses = generate(lm, same_text, num_samples=4, temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=16)
    assert len({r.token_ids for r in responses}) == 8
    again = generate(lm, same_text, num_samples=4, temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=16)
    assert again == responses
    key = run.fold(jax.random.key(0), "iter_3", "candidates")
    later = generate(
        lm, same_text, num_samples=4, temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=16, key=key
    )
    assert not {r.token_ids for r in later} & {r.token_ids for r in responses}


def test_updated_model_samples_with_its_new_weights() -> None:
    """After an update, the cached sampling weights of the old model are not used, and nothing is compiled again."""
    lm = tiny.make_lm()
    before = generate(lm, PROMPTS, num_samples=2, max_new_tokens=12, batch_size=16)
    changed = jax.tree.map(lambda w: w * 1.1, lm.weights)
    with Compilations() as compiled:
        updated = lm.replace(changed)
        after = generate(updated, PROMPTS, num_samples=2, max_new_tokens=12, batch_size=16)
    assert compiled.count("_slots") == compiled.count("_prompts") == compiled.count("move") == 0
    fresh = LM(config=lm.config, weights=changed, tokenizer=lm.tokenizer, mesh=lm.mesh, dtype=lm.dtype)
    assert after == generate(fresh, PROMPTS, num_samples=2, max_new_tokens=12, batch_size=16)
    assert {r.fingerprint for r in after} == {fresh.fingerprint} != {r.fingerprint for r in before}
    assert [r.token_ids for r in after] != [r.token_ids for r in before]
    assert generate(lm, PROMPTS, num_samples=2, max_new_tokens=12, batch_size=16) == before


def test_records_tell_how_responses_ended() -> None:
    lm = tiny.make_lm()
    weights = jax.tree.map(lambda w: w, lm.weights)
    end = lm.tokenizer.eos_id
    # Makes the end of turn likely in some contexts, so that both endings occur.
    weights["lm_head"] = weights["lm_head"].at[:, end].multiply(3.0)
    responses = generate(lm.replace(weights), PROMPTS, num_samples=2, temperature=1.0, max_new_tokens=12, batch_size=16)
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for r in responses:
        assert len(r.logps) == len(r.token_ids) <= 12
        assert (r.token_ids[-1] == end) == (r.finish_reason == "stop")
        assert end not in r.token_ids[:-1]
        assert len(r.token_ids) == 12 or r.finish_reason == "stop"
        assert r.text == lm.tokenizer.decode(r.token_ids) and r.template == lm.tokenizer.template_hash


def test_named_keys_equal_those_of_fold_and_are_fast() -> None:
    key = jax.random.key(7)
    names = ["q1", "", "ключ", *(f"iter2/{i}" for i in range(4997))]
    named_keys(key, names)
    start = time.process_time()
    keys = jax.block_until_ready(named_keys(key, names))
    assert time.process_time() - start < 1.0
    assert keys.shape == (5000,)
    for i in (0, 1, 2, 3, 4999):
        assert (jax.random.key_data(keys[i]) == jax.random.key_data(run.fold(key, names[i]))).all()
    assert named_keys(key, []).shape == (0,)


# ------------------------------------------------------------------------------------------------------ limits, errors


def test_errors_name_the_value_and_the_fix() -> None:
    lm = tiny.make_lm()
    long = Prompt.of("far", "loop " * 240)
    with pytest.raises(PromptTooLongError, match=r"prompt 'far' has \d+ tokens and may take 32 more; .* 256 positions"):
        generate(lm, [*PROMPTS, long], max_new_tokens=32)
    with pytest.raises(PromptTooLongError, match="a prompt has 0 tokens"):
        generate_ids(lm, [[]], KEYS[:1])
    for wrong, message in (
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(lm, PROMPTS, **({"max_new_tokens": 12} | wrong))
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**wrong)
    with pytest.raises(ValueError, match="9 stop ids, but at most 8"):
        generate_ids(lm, IDS, KEYS, stop_ids=range(9), max_new_tokens=12)
    assert generate(lm, []) == [] and generate_ids(lm, [], []) == []


def test_max_new_tokens_counts_new_tokens_only() -> None:
    """A prompt longer than max_new_tokens still gets a response, up to the model's last position."""
    lm = tiny.make_lm()
    prompt = list(range(10, 254))
    (answer,) = generate_ids(lm, [prompt], KEYS[:1], max_new_tokens=12, stop_ids=[], batch_size=16, num_samples=2)
    assert [len(ids) for ids, _, _ in answer] == [12, 12]
    with pytest.raises(PromptTooLongError, match="a prompt has 245 tokens"):
        generate_ids(lm, [[*prompt, 9]], KEYS[:1], max_new_tokens=12)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_bucket_is_large_enough_and_wastes_less_than_half(n: int, smallest: int) -> None:
    size = bucket(n, smallest)
    assert size >= max(n, smallest) and (size == smallest or size < 2 * n)
    assert bucket(size, smallest) == size


def test_config_settings_are_arguments_of_generate() -> None:
    config = SamplingConfig(num_samples=2, max_new_tokens=3, batch_size=16)
    assert len(generate(tiny.make_lm(), PROMPTS[:1], **config.settings)) == 2


def test_compiled_program_never_calls_the_host() -> None:
    lm = tiny.make_lm()
    fixed = slots.Fixed(lm.config, lm.mesh, lm.dtype)
    held = slots.empty_slots(fixed=fixed, size=8, ring=16, prompt=32)
    settings = _settings(lm, 0.7, 0.9, 5, 12, [3], [7, 8])
    program = slots.decode_slots.lower(
        lm.sampling_weights, held, settings, np.int32(8), np.int32(1), fixed=fixed, ring=16
    ).compile()
    assert not re.findall(HOST_CALLS, program.as_text())


HOST_CALLS = r"(?i)infeed|outfeed|callback|send-done|recv-done|SendToHost|RecvFromHost"


def test_pattern_of_host_calls_finds_a_callback() -> None:
    def call(x: jax.Array) -> jax.Array:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), np.float32), x)

    assert re.findall(HOST_CALLS, jax.jit(call).lower(np.float32(1)).compile().as_text())


def test_logits_that_are_not_finite_are_an_error() -> None:
    lm = tiny.make_lm(dtype=jnp.float16)
    broken = lm.replace(lm.weights | {"final_norm": lm.weights["final_norm"].at[:].set(1e30)})
    with pytest.raises(SamplingError, match="logits are not finite in float16; sample in bfloat16 or float32"):
        generate(broken, ["cat"], max_new_tokens=4)
