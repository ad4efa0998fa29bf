"""What every method does around its iterations: it begins with the model it is given, keeps models, and reports."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxsi.lm import LM, load, save_checkpoint
from jaxsi.model import mesh as meshlib
from jaxsi.runs import checkpoint, progress
from jaxsi.runs.config_snapshot import parts_of
from jaxsi.runs.records import Prompt
from jaxsi.runs.run import Run, RunError, Scope, StaleRecordsError
from jaxsi.runs.status import sentence, so_far
from jaxsi.stages.early_stop import EarlyStop, WinRate, is_better, win_rate
from jaxsi.text.chat_config import ChatConfig
from jaxsi.text.chat_template import today
from jaxsi.training import resume
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import DPOConfig, TrainConfig


def begin(cfg: Any, run: Run) -> LM:
    """Loads M_0 = ``cfg.model`` on ``cfg.mesh``, with float32 weights, to sample in ``cfg.sampling.dtype``.

    Raises: MeshError if a batch of a training in ``cfg`` does not divide among the devices. StaleRecordsError if the
      model is not the one with which the run began; its path may be another one.
    """
    base = load(cfg.model, meshlib.make_mesh(cfg.mesh), cfg.sampling.dtype, weights_dtype="float32")
    if (chat := _chat_of(cfg, base, run)) != base.tokenizer.chat:
        base = base.with_chat(chat)
    for name, part in parts_of(cfg):
        if isinstance(part, TrainConfig | RLConfig):
            part.check(base.mesh, name)
    same_model(run.at("iter_0"), "model", cfg.model, base)
    return base


def same_model(scope: Scope, name: str, path: str, lm: LM) -> None:
    """Keeps what ``lm``, loaded from ``path``, is in <name>.json and <name>_config.json, and compares it on resume. The
    path may change: a copy is the same model.

    Raises: StaleRecordsError if the weights, the config, the tokenizer or the chat template are not those of the run.
    """
    config = json.loads(json.dumps(dataclasses.asdict(lm.config)))  # as it is read again: lists, not tuples
    weights = {"path": path, "fingerprint": lm.fingerprint}
    rest = {"template": lm.template_hash, "tokenizer": lm.tokenizer.fingerprint, **config}
    first = scope.value(name, dict, weights) | scope.value(f"{name}_config", dict, rest)
    shown = {"fingerprint": "weights", "template": "chat template"}
    for part, value in (weights | rest).items():
        if part != "path" and first.get(part, value) != value:  # a newer version may know more of a config
            raise StaleRecordsError(
                f"{path} now has the {shown.get(part, part)} {value}, this run began with {first[part]}; give it back "
                "the model it began with, or start a new run directory"
            )


def _chat_of(cfg: Any, base: LM, run: Run) -> ChatConfig:
    """What the chat template is told in this run: the date of a template that writes it stays the one on which the run
    began."""
    chat = getattr(cfg, "chat", ChatConfig())
    if base.tokenizer.reads_date and chat.date is None:
        chat = dataclasses.replace(chat, date=run.at("iter_0").value("date", today))
    return chat


def keep(model: LM, it: Scope) -> LM:
    """Saves a model that was not trained in ``it`` as the checkpoint of ``it``; returns the model."""
    if not checkpoint.is_complete(it.path / "checkpoint" / "weights"):
        save_checkpoint(model, it.path / "checkpoint", {"step": 0})
    return model


def iteration_of(like: LM, run: Run, t: int) -> LM:
    """M_t of a run that has it, laid out as ``like``. Raises: RunError if its checkpoint is gone."""
    found = resume.finished(like, run.at(f"iter_{t}"))
    if found is None:
        raise RunError(f"{run.path / f'iter_{t}' / 'checkpoint'} is gone or damaged; put it back, or begin a new run")
    return found


def early_stop_of(cfg: Any, run: Run) -> EarlyStop | None:
    """``cfg.early_stop``, its prompts those with which the run began: it keeps them, and asks for them once."""
    stop: EarlyStop | None = cfg.early_stop
    if stop is None:
        return None
    prompts = run.at("iter_0").records("early_stop_prompts", stop.prompts, of=Prompt)
    return dataclasses.replace(stop, prompts=lambda: prompts)


def is_better_by(cfg: Any, judge: LM, it: Scope) -> Callable[[LM, LM], bool] | None:
    """What ``train.dpo`` takes as ``better`` by ``cfg.early_stop``; None if checkpoints are not compared."""
    stop = early_stop_of(cfg, it.run)
    if stop is None or not stop.checkpoints:
        return None
    return functools.partial(is_better, stop, judge, cfg.sampling, cfg.judge, it.key("early_stop"))


class Standing(NamedTuple):
    """Where an iteration stands: ``best`` is the best iteration so far, ``lost`` says that the run ends, ``win_rate``
    is that over the best one before (None: not compared; without figures: nothing could be judged)."""

    best: int
    lost: bool
    win_rate: dict[str, Any] | None


def compared(cfg: Any, run: Run, t: int, model: LM, judge: LM, best: int) -> Standing:
    """Compares M_t = ``model`` with iteration ``best`` by ``cfg.early_stop``, and names the best one in summary.json.
    M_t becomes the best unless it loses more often than it wins, also if nothing could be judged; the run ends by the
    rule alone."""
    stop = early_stop_of(cfg, run)
    if stop is None or not stop.iterations:
        return Standing(t, False, None)
    it = run.at(f"iter_{t}")

    def measured() -> dict[str, Any]:
        before = iteration_of(model, run, best)
        rate = win_rate(stop, judge, model, before, cfg.sampling, cfg.judge, it.key("early_stop", "iterations"))
        return {"over": best} | ({} if rate is None else rate._asdict())

    told = it.value("win_rate", measured)
    standing = Standing(t, False, told)
    if "mean" in told:
        rate = WinRate(*(told[name] for name in WinRate._fields))
        standing = Standing(t if rate.mean >= 0.5 else best, stop.rule(rate), told)
    run.update_summary({"best": standing.best, "stopped_early": standing.lost})
    return standing


def carried_over(cfg: DPOConfig, model: LM, run: Run, t: int, first: int) -> dict[str, Any]:
    """Arguments of ``train.dpo`` for M_t, beside M_{t-1} = ``model``: the reference M_first if ``cfg.reference`` is
    "first", and the optimizer state of iteration t - 1 if ``cfg.optimizer`` is "carry" and DPO trained M_{t-1}."""
    return {
        "reference": resume.finished(model, run.at(f"iter_{first}")) if cfg.reference == "first" else None,
        "state": run.at(f"iter_{t - 1}") if cfg.optimizer == "carry" and t - 1 > first else None,
    }


def report(
    cfg: Any,
    run: Run,
    it: Scope,
    t: int | Literal["base"],
    model: LM,
    *context: Any,
    figures: Sequence[str] = (),
    **counts: Any,
) -> Mapping[str, Any]:
    """Evaluates M_t and writes its line of summary.json. The line of the given model, ``t`` = "base", has a key of its
    own, outside the list of iterations.

    Args:
      context: further arguments of the evaluation: ``cfg.evaluate(model, cfg, it, *context)``.
      figures: names of figures of the evaluation to copy into the line, beside those that every method reports.
      counts: further entries of the line. The evaluation's own figure of the same name comes first.

    Returns: all figures of the evaluation; none without ``cfg.evaluate``.
    """
    measured = it.value("evaluation", cfg.evaluate, model, cfg, it, *context) if cfg.evaluate is not None else {}
    line = {
        "iteration": t,
        "quality": measured.get("quality"),
        "greedy": measured.get("greedy"),
        "judge_agreement": measured.get("judge_agreement"),
        "judge_agreement_without_ties": measured.get("judge_agreement_without_ties"),
        "judge_tie_share": measured.get("judge_tie_share"),
        "parse_rate": measured.get("parse_rate"),
        "pairs": None,
        "ties": None,
        "alarms": None,
        "mean_length": measured.get("mean_length"),
        "evals": measured.get("evals"),
        "fingerprint": model.fingerprint,
        "seconds": it.seconds(),
        **{name: measured[name] for name in figures if name in measured},
    }
    line |= {name: value for name, value in counts.items() if line.get(name) is None}
    if t == "base":
        run.update_summary({"base": line})
    else:
        before = [entry for entry in run.summary.get("iterations", []) if entry["iteration"] < t]
        run.update_summary({"iterations": [*before, line]})
    progress.measured(sentence(line), so_far(run.summary))
    return measured
