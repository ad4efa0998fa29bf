"""Makes the seed model of the embedded world: ``python -m jaxsi.toyworld.seed OUT``.

A Llama-shaped model of about a million weights learns the documents of ``corpus.py`` from scratch: demonstrations of
mixed quality, worked verdicts, and new instructions. It is trained once, offline; the shipped one took 40 minutes on
two busy CPU cores. The toy runs begin with it.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsi.lm import LM, export
from jaxsi.model import decoder
from jaxsi.model.decoder import ModelConfig
from jaxsi.model.mesh import MeshConfig, make_mesh
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.text.tokenizer import load_tokenizer
from jaxsi.toyworld.corpus import pretraining_documents
from jaxsi.toyworld.vocabulary import ENTRIES, build_tokenizer
from jaxsi.training import batches, optim, packing, train
from jaxsi.training.optim import OptimConfig

SHIPPED = Path(__file__).parent / "seed_model"
DOCUMENTS_PER_CHUNK = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """How the seed is trained. The shipped one saw batches of 64 full rows, which is 176 documents on average."""

    steps: int = 3000
    batch_size: int = 176
    length: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    seed: int = 0


def model_config() -> ModelConfig:
    """The shape of the seed model."""
    return ModelConfig(
        family="llama", vocab_size=ENTRIES, embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
        mlp_dim=512, max_positions=1024, tie_embeddings=True,
    )  # fmt: skip


def make_seed(out: Path, config: SeedConfig) -> None:
    """Trains the seed model and writes it to ``out`` as a Hugging Face folder in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    start = LM(
        config=model_config(),
        weights=decoder.initialise(model_config(), mesh, jax.random.key(config.seed)),
        tokenizer=tokenizer,
        mesh=mesh,
        dtype=jnp.float32,
    )
    optimizer = OptimConfig(
        learning_rate=config.learning_rate,
        end_learning_rate=config.learning_rate / 50,
        warmup_steps=config.warmup_steps,
        b2=0.98,
        weight_decay=0.01,
    )
    rates = np.asarray(jax.vmap(optim.schedule(optimizer, config.steps))(jnp.arange(config.steps)))
    loss = train.SFTLoss(start.config, mesh, "float32", "none")
    state = train.initial_state(start.weights, optimizer)
    began = time.monotonic()
    for step, batch in enumerate(itertools.islice(_batches(start, config), config.steps)):
        state, metrics = train.train_step(state, batch, rates[step], loss=loss, optimizer=optimizer, accumulate=1)
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            left = seconds / (step + 1) * (config.steps - step - 1)
            line = {"step": step + 1, "loss": round(float(metrics["loss"]), 4)}
            print(json.dumps(line | {"seconds": round(seconds), "left": round(left)}), flush=True)
    export(start.replace(state.weights), out, dtype="bfloat16")


def _batches(lm: LM, config: SeedConfig) -> Iterator[Any]:
    """Endless packed batches; the next chunk is prepared while the present one trains."""

    def chunk(number: int) -> batches.Batches:
        documents = pretraining_documents(DOCUMENTS_PER_CHUNK, seed=config.seed * 1_000_003 + number)
        sequences = [
            batches.encode(render_prompt(lm.tokenizer, messages), render_response(lm.tokenizer, response))
            for messages, response in documents
        ]
        return packing.supervised(sequences, config.length, config.batch_size, lm.mesh, epochs=1, seed=number)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        following = pool.submit(chunk, 0)
        for number in itertools.count(1):
            current, following = following.result(), pool.submit(chunk, number)
            yield from (current[i] for i in range(len(current) - 1))  # the last batch is not full


if __name__ == "__main__":
    import os

    import tyro

    # XLA runs the elementwise work of a CPU device on one thread. With a device for each core, training has 1.4 times
    # the speed.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())

    def main(out: tyro.conf.Positional[Path], config: SeedConfig = SeedConfig()) -> None:
        make_seed(out, config)

    tyro.cli(main, description=__doc__)
