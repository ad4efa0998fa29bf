"""SPIN: self-play fine-tuning (Chen et al. 2024, arXiv 2401.01335): the model learns to tell people's responses from
its own, and so to write like people.

    for t = 1 .. T:
        y'_i ~ M_{t-1}(. | x_i)                                              for every demonstration (x_i, y_i)
        M_t  = argmin  sum_i  l(lambda [ log M(y_i|x_i)  / M_{t-1}(y_i|x_i)
                                       - log M(y'_i|x_i) / M_{t-1}(y'_i|x_i) ])
                                                                             l(z) = log(1 + exp(-z))

That is DPO with people's responses as the chosen and the previous model's as the rejected ones, lambda being DPO's
beta. M_0 is a model after SFT on the same demonstrations; their quality is the ceiling. Left out: the paper's mixing of
the synthetic data of the iteration before into later ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, carried_over, compared, is_better_by, iteration_of, keep, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.records import PreferencePair, Prompt, Response, SFTExample
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.verdicts import JudgeConfig
from jaxsi.text.chat import written_response
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training.train import DPOConfig, dpo


@stored_as("methods.spin.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. ``demonstrations`` gives people's responses; ``evaluate(lm, config, scope)`` the
    figures of an iteration's summary. SPIN needs no judge: ``judge`` has the settings of ``early_stop``'s alone."""

    model: str = dataclasses.field(metadata=may_move())
    demonstrations: Callable[[], list[SFTExample]]
    sampling: SamplingConfig = SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0)
    dpo: DPOConfig
    early_stop: EarlyStop | None = None
    judge: JudgeConfig = JudgeConfig()
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.sampling.num_samples != 1:
            raise ValueError(
                f"iterations is {self.iterations} (at least 1) and sampling.num_samples {self.sampling.num_samples} "
                "(1: each demonstration has one opponent)"
            )


def spin(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T, or the best iteration's model after an early stop."""
    it = run.at("iter_0")
    model, best = keep(begin(cfg, run), it), 0  # M_0
    report(cfg, run, it, 0, model)
    demonstrations = it.records("demonstrations", cfg.demonstrations, of=SFTExample)  # (x, y)
    prompts = [Prompt(id=example.id, messages=example.messages) for example in demonstrations]

    for t in range(1, cfg.iterations + 1):
        it = run.at(f"iter_{t}")
        responses = it.sharded(
            "responses", prompts, sample, model, cfg.sampling, it.key("responses"), of=Response, by=model
        )  # y'
        pairs = it.records("pairs", against_demonstrations, model, demonstrations, responses, of=PreferencePair)
        before, better = model, is_better_by(cfg, model, it)
        further = carried_over(cfg.dpo, model, run, t, first=0)
        model = dpo(model, pairs, cfg.dpo, it, **further, better=better)  # M_t
        best, lost, win_rate = compared(cfg, run, t, model, before, best)
        ties = len(demonstrations) - len(pairs)
        report(cfg, run, it, t, model, pairs=len(pairs), ties=ties, win_rate=win_rate)
        if lost:
            break

    return iteration_of(model, run, best) if cfg.early_stop else model


def against_demonstrations(
    model: LM, demonstrations: Sequence[SFTExample], responses: Sequence[Response]
) -> list[PreferencePair]:
    """(x, y, y') of each demonstration, chosen before sampled; left out if both are the same, or y' was cut off.

    Raises: ValueError: if no pair is left.
    """
    sampled = {response.prompt_id: response for response in responses}
    pairs = []
    for example in demonstrations:
        chosen = written_response(model.tokenizer, f"{example.id}#demonstration", example.id, example.response)
        rejected = sampled[example.id]
        if rejected.finish_reason == "stop" and rejected.token_ids != chosen.token_ids:
            pairs.append(
                PreferencePair(
                    id=example.id,
                    messages=example.messages,
                    chosen=chosen,
                    rejected=rejected,
                    chosen_score=1.0,
                    rejected_score=0.0,
                )
            )
    if not pairs:
        cut_off = sum(response.finish_reason == "length" for response in responses)
        raise ValueError(
            f"no pair is left of {len(responses)} responses: the token limit cut off {cut_off}, the others equal their "
            "demonstrations; if the limit is too low, raise sampling.max_new_tokens, in a new run"
        )
    return pairs
