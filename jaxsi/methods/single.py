"""SFT and DPO by themselves, on texts: one training as a run of its own, which resumes like any other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxsi.lm import LM
from jaxsi.model.compute_dtype import settled
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import PreferencePair, Prompt, SFTExample, digest
from jaxsi.runs.run import Run
from jaxsi.text.chat import written_response
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training import train
from jaxsi.training.train import DPOConfig, TrainConfig


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
    config = settled({"training": config}, run_dir)["training"]
    described = Training(model=lm.fingerprint, data=digest(records), template=_told(lm), training=config, seed=seed)
    with Run.open(run_dir, described) as run:
        model = train.sft(lm, records, config, run.at("iter_1"))
        run.update_summary({"status": "complete"})
    return model


def dpo(
    lm: LM,
    pairs: Sequence[PreferencePair | tuple[Prompt | str, str, str]],
    run_dir: Path | str,
    config: DPOConfig = DPOConfig(),
    *,
    reference: LM | None = None,
    seed: int = 0,
) -> LM:
    """Preference training of ``lm`` on pairs, or on (prompt, chosen, rejected) texts, in ``run_dir``; otherwise as
    ``sft``. ``reference`` is ``lm`` by default."""
    config.check_single_round()
    records = [pair if isinstance(pair, PreferencePair) else _pair(lm, str(i), *pair) for i, pair in enumerate(pairs)]
    models = lm.fingerprint if reference is None else f"{lm.fingerprint} reference {reference.fingerprint}"
    config = settled({"training": config}, run_dir)["training"]
    described = Training(model=models, data=digest(records), template=_told(lm), training=config, seed=seed)
    with Run.open(run_dir, described) as run:
        model = train.dpo(lm, records, config, run.at("iter_1"), reference=reference)
        run.update_summary({"status": "complete"})
    return model


def _told(lm: LM) -> str:
    return "" if lm.tokenizer.chat == ChatConfig() else lm.template_hash


def _example(id: str, prompt: str, response: str) -> SFTExample:
    return SFTExample(id=id, messages=Prompt.of(id, prompt).messages, response=response)


def _pair(lm: LM, number: str, prompt: Prompt | str, chosen: str, rejected: str) -> PreferencePair:
    record = prompt if isinstance(prompt, Prompt) else Prompt.of(number, prompt)
    id = record.id
    sides = [
        written_response(lm.tokenizer, f"{id}#{name}", id, text)
        for name, text in (("chosen", chosen), ("rejected", rejected))
    ]
    return PreferencePair(
        id=id, messages=record.messages, chosen=sides[0], rejected=sides[1], chosen_score=1.0, rejected_score=0.0
    )
