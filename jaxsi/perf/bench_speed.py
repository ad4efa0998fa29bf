"""Speed of generation, scoring and training: tokens/s, compile time, memory, and the share of the hardware's rates,
which are measured in the same run."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxsi.lm import LM
from jaxsi.model import kv_cache
from jaxsi.model.decoder import Remat
from jaxsi.perf import machine_rates
from jaxsi.perf.bench_work import GenerateWork, WorkError
from jaxsi.runs.memory import device_marks, host_mark
from jaxsi.runs.progress import progress
from jaxsi.sampling import engine, generate, prefixes, scoring
from jaxsi.sampling.token_sampling import MAX_MARKER, MAX_STOPS, Settings
from jaxsi.training import batches, losses, train
from jaxsi.training.batches import PairBatch, TokenBatch
from jaxsi.training.optim import OptimConfig
from jaxsi.training.packing import supervised
from jaxsi.training.reference import reference_logps

BETA = 0.1  # of DPO
LEARNING_RATE = 1e-5
Result = TypeVar("Result")


# --------------------------------------------------------------------------------------------------------------- timing


@dataclasses.dataclass(frozen=True)
class Timed:
    """``first``: seconds of the first call, which compiles. ``seconds``: of the calls after it. ``result``: of the last
    call."""

    first: float
    seconds: list[float]
    result: Any

    @property
    def compiling(self) -> float:
        return max(0.0, self.first - statistics.median(self.seconds))

    def per_second(self, amount: float) -> dict[str, Any]:
        return spread([amount / seconds for seconds in self.seconds])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of the values, and their number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def seconds_of(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call, which must return only when its work is done, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def timed(run: Callable[[], Any], reps: int, label: str) -> Timed:
    """One call that compiles, then ``reps`` calls (at least 1)."""
    with progress(label, reps + 1) as advance:
        first, result = seconds_of(run)
        advance(1, True)
        seconds = []
        for _ in range(reps):
            duration, result = seconds_of(run)
            seconds.append(duration)
            advance(1, True)
    return Timed(first, seconds, result)


def peak_memory(lm: LM) -> dict[str, Any]:
    """The highest number of bytes so far: of the devices if they report it, else of the process."""
    if marks := device_marks(lm.mesh.local_devices):
        return {"bytes": sum(marks), "of": "devices of this process"}
    return {"bytes": host_mark(), "of": "resident set of this process"}


# ----------------------------------------------------------------------------------------------------------- generation


def settings(work: GenerateWork) -> Settings:
    """Settings with which only its limit ends a row."""
    return Settings(
        temperature=jnp.float32(work.temperature),
        top_p=jnp.float32(work.top_p),
        top_k=jnp.int32(0),
        stop_ids=jnp.full((MAX_STOPS,), -1, jnp.int32),
        marker=jnp.full((MAX_MARKER,), -1, jnp.int32),
        limit=jnp.int32(work.longest),
    )


def generator(lm: LM, work: GenerateWork) -> Callable[[], engine.Work]:
    """A function that does the work, and checks that all of it was done."""
    keys_P = jax.random.split(jax.random.key(0), len(work.prompts))
    limits = [list(row) for row in work.limits]

    def run() -> engine.Work:
        results, counts = engine.run(
            lm,
            work.prompts,
            keys_P,
            settings(work),
            limit=work.longest,
            num_samples=work.num_samples,
            batch_size=work.slots,
            limits=limits,
            group=work.group,
            cache=work.cache,
        )
        lengths = [[len(ids) for ids, _, _ in samples] for samples in results]
        if lengths != limits:
            raise WorkError(f"rows have {lengths} new tokens instead of {limits}: the engine did not do the given work")
        return counts

    return run


def greedy(lm: LM, prompts: Sequence[Sequence[int]], new: int, slots: int) -> list[list[int]]:
    """``new`` greedy tokens after each prompt."""
    keys_P = jax.random.split(jax.random.key(0), len(prompts))
    results = generate.generate_ids(
        lm, prompts, keys_P, temperature=0.0, top_p=1.0, max_new_tokens=new, stop_ids=(), batch_size=slots
    )
    return [samples[0][0] for samples in results]


def distinct_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of the prompts, each shared prefix counted once."""
    order = sorted(map(list, prompts))
    shared = [prefixes.common_length(a, b) for a, b in itertools.pairwise(order)]
    return sum(map(len, order)) - sum(shared)


def measure_generate(lm: LM, work: GenerateWork, reps: int) -> dict[str, Any]:
    """Speed of the sampling engine on the work."""
    result = timed(generator(lm, work), reps, "jaxsi")
    memory = peak_memory(lm)  # before the ceilings are measured, which takes memory as well
    counts: engine.Work = result.result
    rows = work.rows
    slots = min(work.slots, len(rows))
    itemsize = jnp.dtype(lm.dtype).itemsize
    limits = machine_rates.measure(lm.config, lm.mesh, jnp.dtype(lm.dtype), rows=slots, tokens=counts.prompt_tokens)
    distinct = distinct_tokens(work.prompts)
    spans = [(len(prompt), len(prompt) + limit - 1) for prompt, limit in rows]
    prompt_floor = machine_rates.floor_of_prompts(lm.config, distinct, len(rows), limits)
    column = kv_cache.bytes_of_number(work.cache, itemsize, lm.config.head_dim)
    decode_floor, steps = machine_rates.floor_of_decoding(lm.config, spans, slots, itemsize, limits, cached=column)
    decoded = counts.new_tokens - len(rows)  # the first token of a row comes with its prompt
    median = statistics.median(result.seconds)
    return {
        "seconds": spread(result.seconds),
        "new_tokens_per_second": result.per_second(counts.new_tokens),
        "prompt_tokens_per_second": result.per_second(counts.prompt_tokens),
        "compile_seconds": result.compiling,
        "rows": len(rows),
        "new_tokens": counts.new_tokens,
        "prompt_tokens": counts.prompt_tokens,
        "prefilled_tokens": counts.prefilled,
        "distinct_prompt_tokens": distinct,
        "slot_steps": counts.slot_steps,
        "useful_slot_steps": decoded / counts.slot_steps if counts.slot_steps else None,
        "floor_seconds": prompt_floor + decode_floor,
        "floor_of_prompts_seconds": prompt_floor,
        "floor_of_a_step_seconds": decode_floor / steps if steps else None,
        "share_of_floor": (prompt_floor + decode_floor) / median,
        "peak_memory": memory,
        "ceilings": limits._asdict(),
    }


# -------------------------------------------------------------------------------------------------------------- scoring


def scorer(lm: LM, rows: Sequence[Sequence[int]], batch_size: int) -> Callable[[], list[np.ndarray]]:
    """A function that computes the log-probabilities of all tokens of each row except the first."""
    firsts, rests = [row[:1] for row in rows], [row[1:] for row in rows]
    return lambda: scoring.score_ids(lm, firsts, rests, batch_size=batch_size)


def measure_score(lm: LM, rows: Sequence[Sequence[int]], batch_size: int, reps: int) -> dict[str, Any]:
    """Speed of scoring rows of equal length."""
    result = timed(scorer(lm, rows, batch_size), reps, "jaxsi")
    flops = machine_rates.forward_flops(lm.config, [len(row) for row in rows])
    return _efficiency(lm, result, rows, flops, batch_size * len(rows[0]), lm.dtype)


# ------------------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainWork:
    """The batch of every training step: ``rows`` of equal length. If ``objective`` is dpo, two neighbours are a pair,
    and their ``shared`` first tokens are the prompt."""

    objective: str
    rows: Sequence[Sequence[int]]
    dtype: str
    remat: Remat
    steps: int

    def __post_init__(self) -> None:
        if self.objective == "dpo" and len(self.rows) % 2:
            raise WorkError(f"dpo needs an even --batch, because two rows are a pair; got {len(self.rows)}")

    @property
    def shared(self) -> int:
        """Tokens of the prompt: a quarter of the row for a pair, else one."""
        return max(1, len(self.rows[0]) // 4) if self.objective == "dpo" else 1

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """(chosen, rejected), which share their prompt."""
        both = zip(self.rows[::2], self.rows[1::2], strict=True)
        return [(list(a), [*a[: self.shared], *b[self.shared :]]) for a, b in both]

    @property
    def tokens(self) -> int:
        """Tokens that ``steps`` steps train on."""
        return self.steps * len(self.rows) * len(self.rows[0])


class Trainer:
    """The training steps of ``fit`` on one batch, without its files. ``lm`` has float32 weights."""

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
        """One step. Returns its metrics without waiting for them."""
        rate = np.float32(LEARNING_RATE)
        self.state, metrics = train.train_step(
            self.state, self.batch, rate, loss=self.loss, optimizer=self.optimizer, accumulate=1
        )
        return metrics

    def run(self) -> None:
        """Does ``steps`` steps and waits for them."""
        for _ in range(self.work.steps):
            self.step()
        jax.block_until_ready(self.state)


def _supervised_training(lm: LM, work: TrainWork, config: train.TrainConfig) -> tuple[train.SFTLoss, TokenBatch]:
    config.check(lm.mesh)
    sequences = [batches.encode(row[:1], row[1:]) for row in work.rows]
    length, size = len(work.rows[0]), len(work.rows)
    batch = supervised(sequences, length, size, lm.mesh, epochs=1, seed=0)[0]
    return train.SFTLoss(lm.config, lm.mesh, work.dtype, work.remat), batch


def _pair_training(lm: LM, work: TrainWork, config: train.TrainConfig) -> tuple[train.PairLoss, PairBatch]:
    config = dataclasses.replace(config, batch_size=len(work.pairs))
    config.check(lm.mesh)
    n = work.shared
    pairs = [(batches.encode(a[:n], a[n:]), batches.encode(b[:n], b[n:])) for a, b in work.pairs]
    refs = reference_logps(lm, pairs, config)
    batch = batches.pair_batches(lm, pairs, refs, len(pairs), epochs=1, seed=0, min_length=len(work.rows[0]))[0]
    return train.PairLoss(lm.config, lm.mesh, work.dtype, work.remat, losses.dpo, BETA, 0.0), batch


def measure_train(lm: LM, work: TrainWork, reps: int) -> dict[str, Any]:
    """Speed of training steps on one batch."""
    trainer = Trainer(lm, work)
    result = timed(trainer.run, reps, "jaxsi")
    rows = list(work.rows) * work.steps
    # The backward pass is twice the forward pass; recomputation by remat is not counted as work.
    flops = 3 * machine_rates.forward_flops(lm.config, [len(row) for row in rows])
    value = _efficiency(lm, result, rows, flops, len(work.rows) * len(work.rows[0]), work.dtype)
    return value | {"step_seconds": spread([seconds / work.steps for seconds in result.seconds])}


def _efficiency(
    lm: LM, result: Timed, rows: Sequence[Sequence[int]], flops: float, tokens: int, dtype: Any
) -> dict[str, Any]:
    """The figures of scoring and training: tokens/s, and FLOP/s compared to the best matrix products of the device."""
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
