"""``jaxsi rl``: reinforces a model by a reward model or another judge, as a run of its own."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from jaxsi.cli.arguments import ChatOptions, Dtype, Model, PromptOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.judges import JUDGES, is_judge, judge_of, rubric_for
from jaxsi.cli.stored import Mesh, check_writes, mesh_for
from jaxsi.cli.train import config_of, logged, report

DESCRIPTION = f"""Reinforcement learning: MODEL samples responses to the prompts, they get rewards, and it learns to
write those with a higher reward. A penalty keeps it near the MODEL that it starts from. --reward names a reward model,
as from `jaxsi reward`, or a judge of another kind than self.

{JUDGES}

DIR is a run directory: if the command is killed, run it again, and it goes on. Afterwards DIR is a model for all other
commands, such as `jaxsi generate DIR` and `jaxsi export DIR OUT`. Prompts that leave no room for --max-new-tokens are
left out and counted.

Examples:
  jaxsi rl MODEL --prompts prompts.jsonl --reward runs/reward --run-dir runs/rl
  jaxsi rl MODEL --prompts prompts.jsonl --reward function:rewards.py:brief --run-dir runs/brief --learner ppo
  jaxsi rl MODEL --prompts gsm8k.jsonl --reward verifier:gsm8k.jsonl,prompt=question --run-dir runs/gsm8k"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rl(PromptOptions, ChatOptions):
    model: Model
    run_dir: Path
    """A folder for the run."""
    reward: str
    """A reward model or another judge. A reward model may have another tokenizer than MODEL; then it reads the texts of
    the responses. The source of a function is part of the run: if it changes, the run does not go on."""
    rubric: str | None = None
    """The rubric of a judge that writes: a shipped one, or a file. Default: self_rewarding_judge."""
    learner: Literal["rloo", "ppo", "grpo", "online-dpo"] = "rloo"
    """rloo and grpo compare the responses to a prompt with each other; ppo trains a second model that predicts the
    reward; online-dpo learns from the best and the worst response to each prompt, with --kl-coef as DPO's beta."""
    steps: int = 100
    """Each samples new responses and learns from them."""
    prompts_per_step: int = 8
    group_size: int = 4
    """Responses to each prompt; only ppo can do with 1."""
    max_new_tokens: int = 128
    cut_off_penalty: float = 1.0
    """Subtracted from the reward of a response that --max-new-tokens cuts off."""
    kl_coef: float = 0.05
    """Weight of the penalty for moving away from MODEL."""
    clip: float = 0.2
    """How far a token's probability may move within a step, as a share of it."""
    learning_rate: float = 1e-6
    end_learning_rate: float | None = None
    """At the last step, along a cosine; None keeps the rate."""
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    """The warm-up as a share of all optimizer steps, in place of --warmup-steps."""
    weight_decay: float = 0.0
    epochs: int = 1
    """How often a step learns from its responses."""
    batch_size: int | None = None
    """Responses of an optimizer step, over all devices. By default all of a step, prompts-per-step x group-size."""
    accumulate: int = 1
    """Parts in which the responses of an optimizer step are computed, one after the other: more take less memory."""
    checkpoint_every: int = 10
    """Steps between the points from which a killed training goes on."""
    log_every: int = 1
    dtype: Dtype = "auto"
    """Of the computation; the trained weights are float32. auto: bfloat16 if this device computes in it at speed, else
    float32. A command that goes on keeps the dtype with which it began."""
    seed: int = 0
    mesh: Mesh = Mesh()

    def config(self) -> Any:
        """Raises: UsageError if a value is out of range."""
        from jaxsi.training.online_dpo import check_pairs
        from jaxsi.training.rl import RLConfig

        if self.learner != "ppo" and self.group_size < 2:
            raise UsageError(
                f"--group-size {self.group_size}: {self.learner} compares the responses to a prompt with each other; "
                "give at least 2, or --learner ppo"
            )
        batch_size = self.prompts_per_step * self.group_size if self.batch_size is None else self.batch_size
        config = config_of(RLConfig, self, batch_size=batch_size)
        if self.learner == "online-dpo":
            try:
                check_pairs(config)
            except ValueError as error:
                raise UsageError(str(error)) from error
        return config

    def rewarding(self) -> Any:
        """The reward model's name, the function, or the judge. Raises: UsageError, RubricError."""
        from jaxsi.stages.judge import JudgeBy
        from jaxsi.stages.judges import JudgeError, RewardJudge, RewardsBy

        if not is_judge(self.reward):
            return self.reward
        judging = judge_of(self.reward, cache=self.run_dir / "judge_answers.jsonl")
        if isinstance(judging, RewardJudge):
            return judging.model
        if isinstance(judging, JudgeBy):
            return judging.function
        try:
            return RewardsBy(judging=judging, rubric=rubric_for(self.rubric, ""))
        except JudgeError as error:
            raise UsageError(f"--reward {self.reward}: {error}") from error


def rl(argv: list[str]) -> Report:
    """Reinforces a model."""
    args = parse(Rl, argv, "jaxsi rl", DESCRIPTION)
    rewarding = args.rewarding()
    from jaxsi.lm import load
    from jaxsi.methods import single
    from jaxsi.model.compute_dtype import settled
    from jaxsi.runs.run import read_json
    from jaxsi.training.grpo import grpo
    from jaxsi.training.online_dpo import online_dpo
    from jaxsi.training.ppo import ppo
    from jaxsi.training.rl import rloo

    config, prompts = args.config(), args.read()
    if len(prompts) < config.prompts_per_step:
        raise UsageError(
            f"{args.prompts} has {len(prompts)} prompts, fewer than --prompts-per-step {config.prompts_per_step}; add "
            "some or lower it"
        )
    mesh = mesh_for(args.model, args.mesh)
    config = settled({"training": config}, args.run_dir)["training"]
    policy = load(args.model, mesh, config.dtype, weights_dtype="float32", chat=args.model_chat)
    check_writes(policy, args.model)
    reward = load(rewarding, mesh, config.dtype) if isinstance(rewarding, str) else rewarding
    if not callable(reward) and not reward.config.scalar_head:
        raise UsageError(
            f"--reward {args.reward} is a language model without a scalar head, so it gives no rewards; give a model "
            "of `jaxsi reward`, or a Hugging Face sequence classifier with one label"
        )
    began = time.monotonic()
    learners = {"rloo": rloo, "ppo": ppo, "grpo": grpo, "online-dpo": online_dpo}
    learner = learners[args.learner]
    model = single.rl(policy, prompts, reward, args.run_dir, config, learner=learner, seed=args.seed)
    first = logged(args.run_dir)[0]
    counts = read_json(args.run_dir / "iter_1" / "prompts_counts.json")
    return report(args.run_dir, counts, model, began, first_reward=first["reward"])
