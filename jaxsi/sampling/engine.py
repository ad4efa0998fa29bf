"""The sampling engine: a fixed number of slots in which rows decode side by side, each refilled when its row has ended.

Prompts are computed ahead of the slots, one wave at a time, and each shared beginning once (``prefixes.py``). A row
that enters a slot copies its prompt's keys and values. The device programs are in ``slots.py``; here the host decides
which row goes where. If there are several processes, all of them decide the same.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsi.lm import LM, tokens_array
from jaxsi.model import decoder, kv_cache, mesh as meshlib
from jaxsi.model.kv_cache import KVCache
from jaxsi.runs import preemption, spent
from jaxsi.runs.progress import Advance, piece
from jaxsi.sampling import prefixes
from jaxsi.sampling.slots import (
    MOST_STEPS,
    Fixed,
    Packed,
    Slots,
    Wave,
    decode_slots,
    empty_slots,
    extend_prompts,
    first_tokens,
    keys_of,
    prefill_prompts,
    refill_slots,
    resize_slots,
)
from jaxsi.sampling.token_sampling import Settings

Grouping = Callable[[Sequence[Sequence[int]]], tuple[int, list[prefixes.Group]]]
Watch = Callable[[int, int, Sequence[int]], None]  # number of the prompt, number of the sample, its token ids so far
FIRST_RING = 64  # columns of the ring at the start; it doubles when a row outgrows it
CHUNK = 512  # prompt tokens that go through the model at once
REFILL = 16  # the slots are refilled when one in REFILL is free
FEWEST = 8  # the last rows are moved together into fewer slots, but not fewer than this
WATCHED_STEPS = 4  # decode steps between two reads while someone watches
PACKED = 128  # the fewest columns of a row that holds several prompts


@dataclasses.dataclass
class Row:
    """An unfinished response of at most ``limit`` tokens; ``place``: the numbers of its prompt and sample."""

    limit: int
    place: tuple[int, int]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    stopped: bool = False


@dataclasses.dataclass
class Work:
    """The amount of work that a call took.

    Attributes:
      prompt_tokens: tokens of the prompts of all rows.
      prefilled: prompt tokens that went through the model, without padding.
      slot_steps: decode steps times slots.
      new_tokens: tokens of the responses.
    """

    prompt_tokens: int = 0
    prefilled: int = 0
    slot_steps: int = 0
    new_tokens: int = 0


def power(n: int, least: int) -> int:
    """The static length to which ``n`` is padded: a power of two, at least ``least``. Each one compiles a program."""
    return max(least, 1 << (n - 1).bit_length())


def fine_size(n: int) -> int:
    """The static size to which ``n`` is padded if a power of two wastes too much.

    It is a multiple of 4 and, from 32 on, at most a seventh more than ``n``.
    """
    step = max(4, power(n, 1) // 8)
    return -(-n // step) * step


def padded_rows(n: int, parts: int) -> int:
    """At least ``n`` rows: the same power of two on each of ``parts`` parts of the mesh."""
    return parts * power(-(-n // parts), 1)


def rows_at_once(n: int, batch_size: int, parts: int) -> int:
    """How many of ``n`` rows go side by side: at most ``batch_size``, the same number on each of ``parts`` parts of the
    mesh."""
    return min(max(parts, batch_size // parts * parts), padded_rows(n, parts))


def first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(row, first column) of each of the texts of these lengths, packed into rows of ``width`` columns.

    The longest text comes first; each goes into the first row with enough room.
    """
    widths: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, n in enumerate(widths) if n + lengths[i] <= width), len(widths))
        if row == len(widths):
            widths.append(0)
        places[i] = (row, widths[row])
        widths[row] += lengths[i]
    return places


def refill_threshold(size: int, parts: int) -> int:
    """Number of free slots, out of ``size`` on ``parts`` parts of the mesh, that triggers a refill."""
    return parts * max(1, size // (REFILL * parts))


def run(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    keys_P: jax.Array,
    settings: Settings,
    *,
    limit: int,
    num_samples: int,
    batch_size: int,
    cache: KVCache = "exact",
    limits: Sequence[Sequence[int]] | None = None,
    group: Grouping = prefixes.group,
    watch: Watch | None = None,
) -> tuple[list[list[tuple[list[int], list[float], bool]]], Work]:
    """Samples ``num_samples`` responses of at most ``limit`` tokens to each prompt, up to ``batch_size`` at a time.

    Args:
      cache: how keys and values are stored.
      limits: for each response of each prompt its own limit, at most ``limit``.
      group: finds out what prompts share.
      watch: is called whenever a response has new tokens, every few decode steps. It changes no response.

    Returns:
      For each prompt the triples (new token ids, including the stop id; their logps; stopped), and the work it took.
    """
    work = Work(prompt_tokens=num_samples * sum(map(len, prompts)))
    if not prompts:
        return [], work
    parts = meshlib.axis_size(lm.mesh, "batch")
    size = rows_at_once(len(prompts) * num_samples, batch_size, parts)
    fixed = Fixed(lm.config, lm.mesh, jnp.dtype(lm.dtype), int8=cache == "int8")
    words = sample_words(np.asarray(jax.random.key_data(keys_P)), num_samples)
    rows = [
        [Row(most, (i, n)) for n, most in enumerate(samples)]
        for i, samples in enumerate(limits or [[limit] * num_samples] * len(prompts))
    ]
    most = min(-(-size // num_samples), len(prompts))
    ahead = Ahead(lm, prompts, padded_rows(most, parts), fixed, work, group)
    with piece("sampling", len(prompts) * num_samples) as advance:
        slots = Engine(lm, settings, limit, size, fixed, work, advance, watch)
        for numbers, wave, width in ahead.waves():
            preemption.check()
            slots.feed(
                wave,
                width,
                [(rows[i][n], place, words[i, n]) for place, i in enumerate(numbers) for n in range(num_samples)],
            )
        slots.finish()
    spent.count(sampled=work.new_tokens)
    return [[(row.token_ids, row.logps, row.stopped) for row in samples] for samples in rows], work


def read(lm: LM, texts: Sequence[Sequence[int]], *, batch_size: int) -> Iterator[tuple[list[int], Wave]]:
    """Reads texts without going on with them, up to ``batch_size`` at a time: their numbers, and their wave. What texts
    have in common is read once."""
    if not texts:
        return
    parts = meshlib.axis_size(lm.mesh, "batch")
    fixed = Fixed(lm.config, lm.mesh, jnp.dtype(lm.dtype))
    size = rows_at_once(len(texts), batch_size, parts)
    for numbers, wave, _ in Ahead(lm, texts, size, fixed, Work(), prefixes.group).waves():
        preemption.check()
        yield numbers, wave


def sample_words(words_P2: np.ndarray, num_samples: int) -> np.ndarray:
    """Key data [P, num_samples, 2] uint32: each prompt's key data [P, 2], folded with the number of the sample."""
    padded = np.zeros((power(len(words_P2), 16), 2), np.uint32)
    padded[: len(words_P2)] = words_P2
    return np.asarray(_fold_numbers(padded, num_samples))[: len(words_P2)]


@functools.partial(jax.jit, static_argnames="num_samples")
def _fold_numbers(words_P2: jax.Array, num_samples: int) -> jax.Array:
    def fold(key: jax.Array) -> jax.Array:
        return jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(num_samples))

    return jax.random.key_data(jax.vmap(fold)(keys_of(words_P2)))


class SizedWave(NamedTuple):
    """A wave and the number of tokens in each of its rows."""

    wave: Wave
    lengths: list[int]


class Ahead:
    """Computes prompts in waves, and their shared beginnings once."""

    def __init__(
        self, lm: LM, prompts: Sequence[Sequence[int]], size: int, fixed: Fixed, work: Work, group: Grouping
    ) -> None:
        self.lm, self.prompts, self.size, self.fixed, self.work, self.group = lm, prompts, size, fixed, work, group
        self.parts = meshlib.axis_size(lm.mesh, "batch")

    def waves(self) -> Iterator[tuple[list[int], Wave, int]]:
        """Yields up to ``size`` prompts at a time: their numbers, their wave, and the padded width of the longest."""
        shared, groups = self.group(self.prompts)
        # cuDNN's attention, used on GPUs, has no segments: there a row is one prompt.
        packable = meshlib.platform(self.lm.mesh) != "gpu" and not any(group.shared for group in groups)
        if packable and max(map(len, self.prompts)) <= CHUNK:
            yield from self.packed()
            return
        root = None
        if shared:
            root = self.compute(None, [0], [list(self.prompts[0][:shared])], self.parts)
        members = [(number, group) for group in groups for number in group.prompts]
        waves = [members[i : i + self.size] for i in range(0, len(members), self.size)]
        # Row 0 has only the beginning that all prompts share, for prompts whose group shares no more than that.
        sharing = [list(dict.fromkeys(group for _, group in wave if group.shared > shared)) for wave in waves]
        size = padded_rows(1 + max(map(len, sharing)), self.parts)
        for numbered, sharing_groups in zip(waves, sharing, strict=True):
            base, places = root, dict.fromkeys(sharing_groups, 0)
            if sharing_groups:
                segments = [[], *(list(self.prompts[g.prompts[0]][shared : g.shared]) for g in sharing_groups)]
                places = {group: place for place, group in enumerate(sharing_groups, 1)}
                base = self.compute(root, [0] * len(segments), segments, size)
            rows = [places.get(group, 0) for _, group in numbered]
            rest = [list(self.prompts[number][group.shared :]) for number, group in numbered]
            wave = self.compute(base, rows, rest, self.size).wave
            yield [number for number, _ in numbered], wave, kv_cache.columns(wave.cache)

    def packed(self) -> Iterator[tuple[list[int], Wave, int]]:
        """Prompts that share nothing, several per row, so that padding is needed only at the ends of rows."""
        T = power(max(map(len, self.prompts)), PACKED)
        waves = [range(i, min(i + self.size, len(self.prompts))) for i in range(0, len(self.prompts), self.size)]
        places = [first_fit([len(self.prompts[i]) for i in wave], T) for wave in waves]
        most = max(row + 1 for wave_places in places for row, _ in wave_places)
        R = self.parts * fine_size(-(-most // self.parts))
        width = power(max(map(len, self.prompts)), 16)
        for wave, wave_places in zip(waves, places, strict=True):
            segments, filler = [list(self.prompts[i]) for i in wave], self.size - len(wave)
            packed = self.layout(segments + [[]] * filler, wave_places + [(0, 0)] * filler, (R, T))
            yield list(wave), self.begin(packed), width

    def compute(self, base: SizedWave | None, rows: list[int], segments: list[list[int]], size: int) -> SizedWave:
        """``size`` rows: ``segments`` appended to the rows ``rows`` of ``base``, one chunk at a time."""
        filler = size - len(segments)
        rows, segments = rows + [0] * filler, segments + [[]] * filler
        rows_P = self.put(np.asarray(rows, np.int32))
        wave, lengths = base if base is not None else (None, [0])
        lengths = [lengths[row] for row in rows]
        for start in range(0, max(map(len, segments)), CHUNK):
            chunk = [segment[start : start + CHUNK] for segment in segments]
            lengths = [n + len(part) for n, part in zip(lengths, chunk, strict=True)]
            T = power(max(map(len, chunk)), 16)
            if wave is None:
                packed = self.layout(chunk, [(row, 0) for row in range(size)], (size, T))
                wave = self.begin(packed._replace(lengths_R=packed.lengths_P))
            else:
                self.work.prefilled += sum(map(len, chunk))
                wave = extend_prompts(
                    self.lm.sampling_weights,
                    self.put(tokens_array(chunk, T, self.lm.tokenizer.pad_id)),
                    self.put(np.asarray([len(part) for part in chunk], np.int32)),
                    wave,
                    rows_P,
                    fixed=self.fixed,
                    length=power(max(lengths), 32),
                )
            rows_P = None  # later chunks of a row are appended to that row
        assert wave is not None
        return SizedWave(wave, lengths)

    def layout(self, segments: list[list[int]], places: list[tuple[int, int]], shape: tuple[int, int]) -> Packed:
        """Rows of this shape with each of the ``segments`` at its place (row, first column)."""
        tokens, numbers, positions = (np.zeros(shape, np.int32) for _ in range(3))
        tokens[:] = self.lm.tokenizer.pad_id
        for number, (segment, (row, start)) in enumerate(zip(segments, places, strict=True), 1):
            columns = slice(start, start + len(segment))
            tokens[row, columns], numbers[row, columns] = segment, number
            positions[row, columns] = np.arange(len(segment))
        rows, starts = np.asarray(places, np.int32).T
        lengths = np.asarray([len(segment) for segment in segments], np.int32)
        return Packed(tokens, numbers, positions, rows, starts, lengths)

    def begin(self, packed: Packed) -> Wave:
        self.work.prefilled += int(packed.lengths_P.sum())
        return prefill_prompts(self.lm.sampling_weights, jax.tree.map(self.put, packed), fixed=self.fixed)

    def put(self, x: np.ndarray) -> jax.Array:
        """Puts an array onto the mesh, divided by rows."""
        return meshlib.put(x, self.lm.mesh, ("batch", *[None] * (x.ndim - 1)))


class Engine:
    """The slots of one call, and the row that is in each of them."""

    def __init__(
        self,
        lm: LM,
        settings: Settings,
        limit: int,
        size: int,
        fixed: Fixed,
        work: Work,
        advance: Advance,
        watch: Watch | None,
    ) -> None:
        self.lm, self.settings, self.fixed, self.work = lm, settings, fixed, work
        self.advance, self.watch = advance, watch
        self.window = max(decoder.windows(lm.config))
        self.longest = kv_cache.columns_seen(limit, self.window)  # a ring of this length is long enough for every row
        self.parts = meshlib.axis_size(lm.mesh, "batch")
        self.threshold = refill_threshold(size, self.parts)
        self.ring, self.prompt = min(power(self.longest, 16), FIRST_RING), 0
        self.slots: Slots | None = None
        self.rows: list[Row | None] = [None] * size
        self.entered: list[tuple[list[int], Any]] = []  # slots refilled since the last read, and their first tokens

    @property
    def free(self) -> list[int]:
        return [b for b, row in enumerate(self.rows) if row is None]

    def feed(self, wave: Wave, width: int, entries: Sequence[tuple[Row, int, np.ndarray]]) -> None:
        """Puts rows (row, place in the wave, key data) into slots as these get free; ``width``: columns per prompt."""
        self.make_room(width)
        queue = deque(entries)
        while queue:
            free = self.free
            if not free:
                self.decode(enough=self.threshold)
                continue
            n = min(len(free), len(queue))
            self.enter(wave, width, free[:n], [queue.popleft() for _ in range(n)])

    def finish(self) -> None:
        """Decodes until all rows have ended. If only a few are left that may be long, moves them into fewer slots."""
        while len(free := self.free) < len(self.rows):
            B = len(self.rows)
            smaller = self.parts * (B // (4 * self.parts))
            left = max(row.limit - len(row.token_ids) for row in self.rows if row is not None)
            if smaller < FEWEST or left <= MOST_STEPS:
                self.decode(enough=B)
            elif B - len(free) > smaller:
                self.decode(enough=B - smaller)
            else:
                going = [b for b, row in enumerate(self.rows) if row is not None]
                self.resize([*going, *free][:smaller], self.ring, self.prompt)

    def make_room(self, prompt: int) -> None:
        """Provides columns for prompts of ``prompt`` tokens."""
        prompt = kv_cache.columns_seen(prompt, self.window)
        if self.slots is None:
            self.prompt = prompt
            self.slots = empty_slots(fixed=self.fixed, size=len(self.rows), ring=self.ring, prompt=prompt)
        elif prompt > self.prompt:
            self.resize(range(len(self.rows)), self.ring, prompt)

    def enter(self, wave: Wave, width: int, into: list[int], entries: list[tuple[Row, int, np.ndarray]]) -> None:
        """Puts rows of the wave into free slots."""
        assert self.slots is not None
        B = len(self.rows)
        filler = (2 * self.threshold if len(into) <= 2 * self.threshold else B) - len(into)
        prompts = np.asarray([place for _, place, _ in entries] + [0] * filler, np.int32)
        keys = np.asarray([key for _, _, key in entries] + [np.zeros(2, np.uint32)] * filler)
        first = first_tokens(self.lm.sampling_weights, wave.hidden_PD, prompts, keys, self.settings, fixed=self.fixed)
        self.slots = refill_slots(
            self.slots,
            wave,
            prompts,
            np.asarray(into + [B] * filler, np.int32),
            keys,
            np.asarray([row.limit for row, _, _ in entries] + [1] * filler, np.int32),
            first[0],
            self.settings,
            fixed=self.fixed,
            ring=self.ring,
            width=width,
        )
        for b, (row, _, _) in zip(into, entries, strict=True):
            self.rows[b] = row
        self.entered.append((into, first))

    def decode(self, enough: int) -> None:
        """Decodes some steps in all slots, until ``enough`` of them are free, and reads the results."""
        assert self.slots is not None
        steps = MOST_STEPS if self.watch is None else WATCHED_STEPS
        if self.ring < self.longest:  # a row may not outgrow the ring
            longest = max(max(1, len(row.token_ids)) for row in self.rows if row is not None)
            steps = min(steps, self.ring + 1 - longest)
            if steps == 0:
                return self.resize(range(len(self.rows)), 2 * self.ring, self.prompt)
        self.slots, output = decode_slots(
            self.lm.sampling_weights,
            self.slots,
            self.settings,
            np.int32(steps),
            np.int32(enough),
            fixed=self.fixed,
            ring=self.ring,
        )
        self.read(output)
        return None

    def read(self, output: Any) -> None:
        """Takes the new tokens off the device and frees the slots of rows that are done."""
        assert self.slots is not None
        s = self.slots
        firsts, (tokens, logps, steps), counts, done, stopped = meshlib.fetch(
            ([first for _, first in self.entered], output, s.counts_B, s.done_B, s.stopped_B)
        )
        for (into, _), first in zip(self.entered, firsts, strict=True):
            for b, token, logp in zip(into, *(x.tolist() for x in first), strict=False):
                self.rows[b].token_ids.append(token)
                self.rows[b].logps.append(logp)
        self.entered = []
        self.work.slot_steps += int(steps) * len(self.rows)
        ended = 0
        for b, row in enumerate(self.rows):
            if row is None:
                continue
            n = int(counts[b]) - len(row.token_ids)
            row.token_ids += tokens[b, :n].tolist()
            row.logps += logps[b, :n].tolist()
            if self.watch is not None:
                self.watch(*row.place, row.token_ids)
            if done[b]:
                row.stopped = bool(stopped[b])
                self.work.new_tokens += len(row.token_ids)
                self.rows[b] = None
                ended += 1
        if ended:
            self.advance(ended, True)

    def resize(self, slots: Sequence[int], ring: int, prompt: int) -> None:
        """Keeps only these slots, with a ring and prompts of these lengths."""
        assert self.slots is not None
        rows_b = None if len(slots) == len(self.rows) else np.asarray(slots, np.int32)
        self.slots = resize_slots(
            self.slots, rows_b, fixed=self.fixed, ring=self.ring, new_ring=ring, new_prompt=prompt
        )
        self.rows = [self.rows[b] for b in slots]
        self.ring, self.prompt = ring, prompt
