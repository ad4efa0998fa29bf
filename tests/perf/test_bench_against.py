"""transformers as the opponent: it does the same work, and is not timed if it does not."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the opponent runs on torch: install jaxsi[bench]")

import tiny  # noqa: E402
from jaxsi.model.decoder import Remat  # noqa: E402
from jaxsi.perf import bench_against, bench_against_train, bench_speed  # noqa: E402
from jaxsi.perf.bench_against import AgainstError, DisagreementError, HFGenerator, Options, load_torch  # noqa: E402
from jaxsi.perf.bench_speed import TrainWork  # noqa: E402
from jaxsi.perf.bench_work import Lognormal, generate_work, texts  # noqa: E402

WORK = generate_work(
    tiny.CONFIG,
    prompts=6,
    prompt_length=(4, 30),
    new=12,
    stop_lengths=Lognormal(1, 12, 6),
    judge=None,
    slots=4,
    temperature=0.7,
    top_p=0.9,
    seed=0,
)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch) -> None:
    monkeypatch.setattr(bench_against, "PAUSE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Torch, and the model of seed 0."""
    return load_torch(tiny.make_lm(), tmp_path_factory.mktemp("against") / "model", "float32", "float32")


def check_comparison(value: dict) -> None:
    """Checks that the figures of a comparison are consistent."""
    assert value["jaxsi_per_second"]["n"] == value["opponent_per_second"]["n"] == value["ratios_of_pairs"]["n"] == 2
    low, high = value["ratios_of_pairs"]["min"], value["ratios_of_pairs"]["max"]
    assert 0 < low <= value["ratios_of_pairs"]["median"] <= high
    assert value["settings"]["threads"] == bench_against.cores()


def test_sides_take_turns() -> None:
    calls = []
    seconds = iter([9.0, 9.0, 1.0, 4.0, 2.0, 2.0, 1.0, 3.0])

    def side(name: str):
        return lambda: calls.append(name) or next(seconds)

    taken = bench_against.take_turns(side("a"), side("b"), 3, ("a", "b"))
    assert "".join(calls) == "abababab"
    assert taken == ([1.0, 2.0, 1.0], [4.0, 2.0, 3.0])  # the first turn of each is only a warm-up
    value = bench_against.comparison(taken, 12.0)
    assert value["ratio_of_medians"] == 3.0
    assert value["ratios_of_pairs"] == {"median": 3.0, "min": 1.0, "max": 4.0, "n": 3}
    assert value["jaxsi_per_second"]["median"] == 12.0 and value["opponent_per_second"]["median"] == 4.0


def test_missing_library_error_says_how_to_install_it() -> None:
    with pytest.raises(AgainstError, match=r"pip install 'jaxsi\[bench\]'"):
        bench_against.library("no_such_library")
    with pytest.raises(AgainstError, match="leave the option out"):
        Options(batching="continuous", cache="static")


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("options", [Options(), Options(cache="static")], ids=["dynamic", "static"])
def test_rows_of_a_batch_end_at_their_own_limits(options, loaded, monkeypatch) -> None:
    opponent = HFGenerator(*loaded, WORK, options)
    batches = []
    static = opponent._static
    monkeypatch.setattr(opponent, "_static", lambda rows, sampling: batches.append((rows, static(rows, sampling))))
    opponent.run()
    assert sorted(len(prompt) for rows, _ in batches for prompt, _ in rows) == sorted(map(len, WORK.prompts))
    for rows, tokens in batches:  # a batch ends with its longest row
        assert tokens.shape == (len(rows), max(limit for _, limit in rows))
    assert opponent.slot_steps == sum(tokens.shape[0] * (tokens.shape[1] - 1) for _, tokens in batches)


def test_generation_against_hf(tmp_path) -> None:
    value = bench_against.against_generate(tiny.make_lm(), WORK, Options(), 2, tmp_path / "model")
    assert value["agreement"]["same_rows"] == value["agreement"]["rows"] == 4
    assert value["agreement"]["tokens"] == WORK.longest
    assert 0 < value["opponent_useful_slot_steps"] < 1
    check_comparison(value)


def test_continuous_batching_generates_each_row_to_its_limit(loaded) -> None:
    options = Options(batching="continuous", page=16)
    opponent = HFGenerator(*loaded, WORK, options)
    try:
        rows = opponent._continuous(WORK.rows, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0})
        assert [len(ids) for ids in rows] == [limit for _, limit in WORK.rows]
        ledgers = [allocator.ledger for allocator in opponent.manager.batch_processor.cache.cache_allocators.values()]
        assert any(ledger.hash_to_block for ledger in ledgers)  # the prompts are in the cache now
        assert opponent.turn() > 0
        assert not any(ledger.hash_to_block for ledger in ledgers)
    finally:
        opponent.close()
    value = bench_against.check_greedy(tiny.make_lm(), opponent)
    assert value["same_rows"] == value["rows"]


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_opponent_with_other_weights_is_refused(batching, loaded) -> None:
    opponent = HFGenerator(*loaded, WORK, Options(batching=batching, page=16))
    with pytest.raises(DisagreementError, match="greedy tokens differ"):
        bench_against.check_greedy(tiny.make_lm(seed=1), opponent)


def test_near_tie_measures_the_gap_between_logits(loaded) -> None:
    t, model = loaded
    with torch.no_grad():
        logits = model(torch.tensor([WORK.prompts[0]])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    assert bench_against.near_tie(t, model, WORK.prompts[0], order[0]) == 0.0
    gap = float((logits[order[0]] - logits[order[9]]) / logits.std())
    assert bench_against.near_tie(t, model, WORK.prompts[0], order[9]) == pytest.approx(gap, rel=1e-4)
    assert gap > bench_against.NEAR_TIE["bfloat16"]


# -------------------------------------------------------------------------------------------------------------- scoring


def test_scoring_against_hf(tmp_path, monkeypatch) -> None:
    rows = texts(tiny.CONFIG, 5, 20, 0)
    value = bench_against.against_score(tiny.make_lm(), rows, 3, Options(), 2, tmp_path / "a")
    assert value["agreement"]["max_difference"] < 1e-3
    check_comparison(value)
    monkeypatch.setattr(bench_speed, "scorer", lambda *_: lambda: [np.zeros(19, np.float32)] * 5)
    with pytest.raises(DisagreementError, match="Speeds are not compared"):
        bench_against.against_score(tiny.make_lm(), rows, 3, Options(), 2, tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------- training


def train_work(objective: str, remat: Remat = "full", dtype: str = "float32") -> TrainWork:
    return TrainWork(objective=objective, rows=texts(tiny.CONFIG, 4, 24, 0), dtype=dtype, remat=remat, steps=1)


@pytest.mark.parametrize(
    ("objective", "remat", "dtype"),
    [("sft", "full", "float32"), ("dpo", "full", "float32"), ("sft", "none", "bfloat16")],
)
def test_training_against_hf(objective, remat, dtype, tmp_path) -> None:
    work = train_work(objective, remat, dtype)
    value = bench_against_train.against_train(tiny.make_lm(), work, Options(), 2, tmp_path / "model")
    differences = value["agreement"]["largest_relative_differences"]
    assert max(differences.values()) < bench_against.LOSS_DIFFERENCE[dtype]
    check_comparison(value)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_opponent_with_another_step_is_refused(objective, tmp_path) -> None:
    """A different optimizer shows in the second step, different data in the first."""
    lm, work = tiny.make_lm(), train_work(objective)
    t, model = load_torch(lm, tmp_path / "model", "float32", "float32")
    theirs = bench_against_train.TorchTrainer(t, model, work, Options())
    theirs.optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(DisagreementError, match="of step 2"):
        bench_against_train.check_steps(bench_speed.Trainer(lm, work), theirs.step)
    other = dataclasses.replace(work, rows=work.rows[::-1])
    with pytest.raises(DisagreementError, match="of step 1"):
        bench_against_train.check_steps(bench_speed.Trainer(tiny.make_lm(seed=1), other), theirs.step)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses names that transformers will drop
def test_training_against_trl(tmp_path) -> None:
    try:
        import trl  # noqa: F401
    except ImportError:
        with pytest.raises(AgainstError, match=r"trl cannot be imported .* pip install 'jaxsi\[bench\]'"):
            bench_against_train.against_trl(tiny.make_lm(), train_work("sft"), Options(), 2, tmp_path / "model")
        return
    for objective in ("sft", "dpo"):
        value = bench_against_train.against_trl(
            tiny.make_lm(), train_work(objective), Options(), 2, tmp_path / objective
        )
        check_comparison(value)
