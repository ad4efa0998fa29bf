"""A tiny random model with the toy world's real tokenizer, for fast tests of the real code."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsi.lm import LM
from jaxsi.model import decoder
from jaxsi.model.decoder import ModelConfig
from jaxsi.model.mesh import MeshConfig, make_mesh
from jaxsi.runs.records import PreferencePair, Prompt, Response
from jaxsi.text.tokenizer import Tokenizer, load_tokenizer
from jaxsi.toyworld.vocabulary import ENTRIES, build_tokenizer
from jaxsi.training.batches import TokenBatch

# Every dimension that the mesh divides is divisible by 8, or by 2 if the tensor axis divides it.
CONFIG = ModelConfig(
    family="llama",
    vocab_size=ENTRIES,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_positions=256,
)
MESHES = {"1x1x1": (1, 1, 1), "2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8)}


@functools.cache
def mesh(name: str = "1x1x1") -> jax.sharding.Mesh:
    """The mesh ``data x fsdp x tensor`` of this name, on the first devices."""
    data, fsdp, tensor = MESHES[name]
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def tokenizer_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="jaxsi-tiny-"))
    build_tokenizer(folder)
    return folder


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(tokenizer_folder())


@functools.cache
def host_weights(seed: int = 0, config: ModelConfig = CONFIG) -> Any:
    """Weights far from their initial values: the next token depends on the text, is uncertain, and logits never tie."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, p: decoder.Parameter) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        scale = 1.0 if "embed" in name else 0.5 if "lm_head" in name else 0.3
        return (scale * rng.normal(size=p.shape) + ("norm" in name)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(
        draw, decoder.parameters(config), is_leaf=lambda x: isinstance(x, decoder.Parameter)
    )


def make_lm(mesh_name: str = "1x1x1", seed: int = 0, dtype: Any = jnp.float32, config: ModelConfig = CONFIG) -> LM:
    """A fresh LM, with the same weights (bit for bit) on every mesh."""
    devices = mesh(mesh_name)
    weights = jax.device_put(host_weights(seed, config), decoder.weight_shardings(config, devices))
    return LM(config=config, weights=weights, tokenizer=tokenizer(), mesh=devices, dtype=jnp.dtype(dtype))


def response(prompt: Prompt, sample: int, token_ids: list[int], *, stopped: bool = True) -> Response:
    """A record like those that sampling writes."""
    return Response(
        id=f"{prompt.id}#{sample}",
        prompt_id=prompt.id,
        sample=sample,
        text=tokenizer().decode(token_ids),
        token_ids=tuple(token_ids),
        logps=(0.0,) * len(token_ids),
        finish_reason="stop" if stopped else "length",
        fingerprint="0" * 16,
        template=tokenizer().template_hash,
    )


def preference_pairs(count: int, seed: int = 0, longest: int = 24) -> list[PreferencePair]:
    """Pairs of different lengths; every third response was cut off and has no end of turn."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        prompt = Prompt.of(f"p{i}", " ".join(["loop", "tree", "sun"][: 1 + i % 3]))

        def ids(n: int) -> list[int]:
            tokens = rng.integers(10, ENTRIES, rng.integers(1, longest)).tolist()
            return tokens if n % 3 == 0 else [*tokens, tokenizer().eos_id]

        sides = [response(prompt, n, ids(i + n), stopped=(i + n) % 3 != 0) for n in (0, 1)]
        pairs.append(
            PreferencePair(
                id=prompt.id,
                messages=prompt.messages,
                chosen=sides[0],
                rejected=sides[1],
                chosen_score=2.0,
                rejected_score=1.0,
            )
        )
    return pairs


def counted(batch: TokenBatch) -> np.ndarray:
    """[B, T] bool: the tokens that the loss counts, that is its targets."""
    tokens, places, targets = (np.asarray(x) for x in (batch.tokens_BT, batch.places_BR, batch.targets_BR))
    mask = np.zeros(tokens.shape, bool)
    for b, r in zip(*np.nonzero(targets >= 0), strict=True):
        column = places[b, r] + 1
        assert tokens[b, column] == targets[b, r] and not mask[b, column]
        mask[b, column] = True
    return mask


def max_difference(a: Any, b: Any) -> float:
    """Largest |a - b| over two trees of arrays, on any devices."""
    both = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in both)
