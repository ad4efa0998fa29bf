"""Fixtures of the stages' tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import KEY, Server

from jaxsi.stages import endpoint_client
from jaxsi.stages.endpoint import EndpointCritic


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EndpointCritic]:
    """Makes a critic that asks a server, with short waits and a key in the environment variable A_KEY."""
    pytest.importorskip("openai", reason="the endpoint critic needs openai: pip install 'jaxsi[endpoint]'")
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.005)
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def critic(server: Server | str, **changes: Any) -> EndpointCritic:
        url = server if isinstance(server, str) else server.url
        settings = {"model": "m", "cache": str(tmp_path / "kept" / "cache.jsonl"), "api_key_variable": "A_KEY"}
        settings |= {"max_new_tokens": 8, "retries": 3, "timeout": 5.0}
        return EndpointCritic(base_url=url, **(settings | changes))

    return critic
