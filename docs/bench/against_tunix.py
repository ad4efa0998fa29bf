"""Generation by jaxsi and by tunix's sampler in turns. Each has its own Python, because their dependencies conflict.

    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    python docs/bench/against_tunix.py --tunix tunix/bin/python --dtype float32

32 prompts of 16 to 127 random tokens, 128 new tokens each, temperature 0.7, top-p 0.9. Both sides have shape s with
random weights of their own, so texts are not compared. The first call, which compiles, is not counted.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

PROMPTS, NEW, VOCABULARY = 32, 128, 8192


def prompts() -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCABULARY, n).tolist() for n in rng.integers(16, 128, PROMPTS)]


def jaxsi_sampler(dtype: str) -> Callable[[int], int]:
    """A function that generates with a seed and returns the number of new tokens."""
    import jax
    import jax.numpy as jnp

    from jaxsi.lm import LM
    from jaxsi.model import decoder
    from jaxsi.model.mesh import make_mesh
    from jaxsi.perf.bench_shapes import SHAPES
    from jaxsi.sampling.generate import generate_ids

    class Tokenizer:
        pad_id, stop_ids = 0, ()

    config, mesh, texts = SHAPES["s"], make_mesh(), prompts()
    weights = decoder.initialise(config, mesh, jax.random.key(0))
    lm = LM(config=config, weights=weights, tokenizer=Tokenizer(), mesh=mesh, dtype=jnp.dtype(dtype))

    def run(seed: int) -> int:
        keys = jax.random.split(jax.random.key(seed), PROMPTS)
        results = generate_ids(lm, texts, keys, temperature=0.7, top_p=0.9, max_new_tokens=NEW, batch_size=PROMPTS)
        return sum(len(ids) for ((ids, _, _),) in results)

    return run


def tunix_sampler(dtype: str) -> Callable[[int], int]:
    """A function that generates with a seed and returns the number of new tokens."""
    import jax
    from flax import nnx
    from tunix.generate import sampler
    from tunix.models.llama3 import model

    class Tokenizer:
        encode = staticmethod(lambda text, **_: [int(word) for word in text.split()])
        decode = staticmethod(lambda ids, **_: " ".join(map(str, ids)))
        bos_id = pad_id = staticmethod(lambda: 0)
        eos_id = staticmethod(lambda: VOCABULARY + 1)  # never sampled

    config = model.ModelConfig(
        num_layers=8,
        vocab_size=VOCABULARY,
        embed_dim=512,
        hidden_dim=1408,
        num_heads=8,
        head_dim=64,
        num_kv_heads=4,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    network = model.Llama3(config, rngs=nnx.Rngs(0))
    nnx.update(network, jax.tree.map(lambda x: x.astype(dtype), nnx.state(network)))
    cache = sampler.CacheConfig(cache_size=128 + NEW, num_layers=8, num_kv_heads=4, head_dim=64)
    sample = sampler.Sampler(network, Tokenizer(), cache)
    texts = [" ".join(map(str, ids)) for ids in prompts()]

    def run(seed: int) -> int:
        results = sample(texts, NEW, max_prompt_length=128, temperature=0.7, top_p=0.9, seed=seed)
        return sum(len(ids) for ids in results.tokens)

    return run


def answer(run: Callable[[int], int]) -> None:
    """Prints a line with tokens/s for each seed on stdin."""
    run(0)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = run(int(line))
        print(tokens / (time.perf_counter() - start), flush=True)


class Side:
    """A sampler in its own process."""

    def __init__(self, python: str, name: str, dtype: str) -> None:
        command = [python, __file__, "--answer", name, "--dtype", dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            raise SystemExit(f"{name} did not start with {python}; see its stderr above")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def speed(self, seed: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return float(self._line())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", metavar="PYTHON", help="the Python of an environment with google-tunix")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--answer", choices=["jaxsi", "tunix"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        answer({"jaxsi": jaxsi_sampler, "tunix": tunix_sampler}[args.answer](args.dtype))
        return
    if not args.tunix or args.pairs < 1:
        parser.error("give --tunix PYTHON, and at least 1 pair")
    sides = Side(sys.executable, "jaxsi", args.dtype), Side(args.tunix, "tunix", args.dtype)
    pairs = []
    for i in range(args.pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        speeds = {side: sides[side].speed(i + 1) for side in order}
        pairs.append((speeds[0], speeds[1]))
        print(f"jaxsi {speeds[0]:,.0f}  tunix {speeds[1]:,.0f} tokens/s  ratio {speeds[0] / speeds[1]:.2f}", flush=True)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"medians: jaxsi {ours:,.0f}  tunix {theirs:,.0f} tokens/s  ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
