"""Generation: responses to prompts, by the sampling engine.

A response depends on the weights, the prompt and its own key. In float32 it does not depend on the batch, its order or
the mesh. In bfloat16 the rounding depends on their shapes, which may decide a near tie: then responses are the same in
distribution only.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxsi.lm import LM
from jaxsi.model.kv_cache import KVCache
from jaxsi.runs.config_snapshot import AUTO, stored_as
from jaxsi.runs.named_keys import name_words
from jaxsi.runs.records import Prompt, Response, as_prompts
from jaxsi.sampling import engine
from jaxsi.sampling.token_sampling import MAX_MARKER, MAX_STOPS, Settings
from jaxsi.text.chat import marker_ids, naming, read_response, render_prompt
from jaxsi.text.chat_config import Thought


@stored_as("sampling.SamplingConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How candidates are sampled; the defaults are the Self-Rewarding paper's. ``dtype`` of sampling, judging and
    scoring: "auto" is the one that the device is fast in. ``batch_size`` rows are in flight at a time. ``cache``: of
    their keys and values, "exact" in that dtype, or "int8", half of bfloat16 and not the same responses."""

    num_samples: int = 4
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 512
    batch_size: int = 64
    cache: KVCache = "exact"
    dtype: str = AUTO

    def __post_init__(self) -> None:
        _check_settings(self.temperature, self.top_p, self.top_k, self.max_new_tokens, self.num_samples)
        check_sampling(self.temperature, self.max_new_tokens, self.batch_size)
        if self.cache not in get_args(KVCache):
            raise ValueError(f"cache is {self.cache!r}; it is one of {', '.join(get_args(KVCache))}")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of ``generate``."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "dtype"}


class SamplingError(ValueError):
    """A model whose logits are not finite numbers."""


class PromptTooLongError(ValueError):
    """A prompt that leaves too little room for its response in the model's context."""


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
    cache: KVCache = "exact",
    watch: engine.Watch | None = None,
) -> list[list[tuple[list[int], list[float], bool]]]:
    """Samples responses to prompts that are lists of token ids.

    Args:
      keys: [len(prompts)] typed keys; sample number n of a prompt uses its key folded with n.
      stop_ids: by default those of the tokenizer.
      marker: token ids, from ``marker_ids``, that also end a response.
      batch_size: number of slots, that is of responses sampled at the same time, rounded to fit the mesh. In float32
        it does not change the responses; in bfloat16 they are the same in distribution only.
      cache: how keys and values are stored: "exact", in the model's dtype, or "int8".
      watch: ``watch(number of the prompt, number of the sample, token ids so far)`` is called every few tokens.

    Returns:
      For each prompt, ``num_samples`` triples (new token ids, including the stop id; their logps; stopped).

    Raises:
      PromptTooLongError: if a prompt and ``max_new_tokens`` exceed the model's positions.
      SamplingError: if the logits are not finite.
      ValueError: if a setting is out of range.
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
    results, _ = engine.run(
        lm,
        prompts,
        keys if isinstance(keys, jax.Array) else jnp.stack(keys),
        _settings(lm, temperature, top_p, top_k, max_new_tokens, stop_ids, marker),
        limit=max_new_tokens,
        num_samples=num_samples,
        batch_size=batch_size,
        cache=cache,
        watch=watch,
    )
    if not all(math.isfinite(math.fsum(logps)) for samples in results for _, logps, _ in samples):
        raise SamplingError(
            f"the model's logits are not finite in {jnp.dtype(lm.dtype)}; sample in bfloat16 or float32, and if that "
            "does not help, check the weights"
        )
    return results


def bucket(n: int, smallest: int = 16) -> int:
    """The static length to which ``n`` tokens are padded: a power of two, or the middle between two of them."""
    size = smallest
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > smallest else 2 ** (size.bit_length())
    return size


def check_sampling(temperature: float, max_new_tokens: int, batch_size: int, top_p: float = 1.0) -> None:
    """Raises: ValueError if a setting of a config that samples is out of range."""
    _check_settings(temperature, top_p, 0, max_new_tokens, 1)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def _check_settings(temperature: float, top_p: float, top_k: int, max_new_tokens: int, num_samples: int) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be a number of at least 0 (0 is greedy)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    if top_k < 0 or max_new_tokens < 1 or num_samples < 1:
        raise ValueError(
            f"top_k is {top_k}, max_new_tokens is {max_new_tokens}, num_samples is {num_samples}; "
            "they must be at least 0, 1 and 1"
        )


def _settings(
    lm: LM,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None,
    marker: Sequence[int],
) -> Settings:
    stop_ids = lm.tokenizer.stop_ids if stop_ids is None else stop_ids
    if len(stop_ids) > MAX_STOPS:
        raise ValueError(f"{len(stop_ids)} stop ids, but at most {MAX_STOPS} are supported: {list(stop_ids)}")
    if len(marker) > MAX_MARKER:
        raise ValueError(
            f"the marker that ends a response has {len(marker)} tokens, but at most {MAX_MARKER} are supported; "
            "shorten it"
        )
    return Settings(
        temperature=jnp.float32(temperature),
        top_p=jnp.float32(top_p),
        top_k=jnp.int32(top_k),
        stop_ids=jnp.asarray([*stop_ids, *[-1] * (MAX_STOPS - len(stop_ids))], jnp.int32),
        marker=jnp.asarray([*[-1] * (MAX_MARKER - len(marker)), *marker], jnp.int32),
        limit=jnp.int32(max_new_tokens),
    )


@jax.jit
def _fold_words(key: jax.Array, words_N2: jax.Array) -> jax.Array:
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]))(words_N2)


def named_keys(key: jax.Array, names: Sequence[str]) -> jax.Array:
    """Keys [N], equal to ``run.fold(key, name)`` for each name, for thousands of names at once."""
    words_N2 = np.asarray([name_words(name) for name in names], np.uint32).reshape(-1, 2)
    padded = np.zeros((bucket(len(words_N2)), 2), np.uint32)  # one program for all numbers of names in a bucket
    padded[: len(words_N2)] = words_N2
    return _fold_words(key, padded)[: len(words_N2)]


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
    cache: KVCache = "exact",
    watch: engine.Watch | None = None,
) -> list[Response]:
    """Samples ``num_samples`` responses to each prompt; those of one prompt are next to each other.

    Args:
      prompts: records, or plain texts (which become prompts with their number as id).
      stop_text: the beginning of a line that also ends a response; it stays part of the response.
      key: typed key of the stage; by default from ``seed``. A response's noise is this key folded with its prompt id
        and sample number.
      batch_size, cache, watch: as in ``generate_ids``.

    Raises:
      PromptTooLongError: if a prompt is too long; names the prompt.
    """
    _check_settings(temperature, top_p, top_k, max_new_tokens, num_samples)
    records = as_prompts(prompts)
    key = jax.random.key(seed) if key is None else key
    ids = []
    for p in records:
        with naming(f"prompt {p.id!r}"):
            ids.append(render_prompt(lm.tokenizer, p.messages))
    for p, row in zip(records, ids, strict=True):
        if len(row) > lm.config.max_positions - max_new_tokens:
            raise PromptTooLongError(
                f"prompt {p.id!r} has {len(row)} tokens and may take {max_new_tokens} more; the model has "
                f"{lm.config.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )
    keys = named_keys(key, [p.id for p in records])
    results = generate_ids(
        lm,
        ids,
        keys,
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        marker=() if stop_text is None else marker_ids(lm.tokenizer, stop_text),
        batch_size=batch_size,
        cache=cache,
        watch=watch,
    )
    return [
        as_response(lm, f"{p.id}#{n}", p.id, n, sampled, read_response(lm.tokenizer, sampled[0]))
        for p, samples in zip(records, results, strict=True)
        for n, sampled in enumerate(samples)
    ]


def as_response(
    lm: LM, id: str, prompt_id: str, number: int, sampled: tuple[list[int], list[float], bool], thought: Thought
) -> Response:
    """A triple of ``generate_ids`` as a record, with its text in the two parts of ``thought``."""
    token_ids, logps, stopped = sampled
    return Response(
        id=id,
        prompt_id=prompt_id,
        sample=number,
        text=thought.answer,
        token_ids=tuple(token_ids),
        logps=tuple(logps),
        finish_reason="stop" if stopped and thought.closed else "length",
        fingerprint=lm.fingerprint,
        template=lm.tokenizer.template_hash,
        reasoning=thought.reasoning,
    )


def sample(
    prompts: Sequence[Prompt], lm: LM, config: SamplingConfig, key: jax.Array, stop_text: str | None = None
) -> list[Response]:
    """``generate`` with the settings of a ``SamplingConfig``, as a stage for ``Scope.sharded``."""
    return generate(lm, prompts, key=key, stop_text=stop_text, **config.settings)
