"""A critic behind an endpoint that fails: what is retried, what stops a run, and caps on tokens and cost."""

import email.utils
import json
import logging
import sys
import threading
import time
from pathlib import Path

import pytest
from endpoint_server import KEY, NAMES, Reply, ask, failed, lines, replied, serving

from jaxsi.stages import endpoint_client
from jaxsi.stages.endpoint_client import Answer, EndpointError, Request

# -------------------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "failures",
    [
        [failed(429)],
        [failed(500), failed(503), failed(529)],
        [failed(408), failed(409)],
        [None],
        [1.0],
        [(200, {}, b'{"choices": [')],
        [(200, {}, b"<html>wait</html>")],
        [(200, {}, b'{"error": "upstream"}')],
        [(200, {}, b'{"choices": [{"message": null}]}')],
        [(200, {"content-type": "text/html"}, b"<html>wait</html>")],
        [failed(429, "You exceeded your current quota, please check your plan and billing details")],
        [failed(500, "took too long"), failed(403 + 100)],
    ],
    ids=[
        "429",
        "5xx",
        "408 409",
        "broken",
        "silent",
        "half JSON",
        "no JSON",
        "no choices",
        "no message",
        "HTML",
        "a minute's quota",
        "slow",
    ],
)
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
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 60.0)
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


# ----------------------------------------------------------------------------------------------------- refused requests


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
        failed(401, f"Incorrect API key provided: {KEY}"),
        failed(403),
        failed(404, "no such model"),
        failed(402),
        failed(429, "You exceeded your current quota", "insufficient_quota"),
        failed(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
    ],
    ids=["key", "permission", "model", "payment", "quota", "parameter"],
)
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
        ({"concurrency": 0}, "concurrency is 0"),
        ({"retries": 0}, "retries is 0"),
        ({"timeout": 0.0}, "timeout is 0"),
        ({"prompt_price": -1.0}, "prices -1"),
        ({"max_cost": 1.0}, "both prices are 0"),
    ],
)
def test_invalid_settings_are_errors(make, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make("http://127.0.0.1:9/v1", **changes)


# ----------------------------------------------------------------------------------------------------------------- caps


def test_estimate_of_calls_tokens_and_cost(make) -> None:
    critic = make("http://127.0.0.1:9/v1", prompt_price=1.0, completion_price=10.0)
    estimate = critic.estimate([Request(text, 8, 0.0) for text in ("a" * 300, "好" * 100)])
    assert estimate == {"calls": 2, "prompt_tokens": 264, "completion_tokens": 16, "cost": pytest.approx(424e-6)}
    assert critic.estimate([]) == {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}


@pytest.mark.parametrize("cap", [{"max_total_tokens": 515}, {"max_cost": 515e-6}], ids=str)
def test_nothing_is_asked_that_may_exceed_a_cap(make, cap) -> None:
    prices = {"prompt_price": 1.0, "completion_price": 1.0}
    with serving(lambda name, before: replied()) as server:
        critic = make(server, **prices, **cap)
        assert critic.estimate([Request("Say it|r00", 8, 0.0)] * 12)["prompt_tokens"] == 12 * 35
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
            endpoint_client._Cache(Path(critic.cache), "m").add(other)
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
