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

Read in secondary sources: the paper's text was not to be had whole. From them: the five terms, the two rounds and
their references, the KL to the SFT model, the split in three. Ours: the layout of (x, y_ref), the reward models' start
from the SFT models, the learner, the zero point (the reward is r_gap(x, y, y_ref) - r_gap(x, y_ref, y_ref): the loss
leaves a constant per x open), ``mix``, and all hyper-parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs import metrics
from jaxsi.runs.records import Message, Prompt, RankedResponses, Response, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, check_sampled_by, generate
from jaxsi.stages.gap import gap_group, gaps, reward_group
from jaxsi.stages.pairs import Preference, preferences
from jaxsi.stages.prompts import ask_to_improve, load_template
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.training import rl
from jaxsi.training.reward import BRADLEY_TERRY, GAP, reward_sequence, rewards, train_reward
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig, seed_of, sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. ``preferences`` gives human preferences; ``request`` asks for an improvement.

    ``rounds``: steps of round 0 and round 1 (0 leaves one out), all else of both being ``rl``'s. ``mix``: share of
    round 0's references in round 1. ``learner``: ``rl.rloo`` or ``rl.ppo``. ``rewarding(gap_lm, items, request)`` gives
    the gaps and their zero points (``gap.gaps``, or a control arm's). ``sampling`` is that of the references.
    """

    model: str
    preferences: Callable[[], list[RankedResponses]]
    request: str = load_template("improve")
    sft: TrainConfig
    reward: TrainConfig
    policy_rl: RLConfig
    rl: RLConfig
    rounds: tuple[int, int]
    mix: float = 0.2
    learner: Callable[..., LM] = rl.rloo
    rewarding: Callable[..., tuple[np.ndarray, np.ndarray]] = gaps
    sampling: SamplingConfig = SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0)
    evaluate: Callable[..., dict[str, Any]] | None = None
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    RESUMABLE: ClassVar[frozenset[str]] = frozenset(
        {"sft.log_every", "reward.log_every", "rl.log_every", "policy_rl.log_every"}
    )
    ARM_FIELDS: ClassVar[frozenset[str]] = frozenset({"rounds", "mix", "rewarding"})
    SHARED: ClassVar[tuple[str, ...]] = ("base", "policy", "iter_0", "gap_reward", "policy_reward", "policy_rl")

    def __post_init__(self) -> None:
        if min(self.rounds) < 0 or max(self.rounds) < 1:
            raise ValueError(f"rounds is {self.rounds}: steps of at least one of the two rounds, none below 0")
        if not 0 <= self.mix < 1 or self.sampling.num_samples != 1:
            raise ValueError(
                f"mix is {self.mix} (in [0, 1)), sampling.num_samples {self.sampling.num_samples} (1: a prompt has one "
                "reference)"
            )


def pit(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns the improver after the last round."""
    base = begin(run, cfg.model, cfg.mesh, cfg.sampling.dtype, cfg.sft, cfg.reward)
    cfg.rl.check(base.mesh)
    cfg.policy_rl.check(base.mesh)
    start = run.at("iter_0")
    data = start.records("preferences", cfg.preferences, of=RankedResponses)
    pairs, counts = preferences(data)
    start.value("preferences_counts", lambda: counts)
    of_sft, of_rm, of_rl = split_in_three(pairs, seed_of(start, "split"))

    prompts = with_room(base, [Prompt(id=pair.id, messages=pair.messages) for pair in of_rl], cfg)
    start.value("too_long", lambda: len(of_rl) - len(prompts))

    policy = sft(base, demonstrations(of_sft), cfg.sft, run.at("policy"))  # M_P^SFT
    reward_groups = [reward_group(base.tokenizer, pair) for pair in of_rm]
    policy_reward = train_reward(policy, reward_groups, BRADLEY_TERRY, cfg.reward, run.at("policy_reward"))  # r_P
    policy_rl = cfg.learner(
        policy, policy, prompts, policy_rewards(policy_reward, cfg), cfg.policy_rl, run.at("policy_rl")
    )  # M_P^RL
    del policy, policy_reward  # of no more use, and as large as the others

    improver = sft(base, improvements(of_sft, cfg.request), cfg.sft, start)  # M_PIT^SFT
    gap_groups = [gap_group(base.tokenizer, pair, cfg.request) for pair in of_rm]
    gap_reward = train_reward(improver, gap_groups, GAP, cfg.reward, run.at("gap_reward"))  # r_gap
    summarise(cfg, run, "base", run.at("base"), base, None, gap_reward)
    del base
    summarise(cfg, run, 0, start, improver, policy_rl, gap_reward)

    model, t = improver, 0
    sides = {pair.id: pair for pair in of_rl}
    given = [(x, sides[x.id].rejected) for x in prompts] + [(x, sides[x.id].chosen) for x in prompts]
    for round, steps in enumerate(cfg.rounds):
        if steps == 0:
            continue
        t += 1
        it = run.at(f"iter_{t}")
        references = given if round == 0 else [*from_policy(cfg, policy_rl, prompts, it), *mixed_in(cfg, given, it)]
        target = GapReward(cfg, gap_reward, references)
        config = dataclasses.replace(cfg.rl, steps=steps)
        model = cfg.learner(model, improver, target.prompts, target, config, it, monitor=target.monitor)
        counts = {"references": len(target.prompts), "left_out": target.left_out}
        summarise(cfg, run, t, it, model, policy_rl, gap_reward, round=round, **counts)

    run.update_summary({"status": "complete"})
    return model


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


def policy_rewards(lm: LM, cfg: Config) -> rl.Reward:
    """r_P of each response."""

    def reward(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        messages = {prompt.id: prompt.messages for prompt in prompts}
        sequences = [reward_sequence(lm.tokenizer, messages[r.prompt_id], r) for r in responses]
        return rewards(lm, sequences, batch_size=cfg.policy_rl.rows_at_once)

    return reward


def with_room(lm: LM, prompts: Sequence[Prompt], cfg: Config) -> list[Prompt]:
    """The prompts after which the policy's context has room for a response."""
    room = lm.config.max_positions - max(cfg.policy_rl.max_new_tokens, cfg.sampling.max_new_tokens)
    return [prompt for prompt in prompts if len(render_prompt(lm.tokenizer, prompt.messages)) <= room]


def from_policy(cfg: Config, policy: LM, prompts: Sequence[Prompt], it: Scope) -> list[tuple[Prompt, str]]:
    """References y_ref ~ M_P^RL(. | x), empty where the token limit cut one off: it has no end to be compared with."""
    sample = lambda part: generate(policy, part, key=it.key("references"), **cfg.sampling.settings)  # noqa: E731
    sampled = it.sharded("references", prompts, sample, of=Response)
    check_sampled_by(policy, sampled)
    policy.release()
    by_prompt = {r.prompt_id: r.text if r.finish_reason == "stop" else "" for r in sampled}
    return [(prompt, by_prompt[prompt.id]) for prompt in prompts]


def mixed_in(cfg: Config, given: Sequence[tuple[Prompt, str]], it: Scope) -> list[tuple[Prompt, str]]:
    """As many of round 0's references as are the share ``mix`` of all references of round 1."""
    count = round(len(given) / 2 * cfg.mix / (1 - cfg.mix))
    chosen = np.random.default_rng(seed_of(it, "mix")).permutation(len(given))[:count]
    return [given[i] for i in chosen]


class GapReward:
    """r_gap(x, y, y_ref) - r_gap(x, y_ref, y_ref) of responses to the improver's ``prompts``, one for each reference.
    Left out, and counted in ``left_out``: empty references, and those after which the context has no room for a
    response, or for the reference itself as one."""

    def __init__(self, cfg: Config, lm: LM, references: Sequence[tuple[Prompt, str]]):
        self.cfg, self.lm, self.zero = cfg, lm, 0.0
        self.of: dict[str, tuple[tuple[Message, ...], str]] = {}
        self.prompts: list[Prompt] = []
        for number, (prompt, reference) in enumerate(references):
            id = f"{prompt.id}~{number}"
            asked = Prompt(id=id, messages=ask_to_improve(prompt.messages, reference, cfg.request))
            if reference.strip() and self.fits(asked, reference):
                self.of[id] = prompt.messages, reference
                self.prompts.append(asked)
        self.left_out = len(references) - len(self.prompts)

    def fits(self, asked: Prompt, reference: str) -> bool:
        head = len(render_prompt(self.lm.tokenizer, asked.messages))
        longest = max(self.cfg.rl.max_new_tokens, len(render_response(self.lm.tokenizer, reference)))
        return head + longest <= self.lm.config.max_positions

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        items = [(self.of[r.prompt_id][0], r, self.of[r.prompt_id][1]) for r in responses]
        gap_N, zero_N = self.cfg.rewarding(self.lm, items, self.cfg.request, batch_size=self.cfg.rl.rows_at_once)
        self.zero = float(np.mean(zero_N))
        return gap_N - zero_N

    def monitor(self, prompts: Sequence[Prompt], responses: Sequence[Response], gains: np.ndarray) -> dict[str, float]:
        """How far the responses are from their references: what shows a learner that copies, pads or flatters."""
        references = [self.of[response.prompt_id][1] for response in responses]
        return {
            "gained": float(np.mean(gains > 0)),
            "gap_of_references": self.zero,
            **change_from(references, responses),
        }


def change_from(references: Sequence[str], responses: Sequence[Response]) -> dict[str, float]:
    """Share of exact copies, edit distance in words and length gap in characters, of responses against references."""
    both = [
        (reference.strip(), response.text.strip()) for reference, response in zip(references, responses, strict=True)
    ]
    return {
        "copied": float(np.mean([a == b for a, b in both])),
        "edit_distance": float(np.mean([metrics.edit_distance(a.split(), b.split()) for a, b in both])),
        "length_gap": float(np.mean([len(b) - len(a) for a, b in both])),
    }


def summarise(
    cfg: Config,
    run: Run,
    t: int | Literal["base"],
    it: Scope,
    model: LM,
    policy: LM | None,
    gap_reward: LM,
    **counts: Any,
) -> None:
    """Evaluates the improver of iteration t on the policy's responses (the base model on its own), writes its line."""
    figures = it.value("evaluation", cfg.evaluate, model, cfg, it, policy, gap_reward) if cfg.evaluate else {}
    semantics = {"init_from": "iteration t-1", "reference": "iteration 0", "data": "current", "optimizer": "reset"}
    extra = {name: figures[name] for name in ("draft", "copied", "edit_distance", "inequalities") if name in figures}
    report(run, it, t, model, figures, method="pit", semantics=semantics, **extra, **counts)
