"""Supervised batches. A batch holds the same ``batch_size`` examples, of about the same length, on every platform and
any number of devices. Either several examples share a row, or each has its own, whichever has less padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxsi.model import mesh as meshlib
from jaxsi.sampling.generate import bucket
from jaxsi.training.batches import (
    Batches,
    Part,
    Sequence_,
    TokenBatch,
    bucketed,
    check_lengths,
    padded_rows,
    predicted,
    right_padded,
    room,
    rooms,
)

LEAST_ROW = 64  # tokens; shorter rows would compile more programs and save little
MOST_SHAPES = 4  # numbers of rows that packed batches of one training have, each of which compiles a program


class Arranged(NamedTuple):
    """Batches, and the tokens that they have room for, fill included."""

    batches: Batches
    columns: int


def supervised(
    sequences: Sequence[Sequence_],
    length: int,
    batch_size: int,
    mesh: Mesh,
    *,
    epochs: int,
    seed: int,
    accumulate: int = 1,
) -> Batches:
    """Batches of ``batch_size`` sequences of at most ``length`` tokens; an epoch's last batch has what is left. Which
    sequences are in a batch depends neither on the platform nor on the mesh. At most ``batch_size / accumulate`` rows
    go through the model at once. GPUs have one sequence in a row: their fused attention has no segments.

    Raises:
      DataError: if a sequence is longer than ``length``.
    """
    check_lengths(sequences, length)
    plan = bucketed([bucket(len(s.tokens), LEAST_ROW) for s in sequences], batch_size, epochs, seed)
    apart = padded(sequences, plan, length, batch_size, mesh)
    if meshlib.platform(mesh) == "gpu":
        return apart.batches
    together = packed(sequences, plan, length, batch_size // accumulate, mesh)
    return min((together, apart), key=lambda arranged: arranged.columns).batches


def packed(
    sequences: Sequence[Sequence_], plan: Sequence[Sequence[int]], length: int, rows_at_once: int, mesh: Mesh
) -> Arranged:
    """The batches of ``plan``, each packed into rows, separated by segments. All rows have one length, at most
    ``length``: the one that wastes least. The number of rows varies between batches; it divides among the devices, and
    beyond ``rows_at_once`` it is a multiple of them.

    Grain's packing fills rows from a stream, so a batch of rows would hold any number of examples: here each batch is
    packed by itself.
    """
    sizes = np.asarray([len(s.tokens) for s in sequences], np.int64)
    devices = meshlib.axis_size(mesh, "batch")

    def unit_of(packings: Sequence[Sequence[list[int]]]) -> int:
        return rows_unit(max(map(len, packings), default=1), devices, rows_at_once)

    def columns(packings: Sequence[Sequence[list[int]]], T: int) -> int:
        unit = unit_of(packings)
        return T * sum(-(-len(rows) // unit) * unit for rows in packings)

    packings_by_length = {
        T: [first_fit(batch, sizes, T) for batch in plan] for T in row_lengths(int(sizes.max(initial=1)), length)
    }
    T = min(packings_by_length, key=lambda T: columns(packings_by_length[T], T))
    packings = packings_by_length[T]
    rows = [row for packing in packings for row in packing]
    ends = np.cumsum([len(packing) for packing in packings]).tolist()
    rows_of_batch = [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    counted = room([sum(len(sequences[i].counted) for i in row) for row in rows], T)

    def collate(part: Part) -> TokenBatch:
        texts = [[sequences[i] for i in rows[number]] for number in part.row_numbers]
        joined = [
            Sequence_(np.concatenate([s.tokens for s in row]), np.concatenate([s.loss_mask for s in row]))
            for row in texts
        ]
        positions = [np.concatenate([np.arange(len(s.tokens)) for s in row]) for row in texts]
        segments = [np.repeat(np.arange(1, len(row) + 1), [len(s.tokens) for s in row]) for row in texts]

        def column(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return part.filled([right_padded(x, T) for x in arrays], np.int32)

        tokens = column([row.tokens for row in joined])
        return TokenBatch(tokens, column(positions), column(segments), *predicted(joined, part, counted))

    return Arranged(Batches(rows_of_batch, collate, mesh, unit_of(packings)), columns(packings, T))


def row_lengths(longest: int, length: int) -> list[int]:
    """Lengths that rows may have: buckets from the ``longest`` sequence on, and ``length`` itself."""
    found = [bucket(longest, LEAST_ROW)]
    while found[-1] < length:
        found.append(bucket(found[-1] + 1, LEAST_ROW))
    return [*found[:-1], length]


def rows_unit(most: int, devices: int, rows_at_once: int) -> int:
    """The number whose multiples are the numbers of rows of the batches, of which the largest has ``most``: few
    multiples, each of which divides among the devices and into parts of ``rows_at_once``."""
    if most > rows_at_once:
        return rows_at_once * -(-most // (rows_at_once * MOST_SHAPES))
    for unit in range(devices, rows_at_once, devices):
        shapes = -(-most // unit)
        if shapes <= MOST_SHAPES and shapes * unit <= rows_at_once:
            return unit
    return rows_at_once


def first_fit(chosen: Sequence[int], sizes: np.ndarray, length: int) -> list[list[int]]:
    """The ``chosen`` sequences in rows of ``length`` tokens: from the longest on, each goes into the first row that has
    room. In a row they keep their order."""
    places = {number: place for place, number in enumerate(chosen)}
    rows: list[list[int]] = []
    free = np.empty(len(chosen), np.int64)
    for number in sorted(chosen, key=lambda i: -sizes[i]):
        fitting = np.flatnonzero(free[: len(rows)] >= sizes[number])
        row = int(fitting[0]) if len(fitting) else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = length
        rows[row].append(number)
        free[row] -= sizes[number]
    return [sorted(row, key=places.__getitem__) for row in rows]


def padded(
    sequences: Sequence[Sequence_], plan: Sequence[Sequence[int]], length: int, batch_size: int, mesh: Mesh
) -> Arranged:
    """The batches of ``plan`` with one sequence per row; each is as long as the bucket of its longest (at most
    ``length``)."""
    sizes = [min(length, bucket(len(s.tokens), LEAST_ROW)) for s in sequences]
    counted = rooms(sizes, [len(s.counted) for s in sequences])

    def collate(part: Part) -> TokenBatch:
        T, selected = max(sizes[i] for i in part.chosen), [sequences[i] for i in part.row_numbers]
        tokens, segments = padded_rows(selected, T)
        return TokenBatch(
            part.filled(tokens, np.int32),
            np.broadcast_to(np.arange(T, dtype=np.int32), (part.stop - part.start, T)).copy(),
            part.filled(segments, np.int32),
            *predicted(selected, part, counted[T]),
            part.filled([np.asarray(len(s.tokens), np.int32) for s in selected], np.int32),
        )

    columns = batch_size * sum(max(sizes[i] for i in batch) for batch in plan)
    return Arranged(Batches(plan, collate, mesh, batch_size), columns)
