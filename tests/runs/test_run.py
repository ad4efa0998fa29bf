import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import tiny
from jaxsi.runs import preemption, spent
from jaxsi.runs.config_snapshot import RunConfigError, describe_config, may_change
from jaxsi.runs.named_keys import fold, name_words
from jaxsi.runs.records import Prompt, RecordError, Response, read_jsonl, write_jsonl
from jaxsi.runs.run import Run, RunError, StaleRecordsError
from jaxsi.runs.status import status

REPO = Path(__file__).parents[2]


def mild(x: float) -> float:
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    beta: float = 0.1
    log_every: int = dataclasses.field(default=10, metadata=may_change())
    transform: Callable[[float], float] = mild


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    iterations: int = 2
    label: str = dataclasses.field(default="a", metadata=may_change())
    model: Path | None = None
    lengths: tuple[int, ...] = (1, 2)
    dpo: Inner = Inner()


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt.of(f"p{number}", text) for number, text in enumerate(texts)]


def shout(part: Sequence[Prompt]) -> list[Prompt]:
    return [Prompt.of(prompt.id, prompt.text.upper()) for prompt in part]


def refuse(*args: object) -> list[Prompt]:
    raise AssertionError("a finished stage ran again")


def files(folder: Path) -> dict[str, bytes]:
    """All that a run makes again byte for byte: everything but the journal, which has times, and the lock."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("journal.jsonl", ".lock")
    }


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_stage_runs_once_and_is_then_read(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        first = run.at("iter_1").records("prompts", prompts, "a", "b", of=Prompt)
        assert run.at("iter_1").value("quality", lambda: {"mean": 0.1, "ci95": (0.1, 0.30000000000000004)}) == {
            "mean": 0.1,
            "ci95": [0.1, 0.30000000000000004],
        }
    with Run.open(tmp_path / "run", Config()) as run:
        assert run.at("iter_1").records("prompts", refuse, of=Prompt) == first == prompts("a", "b")
        assert run.at("iter_1").value("quality", refuse) == {"mean": 0.1, "ci95": [0.1, 0.30000000000000004]}
        # another scope, another file
        assert run.at("iter_2").records("prompts", prompts, "c", of=Prompt) == prompts("c")
    assert read_jsonl(tmp_path / "run" / "iter_1" / "prompts.jsonl", Prompt) == first


def test_failed_stage_leaves_nothing_and_runs_again(tmp_path):
    def breaks():
        yield prompts("a")[0]
        raise ValueError("no")

    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        with pytest.raises(ValueError, match="no"):
            scope.records("prompts", breaks, of=Prompt)
        assert not scope.path.exists() or list(scope.path.iterdir()) == []
        assert scope.records("prompts", prompts, "a", of=Prompt) == prompts("a")


def test_sharded_equals_one_piece_and_leaves_one_file(tmp_path):
    items = prompts(*"abcdefg")
    calls = []

    def stage(part):
        calls.append(len(part))
        return shout(part)

    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        assert scope.sharded("loud", items, stage, of=Prompt, shard_size=3) == shout(items)
        assert calls == [3, 3, 1]
        assert [file.name for file in scope.path.iterdir()] == ["loud.jsonl"]
        assert scope.sharded("loud", items, refuse, of=Prompt, shard_size=3) == shout(items)
        assert scope.sharded("none", [], refuse, of=Prompt) == []
        assert (scope.path / "none.jsonl").read_bytes() == b""


def test_finished_shards_are_kept_when_a_later_one_fails(tmp_path):
    items = prompts(*"abcdefg")
    ran = []

    def stage(part, fail_at):
        if part[0].text == fail_at:
            raise RuntimeError("out of memory")
        ran.append(part[0].text)
        return shout(part)

    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        with pytest.raises(RuntimeError):
            scope.sharded("loud", items, functools.partial(stage, fail_at="e"), of=Prompt, shard_size=2)
        assert not (scope.path / "loud.jsonl").exists()
        assert status(run.path)["stages"][0]["shards"] == "2/4"
        assert scope.sharded("loud", items, functools.partial(stage, fail_at=""), of=Prompt, shard_size=2) == shout(
            items
        )
        assert ran == ["a", "c", "e", "g"]


def test_stage_stops_after_the_current_shard_on_request(tmp_path, monkeypatch):
    items, ran = prompts(*"abcdefg"), []

    def stage(part):
        ran.append(part[0].text)
        return shout(part)

    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        with monkeypatch.context() as patch:
            patch.setattr(preemption, "requested", lambda: len(ran) == 2)
            with pytest.raises(preemption.Stopped, match=r"loud.shards: 2 of 4 parts are kept"):
                scope.sharded("loud", items, stage, of=Prompt, shard_size=2)
        assert status(run.path)["stages"][0]["shards"] == "2/4"
        assert scope.sharded("loud", items, stage, of=Prompt, shard_size=2) == shout(items)
        assert ran == ["a", "c", "e", "g"]
        assert read_jsonl(scope.path / "loud.jsonl", Prompt) == shout(items)


@pytest.mark.parametrize(("again", "size"), [("abcdefg", 3), ("abcdef", 2)])
def test_shards_of_another_plan_are_not_mixed_in(again, size, tmp_path):
    def stops_after_one(part):
        if part[0].text != "a":
            raise RuntimeError
        return shout(part)

    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        with pytest.raises(RuntimeError):
            scope.sharded("loud", prompts(*"abcdefg"), stops_after_one, of=Prompt, shard_size=2)
        items = prompts(*again)
        assert scope.sharded("loud", items, shout, of=Prompt, shard_size=size) == shout(items)


def test_broken_stage_file_error_says_what_to_delete(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        scope.records("prompts", prompts, "a", "b", of=Prompt)
        (scope.path / "prompts.jsonl").write_text('{"id": "p0", "messages": []}\n{"id": "p1", "mess')
        with pytest.raises(
            RecordError, match=r"prompts\.jsonl:2: broken JSON .*delete this file, and the stage runs again"
        ):
            scope.records("prompts", refuse, of=Prompt)
        (scope.path / "prompts.jsonl").unlink()
        assert len(scope.records("prompts", prompts, "a", "b", of=Prompt)) == 2
        scope.value("quality", lambda: 1)
        (scope.path / "quality.json").write_text("{")
        with pytest.raises(RunError, match=r"quality\.json is broken JSON .*delete the file"):
            scope.value("quality", refuse)


def test_stage_with_a_wrong_result_is_refused_before_anything_is_written(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        with pytest.raises(RunError, match="returned a str, but of=Prompt is declared"):
            scope.records("prompts", lambda: ["a"], of=Prompt)
        with pytest.raises(RunError, match="JSON cannot represent"):
            scope.value("quality", lambda: float("nan"))
        for name in ("", "a/b", "..", ".hidden"):
            with pytest.raises(RunError, match="is not a valid stage or folder name"):
                scope.value(name, refuse)
        with pytest.raises(RunError, match="shard_size is 0"):
            scope.sharded("loud", [], shout, of=Prompt, shard_size=0)
        assert not scope.path.exists()


@dataclasses.dataclass(frozen=True)
class Model:
    fingerprint: str
    template_hash: str = "t"


def test_records_of_another_model_are_refused(tmp_path):
    sampled = dataclasses.replace(tiny.response(Prompt.of("q", "x"), 0, [5]), fingerprint="f", template="t")
    with Run.open(tmp_path / "run", Config()) as run:
        it = run.at("iter_1")
        assert it.sharded("y", ["q"], lambda part, r: [r], sampled, of=Response, by=Model("f")) == [sampled]
        for model, message in ((Model("g"), "sampled by weights f .* has g"), (Model("f", "u"), "template t")):
            with pytest.raises(StaleRecordsError, match=message):
                it.sharded("y", ["q"], refuse, of=Response, by=model)


def test_stage_that_counts_keeps_records_and_counts(tmp_path):
    def counting(*texts, total):
        return prompts(*texts), {"kept": len(texts), "of": total}

    with Run.open(tmp_path / "run", Config()) as run:
        it = run.at("iter_1")
        first = it.counted("prompts", counting, "a", "b", total=3, of=Prompt)
        assert first == (prompts("a", "b"), {"kept": 2, "of": 3})
        assert json.loads((it.path / "prompts_counts.json").read_text()) == first[1]
        assert it.counted("prompts", refuse, of=Prompt) == first
        assert it.finished("prompts", of=Prompt) == first[0]
        # A kill between the two files: the counts are made again, the records, which others may have used, are not.
        (it.path / "prompts_counts.json").unlink()
        assert it.counted("prompts", counting, "c", total=1, of=Prompt) == (first[0], {"kept": 1, "of": 1})
        (it.path / "prompts.jsonl").unlink()
        with pytest.raises(RunError, match=r"prompts\.jsonl is gone, and later iterations need it"):
            it.finished("prompts", of=Prompt)


# ---- kill and resume -------------------------------------------------------------------------------------------------

PLAYERS = textwrap.dedent("""
    import os, signal, sys
    from dataclasses import dataclass
    from typing import ClassVar
    from jaxsi.runs.records import Prompt
    from jaxsi.runs.run import Run, RunError

    @dataclass(frozen=True, kw_only=True)
    class Config:
        seed: int = 0
        iterations: int = 2

    def prompts(*texts):
        return [Prompt.of(f"p{number}", text) for number, text in enumerate(texts)]
""")

KILLED = PLAYERS + textwrap.dedent("""
    kill_at = None
    def here(point):
        if point == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def stage(part):
        here("shard of " + part[0].text)
        return [Prompt.of(prompt.id, prompt.text.upper()) for prompt in part]

    def once(*texts):
        yield prompts("zeroth")[0]
        here("records")
        yield from prompts(*texts)[1:]

    replace = os.replace
    def killing_replace(source, target):
        here("before " + os.path.basename(target))
        replace(source, target)
        here("after " + os.path.basename(target))
    os.replace = killing_replace

    def method(directory):
        with Run.open(directory, Config()) as run:
            scope = run.at("iter_1")
            made = scope.records("prompts", once, *"abcdefg", of=Prompt)
            loud = scope.sharded("loud", made, stage, of=Prompt, shard_size=2)
            scope.value("count", lambda: (here("value"), len(loud))[1])
            run.update_summary({"status": "complete"})

    # every start is a process of its own, forked after the imports, which take most of its time
    for start in sys.argv[1:]:
        directory, kill_at = start.split("@")
        child = os.fork()
        if child == 0:
            method(directory)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")

POINTS = [
    "records", "before prompts.jsonl", "after prompts.jsonl", "before plan.json", "shard of c", "before 00001.jsonl",
    "after 00001.jsonl", "before loud.jsonl", "after loud.jsonl", "value", "before count.json", "before summary.json",
    "before config.json", "after config.json",
]  # fmt: skip


def test_kill_at_every_point_and_rerun_gives_the_same_bytes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    starts = ["whole@never", *(f"{point}@{kill_at}" for point in POINTS for kill_at in (point, "never"))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), *starts],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["0"] + [str(-signal.SIGKILL), "0"] * len(POINTS), done.stderr
    expected = files(tmp_path / "whole")
    stages = {f"iter_1/{name}" for name in ("prompts.jsonl", "loud.jsonl", "count.json")}
    assert set(expected) == {"config.json", "summary.json"} | stages
    for point in POINTS:
        assert files(tmp_path / point) == expected, point
        journal = (tmp_path / point / "journal.jsonl").read_text().splitlines()
        assert all(json.loads(line)["event"] in ("start", "done", "reused") for line in journal)


def test_leftovers_of_a_dead_process_are_cleaned(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        run.at("iter_1").records("prompts", prompts, "a", of=Prompt)
    left = tmp_path / "run" / "iter_1" / ".candidates.jsonl.123.tmp"
    left.write_text("half")
    with (tmp_path / "run" / "journal.jsonl").open("a") as journal:
        journal.write('{"time": "torn by a ki')
    with Run.open(tmp_path / "run", Config()) as run:
        assert not left.exists()
        run.at("iter_1").records("prompts", refuse, of=Prompt)
    assert [row["state"] for row in status(tmp_path / "run")["stages"]] == ["done"]


DISK_FULL = PLAYERS + textwrap.dedent("""
    import resource
    run = Run.open(sys.argv[1], Config())
    run.at("iter_1").records("prompts", prompts, "a", of=Prompt)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    try:
        run.at("iter_1").records("long", prompts, "x" * 10_000, of=Prompt)
    except RunError as error:
        print(error)
""")


def test_full_disk_is_reported_and_finished_work_is_kept(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path / "run")],
        cwd=REPO, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "long.jsonl: File too large" in done.stdout
    assert "Every finished stage and shard is kept" in done.stdout
    assert [file.name for file in (tmp_path / "run" / "iter_1").iterdir()] == ["prompts.jsonl"]


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_another_config_is_refused_with_the_differences(tmp_path):
    Run.open(tmp_path / "run", Config()).close()
    stored = (tmp_path / "run" / "config.json").read_bytes()
    other = Config(seed=1, iterations=1, lengths=(1, 3), model=Path("m"), dpo=Inner(beta=0.2, transform=prompts))
    with pytest.raises(RunConfigError) as caught:
        Run.open(tmp_path / "run", other)
    assert caught.value.differences == (
        "seed: 0 -> 1",
        "iterations: 2 -> 1",
        "model: None -> 'm'",
        "lengths: [1, 2] -> [1, 3]",
        "dpo.beta: 0.1 -> 0.2",
        f"dpo.transform: {describe_config(mild)!r} -> {describe_config(prompts)!r}",
    )
    assert "seed: 0 -> 1" in str(caught.value)
    assert (tmp_path / "run" / "config.json").read_bytes() == stored


def test_iterations_may_be_raised_and_resumable_fields_may_change(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        assert not run.complete
        run.update_summary({"status": "complete", "iterations": [1]})
        assert run.complete
    with Run.open(tmp_path / "run", Config(label="b", dpo=Inner(log_every=1))) as run:
        assert run.complete
    with Run.open(tmp_path / "run", Config(iterations=3)) as run:
        assert not run.complete  # there is work again
        assert run.summary == {"status": "running", "iterations": [1]}
    with pytest.raises(RunConfigError, match="iterations: 3 -> 2"):
        Run.open(tmp_path / "run", Config(iterations=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherMethod(Config):
    extra: int = 1


def test_another_method_is_another_config(tmp_path):
    Run.open(tmp_path / "run", Config()).close()
    with pytest.raises(RunConfigError) as caught:
        Run.open(tmp_path / "run", OtherMethod())
    assert caught.value.differences == (f"__type__: '{__name__}.Config' -> '{__name__}.OtherMethod'",)


@pytest.mark.parametrize("value", [lambda x: x, object(), Inner().__repr__, functools.partial(lambda x: x)])
def test_config_value_without_a_lasting_name_is_refused(value):
    with pytest.raises(RunConfigError, match=r"config\.dpo\.transform is .*give a value, a function that"):
        describe_config(Config(dpo=Inner(transform=value)))


def test_directory_in_use_or_without_a_run_is_refused(tmp_path):
    run = Run.open(tmp_path / "run", Config())
    with pytest.raises(RunError, match=rf"in use by process {os.getpid()} on"):
        Run.open(tmp_path / "run", Config())
    assert status(tmp_path / "run")["live"]
    run.close()
    assert not status(tmp_path / "run")["live"]
    with pytest.raises(RunError, match="already holds a run"):
        Run.open(tmp_path / "run", Config(), resume=False)
    Run.open(tmp_path / "run", Config()).close()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"is not a run: .*thesis\.tex"):
        Run.open(tmp_path / "thesis", Config())
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        Run.open(tmp_path / "thesis" / "thesis.tex", Config())
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is broken JSON"):
        Run.open(tmp_path / "run", Config())


def test_lock_dies_with_its_process(tmp_path):
    program = PLAYERS + "run = Run.open(sys.argv[1], Config()); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], cwd=REPO, check=False)
    assert (tmp_path / "run" / ".lock").exists()
    assert not status(tmp_path / "run")["live"]


# ---- journal, status, progress ---------------------------------------------------------------------------------------


def test_journal_seconds_and_status(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 2.5).tolist())
    monkeypatch.setattr(spent.time, "monotonic", lambda: next(clock))
    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        scope.records("prompts", prompts, "a", "b", of=Prompt)
        scope.records("prompts", refuse, of=Prompt)
        with scope.timed("dpo"):
            pass
        with pytest.raises(AssertionError):
            scope.value("quality", refuse)
        assert scope.seconds() == {"prompts": 2.5, "dpo": 2.5}
        assert run.at("iter_2").seconds() == {}
        found = status(run.path)
        assert found["stages"] == [
            {"scope": "iter_1", "stage": "prompts", "state": "done", "records": 2, "seconds": 2.5, "shards": None},
            {"scope": "iter_1", "stage": "dpo", "state": "done", "records": None, "seconds": 2.5, "shards": None},
            {
                "scope": "iter_1",
                "stage": "quality",
                "state": "running",
                "records": None,
                "seconds": 0.0,
                "shards": None,
            },
        ]
    found = status(tmp_path / "run")
    assert (found["status"], found["iterations"]) == ("running", 2)
    assert found["stages"][2]["state"] == "interrupted"
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "done", "reused", "start", "done", "start"]
    assert set(lines[0]) == {"time", "scope", "stage", "event", "seconds", "records", "process"}
    (tmp_path / "run" / "iter_1" / "prompts.jsonl").unlink()
    assert status(tmp_path / "run")["stages"][0]["state"] == "deleted"
    with pytest.raises(RunError, match="holds no run"):
        status(tmp_path / "nothing")


def test_time_of_a_nested_stage_counts_once(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(spent.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds
        return seconds

    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")

        def outer():
            wait(1.0)
            scope.value("inner", wait, 4.0)
            scope.value("other", wait, 2.0)
            return wait(0.5)

        scope.value("outer", outer)
        scope.value("after", wait, 3.0)
        assert scope.seconds() == {"inner": 4.0, "other": 2.0, "outer": 1.5, "after": 3.0}


def test_list_value_is_not_taken_for_records(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        assert scope.value("logps", lambda: [1, 2]) == scope.value("logps", lambda: [3])
        assert [row["state"] for row in status(run.path)["stages"]] == ["done"]


# ---- named keys ------------------------------------------------------------------------------------------------------


def bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_keys_are_named_by_seed_scope_and_names(tmp_path):
    seen = set()
    for seed in (0, 1):
        with Run.open(tmp_path / f"run{seed}", Config(seed=seed)) as run:
            for scope in ("iter_1", "iter_2"):
                for names in ((), ("judge",), ("judge", "1"), ("judge", 1), ("judge1",), ("1", "judge")):
                    seen.add(bits(run.at(scope).key(*names)))
                    assert bits(run.at(scope).key(*names)) == bits(run.at(scope).key(*names))
    assert len(seen) == 2 * 2 * 6


def test_fold_composes_and_is_stable_across_processes_and_versions():
    key = jax.random.key(0)
    assert bits(fold(key, "a", 7)) == bits(fold(fold(key, "a"), 7))
    assert name_words("prompt 17").dtype == np.uint32
    # these digits are in every record of every run: if they change, no run can be resumed
    assert name_words("prompt 17").tolist() == [194265834, 1326636500]
    assert name_words(17).tolist() == [3158168686, 863241124]
    assert name_words("\ud800").shape == (2,)
    with pytest.raises(TypeError):
        name_words(1.5)


def test_names_spread(tmp_path):
    words = {tuple(name_words(name).tolist()) for name in [*range(5000), *map(str, range(5000))]}
    assert len(words) == 10_000


def test_user_may_provide_the_file_of_a_stage(tmp_path):
    with Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        scope.path.mkdir()
        write_jsonl(scope.path / "prompts.jsonl", prompts("mine"))
        assert scope.records("prompts", refuse, of=Prompt) == prompts("mine")
