"""Speed: every row does the requested work, and the figures follow from the work and the time."""

import json

import jax
import numpy as np
import psutil
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import bench
from jaxsi.cli.main import main
from jaxsi.perf import bench_speed, machine_rates
from jaxsi.perf.bench_speed import TrainWork
from jaxsi.perf.bench_work import WorkError, generate_work, read_judge, read_lengths, read_range, texts
from jaxsi.perf.machine_rates import Ceilings
from jaxsi.sampling import engine

SMALL = {
    "prompts": 6,
    "prompt_length": (4, 30),
    "new": 12,
    "stop_lengths": None,
    "judge": None,
    "slots": 4,
    "temperature": 0.7,
    "top_p": 0.9,
    "seed": 0,
}


@pytest.fixture
def known_ceilings(monkeypatch) -> Ceilings:
    """Fixed rates instead of measured ones."""
    value = Ceilings(bandwidth=1e6, gemm_rows=2e6, gemm_peak=4e6)
    monkeypatch.setattr(machine_rates, "measure", lambda *_, **__: value)
    return value


# ----------------------------------------------------------------------------------------------------------------- work


def test_output_lengths_have_requested_mean_and_bounds() -> None:
    lengths = read_lengths("lognormal:10:128:48").draw(256, np.random.default_rng(0))
    assert lengths.min() == 10 and lengths.max() == 128
    assert lengths.mean() == pytest.approx(48, abs=0.6)
    assert np.median(lengths) < 44  # skewed: a static batch waits for its longest rows
    assert len(set(lengths[:32].tolist())) > 15  # in random order


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_lengths, "normal:10:128:48"),
        (read_lengths, "lognormal:10:128:9"),
        (read_lengths, "lognormal:10:x:48"),
        (read_judge, "4:3"),
        (read_judge, "0:3:10"),
        (read_judge, "a:3:10"),
    ],
)
def test_wrong_description_of_work_is_quoted(read, text) -> None:
    with pytest.raises(WorkError, match=f"'{text}': give"):
        read(text)


def test_read_range_accepts_one_or_two_numbers() -> None:
    assert read_range("16:128", "--x") == (16, 128) and read_range("7", "--x") == (7, 7)
    for text in ("", "0:4", "9:3", "1:2:3", "-1"):
        with pytest.raises(WorkError, match="--x"):
            read_range(text, "--x")


def test_prompts_of_a_judge_share_rubric_and_instruction() -> None:
    work = generate_work(tiny.CONFIG, **SMALL | {"judge": (3, 2, 40), "prompts": 2})
    assert len(work.prompts) == 6 and work.num_samples == 2 and work.new_tokens == 6 * 2 * 12
    assert len({tuple(prompt[:40]) for prompt in work.prompts}) == 1
    for group in (work.prompts[:3], work.prompts[3:]):
        shared = len(group[0]) - 12  # the response at the end is as long as an output
        assert len({tuple(prompt[:shared]) for prompt in group}) == 1
        assert len({tuple(prompt) for prompt in group}) == 3
    assert work.prompts[0][:44] != work.prompts[3][:44]
    whole = sum(len(prompt) for prompt in work.prompts)
    instructions = sum(len(work.prompts[i]) - 40 - 12 for i in (0, 3))
    distinct = bench_speed.distinct_tokens(work.prompts)
    assert distinct < whole and distinct == pytest.approx(40 + instructions + 6 * 12, abs=3)


def test_rows_apart_are_the_same_rows_without_sharing() -> None:
    shared = generate_work(tiny.CONFIG, **SMALL | {"judge": (3, 2, 40), "prompts": 2})
    apart = shared.apart()
    assert apart.rows == shared.rows and apart.num_samples == 1
    counts = bench_speed.generator(tiny.make_lm(), apart)()
    assert counts.prefilled == counts.prompt_tokens == sum(len(prompt) for prompt, _ in shared.rows)


def test_work_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(WorkError, match="the model has 256 positions"):
        generate_work(tiny.CONFIG, **SMALL | {"new": 255})
    with pytest.raises(WorkError, match="each must be at least 1"):
        generate_work(tiny.CONFIG, **SMALL | {"prompts": 0})
    with pytest.raises(WorkError, match="2 to 256 tokens"):
        texts(tiny.CONFIG, 3, 257, 0)


# --------------------------------------------------------------------------------------------------------------- timing


def test_timed_keeps_the_first_call_apart() -> None:
    clock = iter([0.0, 5.0, 5.0, 7.0, 7.0, 8.0, 8.0, 11.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_speed.time, "perf_counter", lambda: next(clock))
        result = bench_speed.timed(lambda: "done", 3, "x")
    assert result == bench_speed.Timed(5.0, [2.0, 1.0, 3.0], "done")
    assert result.compiling == 3.0
    assert result.per_second(6) == {"median": 3.0, "min": 2.0, "max": 6.0, "n": 3}


def test_peak_memory_is_plausible_for_this_process() -> None:
    now = psutil.Process().memory_info().rss
    assert 0.98 * now <= bench_speed.peak_memory(tiny.make_lm())["bytes"] < psutil.virtual_memory().total


# ----------------------------------------------------------------------------------------------------------- generation


def test_rows_end_at_their_own_limits() -> None:
    """Up to its limit, a row has the same tokens as without a limit."""
    lm = tiny.make_lm()
    work = generate_work(tiny.CONFIG, **SMALL | {"stop_lengths": read_lengths("lognormal:1:12:6")})
    keys = jax.random.split(jax.random.key(0), len(work.prompts))
    setting = bench_speed.settings(work)
    options = {"limit": work.longest, "num_samples": 1, "batch_size": work.slots}
    whole, _ = engine.run(lm, work.prompts, keys, setting, **options)
    cut, counts = engine.run(lm, work.prompts, keys, setting, **options, limits=work.limits)
    assert len({limit for row in work.limits for limit in row}) > 3
    for rows, full, limits in zip(cut, whole, work.limits, strict=True):
        for (ids, logps, stopped), (all_ids, _, _), limit in zip(rows, full, limits, strict=True):
            assert ids == all_ids[:limit] and len(logps) == limit and not stopped
            assert len(all_ids) == work.longest
    assert counts.new_tokens == work.new_tokens


def test_generation_figures_follow_from_work_and_time(known_ceilings, monkeypatch) -> None:
    lm = tiny.make_lm()
    work = generate_work(tiny.CONFIG, **SMALL | {"judge": (2, 2, 20), "prompts": 2})
    value = bench_speed.measure_generate(lm, work, 2)
    assert value["rows"] == 8 and value["new_tokens"] == 96
    assert value["prompt_tokens"] == 2 * sum(map(len, work.prompts))
    assert value["distinct_prompt_tokens"] <= value["prefilled_tokens"] < value["prompt_tokens"] / 2
    assert value["useful_slot_steps"] == pytest.approx((96 - 8) / value["slot_steps"])
    assert value["slot_steps"] >= 96 - 8
    seconds = value["seconds"]
    assert value["new_tokens_per_second"]["max"] == pytest.approx(96 / seconds["min"])
    spans = [(len(prompt), len(prompt) + limit - 1) for prompt, limit in work.rows]
    decoding, steps = machine_rates.floor_of_decoding(lm.config, spans, 4, 4, known_ceilings)
    prompts = machine_rates.floor_of_prompts(lm.config, value["distinct_prompt_tokens"], 8, known_ceilings)
    assert value["floor_seconds"] == pytest.approx(decoding + prompts)
    assert value["floor_of_a_step_seconds"] == pytest.approx(decoding / steps)
    assert value["share_of_floor"] == pytest.approx(value["floor_seconds"] / seconds["median"])
    assert value["compile_seconds"] > 0
    monkeypatch.setattr(engine, "run", lambda *_, **__: ([[([1], [0.0], False)] * 2] * 4, engine.Work()))
    with pytest.raises(WorkError, match="did not do the given work"):
        bench_speed.generator(lm, work)()


# ------------------------------------------------------------------------------------------------- scoring and training


def test_scoring_figures_follow_from_work_and_time(known_ceilings) -> None:
    rows = texts(tiny.CONFIG, 6, 20, 0)
    value = bench_speed.measure_score(tiny.make_lm(), rows, 3, 2)
    assert value["tokens_per_second"]["max"] == pytest.approx(120 / value["seconds"]["min"])
    flops = machine_rates.forward_flops(tiny.CONFIG, [20] * 6)
    assert value["flops_per_second"] == pytest.approx(flops / value["seconds"]["median"])
    assert value["mfu"] == pytest.approx(value["flops_per_second"] / 4e6)
    assert value["datasheet_mfu"] is None


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_training_steps_lower_the_loss(objective, known_ceilings) -> None:
    lm = tiny.make_lm()
    work = TrainWork(objective=objective, rows=texts(tiny.CONFIG, 4, 24, 0), dtype="float32", remat="full", steps=2)
    value = bench_speed.measure_train(lm, work, 1)
    assert value["tokens_per_second"]["median"] == pytest.approx(2 * 4 * 24 / value["seconds"]["median"])
    assert value["step_seconds"]["median"] == pytest.approx(value["seconds"]["median"] / 2)
    flops = 3 * machine_rates.forward_flops(tiny.CONFIG, [24] * 8)
    assert value["mfu"] == pytest.approx(flops / value["seconds"]["median"] / 4e6)
    trainer = bench_speed.Trainer(lm, work)
    losses = [float(trainer.step()["loss"]) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    if objective == "dpo":
        assert losses[0] == pytest.approx(np.log(2), abs=1e-5)


def test_pairs_share_their_prompt() -> None:
    work = TrainWork(objective="dpo", rows=texts(tiny.CONFIG, 4, 20, 0), dtype="float32", remat="full", steps=1)
    assert len(work.pairs) == 2 and work.shared == 5
    for chosen, rejected in work.pairs:
        assert len(chosen) == len(rejected) == 20
        assert chosen[:5] == rejected[:5] and chosen[5:] != rejected[5:]
    with pytest.raises(WorkError, match="needs an even --batch"):
        TrainWork(objective="dpo", rows=work.rows[:3], dtype="float32", remat="full", steps=1)


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "model"
    lmlib.export(tiny.make_lm(), path, dtype="float32")
    return path


@pytest.mark.parametrize(
    ("name", "options", "figure"),
    [
        ("generate", "--prompts 6 --prompt-length 4:30 --new 12 --batch-size 4", "new_tokens_per_second"),
        ("score", "--batch 3 --length 20 --steps 2", "tokens_per_second"),
        ("train", "--batch 4 --length 24 --steps 2", "tokens_per_second"),
    ],
)
def test_command_prints_one_object_or_a_table(
    name, options, figure, folder, known_ceilings, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(bench, "mesh_for", lambda *_: tiny.mesh())
    command = ["bench", name, str(folder), "--dtype", "float32", "--reps", "1", *options.split()]
    assert main([*command, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value[figure]["n"] == 1 and value[figure]["median"] > 0
    assert value["command"].startswith(f"jaxsi bench {name} ") and value["dtype"] == "float32"
    assert value["ceilings"] == known_ceilings._asdict()
    assert main(command) == 0
    table = capsys.readouterr().out
    assert f"{figure.replace('_per_second', '/s').replace('_', ' ')} " in table
    assert "best products" in table and "0.004 GFLOP/s" in table and "resident set" in table


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "s", "--judge", "4:3"], "give N:K:RUBRIC"),
        (["generate", "s", "--stop-lengths", "48"], "give lognormal"),
        (["generate", "s", "--prompt-length", "9:3"], "give LOW:HIGH"),
        (["generate", "s", "--reps", "0"], "each must be at least 1"),
        (["generate", "s", "--against", "hf", "--hf-compile"], "add --hf-cache static"),
        (["score", "s", "--length", "1"], "2 tokens"),
        (["train", "s", "--objective", "dpo", "--batch", "3"], "needs an even --batch"),
    ],
)
def test_wrong_command_line_is_refused(argv, message, capsys) -> None:
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_unknown_model_error_lists_the_shapes(capsys) -> None:
    assert main(["bench", "score", "nonsense"]) == 2
    assert "llama-3-8b" in capsys.readouterr().err
