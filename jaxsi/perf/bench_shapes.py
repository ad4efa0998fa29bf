"""Models for measuring speed: any that ``load`` takes, or a named shape with random weights."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.model import decoder
from jaxsi.model.decoder import ModelConfig, Weights
from jaxsi.perf.architectures import published
from jaxsi.text.tokenizer import Tokenizer, load_tokenizer
from jaxsi.toyworld.vocabulary import build_tokenizer

SHAPES = {
    # Small enough for a CPU: 32.0M and 153M weights.
    "s": ModelConfig(
        family="llama",
        vocab_size=8192,
        embed_dim=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=1408,
        max_positions=4096,
    ),
    "l": ModelConfig(
        family="llama",
        vocab_size=32_000,
        embed_dim=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=3072,
        max_positions=4096,
    ),
    "qwen3-0.6b": published("Qwen/Qwen3-0.6B"),
    "llama-1b": published("meta-llama/Llama-3.2-1B"),
    "llama-3-8b": published("meta-llama/Meta-Llama-3-8B"),
}


def model_to_measure(name: str, mesh: Mesh, dtype: str, weights_dtype: str) -> LM:
    """The LM of a shape, with random weights, or of a MODEL (write ./s for a folder with the name of a shape).

    Raises: LoadError: if ``name`` is neither.
    """
    if name not in SHAPES:
        try:
            return lmlib.load(name, mesh, dtype, weights_dtype=weights_dtype)
        except lmlib.LoadError as error:
            raise lmlib.LoadError(f"{error}; or give a shape: {', '.join(SHAPES)}") from error
    return random_lm(SHAPES[name], mesh, dtype, weights_dtype)


def random_lm(config: ModelConfig, mesh: Mesh, dtype: str, weights_dtype: str) -> LM:
    """A model with random weights. Its tokenizer is the embedded world's, whatever its vocabulary, because the bench
    uses only token ids."""
    weights = _cast(decoder.initialise(config, mesh, jax.random.key(0)), dtype=jnp.dtype(weights_dtype))
    return LM(config=config, weights=weights, tokenizer=_tokenizer(), mesh=mesh, dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(weights: Weights, *, dtype: Any) -> Weights:
    return jax.tree.map(lambda w: w.astype(dtype), weights)


@functools.cache
def _tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory(prefix="jaxsi-bench-") as folder:
        build_tokenizer(folder)
        return load_tokenizer(Path(folder))
