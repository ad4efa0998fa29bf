"""A small server that imitates an endpoint, and the critic that asks it, for the tests of the endpoint critic."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxsi.runs.records import Critique, Prompt, Response
from jaxsi.stages import endpoint_client
from jaxsi.stages.endpoint import EndpointCritic
from jaxsi.stages.endpoint_client import Answer
from jaxsi.stages.prompts.critique import CritiqueTemplate

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
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text} | message}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }
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


def ask(critic: EndpointCritic, *names: str) -> list[Critique]:
    """Critiques of responses of these texts, each to a prompt of its own."""
    prompts = [Prompt.of(f"p{i}", "Say it") for i in range(len(names))]
    responses = [
        Response(
            id=f"p{i}#0",
            prompt_id=f"p{i}",
            sample=0,
            text=name,
            token_ids=(1,),
            logps=(),
            finish_reason="stop",
            fingerprint="f",
            template="t",
        )
        for i, name in enumerate(names)
    ]
    return critic(prompts, responses, TEMPLATE, jax.random.key(0))


def lines(critic: EndpointCritic) -> list[str]:
    path = Path(critic.cache)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


NAMES = [f"r{i}" for i in range(12)]


def write_answers(path: Path, name: str) -> None:
    cache = endpoint_client._Cache(path, "m")
    for i in range(60):
        answer = {"entry": f"{name}{i}", "model": "m", "text": name * 20000, "finish_reason": "stop"}
        cache.add(Answer(**answer, prompt_tokens=1, completion_tokens=1))
