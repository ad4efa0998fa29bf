"""Speed of generation, scoring and training: tokens/s, what compiling took, memory, and the share of what the hardware
gives, measured in the same run."""

import dataclasses
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsi.lm import LM
from jaxsi.model import kv_cache
from jaxsi.model.decoder import Remat
from jaxsi.perf import machine_rates
from jaxsi.perf.bench_work import GenerateWork, WorkError
from jaxsi.runs.progress import progress
from jaxsi.sampling import engine, generate, prefixes, scoring
from jaxsi.sampling.token_sampling import MAX_MARKER, MAX_STOPS, Settings
from jaxsi.training import batches as data, losses, train
from jaxsi.training.batches import PairBatch, TokenBatch
from jaxsi.training.optim import OptimConfig

BETA = 0.1  # of DPO
LEARNING_RATE = 1e-5
Did = TypeVar("Did")


# --------------------------------------------------------------------------------------------------------------- timing


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of the first call, in which programs are compiled, and of those after it; what the last one returned."""

    first: float
    seconds: list[float]
    did: Any

    @property
    def compiling(self) -> float:
        return max(0.0, self.first - statistics.median(self.seconds))

    def per_second(self, amount: float) -> dict[str, Any]:
        return spread([amount / seconds for seconds in self.seconds])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of the values, and how many there are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def seconds_of(run: Callable[[], Did]) -> tuple[float, Did]:
    """How long a call took that returns when its work is done, and what it returned."""
    start = time.perf_counter()
    did = run()
    return time.perf_counter() - start, did


def timed(run: Callable[[], Any], reps: int, label: str) -> Timed:
    """One call to compile, then ``reps``, of which at least 1 is needed."""
    with progress(label, reps + 1) as advance:
        first, did = seconds_of(run)
        advance(1, True)
        seconds = []
        for _ in range(reps):
            took, did = seconds_of(run)
            seconds.append(took)
            advance(1, True)
    return Timed(first, seconds, did)


def peak_memory(lm: LM) -> dict[str, Any]:
    """Bytes at the highest so far: of the devices where they tell, else of the process."""
    stats = [device.memory_stats() for device in lm.mesh.local_devices if device.platform != "cpu"]
    if stats and all(s and "peak_bytes_in_use" in s for s in stats):
        return {"bytes": sum(s["peak_bytes_in_use"] for s in stats if s), "of": "devices of this process"}
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's figure may be that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return {"bytes": int(line.split()[1]) * 1024, "of": "resident set of this process"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of": "resident set of this process"}


# ----------------------------------------------------------------------------------------------------------- generation


def settings(work: GenerateWork) -> Settings:
    """Nothing but a row's limit ends it."""
    return Settings(
        temperature=jnp.float32(work.temperature),
        top_p=jnp.float32(work.top_p),
        top_k=jnp.int32(0),
        stop_ids=jnp.full((MAX_STOPS,), -1, jnp.int32),
        marker=jnp.full((MAX_MARKER,), -1, jnp.int32),
        limit=jnp.int32(work.longest),
    )


def generator(lm: LM, work: GenerateWork) -> Callable[[], engine.Work]:
    """Does the work, and checks that it was all done."""
    keys_P = jax.random.split(jax.random.key(0), len(work.prompts))
    wanted = [list(row) for row in work.limits]

    def run() -> engine.Work:
        results, did = engine.run(
            lm, work.prompts, keys_P, settings(work),
            limit=work.longest, num_samples=work.num_samples, batch_size=work.slots, limits=wanted,
            group=work.group, cache=work.cache,
        )  # fmt: skip
        made = [[len(ids) for ids, _, _ in samples] for samples in results]
        if made != wanted:
            raise WorkError(f"rows have {made} new tokens in place of {wanted}: the engine did other work than asked")
        return did

    return run


def greedy(lm: LM, prompts: Sequence[Sequence[int]], new: int, slots: int) -> list[list[int]]:
    """The likeliest ``new`` tokens after each prompt, one after the other."""
    keys_P = jax.random.split(jax.random.key(0), len(prompts))
    made = generate.generate_ids(
        lm, prompts, keys_P, temperature=0.0, top_p=1.0, max_new_tokens=new, stop_ids=(), batch_size=slots
    )
    return [samples[0][0] for samples in made]


def distinct_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of the prompts, each shared beginning counted once."""
    order = sorted(map(list, prompts))
    shared = [prefixes.common_length(a, b) for a, b in itertools.pairwise(order)]
    return sum(map(len, order)) - sum(shared)


def measure_generate(lm: LM, work: GenerateWork, reps: int) -> dict[str, Any]:
    """Speed of the sampling engine on the work."""
    result = timed(generator(lm, work), reps, "jaxsi")
    memory = peak_memory(lm)  # before the ceilings are measured, on arrays of their own
    did: engine.Work = result.did
    rows = work.rows
    slots = min(work.slots, len(rows))
    itemsize = jnp.dtype(lm.dtype).itemsize
    limits = machine_rates.measure(lm.config, lm.mesh, jnp.dtype(lm.dtype), rows=slots, tokens=did.prompt_tokens)
    distinct = distinct_tokens(work.prompts)
    spans = [(len(prompt), len(prompt) + limit - 1) for prompt, limit in rows]
    prompt_floor = machine_rates.floor_of_prompts(lm.config, distinct, len(rows), limits)
    column = kv_cache.bytes_of_number(work.cache, itemsize, lm.config.head_dim)
    decode_floor, steps = machine_rates.floor_of_decoding(lm.config, spans, slots, itemsize, limits, cached=column)
    decoded = did.new_tokens - len(rows)  # the first token of a row comes with its prompt
    median = statistics.median(result.seconds)
    return {
        "seconds": spread(result.seconds),
        "new_tokens_per_second": result.per_second(did.new_tokens),
        "prompt_tokens_per_second": result.per_second(did.prompt_tokens),
        "compile_seconds": result.compiling,
        "rows": len(rows),
        "new_tokens": did.new_tokens,
        "prompt_tokens": did.prompt_tokens,
        "prefilled_tokens": did.prefilled,
        "distinct_prompt_tokens": distinct,
        "slot_steps": did.slot_steps,
        "useful_slot_steps": decoded / did.slot_steps if did.slot_steps else None,
        "floor_seconds": prompt_floor + decode_floor,
        "floor_of_prompts_seconds": prompt_floor,
        "floor_of_a_step_seconds": decode_floor / steps if steps else None,
        "share_of_floor": (prompt_floor + decode_floor) / median,
        "peak_memory": memory,
        "ceilings": limits._asdict(),
    }


# -------------------------------------------------------------------------------------------------------------- scoring


def scorer(lm: LM, rows: Sequence[Sequence[int]], batch_size: int) -> Callable[[], list[np.ndarray]]:
    """Log-probabilities of all tokens of each row but its first."""
    firsts, rests = [row[:1] for row in rows], [row[1:] for row in rows]
    return lambda: scoring.score_ids(lm, firsts, rests, batch_size=batch_size)


def measure_score(lm: LM, rows: Sequence[Sequence[int]], batch_size: int, reps: int) -> dict[str, Any]:
    """Speed of scoring rows of one length."""
    result = timed(scorer(lm, rows, batch_size), reps, "jaxsi")
    flops = machine_rates.forward_flops(lm.config, [len(row) for row in rows])
    return _efficiency(lm, result, rows, flops, batch_size * len(rows[0]), lm.dtype)


# ------------------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainWork:
    """One batch that every step trains on: ``rows`` of one length, two neighbours a pair where ``objective`` is dpo,
    whose ``shared`` first tokens are their prompt."""

    objective: str
    rows: Sequence[Sequence[int]]
    dtype: str
    remat: Remat
    steps: int

    def __post_init__(self) -> None:
        if self.objective == "dpo" and len(self.rows) % 2:
            raise WorkError(f"--batch {len(self.rows)} rows are no pairs; give an even number")

    @property
    def shared(self) -> int:
        """Tokens of the prompt: of a pair a quarter of the row, else the first."""
        return max(1, len(self.rows[0]) // 4) if self.objective == "dpo" else 1

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """(chosen, rejected), after the same prompt."""
        both = zip(self.rows[::2], self.rows[1::2], strict=True)
        return [(list(a), [*a[: self.shared], *b[self.shared :]]) for a, b in both]

    @property
    def tokens(self) -> int:
        """That a call of ``steps`` steps trains on."""
        return self.steps * len(self.rows) * len(self.rows[0])


class Trainer:
    """Training steps on one batch, as ``fit`` makes them, without its files. ``lm`` has float32 weights."""

    def __init__(self, lm: LM, work: TrainWork) -> None:
        train.check_master(lm)
        self.work = work
        self.optimizer = OptimConfig(learning_rate=LEARNING_RATE)
        config = train.TrainConfig(
            optim=self.optimizer, batch_size=len(work.rows), min_length=1, dtype=work.dtype, remat=work.remat
        )
        make = _pair_training if work.objective == "dpo" else _supervised_training
        self.loss, self.batch = make(lm, work, config)
        self.state = train.initial_state(lm.weights, self.optimizer)

    def step(self) -> dict[str, jax.Array]:
        """One step; its metrics, not waited for."""
        rate = np.float32(LEARNING_RATE)
        self.state, metrics = train.train_step(
            self.state, self.batch, rate, loss=self.loss, optimizer=self.optimizer, accumulate=1
        )
        return metrics

    def run(self) -> None:
        """``steps`` steps, done."""
        for _ in range(self.work.steps):
            self.step()
        jax.block_until_ready(self.state)


def _supervised_training(lm: LM, work: TrainWork, config: train.TrainConfig) -> tuple[train.SFTLoss, TokenBatch]:
    config.check(lm.mesh)
    sequences = [data.encode(row[:1], row[1:]) for row in work.rows]
    length, size = len(work.rows[0]), len(work.rows)
    batches = data.arrangement(lm.mesh)(sequences, length, size, lm.mesh, epochs=1, seed=0)
    return train.SFTLoss(lm.config, lm.mesh, work.dtype, work.remat), batches[0]


def _pair_training(lm: LM, work: TrainWork, config: train.TrainConfig) -> tuple[train.PairLoss, PairBatch]:
    config = dataclasses.replace(config, batch_size=len(work.pairs))
    config.check(lm.mesh)
    n = work.shared
    encoded = [tuple(data.encode(side[:n], side[n:]) for side in pair) for pair in work.pairs]
    pairs = [(chosen, rejected) for chosen, rejected in encoded]
    refs = train.reference_logps(lm, pairs, config)
    batches = data.pair_batches(lm, pairs, refs, len(pairs), epochs=1, seed=0, min_length=len(work.rows[0]))
    return train.PairLoss(lm.config, lm.mesh, work.dtype, work.remat, losses.dpo, BETA, 0.0), batches[0]


def measure_train(lm: LM, work: TrainWork, reps: int) -> dict[str, Any]:
    """Speed of training steps on one batch."""
    trainer = Trainer(lm, work)
    result = timed(trainer.run, reps, "jaxsi")
    rows = list(work.rows) * work.steps
    # Backward is twice the forward pass; what remat computes again is not counted as work.
    flops = 3 * machine_rates.forward_flops(lm.config, [len(row) for row in rows])
    value = _efficiency(lm, result, rows, flops, len(work.rows) * len(work.rows[0]), work.dtype)
    return value | {"step_seconds": spread([seconds / work.steps for seconds in result.seconds])}


def _efficiency(
    lm: LM, result: Timed, rows: Sequence[Sequence[int]], flops: float, tokens: int, dtype: Any
) -> dict[str, Any]:
    """Figures of scoring and training: tokens/s, and FLOP/s against the best matrix products of the device."""
    memory = peak_memory(lm)
    limits = machine_rates.measure(lm.config, lm.mesh, jnp.dtype(dtype), rows=tokens, tokens=tokens)
    sheet = machine_rates.datasheet_flops(lm.mesh, dtype)
    median = statistics.median(result.seconds)
    return {
        "seconds": spread(result.seconds),
        "tokens_per_second": result.per_second(sum(map(len, rows))),
        "compile_seconds": result.compiling,
        "flops_per_second": flops / median,
        "mfu": flops / median / limits.gemm_peak,
        "datasheet_mfu": None if sheet is None else flops / median / sheet,
        "peak_memory": memory,
        "ceilings": limits._asdict(),
    }
