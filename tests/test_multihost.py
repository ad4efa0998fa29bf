"""Two real processes with a device each against one process with two: the same responses and scores."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
import jax
index, count, port = map(int, sys.argv[1:])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
import jaxsi
from jaxsi.chat import render_prompt
from jaxsi.scoring import score_choices
from jaxsi.toyworld import world
from jaxsi.toyworld.seed import SHIPPED
lm = jaxsi.load(SHIPPED, dtype="float32")
assert lm.mesh.devices.size == 2
prompts = world.prompts(6, seed=3, held_out=False)
responses = jaxsi.generate(lm, prompts, num_samples=2, max_new_tokens=16, batch_size=8)
scores = jaxsi.score(lm, [prompt for prompt in prompts for _ in range(2)], responses)
texts = [render_prompt(lm.tokenizer, prompt.messages) for prompt in prompts]
choices = score_choices(lm, texts, [[[7], [8]]] * len(texts))
print(json.dumps([[r.token_ids for r in responses], [*scores.tolist(), *choices.ravel().tolist()], lm.fingerprint]))
"""


def run(processes: int, devices: int) -> list[list]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), str(processes), str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.slow
def test_two_processes_sample_and_score_as_one():
    (tokens, scores, fingerprint), *_ = run(processes=1, devices=2)
    for other_tokens, other_scores, other_fingerprint in run(processes=2, devices=1):
        assert other_tokens == tokens
        assert other_scores == pytest.approx(scores, abs=1e-4)
        assert other_fingerprint == fingerprint
