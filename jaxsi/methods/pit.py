"""PIT: models that improve responses without being told how (Wang et al. 2024, arXiv 2310.00898).

    D = (x, y_l, y_w)  in three equal parts: D_SFT, D_RM, D_RL
    A  M_P^SFT    maximise  log M_P(y_w | x)                                        on D_SFT
       M_PIT^SFT  maximise  log M_PIT(y_w | x, y_l)                                 on D_SFT
    B  r_P        minimise  -log s(r_P(x, y_w) - r_P(x, y_l))                       on D_RM
       r_gap      minimise  the sum of -log s(g(a) - g(b)) over five inequalities   on D_RM
                  g(w,l) > g(w,w), g(l,l), g(l,w);  g(w,w), g(l,l) > g(l,w)         g(a,b) = r_gap(x, y_a, y_b)
    C  M_P^RL     maximise  r_P(x, y) - kl KL(M_P || M_P^SFT)                       x of D_RL
       round 0    maximise  r_gap(x, y, y_ref) - kl KL(M_PIT || M_PIT^SFT)          y_ref in {y_l, y_w} of D_RL
       round 1    the same from round 0's model,                                    y_ref ~ M_P^RL(. | x)

Second-hand: the paper's full text was not available, only its abstract, reviews and notes. From them: the five terms,
the two rounds and their references, the KL to the SFT model, the split in three, and the data sets: HH-RLHF
(`datasets.hh_rlhf`), OpenAI's summaries (`summaries.openai_summaries`) and a synthetic one (`synthetic.StrongOverWeak`;
its recipe is not known). Ours: the layout of (x, y_ref), the reward models' start from the SFT models, the learner, the
zero point (the reward is r_gap(x, y, y_ref) - r_gap(x, y_ref, y_ref): the loss leaves a constant per x open), a ``mix``
other than 0, and all hyper-parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.records import Prompt, RankedResponses, Response, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.stages.answers import with_room
from jaxsi.stages.gap import GapReward, gap_group, gaps, reward_group
from jaxsi.stages.pairs import Preference, preferences
from jaxsi.stages.prompts import ask_to_improve, load_template
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training import rl
from jaxsi.training.reward import BRADLEY_TERRY, GAP, RewardOf, train_reward
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig, seed_of, sft


@stored_as("methods.pit.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. ``preferences`` gives human preferences; ``request`` asks for an improvement.

    ``rounds``: steps of round 0 and of round 1; 0 leaves a round out. Their other settings are those of ``rl``.
    ``mix``: share of round 0's references in round 1; in the paper all are the policy's. ``learner``: ``rl.rloo`` or
    ``ppo.ppo``. ``rewarding(gap_lm, items, request)`` gives the gaps and their zero points (``gap.gaps``, or a control
    arm's). ``sampling`` is that of the references.
    """

    model: str = dataclasses.field(metadata=may_move())
    preferences: Callable[[], list[RankedResponses]]
    request: str = load_template("improve")
    sft: TrainConfig
    reward: TrainConfig
    policy_rl: RLConfig
    rl: RLConfig
    rounds: tuple[int, int]
    mix: float = 0.0
    learner: Callable[..., LM] = rl.rloo
    rewarding: Callable[..., tuple[np.ndarray, np.ndarray]] = gaps
    sampling: SamplingConfig = SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0)
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds) < 0 or max(self.rounds) < 1:
            raise ValueError(f"rounds is {self.rounds}; give the steps of round 0 and round 1, at least 0, not both 0")
        if not 0 <= self.mix < 1 or self.sampling.num_samples != 1:
            raise ValueError(
                f"mix is {self.mix} (in [0, 1)), sampling.num_samples {self.sampling.num_samples} (1: a prompt has one "
                "reference)"
            )


def pit(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns the improver after the last round."""
    start = run.at("iter_0")
    pairs, counts = preferences(start.records("preferences", cfg.preferences, of=RankedResponses))  # D
    start.value("preferences_counts", dict, counts)
    d_sft, d_rm, d_rl = split_in_three(pairs, seed_of(start, "split"))
    policy, improver, gap_reward = supervised_and_gap_reward(cfg, run, d_sft, d_rm)  # A, r_gap
    longest = max(cfg.policy_rl.max_new_tokens, cfg.sampling.max_new_tokens)
    prompts = with_room(policy, [Prompt(id=pair.id, messages=pair.messages) for pair in d_rl], longest)
    start.value("too_long", int, len(d_rl) - len(prompts))
    policy = policy_after_rl(cfg, run, policy, d_rm, prompts)  # r_P, M_P^RL
    summarise(cfg, run, 0, improver, policy, gap_reward)

    model, t = improver, 0
    sides = {pair.id: pair for pair in d_rl}
    labelled = [(x, sides[x.id].rejected) for x in prompts] + [(x, sides[x.id].chosen) for x in prompts]
    for round, steps in enumerate(cfg.rounds):  # C
        if steps == 0:
            continue
        t += 1
        it = run.at(f"iter_{t}")
        references = labelled if round == 0 else [*from_policy(cfg, policy, prompts, it), *mixed_in(cfg, labelled, it)]
        reward = GapReward(gap_reward, references, cfg.request, cfg.rewarding, cfg.rl)
        config = dataclasses.replace(cfg.rl, steps=steps)
        model = cfg.learner(model, improver, reward.prompts, reward, config, it, monitor=reward.monitor)
        counts = {"references": len(reward.prompts), "left_out": reward.left_out}
        summarise(cfg, run, t, model, policy, gap_reward, round=round, **counts)

    return model


def supervised_and_gap_reward(
    cfg: Config, run: Run, sft_pairs: Sequence[Preference], reward_pairs: Sequence[Preference]
) -> tuple[LM, LM, LM]:
    """A, and B's r_gap. They are a function of their own because M_0 takes memory for as long as it runs, and no
    longer."""
    base = begin(cfg, run)
    policy = sft(base, demonstrations(sft_pairs), cfg.sft, run.at("policy"))  # M_P^SFT
    improver = sft(base, improvements(sft_pairs, cfg.request), cfg.sft, run.at("iter_0"))  # M_PIT^SFT
    groups = [gap_group(base.tokenizer, pair, cfg.request) for pair in reward_pairs]
    gap_reward = train_reward(improver, groups, GAP, cfg.reward, run.at("gap_reward"))  # r_gap
    summarise(cfg, run, "base", base, None, gap_reward)
    return policy, improver, gap_reward


def policy_after_rl(
    cfg: Config, run: Run, policy: LM, reward_pairs: Sequence[Preference], prompts: Sequence[Prompt]
) -> LM:
    """B's r_P, which nothing else reads, and C's M_P^RL."""
    groups = [reward_group(policy.tokenizer, pair) for pair in reward_pairs]
    reward = train_reward(policy, groups, BRADLEY_TERRY, cfg.reward, run.at("policy_reward"))  # r_P
    scored = RewardOf(reward, policy.tokenizer, cfg.policy_rl.rows_at_once)
    return cfg.learner(policy, policy, prompts, scored, cfg.policy_rl, run.at("policy_rl"))  # M_P^RL


def split_in_three(pairs: Sequence[Preference], seed: int) -> list[list[Preference]]:
    """D_SFT, D_RM, D_RL: equal parts at random, what is left over going to the last."""
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} preferences are left; PIT splits them in three parts, so give it at least 3")
    order = np.random.default_rng(seed).permutation(len(pairs))
    n = len(pairs) // 3
    return [[pairs[i] for i in part] for part in (order[:n], order[n : 2 * n], order[2 * n :])]


def demonstrations(pairs: Sequence[Preference]) -> list[SFTExample]:
    """x -> y_w."""
    return [SFTExample(id=pair.id, messages=pair.messages, response=pair.chosen) for pair in pairs]


def improvements(pairs: Sequence[Preference], request: str) -> list[SFTExample]:
    """(x, y_l) -> y_w."""
    return [
        SFTExample(id=p.id, messages=ask_to_improve(p.messages, p.rejected, request), response=p.chosen) for p in pairs
    ]


def from_policy(cfg: Config, policy: LM, prompts: Sequence[Prompt], it: Scope) -> list[tuple[Prompt, str]]:
    """References y_ref ~ M_P^RL(. | x), empty if the token limit cut one off: it has no end to be compared with."""
    sampled = it.sharded(
        "references", prompts, sample, policy, cfg.sampling, it.key("references"), of=Response, by=policy
    )
    by_prompt = {r.prompt_id: r.text if r.finish_reason == "stop" else "" for r in sampled}
    return [(prompt, by_prompt[prompt.id]) for prompt in prompts]


def mixed_in(cfg: Config, labelled: Sequence[tuple[Prompt, str]], it: Scope) -> list[tuple[Prompt, str]]:
    """Some of round 0's references, drawn at random: the share ``mix`` of all references of round 1."""
    count = round(len(labelled) / 2 * cfg.mix / (1 - cfg.mix))
    chosen = np.random.default_rng(seed_of(it, "mix")).permutation(len(labelled))[:count]
    return [labelled[i] for i in chosen]


def summarise(
    cfg: Config, run: Run, t: int | Literal["base"], model: LM, policy: LM | None, gap_reward: LM, **counts: Any
) -> None:
    """Reports the improver of iteration t on the policy's responses (the base model on its own)."""
    it = run.at("base" if t == "base" else f"iter_{t}")
    figures = ("draft", "copied", "edit_distance", "inequalities")
    report(cfg, run, it, t, model, policy, gap_reward, figures=figures, **counts)
