"""From records to batches on the mesh: the one border between JSON lines and arrays. Grain orders, packs and feeds.

Which rows make batch number i is a pure function of (rows, seed, i), so a run resumes at any step by its number alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxsi.lm import LM
from jaxsi.model import mesh as meshlib
from jaxsi.model.attention import SHARED
from jaxsi.model.decoder import ModelConfig, parameters, windows
from jaxsi.runs.records import PreferencePair, SFTExample
from jaxsi.sampling.generate import bucket
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.text.tokenizer import Tokenizer

ATTENTION_COST = 3  # times what its FLOPs cost in products of weights (a CPU, XLA's attention, 0.5k to 1k tokens)
WORTHWHILE = 0.95  # of the cost of pairs in two rows: what one row may cost at most


class DataError(ValueError):
    """Training data of which nothing can be used."""


class TokenBatch(NamedTuple):
    """Token sequences, one or several packed in a row; segments 0 where there is none.

    ``targets_BR``: the tokens that the loss counts, -1 where there are no more, and ``places_BR`` the columns whose
    hidden states predict them. The head runs on these alone, so R is as small as they allow. ``lengths_B``: the tokens
    of each row, where every row is one sequence; None where they are packed.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    places_BR: Any
    targets_BR: Any
    lengths_B: Any = None


class PairBatch(NamedTuple):
    """Pairs of responses to one prompt, each in S rows: in two, with the prompt before each response, or in one, which
    holds the prompt (segment ``SHARED``), the chosen and the rejected response (segments 1 and 2): neither response
    sees the other.

    ``places_B2R`` and ``targets_B2R`` as in ``TokenBatch``, of the chosen and of the rejected response, each in its own
    row. ``ref_logps_B2`` float32: the reference's summed log-probabilities. real_B False for fill.
    """

    tokens_BST: Any
    positions_BST: Any
    segments_BST: Any
    places_B2R: Any
    targets_B2R: Any
    ref_logps_B2: Any
    real_B: Any


class GroupBatch(NamedTuple):
    """Rows of N sequences whose rewards are compared: the chosen and the rejected response of a pair (N = 2), each
    after its prompt, or the four ordered pairs of PIT's gap (N = 4). One sequence a row: segments are 1, then 0. real_B
    False for fill."""

    tokens_BNT: Any
    segments_BNT: Any
    real_B: Any


class Sequence_(NamedTuple):
    """One text as token ids, and which of them the loss counts."""

    tokens: np.ndarray
    loss_mask: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        """The columns of the tokens that the loss counts."""
        return np.flatnonzero(self.loss_mask)

    @property
    def predicted(self) -> tuple[np.ndarray, np.ndarray]:
        """Of these tokens, the columns whose hidden states predict them, and the tokens."""
        return self.counted - 1, self.tokens[self.counted]


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


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a batch whose first rows are ``chosen``, what is left being fill."""

    chosen: Sequence[int]
    start: int
    stop: int

    @property
    def own(self) -> Sequence[int]:
        """Of the chosen, those in the part; where it is all fill the first of the batch, for its shapes."""
        return self.chosen[self.start : self.stop] or self.chosen[:1]

    @property
    def real(self) -> np.ndarray:
        """[stop - start] bool: False for fill."""
        return np.arange(self.start, self.stop) < len(self.chosen)

    def filled(self, rows: Sequence[np.ndarray], dtype: Any, fill: int = 0) -> np.ndarray:
        """[stop - start, ...] of the rows that are ``own``."""
        out = np.full((self.stop - self.start, *rows[0].shape), fill, dtype)
        real = int(self.real.sum())
        if real:
            out[:real] = rows
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches by number, laid out on the mesh. ``plan[i]`` are the rows of batch i; ``collate`` makes NumPy of a part
    of one: of several processes each makes the rows of its own devices."""

    plan: grain.MapDataset
    collate: Callable[[Part], Any]
    mesh: Mesh
    batch_size: int

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Any:
        chosen = [int(i) for i in np.atleast_1d(np.asarray(self.plan[step]))]
        layout = lambda ndim: meshlib.sharding(self.mesh, ("batch",) + (None,) * (ndim - 1))  # noqa: E731
        if jax.process_count() == 1:
            return jax.tree.map(
                lambda x: jax.device_put(x, layout(x.ndim)), self.collate(Part(chosen, 0, self.batch_size))
            )
        cuts = [
            index[0].indices(self.batch_size)
            for index in layout(1).addressable_devices_indices_map((self.batch_size,)).values()
            if index is not None
        ]
        part = Part(chosen, min(start for start, _, _ in cuts), max(stop for _, stop, _ in cuts))

        def place(x: np.ndarray) -> jax.Array:
            def cut(index: tuple[slice, ...] | None) -> np.ndarray:
                start, stop, _ = (index or (slice(None),))[0].indices(self.batch_size)
                return x[start - part.start : stop - part.start]

            return jax.make_array_from_callback((self.batch_size, *x.shape[1:]), layout(x.ndim), cut)

        return jax.tree.map(place, self.collate(part))


def _shuffled(count: int, batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(range(count)).shuffle(seed % 2**32).repeat(epochs).batch(batch_size)


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

    of_rows = [Sequence_(row["tokens"], row["loss_mask"]) for row in rows]
    room = _room([len(row.counted) for row in of_rows], length)

    def collate(part: Part) -> TokenBatch:
        column = lambda name: part.filled([rows[i][name] for i in part.own], np.int32)  # noqa: E731
        return TokenBatch(
            column("tokens"), column("tokens_positions"), column("tokens_segment_ids"),
            *_predicted([of_rows[i] for i in part.own], part, room),
        )  # fmt: skip

    return Batches(_shuffled(len(rows), batch_size, epochs, seed), collate, mesh, batch_size)


def padded(
    sequences: Sequence[Sequence_], length: int, batch_size: int, mesh: Mesh, *, epochs: int, seed: int
) -> Batches:
    """Batches of one sequence to a row, alike in length, each batch as long as its bucket (at most ``length``).

    Raises:
      DataError: a sequence is longer than ``length``.
    """
    _check_lengths(sequences, length)
    sizes = [min(length, bucket(len(s.tokens), 64)) for s in sequences]
    rooms = _rooms(sizes, [len(s.counted) for s in sequences])

    def collate(part: Part) -> TokenBatch:
        T, of_rows = max(sizes[i] for i in part.chosen), [sequences[i] for i in part.own]
        tokens, segments = _rows(of_rows, T)
        return TokenBatch(
            part.filled(tokens, np.int32),
            np.broadcast_to(np.arange(T, dtype=np.int32), (part.stop - part.start, T)).copy(),
            part.filled(segments, np.int32),
            *_predicted(of_rows, part, rooms[T]),
            part.filled([np.asarray(len(s.tokens), np.int32) for s in of_rows], np.int32),
        )

    return Batches(_bucketed(sizes, batch_size, epochs, seed), collate, mesh, batch_size)


def _check_lengths(sequences: Sequence[Sequence_], length: int) -> None:
    longest = max((len(s.tokens) for s in sequences), default=0)
    if longest > length:
        raise DataError(
            f"a sequence has {longest} tokens, a row {length}: it is never cut; drop it or make rows longer"
        )


def _rows(sequences: Sequence[Sequence_], length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and segments of each sequence, right-padded to ``length``."""
    ones = [np.ones(len(s.tokens), np.int32) for s in sequences]
    return [_padded(s.tokens, length) for s in sequences], [_padded(o, length) for o in ones]


def _padded(x: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    return np.pad(x, (0, length - len(x)), constant_values=fill)


def _room(counts: Sequence[int], length: int) -> int:
    """Columns for so many counted tokens in a row of ``length``: eighths of it, so that few programs are compiled."""
    eighth = -(-length // 8)
    return min(length, eighth * max(1, -(-max(counts) // eighth)))


def _rooms(sizes: Sequence[int], counts: Sequence[int]) -> dict[int, int]:
    """The room in a batch as long as each of the sizes, which shorter rows may be in, too."""
    together = list(zip(sizes, counts, strict=True))
    return {T: _room([count for size, count in together if size <= T], T) for T in set(sizes)}


def _predicted(rows: Sequence[Sequence_], part: Part, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and targets [rows of the part, room] int32 of a ``TokenBatch``."""
    places, targets = zip(*(row.predicted for row in rows), strict=True)
    return (
        part.filled([_padded(x, room) for x in places], np.int32),
        part.filled([_padded(x, room, -1) for x in targets], np.int32, -1),
    )


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
    batch_size: int,
    mesh: Mesh,
    *,
    epochs: int,
    seed: int,
    min_length: int,
) -> Batches:
    """Batches of groups of N sequences, each batch as long as its bucket (at least ``min_length``)."""
    sizes = [bucket(max(len(s.tokens) for s in group), min_length) for group in encoded]

    def collate(part: Part) -> GroupBatch:
        T = max(sizes[i] for i in part.chosen)
        places = [_rows([encoded[i][n] for i in part.own], T) for n in range(len(encoded[part.own[0]]))]
        together = lambda column: np.stack([part.filled(place[column], np.int32) for place in places], axis=1)  # noqa: E731
        return GroupBatch(together(0), together(1), part.real)

    return Batches(_bucketed(sizes, batch_size, epochs, seed), collate, mesh, batch_size)


class _PairRows(NamedTuple):
    """A pair as S rows (tokens, positions, segments), which the last token of a response, that predicts nothing, is not
    in; and (places, targets) of either response."""

    inputs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    predicted: list[tuple[np.ndarray, np.ndarray]]

    @property
    def columns(self) -> int:
        return max(len(tokens) for tokens, _, _ in self.inputs)

    @property
    def counted(self) -> int:
        return max(len(targets) for _, targets in self.predicted)


def _apart(pair: tuple[Sequence_, Sequence_]) -> _PairRows:
    inputs = [(s.tokens[:-1], np.arange(len(s.tokens) - 1), np.ones(len(s.tokens) - 1, np.int32)) for s in pair]
    return _PairRows(inputs, [s.predicted for s in pair])


def _together(pair: tuple[Sequence_, Sequence_]) -> _PairRows:
    chosen, rejected = pair
    prompt = _prompt(pair)
    first, second = len(chosen.tokens) - 1 - prompt, len(rejected.tokens) - 1 - prompt
    tokens = np.concatenate([chosen.tokens[:-1], rejected.tokens[prompt:-1]])
    positions = np.concatenate([np.arange(prompt + first), np.arange(prompt, prompt + second)])
    segments = np.repeat(np.asarray([SHARED, 1, 2], np.int32), [prompt, first, second])
    predicted = []
    for s, before in ((chosen, 0), (rejected, first)):
        places, targets = s.predicted
        predicted.append((np.where(places < prompt, places, places + before), targets))
    return _PairRows([(tokens, positions, segments)], predicted)


def _prompt(pair: tuple[Sequence_, Sequence_]) -> int:
    """The tokens of the prompt of a pair.

    Raises: DataError: the two have not the same one.
    """
    chosen, rejected = (s.tokens[: s.counted[0]] for s in pair)
    if not np.array_equal(chosen, rejected):
        raise DataError("the chosen and the rejected response of a pair follow different prompts; drop the pair")
    return len(chosen)


def prompts_shared(
    config: ModelConfig, mesh: Mesh, encoded: Sequence[tuple[Sequence_, Sequence_]], min_length: int
) -> bool:
    """Whether pairs go through the layers in one row each, the prompt once: where that is less work, which it is unless
    prompts are much shorter than responses (what the responses do not see of each other is computed and masked). Never
    where it would cost the fused attention: on GPUs, whose takes no segments, and on TPUs, whose measures windows in
    columns, with a window shorter than a row.

    Raises: DataError: the two of a pair have not the same prompt.
    """
    platform, together = meshlib.platform(mesh), [_together(pair) for pair in encoded]
    longest = max((bucket(rows.columns, min_length) for rows in together), default=0)
    if platform == "gpu" or (platform == "tpu" and min(windows(config)) < longest):
        return False
    weights = sum(math.prod(p.shape) for p in parameters(config)["layers"].values())
    quadratic = ATTENTION_COST * 4 * config.num_layers * config.num_heads * config.head_dim

    def cost(rows: _PairRows) -> float:
        T = bucket(rows.columns, min_length)
        return len(rows.inputs) * T * (2 * weights + quadratic * T)

    return sum(map(cost, together)) < WORTHWHILE * sum(cost(_apart(pair)) for pair in encoded)


def pairs(
    encoded: Sequence[tuple[Sequence_, Sequence_]],
    ref_logps: Sequence[Sequence[float]],
    batch_size: int,
    mesh: Mesh,
    *,
    epochs: int,
    seed: int,
    min_length: int,
    shared: bool,
) -> Batches:
    """Batches of pairs with the reference's log-probabilities, each batch as long as its bucket (at least
    ``min_length``); ``shared``: a pair is one row.

    Raises: DataError: the two of a pair have not the same prompt.
    """
    made = [(_together if shared else _apart)(pair) for pair in encoded]
    sizes = [bucket(rows.columns, min_length) for rows in made]
    rooms = _rooms(sizes, [rows.counted for rows in made])

    def collate(part: Part) -> PairBatch:
        T = max(sizes[i] for i in part.chosen)

        def stacked(of_pair: Callable[[_PairRows], Sequence[np.ndarray]], length: int, fill: int = 0) -> np.ndarray:
            arrays = [np.stack([_padded(x, length, fill) for x in of_pair(made[i])]) for i in part.own]
            return part.filled(arrays, np.int32, fill)

        tokens, positions, segments = (stacked(lambda rows, k=k: [x[k] for x in rows.inputs], T) for k in range(3))
        places = stacked(lambda rows: [x for x, _ in rows.predicted], rooms[T])
        targets = stacked(lambda rows: [x for _, x in rows.predicted], rooms[T], fill=-1)
        refs = part.filled([np.asarray(ref_logps[i], np.float32) for i in part.own], np.float32)
        return PairBatch(tokens, positions, segments, places, targets, refs, part.real)

    return Batches(_bucketed(sizes, batch_size, epochs, seed), collate, mesh, batch_size)


def pair_batches(
    lm: LM, encoded: Sequence[tuple[Sequence_, Sequence_]], refs: Any, batch_size: int, *, min_length: int, **order: int
) -> Batches:
    """``pairs``, in the layout that is less work: one for the reference and for training."""
    shared = prompts_shared(lm.config, lm.mesh, encoded, min_length)
    return pairs(encoded, refs, batch_size, lm.mesh, min_length=min_length, shared=shared, **order)
