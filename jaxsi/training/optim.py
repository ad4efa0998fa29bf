"""Optimizers and learning-rate schedules (optax)."""

import dataclasses
import logging
import math
from collections.abc import Callable

import optax

from jaxsi.runs.config_snapshot import stored_as

_log = logging.getLogger(__name__)

Schedule = Callable[[float, float, int], optax.Schedule]  # (start, end, steps) -> learning rate by step


@stored_as("optim.cosine")
def cosine(start: float, end: float, steps: int) -> optax.Schedule:
    """From ``start`` to ``end`` along half a cosine."""
    return optax.cosine_decay_schedule(start, steps, alpha=end / start)


@stored_as("optim.linear")
def linear(start: float, end: float, steps: int) -> optax.Schedule:
    """From ``start`` to ``end`` along a line."""
    return optax.linear_schedule(start, end, steps)


@stored_as("optim.OptimConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The rate rises over ``warmup_steps`` steps, or over the share ``warmup_ratio`` of all steps, whichever is
    given. ``end_learning_rate`` None keeps the learning rate constant after the warm-up. ``offload`` keeps the
    moments, two thirds of a training state, in the host's memory between updates. The default learning rate is that of
    the Self-Rewarding paper's SFT."""

    learning_rate: float = 5.5e-6
    end_learning_rate: float | None = None
    decay: Schedule = cosine
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be a positive number")
        if self.end_learning_rate is not None and not 0 <= self.end_learning_rate < math.inf:
            raise ValueError(f"end_learning_rate is {self.end_learning_rate}; it must be a number, at least 0")
        if self.warmup_steps < 0 or not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} (at least 0), warmup_ratio {self.warmup_ratio} (in [0, 1))"
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio}; give one of the two"
            )
        if not (
            0 <= self.b1 < 1 and 0 <= self.b2 < 1 and 0 < self.eps < math.inf and 0 <= self.weight_decay < math.inf
        ):
            raise ValueError(
                f"b1 is {self.b1} and b2 {self.b2} (in [0, 1)), eps {self.eps} (positive), weight_decay "
                f"{self.weight_decay} (at least 0)"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be positive, or None for no clipping")


def warmup(config: OptimConfig, steps: float) -> int:
    """The number of warm-up steps in a run of ``steps`` optimizer steps; a share of them is rounded up."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * steps)


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step over a run of ``steps`` optimizer steps."""
    rising = warmup(config, steps)
    if config.warmup_steps >= steps:
        _log.warning(
            "warmup_steps is %d and the training has %d steps, so it ends before it reaches the learning rate %g; "
            "warmup_ratio gives the warm-up as a share of the steps",
            config.warmup_steps, steps, config.learning_rate,
        )  # fmt: skip
    decay_steps = max(1, steps - rising)
    if config.end_learning_rate is None:
        body = optax.constant_schedule(config.learning_rate)
    else:
        body = config.decay(config.learning_rate, config.end_learning_rate, decay_steps)
    if not rising:
        return body
    # Step 0 uses 1/rising of the rate, not 0: the first step already changes the weights.
    rise = optax.linear_schedule(config.learning_rate / rising, config.learning_rate, rising)
    return optax.join_schedules([rise, body], [rising])


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate: the train step multiplies by it, so that runs of different lengths, whose
    schedules differ, share one compiled program."""
    adam = optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), optax.add_decayed_weights(config.weight_decay)
    )
    return adam if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
