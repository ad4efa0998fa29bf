"""Training is the same computation on every mesh, in any number of parts, with or without recomputed activations."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import tiny
from jaxsi.model import decoder
from jaxsi.model.decoder import Remat
from jaxsi.training import losses, train
from jaxsi.training.batches import Batches, Sequence_, encode_pair, pairs, prompts_shared
from jaxsi.training.optim import OptimConfig
from jaxsi.training.packing import supervised
from jaxsi.training.reference import reference_logps
from jaxsi.training.train import PairLoss, SFTLoss, TrainConfig

pytestmark = pytest.mark.xdist_group("trajectories")  # one worker, so that the module's fixtures are computed once

# A large eps: Adam's sign-like first steps would make rounding errors of tiny gradients as large as a step.
OPTIM = OptimConfig(learning_rate=3e-2, eps=1e-2)
ROWS = 32  # divides among 8 devices in 4 parts
STEPS = 3


class Variant(NamedTuple):
    mesh: str
    remat: Remat
    accumulate: int


VARIANTS = [
    Variant("1x1x1", "none", 1),
    Variant("1x1x1", "full", 4),
    Variant("2x2x2", "products", 1),
    Variant("1x8x1", "none", 4),
]


class Trajectory(NamedTuple):
    refs: list[list[float]]
    losses: list[float]
    weights: Any


def run(lm: Any, batches: Batches, loss: Any, accumulate: int) -> tuple[list[float], Any]:
    state = train.initial_state(lm.weights, OPTIM)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    history = []
    for step in range(STEPS):
        batch = batches[step]
        parts = -(-len(batch[0]) // (ROWS // accumulate))  # as in train.fit
        state, metrics = train.train_step(state, batch, np.float32(3e-2), loss=loss, optimizer=OPTIM, accumulate=parts)
        history.append(float(metrics["loss"]))
    unmoved = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    assert jax.tree.all(unmoved), "every part of the state stays where it was"
    return history, jax.device_get(state.weights)


def encoded() -> list[tuple[Sequence_, Sequence_]]:
    """72 pairs of ragged lengths: batches of 32, 32 and 8 with 24 rows of fill."""
    return [encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(72, longest=40)]


def dpo_batches(lm: Any, refs: list[list[float]]) -> Batches:
    shared = prompts_shared(lm.config, lm.mesh, encoded(), 64)
    assert shared, "this is the layout that short pairs have on CPU"
    return pairs(encoded(), refs, ROWS, lm.mesh, epochs=1, seed=0, min_length=64, shared=shared)


@pytest.fixture(scope="module")
def dpo() -> dict[Variant, Trajectory]:
    found = {}
    for variant in VARIANTS:
        lm = tiny.make_lm(variant.mesh)
        config = TrainConfig(
            optim=OPTIM,
            batch_size=ROWS,
            accumulate=variant.accumulate,
            remat=variant.remat,
            dtype="float32",
            min_length=64,
        )
        refs = reference_logps(lm, encoded(), config)
        loss = PairLoss(lm.config, lm.mesh, "float32", variant.remat, losses.dpo, 0.1, 0.0)
        history, weights = run(lm, dpo_batches(lm, refs), loss, variant.accumulate)
        found[variant] = Trajectory(refs, history, weights)
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_dpo_begins_at_ln_2(variant: Variant, dpo: dict[Variant, Trajectory]) -> None:
    assert abs(dpo[variant].losses[0] - math.log(2)) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_dpo_begins_at_ln_2_with_the_reference_of_another_mesh(
    variant: Variant, dpo: dict[Variant, Trajectory]
) -> None:
    here, there = (np.asarray(dpo[v].refs) for v in (variant, VARIANTS[0]))
    margin = (here - there)[:, 0] - (here - there)[:, 1]
    assert abs(np.log1p(np.exp(-0.1 * margin)).mean() - math.log(2)) < 1e-5
    np.testing.assert_allclose(here, there, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_dpo_trajectories_are_equal(variant: Variant, dpo: dict[Variant, Trajectory]) -> None:
    one, other = dpo[VARIANTS[0]], dpo[variant]
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
    moved = tiny.max_difference(one.weights, tiny.host_weights())
    assert moved > 1e-2
    assert tiny.max_difference(other.weights, one.weights) < 1e-4 * moved


@pytest.fixture(scope="module")
def sft() -> dict[Variant, Trajectory]:
    """Packed rows of 80 ragged sequences in 3 batches of 32. Meshes and parts decide how many rows they take."""
    found = {}
    for variant in (Variant("1x1x1", "none", 1), Variant("1x1x1", "none", 4), Variant("2x2x2", "none", 2)):
        lm = tiny.make_lm(variant.mesh)
        sequences = [side for pair in encoded() for side in pair][:80]
        batches = supervised(sequences, 128, 32, lm.mesh, epochs=1, seed=0, accumulate=variant.accumulate)
        assert len(batches) == STEPS
        loss = SFTLoss(lm.config, lm.mesh, "float32", variant.remat)
        history, weights = run(lm, batches, loss, variant.accumulate)
        found[variant] = Trajectory([], history, weights)
    return found


def test_sft_trajectories_are_equal(sft: dict[Variant, Trajectory]) -> None:
    (_, one), *others = sft.items()
    moved = tiny.max_difference(one.weights, tiny.host_weights())
    assert moved > 1e-2 and one.losses[-1] < one.losses[0]
    for _, other in others:
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
        assert tiny.max_difference(other.weights, one.weights) < 1e-4 * moved


def test_sft_loss_is_the_mean_over_the_tokens_of_the_whole_batch(sft: dict[Variant, Trajectory]) -> None:
    """Not the mean of the parts' means: rows hold different numbers of tokens that count."""
    lm = tiny.make_lm()
    sequences = [side for pair in encoded() for side in pair][:80]
    batch = supervised(sequences, 128, 32, lm.mesh, epochs=1, seed=0)[0]
    logps = jax.jit(
        lambda w, b: decoder.sequence_logps(w, lm.config, b.tokens_BT, b.positions_BT, b.segments_BT, dtype=np.float32)
    )(lm.weights, batch)
    mask = tiny.counted(batch)
    expected = -np.asarray(logps, np.float64)[mask].mean()
    for trajectory in sft.values():
        assert trajectory.losses[0] == pytest.approx(expected, rel=1e-5)
    by_row = np.array([-np.asarray(logps)[r][mask[r]].mean() for r in range(8)])
    assert abs(by_row.mean() - expected) > 1e-4, "the test could tell the two apart"


@pytest.mark.parametrize("mesh", ["2x2x2", "1x8x1"])
def test_optimizer_state_is_cut_as_the_weights_are(mesh: str) -> None:
    state = train.initial_state(tiny.make_lm(mesh).weights, OPTIM)
    wanted = {w.shape: w.sharding for w in jax.tree.leaves(state.weights)}
    arrays = [x for x in jax.tree.leaves(state.moments) if x.ndim]
    assert len(arrays) == 2 * len(jax.tree.leaves(state.weights))
    for x in arrays:
        assert x.sharding.device_set == wanted[x.shape].device_set
        assert x.addressable_shards[0].data.size < x.size
