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
    bucketed,
    encode,
    encode_example,
    encode_pair,
    groups,
    pairs,
    prompts_shared,
)
from jaxsi.training.packing import packed, padded, rows_unit, supervised

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
    return batches.collate(Part(chosen, 0, -(-len(chosen) // batches.multiple) * batches.multiple))


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
@given(ANY_LENGTHS, st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([1, 2, 8]))
def test_packed_batches_hold_batch_size_sequences_and_each_of_them_once_an_epoch(
    lengths: list[int], batch_size: int, seed: int, epochs: int, rows_at_once: int
) -> None:
    examples = sequences(lengths)
    plan = bucketed([len(s.tokens) // 8 for s in examples], batch_size, epochs, seed)
    batches = packed(examples, plan, 40, rows_at_once, tiny.mesh()).batches
    collected = [rows_of(batches, batches.plan[k]) for k in range(len(batches))]
    found = [texts_of(batch) for batch in collected]
    per_epoch = len(found) // epochs
    assert per_epoch == -(-len(lengths) // batch_size) and per_epoch * epochs == len(found)
    expected = [(s.tokens.tolist(), s.loss_mask.tolist()) for s in examples]
    for epoch in range(epochs):
        batch = found[epoch * per_epoch :][:per_epoch]
        assert sorted(text for texts in batch for text in texts) == sorted(expected)
        assert all(len(texts) == batch_size for texts in batch[:-1])
    shapes = {batch.tokens_BT.shape for batch in collected}
    assert len({T for _, T in shapes}) == 1 and len(shapes) <= 4
    assert all(rows <= rows_at_once or rows % rows_at_once == 0 for rows, _ in shapes)


def test_packing_fills_rows() -> None:
    batches = packed(sequences([10] * 32), [list(range(k, k + 8)) for k in range(0, 32, 8)], 40, 8, tiny.mesh()).batches
    assert len(batches) == 4 and all((np.asarray(batches[k].segments_BT) > 0).all() for k in range(4))


@pytest.mark.parametrize(("mesh", "shape"), [("1x1x1", (4, 64)), ("1x8x1", (8, 64))])
def test_rows_are_as_long_as_wastes_least(mesh: str, shape: tuple[int, int]) -> None:
    """Eight texts of 30 tokens: two in a row of 64 on one device; on eight devices each has a row of its own."""
    batches = supervised(sequences([30] * 64), 2048, 8, tiny.mesh(mesh), epochs=1, seed=0)
    assert batches[0].tokens_BT.shape == shape


def test_few_long_texts_do_not_lengthen_the_rows_of_all() -> None:
    """A batch of 16 on 8 devices has at least 8 rows. Packed rows would all be as long as the longest text."""
    texts = sequences([30] * 300 + [1900] * 4)
    batches = supervised(texts, 2048, 16, tiny.mesh("1x8x1"), epochs=1, seed=0)
    columns = [batches[k].tokens_BT.size for k in range(len(batches))]
    assert sorted(columns)[len(columns) // 2] == 16 * 64 and sum(columns) < 30 * 16 * 64 + 3 * 16 * 2048


@given(st.integers(1, 200), st.sampled_from([1, 2, 8]), st.integers(1, 8))
def test_numbers_of_rows_are_few_and_divide(most: int, devices: int, times: int) -> None:
    rows_at_once = devices * times
    unit = rows_unit(most, devices, rows_at_once)
    shapes = range(unit, most + unit, unit)
    assert len(shapes) <= 4
    assert all(rows % devices == 0 and (rows <= rows_at_once or rows % rows_at_once == 0) for rows in shapes)


def test_batches_hold_the_same_examples_on_every_platform_and_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of 16 examples of Self-Rewarding's SFT: 302 steps for 4,830 examples. When a batch counted packed rows,
    CPUs and TPUs had about 40 steps, GPUs 302."""
    texts = sequences(np.random.default_rng(0).integers(20, 400, 4830).tolist())
    found = []
    for platform, mesh, accumulate in (
        ("cpu", "1x1x1", 1),
        ("gpu", "1x1x1", 2),
        ("tpu", "1x8x1", 2),
        ("tpu", "2x2x2", 1),
    ):
        monkeypatch.setattr(meshlib, "platform", lambda mesh, name=platform: name)
        batches = supervised(texts, 4096, 16, tiny.mesh(mesh), epochs=1, seed=0, accumulate=accumulate)
        assert len(batches) == 302
        found.append([sorted(texts_of(rows_of(batches, batches.plan[k]))) for k in (0, 7, 301)])
    assert [len(texts) for texts in found[0]] == [16, 16, 4830 - 301 * 16]
    assert all(other == found[0] for other in found[1:])


@settings(max_examples=25, deadline=None)
@given(ANY_LENGTHS, st.integers(0, 2**31), st.integers(1, 3))
def test_padded_rows_hold_every_sequence_once_an_epoch(lengths: list[int], seed: int, epochs: int) -> None:
    examples = sequences(lengths)
    plan = bucketed([len(s.tokens) // 8 for s in examples], 4, epochs, seed)
    batches = padded(examples, plan, 40, 4, tiny.mesh()).batches
    per_epoch, rest = divmod(len(batches), epochs)
    assert not rest
    for epoch in range(epochs):
        plan = [batches.plan[k] for k in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        found = [text for rows in plan for text in texts_of(rows_of(batches, rows))]
        assert sorted(found) == sorted((s.tokens.tolist(), s.loss_mask.tolist()) for s in examples)


def test_sequence_longer_than_its_row_is_refused() -> None:
    with pytest.raises(DataError, match="a sequence has 41 tokens, a row 40"):
        supervised(sequences([10, 41]), 40, 2, tiny.mesh(), epochs=1, seed=0)


def test_batch_depends_on_its_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch number i is the same in any reading order and in another process; epochs and seeds differ."""
    lengths = np.random.default_rng(0).integers(2, 40, 50).tolist()
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(meshlib, "platform", lambda mesh, name=platform: name)
        make = functools.partial(supervised, sequences(lengths), 40, 4, tiny.mesh(), epochs=2)
        one, other = make(seed=3), make(seed=3)
        backwards = {k: other[k] for k in reversed(range(len(other)))}
        for k in range(len(one)):
            assert tiny.max_difference(one[k], backwards[k]) == 0
        first, second = np.array_split([np.asarray(one[k].tokens_BT).tobytes() for k in range(len(one) // 2 * 2)], 2)
        assert first.tolist() != second.tolist(), "each epoch has its own order"
        assert first[0] != np.asarray(make(seed=4)[0].tokens_BT).tobytes()


def test_batches_are_laid_out_on_the_mesh() -> None:
    batch = supervised(sequences([10] * 40), 40, 32, tiny.mesh("2x2x2"), epochs=1, seed=0)[0]
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
        rows = batches.plan[k]
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
        rows = batches.plan[k]
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
        "packed": packed(texts, [range(18), range(18, 19)], 40, 18, mesh).batches,
        "padded": padded(texts, [range(8), range(8, 16), range(16, 19)], 40, 8, mesh).batches,
        "groups": groups([(s, s) for s in texts], 8, mesh, min_length=16, **order),
        "pairs": pairs(encoded, refs, 8, mesh, min_length=16, shared=False, **order),
        "shared": pairs(encoded, refs, 8, mesh, min_length=16, shared=True, **order),
    }


@pytest.mark.parametrize("kind", ["packed", "padded", "groups", "pairs", "shared"])
def test_parts_of_a_batch_make_up_the_batch(kind: str) -> None:
    batches, all_fill = every_kind()[kind], 0
    for k in range(len(batches)):
        rows = batches.plan[k]
        size = -(-len(rows) // batches.multiple) * batches.multiple
        all_fill += len(rows) < size
        parts = [batches.collate(Part(rows, i, i + 1)) for i in range(size)]
        together = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        jax.tree.map(np.testing.assert_array_equal, together, rows_of(batches, rows))
    assert all_fill, "some part has no real row"
