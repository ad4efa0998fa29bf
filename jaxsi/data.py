"""From records to batches on the mesh: the one border between JSON lines and arrays. Grain orders, packs and feeds.

Which rows make batch number i is a pure function of (rows, seed, i), so a run resumes at any step by its number alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxsi import mesh as meshlib
from jaxsi.chat import render_prompt, render_response
from jaxsi.records import PreferencePair, SFTExample
from jaxsi.sampling import bucket
from jaxsi.tokenizer import Tokenizer


class DataError(ValueError):
    """Training data of which nothing can be used."""


class TokenBatch(NamedTuple):
    """Token sequences, one or several packed in a row. loss_mask True where a token counts; segments 0 where there is
    none. ``lengths_B``: the tokens of each row, where every row is one sequence; None where they are packed."""

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    loss_mask_BT: Any
    lengths_B: Any = None


class GroupBatch(NamedTuple):
    """Rows of N sequences that are compared: the chosen and the rejected response of a pair (N = 2), each after its
    prompt, or the four ordered pairs of PIT's gap (N = 4). One sequence a row: segments are 1, then 0.
    ``ref_logps_BN`` float32: the reference's summed log-probabilities of the sequences, where the loss has a reference.
    real_B False for fill."""

    tokens_BNT: Any
    segments_BNT: Any
    loss_mask_BNT: Any
    ref_logps_BN: Any
    real_B: Any


class Sequence_(NamedTuple):
    """One text as token ids, and which of them the loss counts."""

    tokens: np.ndarray
    loss_mask: np.ndarray


def encode(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Sequence_:
    """Prompt, then response; the loss counts the response, its end of turn included.

    Raises:
      DataError: one of them is empty: the first token of a text has nothing to predict it, and a row needs one that
      counts.
    """
    if not len(prompt_ids) or not len(response_ids):
        raise DataError(
            f"a prompt of {len(prompt_ids)} tokens and a response of {len(response_ids)}: each has at least 1; "
            "drop the row"
        )
    tokens = np.asarray([*prompt_ids, *response_ids], np.int32)
    return Sequence_(tokens, np.arange(len(tokens)) >= len(prompt_ids))


def encode_example(tokenizer: Tokenizer, example: SFTExample) -> Sequence_:
    """A supervised example as tokens."""
    return encode(render_prompt(tokenizer, example.messages), render_response(tokenizer, example.response))


def encode_pair(tokenizer: Tokenizer, pair: PreferencePair) -> tuple[Sequence_, Sequence_]:
    """A pair as tokens: the responses are the ids that were sampled, bit for bit.

    Raises:
      DataError: a response was sampled under another chat template.
    """
    for response in (pair.chosen, pair.rejected):
        if response.template != tokenizer.template_hash:
            raise DataError(
                f"response {response.id!r} was sampled under chat template {response.template}, this tokenizer has "
                f"{tokenizer.template_hash}; train with the tokenizer that sampled it"
            )
    prompt_ids = render_prompt(tokenizer, pair.messages)
    return encode(prompt_ids, pair.chosen.token_ids), encode(prompt_ids, pair.rejected.token_ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches by number, laid out on the mesh. ``plan[i]`` are the rows of batch i; ``collate`` makes NumPy of them."""

    plan: grain.MapDataset
    collate: Callable[[Sequence[int]], Any]
    mesh: Mesh

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Any:
        rows = [int(i) for i in np.atleast_1d(np.asarray(self.plan[step]))]
        place = lambda x: jax.device_put(x, meshlib.sharding(self.mesh, ("batch",) + (None,) * (x.ndim - 1)))  # noqa: E731
        return jax.tree.map(place, self.collate(rows))


def _shuffled(count: int, batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(range(count)).shuffle(seed % 2**32).repeat(epochs).batch(batch_size)


def _fill(size: int, rows: list[np.ndarray], dtype: Any) -> np.ndarray:
    out = np.zeros((size, *rows[0].shape), dtype)
    out[: len(rows)] = rows
    return out


def arrangement(mesh: Mesh) -> Callable[..., Batches]:
    """How sequences become batches on this mesh: ``packed``, but ``padded`` on GPUs, whose fused attention takes no
    segments."""
    return padded if meshlib.platform(mesh) == "gpu" else packed


def packed(
    sequences: Sequence[Sequence_], length: int, batch_size: int, mesh: Mesh, *, epochs: int, seed: int
) -> Batches:
    """Batches of several sequences to a row of ``length`` tokens, kept apart by segments (first fit).

    Raises:
      DataError: a sequence is longer than a row.
    """
    _check_lengths(sequences, length)
    parts = grain.MapDataset.source([s._asdict() for s in sequences]).shuffle(seed % 2**32).to_iter_dataset()
    lengths = {"tokens": length, "loss_mask": length}
    rows = list(
        grain.experimental.FirstFitPackIterDataset(parts, length_struct=lengths, num_packing_bins=64, seed=seed % 2**32)
    )

    def collate(chosen: Sequence[int]) -> TokenBatch:
        column = lambda name, dtype: _fill(batch_size, [rows[i][name] for i in chosen], dtype)  # noqa: E731
        return TokenBatch(
            column("tokens", np.int32),
            column("tokens_positions", np.int32),
            column("tokens_segment_ids", np.int32),
            column("loss_mask", bool),
        )

    return Batches(_shuffled(len(rows), batch_size, epochs, seed), collate, mesh)


def padded(
    sequences: Sequence[Sequence_], length: int, batch_size: int, mesh: Mesh, *, epochs: int, seed: int
) -> Batches:
    """Batches of one sequence to a row, alike in length, each batch as long as its bucket (at most ``length``).

    Raises:
      DataError: a sequence is longer than ``length``.
    """
    _check_lengths(sequences, length)
    sizes = [min(length, bucket(len(s.tokens), 64)) for s in sequences]

    def collate(chosen: Sequence[int]) -> TokenBatch:
        T = max(sizes[i] for i in chosen)
        tokens, masks, segments = _rows([sequences[i] for i in chosen], T)
        positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (batch_size, T)).copy()
        return TokenBatch(
            _fill(batch_size, tokens, np.int32),
            positions_BT,
            _fill(batch_size, segments, np.int32),
            _fill(batch_size, masks, bool),
            _fill(batch_size, [np.asarray(len(sequences[i].tokens), np.int32) for i in chosen], np.int32),
        )

    return Batches(_bucketed(sizes, batch_size, epochs, seed), collate, mesh)


def _check_lengths(sequences: Sequence[Sequence_], length: int) -> None:
    longest = max((len(s.tokens) for s in sequences), default=0)
    if longest > length:
        raise DataError(
            f"a sequence has {longest} tokens, a row {length}: it is never cut; drop it or make rows longer"
        )


def _rows(sequences: Sequence[Sequence_], length: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Tokens, loss masks and segments of each sequence, right-padded to ``length``."""
    pad = lambda x: np.pad(x, (0, length - len(x)))  # noqa: E731
    ones = [np.ones(len(s.tokens), np.int32) for s in sequences]
    return [pad(s.tokens) for s in sequences], [pad(s.loss_mask) for s in sequences], [pad(o) for o in ones]


def _bucketed(sizes: Sequence[int], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """A plan whose batches hold rows of one bucket, but for the last of each epoch, which hold what is left over."""
    plan: list[list[int]] = []
    for epoch in range(epochs):
        order = grain.MapDataset.source(range(len(sizes))).shuffle((seed + epoch) % 2**32)
        waiting: dict[int, list[int]] = {}
        batches: list[list[int]] = []
        for i in (int(np.asarray(order[j])) for j in range(len(order))):
            rows = waiting.setdefault(sizes[i], [])
            rows.append(i)
            if len(rows) == batch_size:
                batches.append(waiting.pop(sizes[i]))
        left = [i for size in sorted(waiting) for i in waiting[size]]
        plan += batches + [left[k : k + batch_size] for k in range(0, len(left), batch_size)]
    return grain.MapDataset.source(plan)


def groups(
    encoded: Sequence[tuple[Sequence_, ...]],
    ref_logps: Sequence[Sequence[float]],
    batch_size: int,
    mesh: Mesh,
    *,
    epochs: int,
    seed: int,
    min_length: int,
) -> Batches:
    """Batches of groups of N sequences with the reference's log-probabilities, each batch as long as its bucket (at
    least ``min_length``)."""
    sizes = [bucket(max(len(s.tokens) for s in group), min_length) for group in encoded]

    def collate(chosen: Sequence[int]) -> GroupBatch:
        T = max(sizes[i] for i in chosen)
        places = [_rows([encoded[i][n] for i in chosen], T) for n in range(len(encoded[chosen[0]]))]
        together = lambda part, dtype: np.stack([_fill(batch_size, place[part], dtype) for place in places], axis=1)  # noqa: E731
        refs = _fill(batch_size, [np.asarray(ref_logps[i], np.float32) for i in chosen], np.float32)
        real_B = np.arange(batch_size) < len(chosen)
        return GroupBatch(together(0, np.int32), together(2, np.int32), together(1, bool), refs, real_B)

    return Batches(_bucketed(sizes, batch_size, epochs, seed), collate, mesh)
