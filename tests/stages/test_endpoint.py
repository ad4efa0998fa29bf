"""A critic behind an endpoint, against a small server that imitates real ones: nothing is paid for twice."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import endpoint_server
import pytest
from endpoint_server import GOOD, HALF, NAMES, Reply, ask, failed, lines, replied, serving

from jaxsi.cli.supervisor import cpu_devices
from jaxsi.stages import endpoint_client
from jaxsi.stages.endpoint_client import EndpointError, Request
from jaxsi.toyworld.careless import SHIPPED

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# -------------------------------------------------------------------------------------------- nothing is paid for twice


def test_answers_are_in_order_and_paid_for_once(make, monkeypatch) -> None:
    def play(name: str, before: int) -> Reply:
        time.sleep(0.002 * (12 - int(name[1:])))  # the first come last
        return replied(GOOD.replace("better", f"better {name}"))

    with serving(play) as server:
        critic = make(server, concurrency=4)
        critiques = ask(critic, *NAMES, "r3")  # equal drafts are one request
        assert [c.improved for c in critiques] == [f"better {name}" for name in [*NAMES, "r3"]]
        assert [c.id for c in critiques] == [f"p{i}#0" for i in range(13)]
        assert {(c.score, c.weaknesses, c.suggestions, c.fingerprint) for c in critiques} == {
            (7.0, "talk", "less", "m")
        }
        assert sorted(server.names) == sorted(NAMES) and len(lines(critic)) == 12
    monkeypatch.delenv("A_KEY")  # the cache needs neither key nor server
    assert ask(critic, *NAMES, "r3") == critiques
    elsewhere = make("http://127.0.0.1:9/v1")
    assert ask(elsewhere, "r5") == [dataclasses.replace(critiques[5], id="p0#0", prompt_id="p0")]


def test_other_sampling_settings_ask_again(make) -> None:
    with serving(lambda name, before: replied()) as server:
        for changes in ({}, {"temperature": 1.0}, {"max_new_tokens": 9}, {"model": "other"}, {"temperature": None}):
            ask(make(server, **changes), "r0")
        assert len(server.names) == 5
        ask(make(server, length_parameter="max_completion_tokens", concurrency=1, timeout=9.0), "r0")
        assert len(server.names) == 5


def test_body_of_the_request(make) -> None:
    with serving(lambda name, before: replied()) as server:
        ask(make(server), "r0")
        ask(make(server, temperature=None, length_parameter="max_completion_tokens"), "half a pair \ud83d")
        message = [{"role": "user", "content": "Say it|r0"}]
        assert server.bodies[0] == {"model": "m", "messages": message, "temperature": 0.0, "max_tokens": 8}
        assert server.bodies[1].keys() == {"model", "messages", "max_completion_tokens"}


def test_line_cut_short_is_asked_for_again_and_spares_the_others(make) -> None:
    with serving(lambda name, before: replied()) as server:
        critic = make(server, concurrency=1)
        ask(critic, *NAMES[:3])
        path = Path(critic.cache)
        whole = path.read_bytes()
        path.write_bytes(b'[1]\n{"entry": 3}\n\xff\n' + whole[:-20])
        ask(critic, *NAMES[:4])
        assert server.names == ["r0", "r1", "r2", "r2", "r3"]
        ask(critic, *NAMES[:4])
        assert len(server.names) == 5
        path.write_bytes(path.read_bytes()[:-1])  # only the line break is lost, not the answer
        ask(critic, *NAMES[:5])
        assert server.names[5:] == ["r4"] and path.read_bytes().endswith(b"}\n")


def test_run_resumes_after_the_server_died(make) -> None:
    alive = False

    def play(name: str, before: int) -> Reply | None:
        return replied() if alive or name in NAMES[:5] else None

    with serving(play) as server:
        critic = make(server, concurrency=1, retries=2)
        with pytest.raises(EndpointError, match=r"after 2 retries.*run the same command again"):
            ask(critic, *NAMES)
        assert server.names == [*NAMES[:5], "r5", "r5", "r5"] and len(lines(critic)) == 5
        alive = True
        assert all(c.score == 7 for c in ask(critic, *NAMES))
        assert server.names[8:] == NAMES[5:]
    with pytest.raises(EndpointError, match="did not answer"):
        ask(critic, *NAMES, "new")
    assert len(lines(critic)) == 12


def test_threads_share_the_cache(make) -> None:
    with serving(lambda name, before: time.sleep(0.01) or replied()) as server:
        names = [f"r{i}" for i in range(40)]
        critics = [make(server, concurrency=2) for _ in range(2)]
        orders = [names, names[::-1]]
        threads = [threading.Thread(target=ask, args=(c, *o)) for c, o in zip(critics, orders, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(server.names) == set(names)
        assert len(server.names) <= 44  # at most those that both had in flight at the same time
        assert {json.loads(line)["entry"] for line in lines(critics[0])} == {
            Request(f"Say it|{n}", 8, 0.0).entry("m") for n in names
        }


def test_processes_share_the_cache(tmp_path) -> None:
    path = tmp_path / "cache.jsonl"
    program = f"import pathlib, endpoint_server; endpoint_server.write_answers(pathlib.Path({str(path)!r}), 'a')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    other = subprocess.Popen([sys.executable, "-c", program], env=environment)
    while not path.exists() and other.poll() is None:
        time.sleep(0.001)
    endpoint_server.write_answers(path, "b")
    assert other.wait(timeout=60) == 0
    cache = endpoint_client._Cache(path, "m")
    assert cache.answers.keys() == {f"{name}{i}" for name in "ab" for i in range(60)}
    assert cache.usage.total() == 240
    assert all(answer.text == answer.entry[0] * 20000 for answer in cache.answers.values())


# ---------------------------------------------------------------------------------------------- answers that lack parts


@pytest.mark.parametrize(
    ("reply", "text", "parts"),
    [
        (replied(None, refusal=f"I will not. {GOOD}"), f"I will not. {GOOD}", (None, None, None, None)),
        (replied(GOOD, "content_filter"), GOOD, (None, None, None, None)),
        (replied(None), "", (None, None, None, None)),
        (replied(HALF), HALF, ("talk", None, None, None)),
        (replied(GOOD, "length"), GOOD, ("talk", "less", 7.0, None)),
        (replied(GOOD, "error"), GOOD, ("talk", "less", 7.0, None)),
        (replied("Das geht so nicht.\u2028好的"), "Das geht so nicht.\u2028好的", (None, None, None, None)),
    ],
    ids=["refusal", "content filter", "empty", "half a template", "cut off", "broken off", "another language"],
)
def test_answer_without_complete_feedback_is_kept(make, reply, text, parts) -> None:
    with serving(lambda name, before: reply) as server:
        critic = make(server)
        for _ in range(2):  # it was paid for, so the second time it comes from the cache
            [c] = ask(critic, "r0")
            assert c.text == text and (c.weaknesses, c.suggestions, c.score, c.improved) == parts
        assert len(server.names) == 1


# -------------------------------------------------------------------------------------------------------- several hosts

PROGRAM = """
import sys
import jax
index, port, url, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import json
from endpoint_server import NAMES, ask
from jaxsi.runs.records import to_json
from jaxsi.stages.endpoint import EndpointCritic
critic = EndpointCritic(base_url=url, model="m", cache=cache, api_key_variable="A_KEY", max_new_tokens=8)
print(json.dumps([to_json(c) for c in ask(critic, *NAMES)]))
"""


@pytest.mark.slow
def test_one_of_several_hosts_asks(make, tmp_path) -> None:
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | cpu_devices(os.environ, 1) | {"PYTHONPATH": path}
    with serving(lambda name, before: failed(413) if name == "r3" else replied(f"好 {GOOD} {name}")) as server:
        arguments = [str(free_port()), server.url, str(tmp_path / "cache.jsonl")]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(index), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        outputs = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
        assert first == second and len(first) == 12 and first[3]["text"] == ""
        assert sorted(server.names) == sorted(NAMES)


# -------------------------------------------------------------------------------------------------------- a real server

SERVING = ("torch", "fastapi", "uvicorn", "accelerate")
SERVE = "from transformers.cli.transformers import main; main()"


@contextlib.contextmanager
def transformers_serve(port: int, log: Path) -> Iterator[subprocess.Popen]:
    """``transformers serve`` with the embedded world's model, once it accepts connections."""
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as file:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(SHIPPED), *options], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while True:
                assert server.poll() is None, log.read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.2)
            yield server
        finally:
            server.kill()
            server.wait()


@pytest.mark.slow
@pytest.mark.skipif(None in map(importlib.util.find_spec, SERVING), reason=f"transformers serve needs {SERVING}")
def test_run_survives_a_killed_transformers_server(make, tmp_path) -> None:
    port, log = free_port(), tmp_path / "serve.log"
    critic = make(f"http://127.0.0.1:{port}/v1", model=str(SHIPPED), concurrency=2, timeout=30.0)
    with transformers_serve(port, log) as server:
        first = ask(critic, *NAMES[:6])
        assert all(c.text and c.finish_reason in ("stop", "length") for c in first)
        rows = [json.loads(line) for line in lines(critic)]
        assert len(rows) == 6 and all(0 < row["completion_tokens"] <= 8 for row in rows)
        assert all(
            row["prompt_tokens"] <= critic.estimate([Request("Say it|r10", 8, 0.0)])["prompt_tokens"] for row in rows
        )
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        with pytest.raises(EndpointError, match="run the same command again"):
            ask(critic, *NAMES)
    assert len(lines(critic)) == 6
    with transformers_serve(port, log):
        assert ask(critic, *NAMES)[:6] == first
        with pytest.raises(EndpointError, match="refuses requests"):
            ask(make(critic.base_url, model="another", concurrency=1), "r0")
    assert len(lines(critic)) == 12
    assert log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200') == 12
