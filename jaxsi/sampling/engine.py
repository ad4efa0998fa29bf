"""The sampling engine: a fixed number of slots in which rows decode side by side, each refilled when its row has ended.

Prompts are computed ahead of the slots, a wave at a time, each shared beginning once (``prefixes.py``); a row that
enters a slot copies its prompt's keys and values. The programs are in ``slots.py``; here the host decides which row
goes where. On several processes all of them decide the same.
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
from jaxsi.runs import preemption
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
FIRST_RING = 64  # columns of the ring at the start; it doubles when a row outgrows it
CHUNK = 512  # prompt tokens that go through the model at once
REFILL = 16  # the slots are refilled when one in so many is free
FEWEST = 8  # slots that the last rows are moved to, at the least
PACKED = 128  # columns of a row of several prompts, at the least


@dataclasses.dataclass
class Row:
    """A response in the making, of at most ``limit`` tokens."""

    limit: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    stopped: bool = False


@dataclasses.dataclass
class Work:
    """What a call did. ``prompt_tokens``: of all rows' prompts. ``prefilled``: of these, computed, padding left out.
    ``slot_steps``: decode steps times slots. ``new_tokens``: of the responses."""

    prompt_tokens: int = 0
    prefilled: int = 0
    slot_steps: int = 0
    new_tokens: int = 0


def power(n: int, least: int) -> int:
    """The static length that ``n`` is padded to, a power of two and at least ``least``: each one compiles a program."""
    return max(least, 1 << (n - 1).bit_length())


def finer(n: int) -> int:
    """The static size that ``n`` is padded to where a power of two wastes too much: a multiple of 4, from 32 on at most
    a seventh more."""
    step = max(4, power(n, 1) // 8)
    return -(-n // step) * step


def fitting(n: int, parts: int) -> int:
    """Rows for ``n`` of them, as many, a power of two, on each of ``parts`` of the mesh."""
    return parts * power(-(-n // parts), 1)


def first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(row, first column) of texts of these lengths, at most ``width``, in as few rows of ``width`` columns as putting
    each, the longest first, into the first row with room makes them."""
    filled: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, n in enumerate(filled) if n + lengths[i] <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = (row, filled[row])
        filled[row] += lengths[i]
    return places


def few(size: int, parts: int) -> int:
    """So many of ``size`` slots are free when they are refilled; ``parts`` of the mesh hold them."""
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
) -> tuple[list[list[tuple[list[int], list[float], bool]]], Work]:
    """Samples ``num_samples`` responses of at most ``limit`` tokens to each prompt, up to ``batch_size`` at a time.

    ``cache``: of keys and values. ``limits``: for each response of each prompt a limit of its own, at most ``limit``.
    ``group``: what prompts share.

    Returns for each prompt the triples (new token ids, the stop id included; their logps; stopped), and what it took.
    """
    work = Work(prompt_tokens=num_samples * sum(map(len, prompts)))
    if not prompts:
        return [], work
    parts = meshlib.axis_size(lm.mesh, "batch")
    size = min(max(parts, batch_size // parts * parts), fitting(len(prompts) * num_samples, parts))
    fixed = Fixed(lm.config, lm.mesh, jnp.dtype(lm.dtype), int8=cache == "int8")
    words = sample_words(np.asarray(jax.random.key_data(keys_P)), num_samples)
    rows = [[Row(n) for n in of_prompt] for of_prompt in limits or [[limit] * num_samples] * len(prompts)]
    most = min(-(-size // num_samples), len(prompts))
    ahead = Ahead(lm, prompts, fitting(most, parts), fixed, work, group)
    slots = Engine(lm, settings, limit, size, fixed, work)
    for numbers, wave, width in ahead.waves():
        preemption.check()
        slots.feed(
            wave,
            width,
            [(rows[i][n], place, words[i, n]) for place, i in enumerate(numbers) for n in range(num_samples)],
        )
    slots.finish()
    return [[(row.token_ids, row.logps, row.stopped) for row in samples] for samples in rows], work


def sample_words(words_P2: np.ndarray, num_samples: int) -> np.ndarray:
    """Key data [P, num_samples, 2] uint32: each prompt's key, given as key data, folded with the sample's number."""
    padded = np.zeros((power(len(words_P2), 16), 2), np.uint32)
    padded[: len(words_P2)] = words_P2
    return np.asarray(_fold_numbers(padded, num_samples))[: len(words_P2)]


@functools.partial(jax.jit, static_argnames="num_samples")
def _fold_numbers(words_P2: jax.Array, num_samples: int) -> jax.Array:
    one = lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(num_samples))  # noqa: E731
    return jax.random.key_data(jax.vmap(one)(keys_of(words_P2)))


class Computed(NamedTuple):
    """A wave, and how many tokens each of its rows holds."""

    wave: Wave
    lengths: list[int]


class Ahead:
    """Computes prompts in waves, what they share once."""

    def __init__(
        self, lm: LM, prompts: Sequence[Sequence[int]], size: int, fixed: Fixed, work: Work, group: Grouping
    ) -> None:
        self.lm, self.prompts, self.size, self.fixed, self.work, self.group = lm, prompts, size, fixed, work, group
        self.parts = meshlib.axis_size(lm.mesh, "batch")

    def waves(self) -> Iterator[tuple[list[int], Wave, int]]:
        """Up to ``size`` prompts at a time: their numbers, what was computed of them, and how wide the longest is,
        padded."""
        shared, groups = self.group(self.prompts)
        # cuDNN's attention, on GPUs, has no segments: a row is one prompt there.
        apart = meshlib.platform(self.lm.mesh) != "gpu" and not any(group.shared for group in groups)
        if apart and max(map(len, self.prompts)) <= CHUNK:
            yield from self.packed()
            return
        root = None
        if shared:
            root = self.compute(None, [0], [list(self.prompts[0][:shared])], self.parts)
        members = [(number, group) for group in groups for number in group.prompts]
        waves = [members[i : i + self.size] for i in range(0, len(members), self.size)]
        # Row 0 has the common beginning alone, for the prompts that share no more.
        sharing = [list(dict.fromkeys(group for _, group in of if group.shared > shared)) for of in waves]
        size = fitting(1 + max(map(len, sharing)), self.parts)
        for taken, of_wave in zip(waves, sharing, strict=True):
            before, places = root, dict.fromkeys(of_wave, 0)
            if of_wave:
                segments = [[], *(list(self.prompts[g.prompts[0]][shared : g.shared]) for g in of_wave)]
                places = {group: place for place, group in enumerate(of_wave, 1)}
                before = self.compute(root, [0] * len(segments), segments, size)
            rows = [places.get(group, 0) for _, group in taken]
            rest = [list(self.prompts[number][group.shared :]) for number, group in taken]
            wave = self.compute(before, rows, rest, self.size).wave
            yield [number for number, _ in taken], wave, kv_cache.columns(wave.cache)

    def packed(self) -> Iterator[tuple[list[int], Wave, int]]:
        """Prompts that share nothing, several in a row: no padding goes through the model but at the ends of rows."""
        T = power(max(map(len, self.prompts)), PACKED)
        waves = [range(i, min(i + self.size, len(self.prompts))) for i in range(0, len(self.prompts), self.size)]
        places = [first_fit([len(self.prompts[i]) for i in wave], T) for wave in waves]
        most = max(row + 1 for of_wave in places for row, _ in of_wave)
        R = self.parts * finer(-(-most // self.parts))
        width = power(max(map(len, self.prompts)), 16)
        for wave, of_wave in zip(waves, places, strict=True):
            segments, filler = [list(self.prompts[i]) for i in wave], self.size - len(wave)
            packed = self.layout(segments + [[]] * filler, of_wave + [(0, 0)] * filler, (R, T))
            yield list(wave), self.begin(packed), width

    def compute(self, before: Computed | None, rows: list[int], segments: list[list[int]], size: int) -> Computed:
        """``size`` rows with ``segments`` behind the rows ``rows`` of ``before``, a chunk at a time."""
        filler = size - len(segments)
        rows, segments = rows + [0] * filler, segments + [[]] * filler
        rows_P = self.put(np.asarray(rows, np.int32))
        wave, lengths = before if before is not None else (None, [0])
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
            rows_P = None  # a row's later chunks go behind itself
        assert wave is not None
        return Computed(wave, lengths)

    def layout(self, segments: list[list[int]], places: list[tuple[int, int]], shape: tuple[int, int]) -> Packed:
        """``segments``, each in the row and from the column of its ``places``, in rows of that shape."""
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
        """On the mesh, by rows."""
        return meshlib.put(x, self.lm.mesh, ("batch", *[None] * (x.ndim - 1)))


class Engine:
    """The slots of one call, and which row is in which."""

    def __init__(self, lm: LM, settings: Settings, limit: int, size: int, fixed: Fixed, work: Work) -> None:
        self.lm, self.settings, self.fixed, self.work = lm, settings, fixed, work
        self.window = max(decoder.windows(lm.config))
        self.longest = kv_cache.kept(limit, self.window)  # the ring that no row outgrows
        self.parts = meshlib.axis_size(lm.mesh, "batch")
        self.few = few(size, self.parts)
        self.ring, self.prompt = min(power(self.longest, 16), FIRST_RING), 0
        self.slots: Slots | None = None
        self.rows: list[Row | None] = [None] * size
        self.entered: list[tuple[list[int], Any]] = []  # slots refilled since the last look, and their first tokens

    @property
    def free(self) -> list[int]:
        return [b for b, row in enumerate(self.rows) if row is None]

    def feed(self, wave: Wave, width: int, entries: Sequence[tuple[Row, int, np.ndarray]]) -> None:
        """Lets rows (row, place in the wave, key data) enter as slots become free; ``width``: columns of a prompt."""
        self.make_room(width)
        queue = deque(entries)
        while queue:
            free = self.free
            if not free:
                self.decode(enough=self.few)
                continue
            n = min(len(free), len(queue))
            self.enter(wave, width, free[:n], [queue.popleft() for _ in range(n)])

    def finish(self) -> None:
        """Until all rows have ended. When few are left, and may go on for long, they do in fewer slots."""
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
        """Columns for prompts of ``prompt`` tokens."""
        prompt = kv_cache.kept(prompt, self.window)
        if self.slots is None:
            self.prompt = prompt
            self.slots = empty_slots(fixed=self.fixed, size=len(self.rows), ring=self.ring, prompt=prompt)
        elif prompt > self.prompt:
            self.resize(range(len(self.rows)), self.ring, prompt)

    def enter(self, wave: Wave, width: int, into: list[int], entries: list[tuple[Row, int, np.ndarray]]) -> None:
        """Rows of the wave enter free slots."""
        assert self.slots is not None
        B = len(self.rows)
        filler = (2 * self.few if len(into) <= 2 * self.few else B) - len(into)
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
        """Some steps in all slots, until ``enough`` of them are free, and what has come of them."""
        assert self.slots is not None
        steps = MOST_STEPS
        if self.ring < self.longest:  # a row may not outgrow the ring
            longest = max(max(1, len(row.token_ids)) for row in self.rows if row is not None)
            steps = min(steps, self.ring + 1 - longest)
            if steps == 0:
                return self.resize(range(len(self.rows)), 2 * self.ring, self.prompt)
        self.slots, out = decode_slots(
            self.lm.sampling_weights, self.slots, self.settings, np.int32(steps), np.int32(enough),
            fixed=self.fixed, ring=self.ring,
        )  # fmt: skip
        self.look(out)
        return None

    def look(self, out: Any) -> None:
        """Takes the new tokens off the device; rows that are done leave their slots."""
        assert self.slots is not None
        s = self.slots
        firsts, (tokens, logps, steps), counts, done, stopped = meshlib.fetch(
            ([first for _, first in self.entered], out, s.counts_B, s.done_B, s.stopped_B)
        )
        for (into, _), first in zip(self.entered, firsts, strict=True):
            for b, token, logp in zip(into, *(x.tolist() for x in first), strict=False):
                self.rows[b].token_ids.append(token)
                self.rows[b].logps.append(logp)
        self.entered = []
        self.work.slot_steps += int(steps) * len(self.rows)
        for b, row in enumerate(self.rows):
            if row is None:
                continue
            n = int(counts[b]) - len(row.token_ids)
            row.token_ids += tokens[b, :n].tolist()
            row.logps += logps[b, :n].tolist()
            if done[b]:
                row.stopped = bool(stopped[b])
                self.work.new_tokens += len(row.token_ids)
                self.rows[b] = None

    def resize(self, kept: Sequence[int], ring: int, prompt: int) -> None:
        """The slots ``kept``, with a ring and prompts of these lengths."""
        assert self.slots is not None
        rows_b = None if len(kept) == len(self.rows) else np.asarray(kept, np.int32)
        self.slots = resize_slots(
            self.slots, rows_b, fixed=self.fixed, ring=self.ring, new_ring=ring, new_prompt=prompt
        )
        self.rows = [self.rows[b] for b in kept]
        self.ring, self.prompt = ring, prompt
