"""From records to batches on the mesh: the only place where JSON lines become arrays. Grain shuffles.

The rows of batch number i are a pure function of (rows, seed, i), so a run resumes at any step from its number alone.
"""

import dataclasses
import logging
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
from jaxsi.text.chat import naming, render_prompt, render_request, render_response
from jaxsi.text.chat_config import written_thought
from jaxsi.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

ATTENTION_COST = (
    3  # cost of an attention FLOP, in FLOPs of weight matmuls (XLA's attention on a CPU, 0.5k to 1k tokens)
)
WORTHWHILE = 0.95  # a pair is put in one row if that costs less than this share of two rows


class DataError(ValueError):
    """Unusable training data."""


class TokenBatch(NamedTuple):
    """Token sequences, one or several packed in a row; segment 0 is padding.

    ``targets_BR``: the tokens that the loss counts, padded with -1. ``places_BR``: the columns whose hidden states
    predict them. The head runs on these columns only, so R is as small as possible. ``lengths_B``: the number of tokens
    in each row if every row is one sequence; None if rows are packed.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    places_BR: Any
    targets_BR: Any
    lengths_B: Any = None


class PairBatch(NamedTuple):
    """Pairs of responses to one prompt, each in S rows. With two rows, the prompt precedes each response. A single row
    holds the prompt (segment ``SHARED``), then the chosen and the rejected response (segments 1 and 2), neither of
    which sees the other.

    ``places_B2R`` and ``targets_B2R`` are as in ``TokenBatch``, one row each for the chosen and the rejected response.
    ``ref_logps_B2`` float32: the reference's summed log-probabilities. ``real_B`` is False for fill. ``agreement_B``
    float32: the probability that the label is right; None if all are.
    """

    tokens_BST: Any
    positions_BST: Any
    segments_BST: Any
    places_B2R: Any
    targets_B2R: Any
    ref_logps_B2: Any
    real_B: Any
    agreement_B: Any = None


class GroupBatch(NamedTuple):
    """Groups of N sequences whose rewards are compared: the chosen and the rejected response of a pair (N = 2), each
    after its prompt, or the four ordered pairs of PIT's gap (N = 4). Each sequence has its own row, so segments are 1,
    then 0. ``real_B`` is False for fill."""

    tokens_BNT: Any
    segments_BNT: Any
    real_B: Any


class Sequence_(NamedTuple):
    """A text as token ids, with a mask of the tokens that the loss counts."""

    tokens: np.ndarray
    loss_mask: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        """The columns of the tokens that the loss counts."""
        return np.flatnonzero(self.loss_mask)

    @property
    def predicted(self) -> tuple[np.ndarray, np.ndarray]:
        """The columns whose hidden states predict the counted tokens, and those tokens."""
        return self.counted - 1, self.tokens[self.counted]


def encode(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Sequence_:
    """Prompt, then response; the loss counts the response, including its end of turn.

    Raises:
      DataError: if either is empty. Nothing predicts the first token of a text, so the prompt has to supply it, and a
        row needs a token that counts.
    """
    if not len(prompt_ids) or not len(response_ids):
        raise DataError(
            f"the prompt has {len(prompt_ids)} tokens and the response {len(response_ids)}; both need at least 1: "
            "drop the row"
        )
    tokens = np.asarray([*prompt_ids, *response_ids], np.int32)
    return Sequence_(tokens, np.arange(len(tokens)) >= len(prompt_ids))


def encode_examples(tokenizer: Tokenizer, examples: Sequence[SFTExample]) -> list[Sequence_]:
    """`encode_example` of each; the log says how many thoughts are left out."""
    if tokenizer.closes_thought or tokenizer.chat.thinking == "strip":
        without = sum(bool(written_thought(example.response).reasoning) for example in examples)
        if without:
            _log.warning(
                "%d of %d responses begin with a thought, which is left out, since chat.thinking is %s; keep trains on "
                "it", without, len(examples), tokenizer.chat.thinking,
            )  # fmt: skip
    return [encode_example(tokenizer, example) for example in examples]


def encode_example(tokenizer: Tokenizer, example: SFTExample) -> Sequence_:
    """Encodes a supervised example, so that what is trained is what is sampled.

    If the template begins a thought, it is closed in the prompt, outside the loss; a response that has a thought of its
    own follows the prompt as it is. With thoughts off or stripped (``ChatConfig.thinking``), the prompt is the one that
    asks for an answer alone, and the answer alone is trained.

    Raises:
      ChatTemplateError: if the template refuses the conversation; it names the example.
    """
    with naming(f"example {example.id!r}"):
        response, answer = example.response, written_thought(example.response).answer
        if tokenizer.chat.thinking == "strip":
            tokenizer, response = tokenizer.answering, answer
        head = render_request if response == answer else render_prompt
        return encode(head(tokenizer, example.messages), render_response(tokenizer, response))


def encode_pair(tokenizer: Tokenizer, pair: PreferencePair) -> tuple[Sequence_, Sequence_]:
    """Encodes a pair; the responses keep exactly the ids that were sampled. With the thoughts stripped
    (``ChatConfig.thinking``), those that have one are written again without it.

    Raises:
      DataError: if a response was sampled under another chat template.
    """
    for response in (pair.chosen, pair.rejected):
        if response.template != tokenizer.template_hash:
            raise DataError(
                f"response {response.id!r} was sampled under chat template {response.template}, this tokenizer has "
                f"{tokenizer.template_hash}; train with the tokenizer that sampled it"
            )
    if tokenizer.chat.thinking == "strip" and (pair.chosen.reasoning or pair.rejected.reasoning):
        plain = tokenizer.answering
        with naming(f"pair {pair.id!r}"):
            prompt_ids = render_request(plain, pair.messages)
        chosen, rejected = (encode(prompt_ids, render_response(plain, r.text)) for r in (pair.chosen, pair.rejected))
        return chosen, rejected
    with naming(f"pair {pair.id!r}"):
        prompt_ids = render_prompt(tokenizer, pair.messages)
    return encode(prompt_ids, pair.chosen.token_ids), encode(prompt_ids, pair.rejected.token_ids)


class Part(NamedTuple):
    """Rows ``start`` to ``stop`` of a batch that begins with the ``chosen`` rows and ends in fill."""

    chosen: Sequence[int]
    start: int
    stop: int

    @property
    def row_numbers(self) -> Sequence[int]:
        """The chosen rows in this part. If it is all fill: the first row of the batch, for its shapes."""
        return self.chosen[self.start : self.stop] or self.chosen[:1]

    @property
    def real(self) -> np.ndarray:
        """[stop - start] bool: False for fill."""
        return np.arange(self.start, self.stop) < len(self.chosen)

    def filled(self, rows: Sequence[np.ndarray], dtype: Any, fill: int = 0) -> np.ndarray:
        """[stop - start, ...]: ``rows``, one for each of ``row_numbers``, then fill."""
        out = np.full((self.stop - self.start, *rows[0].shape), fill, dtype)
        real = int(self.real.sum())
        if real:
            out[:real] = rows
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches by number, laid out on the mesh. ``plan[i]`` lists the rows of batch i, which is filled up to a multiple
    of ``multiple`` rows; ``collate`` turns a part of a batch into NumPy arrays. With several processes, each collates
    only the rows of its own devices."""

    plan: Sequence[Sequence[int]]
    collate: Callable[[Part], Any]
    mesh: Mesh
    multiple: int

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Any:
        chosen = self.plan[step]
        rows = -(-len(chosen) // self.multiple) * self.multiple

        def layout(ndim: int) -> jax.sharding.NamedSharding:
            return meshlib.sharding(self.mesh, ("batch",) + (None,) * (ndim - 1))

        if jax.process_count() == 1:
            return jax.tree.map(lambda x: jax.device_put(x, layout(x.ndim)), self.collate(Part(chosen, 0, rows)))
        cuts = [
            index[0].indices(rows)
            for index in layout(1).addressable_devices_indices_map((rows,)).values()
            if index is not None
        ]
        part = Part(chosen, min(start for start, _, _ in cuts), max(stop for _, stop, _ in cuts))

        def place(x: np.ndarray) -> jax.Array:
            def cut(index: tuple[slice, ...] | None) -> np.ndarray:
                start, stop, _ = (index or (slice(None),))[0].indices(rows)
                return x[start - part.start : stop - part.start]

            return jax.make_array_from_callback((rows, *x.shape[1:]), layout(x.ndim), cut)

        return jax.tree.map(place, self.collate(part))


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below ``count`` in the order of ``seed``."""
    order = grain.MapDataset.source(range(count)).shuffle(seed % 2**32)
    return [int(np.asarray(order[i])) for i in range(count)]


def check_lengths(sequences: Sequence[Sequence_], length: int) -> None:
    longest = max((len(s.tokens) for s in sequences), default=0)
    if longest > length:
        raise DataError(
            f"a sequence has {longest} tokens, a row {length}; sequences are never cut: drop it or make rows longer"
        )


def padded_rows(sequences: Sequence[Sequence_], length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and segments of each sequence, right-padded to ``length``."""
    ones = [np.ones(len(s.tokens), np.int32) for s in sequences]
    return [right_padded(s.tokens, length) for s in sequences], [right_padded(o, length) for o in ones]


def right_padded(x: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    return np.pad(x, (0, length - len(x)), constant_values=fill)


def room(counts: Sequence[int], length: int) -> int:
    """Columns reserved for a row's counted tokens: a multiple of ``length`` / 8, so that few programs are compiled."""
    eighth = -(-length // 8)
    return min(length, eighth * max(1, -(-max(counts) // eighth)))


def rooms(sizes: Sequence[int], counts: Sequence[int]) -> dict[int, int]:
    """For each size, the room in a batch of that length, which may hold shorter rows, too."""
    together = list(zip(sizes, counts, strict=True))
    return {T: room([count for size, count in together if size <= T], T) for T in set(sizes)}


def predicted(rows: Sequence[Sequence_], part: Part, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and targets [rows of the part, room] int32 of a ``TokenBatch``."""
    places, targets = zip(*(row.predicted for row in rows), strict=True)
    return (
        part.filled([right_padded(x, room) for x in places], np.int32),
        part.filled([right_padded(x, room, -1) for x in targets], np.int32, -1),
    )


def bucketed(sizes: Sequence[int], batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """A plan whose batches hold rows of one bucket, except for the last of each epoch, which hold the leftovers."""
    plan: list[list[int]] = []
    for epoch in range(epochs):
        waiting: dict[int, list[int]] = {}
        batches: list[list[int]] = []
        for i in shuffled(len(sizes), seed + epoch):
            rows = waiting.setdefault(sizes[i], [])
            rows.append(i)
            if len(rows) == batch_size:
                batches.append(waiting.pop(sizes[i]))
        leftovers = [i for size in sorted(waiting) for i in waiting[size]]
        plan += batches + [leftovers[k : k + batch_size] for k in range(0, len(leftovers), batch_size)]
    return plan


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
        members = range(len(encoded[part.row_numbers[0]]))
        places = [padded_rows([encoded[i][n] for i in part.row_numbers], T) for n in members]

        def together(column: int) -> np.ndarray:
            return np.stack([part.filled(place[column], np.int32) for place in places], axis=1)

        return GroupBatch(together(0), together(1), part.real)

    plan = bucketed(sizes, batch_size, epochs, seed)
    return Batches(plan, collate, mesh, batch_size)


class _PairRows(NamedTuple):
    """A pair as S rows (tokens, positions, segments), without the last token of each response, since it predicts
    nothing; and (places, targets) of each response."""

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
    """The number of tokens in a pair's prompt.

    Raises: DataError if the two responses follow different prompts.
    """
    chosen, rejected = (s.tokens[: s.counted[0]] for s in pair)
    if not np.array_equal(chosen, rejected):
        raise DataError("the chosen and the rejected response of a pair follow different prompts; drop the pair")
    return len(chosen)


def prompts_shared(
    config: ModelConfig, mesh: Mesh, encoded: Sequence[tuple[Sequence_, Sequence_]], min_length: int
) -> bool:
    """Whether each pair goes through the layers in one row, with its prompt once. This is less work unless prompts are
    much shorter than responses (attention between the two responses is computed and then masked). It is never done if
    it would rule out fused attention: on GPUs, whose fused attention does not support segments, and on TPUs, whose
    fused attention measures windows in columns, if a window is shorter than a row.

    Raises: DataError if the two responses of a pair follow different prompts.
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
    agreement: Sequence[float] | None = None,
) -> Batches:
    """Batches of pairs with the reference's log-probabilities, each batch as long as its bucket (at least
    ``min_length``). With ``shared``, a pair is one row. ``agreement``: the probabilities that the labels are right.

    Raises: DataError if the two responses of a pair follow different prompts.
    """
    encoded_rows = [(_together if shared else _apart)(pair) for pair in encoded]
    sizes = [bucket(rows.columns, min_length) for rows in encoded_rows]
    counted = rooms(sizes, [rows.counted for rows in encoded_rows])

    def collate(part: Part) -> PairBatch:
        T = max(sizes[i] for i in part.chosen)

        def stacked(column: Callable[[_PairRows], Sequence[np.ndarray]], length: int, fill: int = 0) -> np.ndarray:
            arrays = [
                np.stack([right_padded(x, length, fill) for x in column(encoded_rows[i])]) for i in part.row_numbers
            ]
            return part.filled(arrays, np.int32, fill)

        tokens, positions, segments = (stacked(lambda rows, k=k: [x[k] for x in rows.inputs], T) for k in range(3))
        places = stacked(lambda rows: [x for x, _ in rows.predicted], counted[T])
        targets = stacked(lambda rows: [x for _, x in rows.predicted], counted[T], fill=-1)
        refs = part.filled([np.asarray(ref_logps[i], np.float32) for i in part.row_numbers], np.float32)
        agreed = None
        if agreement is not None:
            agreed = part.filled([np.asarray(agreement[i], np.float32) for i in part.row_numbers], np.float32)
        return PairBatch(tokens, positions, segments, places, targets, refs, part.real, agreed)

    plan = bucketed(sizes, batch_size, epochs, seed)
    return Batches(plan, collate, mesh, batch_size)


def pair_batches(
    lm: LM, encoded: Sequence[tuple[Sequence_, Sequence_]], refs: Any, batch_size: int, *, min_length: int, **order: Any
) -> Batches:
    """``pairs`` in whichever layout is less work; the reference and the training use the same one."""
    shared = prompts_shared(lm.config, lm.mesh, encoded, min_length)
    return pairs(encoded, refs, batch_size, lm.mesh, min_length=min_length, shared=shared, **order)
