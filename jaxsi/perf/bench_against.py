"""The same work by transformers (torch), in the same process, on the same weights and token ids: first the results are
compared, then the two take turns.

Torch and transformers are imported only when there is an opponent. It is set up to be as fast as its options allow: all
cores, its fused optimizer, its best cache. Rows are sorted by the length of their prompts before they are batched.
"""

import dataclasses
import importlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.perf import bench_speed
from jaxsi.perf.bench_speed import spread
from jaxsi.perf.bench_work import GenerateWork
from jaxsi.runs.progress import progress

PAUSE_SECONDS = 0.3  # between turns: the threads of one side still spin after its work and would slow down the other
CHECKED_TOKENS = 32  # of each greedy row
# NEAR_TIE: how far below the largest logit a logit may be to count as tied, in standard deviations of the logits. The
# others: how much mean log-probabilities (in nats), and losses and gradient norms (relative), may differ.
NEAR_TIE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15}
LOGP_DIFFERENCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
LOSS_DIFFERENCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


class AgainstError(RuntimeError):
    """The opponent cannot run: it is not installed, or this device or version does not support the options."""


class DisagreementError(RuntimeError):
    """The two sides compute different results, so the ratio of their speeds would mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The opponent's options. ``cache``: dynamic or static. ``batching``: static or continuous. ``compile``: use
    torch.compile. ``page``: tokens in a page of the continuous cache."""

    cache: str = "dynamic"
    batching: str = "static"
    compile: bool = False
    page: int = 256

    def __post_init__(self) -> None:
        if self.batching == "continuous" and self.cache == "static":
            raise AgainstError("--hf-cache static: continuous batching has its own paged cache; leave the option out")
        if self.page < 4:
            raise AgainstError(f"--hf-page {self.page}: give at least 4 tokens")


class Torch(NamedTuple):
    """The libraries, and the device and dtype of torch's computation."""

    torch: Any
    transformers: Any
    device: str
    dtype: Any

    @property
    def versions(self) -> str:
        return f"transformers {self.transformers.__version__}, torch {self.torch.__version__}"

    def ids(self, rows: Sequence[Sequence[int]]) -> Any:
        """[B, T] int64 from rows of equal length."""
        return self.torch.tensor(rows, dtype=self.torch.long, device=self.device)

    def wait(self) -> None:
        """Waits until the device has done its work."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def library(name: str) -> Any:
    """Imports a library that only opponents need. Raises: AgainstError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AgainstError(f"{name} cannot be imported ({error}): pip install 'jaxsi[bench]'") from error


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def libraries(dtype: str) -> Torch:
    """Torch on the same kind of device as JAX, with all cores."""
    torch, transformers = library("torch"), library("transformers")
    torch.set_num_threads(cores())
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise AgainstError(f"JAX runs on a GPU but torch {torch.__version__} does not: install its CUDA build")
    return Torch(torch, transformers, "cuda" if on_gpu else "cpu", getattr(torch, dtype))


def load_torch(lm: LM, folder: Path, dtype: str, weights_dtype: str) -> tuple[Torch, Any]:
    """The weights of ``lm``, exported to ``folder`` and loaded by transformers in ``weights_dtype``."""
    with progress("export", 1) as advance:
        lmlib.export(lm, folder, dtype=weights_dtype)
        advance(1, True)
    t = libraries(dtype)
    model = t.transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(t.torch, weights_dtype), attn_implementation="sdpa"
    )
    # No setting of the folder's generation config may end a row or change its sampling.
    model.generation_config = t.transformers.GenerationConfig(pad_token_id=0)
    model.get_input_embeddings().padding_idx = None  # else the embedding of that id would not be trained
    return t, model.to(t.device).eval()


def clocked(run: Callable[[], Any]) -> Callable[[], float]:
    """A function that returns the seconds of a call of ``run``."""
    return lambda: bench_speed.seconds_of(run)[0]


def take_turns(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int, names: tuple[str, str]
) -> tuple[list[float], list[float]]:
    """The seconds that each side returns in ``pairs`` turns, A B A B. Each side first runs once without counting."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with progress(f"{names[0]} and {names[1]}", 2 * pairs + 2) as advance:
        for turn in range(pairs + 1):
            for side, run in enumerate((ours, theirs)):
                time.sleep(PAUSE_SECONDS)
                duration = run()
                if turn:
                    seconds[side].append(duration)
                advance(1, True)
    return seconds


def comparison(seconds: tuple[list[float], list[float]], amount: float) -> dict[str, Any]:
    """Rates of both sides for ``amount`` of work per turn; a ratio above 1 means that jaxsi is faster."""
    ours, theirs = seconds
    return {
        "jaxsi_per_second": spread([amount / duration for duration in ours]),
        "opponent_per_second": spread([amount / duration for duration in theirs]),
        "ratio_of_medians": statistics.median(theirs) / statistics.median(ours),
        "ratios_of_pairs": spread([b / a for a, b in zip(ours, theirs, strict=True)]),
    }


# ----------------------------------------------------------------------------------------------------------- generation


class HFGenerator:
    """Generation by transformers, in batches of at most ``work.slots`` rows."""

    def __init__(self, t: Torch, model: Any, work: GenerateWork, options: Options) -> None:
        self.t, self.model, self.work, self.options = t, model, work, options
        rows = sorted(work.rows, key=lambda row: len(row[0]))
        self.batches = [rows[i : i + work.slots] for i in range(0, len(rows), work.slots)]
        self.manager: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        continuous = self.options.batching == "continuous"
        return dataclasses.asdict(self.options) | {
            "cache": f"pages of {self.options.page}" if continuous else self.options.cache,
            "attention": self.model.config._attn_implementation,
            "threads": self.t.torch.get_num_threads(),
            "batch_size": self.work.slots,
        }

    @property
    def slot_steps(self) -> int | None:
        """Decode steps times rows of static batches; a batch goes on until its longest row has ended."""
        if self.options.batching == "continuous":
            return None
        return sum(len(batch) * (max(limit for _, limit in batch) - 1) for batch in self.batches)

    def run(self) -> None:
        """Generates all rows, each to its limit."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.work.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.work.temperature, "top_p": self.work.top_p, "top_k": 0}
        if self.options.batching == "continuous":
            # In this order `add_requests` finds the most prefixes in the cache.
            rows = sorted(self.work.rows, key=lambda row: list(row[0]), reverse=True)
            missing = self.work.new_tokens - sum(map(len, self._continuous(rows, sampling)))
            if missing:
                raise AgainstError(f"continuous batching did not generate {missing} of the tokens")
            return
        for batch in self.batches:
            self._static(batch, sampling)
        self.t.wait()

    def turn(self) -> float:
        """Seconds of ``run``. Afterwards the paged cache is emptied, or the next turn would find its prompts, which are
        the same, already computed."""
        seconds, _ = bench_speed.seconds_of(self.run)
        if self.manager is not None:
            with self.manager.pause():
                self.manager.batch_processor.cache.reset()
        return seconds

    def greedy(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """``new`` greedy tokens after each prompt, generated like those of ``run``."""
        rows = [(prompt, new) for prompt in prompts]
        if self.options.batching == "continuous":
            return HFGenerator(self.t, self.model, self.work, self.options)._once(rows)
        return self._static(rows, {"do_sample": False}).tolist()

    def _static(self, rows: Sequence[tuple[Sequence[int], int]], sampling: dict[str, Any]) -> Any:
        """New tokens [B, new] int64 of one left-padded batch; tokens after a row's limit have no meaning."""
        t = self.t
        longest, new = max(len(prompt) for prompt, _ in rows), max(limit for _, limit in rows)
        ids = t.ids([[0] * (longest - len(prompt)) + list(prompt) for prompt, _ in rows])
        mask = t.ids([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in rows])
        limits = t.torch.tensor([limit for _, limit in rows], device=t.device)

        def at_limit(tokens: Any, scores: Any, **_: Any) -> Any:
            return tokens.shape[1] - longest >= limits

        config = t.transformers.GenerationConfig(
            max_new_tokens=new, pad_token_id=0, cache_implementation=self.options.cache, **sampling
        )
        if self.options.cache == "static":  # one size for all batches, or each new length would compile again
            config.max_cache_len = max(len(prompt) + limit for batch in self.batches for prompt, limit in batch)
            config.disable_compile = not self.options.compile
        if self.options.compile:
            config.compile_config = t.transformers.CompileConfig(mode="default")
            config.compile_config._compile_all_devices = True
        criteria = t.transformers.StoppingCriteriaList([at_limit])
        tokens = self.model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
        return tokens[:, longest:]

    def _once(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[list[int]]:
        try:
            return self._continuous(rows, {"do_sample": False})
        finally:
            self.close()

    def _continuous(self, rows: Sequence[tuple[Sequence[int], int]], sampling: dict[str, Any]) -> list[list[int]]:
        """New tokens of each row."""
        if self.manager is None:
            self.manager = self._start(rows, sampling)
        for number, (prompt, limit) in enumerate(rows):
            self.manager.add_request(list(prompt), request_id=f"row{number}", max_new_tokens=limit, eos_token_id=-1)
        tokens: dict[str, list[int]] = {}
        while len(tokens) < len(rows):
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise AgainstError(f"continuous batching stopped on {self.t.device} ({self.t.versions}): see its log")
            if result is not None and result.error is not None:
                raise AgainstError(f"continuous batching on {self.t.device} ({self.t.versions}): {result.error}")
            if result is not None and result.is_finished():
                tokens[result.request_id] = result.generated_tokens
        return [tokens[f"row{number}"] for number in range(len(rows))]

    def _start(self, rows: Sequence[tuple[Sequence[int], int]], sampling: dict[str, Any]) -> Any:
        """A running manager with room for ``work.slots`` rows at the same time."""
        t, page = self.t, self.options.page
        blocks = max(-(-(len(prompt) + limit) // page) for prompt, limit in rows) + 1
        config = t.transformers.ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks * self.work.slots,
            max_requests_per_batch=self.work.slots,
            max_batch_tokens=max(self.work.slots, 1024),
            default_compile_level=1 if self.options.compile else 0,
            seed=0,
        )
        generation = t.transformers.GenerationConfig(
            max_new_tokens=max(limit for _, limit in rows), pad_token_id=0, eos_token_id=-1, **sampling
        )
        manager = self.model.init_continuous_batching(generation, config)
        manager.warmup()
        manager.start()
        return manager

    def close(self) -> None:
        if self.manager is not None:
            self.manager.stop(block=True, timeout=10)
            self.manager.destroy()
            self.manager = None


def near_tie(t: Torch, model: Any, text: Sequence[int], token: int) -> float:
    """How far the logit of ``token`` after ``text`` is below the largest logit, in standard deviations."""
    with t.torch.inference_mode():
        logits_V = model(t.ids([text])).logits[0, -1].float()
    return float((logits_V.max() - logits_V[token]) / logits_V.std())


def check_greedy(lm: LM, opponent: HFGenerator) -> dict[str, Any]:
    """Compares the greedy tokens of both sides. They may differ only if the two tokens are nearly tied.

    Raises:
      DisagreementError: if tokens differ that are not nearly tied.
    """
    prompts = [list(prompt) for prompt in opponent.work.prompts[: opponent.work.slots]]
    new = min(CHECKED_TOKENS, opponent.work.longest)
    ours = bench_speed.greedy(lm, prompts, new, opponent.work.slots)
    theirs = opponent.greedy(prompts, new)
    gaps = []
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        differs = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if differs is not None:
            gaps.append(near_tie(opponent.t, opponent.model, prompt + b[:differs], a[differs]))
    allowed = NEAR_TIE[str(jnp.dtype(lm.dtype))]
    if gaps and max(gaps) > allowed:
        raise DisagreementError(
            f"greedy tokens differ in {len(gaps)} of {len(prompts)} rows. There, transformers' logit of our token is "
            f"up to {max(gaps):.3g} standard deviations below its largest; a near tie in {lm.dtype} is at most "
            f"{allowed:g}. Speeds are not compared"
        )
    return {
        "what": "greedy tokens",
        "rows": len(prompts),
        "tokens": new,
        "same_rows": len(prompts) - len(gaps),
        "largest_near_tie": max(gaps, default=0.0),
    }


def against_generate(lm: LM, work: GenerateWork, options: Options, pairs: int, folder: Path) -> dict[str, Any]:
    """Generation by both sides, in turns."""
    t, model = load_torch(lm, folder, str(jnp.dtype(lm.dtype)), str(jnp.dtype(lm.dtype)))
    t.torch.manual_seed(0)
    opponent = HFGenerator(t, model, work, options)
    try:
        agreement = check_greedy(lm, opponent)
        seconds = take_turns(clocked(bench_speed.generator(lm, work)), opponent.turn, pairs, ("jaxsi", "hf"))
    finally:
        opponent.close()
    steps = opponent.slot_steps
    useful = None if not steps else (work.new_tokens - len(work.rows)) / steps
    return {
        "opponent": t.versions,
        "settings": opponent.settings,
        "agreement": agreement,
        "opponent_useful_slot_steps": useful,
        **comparison(seconds, work.new_tokens),
    }


# -------------------------------------------------------------------------------------------------------------- scoring


def torch_logps(t: Torch, model: Any, ids_BT: Any) -> Any:
    """Log-probability [B, T - 1] float32 of each token given those before it."""
    logits_BTV = model(ids_BT).logits[:, :-1].float()
    return -t.torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")


def against_score(
    lm: LM, rows: Sequence[Sequence[int]], batch_size: int, options: Options, pairs: int, folder: Path
) -> dict[str, Any]:
    """Scoring by both sides, in turns.

    Raises:
      DisagreementError: if mean log-probabilities differ by more than rounding explains.
    """
    dtype = str(jnp.dtype(lm.dtype))
    t, model = load_torch(lm, folder, dtype, dtype)
    model = t.torch.compile(model) if options.compile else model
    batches = [t.ids(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    def theirs() -> np.ndarray:
        with t.torch.inference_mode():
            return np.concatenate([torch_logps(t, model, batch).cpu().numpy() for batch in batches])

    ours = bench_speed.scorer(lm, rows, batch_size)
    differences = np.abs(np.stack(ours()) - theirs())
    mean, allowed = float(differences.mean()), LOGP_DIFFERENCE[dtype]
    if not mean <= allowed:
        raise DisagreementError(
            f"log-probabilities differ by {mean:.3g} nats on average; the limit for {dtype} is {allowed:g}. Speeds are "
            "not compared"
        )
    seconds = take_turns(clocked(ours), clocked(theirs), pairs, ("jaxsi", "hf"))
    return {
        "opponent": t.versions,
        "settings": {"compile": options.compile, "threads": t.torch.get_num_threads()},
        "agreement": {"what": "log-probabilities", "mean_difference": mean, "max_difference": float(differences.max())},
        **comparison(seconds, sum(map(len, rows))),
    }
