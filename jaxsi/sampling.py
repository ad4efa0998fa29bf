"""Generation: prefill, decode and token sampling in one compiled program per shape.

A response depends on the weights, the prompt and its own key; in float32 not on the batch, its order or the mesh. In
bfloat16 the rounding depends on their shapes, and a near tie may fall otherwise: the same in distribution only.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi import mesh as meshlib, model
from jaxsi.chat import marker_ids, render_prompt
from jaxsi.lm import LM, tokens_array
from jaxsi.model import ModelConfig, Weights
from jaxsi.records import Prompt, Response
from jaxsi.run import name_words

MAX_STOPS = 8
MAX_MARKER = 32  # tokens of a text that ends a response
FIRST_SEGMENT = 64  # decode steps before the cache grows for the first time; each growth doubles the steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How candidates are sampled; the defaults are the Self-Rewarding paper's. ``dtype`` of sampling, judging and
    scoring; ``batch_size`` rows are in flight at a time."""

    num_samples: int = 4
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 512
    batch_size: int = 64
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _check_settings(self.temperature, self.top_p, self.top_k, self.max_new_tokens, self.num_samples)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of ``generate``."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dtype"}


class PromptTooLongError(ValueError):
    """A prompt that leaves no room for its response in the model's context."""


class StaleRecordsError(ValueError):
    """Records on disk that another model made."""


class Settings(NamedTuple):
    """Sampling settings, traced: other values do not compile again. temperature 0 is greedy, top_k 0 and top_p 1 are
    off."""

    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    stop_ids: jax.Array  # [MAX_STOPS] int32, -1 for none
    marker: jax.Array  # [MAX_MARKER] int32: a text that ends a response, right-aligned after -1
    limit: jax.Array  # int32 scalar: most new tokens


class Sampled(NamedTuple):
    """tokens_BM int32 and logps_BM float32 (untruncated softmax, temperature 1); counts_B new tokens, the stop id or
    the marker among them; stopped_B whether one of these ended the row; steps, decode steps run."""

    tokens_BM: jax.Array
    logps_BM: jax.Array
    counts_B: jax.Array
    stopped_B: jax.Array
    steps: jax.Array


# ------------------------------------------------------------------------------------------------------- token sampling


def _threshold(p_BV: jax.Array, measure: Any, target_B: jax.Array) -> jax.Array:
    """The largest t per row with measure(p >= t) >= target, found by bisection over the bits of non-negative floats,
    whose integer order is their own: exact in 31 passes, where a sort of the vocabulary costs many times more."""
    low = jnp.zeros(p_BV.shape[:1], jnp.int32)
    high = jnp.full(p_BV.shape[:1], np.float32(2.0).view(np.int32), jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = measure(p_BV >= threshold) >= target_B
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def truncate(p_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Unnormalised probabilities: 0 but for the top k and, of these, the nucleus of mass p (ties are kept)."""

    def keep_top_k(p_BV: jax.Array) -> jax.Array:
        k_B = jnp.where(top_k_B > 0, top_k_B, p_BV.shape[1])
        t_B = _threshold(p_BV, lambda kept: jnp.sum(kept, axis=-1), k_B)
        return jnp.where(p_BV >= t_B[:, None], p_BV, 0.0)

    def keep_nucleus(p_BV: jax.Array) -> jax.Array:
        mass_B = jnp.minimum(top_p_B, 1.0) * jnp.sum(p_BV, axis=-1)
        t_B = _threshold(p_BV, lambda kept: jnp.sum(jnp.where(kept, p_BV, 0.0), axis=-1), mass_B)
        return jnp.where((p_BV >= t_B[:, None]) | (top_p_B >= 1.0)[:, None], p_BV, 0.0)

    p_BV = jax.lax.cond(jnp.any(top_k_B > 0), keep_top_k, lambda p: p, p_BV)
    return jax.lax.cond(jnp.any(top_p_B < 1.0), keep_nucleus, lambda p: p, p_BV)


def draw(p_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """Index [B] int32 drawn from unnormalised probabilities by inverting the CDF at u in [0, 1), in two levels."""
    B, V = p_BV.shape
    width = max(1, int(V**0.5))
    p_BNW = jnp.pad(p_BV, ((0, 0), (0, -V % width))).reshape(B, -1, width)
    mass_BN = jnp.sum(p_BNW, axis=-1)
    ends_BN = jnp.cumsum(mass_BN, axis=-1)
    target_B = u_B * ends_BN[:, -1]
    block_B = _first_crossing(ends_BN, mass_BN, target_B)
    row_BW = jnp.take_along_axis(p_BNW, block_B[:, None, None], axis=1)[:, 0]
    starts_BN = jnp.pad(ends_BN[:, :-1], ((0, 0), (1, 0)))
    start_B1 = jnp.take_along_axis(starts_BN, block_B[:, None], axis=1)
    within_B = _first_crossing(start_B1 + jnp.cumsum(row_BW, axis=-1), row_BW, target_B)
    return (block_B * width + within_B).astype(jnp.int32)


def _first_crossing(ends_BN: jax.Array, mass_BN: jax.Array, target_B: jax.Array) -> jax.Array:
    """The first index whose end lies above the target and whose mass is not 0. Parallel prefix sums are not monotone
    to the last bit: without the second condition a token that was cut off could be drawn, and at the very end none
    may cross (the likeliest then)."""
    crossing_BN = (ends_BN > target_B[:, None]) & (mass_BN > 0)
    found_B = jnp.any(crossing_BN, axis=-1)
    return jnp.where(found_B, jnp.argmax(crossing_BN, axis=-1), jnp.argmax(mass_BN, axis=-1))


def sample_tokens(logits_BV: jax.Array, keys_B: jax.Array, step: jax.Array, s: Settings) -> tuple[jax.Array, jax.Array]:
    """Next tokens [B] and their log-probabilities [B] under the untruncated softmax at temperature 1."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def sampled(_: None) -> jax.Array:
        u_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys_B)
        scaled_BV = logits_BV / jnp.maximum(s.temperature_B, 1e-6)[:, None]
        p_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
        token_B = draw(truncate(p_BV, s.top_p_B, s.top_k_B), u_B)
        return jnp.where(s.temperature_B > 0, token_B, greedy_B)

    token_B = jax.lax.cond(jnp.any(s.temperature_B > 0), sampled, lambda _: greedy_B, None)
    logp_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)
    return token_B, logp_B


# ------------------------------------------------------------------------------------------------------ the one program


@functools.partial(jax.jit, static_argnames=("config", "mesh", "dtype", "num_samples", "capacity"))
def generate_tokens(
    weights: Weights,
    prompts_PT: jax.Array,
    lengths_P: jax.Array,
    real_P: jax.Array,
    key_words_B2: jax.Array,
    settings: Settings,
    *,
    config: ModelConfig,
    mesh: Mesh,
    dtype: Any,
    num_samples: int,
    capacity: int,
) -> Sampled:
    """Samples ``num_samples`` responses to each prompt: B = P * num_samples rows, prompt-major, from one prefill.

    Args:
      weights: unstacked (``LM.sampling_weights``). prompts_PT: int32, right-padded; lengths_P >= 1.
      real_P: bool, False for the rows that only fill the batch. key_words_B2: uint32, the data of one key a row.
      capacity: M, columns of the result; ``settings.limit`` of them are used.
    """
    keys_B = jax.random.wrap_key_data(key_words_B2, impl="threefry2x32")
    repeat = functools.partial(jnp.repeat, repeats=num_samples, axis=0)
    T = prompts_PT.shape[1]
    last_PD, cache = model.prefill(weights, config, prompts_PT, lengths_P, dtype=dtype)
    on_mesh = lambda x_BKSC: meshlib.constrain(x_BKSC, mesh, ("batch", "kv_heads", None, None))  # noqa: E731
    cache = [(on_mesh(repeat(k)), on_mesh(repeat(v))) for k, v in cache]
    lengths_B = repeat(lengths_P)
    B = lengths_B.shape[0]

    def is_stop(recent_BM: jax.Array) -> jax.Array:
        by_id_B = jnp.any(recent_BM[:, -1:] == settings.stop_ids[None, :], axis=-1)
        same_BM = (recent_BM == settings.marker[None, :]) | (settings.marker < 0)[None, :]
        return by_id_B | (jnp.all(same_BM, axis=-1) & (settings.marker[-1] >= 0))

    first_B, logp_B = sample_tokens(repeat(model.logits(weights, config, last_PD)), keys_B, jnp.int32(0), settings)
    tokens_BM = jnp.zeros((B, capacity), jnp.int32).at[:, 0].set(first_B)
    logps_BM = jnp.zeros((B, capacity), jnp.float32).at[:, 0].set(logp_B)
    # The newest tokens of each row, oldest first: what a marker is compared with.
    recent_BM = jnp.full((B, MAX_MARKER), -1, jnp.int32).at[:, -1].set(first_B)
    stopped_B = is_stop(recent_BM)
    counts_B = jnp.ones((B,), jnp.int32)
    real_B = repeat(real_P)
    state = (jnp.int32(1), recent_BM, tokens_BM, logps_BM, counts_B, stopped_B, cache)

    columns_S = jnp.arange(T + capacity, dtype=jnp.int32)
    prompt_BS = jnp.where(columns_S[None] < lengths_B[:, None], columns_S[None], -1)
    positions_BS = jnp.where(columns_S[None] < T, prompt_BS, lengths_B[:, None] + columns_S[None] - T)

    start = 0
    while start < capacity:
        # Each segment reads a cache of its own static length: no slice per step, no full-length read at the start.
        end = min(capacity, max(FIRST_SEGMENT, 2 * start))
        grow = lambda x_BKSC, n=end - start: on_mesh(jnp.pad(x_BKSC, ((0, 0), (0, 0), (0, n), (0, 0))))  # noqa: E731
        state = (*state[:6], [(grow(k), grow(v)) for k, v in state[6]])

        def unfinished(state: Any, end: int = end) -> jax.Array:
            return (state[0] <= end) & (state[0] < settings.limit) & ~jnp.all(state[5] | ~real_B)

        def step(state: Any, end: int = end) -> Any:
            i, recent_BM, tokens_BM, logps_BM, counts_B, stopped_B, cache = state
            done_B = stopped_B | ~real_B
            hidden_BD, cache = model.decode(
                weights,
                config,
                recent_BM[:, -1],
                lengths_B + i - 1,
                cache,
                T + i - 1,
                positions_BS[:, : T + end],
                dtype=dtype,
            )
            next_B, logp_B = sample_tokens(model.logits(weights, config, hidden_BD), keys_B, i, settings)
            next_B = jnp.where(done_B, 0, next_B)
            tokens_BM = jax.lax.dynamic_update_slice_in_dim(tokens_BM, next_B[:, None], i, axis=1)
            logps_BM = jax.lax.dynamic_update_slice_in_dim(logps_BM, jnp.where(done_B, 0.0, logp_B)[:, None], i, axis=1)
            counts_B = counts_B + ~done_B
            recent_BM = jnp.concatenate([recent_BM[:, 1:], next_B[:, None]], axis=1)
            stopped_B = stopped_B | (~done_B & is_stop(recent_BM))
            return i + 1, recent_BM, tokens_BM, logps_BM, counts_B, stopped_B, cache

        state = jax.lax.while_loop(unfinished, step, state)
        start = end
    steps, _, tokens_BM, logps_BM, counts_B, stopped_B, _ = state
    return Sampled(tokens_BM, logps_BM, counts_B, stopped_B, steps)


# ------------------------------------------------------------------------------------------------------------ host side


def bucket(n: int, smallest: int = 16) -> int:
    """The static length that ``n`` tokens are padded to: powers of two and the halves between them."""
    size = smallest
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > smallest else 2 ** (size.bit_length())
    return size


def generate_ids(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[jax.Array] | jax.Array,
    *,
    num_samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 0,
    max_new_tokens: int = 256,
    stop_ids: Sequence[int] | None = None,
    marker: Sequence[int] = (),
    batch_size: int = 64,
) -> list[list[tuple[list[int], list[float], bool]]]:
    """Samples from prompts given as token ids.

    Args:
      keys: [len(prompts)] typed keys; sample number n of a prompt uses its key folded with n.
      stop_ids: default the tokenizer's. marker: token ids that end a response too, as ``marker_ids`` gives them.
      batch_size: rows in flight (prompts x num_samples), rounded to the mesh and to whole prompts. In float32 it does
        not change the responses; in bfloat16 they are the same in distribution only.

    Returns:
      For each prompt, ``num_samples`` triples (new token ids, the stop id included; their logps; stopped).

    Raises:
      PromptTooLongError: a prompt and ``max_new_tokens`` exceed the model's positions.
      ValueError: a setting out of its range.
    """
    _check_settings(temperature, top_p, top_k, max_new_tokens, num_samples)
    for prompt in prompts:
        if not 0 < len(prompt) <= lm.config.max_positions - max_new_tokens:
            raise PromptTooLongError(
                f"a prompt has {len(prompt)} tokens (at least 1) and may take {max_new_tokens} more; the model has "
                f"{lm.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )
    if not prompts:
        return []
    P = _prompts_in_batch(lm, num_samples, batch_size, len(prompts))
    stop_ids = lm.tokenizer.stop_ids if stop_ids is None else stop_ids
    settings = _settings(lm, P * num_samples, temperature, top_p, top_k, max_new_tokens, stop_ids, marker)
    keys = keys if isinstance(keys, jax.Array) else jnp.stack(keys)
    results: list[list[tuple[list[int], list[float], bool]]] = [[] for _ in prompts]
    pending: tuple[list[int], Sampled] | None = None
    for rows, length in _batches([len(p) for p in prompts], P):
        sampled = generate_tokens(
            lm.sampling_weights,
            *_inputs(lm, prompts, keys, rows, length, P, num_samples),
            settings,
            config=lm.config,
            mesh=lm.mesh,
            dtype=jnp.dtype(lm.dtype),
            num_samples=num_samples,
            capacity=bucket(max_new_tokens),
        )
        if pending is not None:  # this batch is on its way: the device does not wait for the host to read the last one
            _collect(results, *pending, num_samples)
        pending = rows, sampled
    if pending is not None:
        _collect(results, *pending, num_samples)
    return results


def _check_settings(temperature: float, top_p: float, top_k: int, max_new_tokens: int, num_samples: int) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it is a number of at least 0 (0 is greedy)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it lies in (0, 1]")
    if top_k < 0 or max_new_tokens < 1 or num_samples < 1:
        raise ValueError(
            f"top_k {top_k} >= 0, max_new_tokens {max_new_tokens} >= 1, num_samples {num_samples} >= 1 must hold"
        )


def _prompts_in_batch(lm: LM, num_samples: int, batch_size: int, count: int) -> int:
    """P: whole prompts in equal parts over the mesh, as many as ``batch_size`` rows hold; of fewer, a power of two."""
    parts = meshlib.axis_size(lm.mesh, "batch")
    most = max(1, batch_size // num_samples // parts)
    return parts * min(most, 2 ** math.ceil(math.log2(-(-count // parts))))


def _settings(
    lm: LM,
    B: int,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    marker: Sequence[int],
) -> Settings:
    """The same settings for each of B rows, on the mesh."""
    if len(stop_ids) > MAX_STOPS:
        raise ValueError(f"{len(stop_ids)} stop ids given, at most {MAX_STOPS} are supported: {list(stop_ids)}")
    if len(marker) > MAX_MARKER:
        raise ValueError(f"the marker that ends a response has {len(marker)} tokens, at most {MAX_MARKER}; shorten it")
    by_row = meshlib.sharding(lm.mesh, ("batch",))
    return Settings(
        temperature_B=jax.device_put(np.full(B, temperature, np.float32), by_row),
        top_p_B=jax.device_put(np.full(B, top_p, np.float32), by_row),
        top_k_B=jax.device_put(np.full(B, top_k, np.int32), by_row),
        stop_ids=jnp.asarray([*stop_ids, *[-1] * (MAX_STOPS - len(stop_ids))], jnp.int32),
        marker=jnp.asarray([*[-1] * (MAX_MARKER - len(marker)), *marker], jnp.int32),
        limit=jnp.int32(max_new_tokens),
    )


@functools.partial(jax.jit, static_argnames="num_samples")
def _sample_keys(keys_N: jax.Array, num_samples: int) -> jax.Array:
    """Keys [N, num_samples]: each prompt's key folded with the sample's number."""
    return jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(num_samples)))(keys_N)


@jax.jit
def _fold_words(key: jax.Array, words_N2: jax.Array) -> jax.Array:
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]))(words_N2)


def named_keys(key: jax.Array, names: Sequence[str]) -> jax.Array:
    """Keys [N]: what ``run.fold(key, name)`` gives for each name, for thousands of names at once."""
    words_N2 = np.asarray([name_words(name) for name in names], np.uint32).reshape(-1, 2)
    padded = np.zeros((bucket(len(words_N2)), 2), np.uint32)  # one program for all numbers of names of a bucket
    padded[: len(words_N2)] = words_N2
    return _fold_words(key, padded)[: len(words_N2)]


def _batches(lengths: Sequence[int], rows: int) -> Iterator[tuple[list[int], int]]:
    """Batches of prompt numbers, alike in length, with the length that each is padded to."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        yield batch, bucket(lengths[batch[-1]])


def _inputs(
    lm: LM, prompts: Sequence[Sequence[int]], keys: jax.Array, rows: list[int], length: int, P: int, num_samples: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Tokens, lengths and presence of P prompts and the keys of their samples; prompts ``rows``, then fill."""
    filled = rows + [rows[0]] * (P - len(rows))  # the last batch has the shape of the others
    put = lambda x, *axes: jax.device_put(x, meshlib.sharding(lm.mesh, ("batch", *axes)))  # noqa: E731
    return (
        put(tokens_array([list(prompts[i]) for i in filled], length, lm.tokenizer.pad_id), None),
        put(np.asarray([len(prompts[i]) for i in filled], np.int32)),
        put(np.arange(P) < len(rows)),
        # As words: unlike typed keys, NumPy can be laid out over the devices of several processes.
        put(np.asarray(jax.random.key_data(_sample_keys(keys[np.asarray(filled)], num_samples))).reshape(-1, 2), None),
    )


def _collect(results: list, rows: list[int], sampled: Sampled, num_samples: int) -> None:
    tokens, logps, counts, stopped, _ = meshlib.fetch(sampled)
    for place, i in enumerate(rows):
        for b in range(place * num_samples, (place + 1) * num_samples):
            n = int(counts[b])
            results[i].append((tokens[b, :n].tolist(), [float(x) for x in logps[b, :n]], bool(stopped[b])))


def generate(
    lm: LM,
    prompts: Sequence[Prompt | str],
    *,
    num_samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 0,
    max_new_tokens: int = 256,
    stop_text: str | None = None,
    key: jax.Array | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Response]:
    """Samples ``num_samples`` responses to each prompt, prompt-major.

    Args:
      prompts: records, or plain texts (which become prompts with their number as id).
      stop_text: the beginning of a line that ends a response too; it stays part of the response.
      key: typed key of the stage; a response's noise is this key folded with its prompt id and sample number. Default:
        from ``seed``.

    Raises:
      PromptTooLongError: names the prompt.
    """
    _check_settings(temperature, top_p, top_k, max_new_tokens, num_samples)
    records = [p if isinstance(p, Prompt) else Prompt.of(str(i), p) for i, p in enumerate(prompts)]
    key = jax.random.key(seed) if key is None else key
    ids = [render_prompt(lm.tokenizer, p.messages) for p in records]
    for p, row in zip(records, ids, strict=True):
        if len(row) > lm.config.max_positions - max_new_tokens:
            raise PromptTooLongError(
                f"prompt {p.id!r} has {len(row)} tokens and may take {max_new_tokens} more; the model has "
                f"{lm.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )
    keys = named_keys(key, [p.id for p in records])
    sampled = generate_ids(
        lm, ids, keys, num_samples=num_samples, temperature=temperature, top_p=top_p, top_k=top_k,
        max_new_tokens=max_new_tokens, batch_size=batch_size,
        marker=() if stop_text is None else marker_ids(lm.tokenizer, stop_text),
    )  # fmt: skip
    return [
        Response(
            id=f"{p.id}#{n}",
            prompt_id=p.id,
            sample=n,
            text=lm.tokenizer.decode(token_ids),
            token_ids=tuple(token_ids),
            logps=tuple(logps),
            finish_reason="stop" if stopped else "length",
            fingerprint=lm.fingerprint,
            template=lm.tokenizer.template_hash,
        )
        for p, samples in zip(records, sampled, strict=True)
        for n, (token_ids, logps, stopped) in enumerate(samples)
    ]


def check_sampled_by(lm: LM, responses: Sequence[Response]) -> None:
    """Raises StaleRecordsError where a response is of other weights or another chat template than ``lm``'s: a file of
    records outlives the model folder that it was made with."""
    for r in responses:
        if (r.fingerprint, r.template) != (lm.fingerprint, lm.tokenizer.template_hash):
            raise StaleRecordsError(
                f"response {r.id!r} was sampled by weights {r.fingerprint} with template {r.template}; this model has "
                f"{lm.fingerprint} and {lm.tokenizer.template_hash}: restore the model of this run, or start a new "
                "run directory"
            )
