"""``jaxsi sft``, ``jaxsi dpo`` and ``jaxsi reward``: one training on a file of the user, as a run of its own."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

from jaxsi.cli.arguments import ChatOptions, Dtype, Model, RowOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.stored import Mesh, check_writes, mesh_for
from jaxsi.cli.tables import figures_table

FILES = """The data are JSONL, JSON, CSV, TSV or Parquet (text also .gz or .zst), a folder that `datasets` saved, or a
hub name. DIR is a run directory: if the command is killed, run it again, and it goes on. Afterwards DIR is a model for
all other commands, such as `jaxsi generate DIR` and `jaxsi export DIR OUT`."""

SFT = f"""Fine-tunes MODEL on demonstrations: rows with "messages", or with "prompt" and "completion" (also "response",
"output", "answer"); rows of Alpaca and ShareGPT, too.

{FILES}

Examples:
  jaxsi sft MODEL --data demonstrations.jsonl --run-dir runs/sft
  jaxsi sft MODEL --data rows.csv --column prompt=ask --column response=say --run-dir runs/sft --epochs 2"""

DPO = f"""Trains MODEL on preference pairs: rows with "chosen" and "rejected", beside a "prompt" or as whole
conversations.

{FILES}

Examples:
  jaxsi dpo MODEL --data pairs.jsonl --run-dir runs/dpo
  jaxsi dpo MODEL --data pairs.parquet --run-dir runs/ipo --loss ipo --beta 0.05"""


REWARD = f"""Trains a reward model on preference pairs, by the loss of Bradley and Terry: MODEL with a scalar head in
place of its head for tokens. If MODEL is a reward model, its training goes on. The pairs are those that `jaxsi dpo`
reads.

{FILES}

The reward model ranks responses in `jaxsi improve best-of-n --reward-rm DIR`, and is the reward of `jaxsi rl`.

Examples:
  jaxsi reward MODEL --data pairs.jsonl --run-dir runs/reward
  jaxsi reward MODEL --data pairs.jsonl --held-out others.jsonl --run-dir runs/reward --epochs 2"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(RowOptions, ChatOptions):
    """Settings of a training; see `jaxsi.TrainConfig`."""

    model: Model
    data: Path
    """The rows to train on."""
    run_dir: Path
    """A folder for the run."""
    max_rows: int | None = None
    """Only the first rows of the data."""
    learning_rate: float
    end_learning_rate: float | None = None
    """At the last step, along a cosine; None keeps the rate."""
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    """The warm-up as a share of all steps, in place of --warmup-steps."""
    weight_decay: float = 0.0
    batch_size: int = 16
    """Examples (or pairs) of an optimizer step, over all devices."""
    accumulate: int = 1
    """Parts in which the rows of a step are computed, one after the other."""
    epochs: int = 1
    max_steps: int | None = None
    max_length: int = 2048
    """Longer rows are left out and counted."""
    checkpoint_every: int = 200
    """Steps between the points from which a killed training goes on."""
    log_every: int = 10
    dtype: Dtype = "auto"
    """Of the computation; the weights are float32. auto: bfloat16 if this device computes in it at speed, else float32.
    A command that goes on keeps the dtype with which it began."""
    seed: int = 0
    mesh: Mesh = Mesh()

    def config(self) -> Any:
        """A TrainConfig. Raises: UsageError if a value is out of range."""
        from jaxsi.training.train import TrainConfig

        return config_of(TrainConfig, self)

    def loaded(self, model: str, dtype: str) -> Any:
        from jaxsi.lm import load

        mesh = mesh_for(self.model, self.mesh)
        return load(model, mesh, dtype, weights_dtype="float32", chat=self.model_chat)

    def writer(self, model: str, dtype: str) -> Any:
        """`loaded`, for a language model. Raises: UsageError: if it is a reward model."""
        lm = self.loaded(model, dtype)
        check_writes(lm, model)
        return lm

    def report(self, noun: str, count: int, model: Any, began: float, **more: Any) -> Report:
        """What the training was about, the last line of its log, and ``more``."""
        (data,) = (self.run_dir / "iter_1").glob("*_data.json")
        too_long = json.loads(data.read_text(encoding="utf-8"))["dropped_too_long"]
        return report(self.run_dir, {noun: count, "too_long": too_long}, model, began, **more)


def config_of(cls: Any, args: Any, **changes: Any) -> Any:
    """The TrainConfig or RLConfig of a command's options, which have the same names.

    Raises: UsageError if a value is out of range.
    """
    from jaxsi.training.optim import OptimConfig

    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)} | changes
    try:
        optim = OptimConfig(**{f.name: values[f.name] for f in dataclasses.fields(OptimConfig) if f.name in values})
        return cls(optim=optim, **{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
    except ValueError as error:
        raise UsageError(str(error)) from error


def report(run_dir: Path, about: dict[str, Any], model: Any, began: float, **more: Any) -> Report:
    """``about`` the training, the figures of the last line of its log, and ``more``."""
    last = logged(run_dir)[-1:] or [{}]
    names = {"w>l": "accuracy"}  # the one inequality of a reward model: the chosen response gets the higher reward
    figures = {names.get(name, name): value for name, value in last[0].items() if isinstance(value, int | float)}
    value = {"run_dir": str(run_dir), **about, **figures, **more, "fingerprint": model.fingerprint}
    value["seconds"] = round(time.monotonic() - began, 3)
    return Report(value, figures_table(value))


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the training's log."""
    log = run_dir / "iter_1" / "train.jsonl"
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(Training):
    learning_rate: float = 5.5e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(Training):
    learning_rate: float = 1e-6
    reference: str | None = None
    """The model to compare with; MODEL by default."""
    loss: Literal["dpo", "dpo_smoothed", "ipo", "hinge", "simpo", "orpo"] = "dpo"
    beta: float = 0.1
    nll_coef: float = 0.0
    """Weight of an added likelihood term of the chosen response."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Training):
    learning_rate: float = 1e-5
    held_out: Path | None = None
    """Other pairs: the share of them that the trained model orders as the file does is reported."""


def sft(argv: list[str]) -> Report:
    """Fine-tunes a model on demonstrations."""
    args = parse(Sft, argv, "jaxsi sft", SFT)
    from jaxsi.methods import single
    from jaxsi.model.compute_dtype import settled
    from jaxsi.stages.user_data import read_examples

    config, examples = args.config(), read_examples(args.data, args.max_rows, **args.reading)
    began = time.monotonic()
    config = settled({"training": config}, args.run_dir)["training"]
    model = single.sft(args.writer(args.model, config.dtype), examples, args.run_dir, config, seed=args.seed)
    return args.report("examples", len(examples), model, began)


def dpo(argv: list[str]) -> Report:
    """Trains a model on preference pairs."""
    args = parse(Dpo, argv, "jaxsi dpo", DPO)
    from jaxsi.methods import single
    from jaxsi.model.compute_dtype import settled
    from jaxsi.stages.user_data import read_pairs
    from jaxsi.training import losses
    from jaxsi.training.train import DPOConfig

    loss = getattr(losses, args.loss)
    try:
        loss = loss() if isinstance(loss, type) else loss
        config = DPOConfig(train=args.config(), loss=loss, beta=args.beta, nll_coef=args.nll_coef)
    except ValueError as error:
        raise UsageError(str(error)) from error
    pairs = read_pairs(args.data, args.max_rows, **args.reading)
    began = time.monotonic()
    config = settled({"training": config}, args.run_dir)["training"]
    dtype = config.train.dtype
    reference = None if args.reference is None else args.writer(args.reference, dtype)
    model = single.dpo(args.writer(args.model, dtype), pairs, args.run_dir, config, reference=reference, seed=args.seed)
    return args.report("pairs", len(pairs), model, began)


def reward(argv: list[str]) -> Report:
    """Trains a reward model on preference pairs."""
    args = parse(Reward, argv, "jaxsi reward", REWARD)
    from jaxsi.methods import single
    from jaxsi.model.compute_dtype import settled
    from jaxsi.stages.user_data import read_pairs

    config, pairs = args.config(), read_pairs(args.data, args.max_rows, **args.reading)
    held_out = None if args.held_out is None else read_pairs(args.held_out, **args.reading)
    began = time.monotonic()
    config = settled({"training": config}, args.run_dir)["training"]
    model = single.reward(args.loaded(args.model, config.dtype), pairs, args.run_dir, config, seed=args.seed)
    measured = {} if held_out is None else single.ordered_pairs(model, held_out, batch_size=args.batch_size)
    more = {f"held_out_{name}": figure for name, figure in measured.items()}
    return args.report("pairs", len(pairs), model, began, **more)
