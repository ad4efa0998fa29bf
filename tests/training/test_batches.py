"""From records to batches: their content, each row once an epoch, and batches that depend on their number alone."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tiny
from jaxsi.model import mesh as meshlib
from jaxsi.model.attention import SHARED
from jaxsi.runs.records import SFTExample
from jaxsi.training.batches import (
    Batches,
    DataError,
    PairBatch,
    Part,
    Sequence_,
    TokenBatch,
    encode,
    encode_example,
    encode_pair,
    groups,
    packed,
    padded,
    pairs,
    prompts_shared,
)

ANY_LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def sequences(lengths: list[int]) -> list[Sequence_]:
    """Sequence number i holds the tokens 100 i + 1, 100 i + 2, ..., so that each can be found again."""
    texts = []
    for i, length in enumerate(lengths):
        prompt = max(1, length // 3)
        ids = [100 * i + 1 + j for j in range(length)]
        texts.append(encode(ids[:prompt], ids[prompt:]))
    return texts


def rows_of(batches: Batches, chosen: list[int]) -> Any:
    """The whole batch of these rows, as NumPy."""
    return batches.collate(Part(chosen, 0, batches.batch_size))


def texts_of(batch: TokenBatch) -> list[tuple[list[int], list[bool]]]:
    """The sequences in a batch, separated by its segments."""
    found = []
    tokens, segments, masks = np.asarray(batch.tokens_BT), np.asarray(batch.segments_BT), tiny.counted(batch)
    for row in range(len(tokens)):
        for segment in sorted(set(segments[row]) - {0}):
            here = np.flatnonzero(segments[row] == segment)
            assert (np.diff(here) == 1).all(), "a segment is contiguous"
            np.testing.assert_array_equal(np.asarray(batch.positions_BT)[row, here], np.arange(len(here)))
            found.append((tokens[row, here].tolist(), masks[row, here].tolist()))
        assert not masks[row, segments[row] == 0].any(), "padding never counts"
    return found


# --------------------------------------------------------------------------------------------------------------
# encoding


def test_loss_counts_the_response_and_its_one_end_of_turn() -> None:
    tokenizer = tiny.tokenizer()
    example = SFTExample(id="a", messages=({"role": "user", "content": "loop tree"},), response="sun moon")
    tokens, mask = encode_example(tokenizer, example)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert tokenizer.decode(tokens[mask].tolist()) == "sun moon"
    assert tokens[-1] == tokenizer.eos_id and mask[-1]
    assert (tokens[mask] == tokenizer.eos_id).sum() == 1 and (tokens == tokenizer.bos_id).sum() == 1
    assert mask.tolist() == sorted(mask.tolist()), "the prompt, then the response"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, tiny.ENTRIES - 1), min_size=1, max_size=30))
def test_training_ids_are_the_sampled_ids(ids: list[int]) -> None:
    """Any ids come through unchanged and with nothing added, even if no text encodes to them or the end of turn is
    missing."""
    pair = tiny.preference_pairs(1)[0]
    pair = dataclasses.replace(pair, chosen=dataclasses.replace(pair.chosen, token_ids=tuple(ids)))
    chosen, rejected = encode_pair(tiny.tokenizer(), pair)
    assert chosen.tokens[chosen.loss_mask].tolist() == ids
    assert rejected.tokens[rejected.loss_mask].tolist() == list(pair.rejected.token_ids)
    np.testing.assert_array_equal(chosen.tokens[~chosen.loss_mask], rejected.tokens[~rejected.loss_mask])


def test_cut_off_response_gets_no_end_of_turn() -> None:
    tokenizer = tiny.tokenizer()
    cut_off = 0
    for pair in tiny.preference_pairs(6):
        for response, sequence in zip((pair.chosen, pair.rejected), encode_pair(tokenizer, pair), strict=True):
            ends = (sequence.tokens[sequence.loss_mask] == tokenizer.eos_id).sum()
            assert ends == (response.finish_reason == "stop")
            cut_off += response.finish_reason == "length"
    assert cut_off


def test_response_of_another_template_is_refused() -> None:
    pair = tiny.preference_pairs(1)[0]
    other = dataclasses.replace(pair, rejected=dataclasses.replace(pair.rejected, template="f" * 16))
    with pytest.raises(DataError, match=r"response 'p0#1' was sampled under chat template ffffffffffffffff"):
        encode_pair(tiny.tokenizer(), other)


@pytest.mark.parametrize(("prompt", "response"), [([], [1]), ([1], [])])
def test_empty_prompts_and_responses_are_refused(prompt: list[int], response: list[int]) -> None:
    with pytest.raises(DataError, match="both need at least 1"):
        encode(prompt, response)


# ------------------------------------------------------------------------------------------------- supervised batches


@settings(max_examples=25, deadline=None)
@given(ANY_LENGTHS, st.integers(0, 2**31), st.integers(1, 3))
def test_packed_rows_hold_every_sequence_once_an_epoch(lengths: list[int], seed: int, epochs: int) -> None:
    examples = sequences(lengths)
    batches = packed(examples, 40, 2, tiny.mesh(), epochs=epochs, seed=seed)
    collected = [rows_of(batches, [int(i) for i in np.atleast_1d(batches.plan[k])]) for k in range(len(batches))]
    found = [text for batch in collected for text in texts_of(batch)]
    expected = [(s.tokens.tolist(), s.loss_mask.tolist()) for s in examples] * epochs
    assert sorted(found) == sorted(expected)
    assert all(batch.tokens_BT.shape == (2, 40) for batch in collected)
    rows = sum((np.asarray(batch.segments_BT) > 0).any(axis=1).sum() for batch in collected)
    assert rows <= len(lengths) * epochs


def test_packing_fills_rows() -> None:
    batches = packed(sequences([10] * 32), 40, 2, tiny.mesh(), epochs=1, seed=0)
    assert len(batches) == 4 and all((np.asarray(batches[k].segments_BT) > 0).all() for k in range(4))


@settings(max_examples=25, deadline=None)
@given(ANY_LENGTHS, st.integers(0, 2**31), st.integers(1, 3))
def test_padded_rows_hold_every_sequence_once_an_epoch(lengths: list[int], seed: int, epochs: int) -> None:
    examples = sequences(lengths)
    batches = padded(examples, 40, 4, tiny.mesh(), epochs=epochs, seed=seed)
    per_epoch, rest = divmod(len(batches), epochs)
    assert not rest
    for epoch in range(epochs):
        plan = [batches.plan[k] for k in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        found = [text for rows in plan for text in texts_of(rows_of(batches, rows))]
        assert sorted(found) == sorted((s.tokens.tolist(), s.loss_mask.tolist()) for s in examples)


def test_sequence_longer_than_its_row_is_refused() -> None:
    for arrange in (packed, padded):
        with pytest.raises(DataError, match="a sequence has 41 tokens, a row 40"):
            arrange(sequences([10, 41]), 40, 2, tiny.mesh(), epochs=1, seed=0)


def test_batch_depends_on_its_number_alone() -> None:
    """Batch number i is the same in any reading order and in another process; epochs and seeds differ."""
    lengths = np.random.default_rng(0).integers(2, 40, 50).tolist()
    for arrange in (packed, padded):
        make = functools.partial(arrange, sequences(lengths), 40, 4, tiny.mesh(), epochs=2)
        one, other = make(seed=3), make(seed=3)
        backwards = {k: other[k] for k in reversed(range(len(other)))}
        for k in range(len(one)):
            assert tiny.max_difference(one[k], backwards[k]) == 0
        first, second = np.array_split([np.asarray(one[k].tokens_BT).tobytes() for k in range(len(one) // 2 * 2)], 2)
        assert first.tolist() != second.tolist(), "each epoch has its own order"
        assert first[0] != np.asarray(make(seed=4)[0].tokens_BT).tobytes()


def test_batches_are_laid_out_on_the_mesh() -> None:
    batch = packed(sequences([10] * 40), 40, 8, tiny.mesh("2x2x2"), epochs=1, seed=0)[0]
    assert {shard.data.shape for shard in batch.tokens_BT.addressable_shards} == {(2, 40)}
    assert isinstance(batch.tokens_BT, jax.Array) and batch.tokens_BT.dtype == np.int32


# ------------------------------------------------------------------------------------------------------------------
# pairs


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 2), st.booleans())
def test_pairs_come_once_an_epoch_with_their_own_reference(count: int, seed: int, epochs: int, shared: bool) -> None:
    encoded = [encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(count, longest=60)]
    refs = [(float(i), -float(i)) for i in range(count)]
    batches = pairs(encoded, refs, 4, tiny.mesh(), epochs=epochs, seed=seed, min_length=16, shared=shared)
    seen: list[int] = []
    for k in range(len(batches)):
        rows = [int(i) for i in np.atleast_1d(batches.plan[k])]
        batch = rows_of(batches, rows)
        assert batch.real_B.tolist() == [True] * len(rows) + [False] * (4 - len(rows))
        assert (batch.targets_B2R[len(rows) :] == -1).all() and not batch.segments_BST[len(rows) :].any()
        assert batch.tokens_BST.shape[1] == (1 if shared else 2)
        for place, i in enumerate(rows):
            np.testing.assert_array_equal(batch.ref_logps_B2[place], np.float32(refs[i]))
            for side in (0, 1):
                assert predictions(batch, place, side) == every_prediction(encoded[i][side])
        seen += rows
    assert sorted(seen) == sorted(list(range(count)) * epochs)


def predictions(batch: PairBatch, pair: int, side: int) -> list[tuple[list[int], int]]:
    """For each counted token of a response: the tokens that its prediction sees, by position, and the token."""
    row, branch = (0, 1 + side) if batch.tokens_BST.shape[1] == 1 else (side, 1)
    tokens, segments = batch.tokens_BST[pair, row], batch.segments_BST[pair, row]
    found = []
    for column, target in zip(batch.places_B2R[pair, side], batch.targets_B2R[pair, side], strict=True):
        if target < 0:
            continue
        seen = [c for c in range(column + 1) if segments[c] in (SHARED, branch)]
        assert segments[column] in (SHARED, branch)
        np.testing.assert_array_equal(batch.positions_BST[pair, row, seen], np.arange(len(seen)))
        found.append((tokens[seen].tolist(), int(target)))
    return found


def every_prediction(text: Sequence_) -> list[tuple[list[int], int]]:
    return [(text.tokens[:i].tolist(), int(text.tokens[i])) for i in np.flatnonzero(text.loss_mask)]


@pytest.mark.parametrize("shared", [False, True])
def test_batches_of_pairs_have_few_shapes(shared: bool) -> None:
    encoded = [encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(60, longest=100)]
    batches = pairs(encoded, [(0.0, 0.0)] * 60, 4, tiny.mesh(), epochs=1, seed=0, min_length=32, shared=shared)
    shapes = {(batches[k].tokens_BST.shape[2], batches[k].targets_B2R.shape[2]) for k in range(len(batches))}
    assert {length for length, _ in shapes} <= {32, 64, 96, 128, 192, 256}
    assert len(shapes) == len({length for length, _ in shapes}), "as many programs as lengths"
    assert all(room <= length for length, room in shapes)


def test_prompts_are_shared_if_that_is_less_work() -> None:
    config, mesh = tiny.CONFIG, tiny.mesh()

    def pair(prompt: int, a: int, b: int) -> Any:
        return tuple(encode([1] * prompt, [2] * n) for n in (a, b))

    assert prompts_shared(config, mesh, [pair(400, 40, 40)] * 3, 64)
    assert not prompts_shared(config, mesh, [pair(4, 400, 400)] * 3, 64)
    assert not prompts_shared(config, mesh, [pair(4, 400, 400)] * 3 + [pair(40, 4, 4)], 64)
    with pytest.MonkeyPatch.context() as patch:
        short = dataclasses.replace(config, windows=(None, 100))
        for platform, model_config, expected in (("gpu", config, False), ("tpu", config, True), ("tpu", short, False)):
            patch.setattr(meshlib, "platform", lambda _, platform=platform: platform)
            assert prompts_shared(model_config, mesh, [pair(400, 40, 40)] * 3, 64) == expected
    with pytest.raises(DataError, match="different prompts"):
        prompts_shared(config, mesh, [(encode([1], [2]), encode([3], [2]))], 64)


@pytest.mark.parametrize("N", [2, 4])
def test_groups_hold_their_sequences(N: int) -> None:
    encoded = [tuple(sequences([5 + i + n for n in range(N)])) for i in range(6)]
    batches = groups(encoded, 4, tiny.mesh(), epochs=1, seed=0, min_length=16)
    for k in range(len(batches)):
        rows = [int(i) for i in np.atleast_1d(batches.plan[k])]
        batch = rows_of(batches, rows)
        assert batch.real_B.tolist() == [True] * len(rows) + [False] * (4 - len(rows))
        assert not batch.segments_BNT[len(rows) :].any()
        for place, i in enumerate(rows):
            for n in range(N):
                length = len(encoded[i][n].tokens)
                np.testing.assert_array_equal(batch.tokens_BNT[place, n, :length], encoded[i][n].tokens)
                np.testing.assert_array_equal(batch.segments_BNT[place, n], np.arange(16) < length)


# --------------------------------------------------------------------------------------------------------------
# the rows of one process of several


def every_kind() -> dict[str, Batches]:
    """Batches of 8, the last of which hold few real rows."""
    texts, mesh = sequences([5 + i % 30 for i in range(19)]), tiny.mesh()
    encoded = [encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(11, longest=60)]
    order: dict[str, Any] = {"epochs": 1, "seed": 3}
    refs = [(float(i), -float(i)) for i in range(11)]
    return {
        "packed": packed(texts[:15], 40, 8, mesh, **order),
        "padded": padded(texts, 40, 8, mesh, **order),
        "groups": groups([(s, s) for s in texts], 8, mesh, min_length=16, **order),
        "pairs": pairs(encoded, refs, 8, mesh, min_length=16, shared=False, **order),
        "shared": pairs(encoded, refs, 8, mesh, min_length=16, shared=True, **order),
    }


@pytest.mark.parametrize("kind", ["packed", "padded", "groups", "pairs", "shared"])
def test_parts_of_a_batch_make_up_the_batch(kind: str) -> None:
    batches, all_fill = every_kind()[kind], 0
    for k in range(len(batches)):
        rows = [int(i) for i in np.atleast_1d(batches.plan[k])]
        all_fill += len(rows) < 8
        parts = [batches.collate(Part(rows, i, i + 1)) for i in range(8)]
        together = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        jax.tree.map(np.testing.assert_array_equal, together, rows_of(batches, rows))
    assert all_fill, "some part has no real row"
