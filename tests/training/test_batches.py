"""From records to batches: what is in them, that every row comes once an epoch, and that a batch is its number's
alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tiny
from jaxsi.model.attention import SHARED
from jaxsi.runs.records import SFTExample
from jaxsi.training import batches as data
from jaxsi.training.batches import DataError, Sequence_

ANY_LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def sequences(lengths: list[int]) -> list[Sequence_]:
    """Sequence number i holds the tokens 100 i + 1, 100 i + 2, ..., so that each can be found again."""
    made = []
    for i, length in enumerate(lengths):
        prompt = max(1, length // 3)
        ids = [100 * i + 1 + j for j in range(length)]
        made.append(data.encode(ids[:prompt], ids[prompt:]))
    return made


def rows_of(batches: data.Batches, chosen: list[int]) -> Any:
    """The whole batch of these rows, as NumPy."""
    return batches.collate(data.Part(chosen, 0, batches.batch_size))


def texts_of(batch: data.TokenBatch) -> list[tuple[list[int], list[bool]]]:
    """The sequences that a batch holds, taken apart by its segments."""
    found = []
    tokens, segments, masks = np.asarray(batch.tokens_BT), np.asarray(batch.segments_BT), tiny.counted(batch)
    for row in range(len(tokens)):
        for segment in sorted(set(segments[row]) - {0}):
            here = np.flatnonzero(segments[row] == segment)
            assert (np.diff(here) == 1).all(), "a segment is one piece"
            np.testing.assert_array_equal(np.asarray(batch.positions_BT)[row, here], np.arange(len(here)))
            found.append((tokens[row, here].tolist(), masks[row, here].tolist()))
        assert not masks[row, segments[row] == 0].any(), "padding never counts"
    return found


# --------------------------------------------------------------------------------------------------------------
# encoding


def test_the_loss_counts_the_response_and_its_one_end_of_turn() -> None:
    tokenizer = tiny.tokenizer()
    example = SFTExample(id="a", messages=({"role": "user", "content": "loop tree"},), response="sun moon")
    tokens, mask = data.encode_example(tokenizer, example)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert tokenizer.decode(tokens[mask].tolist()) == "sun moon"
    assert tokens[-1] == tokenizer.eos_id and mask[-1]
    assert (tokens[mask] == tokenizer.eos_id).sum() == 1 and (tokens == tokenizer.bos_id).sum() == 1
    assert mask.tolist() == sorted(mask.tolist()), "the prompt, then the response"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, tiny.ENTRIES - 1), min_size=1, max_size=30))
def test_training_ids_are_the_sampled_ids(ids: list[int]) -> None:
    """Any ids, also such as no text encodes to and without an end of turn, come through bit for bit; nothing is
    added."""
    pair = tiny.preference_pairs(1)[0]
    pair = dataclasses.replace(pair, chosen=dataclasses.replace(pair.chosen, token_ids=tuple(ids)))
    chosen, rejected = data.encode_pair(tiny.tokenizer(), pair)
    assert chosen.tokens[chosen.loss_mask].tolist() == ids
    assert rejected.tokens[rejected.loss_mask].tolist() == list(pair.rejected.token_ids)
    np.testing.assert_array_equal(chosen.tokens[~chosen.loss_mask], rejected.tokens[~rejected.loss_mask])


def test_a_response_that_was_cut_off_gets_no_end_of_turn() -> None:
    tokenizer = tiny.tokenizer()
    cut_off = 0
    for pair in tiny.preference_pairs(6):
        for response, sequence in zip((pair.chosen, pair.rejected), data.encode_pair(tokenizer, pair), strict=True):
            ends = (sequence.tokens[sequence.loss_mask] == tokenizer.eos_id).sum()
            assert ends == (response.finish_reason == "stop")
            cut_off += response.finish_reason == "length"
    assert cut_off


def test_another_template_is_refused() -> None:
    pair = tiny.preference_pairs(1)[0]
    other = dataclasses.replace(pair, rejected=dataclasses.replace(pair.rejected, template="f" * 16))
    with pytest.raises(DataError, match=r"response 'p0#1' was sampled under chat template ffffffffffffffff"):
        data.encode_pair(tiny.tokenizer(), other)


@pytest.mark.parametrize(("prompt", "response"), [([], [1]), ([1], [])])
def test_empty_prompts_and_responses_are_refused(prompt: list[int], response: list[int]) -> None:
    with pytest.raises(DataError, match="each has at least 1"):
        data.encode(prompt, response)


# ------------------------------------------------------------------------------------------------- supervised batches


@settings(max_examples=25, deadline=None)
@given(ANY_LENGTHS, st.integers(0, 2**31), st.integers(1, 3))
def test_packed_rows_hold_every_sequence_once_an_epoch(lengths: list[int], seed: int, epochs: int) -> None:
    given_ = sequences(lengths)
    batches = data.packed(given_, 40, 2, tiny.mesh(), epochs=epochs, seed=seed)
    collected = [rows_of(batches, [int(i) for i in np.atleast_1d(batches.plan[k])]) for k in range(len(batches))]
    found = [text for batch in collected for text in texts_of(batch)]
    expected = [(s.tokens.tolist(), s.loss_mask.tolist()) for s in given_] * epochs
    assert sorted(found) == sorted(expected)
    assert all(batch.tokens_BT.shape == (2, 40) for batch in collected)
    rows = sum((np.asarray(batch.segments_BT) > 0).any(axis=1).sum() for batch in collected)
    assert rows <= len(lengths) * epochs


def test_packing_packs() -> None:
    batches = data.packed(sequences([10] * 32), 40, 2, tiny.mesh(), epochs=1, seed=0)
    assert len(batches) == 4 and all((np.asarray(batches[k].segments_BT) > 0).all() for k in range(4))


@settings(max_examples=25, deadline=None)
@given(ANY_LENGTHS, st.integers(0, 2**31), st.integers(1, 3))
def test_padded_rows_hold_every_sequence_once_an_epoch(lengths: list[int], seed: int, epochs: int) -> None:
    given_ = sequences(lengths)
    batches = data.padded(given_, 40, 4, tiny.mesh(), epochs=epochs, seed=seed)
    per_epoch, rest = divmod(len(batches), epochs)
    assert not rest
    for epoch in range(epochs):
        plan = [batches.plan[k] for k in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        found = [text for rows in plan for text in texts_of(rows_of(batches, rows))]
        assert sorted(found) == sorted((s.tokens.tolist(), s.loss_mask.tolist()) for s in given_)


def test_a_sequence_longer_than_the_row_is_never_cut() -> None:
    for arrange in (data.packed, data.padded):
        with pytest.raises(DataError, match="a sequence has 41 tokens, a row 40"):
            arrange(sequences([10, 41]), 40, 2, tiny.mesh(), epochs=1, seed=0)


def test_a_batch_is_a_function_of_its_number() -> None:
    """Read in any order, or by another process, batch number i is the same; epochs differ, and so do seeds."""
    lengths = np.random.default_rng(0).integers(2, 40, 50).tolist()
    for arrange in (data.packed, data.padded):
        make = lambda seed, arrange=arrange: arrange(sequences(lengths), 40, 4, tiny.mesh(), epochs=2, seed=seed)  # noqa: E731
        one, other = make(3), make(3)
        backwards = {k: other[k] for k in reversed(range(len(other)))}
        for k in range(len(one)):
            assert tiny.max_difference(one[k], backwards[k]) == 0
        first, second = np.array_split([np.asarray(one[k].tokens_BT).tobytes() for k in range(len(one) // 2 * 2)], 2)
        assert first.tolist() != second.tolist(), "each epoch has its own order"
        assert first[0] != np.asarray(make(4)[0].tokens_BT).tobytes()


def test_batches_lie_on_the_mesh() -> None:
    batch = data.packed(sequences([10] * 40), 40, 8, tiny.mesh("2x2x2"), epochs=1, seed=0)[0]
    assert {shard.data.shape for shard in batch.tokens_BT.addressable_shards} == {(2, 40)}
    assert isinstance(batch.tokens_BT, jax.Array) and batch.tokens_BT.dtype == np.int32


# ------------------------------------------------------------------------------------------------------------------
# pairs


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 2), st.booleans())
def test_pairs_come_once_an_epoch_with_their_own_reference(count: int, seed: int, epochs: int, shared: bool) -> None:
    encoded = [data.encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(count, longest=60)]
    refs = [(float(i), -float(i)) for i in range(count)]
    batches = data.pairs(encoded, refs, 4, tiny.mesh(), epochs=epochs, seed=seed, min_length=16, shared=shared)
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


def predictions(batch: data.PairBatch, pair: int, side: int) -> list[tuple[list[int], int]]:
    """For each token of a response that counts, the tokens that its prediction sees, at their positions, and it."""
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


def every_prediction(text: data.Sequence_) -> list[tuple[list[int], int]]:
    return [(text.tokens[:i].tolist(), int(text.tokens[i])) for i in np.flatnonzero(text.loss_mask)]


@pytest.mark.parametrize("shared", [False, True])
def test_batches_of_pairs_have_few_shapes(shared: bool) -> None:
    encoded = [data.encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(60, longest=100)]
    batches = data.pairs(encoded, [(0.0, 0.0)] * 60, 4, tiny.mesh(), epochs=1, seed=0, min_length=32, shared=shared)
    shapes = {(batches[k].tokens_BST.shape[2], batches[k].targets_B2R.shape[2]) for k in range(len(batches))}
    assert {length for length, _ in shapes} <= {32, 64, 96, 128, 192, 256}
    assert len(shapes) == len({length for length, _ in shapes}), "as many programs as lengths"
    assert all(room <= length for length, room in shapes)


def test_prompts_are_shared_where_that_is_less_work() -> None:
    config, mesh = tiny.CONFIG, tiny.mesh()
    pair = lambda prompt, a, b: tuple(data.encode([1] * prompt, [2] * n) for n in (a, b))  # noqa: E731
    assert data.prompts_shared(config, mesh, [pair(400, 40, 40)] * 3, 64)
    assert not data.prompts_shared(config, mesh, [pair(4, 400, 400)] * 3, 64)
    assert not data.prompts_shared(config, mesh, [pair(4, 400, 400)] * 3 + [pair(40, 4, 4)], 64)
    with pytest.MonkeyPatch.context() as patch:
        short = dataclasses.replace(config, windows=(None, 100))
        for platform, of, expected in (("gpu", config, False), ("tpu", config, True), ("tpu", short, False)):
            patch.setattr(data.meshlib, "platform", lambda _, platform=platform: platform)
            assert data.prompts_shared(of, mesh, [pair(400, 40, 40)] * 3, 64) == expected
    with pytest.raises(data.DataError, match="different prompts"):
        data.prompts_shared(config, mesh, [(data.encode([1], [2]), data.encode([3], [2]))], 64)


@pytest.mark.parametrize("N", [2, 4])
def test_groups_are_their_sequences(N: int) -> None:
    encoded = [tuple(sequences([5 + i + n for n in range(N)])) for i in range(6)]
    batches = data.groups(encoded, 4, tiny.mesh(), epochs=1, seed=0, min_length=16)
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


def every_kind() -> dict[str, data.Batches]:
    """Batches of 8 whose last ones have few real rows."""
    texts, mesh = sequences([5 + i % 30 for i in range(19)]), tiny.mesh()
    pairs = [data.encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(11, longest=60)]
    order: dict[str, Any] = {"epochs": 1, "seed": 3}
    refs = [(float(i), -float(i)) for i in range(11)]
    return {
        "packed": data.packed(texts[:15], 40, 8, mesh, **order),
        "padded": data.padded(texts, 40, 8, mesh, **order),
        "groups": data.groups([(s, s) for s in texts], 8, mesh, min_length=16, **order),
        "pairs": data.pairs(pairs, refs, 8, mesh, min_length=16, shared=False, **order),
        "shared": data.pairs(pairs, refs, 8, mesh, min_length=16, shared=True, **order),
    }


@pytest.mark.parametrize("kind", ["packed", "padded", "groups", "pairs", "shared"])
def test_the_parts_of_a_batch_are_the_batch(kind: str) -> None:
    batches, all_fill = every_kind()[kind], 0
    for k in range(len(batches)):
        rows = [int(i) for i in np.atleast_1d(batches.plan[k])]
        all_fill += len(rows) < 8
        parts = [batches.collate(data.Part(rows, i, i + 1)) for i in range(8)]
        together = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        jax.tree.map(np.testing.assert_array_equal, together, rows_of(batches, rows))
    assert all_fill, "some part has no real row"
