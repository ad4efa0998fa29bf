"""A judge on the command line: ``KIND:VALUE[,name=value...]``, and the rubric that it judges by."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from jaxsi.cli.command import UsageError

JUDGES = """A judge is one of
  self                          the model itself
  model:MODEL                   another model in this process
  endpoint:NAME[,base_url=URL]  a model behind an OpenAI-compatible endpoint; further settings, as name=value: cache,
                                api_key_variable, concurrency, max_cost, prompt_price, completion_price,
                                max_total_tokens, sends_temperature, length_parameter, retries, timeout
  reward:MODEL                  a reward model: a run of `jaxsi reward`, or a sequence classifier with one label
  function:FILE.py:NAME         a Python function (prompt, response) -> number or None
  verifier:FILE                 known answers: a file with the columns "prompt" and "answer" (others: prompt=, answer=)
  verifier:FILE,check=ifeval    the instructions in a file of IFEval's prompts (further settings: loose, partial)
and a rubric is a file, or self_rewarding_judge (each response gets a score), pairwise_judge (two at a time, in both
orders) or ranking_judge (all at once). The slots of the file's template say which it is: {prompt} with {response}, with
{response_a} and {response_b}, or with {responses}."""

KINDS = ("self", "model", "endpoint", "reward", "function", "verifier")


def is_judge(text: str) -> bool:
    """Whether a word names a judge by its kind, and not a model by its path."""
    kind, colon, _ = text.partition(":")
    return text == "self" or (kind in KINDS[1:] and bool(colon) and not Path(text).exists())


def judge_of(text: str, cache: Path) -> Any:
    """The judge that a word names: a function of (lm, prompts, responses, rubric, config, key). A word without a kind
    is the path of a model. ``cache`` is the file for the answers of an endpoint, unless the word names another one.

    Raises: UsageError: if it names no judge.
    """
    from jaxsi.runs.config_file import ConfigFileError, load_function
    from jaxsi.stages.endpoint import EndpointJudge
    from jaxsi.stages.judge import judge, judge_by
    from jaxsi.stages.judges import ModelJudge, RewardJudge, Verifier

    if text == "self":
        return judge
    if not is_judge(text):
        return ModelJudge(text)
    kind, _, rest = text.partition(":")
    value, *words = rest.split(",")
    if not value:
        raise UsageError(f"judge {text!r}: nothing stands after {kind}:; see --help for the kinds of judges")
    if kind == "function":
        file, _, name = value.rpartition(":")
        if words or not file:
            raise UsageError(f"judge {text!r}: give function:FILE.py:NAME")
        try:
            return judge_by(load_function(Path(file), name))
        except ConfigFileError as error:
            raise UsageError(f"judge {text!r}: {error}") from error
    if kind == "endpoint":
        return _with_settings(EndpointJudge, {"model": value, "cache": str(cache)}, words, text)
    if kind == "verifier":
        if "check=ifeval" in words:
            from jaxsi.evals.ifeval import InstructionChecks

            return _with_settings(
                InstructionChecks, {"prompts": value}, [w for w in words if w != "check=ifeval"], text
            )
        return _with_settings(Verifier, {"answers": value}, words, text)
    return _with_settings(ModelJudge if kind == "model" else RewardJudge, {"model": value}, words, text)


def critic_of(text: str, cache: Path) -> Any:
    """SRT's critic that a word names: model:MODEL, endpoint:NAME[,name=value...] or function:FILE.py:NAME.

    Raises: UsageError: if it names no critic.
    """
    from jaxsi.stages.critique import LocalCritic, critique_by
    from jaxsi.stages.endpoint import EndpointCritic
    from jaxsi.stages.endpoint_client import OPENAI

    kind, _, rest = text.partition(":")
    value, *words = rest.split(",")
    if kind == "endpoint" and value:
        given = {"model": value, "base_url": OPENAI, "cache": str(cache)}
        return _with_settings(EndpointCritic, given, words, text)
    if kind == "model" and value:
        return _with_settings(LocalCritic, {"model": value}, words, text)
    if kind == "function" and value:
        return critique_by(judge_of(text, cache).function)
    raise UsageError(f"critic {text!r}: give model:MODEL, endpoint:NAME or function:FILE.py:NAME")


def _with_settings(cls: type, given: dict[str, Any], words: list[str], text: str) -> Any:
    """``cls(**given, name=value...)``, each value converted to the type of its field."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if _plain_type(hints[field.name])]
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in names:
            raise UsageError(f"judge {text!r}: {word!r} is not a setting; it may have {', '.join(names) or 'none'}")
        convert = _plain_type(hints[name])
        assert convert is not None
        try:
            given[name] = {"true": True, "false": False}[value.lower()] if convert is bool else convert(value)
        except (KeyError, ValueError):
            raise UsageError(f"judge {text!r}: {name} is {value!r}; give {_KINDS_OF_VALUES[convert]}") from None
    try:
        return cls(**given)
    except ValueError as error:
        raise UsageError(f"judge {text!r}: {error}") from error


_KINDS_OF_VALUES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _plain_type(hint: Any) -> type | None:
    """The type of a field that a word can set."""
    options = [option for option in (typing.get_args(hint) or (hint,)) if option is not type(None)]
    return options[0] if len(options) == 1 and options[0] in (bool, int, float, str) else None


def with_judges(cfg: Any, directory: Path, *, judging: str | None, rubric: str | None, critic: str | None) -> Any:
    """The config of a method with the judge, the rubric and the critic that the command line names, each in the
    method's place for it; answers of endpoints are kept in ``directory``.

    Raises: UsageError: if the method has no such place, or if the config refuses a value.
    """
    from jaxsi.stages.prompts.comparison import read_rubric

    changes: dict[str, Any] = {}
    if judging is not None:
        changes["judging"] = judge_of(judging, directory / "judge_answers.jsonl")
    if rubric is not None:
        changes["rubric"] = read_rubric(rubric)
    try:
        if critic is not None:
            if not hasattr(cfg, "critic"):
                raise UsageError("--critic: this method has no critic")
            cfg = dataclasses.replace(cfg, critic=critic_of(critic, directory / "critic_answers.jsonl"))
        return _in_its_place(cfg, changes) if changes else cfg
    except ValueError as error:
        raise UsageError(str(error)) from error


def _in_its_place(cfg: Any, changes: dict[str, Any]) -> Any:
    """Self-Rewarding and Meta-Rewarding have a judge. A judge may also be SRT's scoring, PIT's rewarding, or what
    SEFT's internal rounds choose by."""
    from jaxsi.stages.judges import GapsBy, Judged, ScoringBy, TargetsBy

    if hasattr(cfg, "judging"):
        return dataclasses.replace(cfg, **changes)
    places = {"scoring": ScoringBy, "rewarding": GapsBy, "internal": TargetsBy}
    place = next((name for name in places if hasattr(cfg, name)), None)
    if place is None:
        raise UsageError("--judging, --rubric: this method has no judge")
    now = cfg.internal.target if place == "internal" else getattr(cfg, place)
    if not isinstance(now, Judged) and "judging" not in changes:
        raise UsageError("--rubric needs a judge here; give --judging as well")
    new = dataclasses.replace(now, **changes) if isinstance(now, Judged) else places[place](**changes)
    value = dataclasses.replace(cfg.internal, target=new) if place == "internal" else new
    return dataclasses.replace(cfg, **{place: value})


def rubric_for(name: str | None, model: str) -> Any:
    """The rubric that the command line names, else that of MODEL's run, else the Self-Rewarding paper's."""
    from jaxsi.cli.stored import run_of, stored_value
    from jaxsi.runs.config_snapshot import same_name
    from jaxsi.stages.prompts import Rubric, load_rubric
    from jaxsi.stages.prompts.comparison import PairwiseRubric, RankingRubric, read_rubric

    if name is not None:
        return read_rubric(name)
    stored = run_of(model)
    if stored is None or not isinstance(stored.get("rubric"), dict):  # not every method has a judge
        return load_rubric()
    kinds = {"prompts.Rubric": Rubric, "prompts.PairwiseRubric": PairwiseRubric, "prompts.RankingRubric": RankingRubric}
    for id, cls in kinds.items():
        if same_name(stored["rubric"]["__type__"], id):
            return stored_value(cls, stored["rubric"])
    raise UsageError(f"{model}: the rubric of its run is of a kind that this version does not know; give --rubric")
