"""The same work by transformers (torch), in the same process, on the same weights and token ids: first what comes out
is compared, then the two take turns.

Torch and transformers are imported when an opponent is made. ``hf`` is set up to be as fast as its options allow: all
cores, its fused optimizer, its best cache. Rows are ordered by the length of their prompts before they are batched.
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

PAUSE_SECONDS = 0.3  # between turns: the threads of one side spin for a while after its work, in the other's way
CHECKED_TOKENS = 32  # of each greedy row
# How far a logit may lie below the largest, in standard deviations of the logits, to count as a near tie; how far mean
# log-probabilities (in nats) and losses and gradient norms (of their size) may differ.
NEAR_TIE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15}
LOGP_DIFFERENCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
LOSS_DIFFERENCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


class AgainstError(RuntimeError):
    """An opponent that cannot play: it is not installed, or this device or version cannot do what is asked."""


class DisagreementError(RuntimeError):
    """The two sides compute different things, so that no ratio of their speeds means anything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the opponent runs. ``cache``: dynamic or static; ``batching``: static or continuous; ``compile``:
    torch.compile; ``page``: tokens of a page of the continuous cache."""

    cache: str = "dynamic"
    batching: str = "static"
    compile: bool = False
    page: int = 256

    def __post_init__(self) -> None:
        if self.batching == "continuous" and self.cache == "static":
            raise AgainstError("--hf-cache static: continuous batching has a paged cache of its own; leave it out")
        if self.page < 4:
            raise AgainstError(f"--hf-page {self.page}: a page has at least 4 tokens")


class Torch(NamedTuple):
    """The libraries, and where and in what torch computes."""

    torch: Any
    transformers: Any
    device: str
    dtype: Any

    @property
    def versions(self) -> str:
        return f"transformers {self.transformers.__version__}, torch {self.torch.__version__}"

    def ids(self, rows: Sequence[Sequence[int]]) -> Any:
        """[B, T] int64 of rows of one length."""
        return self.torch.tensor(rows, dtype=self.torch.long, device=self.device)

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def library(name: str) -> Any:
    """A module that only opponents need. Raises: AgainstError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AgainstError(f"{name} cannot be imported ({error}): pip install 'jaxsi[bench]'") from error


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def libraries(dtype: str) -> Torch:
    """Torch on the kind of device that JAX runs on, with all cores."""
    torch, transformers = library("torch"), library("transformers")
    torch.set_num_threads(cores())
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise AgainstError(f"JAX runs on a GPU, torch {torch.__version__} has none: install its CUDA build")
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
    # Nothing of a folder's generation config may end or steer a row.
    model.generation_config = t.transformers.GenerationConfig(pad_token_id=0)
    model.get_input_embeddings().padding_idx = None  # it would keep that id's row from being trained
    return t, model.to(t.device).eval()


def clocked(run: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of a call."""
    return lambda: bench_speed.seconds_of(run)[0]


def take_turns(
    mine: Callable[[], float], theirs: Callable[[], float], pairs: int, names: tuple[str, str]
) -> tuple[list[float], list[float]]:
    """Seconds of each side, as it gives them, in ``pairs`` turns, A B A B, each side having run once before."""
    taken: tuple[list[float], list[float]] = ([], [])
    with progress(f"{names[0]} and {names[1]}", 2 * pairs + 2) as advance:
        for turn in range(pairs + 1):
            for side, run in enumerate((mine, theirs)):
                time.sleep(PAUSE_SECONDS)
                seconds = run()
                if turn:
                    taken[side].append(seconds)
                advance(1, True)
    return taken


def compared(taken: tuple[list[float], list[float]], amount: float) -> dict[str, Any]:
    """Rates of both sides for ``amount`` of work a turn; a ratio above 1 says that jaxsi is the faster."""
    mine, theirs = taken
    return {
        "jaxsi_per_second": spread([amount / seconds for seconds in mine]),
        "opponent_per_second": spread([amount / seconds for seconds in theirs]),
        "ratio_of_medians": statistics.median(theirs) / statistics.median(mine),
        "ratios_of_pairs": spread([b / a for a, b in zip(mine, theirs, strict=True)]),
    }


# ----------------------------------------------------------------------------------------------------------- generation


class HFGenerator:
    """Generation by transformers: batches of at most ``work.slots`` rows."""

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
        """Decode steps times rows of static batches, each of which goes on until its longest row has ended."""
        if self.options.batching == "continuous":
            return None
        return sum(len(batch) * (max(limit for _, limit in batch) - 1) for batch in self.batches)

    def run(self) -> None:
        """All rows, each to its limit."""
        sampled = {"do_sample": True, "temperature": self.work.temperature, "top_p": self.work.top_p, "top_k": 0}
        plain = {"do_sample": False}
        chosen = sampled if self.work.temperature > 0 else plain
        if self.options.batching == "continuous":
            # The order in which its own `add_requests` finds most beginnings in the cache.
            rows = sorted(self.work.rows, key=lambda row: list(row[0]), reverse=True)
            short = self.work.new_tokens - sum(map(len, self._continuous(rows, chosen)))
            if short:
                raise AgainstError(f"continuous batching left {short} tokens undone")
            return
        for batch in self.batches:
            self._static(batch, chosen)
        self.t.wait()

    def turn(self) -> float:
        """Seconds of ``run``. What the paged cache then knows of the prompts is dropped: the next turn has the same
        ones, and would find them computed."""
        seconds, _ = bench_speed.seconds_of(self.run)
        if self.manager is not None:
            with self.manager.pause():
                self.manager.batch_processor.cache.reset()
        return seconds

    def greedy(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """The likeliest ``new`` tokens after each prompt, in the way that ``run`` goes."""
        rows = [(prompt, new) for prompt in prompts]
        if self.options.batching == "continuous":
            return HFGenerator(self.t, self.model, self.work, self.options)._once(rows)
        return self._static(rows, {"do_sample": False}).tolist()

    def _static(self, rows: Sequence[tuple[Sequence[int], int]], sampling: dict[str, Any]) -> Any:
        """New tokens [B, most] int64 of one batch, left-padded; behind a row's limit they mean nothing."""
        t = self.t
        longest, most = max(len(prompt) for prompt, _ in rows), max(limit for _, limit in rows)
        ids = t.ids([[0] * (longest - len(prompt)) + list(prompt) for prompt, _ in rows])
        mask = t.ids([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in rows])
        limits = t.torch.tensor([limit for _, limit in rows], device=t.device)

        def ended(tokens: Any, scores: Any, **_: Any) -> Any:
            return tokens.shape[1] - longest >= limits

        config = t.transformers.GenerationConfig(
            max_new_tokens=most, pad_token_id=0, cache_implementation=self.options.cache, **sampling
        )
        if self.options.cache == "static":  # one size for all batches, or each of another length compiles again
            config.max_cache_len = max(len(prompt) + limit for batch in self.batches for prompt, limit in batch)
            config.disable_compile = not self.options.compile
        if self.options.compile:
            config.compile_config = t.transformers.CompileConfig(mode="default")
            config.compile_config._compile_all_devices = True
        made = self.model.generate(
            ids, attention_mask=mask, generation_config=config,
            stopping_criteria=t.transformers.StoppingCriteriaList([ended]),
        )  # fmt: skip
        return made[:, longest:]

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
        made: dict[str, list[int]] = {}
        while len(made) < len(rows):
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise AgainstError(f"continuous batching stopped on {self.t.device} ({self.t.versions}); see its log")
            if result is not None and result.error is not None:
                raise AgainstError(f"continuous batching on {self.t.device} ({self.t.versions}): {result.error}")
            if result is not None and result.is_finished():
                made[result.request_id] = result.generated_tokens
        return [made[f"row{number}"] for number in range(len(rows))]

    def _start(self, rows: Sequence[tuple[Sequence[int], int]], sampling: dict[str, Any]) -> Any:
        """A running manager, with room for as many rows at a time as there are slots."""
        t, page = self.t, self.options.page
        blocks = max(-(-(len(prompt) + limit) // page) for prompt, limit in rows) + 1
        config = t.transformers.ContinuousBatchingConfig(
            page_size=page, num_blocks=blocks * self.work.slots, max_requests_per_batch=self.work.slots,
            max_batch_tokens=max(self.work.slots, 1024), default_compile_level=1 if self.options.compile else 0, seed=0,
        )  # fmt: skip
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
    """How far the model's logit of ``token`` behind ``text`` lies below the largest, in standard deviations."""
    with t.torch.inference_mode():
        logits_V = model(t.ids([text])).logits[0, -1].float()
    return float((logits_V.max() - logits_V[token]) / logits_V.std())


def check_greedy(lm: LM, opponent: HFGenerator) -> dict[str, Any]:
    """Greedy tokens of both sides: the same, or another choice between two that are as good as tied.

    Raises:
      DisagreementError: a token differs that was no near tie.
    """
    prompts = [list(prompt) for prompt in opponent.work.prompts[: opponent.work.slots]]
    new = min(CHECKED_TOKENS, opponent.work.longest)
    mine = bench_speed.greedy(lm, prompts, new, opponent.work.slots)
    theirs = opponent.greedy(prompts, new)
    gaps = []
    for prompt, a, b in zip(prompts, mine, theirs, strict=True):
        differs = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if differs is not None:
            gaps.append(near_tie(opponent.t, opponent.model, prompt + b[:differs], a[differs]))
    allowed = NEAR_TIE[str(jnp.dtype(lm.dtype))]
    if gaps and max(gaps) > allowed:
        raise DisagreementError(
            f"greedy tokens differ in {len(gaps)} of {len(prompts)} rows, where transformers' logit of ours lies "
            f"{max(gaps):.3g} standard deviations below its largest; at most {allowed:g} is a near tie in {lm.dtype}. "
            "No speed is compared"
        )
    return {"what": "greedy tokens", "rows": len(prompts), "tokens": new, "same_rows": len(prompts) - len(gaps),
            "largest_near_tie": max(gaps, default=0.0)}  # fmt: skip


def against_generate(lm: LM, work: GenerateWork, options: Options, pairs: int, folder: Path) -> dict[str, Any]:
    """Generation by both sides, in turn."""
    t, model = load_torch(lm, folder, str(jnp.dtype(lm.dtype)), str(jnp.dtype(lm.dtype)))
    t.torch.manual_seed(0)
    opponent = HFGenerator(t, model, work, options)
    try:
        agreement = check_greedy(lm, opponent)
        taken = take_turns(clocked(bench_speed.generator(lm, work)), opponent.turn, pairs, ("jaxsi", "hf"))
    finally:
        opponent.close()
    steps = opponent.slot_steps
    useful = None if not steps else (work.new_tokens - len(work.rows)) / steps
    return {
        "opponent": t.versions,
        "settings": opponent.settings,
        "agreement": agreement,
        "opponent_useful_slot_steps": useful,
        **compared(taken, work.new_tokens),
    }


# -------------------------------------------------------------------------------------------------------------- scoring


def torch_logps(t: Torch, model: Any, ids_BT: Any) -> Any:
    """Log-probability [B, T - 1] float32 of each token given those before it."""
    logits_BTV = model(ids_BT).logits[:, :-1].float()
    return -t.torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")


def against_score(
    lm: LM, rows: Sequence[Sequence[int]], batch_size: int, options: Options, pairs: int, folder: Path
) -> dict[str, Any]:
    """Scoring by both sides, in turn.

    Raises:
      DisagreementError: mean log-probabilities differ by more than rounding explains.
    """
    dtype = str(jnp.dtype(lm.dtype))
    t, model = load_torch(lm, folder, dtype, dtype)
    model = t.torch.compile(model) if options.compile else model
    batches = [t.ids(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    def theirs() -> np.ndarray:
        with t.torch.inference_mode():
            return np.concatenate([torch_logps(t, model, batch).cpu().numpy() for batch in batches])

    mine = bench_speed.scorer(lm, rows, batch_size)
    differences = np.abs(np.stack(mine()) - theirs())
    mean, allowed = float(differences.mean()), LOGP_DIFFERENCE[dtype]
    if not mean <= allowed:
        raise DisagreementError(
            f"log-probabilities differ by {mean:.3g} nats in the mean, at most {allowed:g} in {dtype}. No speed is "
            "compared"
        )
    taken = take_turns(clocked(mine), clocked(theirs), pairs, ("jaxsi", "hf"))
    return {
        "opponent": t.versions,
        "settings": {"compile": options.compile, "threads": t.torch.get_num_threads()},
        "agreement": {"what": "log-probabilities", "mean_difference": mean, "max_difference": float(differences.max())},
        **compared(taken, sum(map(len, rows))),
    }
