"""LM: a model with its tokenizer on a mesh; loading from any folder the project knows, and saving."""

import dataclasses
import functools
import hashlib
import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi.hf import gguf, installed
from jaxsi.hf.config import config_json, read_config, read_json
from jaxsi.hf.export import write_folder
from jaxsi.hf.weights import load_weights
from jaxsi.model import compute_dtype, decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig, Weights
from jaxsi.runs import checkpoint
from jaxsi.runs.config_snapshot import AUTO
from jaxsi.runs.errors import InputError
from jaxsi.text.chat_config import ChatConfig
from jaxsi.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)
CHAT = "chat.json"  # in a checkpoint: what its chat template is told


class LoadError(InputError, ValueError):
    """A MODEL argument that is not a model folder, a hub name, a checkpoint or a run."""


class HubError(LoadError):
    """A hub name that could not be downloaded: the name may be wrong, or the network may be down for a while."""

    transient = True


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LM:
    """A language model. Never changed in place: ``replace`` makes the model of the next weights.

    ``weights`` is the canonical tree (layers stacked, sharded by the training rules); ``dtype`` is the one that
    sampling and scoring compute in; ``identity`` the fingerprint that a checkpoint was saved with; ``generation`` what
    generation_config.json says, which checkpoints and exports keep.
    """

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    mesh: Mesh
    dtype: Any = jnp.bfloat16
    identity: str | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def with_chat(self, chat: ChatConfig) -> "LM":
        """The same model, whose chat template is told ``chat``."""
        return dataclasses.replace(self, tokenizer=self.tokenizer.with_chat(chat), identity=self.fingerprint)

    def replace(self, weights: Weights) -> "LM":
        """The same model with other weights. Its identity is dropped."""
        return dataclasses.replace(self, weights=weights, identity=None)

    def logits(self, token_ids: Any) -> jax.Array:
        """[B, T] integers (NumPy or JAX) -> next-token logits [B, T, V] float32.

        Raises: ValueError if it is not [B, T] integers, or if an id is not in the vocabulary.
        """
        tokens_BT = jnp.asarray(token_ids)
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ValueError(f"token_ids has shape {tokens_BT.shape} of {tokens_BT.dtype}; give [B, T] integers")
        low, high = (int(x) for x in (jnp.min(tokens_BT, initial=0), jnp.max(tokens_BT, initial=0)))
        if low < 0 or high >= self.config.vocab_size:  # JAX would take the nearest row of the embedding
            raise ValueError(f"token_ids go from {low} to {high}; the vocabulary has {self.config.vocab_size} tokens")
        return decoder.full_logits(self.weights, self.config, tokens_BT.astype(jnp.int32), jnp.dtype(self.dtype))

    @property
    def sampling_weights(self) -> Weights:
        """Weights cast to ``dtype``, unstacked and laid out by the sampling rules. Only those of the model
        that sampled last are kept."""
        global _sampling
        if _sampling is None or _sampling[0]() is not self:
            _sampling = None  # first: the weights of two models may not fit
            _sampling = weakref.ref(self, _forget_sampling_weights), for_sampling(self)
        return _sampling[1]

    @property
    def template_hash(self) -> str:
        """The hash of the chat template, which sampled records keep beside the fingerprint."""
        return self.tokenizer.template_hash

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any bit of any weight, whatever the mesh.

        A checkpoint has the fingerprint that it was saved with, in every dtype. A folder has that of its weights as
        loaded: if they are stored in bfloat16 it is the same in every dtype; float32 that is rounded to bfloat16 on the
        way has another one.
        """
        return fingerprint(self.weights) if self.identity is None else self.identity


_sampling: tuple[weakref.ref[LM], Weights] | None = None  # the model that sampled last, and its sampling weights


def _forget_sampling_weights(model: weakref.ref[LM]) -> None:
    global _sampling
    if _sampling is not None and _sampling[0] is model:
        _sampling = None


def make_room() -> None:
    """Frees the sampling weights and the borrowed model; training calls it before it begins. Both are made again when
    they are needed."""
    global _sampling
    _sampling = None
    borrowed.cache_clear()


@functools.lru_cache(maxsize=1)
def borrowed(model: str, dtype: Any, mesh: Mesh | None = None) -> LM:
    """MODEL for sampling alone, such as a critic or a generator of prompts. One model is kept, until `make_room`."""
    return load(model, mesh, dtype)


def for_sampling(lm: LM) -> Weights:
    """The one place where weights move from the training layout to the sampling layout.

    Layer by layer: one program of all of them holds the copies twice while it runs.
    """
    move_top, move_layer = sampling_movers(lm.config, lm.mesh, jnp.dtype(lm.dtype))
    layers = lm.weights["layers"]
    top = move_top({name: w for name, w in lm.weights.items() if name != "layers"})
    return top | {"layers": [move_layer(layers, np.int32(i)) for i in range(lm.config.num_layers)]}


def sampling_layout(config: ModelConfig, mesh: Mesh) -> Weights:
    """The sharding of every weight while sampling, the layers unstacked."""
    rules = meshlib.SAMPLING_RULES
    layers = decoder.parameters(config)["layers"]
    one_layer = {name: meshlib.sharding(mesh, p.axes[1:], rules) for name, p in layers.items()}
    return decoder.weight_shardings(config, mesh, rules) | {"layers": [one_layer] * config.num_layers}


# Cached: jit knows programs by the function's identity, so new closures for each model would compile again.
@functools.lru_cache(maxsize=8)
def sampling_movers(
    config: ModelConfig, mesh: Mesh, dtype: Any
) -> tuple[Callable[..., Weights], Callable[..., Weights]]:
    """Two programs that make sampling weights: one moves what is outside the layers, the other moves one layer (given
    all stacked layers and its number)."""
    layout = sampling_layout(config, mesh)
    top = {name: sharding for name, sharding in layout.items() if name != "layers"}

    def move_top(weights: Weights) -> Weights:
        return jax.tree.map(lambda w: w.astype(dtype), weights)

    def move_layer(layers: Weights, i: jax.Array) -> Weights:
        return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False).astype(dtype), layers)

    return jax.jit(move_top, out_shardings=top), jax.jit(move_layer, out_shardings=layout["layers"][0])


@jax.jit
def _checksums(weights: Weights) -> list[jax.Array]:
    def checksum(w: jax.Array) -> jax.Array:
        # As float32, which holds bfloat16 exactly: a bfloat16 folder has one fingerprint, whatever it is loaded in.
        bits = jax.lax.bitcast_convert_type(w.astype(jnp.float32), jnp.uint32)
        index = jnp.zeros((), jnp.uint32)
        for axis in range(w.ndim):  # a position's number does not depend on how the array is cut
            index = index * w.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, w.shape, axis)
        mixed = (bits ^ (index * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
        return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)

    return [checksum(w) for w in jax.tree.leaves(weights)]


def _finite(weights: Weights) -> dict[str, bool]:
    """Whether all numbers of a weight are finite, by its name."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    return dict(zip(names, map(bool, jax.device_get(_all_finite(weights))), strict=True))


@jax.jit
def _all_finite(weights: Weights) -> list[jax.Array]:
    return [jnp.isfinite(w).all() for w in jax.tree.leaves(weights)]


def fingerprint(weights: Weights) -> str:
    """16 hex digits of the weights' bits: integer sums, so equal on every mesh."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    values = [int(v) for v in jax.device_get(_checksums(weights))]
    return hashlib.sha256(json.dumps(list(zip(names, values, strict=True))).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------- load and save


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = AUTO,
    *,
    weights_dtype: Any = None,
    chat: ChatConfig | None = None,
) -> LM:
    """Loads MODEL: a Hugging Face folder or hub name, a .gguf file, ``package:NAME`` (a Python package that has one in
    it), a jaxsi checkpoint, a run directory (its newest complete iteration) or ``RUN_DIR@t``.

    Args:
      mesh: where the weights go; by default all devices on the fsdp axis.
      dtype: of sampling and scoring; "auto" is bfloat16 if the device computes in it at speed, else float32.
      weights_dtype: of the stored weights, ``dtype`` by default; training wants float32.
      chat: what the chat template is told; by default what it was told when a checkpoint was saved.

    Raises:
      LoadError: the path is not a model. HFError, CheckpointError: it is one, and it is broken or not supported.
    """
    folder = resolve(path)
    mesh = mesh or meshlib.make_mesh()
    dtype = jnp.dtype(compute_dtype.actual(dtype))
    weights_dtype = jnp.dtype(weights_dtype or dtype)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    if chat is None and (folder / CHAT).is_file():
        chat = ChatConfig(**read_json(folder / CHAT))
    if chat is not None:
        tokenizer = tokenizer.with_chat(chat)
    if tokenizer.needed_size > config.vocab_size:
        raise LoadError(
            f"{folder}: the tokenizer has {tokenizer.needed_size} ids, the model an embedding of {config.vocab_size}; "
            "one of the two is from another model"
        )
    identity = None
    if (folder / "weights").is_dir():
        identity = checkpoint.read_meta(folder / "weights")["fingerprint"]
        abstract = decoder.abstract_weights(config, mesh, weights_dtype)
        weights = checkpoint.restore(folder / "weights", abstract, cast=True)
    else:
        weights = load_weights(folder, config, mesh, dtype=weights_dtype)
    return LM(
        config=config, weights=weights, tokenizer=tokenizer, mesh=mesh, dtype=dtype, identity=identity,
        generation=generation_config(folder),
    )  # fmt: skip


def generation_config(folder: Path) -> dict[str, Any]:
    """What the model's makers recommend for sampling, from generation_config.json; the ids of tokens are left out."""
    file = folder / "generation_config.json"
    kept = read_json(file) if file.is_file() else {}
    # With _from_model_config, transformers would read config.json in place of this file.
    return {key: value for key, value in kept.items() if not key.endswith("_token_id") and key != "_from_model_config"}


def save_checkpoint(lm: LM, folder: Path, meta: dict[str, Any]) -> None:
    """Writes what ``load`` needs: Orbax weights, the model's config and the tokenizer. The weights are written last,
    and they appear complete or not at all.

    Raises: CheckpointError if a weight is not finite.
    """
    if bad := [name for name, finite in _finite(lm.weights).items() if not finite]:
        reason = f"{len(bad)} of the model's weights are not finite, the first is {bad[0]}"
        raise checkpoint.CheckpointError(folder, reason, "lower the learning rate; earlier checkpoints are kept")
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (folder / "config.json").write_text(json.dumps(config_json(lm.config, dtype="float32"), indent=2))
        (folder / "generation_config.json").write_text(json.dumps(_generation_config(lm), indent=2))
        lm.tokenizer.save(folder)
        if lm.tokenizer.chat != ChatConfig():
            (folder / CHAT).write_text(json.dumps(dataclasses.asdict(lm.tokenizer.chat), indent=2))
    checkpoint.save(folder / "weights", lm.weights, meta | {"fingerprint": lm.fingerprint})


def export(
    lm: LM, folder: str | Path, *, dtype: str = "bfloat16", extras: Callable[[Path], None] | None = None
) -> None:
    """Writes a Hugging Face folder (safetensors, config, generation config, tokenizer, chat template). A reward model
    gets a pad token that ends no text: see ``Tokenizer.classifier_pad``."""
    tokenizer, generation, pad = lm.tokenizer, _generation_config(lm), None
    if lm.config.scalar_head:
        pad, generation["pad_token_id"] = tokenizer.classifier_pad or (None, None)

    def write_rest(target: Path) -> None:
        tokenizer.save(target, pad=pad)
        if extras is not None:
            extras(target)

    write_folder(Path(folder), lm.config, lm.weights, dtype=dtype, generation=generation, extras=write_rest)


def _generation_config(lm: LM) -> dict[str, Any]:
    """The model's sampling defaults, and all ids that end a response: a tokenizer's own files may name only one."""
    return {
        **lm.generation,
        "bos_token_id": lm.tokenizer.bos_id,
        "eos_token_id": list(lm.tokenizer.stop_ids),
        "pad_token_id": lm.tokenizer.pad_id,
    }


def resolve(path: str | Path) -> Path:
    """The folder that MODEL names; hub names are looked up in the local cache or downloaded at a pinned revision."""
    text = str(path)
    folder = installed.gguf_file(text) if installed.is_package(text) else Path(text)
    if gguf.is_gguf(folder):
        return gguf.as_folder(folder)
    if _is_run(folder):  # before "@", which a folder's own name may contain
        return _iteration(folder, None)
    if (folder / "config.json").is_file():
        return folder
    name, _, iteration = text.rpartition("@")
    if name and iteration.isdecimal() and _is_run(Path(name)):
        return _iteration(Path(name), int(iteration))
    if name and iteration.isdecimal() and Path(name).exists():
        raise LoadError(
            f"{text}: {name} is not a run directory (no summary.json in it); give {name} without @{iteration}"
        )
    if folder.exists():
        raise LoadError(
            f"{text}: no config.json in it, so it is neither a Hugging Face folder nor a checkpoint nor a run"
        )
    if text.count("/") == 1 and not text.startswith((".", "/")):
        return _from_hub(text)
    raise LoadError(
        f"{text}: no such folder; give a Hugging Face folder, a hub name, a checkpoint, RUN_DIR or RUN_DIR@2"
    )


def _is_run(folder: Path) -> bool:
    """Run directories hold a config.json too, of the method."""
    return (folder / "config.json").is_file() and any((folder / f).is_file() for f in ("summary.json", "journal.jsonl"))


def _iteration(run: Path, iteration: int | None) -> Path:
    found = sorted(
        (int(p.name.removeprefix("iter_")), p / "checkpoint") for p in run.glob("iter_*") if p.name[5:].isdecimal()
    )
    complete = {t: folder for t, folder in found if checkpoint.is_complete(folder / "weights")}
    if iteration is None and complete:
        newest = max(complete)
        reported, best = _reported(run)
        chosen = newest if best is None else best
        gone = reported if reported is not None and reported > newest else chosen if chosen not in complete else None
        if gone is not None:
            raise LoadError(
                f"{run}: summary.json counts iteration {gone}, but its checkpoint is gone or damaged; put it back, "
                f"or name another one, such as {run}@{newest}"
            )
        _log.warning("%s: iteration %d is used", run, chosen)
        return complete[chosen]
    if iteration in complete:
        return complete[iteration]
    have = ", ".join(map(str, complete)) or "none yet"
    wanted = "no iteration" if iteration is None else f"iteration {iteration} not"
    raise LoadError(f"{run}: {wanted} complete; there are complete checkpoints of iterations: {have}")


def _reported(run: Path) -> tuple[int | None, int | None]:
    """What summary.json says: the last iteration that is done, and the one that the method of a complete run found to
    be best, if that may be another one."""
    file = run / "summary.json"
    summary = read_json(file) if file.is_file() else {}
    done = [line["iteration"] for line in summary.get("iterations", [])]
    return max(done, default=None), summary.get("best") if summary.get("status") == "complete" else None


def _from_hub(name: str) -> Path:
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen types; to the user all of them mean this
        raise HubError(
            f"{name}: no such folder, and it could not be downloaded from the hub ({type(error).__name__}: {error})"
        ) from error
    if not revision:
        _log.warning("%s is at revision %s now; name it with @%s to get the same again", name, *[folder.name] * 2)
    return folder


def tokens_array(rows: Sequence[Sequence[int]], length: int, pad: int) -> np.ndarray:
    """Right-padded [len(rows), length] int32."""
    out = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
