"""Layers with a window keep a short cache in the slots, which does not change any token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jaxsi.model import decoder
from jaxsi.model.decoder import ModelConfig
from jaxsi.sampling import engine, generate, prefixes, slots
from jaxsi.sampling.token_sampling import sample_tokens
from tests.sampling.test_engine import KEYS, PROMPTS, SAMPLES

LIMIT = 100  # twelve turns of the ring of a window of 8; three turns of that of a window of 24, which has 32 columns
STOPS = (384, 98)  # rows end after 1 to 100 tokens
BASE = dataclasses.replace(tiny.CONFIG, num_layers=3, num_heads=8, num_kv_heads=8)
MIXED = dataclasses.replace(BASE, windows=(8, None, 24))
SHORT = dataclasses.replace(BASE, windows=(8, 8, 8))
LONG = dataclasses.replace(BASE, windows=(24, 24, 24))
SOME = [PROMPTS[i] for i in (2, 5, 7, 8)]  # 20, 52, 90 and 67 tokens; three share a beginning
UNRELATED = [*PROMPTS[:4], PROMPTS[7][40:]]  # 1, 3, 20, 33 and 50 tokens, which share nothing


@functools.cache
def settings(limit: int) -> generate.Settings:
    return generate._settings(tiny.make_lm(), 0.7, 0.9, 0, limit, STOPS, ())


@jax.jit
def draw(logits_TV: jax.Array, key: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token drawn after each token of a text whose first ``before`` tokens are the prompt."""
    T = logits_TV.shape[0]
    return sample_tokens(logits_TV, jnp.broadcast_to(key, (T,)), jnp.arange(T) - before + 1, settings(LIMIT))


def check(config: ModelConfig, prompts: list[list[int]], results: Any, limit: int = LIMIT) -> list[int]:
    """Checks every token and its logp against a pass over the whole text, without slots or cache.

    Returns the lengths of the responses.
    """
    lm = tiny.make_lm(config=config)
    assert len(results) == len(prompts)
    for prompt, key, samples in zip(prompts, KEYS[: len(prompts)], results, strict=True):
        assert len(samples) == SAMPLES
        for n, (tokens, logps, stopped) in enumerate(samples):
            assert stopped == (tokens[-1] in STOPS) and not set(tokens[:-1]) & set(STOPS)
            assert stopped or len(tokens) == limit
            text = [*prompt, *tokens]
            row = np.asarray([[*text, *[0] * (256 - len(text))]])
            logits_BTV = decoder.full_logits(lm.weights, config, row, jnp.float32)
            drawn_T, logps_T = draw(logits_BTV[0], jax.random.fold_in(key, n), jnp.int32(len(prompt)))
            response = slice(len(prompt) - 1, len(text) - 1)
            assert tokens == drawn_T[response].tolist()
            np.testing.assert_allclose(logps, logps_T[response], atol=2e-5)
    return [len(tokens) for samples in results for tokens, _, _ in samples]


def run(
    config: ModelConfig, mesh: str, size: int, prompts: list[list[int]] = PROMPTS, limit: int = LIMIT, **options: Any
) -> tuple[list[list[tuple[list[int], list[float], bool]]], engine.Work]:
    lm, keys = tiny.make_lm(mesh, config=config), KEYS[: len(prompts)]
    options |= {"limit": limit, "num_samples": SAMPLES, "batch_size": size}
    return engine.run(lm, prompts, keys, settings(limit), **options)


@pytest.fixture
def cramped(monkeypatch) -> list[tuple[int, ...]]:
    """Makes the ring grow, divides prompts into chunks, and limits a program to few steps.

    Returns a list that collects the columns of each layer at each decode.
    """
    monkeypatch.setattr(engine, "FIRST_RING", 16)
    monkeypatch.setattr(engine, "CHUNK", 16)
    monkeypatch.setattr(engine, "MOST_STEPS", 4)
    seen: list[tuple[int, ...]] = []

    def decode(weights: Any, held: slots.Slots, *arguments: Any, **options: Any) -> Any:
        seen.append(tuple(jax.tree.leaves(layer)[0].shape[2] for layer in held.cache))
        return slots.decode_slots(weights, held, *arguments, **options)

    monkeypatch.setattr(engine, "decode_slots", decode)
    return seen


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        (MIXED, (8 + 8, 16 + 64, 16 + 32), (8 + 8, 128 + 128, 32 + 32)),
        (SHORT, (8 + 8,) * 3, (8 + 8,) * 3),
        (LONG, (16 + 32,) * 3, (32 + 32,) * 3),
    ],
    ids=["mixed", "short", "long"],
)
def test_short_rings_and_the_ends_of_prompts_are_enough(config, first, last, cramped) -> None:
    """Prompts of 1 to 90 tokens share beginnings and are divided into chunks; three samples of each go through 8 slots
    that are refilled all the time. The ring of full attention grows three times, that of a window up to its size."""
    results, work = run(config, "1x1x1", 8)
    lengths = check(config, PROMPTS, results)
    assert max(lengths) == LIMIT and len(set(lengths)) > 5
    assert work.slot_steps > 8 * 4 * 32  # more than four turns of the longest ring of a window
    assert (cramped[0], cramped[-1]) == (first, last)


def test_these_tests_notice_a_wrong_window() -> None:
    """Without the window, or with one that is a token wider, the tokens differ."""
    wider = dataclasses.replace(MIXED, windows=(8, None, 25))
    runs = [run(config, "1x1x1", 30, UNRELATED)[0] for config in (MIXED, BASE, wider)]
    tokens = [[ids for samples in results for ids, _, _ in samples] for results in runs]
    assert tokens[0] != tokens[1] and tokens[0] != tokens[2]


@pytest.mark.parametrize("mesh", ["2x2x2", "1x1x8"])
def test_mesh_does_not_change_a_token(mesh, cramped) -> None:
    check(MIXED, SOME, run(MIXED, mesh, 8, SOME, limit=60)[0], limit=60)
    assert cramped[-1] == (8 + 8, 64 + 128, 32 + 32)


@pytest.mark.parametrize(("slots", "columns"), [(4, 128), (16, 72)])
def test_prompts_that_share_nothing_are_packed_into_rows(slots, columns, monkeypatch) -> None:
    """A prompt's last 8 or 32 columns begin in the middle of a row, behind another prompt."""
    monkeypatch.setattr(engine, "PACKED", columns)
    results, work = run(MIXED, "1x1x1", slots, UNRELATED)
    check(MIXED, UNRELATED, results)
    assert work.prefilled == sum(map(len, UNRELATED))


def test_int8_cache_is_short_as_well(cramped, monkeypatch) -> None:
    """The slot of a row does not change a token. Prompts go through in one chunk: later chunks read rounded keys."""
    monkeypatch.setattr(engine, "CHUNK", 512)
    few, many = (run(MIXED, "1x1x1", size, SOME, 40, cache="int8", group=prefixes.alone)[0] for size in (4, 12))
    assert [[ids for ids, _, _ in samples] for samples in few] == [[ids for ids, _, _ in samples] for samples in many]
    assert cramped[-1] == (8 + 8, 64 + 128, 32 + 32)
