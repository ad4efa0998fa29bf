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
from typing import Any, ClassVar

from jaxsi.lm import LM, save_checkpoint
from jaxsi.methods.lifecycle import begin, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.checkpoint import is_complete
from jaxsi.runs.records import PreferencePair, Prompt, Response, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, check_sampled_by, generate
from jaxsi.text.chat import written_response
from jaxsi.training.train import DPOConfig, dpo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. ``demonstrations`` gives people's responses; ``evaluate(lm, config, scope)`` the
    figures of an iteration's summary."""

    model: str
    demonstrations: Callable[[], list[SFTExample]]
    sampling: SamplingConfig = SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0)
    dpo: DPOConfig
    evaluate: Callable[..., dict[str, Any]] | None = None
    mesh: MeshConfig = MeshConfig()
    iterations: int = 2
    seed: int = 0

    RESUMABLE: ClassVar[frozenset[str]] = frozenset({"dpo.train.log_every"})
    ARM_FIELDS: ClassVar[frozenset[str]] = frozenset()
    SHARED: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.sampling.num_samples != 1:
            raise ValueError(
                f"iterations is {self.iterations} (at least 1) and sampling.num_samples {self.sampling.num_samples} "
                "(1: each demonstration has one opponent)"
            )


def spin(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T."""
    it = run.at("iter_0")
    model = begin(run, cfg.model, cfg.mesh, cfg.sampling.dtype, cfg.dpo.train)  # M_0
    if not is_complete(it.path / "checkpoint" / "weights"):
        save_checkpoint(model, it.path / "checkpoint", {"step": 0})
    summarise(cfg, run, it, model, 0)
    demonstrations = it.records("demonstrations", cfg.demonstrations, of=SFTExample)
    prompts = [Prompt(id=example.id, messages=example.messages) for example in demonstrations]

    for t in range(1, cfg.iterations + 1):
        it = run.at(f"iter_{t}")
        responses = it.sharded("responses", prompts, sampler(cfg, model, it), of=Response)  # y'
        check_sampled_by(model, responses)
        pairs = it.records("pairs", against_demonstrations, model, demonstrations, responses, of=PreferencePair)
        model = dpo(model, pairs, cfg.dpo, it)  # M_t
        summarise(cfg, run, it, model, t, pairs=len(pairs), ties=len(demonstrations) - len(pairs))

    run.update_summary({"status": "complete"})
    return model


def sampler(cfg: Config, model: LM, it: Scope) -> Callable[[Sequence[Prompt]], list[Response]]:
    """The stage that samples the opponent of each demonstration."""
    return lambda prompts: generate(model, prompts, key=it.key("responses"), **cfg.sampling.settings)


def against_demonstrations(
    model: LM, demonstrations: Sequence[SFTExample], responses: Sequence[Response]
) -> list[PreferencePair]:
    """(x, y, y') of each demonstration, chosen before sampled; none where both are the same, or y' was cut off."""
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
    return pairs


def summarise(cfg: Config, run: Run, it: Scope, model: LM, t: int, **counts: Any) -> None:
    """Evaluates M_t and writes its line of summary.json."""
    figures = it.value("evaluation", cfg.evaluate, model, cfg, it) if cfg.evaluate is not None else {}
    semantics = {"init_from": "M_{t-1}", "reference": "M_{t-1}", "data": "current", "optimizer": "reset"}
    report(run, it, t, model, figures, method="spin", semantics=semantics, **counts)
