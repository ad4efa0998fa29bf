"""Training by transformers or TRL, on torch: the same batch and weights, in turns with jaxsi (see ``bench_against``).

Weights and AdamW's moments are float32 on both sides. In bfloat16 torch computes under autocast, which corresponds to
``TrainConfig.dtype`` here. With remat torch recomputes its activations as well.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxsi.lm import LM
from jaxsi.perf.bench_against import (
    LOSS_DIFFERENCE,
    DisagreementError,
    Options,
    Torch,
    clocked,
    comparison,
    library,
    load_torch,
    take_turns,
    torch_logps,
)
from jaxsi.perf.bench_speed import BETA, LEARNING_RATE, Trainer, TrainWork

CHECKED_STEPS = 2  # the second shows the optimizer's update of the first
CLIP_NORM = 1.0  # on both sides: OptimConfig's default


class TorchTrainer:
    """Training steps in a plain loop, with torch's fused AdamW and clipping, and the loss of ``work``."""

    def __init__(self, t: Torch, model: Any, work: TrainWork, options: Options) -> None:
        self.t, self.model, self.work = t, model.train(), work
        model.config.use_cache = False
        if work.remat != "none":
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # older versions have the second name
        self.forward = t.torch.compile(model) if options.compile else model
        self.optimizer = t.torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
        )
        if work.objective == "dpo":
            chosen, rejected = zip(*work.pairs, strict=True)
            self.ids = t.ids([*chosen, *rejected])
            with t.torch.no_grad():
                self.reference = self._response_logps()
            self.loss: Callable[[], Any] = self._dpo
        else:
            self.ids = t.ids(work.rows)
            self.loss = self._sft

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.t.dtype == self.t.torch.float32:
            return contextlib.nullcontext()
        return self.t.torch.autocast(self.t.device, self.t.dtype)

    def _sft(self) -> Any:
        with self._autocast():
            return self.forward(self.ids, labels=self.ids).loss

    def _response_logps(self) -> Any:
        """Log-probabilities [2B] of the responses: first the chosen, then the rejected."""
        with self._autocast():
            return torch_logps(self.t, self.forward, self.ids)[:, self.work.shared - 1 :].sum(-1)

    def _dpo(self) -> Any:
        shift = self._response_logps() - self.reference
        chosen, rejected = shift.chunk(2)
        return -self.t.torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()

    def step(self) -> tuple[Any, Any]:
        """One step. Returns its loss, and the gradient norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        norm = self.t.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        return loss.detach(), norm

    def run(self) -> None:
        for _ in range(self.work.steps):
            self.step()
        self.t.wait()


class TRLTrainer:
    """Training steps by TRL's own trainers in their own loop."""

    def __init__(self, t: Torch, model: Any, work: TrainWork, options: Options, folder: Path) -> None:
        trl, datasets = library("trl"), library("datasets")
        self.t, self.work, self.version = t, work, f"trl {trl.__version__}"
        settings = {
            "output_dir": str(folder.parent / "trl"),
            "per_device_train_batch_size": len(work.rows),
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "weight_decay": 0.0,
            "max_grad_norm": CLIP_NORM,
            "bf16": work.dtype == "bfloat16",
            "fp16": work.dtype == "float16",
            "gradient_checkpointing": work.remat != "none",
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "use_cpu": t.device == "cpu",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "max_steps": CHECKED_STEPS,
            "torch_compile": options.compile,
            "max_length": None,
        }
        tokenizer = t.transformers.AutoTokenizer.from_pretrained(folder)
        if work.objective == "dpo":
            rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(work.pairs)
            settings |= {"per_device_train_batch_size": len(rows), "beta": BETA, "precompute_ref_log_probs": True}
            make, config = trl.DPOTrainer, trl.DPOConfig(**settings)
        else:
            rows = [{"input_ids": list(row), "labels": list(row)} for row in work.rows]
            settings |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False}
            make, config = trl.SFTTrainer, trl.SFTConfig(**settings)
        self.trainer = make(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        if work.objective == "dpo":  # the trainer accepts only texts; replace its token ids with those of jaxsi
            n = work.shared
            ids = [{"prompt_ids": a[:n], "chosen_ids": a[n:], "rejected_ids": b[n:]} for a, b in work.pairs]
            self.trainer.train_dataset = self.trainer._precompute_ref_logps(
                datasets.Dataset.from_list(ids), "train", len(ids)
            )
        self.clock = _StepClock(t)
        self.trainer.add_callback(self.clock.callback)

    def first_steps(self) -> list[tuple[float, float]]:
        """Losses and gradient norms of the first steps. Later steps are not logged."""
        self.trainer.train()
        figures = [(row["loss"], row["grad_norm"]) for row in self.trainer.state.log_history if "grad_norm" in row]
        self.trainer.args.logging_strategy = self.t.transformers.trainer_utils.IntervalStrategy.NO
        self.trainer.args.max_steps = self.work.steps
        return figures

    def run(self) -> float:
        """Seconds from the start of the first step to the end of the last; the loop's own startup is left out."""
        self.trainer.train()
        return self.clock.end - self.clock.start


class _StepClock:
    """The times at which the first step of a loop starts and its last step ends."""

    def __init__(self, t: Torch) -> None:
        self.start = self.end = 0.0
        clock = self

        class Callback(t.transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.start = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.start = clock.start or time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                t.wait()
                clock.end = time.perf_counter()

        self.callback = Callback()


def check_steps(ours: Trainer, theirs: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """Compares losses and gradient norms of the first steps of both sides.

    Raises:
      DisagreementError: if they differ by more than rounding explains.
    """
    allowed = LOSS_DIFFERENCE[ours.work.dtype]
    worst: dict[str, float] = {"loss": 0.0, "grad_norm": 0.0}
    for step in range(CHECKED_STEPS):
        metrics = jax.device_get(ours.step())
        for name, value in zip(worst, theirs(), strict=True):
            a, b = float(metrics[name]), float(value)
            worst[name] = max(worst[name], abs(a - b) / max(abs(b), 1e-9))
            if not worst[name] <= allowed:
                raise DisagreementError(
                    f"{name} of step {step + 1} is {a:.6g} in jaxsi and {b:.6g} in the opponent, a relative difference "
                    f"of {worst[name]:.3g}; the limit for {ours.work.dtype} is {allowed:g}. Speeds are not compared"
                )
    return {"what": "losses and gradient norms", "steps": CHECKED_STEPS, "largest_relative_differences": worst}


def against_train(lm: LM, work: TrainWork, options: Options, pairs: int, folder: Path) -> dict[str, Any]:
    """Training steps of jaxsi and of a plain torch loop, in turns."""
    t, model = load_torch(lm, folder, work.dtype, "float32")
    ours, theirs = Trainer(lm, work), TorchTrainer(t, model, work, options)
    agreement = check_steps(ours, theirs.step)
    seconds = take_turns(clocked(ours.run), clocked(theirs.run), pairs, ("jaxsi", "hf"))
    settings = _settings(t, work, options, "AdamW(fused=True)")
    return {"opponent": t.versions, "settings": settings, "agreement": agreement, **comparison(seconds, work.tokens)}


def against_trl(lm: LM, work: TrainWork, options: Options, pairs: int, folder: Path) -> dict[str, Any]:
    """Training steps of jaxsi and of TRL's trainers, in turns."""
    library("trl")  # fails, if it does, before the weights are exported
    t, model = load_torch(lm, folder, work.dtype, "float32")
    ours, theirs = Trainer(lm, work), TRLTrainer(t, model, work, options, folder)
    agreement = check_steps(ours, iter(theirs.first_steps()).__next__)
    seconds = take_turns(clocked(ours.run), theirs.run, pairs, ("jaxsi", "trl"))
    settings = _settings(t, work, options, "adamw_torch_fused")
    opponent = f"{theirs.version}, {t.versions}"
    return {"opponent": opponent, "settings": settings, "agreement": agreement, **comparison(seconds, work.tokens)}


def _settings(t: Torch, work: TrainWork, options: Options, optimizer: str) -> dict[str, Any]:
    threads = t.torch.get_num_threads()
    return {"compile": options.compile, "remat": work.remat, "optimizer": optimizer, "threads": threads}
