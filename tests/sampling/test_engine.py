"""The sampling engine: whatever it shares, refills or moves, each row gets the tokens of a plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jaxsi.lm import LM
from jaxsi.model import decoder
from jaxsi.sampling import engine, generate, prefixes
from jaxsi.sampling.token_sampling import sample_tokens, truncate

LIMIT, SAMPLES = 40, 3
STOPS = (15, 462, 99, 92, 127, 702, 314, 146)  # frequent with these weights: rows end after 1 to 40 tokens
RNG = np.random.default_rng(0)
RUBRIC = RNG.integers(10, 80, 40).tolist()
INSTRUCTION = [*RUBRIC, *RNG.integers(10, 80, 20).tolist()]
# Prompts that share nothing, a beginning, or a longer beginning; two are equal except for their keys.
PROMPTS = [RNG.integers(10, 80, n).tolist() for n in (1, 3, 20, 33)]
PROMPTS += [RUBRIC + RNG.integers(10, 80, n).tolist() for n in (1, 12)]
PROMPTS += [INSTRUCTION + RNG.integers(10, 80, n).tolist() for n in (1, 30, 7)]
PROMPTS += [PROMPTS[-1]]
KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))


@functools.cache
def settings(temperature: float, top_p: float, top_k: int) -> generate.Settings:
    return generate._settings(tiny.make_lm(), temperature, top_p, top_k, LIMIT, STOPS, ())


@functools.cache
def plain(temperature: float, top_p: float, top_k: int) -> list[list[list[int]]]:
    """The same responses, by one pass over the whole text for each token."""
    lm = tiny.make_lm()
    forward = jax.jit(lambda row, n: decoder.full_logits(lm.weights, lm.config, row[None], jnp.float32)[:, n - 1])
    sample = jax.jit(sample_tokens)

    def response(prompt: list[int], key: jax.Array) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < LIMIT and not set(tokens) & set(STOPS):
            text = prompt + tokens
            row = jnp.asarray([*text, *[0] * (160 - len(text))])
            token, _ = sample(
                forward(row, len(text)), key[None], jnp.asarray([len(tokens)]), settings(temperature, top_p, top_k)
            )
            tokens.append(int(token[0]))
        return tokens

    return [
        [response(p, jax.random.fold_in(key, n)) for n in range(SAMPLES)] for p, key in zip(PROMPTS, KEYS, strict=True)
    ]


def run(lm: LM, setting: tuple, batch_size: int) -> tuple[list[list[list[int]]], engine.Work]:
    results, work = engine.run(
        lm, PROMPTS, KEYS, settings(*setting), limit=LIMIT, num_samples=SAMPLES, batch_size=batch_size
    )
    for samples in results:
        for ids, logps, stopped in samples:
            assert len(ids) == len(logps) <= LIMIT and stopped == (ids[-1] in STOPS)
            assert not set(ids[:-1]) & set(STOPS)
    assert work.new_tokens == sum(len(ids) for samples in results for ids, _, _ in samples)
    return [[ids for ids, _, _ in samples] for samples in results], work


@pytest.mark.parametrize("setting", [(0.7, 0.9, 0), (0.0, 1.0, 0), (1.5, 1.0, 5)])
def test_slots_refills_and_shared_beginnings_do_not_change_a_token(setting, monkeypatch) -> None:
    """32 slots hold all rows of a wave; 8 slots are refilled all the time. A small ring has to grow. A small chunk
    divides the prompts. With few steps per program, the last rows move to other slots."""
    expected = plain(*setting)
    assert len({len(ids) for samples in expected for ids in samples}) > 5
    lm = tiny.make_lm()
    assert run(lm, setting, 32)[0] == expected
    monkeypatch.setattr(engine, "FIRST_RING", 16)
    monkeypatch.setattr(engine, "CHUNK", 16)
    monkeypatch.setattr(engine, "MOST_STEPS", 4)
    assert run(lm, setting, 8)[0] == expected


@pytest.mark.parametrize("mesh", ["2x2x2", "1x8x1"])
def test_mesh_does_not_change_a_token(mesh) -> None:
    setting = (0.7, 0.9, 0)
    assert run(tiny.make_lm(mesh), setting, 16)[0] == plain(*setting)


@pytest.mark.parametrize(("slots", "columns"), [(4, 128), (32, 72)])
def test_prompts_that_share_nothing_are_packed_into_rows(slots, columns, monkeypatch) -> None:
    """In rows of 72 columns, a slice of 64 from the start of the second prompt would run past the end."""
    setting, lm = (0.7, 0.9, 0), tiny.make_lm()
    monkeypatch.setattr(engine, "PACKED", columns)
    results, work = engine.run(
        lm, PROMPTS[:4], KEYS[:4], settings(*setting), limit=LIMIT, num_samples=SAMPLES, batch_size=slots
    )
    assert [[ids for ids, _, _ in samples] for samples in results] == plain(*setting)[:4]
    assert work.prefilled == 1 + 3 + 20 + 33


def test_watching_shows_every_token_as_it_comes_and_changes_none(monkeypatch) -> None:
    seen: dict[tuple[int, int], list[list[int]]] = {}

    def watch(prompt: int, sample: int, ids: list[int]) -> None:
        seen.setdefault((prompt, sample), []).append(list(ids))

    options = {"limit": LIMIT, "num_samples": SAMPLES, "batch_size": 8}
    results, _ = engine.run(tiny.make_lm(), PROMPTS, KEYS, settings(1.0, 1.0, 0), **options, watch=watch)
    assert [[ids for ids, _, _ in samples] for samples in results] == plain(1.0, 1.0, 0)
    for (prompt, sample), parts in seen.items():
        ids = results[prompt][sample][0]
        assert parts[-1] == ids and all(part == ids[: len(part)] for part in parts)
        growth = np.diff([0, *map(len, parts)])
        assert growth.max() <= engine.WATCHED_STEPS + 1  # the first token comes with the first steps
    assert len(seen) == len(PROMPTS) * SAMPLES


def test_first_fit() -> None:
    assert engine.first_fit([1, 3, 20, 33, 31], 64) == [(1, 23), (1, 20), (1, 0), (0, 0), (0, 33)]


@pytest.mark.parametrize(("n", "size"), [(1, 4), (7, 8), (8, 8), (9, 12), (17, 20), (33, 40), (64, 64), (65, 80)])
def test_fine_size_is_at_most_a_seventh_more(n, size) -> None:
    assert engine.fine_size(n) == size


def test_last_rows_continue_in_fewer_slots(monkeypatch) -> None:
    setting = (0.7, 0.9, 0)
    lm = tiny.make_lm()
    monkeypatch.setattr(engine, "MOST_STEPS", 4)
    expected, few = run(lm, setting, 32)
    monkeypatch.setattr(engine, "FEWEST", 32)
    again, many = run(lm, setting, 32)
    assert again == expected == plain(*setting)
    assert few.slot_steps < many.slot_steps


def test_shared_beginnings_are_computed_once() -> None:
    """The rubric and the instruction are computed once, for any number of samples. The last 7 tokens of the repeated
    prompt are computed twice: they are too few to share."""
    lm = tiny.make_lm()
    prompts = [tuple(p) for p in PROMPTS[4:]]
    _, work = engine.run(lm, prompts, KEYS[4:], settings(0.7, 0.9, 0), limit=2, num_samples=SAMPLES, batch_size=32)
    assert work.prompt_tokens == SAMPLES * sum(map(len, prompts))
    assert work.prefilled == 40 + 20 + 1 + 12 + 1 + 30 + 7 + 7


def test_tokens_are_the_same_without_sharing() -> None:
    setting, prompts = (0.7, 0.9, 0), PROMPTS[4:]
    options = {"limit": LIMIT, "num_samples": SAMPLES, "batch_size": 32, "group": prefixes.alone}
    results, work = engine.run(tiny.make_lm(), prompts, KEYS[4:], settings(*setting), **options)
    assert [[ids for ids, _, _ in samples] for samples in results] == plain(*setting)[4:]
    assert work.prefilled == sum(map(len, prompts))


def surprise(counts_V: np.ndarray, p_V: np.ndarray) -> float:
    """Chi-squared of the counts under the probabilities, in standard deviations from its mean.

    It is infinite if a token with probability 0 was drawn.
    """
    if counts_V[p_V == 0].any():
        return float("inf")
    expected = counts_V.sum() * p_V
    often = expected >= 5  # the other tokens are pooled
    a, b = (np.append(x[often], x[~often].sum()) for x in (counts_V, expected))
    chi, freedom = ((a - b)[b > 0] ** 2 / b[b > 0]).sum(), (b > 0).sum() - 1
    return float((chi - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("slots", [8, 64])
def test_bfloat16_draws_from_the_distribution_of_a_plain_pass(slots) -> None:
    """2,048 rows of two tokens, refilled all the time. The frequencies of the first token, and of the second after the
    likeliest first, fit the softmax of a whole pass, cut to the nucleus. That of another temperature does not fit."""
    lm, prompt, rows = tiny.make_lm(dtype="bfloat16"), PROMPTS[2], 2048
    setting = generate._settings(lm, 0.7, 0.9, 0, 2, (), ())
    results, _ = engine.run(lm, [prompt], KEYS[:1], setting, limit=2, num_samples=rows, batch_size=slots)
    responses = np.asarray([ids for ids, _, _ in results[0]])

    def nucleus(text: list[int], temperature: float) -> np.ndarray:
        logits_V = decoder.full_logits(lm.weights, lm.config, jnp.asarray([text]), jnp.dtype("bfloat16"))[0, -1]
        p_BV = truncate(jax.nn.softmax(logits_V / temperature)[None], jnp.float32(0.9), jnp.int32(0))
        return np.asarray(p_BV[0] / p_BV.sum(), np.float64)

    first = responses[:, 0]
    likeliest = int(np.bincount(first).argmax())
    second = responses[first == likeliest, 1]
    assert len(second) > 100
    for tokens, text in ((first, prompt), (second, [*prompt, likeliest])):
        counts_V = np.bincount(tokens, minlength=lm.config.vocab_size)
        assert surprise(counts_V, nucleus(text, 0.7)) < 4
        assert surprise(counts_V, nucleus(text, 0.6)) > 8


def test_empty_list_of_prompts_takes_no_work() -> None:
    options = {"limit": 4, "num_samples": 2, "batch_size": 8}
    assert engine.run(tiny.make_lm(), [], KEYS[:0], settings(0.7, 0.9, 0), **options) == ([], engine.Work())


def test_few_slot_steps_are_wasted_on_mixed_lengths() -> None:
    """64 rows go through 16 slots: at most a fifth of the steps come after the end of the slot's row."""
    lm, rng = tiny.make_lm(), np.random.default_rng(1)
    prompts = [rng.integers(10, 80, 8).tolist() for _ in range(64)]
    setting = generate._settings(lm, 1.0, 1.0, 0, 64, STOPS[:4], ())
    results, work = engine.run(
        lm, prompts, jax.random.split(jax.random.key(0), 64), setting, limit=64, num_samples=1, batch_size=16
    )
    assert len({len(ids) for samples in results for ids, _, _ in samples}) > 15
    decoded = work.new_tokens - len(prompts)  # the first token of each row comes with its prompt
    assert decoded > 0.8 * work.slot_steps
