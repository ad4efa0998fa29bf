"""Schedules at their ends, and AdamW against optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsi.training import optim
from jaxsi.training.optim import OptimConfig


@pytest.mark.parametrize("decay", [optim.cosine, optim.linear])
def test_decay_goes_from_start_to_end(decay: optim.Schedule) -> None:
    rate = optim.schedule(OptimConfig(learning_rate=5e-6, end_learning_rate=1e-6, decay=decay), 100)
    values = np.array([float(rate(step)) for step in range(101)])
    np.testing.assert_allclose(values[[0, 50, 100]], [5e-6, 3e-6, 1e-6], rtol=1e-5)
    assert (np.diff(values) < 0).all()


def test_learning_rate_is_constant_without_an_end() -> None:
    rate = optim.schedule(OptimConfig(learning_rate=2e-5), 7)
    assert [float(rate(step)) for step in range(8)] == [pytest.approx(2e-5)] * 8


@pytest.mark.parametrize(("steps", "expected"), [(3440, 344), (40, 4), (41, 5)])
def test_warm_up_as_a_share_is_of_the_steps_there_are(steps: int, expected: int) -> None:
    """A fixed number, 344 for 3,440 steps, would be all of a training of 300."""
    share = OptimConfig(learning_rate=1e-3, end_learning_rate=0.0, warmup_ratio=0.1)
    number = OptimConfig(learning_rate=1e-3, end_learning_rate=0.0, warmup_steps=expected)
    assert optim.warmup(share, steps) == expected
    rates = [np.asarray([optim.schedule(c, steps)(i) for i in range(steps)]) for c in (share, number)]
    np.testing.assert_array_equal(*rates)


@pytest.mark.parametrize(
    "fields", [{"warmup_ratio": 1.0}, {"warmup_ratio": -0.1}, {"warmup_ratio": 0.1, "warmup_steps": 3}]
)
def test_wrong_warm_up_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"warmup_steps is \d.* warmup_ratio"):
        OptimConfig(**fields)


@pytest.mark.parametrize("warmup", [1, 4])
def test_warm_up_moves_from_the_first_step_and_reaches_the_rate(warmup: int) -> None:
    config = OptimConfig(learning_rate=1e-3, end_learning_rate=1e-4, decay=optim.linear, warmup_steps=warmup)
    values = np.array([float(optim.schedule(config, 20)(step)) for step in range(21)])
    np.testing.assert_allclose(values[[0, warmup, 20]], [1e-3 / warmup, 1e-3, 1e-4], rtol=1e-5)
    assert (np.diff(values[: warmup + 1]) > 0).all() or warmup == 1
    assert (np.diff(values[warmup:]) < 0).all()


def test_warm_up_may_be_longer_than_the_run() -> None:
    rate = optim.schedule(OptimConfig(learning_rate=1e-3, end_learning_rate=0.0, warmup_steps=50), 10)
    values = [float(rate(step)) for step in range(10)]
    assert np.isfinite(values).all() and 0 < values[0] < values[-1] < 1e-3


def test_schedules_are_traceable() -> None:
    config = OptimConfig(learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=3)
    rate = optim.schedule(config, 12)
    np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(12)), [float(rate(step)) for step in range(12)], rtol=1e-6)


@pytest.mark.parametrize(("clip_norm", "weight_decay"), [(None, 0.0), (0.5, 0.1)])
def test_optimizer_equals_optax_adamw(clip_norm: float | None, weight_decay: float) -> None:
    config = OptimConfig(
        learning_rate=3e-2,
        end_learning_rate=1e-3,
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )
    rate = optim.schedule(config, 10)
    adamw = optax.adamw(rate, b1=0.8, b2=0.95, eps=1e-6, weight_decay=weight_decay)
    theirs = adamw if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
    ours = optim.make_optimizer(config)
    mine = yours = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([[0.5]])}
    my_state, your_state = ours.init(mine), theirs.init(yours)

    def loss(w: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.square(w["a"])) * 3 + jnp.sum(jnp.sin(5 * w["b"]))

    for step in range(10):
        updates, my_state = ours.update(jax.grad(loss)(mine), my_state, mine)
        mine = jax.tree.map(lambda w, u, r: w - r * u, mine, updates, jax.tree.map(lambda _: rate(step), mine))  # noqa: B023
        updates, your_state = theirs.update(jax.grad(loss)(yours), your_state, yours)
        yours = optax.apply_updates(yours, updates)
    for name in mine:
        np.testing.assert_allclose(mine[name], yours[name], rtol=1e-6)
    assert abs(float(mine["a"][0]) - 1.0) > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"end_learning_rate": float("nan")}, "end_learning_rate is nan"),
        ({"warmup_steps": -3}, "warmup_steps is -3 .at least 0."),
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"eps": 0.0}, "eps 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"end_learning_rate": -1e-6}, "end_learning_rate is -1e-06"),
    ],
)
def test_config_rejects_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**({"learning_rate": 1e-3} | change))


def test_warm_up_beyond_the_training_is_told(caplog: pytest.LogCaptureFixture) -> None:
    optim.schedule(OptimConfig(learning_rate=1e-3, warmup_steps=10), 11)
    assert caplog.text == ""
    optim.schedule(OptimConfig(learning_rate=1e-3, warmup_steps=10), 3)
    assert "warmup_steps is 10 and the training has 3 steps" in caplog.text
