"""A critic behind an endpoint, against a small server that imitates real ones: nothing is paid for twice."""

import contextlib
import dataclasses
import email.utils
import http.server
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxsi.runs.records import Critique, Prompt, Response
from jaxsi.stages import endpoint
from jaxsi.stages.endpoint import Answer, EndpointCritic, EndpointError
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.toyworld.careless import SHIPPED

pytest.importorskip("openai", reason="the endpoint critic needs openai: pip install 'jaxsi[endpoint]'")

ROOT = Path(__file__).parents[2]
KEY = "sk-a-secret-of-this-test"
TEMPLATE = CritiqueTemplate(name="short", request="{prompt}|{response}")
GOOD = "Weaknesses: talk\nSuggestions: less\nOverall Score: [[7]]\n### Improved Response\nbetter"
HALF = "Weaknesses: talk\nOverall Score: [["
Reply = tuple[int, dict[str, str], bytes]
Play = Callable[[str, int], Reply | float | None]  # (name of the response, earlier requests for it) -> reply


def replied(
    text: str | None = GOOD, reason: str = "stop", prompt: int = 10, completion: int = 5, **message: Any
) -> Reply:
    body = {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text} | message}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }  # fmt: skip
    return 200, {}, json.dumps(body).encode()


def failed(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, names, json.dumps({"error": {"message": message, "code": code}}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Replies by ``play``. A number is silence for that many seconds; None breaks the connection."""

    daemon_threads, block_on_close = True, False

    def __init__(self, play: Play):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.play, self.names, self.times, self.bodies = play, [], [], []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = body["messages"][0]["content"].split("|")[-1]
        with server.lock:
            before = server.names.count(name)
            server.names.append(name)
            server.times.append(time.monotonic())
            server.bodies.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            reply = server.play(name, before)
        finally:
            with server.lock:
                server.at_once -= 1
        if reply is None or isinstance(reply, float):
            time.sleep(reply or 0.0)
            self.close_connection = True
            return
        status, headers, text = reply
        self.send_response(status)
        for header, value in ({"content-type": "application/json", "content-length": str(len(text))} | headers).items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(text)


@contextlib.contextmanager
def serving(play: Play) -> Iterator[Server]:
    with Server(play) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.005)
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., EndpointCritic]:
    def critic(server: Server | str, **changes: Any) -> EndpointCritic:
        url = server if isinstance(server, str) else server.url
        settings = {"model": "m", "cache": str(tmp_path / "kept" / "cache.jsonl"), "api_key_variable": "A_KEY"}
        settings |= {"max_new_tokens": 8, "retries": 3, "timeout": 5.0}
        return EndpointCritic(base_url=url, **(settings | changes))

    return critic


def ask(critic: EndpointCritic, *names: str) -> list[Critique]:
    """Critiques of responses of these texts, each to a prompt of its own."""
    prompts = [Prompt.of(f"p{i}", "Say it") for i in range(len(names))]
    responses = [
        Response(
            id=f"p{i}#0", prompt_id=f"p{i}", sample=0, text=name, token_ids=(1,), logps=(), finish_reason="stop",
            fingerprint="f", template="t",
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return critic(prompts, responses, TEMPLATE, jax.random.key(0))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def lines(critic: EndpointCritic) -> list[str]:
    path = Path(critic.cache)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


NAMES = [f"r{i}" for i in range(12)]


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
            critics[0]._entry(f"Say it|{n}") for n in names
        }


def write_answers(path: Path, name: str) -> None:
    cache = endpoint._Cache(path, "m")
    for i in range(60):
        answer = {"entry": f"{name}{i}", "model": "m", "text": name * 20000, "finish_reason": "stop"}
        cache.add(Answer(**answer, prompt_tokens=1, completion_tokens=1))


def test_processes_share_the_cache(tmp_path) -> None:
    path = tmp_path / "cache.jsonl"
    program = f"import pathlib, test_endpoint; test_endpoint.write_answers(pathlib.Path({str(path)!r}), 'a')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'stages'}"}
    other = subprocess.Popen([sys.executable, "-c", program], env=environment)
    while not path.exists() and other.poll() is None:
        time.sleep(0.001)
    write_answers(path, "b")
    assert other.wait(timeout=60) == 0
    cache = endpoint._Cache(path, "m")
    assert cache.answers.keys() == {f"{name}{i}" for name in "ab" for i in range(60)}
    assert cache.usage.total() == 240
    assert all(answer.text == answer.entry[0] * 20000 for answer in cache.answers.values())


# -------------------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "failures",
    [
        [failed(429)], [failed(500), failed(503), failed(529)], [failed(408), failed(409)], [None], [1.0],
        [(200, {}, b'{"choices": [')], [(200, {}, b"<html>wait</html>")], [(200, {}, b'{"error": "upstream"}')],
        [(200, {}, b'{"choices": [{"message": null}]}')], [(200, {"content-type": "text/html"}, b"<html>wait</html>")],
        [failed(429, "You exceeded your current quota, please check your plan and billing details")],
        [failed(500, "took too long"), failed(403 + 100)],
    ],
    ids=["429", "5xx", "408 409", "broken", "silent", "half JSON", "no JSON", "no choices", "no message", "HTML",
         "a minute's quota", "slow"],
)  # fmt: skip
def test_temporary_failure_is_retried(make, failures) -> None:
    with serving(lambda name, before: failures[before] if before < len(failures) else replied()) as server:
        [c] = ask(make(server, timeout=0.5 if failures == [1.0] else 5.0), "r0")
        assert c.score == 7 and len(server.names) == len(failures) + 1


def test_retries_come_to_an_end(make) -> None:
    with serving(lambda name, before: failed(503)) as server:
        with pytest.raises(EndpointError, match=r"did not answer after 3 retries.*503"):
            ask(make(server), "r0")
        assert len(server.names) == 4


@pytest.mark.parametrize("header", [{"retry_after": "0.3"}, {"retry_after_ms": "300"}], ids=str)
def test_wait_follows_the_retry_after_header(make, header) -> None:
    with serving(lambda name, before: replied() if before else failed(429, **header)) as server:
        ask(make(server), "r0")
        first, second = server.times
        assert 0.3 <= second - first < 5


def test_retry_after_may_be_a_date(make) -> None:
    with serving(lambda name, before: failed(429, retry_after=email.utils.formatdate(time.time() + 3650))) as server:
        with pytest.raises(EndpointError, match=r"refuses requests.*wait 36\d\d s"):  # longer than LONGEST_WAIT
            ask(make(server), "r0")
        assert len(server.names) == 1
    with serving(lambda name, before: replied() if before else failed(503, retry_after="soon")) as server:
        assert ask(make(server), "r0")[0].score == 7


def test_error_ends_the_waits_of_other_threads(make, monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 60.0)
    refused = threading.Event()

    def play(name: str, before: int) -> Reply:
        if name == "r1":
            refused.wait(5)
            return failed(401)
        refused.set()
        return failed(429)

    with serving(play) as server:
        start = time.monotonic()
        with pytest.raises(EndpointError, match="401"):
            ask(make(server, concurrency=2), "r0", "r1")
        assert time.monotonic() - start < 10


def test_concurrency_limits_requests_in_flight(make) -> None:
    together = threading.Barrier(3)
    with serving(lambda name, before: together.wait(10) is None or replied()) as server:
        ask(make(server, concurrency=3), *NAMES)
        assert server.most_at_once == 3


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


TOO_LONG = [
    failed(400, "This model's maximum context length is 4096 tokens. However, you requested 5000"),
    failed(400, "the request exceeds the available context size", "exceed_context_size_error"),
    failed(400, "prompt is too long: 210000 tokens > 200000 maximum"),
    failed(400, "no", "context_length_exceeded"),
    failed(413),
]
FILTERED = [failed(400, "The response was filtered", "content_filter"), failed(403, "Your input was flagged")]


@pytest.mark.parametrize(("reply", "reason"), [*((r, "length") for r in TOO_LONG), *((r, "stop") for r in FILTERED)])
def test_refused_request_does_not_affect_the_others(make, caplog, reply, reason) -> None:
    with serving(lambda name, before: reply if name == "r2" else replied()) as server:
        critic = make(server, concurrency=1)
        critiques = ask(critic, *NAMES[:4])
        assert [c.score for c in critiques] == [7, 7, None, 7]
        assert critiques[2].text == "" and critiques[2].finish_reason == reason
        assert "of 4 answers" in caplog.text
        assert len(server.names) == 4 and len(lines(critic)) == 3  # the refused one cost nothing and may succeed later
        ask(critic, *NAMES[:4])
        assert server.names[4:] == ["r2"]


def test_error_if_all_requests_are_refused(make) -> None:
    with (
        serving(lambda name, before: TOO_LONG[0]) as server,
        pytest.raises(EndpointError, match="refuses all 4"),
    ):
        ask(make(server), *NAMES[:4])


# ----------------------------------------------------------------------------------------------- errors that stop a run


@pytest.mark.parametrize(
    "reply",
    [
        failed(401, f"Incorrect API key provided: {KEY}"), failed(403), failed(404, "no such model"), failed(402),
        failed(429, "You exceeded your current quota", "insufficient_quota"),
        failed(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
    ],
    ids=["key", "permission", "model", "payment", "quota", "parameter"],
)  # fmt: skip
def test_permanent_failure_stops_at_once_and_hides_the_key(make, caplog, reply) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(lambda name, before: replied() if name == "r0" else reply) as server:
        critic = make(server, concurrency=1)
        with pytest.raises(EndpointError, match=r"refuses requests.*A_KEY") as error:
            ask(critic, *NAMES)
        assert server.names == ["r0", "r1"] and len(lines(critic)) == 1
        assert KEY not in str(error.value) + caplog.text + "".join(lines(critic)) + repr(critic)


@pytest.mark.parametrize("key", [None, "", " \n", "two\nlines", "schlüssel"])
def test_error_for_an_unusable_key(make, monkeypatch, key) -> None:
    if key is None:
        monkeypatch.delenv("A_KEY")
    else:
        monkeypatch.setenv("A_KEY", key)
    with serving(lambda name, before: replied()) as server:
        with pytest.raises(EndpointError, match="variable A_KEY is not set to a key"):
            ask(make(server), "r0")
        assert not server.names


def test_key_may_end_in_a_line_break(make, monkeypatch) -> None:
    monkeypatch.setenv("A_KEY", KEY + "\n")
    with serving(lambda name, before: replied()) as server:
        assert ask(make(server), "r0")[0].score == 7


def test_error_without_the_openai_client(make, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EndpointError, match=r"pip install 'jaxsi\[endpoint\]'"):
        ask(make("http://127.0.0.1:9/v1"), "r0")


def test_nothing_is_asked_if_the_cache_is_not_writable(make, tmp_path) -> None:
    with serving(lambda name, before: replied()) as server:
        with pytest.raises(EndpointError, match="cannot be written"):
            ask(make(server, cache=str(tmp_path)), "r0")
        assert not server.names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": 0}, "concurrency is 0"), ({"retries": 0}, "retries is 0"), ({"timeout": 0.0}, "timeout is 0"),
        ({"prompt_price": -1.0}, "prices -1"), ({"max_cost": 1.0}, "both prices are 0"),
    ],
)  # fmt: skip
def test_invalid_settings_are_errors(make, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make("http://127.0.0.1:9/v1", **changes)


# ----------------------------------------------------------------------------------------------------------------- caps


def test_estimate_of_calls_tokens_and_cost(make) -> None:
    critic = make("http://127.0.0.1:9/v1", prompt_price=1.0, completion_price=10.0)
    estimate = critic.estimate(["a" * 300, "好" * 100])
    assert estimate == {"calls": 2, "prompt_tokens": 264, "completion_tokens": 16, "cost": pytest.approx(424e-6)}
    assert critic.estimate([]) == {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}


@pytest.mark.parametrize("cap", [{"max_total_tokens": 515}, {"max_cost": 515e-6}], ids=str)
def test_nothing_is_asked_that_may_exceed_a_cap(make, cap) -> None:
    prices = {"prompt_price": 1.0, "completion_price": 1.0}
    with serving(lambda name, before: replied()) as server:
        critic = make(server, **prices, **cap)
        assert critic.estimate(["Say it|r00"] * 12)["prompt_tokens"] == 12 * 35
        with pytest.raises(EndpointError, match=r"may come to .*raise the cap"):
            ask(critic, *(f"r{i:02}" for i in range(12)))  # at most 12 * 43 = 516
        assert not server.names
        ask(critic, *(f"r{i:02}" for i in range(11)))
        assert len(server.names) == 11  # 11 * 15 = 165 of 515 are used
        with pytest.raises(EndpointError, match="may come to"):
            ask(make(server, **prices, **cap), *(f"r{i:02}" for i in range(20)))  # also in another run with this cache
        assert len(server.names) == 11
        ask(make(server, **prices, **cap), *(f"r{i:02}" for i in range(18)))  # 165 + 7 * 43 = 466


def test_cap_holds_if_the_server_counts_more_than_estimated(make) -> None:
    with serving(lambda name, before: time.sleep(0.02) or replied(prompt=1000)) as server:
        critic = make(server, max_total_tokens=1500, concurrency=4)
        with pytest.raises(EndpointError, match="over max_total_tokens = 1500"):
            ask(critic, *NAMES)
        assert 2 <= len(server.names) <= 5
        assert len(lines(critic)) == len(server.names)  # answers in flight are kept


def test_tokens_of_another_run_count_towards_the_cap_at_once(make) -> None:
    def play(name: str, before: int) -> Reply:
        if name == "r1":
            other = Answer(entry="x", model="m", text="", finish_reason="stop", prompt_tokens=450, completion_tokens=0)
            endpoint._Cache(Path(critic.cache), "m").add(other)
        return replied()

    with serving(play) as server:
        critic = make(server, max_total_tokens=516, concurrency=1)
        with pytest.raises(EndpointError, match="have used 480"):
            ask(critic, *NAMES)
        assert server.names == ["r0", "r1"]
        ask(make(server, model="other", max_total_tokens=516), "r0")  # another model has its own cap


def test_estimate_stands_in_for_missing_counts(make) -> None:
    body = json.loads(replied()[2])
    del body["usage"]
    with serving(lambda name, before: (200, {}, json.dumps(body).encode())) as server:
        critic = make(server)
        ask(critic, "r0")
        [line] = lines(critic)
        assert (json.loads(line)["prompt_tokens"], json.loads(line)["completion_tokens"]) == (35, 8)


# -------------------------------------------------------------------------------------------------------- several hosts

PROGRAM = """
import sys
import jax
index, port, url, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
sys.path.insert(0, sys.argv[5])
import json
from tests.stages import test_endpoint
from jaxsi.runs.records import to_json
critic = test_endpoint.EndpointCritic(base_url=url, model="m", cache=cache, api_key_variable="A_KEY", max_new_tokens=8)
print(json.dumps([to_json(c) for c in test_endpoint.ask(critic, *test_endpoint.NAMES)]))
"""


@pytest.mark.slow
def test_one_of_several_hosts_asks(tmp_path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with serving(lambda name, before: TOO_LONG[0] if name == "r3" else replied(f"好 {GOOD} {name}")) as server:
        arguments = [str(free_port()), server.url, str(tmp_path / "cache.jsonl"), str(ROOT)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(index), *arguments],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(2)
        ]  # fmt: skip
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
        assert all(row["prompt_tokens"] <= critic.estimate(["Say it|r10"])["prompt_tokens"] for row in rows)
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
