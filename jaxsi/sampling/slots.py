"""The device programs of the sampling engine, which work on slots in which rows decode side by side.

All slots write the same column of a ring, so that a decoded token needs no scatter. The text position that a column
holds for a row is data. A row cannot see what its slot or the neighbours did before: its columns are marked empty when
it enters. A layer with a window has a shorter ring, and only the last columns of a prompt
(``kv_cache.columns_seen``): columns that are overwritten or left out are outside its window.

Dimension letters as in decoder.py; B slots · P prompts of a wave, in R rows (packed) · n rows of a refill · N decode
steps of a program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsi.model import decoder, kv_cache, mesh as meshlib
from jaxsi.model.decoder import Weights
from jaxsi.model.kv_cache import Cache, Contents, columns_seen
from jaxsi.sampling import decoding
from jaxsi.sampling.token_sampling import MAX_MARKER, Settings, ended, sample_tokens

MOST_STEPS = 32  # the most decode steps of one program, after which the host reads the slots


class Slots(NamedTuple):
    """What the slots hold on the device.

    Attributes:
      cache: columns of the ring, then of the prompts.
      contents: what the columns hold, by the window of a layer; ``column`` belongs to the ring.
      recent_BM: int32, the newest tokens, oldest first.
      places_B: int32, the text position of the newest token.
      counts_B, limits_B: int32, the number of new tokens and its limit.
      keys_B2: uint32, key data.
      done_B, stopped_B: bool, whether the row has ended, and whether a stop id or the marker ended it.
    """

    cache: Cache
    contents: dict[int, Contents]
    recent_BM: jax.Array
    places_B: jax.Array
    counts_B: jax.Array
    limits_B: jax.Array
    keys_B2: jax.Array
    done_B: jax.Array
    stopped_B: jax.Array


class Packed(NamedTuple):
    """Prompts laid out in rows: tokens [R, T] int32, their segments (0: padding) and positions.

    rows_P, starts_P, lengths_P: the row of each prompt, its first column there, and its length. lengths_R: the number
    of tokens in each row, if no row has more than one prompt.
    """

    tokens_RT: Any
    segments_RT: Any
    positions_RT: Any
    rows_P: Any
    starts_P: Any
    lengths_P: Any
    lengths_R: Any = None


class Wave(NamedTuple):
    """Prompts computed ahead: a cache [R, K, T, C] per layer.

    Each prompt has its row, its first column there, its length, and the hidden state [D] of its last token.
    """

    cache: Cache
    rows_P: jax.Array
    starts_P: jax.Array
    lengths_P: jax.Array
    hidden_PD: jax.Array


def keys_of(words_B2: jax.Array) -> jax.Array:
    """Typed keys from key data."""
    return jax.random.wrap_key_data(words_B2, impl="threefry2x32")


def _rows(x: jax.Array, rows: jax.Array | None) -> jax.Array:
    return x if rows is None else jnp.take(x, rows, axis=0)


# --------------------------------------------------------------------------------------------------------- the programs

_static = functools.partial(jax.jit, static_argnames=("fixed",))
_donating = functools.partial(jax.jit, donate_argnames=("slots",))


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What a program is compiled for, besides the shapes.

    dtype: of the computation, and of the cache unless that is ``int8``.
    """

    config: decoder.ModelConfig
    mesh: jax.sharding.Mesh
    dtype: Any
    int8: bool = False

    def stored(self, cache: Cache) -> Cache:
        """A cache of newly computed keys and values, converted to the form in which it is stored."""
        return self.on_mesh(jax.tree.map(kv_cache.quantized, cache) if self.int8 else cache)

    def on_mesh(self, cache: Cache) -> Cache:
        """The cache, with its layout on the mesh stated."""
        return jax.tree.map(lambda x: meshlib.constrain(x, self.mesh, ("batch", "kv_heads", None, None)), cache)

    def changed(self, change: Callable[..., jax.Array], rows: jax.Array | None, *caches: Cache) -> Cache:
        """Applies ``change(window, rows, *arrays)`` to the keys and to the values of each layer, layer by layer.

        Rows that move to another device lie on all devices for a moment; those of all layers at once may not fit.
        """
        cache: Cache = []
        for window, *layers in zip(decoder.windows(self.config), *caches, strict=True):
            layer = jax.tree.map(functools.partial(change, window, rows), *layers)
            rows, layer = jax.lax.optimization_barrier((rows, self.on_mesh([layer])))
            cache += layer
        return cache


@_static
def prefill_prompts(weights: Weights, packed: Packed, *, fixed: Fixed) -> Wave:
    """Computes prompts from their first token on."""
    hidden_RTD, cache = decoding.prefill(
        weights,
        fixed.config,
        packed.tokens_RT,
        packed.segments_RT,
        packed.positions_RT,
        dtype=fixed.dtype,
        lengths_B=packed.lengths_R,
        mesh=fixed.mesh,
    )
    hidden_PD = hidden_RTD[packed.rows_P, packed.starts_P + packed.lengths_P - 1]
    return Wave(fixed.stored(cache), packed.rows_P, packed.starts_P, packed.lengths_P, hidden_PD)


@functools.partial(jax.jit, static_argnames=("fixed", "length"))
def extend_prompts(
    weights: Weights,
    tokens_PT: jax.Array,
    counts_P: jax.Array,
    base: Wave,
    rows_P: jax.Array | None,
    *,
    fixed: Fixed,
    length: int,
) -> Wave:
    """Appends more tokens of prompts to the rows ``rows_P`` of ``base``, in a cache of ``length`` columns.

    ``base`` must have one prompt per row. If ``rows_P`` is None, all rows stay in order on their devices. A row
    without new tokens is copied.
    """

    def fit(_: int, rows_P: jax.Array | None, x_BKSC: jax.Array) -> jax.Array:
        return jnp.pad(_rows(x_BKSC, rows_P), ((0, 0), (0, 0), (0, length - x_BKSC.shape[2]), (0, 0)))

    cache = fixed.changed(fit, rows_P, base.cache)
    lengths_P = _rows(base.lengths_P, rows_P)
    hidden_PD, cache = decoding.extend(weights, fixed.config, tokens_PT, counts_P, cache, lengths_P, dtype=fixed.dtype)
    hidden_PD = jnp.where((counts_P > 0)[:, None], hidden_PD, _rows(base.hidden_PD, rows_P))
    places_P = jnp.arange(counts_P.shape[0], dtype=jnp.int32)
    return Wave(fixed.on_mesh(cache), places_P, jnp.zeros_like(places_P), lengths_P + counts_P, hidden_PD)


@functools.partial(jax.jit, static_argnames=("fixed", "size", "ring", "prompt"))
def empty_slots(*, fixed: Fixed, size: int, ring: int, prompt: int) -> Slots:
    """``size`` free slots with ``ring`` and ``prompt`` columns each, or fewer if a layer's window needs fewer."""
    c = fixed.config
    columns = {window: columns_seen(ring, window) + columns_seen(prompt, window) for window in decoder.windows(c)}
    zeros = {w: jnp.zeros((size, c.num_kv_heads, S, c.head_dim), fixed.dtype) for w, S in columns.items()}
    integers = jnp.zeros((size,), jnp.int32)

    def by_row(x: jax.Array) -> jax.Array:
        return meshlib.constrain(x, fixed.mesh, ("batch", *[None] * (x.ndim - 1)))

    return Slots(
        cache=fixed.stored([(zeros[window], zeros[window]) for window in decoder.windows(c)]),
        contents={w: Contents(by_row(jnp.full((size, S), -1, jnp.int32)), jnp.int32(0)) for w, S in columns.items()},
        recent_BM=by_row(jnp.full((size, MAX_MARKER), -1, jnp.int32)),
        places_B=by_row(integers),
        counts_B=by_row(integers),
        limits_B=by_row(integers),
        keys_B2=by_row(jnp.zeros((size, 2), jnp.uint32)),
        done_B=by_row(jnp.ones((size,), bool)),
        stopped_B=by_row(jnp.zeros((size,), bool)),
    )


@_static
def first_tokens(
    weights: Weights,
    hidden_PD: jax.Array,
    prompts_n: jax.Array,
    keys_n2: jax.Array,
    settings: Settings,
    *,
    fixed: Fixed,
) -> tuple[jax.Array, jax.Array]:
    """The first new tokens after the prompts ``prompts_n``, and their logps [n].

    This is a program separate from the refill, which compiles for many more shapes: most of the time would go into
    compiling the sampling again.
    """
    logits_nV = decoder.logits(weights, fixed.config, hidden_PD[prompts_n])
    return sample_tokens(logits_nV, keys_of(keys_n2), jnp.zeros(prompts_n.shape, jnp.int32), settings)


@functools.partial(_donating, static_argnames=("fixed", "ring", "width"))
def refill_slots(
    slots: Slots,
    wave: Wave,
    prompts_n: jax.Array,
    into_n: jax.Array,
    keys_n2: jax.Array,
    limits_n: jax.Array,
    first_n: jax.Array,
    settings: Settings,
    *,
    fixed: Fixed,
    ring: int,
    width: int,
) -> Slots:
    """Puts the prompts ``prompts_n`` of ``wave`` into the slots ``into_n``, each with its first new token.

    Slot numbers past the last slot are dropped.

    Args:
      limits_n: the most new tokens of each, at most ``settings.limit``.
      width: the most tokens of a prompt.
    """
    rows_n, starts_n, lengths_n = wave.rows_P[prompts_n], wave.starts_P[prompts_n], wave.lengths_P[prompts_n]

    def put(old: jax.Array, new: jax.Array | int) -> jax.Array:
        return old.at[into_n].set(new, mode="drop")

    def begin(columns: int) -> jax.Array:
        """The first of the last ``columns`` columns of each prompt, moved left if they would run past the row's end.

        Columns before the prompt are marked empty.
        """
        return jnp.minimum(starts_n + jnp.maximum(lengths_n - columns, 0), kv_cache.columns(wave.cache) - columns)

    def enter(window: int, rows_n: jax.Array, old_BKSC: jax.Array, new_RKTC: jax.Array) -> jax.Array:
        K, C = new_RKTC.shape[1], new_RKTC.shape[3]
        first, columns = columns_seen(ring, window), columns_seen(width, window)

        def cut(row: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(new_RKTC, (row, 0, start, 0), (1, K, columns, C))[0]

        new_nKSC = jax.vmap(cut)(rows_n, begin(columns))
        return old_BKSC.at[into_n, :, first : first + columns].set(new_nKSC, mode="drop")

    def hold(window: int, contents: Contents) -> Contents:
        S = contents.positions_BS.shape[1]
        columns_S = jnp.arange(S, dtype=jnp.int32) - columns_seen(ring, window)
        places_nS = columns_S[None] - (starts_n - begin(columns_seen(width, window)))[:, None]
        in_prompt_nS = (columns_S >= 0)[None] & (places_nS >= 0) & (places_nS < lengths_n[:, None])
        return contents._replace(positions_BS=put(contents.positions_BS, jnp.where(in_prompt_nS, places_nS, -1)))

    recent_nM = jnp.full((rows_n.shape[0], MAX_MARKER), -1, jnp.int32).at[:, -1].set(first_n)
    stopped_n = ended(recent_nM, settings)
    limits_n = jnp.minimum(limits_n, settings.limit)
    return Slots(
        cache=fixed.changed(enter, rows_n, slots.cache, wave.cache),
        contents={window: hold(window, contents) for window, contents in slots.contents.items()},
        recent_BM=put(slots.recent_BM, recent_nM),
        places_B=put(slots.places_B, lengths_n),
        counts_B=put(slots.counts_B, 1),
        limits_B=put(slots.limits_B, limits_n),
        keys_B2=put(slots.keys_B2, keys_n2),
        done_B=put(slots.done_B, stopped_n | (limits_n <= 1)),
        stopped_B=put(slots.stopped_B, stopped_n),
    )


@functools.partial(_donating, static_argnames=("fixed", "ring"))
def decode_slots(
    weights: Weights,
    slots: Slots,
    settings: Settings,
    steps: jax.Array,
    enough: jax.Array,
    *,
    fixed: Fixed,
    ring: int,
) -> tuple[Slots, tuple[jax.Array, jax.Array, jax.Array]]:
    """Decodes up to ``steps`` tokens in every slot, and stops earlier once ``enough`` slots are done.

    Returns the slots, tokens and logps [B, MOST_STEPS] (a row's are valid until it is done), and the number of steps.
    """
    B = slots.done_B.shape[0]
    keys_B = keys_of(slots.keys_B2)

    def write(x_BN: jax.Array, x_B: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x_BN, x_B[:, None], column, axis=1)

    def advance(window: int, contents: Contents) -> Contents:
        next_column = contents.column + 1
        return contents._replace(column=jnp.where(next_column < columns_seen(ring, window), next_column, 0))

    def unfinished(state: Any) -> jax.Array:
        i, slots, _, _ = state
        return (i < steps) & (jnp.sum(slots.done_B) < enough)

    def step(state: Any) -> Any:
        i, slots, tokens_BN, logps_BN = state
        contents = {
            window: contents._replace(positions_BS=write(contents.positions_BS, slots.places_B, contents.column))
            for window, contents in slots.contents.items()
        }
        hidden_BD, cache = decoding.decode(
            weights,
            fixed.config,
            slots.recent_BM[:, -1],
            slots.places_B,
            slots.cache,
            contents,
            dtype=fixed.dtype,
        )
        next_B, logp_B = sample_tokens(
            decoder.logits(weights, fixed.config, hidden_BD), keys_B, slots.counts_B, settings
        )
        going_B = ~slots.done_B
        next_B = jnp.where(going_B, next_B, 0)
        recent_BM = jnp.concatenate([slots.recent_BM[:, 1:], next_B[:, None]], axis=1)
        counts_B = slots.counts_B + going_B
        stopped_B = slots.stopped_B | (going_B & ended(recent_BM, settings))
        slots = Slots(
            cache=cache,
            contents={window: advance(window, columns) for window, columns in contents.items()},
            recent_BM=recent_BM,
            places_B=slots.places_B + going_B,
            counts_B=counts_B,
            limits_B=slots.limits_B,
            keys_B2=slots.keys_B2,
            done_B=slots.done_B | stopped_B | (counts_B >= slots.limits_B),
            stopped_B=stopped_B,
        )
        return i + 1, slots, write(tokens_BN, next_B, i), write(logps_BN, logp_B, i)

    tokens_BN = jnp.zeros((B, MOST_STEPS), jnp.int32)
    i, slots, tokens_BN, logps_BN = jax.lax.while_loop(
        unfinished, step, (jnp.int32(0), slots, tokens_BN, jnp.zeros(tokens_BN.shape, jnp.float32))
    )
    return slots._replace(cache=fixed.on_mesh(slots.cache)), (tokens_BN, logps_BN, i)


@functools.partial(jax.jit, static_argnames=("fixed", "ring", "new_ring", "new_prompt"))
def resize_slots(
    slots: Slots, rows_b: jax.Array | None, *, fixed: Fixed, ring: int, new_ring: int, new_prompt: int
) -> Slots:
    """The slots ``rows_b`` (None: all, in order) with a longer ring and more columns for prompts.

    A longer ring starts with its oldest column. The ring of a layer stays as it is if it already spans the window.
    """

    def longer(window: int) -> bool:
        return columns_seen(new_ring, window) > columns_seen(ring, window)

    def columns(window: int, rows_b: jax.Array | None, x: jax.Array, *, axis: int = 2, empty: int = 0) -> jax.Array:
        def pad(x: jax.Array, length: int) -> jax.Array:
            widths = [(0, length - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
            return jnp.pad(x, widths, constant_values=empty)

        recent, prompt = jnp.split(_rows(x, rows_b), [columns_seen(ring, window)], axis=axis)
        if longer(window):
            recent = jnp.roll(recent, -slots.contents[window].column, axis=axis)
        recent = pad(recent, columns_seen(new_ring, window))
        return jnp.concatenate([recent, pad(prompt, columns_seen(new_prompt, window))], axis=axis)

    def hold(window: int, contents: Contents) -> Contents:
        positions_BS = columns(window, rows_b, contents.positions_BS, axis=1, empty=-1)
        return Contents(positions_BS, jnp.int32(ring) if longer(window) else contents.column)

    others = {f: _rows(getattr(slots, f), rows_b) for f in Slots._fields[2:]}
    return Slots(
        cache=fixed.changed(columns, rows_b, slots.cache),
        contents={window: hold(window, contents) for window, contents in slots.contents.items()},
        **others,
    )
