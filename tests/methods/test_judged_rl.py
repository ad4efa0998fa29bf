"""GRPO and online DPO as methods: known answers as the reward, and prompts of several turns."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.methods import grpo, online_dpo
from jaxsi.methods.start import carry_out
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import Prompt
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judges import JudgeError, Verifier
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig

RL = RLConfig(
    optim=OptimConfig(learning_rate=1e-3),
    steps=1,
    prompts_per_step=8,
    group_size=2,
    batch_size=16,
    max_new_tokens=4,
    dtype="float32",
)
SEEN: list[tuple[str, str]] = []


def dialogues() -> list[Prompt]:
    """Four prompts of one turn and four of three."""
    single = [Prompt.of(f"single {i}", f"sort {i}") for i in range(4)]
    turns = [
        Prompt(
            id=f"turns {i}",
            messages=(
                {"role": "user", "content": f"cat {i}"},
                {"role": "assistant", "content": "dog"},
                {"role": "user", "content": "why"},
            ),
        )
        for i in range(4)
    ]
    return [*single, *turns]


def length(response: str, answer: str) -> float:
    """A check that two random texts seldom pass equally; the answer is that of the question."""
    SEEN.append((response, answer))
    return len(response)


def run_of(module: Any, folder: Path, judging: Verifier) -> list[dict[str, Any]]:
    cfg = module.Config(
        model=str(folder / "model"), prompts=dialogues, rl=RL, judging=judging, mesh=MeshConfig(data=1, fsdp=8),
        sampling=SamplingConfig(num_samples=1, max_new_tokens=4, dtype="float32"),
    )  # fmt: skip
    lmlib.export(tiny.make_lm(), folder / "model", dtype="float32")
    with Run.open(folder / "run", cfg) as run:
        carry_out(cfg, run)
    lines = (folder / "run" / "iter_1" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("module", [grpo, online_dpo], ids=["grpo", "online_dpo"])
def test_known_answers_reward_responses_to_whole_conversations(tmp_path, module):
    SEEN.clear()
    answers = tmp_path / "answers.jsonl"
    rows = [{"prompt": prompt.text, "answer": f"to {prompt.text}"} for prompt in dialogues()]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [step] = run_of(module, tmp_path, Verifier(str(answers), check=length))
    assert len(SEEN) == 16, "each response of the step was checked once"
    assert sum("why" in answer for _, answer in SEEN) == 8 and sum("sort" in answer for _, answer in SEEN) == 8
    rewards = [len(response) for response, _ in SEEN]
    assert step["reward"] == pytest.approx(sum(rewards) / 16 - RL.cut_off_penalty * step["cut_off"])


def test_prompt_without_a_known_answer_ends_the_run(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "sort 0", "answer": "0"}) + "\n")
    with pytest.raises(JudgeError, match=r"answers\.jsonl has no answer to the prompt"):
        run_of(grpo, tmp_path, Verifier(str(answers)))
