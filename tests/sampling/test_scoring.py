"""Scores: equal to the plain softmax, and independent of the rest of the batch."""

import jax
import numpy as np
import pytest

import tiny
from jaxsi.model import decoder
from jaxsi.runs.records import Prompt
from jaxsi.sampling import scoring
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.training.batches import encode
from jaxsi.training.packing import packed, padded

RNG = np.random.default_rng(0)
PREFIXES = [RNG.integers(6, tiny.ENTRIES, n).tolist() for n in (1, 3, 9, 14, 5, 2)]
CONTINUATIONS = [RNG.integers(6, tiny.ENTRIES, n).tolist() for n in (12, 1, 4, 17, 7, 0)]


@pytest.fixture(scope="module")
def scored() -> list[np.ndarray]:
    return scoring.score_ids(tiny.make_lm(), PREFIXES, CONTINUATIONS)


def test_scores_equal_the_plain_softmax(scored: list[np.ndarray]) -> None:
    lm = tiny.make_lm()
    for prefix, continuation, logps in zip(PREFIXES, CONTINUATIONS, scored, strict=True):
        row = np.zeros((1, 32), np.int32)  # one shape for all; later tokens have no influence
        row[0, : len(prefix) + len(continuation)] = prefix + continuation
        logits = np.asarray(lm.logits(row), np.float64)[0]
        logits -= logits.max(-1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [table[len(prefix) + i - 1, token] for i, token in enumerate(continuation)]
        assert logps.dtype == np.float32 and logps.shape == (len(continuation),)
        np.testing.assert_allclose(logps, expected, atol=1e-4, rtol=1e-5)


def test_scores_do_not_depend_on_other_rows_order_or_length(scored: list[np.ndarray]) -> None:
    lm = tiny.make_lm()
    order = [3, 5, 0, 2, 4, 1]
    shuffled = scoring.score_ids(lm, [PREFIXES[i] for i in order], [CONTINUATIONS[i] for i in order], batch_size=32)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(shuffled[place], scored[i])  # the same program, so equal bit for bit
    alone = scoring.score_ids(lm, PREFIXES, CONTINUATIONS, batch_size=2)  # other rows beside it, other shapes
    longer = scoring.score_ids(lm, [*PREFIXES, [7] * 40], [*CONTINUATIONS, [8] * 20])[:-1]  # the bucket of 64
    for other in (alone, longer):
        assert max(np.abs(a - b).max() for a, b in zip(other[:5], scored[:5], strict=True)) < 1e-5


def test_packed_padded_and_alone_agree(scored: list[np.ndarray]) -> None:
    sequences = [encode(p, c) for p, c in zip(PREFIXES[:5], CONTINUATIONS[:5], strict=True)]
    lm = tiny.make_lm()
    program = jax.jit(
        lambda weights, batch: decoder.sequence_logps(
            weights, lm.config, batch.tokens_BT, batch.positions_BT, batch.segments_BT, dtype=np.float32
        )
    )
    rows_by_layout: dict[str, list[float]] = {}
    arranged = {
        "packed": packed(sequences, [range(5)], 64, 8, lm.mesh),
        "padded": padded(sequences, [range(5)], 64, 8, lm.mesh),
    }
    for name, (batches, _) in arranged.items():
        batch = batches[0]
        assert len(batches) == 1 and (np.asarray(batch.segments_BT).max() > 1) == (name == "packed")
        logps, tokens, segments = (
            np.asarray(x) for x in (program(lm.weights, batch), batch.tokens_BT, batch.segments_BT)
        )
        mask = tiny.counted(batch)
        for row, segment in {(r, segments[r, t]) for r, t in np.argwhere(segments > 0).tolist()}:
            places = (segments[row] == segment) & mask[row]
            i = next(i for i, c in enumerate(CONTINUATIONS[:5]) if c == tokens[row, places].tolist())
            np.testing.assert_allclose(logps[row, places], scored[i], atol=1e-5)
            rows_by_layout.setdefault(name, []).append(i)
    assert all(sorted(numbers) == [0, 1, 2, 3, 4] for numbers in rows_by_layout.values()) and len(rows_by_layout) == 2


def test_score_sums_over_records_and_texts() -> None:
    lm = tiny.make_lm()
    prompt = Prompt.of("a", "loop tree")
    ids = [50, 51, 52]  # not the encoding of its own text, and without an end of turn
    record = tiny.response(prompt, 0, ids, stopped=False)
    sums = scoring.score(lm, [prompt, "loop tree"], [record, "sun moon"])
    prefix = render_prompt(lm.tokenizer, prompt.messages)
    ended = render_response(lm.tokenizer, "sun moon")
    assert ended[-1] == lm.tokenizer.eos_id
    expected = scoring.score_ids(lm, [prefix, prefix], [ids, ended])
    assert sums.dtype == np.float32
    np.testing.assert_allclose(sums, [e.sum() for e in expected], rtol=1e-6)
    assert scoring.score(lm, [], []).shape == (0,)


@pytest.mark.parametrize(
    ("prefixes", "continuations", "message"),
    [
        ([[1]], [[2], [3]], "1 prefixes and 2 continuations"),
        ([[]], [[2]], "a prefix of 0 tokens"),
        ([[1] * 200], [[2] * 57], "a text of 257: .* at most 256"),
    ],
)
def test_wrong_lengths_are_refused(prefixes: list, continuations: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scoring.score_ids(tiny.make_lm(), prefixes, continuations)


def test_scoring_never_builds_an_array_of_all_logits() -> None:
    """The largest buffer of logits is a tile, even if [B, T, V] would be many times that size."""
    lm = tiny.make_lm()
    B, T = 128, 512
    tokens = jax.ShapeDtypeStruct((B, T), np.int32)
    lengths = jax.ShapeDtypeStruct((B,), np.int32)
    lowered = scoring.score_batch.lower(
        lm.weights, tokens, lengths, config=lm.config, dtype=np.dtype("float32"), mesh=lm.mesh
    )
    text = lowered.as_text()
    assert f"{B}x{T}x{tiny.ENTRIES}xf32" not in text and f"x{tiny.ENTRIES}xf32" in text


@pytest.mark.parametrize("longest", [1, 3])
def test_choices_get_the_same_scores_as_single_continuations(longest: int) -> None:
    lm = tiny.make_lm()
    rng = np.random.default_rng(0)

    def draw(n: int) -> list[int]:
        return rng.integers(6, tiny.ENTRIES, n).tolist()

    prefixes = [draw(n) for n in (3, 20, 7, 40, 9)]
    choices = [[draw(rng.integers(1, longest + 1)) for _ in range(4)] for _ in prefixes]
    logps = scoring.score_choices(lm, prefixes, choices, batch_size=2)
    flat = [prefix for prefix in prefixes for _ in range(4)]
    alone = scoring.score_continuations(lm, flat, [end for ends in choices for end in ends])
    np.testing.assert_allclose(logps, alone.reshape(5, 4), atol=1e-5)


def test_prefixes_with_different_numbers_of_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="give the same number to each"):
        scoring.score_choices(tiny.make_lm(), [[1], [2]], [[[3]], [[3], [4]]])
