"""SFT, DPO, a reward model and RL by themselves: one training as a run of its own, which resumes like any other."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsi.lm import LM
from jaxsi.methods.preflight import PreflightError
from jaxsi.model.compute_dtype import settled
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import PreferencePair, Prompt, Response, SFTExample, as_prompts, digest
from jaxsi.runs.run import Run
from jaxsi.stages.answers import with_room
from jaxsi.stages.gap import reward_group
from jaxsi.stages.judge import number
from jaxsi.stages.judges import RewardsBy
from jaxsi.stages.pairs import Preference
from jaxsi.stages.prompts import question_text
from jaxsi.text.chat import written_response
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training import rl as learners, train
from jaxsi.training.batches import Sequence_
from jaxsi.training.optim import OptimConfig
from jaxsi.training.reward import BRADLEY_TERRY, RewardOf, inequalities, lm_config, train_reward
from jaxsi.training.rl import Reward, RLConfig
from jaxsi.training.train import DPOConfig, TrainConfig

Pair = PreferencePair | tuple[Prompt | str, str, str]  # the texts are prompt, chosen, rejected


@stored_as("single.Training")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What decides the result: the weights to start from, a digest of the records, the settings, and the chat template
    if it is told more than by default."""

    model: str
    data: str
    template: str = ""
    training: TrainConfig | DPOConfig
    seed: int


@stored_as("single.Reinforcement")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """As ``Training``, for RL. ``reward`` is the reward model's fingerprint, or the judge, or the function: its source
    is hashed."""

    model: str
    data: str
    template: str = ""
    reward: str | RewardsBy | Callable[[str, str], float | None]
    training: RLConfig
    learner: Callable[..., LM]
    seed: int


def sft(
    lm: LM,
    examples: Sequence[SFTExample | tuple[str, str]],
    run_dir: Path | str,
    config: TrainConfig = TrainConfig(),
    *,
    seed: int = 0,
) -> LM:
    """Supervised fine-tuning of ``lm`` on examples, or on (prompt, response) texts, in ``run_dir``.

    ``lm`` has float32 weights: ``load(..., weights_dtype="float32")``. ``load(run_dir)`` gives the result again.

    Raises: RunConfigError if ``run_dir`` holds another training; TrainingError as ``training.train.sft``.
    """
    records = [e if isinstance(e, SFTExample) else _example(str(i), *e) for i, e in enumerate(examples)]
    config.check(lm.mesh)
    config = settled({"training": config}, run_dir)["training"]
    described = Training(model=lm.fingerprint, data=digest(records), template=_told(lm), training=config, seed=seed)
    with Run.open(run_dir, described) as run:
        model = train.sft(lm, records, config, run.at("iter_1"))
        run.update_summary({"status": "complete"})
    return model


def dpo(
    lm: LM,
    pairs: Sequence[Pair],
    run_dir: Path | str,
    config: DPOConfig = DPOConfig(),
    *,
    reference: LM | None = None,
    seed: int = 0,
) -> LM:
    """Preference training of ``lm`` on pairs, or on (prompt, chosen, rejected) texts, in ``run_dir``; otherwise as
    ``sft``. ``reference`` is ``lm`` by default."""
    config.check_single_round()
    config.train.check(lm.mesh)
    records = _pairs(lm, pairs)
    models = lm.fingerprint if reference is None else f"{lm.fingerprint} reference {reference.fingerprint}"
    config = settled({"training": config}, run_dir)["training"]
    described = Training(model=models, data=digest(records), template=_told(lm), training=config, seed=seed)
    with Run.open(run_dir, described) as run:
        model = train.dpo(lm, records, config, run.at("iter_1"), reference=reference)
        run.update_summary({"status": "complete"})
    return model


def reward(
    lm: LM,
    pairs: Sequence[Pair],
    run_dir: Path | str,
    config: TrainConfig = TrainConfig(optim=OptimConfig(learning_rate=1e-5)),
    *,
    seed: int = 0,
) -> LM:
    """A reward model r(x, y) from ``lm`` by pairs, read as texts: it minimises -log s(r(x, chosen) - r(x, rejected))
    (Bradley-Terry). If ``lm`` is a reward model, its training goes on. Otherwise as ``sft``."""
    config.check(lm.mesh)
    records = _pairs(lm, pairs)
    config = settled({"training": config}, run_dir)["training"]
    described = Training(model=lm.fingerprint, data=digest(records), template=_told(lm), training=config, seed=seed)
    with Run.open(run_dir, described) as run:
        model = train_reward(lm, _groups(lm, records), BRADLEY_TERRY, config, run.at("iter_1"))
        run.update_summary({"status": "complete"})
    return model


def ordered_pairs(lm: LM, pairs: Sequence[Pair], *, batch_size: int = 64) -> dict[str, Any]:
    """How well a reward model orders pairs that it was not trained on: {"pairs", "too_long", "accuracy"}. Pairs longer
    than the model's positions are left out and counted; without any other, "accuracy" is None.

    Raises: RewardError: if the model has no scalar head, or if a reward is not finite.
    """
    limit, groups = lm_config(lm).max_positions, _groups(lm, _pairs(lm, pairs))
    fitting = [group for group in groups if max(len(s.tokens) for s in group) <= limit]
    accuracy = inequalities(lm, fitting, BRADLEY_TERRY, batch_size=batch_size)["mean"] if fitting else None
    return {"pairs": len(fitting), "too_long": len(groups) - len(fitting), "accuracy": accuracy}


def rl(
    lm: LM,
    prompts: Sequence[Prompt | str],
    reward: LM | RewardsBy | Callable[[str, str], float | None],
    run_dir: Path | str,
    config: RLConfig,
    *,
    learner: Callable[..., LM] = learners.rloo,
    seed: int = 0,
) -> LM:
    """Reinforcement learning of ``lm`` on its own responses to ``prompts``, with a KL penalty to ``lm`` itself, in
    ``run_dir``. Prompts that leave no room for ``config.max_new_tokens`` are left out and counted
    (``prompts_counts.json``). Otherwise as ``sft``.

    Args:
      reward: a reward model; or ``reward(prompt, response)``, a function of texts under the rules of ``judge_by``; or
        another judge, as ``RewardsBy``. A response without a reward (None, or too long for the reward model) is not
        trained on.
      learner: ``rl.rloo``, ``ppo.ppo``, ``grpo.grpo``, ``online_dpo.online_dpo``, or a `functools.partial` of one:
        ``partial(ppo, extra=PPOConfig(...))``.

    Raises: PreflightError: if fewer prompts than ``config.prompts_per_step`` are left. RLError: if more than half of
      the responses of a step have no reward. RewardError: if ``reward`` is a model without a scalar head.
    """
    config.check(lm.mesh)
    records = as_prompts(prompts)
    if isinstance(reward, LM):
        lm_config(reward)
        identity, readers = f"{reward.fingerprint} {_told(reward)}".strip(), (lm, reward)
        scored: Reward = RewardOf(reward, lm.tokenizer, config.rows_at_once)
    else:
        identity, readers = reward, (lm,)
        scored = reward if isinstance(reward, RewardsBy) else RewardByTexts(reward)
    fitting = records
    for reader in readers:
        fitting = with_room(reader, fitting, config.max_new_tokens)
    if len(fitting) < config.prompts_per_step:
        raise PreflightError(
            f"{len(fitting)} of {len(records)} prompts leave room for max_new_tokens = {config.max_new_tokens} in "
            f"{min(reader.config.max_positions for reader in readers)} positions, fewer than prompts_per_step = "
            f"{config.prompts_per_step}; give more prompts, or lower one of the two"
        )
    config = settled({"training": config}, run_dir)["training"]
    described = Reinforcement(
        model=lm.fingerprint,
        data=digest(records),
        template=_told(lm),
        reward=identity,
        training=config,
        learner=learner,
        seed=seed,
    )
    with Run.open(run_dir, described) as run:
        it = run.at("iter_1")
        it.value("prompts_counts", dict, {"prompts": len(fitting), "too_long": len(records) - len(fitting)})
        model = learner(lm, lm, fitting, scored, config, it)
        run.update_summary({"status": "complete"})
    return model


@dataclasses.dataclass(frozen=True)
class RewardByTexts:
    """A plain function of texts as the reward of RL: (prompts, responses) -> [N] float64, NaN if it returns None."""

    function: Callable[[str, str], float | None]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        texts = {prompt.id: question_text(prompt.messages) for prompt in prompts}
        return np.asarray([number(self.function, texts[r.prompt_id], r.text) for r in responses], np.float64)


def _told(lm: LM) -> str:
    return "" if lm.tokenizer.chat == ChatConfig() else lm.template_hash


def _example(id: str, prompt: str, response: str) -> SFTExample:
    return SFTExample(id=id, messages=Prompt.of(id, prompt).messages, response=response)


def _groups(lm: LM, pairs: Sequence[PreferencePair]) -> list[tuple[Sequence_, ...]]:
    """The two texts of each pair, as a reward model reads them."""
    preferences = [Preference(pair.id, pair.messages, pair.chosen.text, pair.rejected.text) for pair in pairs]
    return [reward_group(lm.tokenizer, preference) for preference in preferences]


def _pairs(lm: LM, pairs: Sequence[Pair]) -> list[PreferencePair]:
    return [pair if isinstance(pair, PreferencePair) else _pair(lm, str(i), *pair) for i, pair in enumerate(pairs)]


def _pair(lm: LM, place: str, prompt: Prompt | str, chosen: str, rejected: str) -> PreferencePair:
    record = prompt if isinstance(prompt, Prompt) else Prompt.of(place, prompt)
    id = record.id
    sides = [
        written_response(lm.tokenizer, f"{id}#{name}", id, text)
        for name, text in (("chosen", chosen), ("rejected", rejected))
    ]
    return PreferencePair(
        id=id, messages=record.messages, chosen=sides[0], rejected=sides[1], chosen_score=1.0, rejected_score=0.0
    )
