"""What a round of DPO takes over from the rounds before: the reference, and the optimizer."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import tiny
from jaxsi.methods.lifecycle import carried_over
from jaxsi.runs.run import Run
from jaxsi.training import resume
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig, dpo

TRAIN = TrainConfig(
    optim=OptimConfig(learning_rate=1e-3),
    batch_size=8,
    max_length=64,
    min_length=16,
    remat="none",
    dtype="float32",
    log_every=1,
)
PAIRS = tiny.preference_pairs(16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


def rounds(run: Run, name: str, config: DPOConfig) -> list:
    """M_0, and the models after two rounds of DPO on the same pairs."""
    models = [tiny.make_lm()]
    resume.save_result(models[0], None, run.at("iter_0"), {"step": 0})
    for t in (1, 2):
        links = carried_over(config, models[-1], run, t, first=0)
        models.append(dpo(models[-1], PAIRS, config, run.at(f"iter_{t}"), **links))
    return models


def first_step(run: Run, t: int) -> dict:
    return json.loads((run.path / f"iter_{t}" / "train.jsonl").read_text().splitlines()[0])


def test_first_model_stays_the_reference(tmp_path) -> None:
    with Run.open(tmp_path / "previous", Config()) as run:
        rounds(run, "previous", DPOConfig(train=TRAIN))
        assert max(abs(first_step(run, t)["margin"]) for t in (1, 2)) < 1e-4
    with Run.open(tmp_path / "first", Config()) as run:
        models = rounds(run, "first", DPOConfig(train=TRAIN, reference="first"))
        assert abs(first_step(run, 1)["margin"]) < 1e-4 < 1e-2 < abs(first_step(run, 2)["margin"])
        names = [path.name for path in (run.path / "iter_2").glob("ref_logps_*")]
        assert len(names) == 1 and names[0].startswith(f"ref_logps_{models[0].fingerprint}_")


def test_optimizer_goes_on_from_the_round_before(tmp_path) -> None:
    ends = {}
    for optimizer in ("reset", "carry"):
        with Run.open(tmp_path / optimizer, Config()) as run:
            models = rounds(run, optimizer, DPOConfig(train=TRAIN, optimizer=optimizer))
            moments = resume.moments_of(run.at("iter_2"), like_moments(models[-1]))
            ends[optimizer] = models[-1].fingerprint, int(jax.tree.leaves(moments)[0])
    steps = len(PAIRS) // TRAIN.batch_size
    assert ends["reset"][1] == steps and ends["carry"][1] == 2 * steps, "Adam counts the steps of both rounds"
    assert ends["reset"][0] != ends["carry"][0]


def like_moments(lm):
    from jaxsi.training.train import initial_state

    moments = initial_state(lm.weights, TRAIN.optim).moments
    assert np.asarray(jax.tree.leaves(moments)[0]).ndim == 0
    return moments


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="reference is 'last'; it is one of previous, first"):
        DPOConfig(train=TRAIN, reference="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer is 'keep'; it is one of reset, carry"):
        DPOConfig(train=TRAIN, optimizer="keep")  # type: ignore[arg-type]
