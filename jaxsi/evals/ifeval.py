"""IFEval (Zhou et al. 2023, arXiv 2311.07911): prompts with instructions that a program can check.

The checkers are those of the `lm-eval` package (pip install 'jaxsi[ifeval]'), so that figures are the ones that others
report. Here the package never downloads anything on import, and where it draws random numbers the seed is fixed.
Thoughts are taken out of a response before it is checked.
"""

import contextlib
import dataclasses
import functools
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.held_out import Respond, earlier_models, first_response, lengths_of
from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import file_content, stored_as
from jaxsi.runs.metrics import mean_ci, ratio_ci, share_ci
from jaxsi.runs.records import Judgment, Prompt, RecordError, Response, shown
from jaxsi.runs.run import Scope
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.answers import with_prompts, with_room
from jaxsi.stages.judge import scored
from jaxsi.stages.rows import rows, version_of

SOURCE = "https://github.com/google-research/google-research/tree/master/instruction_following_eval/data"
PROMPTS = 541  # in input_data.jsonl
# Checkers that split English sentences with data of NLTK, which are no part of its package.
NEED_NLTK_DATA = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructed:
    """A prompt and its instructions: `instructions[i]` names a checker, `arguments[i]` are its settings."""

    id: str
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]


class Followed(NamedTuple):
    """Which of a prompt's instructions a response follows. Loose: it, or it without its first or last line or its
    asterisks, does."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def read_instructed(path: Path | str, max_rows: int | None = None) -> list[Instructed]:
    """The prompts of a file such as `input_data.jsonl` of IFEval: rows with "key", "prompt", "instruction_id_list" and
    "kwargs".

    Raises: RecordError: if the file cannot be read, a row is bad, or two rows have the same key.
    """
    found: dict[str, Instructed] = {}
    for line, row in rows(path):
        if max_rows is not None and len(found) >= max_rows:
            break
        try:
            if isinstance(row, ValueError):
                raise row
            record = _instructed(row)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no column {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
            raise RecordError(path, line, f"{reason}; see {SOURCE}") from None
        if found.setdefault(record.id, record) is not record:
            raise RecordError(path, line, f"key {record.id} occurs twice; keys are unique")
    if not found:
        raise RecordError(path, None, f"no prompts in this file; see {SOURCE}")
    return list(found.values())


def _instructed(row: Any) -> Instructed:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is a JSON object, found {shown(row)}")
    names, arguments = row["instruction_id_list"], row["kwargs"]
    if not isinstance(row["prompt"], str):
        raise ValueError(f"prompt is {shown(row['prompt'])}; it is a text")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"instruction_id_list is {shown(names)}; it is a list of names")
    if not isinstance(arguments, list) or [type(value) for value in arguments] != [dict] * len(names):
        raise ValueError(f"kwargs is {shown(arguments)}; it has an object for each of the {len(names)} instructions")
    return Instructed(
        id=str(row["key"]), prompt=row["prompt"], instructions=tuple(names), arguments=tuple(map(dict, arguments))
    )


# ------------------------------------------------------------------------------------------------------------ checks


@functools.cache
def _package() -> Any:
    """The module of `lm-eval` that checks responses.

    Raises: EvaluationError: if the package, or one that it needs, is not installed.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"  # the package downloads data on import, unless it is told that another process does
    try:
        import langdetect
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise EvaluationError(
            f"IFEval's checkers are in packages that are not here ({error}); pip install 'jaxsi[ifeval]'"
        ) from error
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
    langdetect.DetectorFactory.seed = 0
    return utils


def has_nltk_data() -> bool:
    """Whether the data that split sentences are on this machine."""
    _package()
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def checkable(prompts: Sequence[Instructed], *, leave_out: bool = False) -> list[Instructed]:
    """The prompts, before anything is asked about them.

    Args:
      leave_out: leave out those that need NLTK's data, if they are not here, in place of an error.

    Raises: EvaluationError: if a prompt names an instruction that has no checker, or needs NLTK's data.
    """
    from_package = _package().instructions_registry.INSTRUCTION_DICT
    for prompt in prompts:
        if unknown := [name for name in prompt.instructions if name not in from_package]:
            raise EvaluationError(f"prompt {prompt.id}: no checker for the instruction {unknown[0]!r}; see {SOURCE}")
    if has_nltk_data():
        return list(prompts)
    without = [prompt for prompt in prompts if not NEED_NLTK_DATA & set(prompt.instructions)]
    if len(without) < len(prompts) and not leave_out:
        raise EvaluationError(
            f"{len(prompts) - len(without)} of {len(prompts)} prompts need NLTK's data punkt_tab, which split text "
            "into sentences and are not here; run `python -m nltk.downloader punkt_tab` where there is a network, set "
            "NLTK_DATA to a folder with tokenizers/punkt_tab, or leave these prompts out (--without-nltk-data, or in a "
            "config without_nltk_data=True)"
        )
    return without


def check(prompt: Instructed, response: str) -> Followed:
    """Which instructions a response follows. Raises: EvaluationError: if the package or its data are not here."""
    package = _package()
    key = package.InputExample(
        key=0, instruction_id_list=list(prompt.instructions), prompt=prompt.prompt, kwargs=list(prompt.arguments)
    )
    try:
        with _drawing(prompt.prompt):
            strict = package.test_instruction_following_strict(key, response).follow_instruction_list
        with _drawing(prompt.prompt):
            loose = package.test_instruction_following_loose(key, response).follow_instruction_list
    except LookupError as error:
        checkable([prompt])
        raise EvaluationError(f"prompt {prompt.id}: {error}") from error
    except TypeError as error:
        raise EvaluationError(f"prompt {prompt.id}: kwargs do not fit {prompt.instructions}: {error}") from error
    return Followed(tuple(map(bool, strict)), tuple(map(bool, loose)))


@contextlib.contextmanager
def _drawing(seed: str) -> Iterator[None]:
    """The package draws arguments that it does not accept at random: of the 541 prompts, two that count the letters "#"
    and "!". So these are the same in every check of a prompt."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def figures(prompts: Sequence[Instructed], followed: Sequence[Followed]) -> dict[str, Any]:
    """IFEval's four accuracies and more, as JSON values.

    "prompt_strict", "prompt_loose": share of prompts of which all instructions are followed; "instruction_strict",
    "instruction_loose": share of all instructions; each with its 95 % bootstrap interval as "..._ci95". "kinds": the
    last two of each kind of instruction, such as "length_constraints:number_words", and how many there are ("count").
    None over nothing. The interval of a share of instructions is over prompts, too.
    """
    found: dict[str, Any] = {"prompts": len(prompts), "instructions": sum(len(p.instructions) for p in prompts)}
    for name in ("strict", "loose"):
        lists = [getattr(result, name) for result in followed]
        whole = [all(values) for values in lists]
        found[f"prompt_{name}"] = sum(whole) / len(whole) if whole else None
        found[f"prompt_{name}_ci95"] = list(mean_ci(whole)[1:]) if whole else None
        share = ratio_ci([sum(values) for values in lists], [len(values) for values in lists]) if lists else None
        found[f"instruction_{name}"] = None if share is None else share[0]
        found[f"instruction_{name}_ci95"] = None if share is None else list(share[1:])
    kinds: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for prompt, result in zip(prompts, followed, strict=True):
        for kind, strict, loose in zip(prompt.instructions, *result, strict=True):
            kinds[kind].append((strict, loose))
    found["kinds"] = {
        kind: {
            "count": len(both),
            **{name: sum(b[i] for b in both) / len(both) for i, name in enumerate(Followed._fields)},
        }
        for kind, both in sorted(kinds.items())
    }
    return found


# ------------------------------------------------------------------------------------------------- a judge or a reward


@stored_as("ifeval.InstructionChecks")
@dataclasses.dataclass(frozen=True)
class InstructionChecks:
    """The checks as a judge, and so as a reward: a response's score is 1 if it follows all instructions of its prompt,
    else 0; with ``partial`` it is the share of the instructions that it follows. ``loose``: as IFEval's loose accuracy.

    ``prompts`` is a file as `read_instructed` takes it; a prompt is found by its text. A run keeps a hash of the file:
    with another content it does not go on.
    """

    prompts: str = dataclasses.field(metadata=file_content())
    loose: bool = False
    partial: bool = False

    def __call__(
        self, lm: LM | None, prompts: Sequence[Prompt], responses: Sequence[Response], *_: object
    ) -> list[Judgment]:
        known = _by_text(self.prompts, version_of(self.prompts))
        scores: list[float | None] = []
        for prompt, response in with_prompts(prompts, responses):
            instructed = known.get(prompt.text.strip())
            if instructed is None:
                raise EvaluationError(
                    f"{self.prompts} has no instructions for the prompt {prompt.text!r:.80}; give the file it is from"
                )
            result = check(instructed, response.text)
            values = result.loose if self.loose else result.strict
            scores.append(sum(values) / len(values) if self.partial else float(all(values)))
        return scored(responses, scores, lm)


@functools.lru_cache(maxsize=2)
def _by_text(path: str, version: object) -> dict[str, Instructed]:
    return {record.prompt.strip(): record for record in read_instructed(path)}


# ----------------------------------------------------------------------------------------------- in a run's iterations


@stored_as("ifeval.IFEval")
@dataclasses.dataclass(frozen=True)
class IFEval:
    """What a config gives as ``evaluate``, alone or in `held_out.Evaluations`: how often M_t follows the instructions
    of ``data``, a file as `read_instructed` takes it, of which a run keeps a hash.

    ``most``: the first prompts of the file alone. ``sampling``: None is that of the run, but greedy, as IFEval is
    measured. ``respond`` is how the method's model answers. ``without_nltk_data`` leaves out the prompts that need
    NLTK's data where these are not installed; else such a run is refused before it begins.
    """

    data: str = dataclasses.field(metadata=file_content())
    most: int | None = None
    _: dataclasses.KW_ONLY
    sampling: SamplingConfig | None = None
    respond: Respond = first_response
    without_nltk_data: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", os.fspath(self.data))
        if self.most is not None and self.most < 1:
            raise ValueError(f"most is {self.most}; at least one prompt is measured")

    def check_installed(self) -> None:
        """Raises: EvaluationError, RecordError: if the checkers, their data or ``data`` are not here."""
        checkable(read_instructed(self.data, self.most), leave_out=self.without_nltk_data)

    def __call__(self, lm: LM, config: Any, scope: Scope, *context: Any) -> dict[str, Any]:
        """One iteration's figures. The scope keeps the responses, in parts of one batch, and what each follows.

        Returns: {"evals": {"ifeval": {"prompt_strict": {"mean", "ci95"}, "prompt_loose", "instruction_strict",
          "instruction_loose", "over_first": {"iteration", "prompts", "prompt_strict": {"mean", "ci95"},
          "instruction_strict"}, "over_previous", "prompts", "left_out"}}, "mean_length" (tokens), "cut_off" (share)}.
          "over_...": how much larger the share is than that of the first model or of the one before, on the same
          prompts; the first model has none.

        Raises: EvaluationError, RecordError: as `check_installed`, or if no prompt is left.
        """
        sampling = self.sampling or dataclasses.replace(config.sampling, temperature=0.0, top_p=1.0)
        sampling = dataclasses.replace(sampling, num_samples=1)
        given = read_instructed(self.data, self.most)
        prompts = scope.records("eval_ifeval_prompts", self._prompts, given, lm, sampling, of=Prompt)
        responses = scope.sharded(
            "eval_ifeval_responses", prompts, self.respond, lm, config, sampling, *context, of=Response,
            shard_size=sampling.batch_size,
        )  # fmt: skip
        by_id = {_id(prompt): prompt for prompt in given}
        judgments = scope.records("eval_ifeval_judgments", _checked, by_id, prompts, responses, of=Judgment)
        now = _followed(judgments)
        measured = figures([by_id[id] for id in now], list(now.values()))
        found: dict[str, Any] = {
            name: {"mean": measured[name], "ci95": measured[f"{name}_ci95"]}
            for level in ("prompt", "instruction")
            for name in (f"{level}_strict", f"{level}_loose")
        }
        if earlier := earlier_models(scope):
            for name, folder in (("over_first", earlier[0]), ("over_previous", earlier[-1])):
                before = scope.run.at(folder).finished("eval_ifeval_judgments", of=Judgment)
                found[name] = {"iteration": folder.removeprefix("iter_"), **_gain(now, _followed(before))}
        found |= {"prompts": len(now), "left_out": len(given) - len(now)}
        return {"evals": {"ifeval": found}, **lengths_of(responses)}

    def _prompts(self, given: Sequence[Instructed], lm: LM, sampling: SamplingConfig) -> list[Prompt]:
        known = checkable(given, leave_out=self.without_nltk_data)
        prompts = with_room(lm, [Prompt.of(_id(p), p.prompt) for p in known], sampling.max_new_tokens)
        if not prompts:
            raise EvaluationError(
                f"{self.data}: of {len(given)} prompts {len(given) - len(known)} need NLTK's data, and the others "
                f"leave no room for max_new_tokens = {sampling.max_new_tokens} in the model's context; lower it"
            )
        return prompts


def _id(instructed: Instructed) -> str:
    """The id of the prompt in a run, where keys alone could be those of other prompts."""
    return f"ifeval-{instructed.id}"


def _checked(
    by_id: Mapping[str, Instructed], prompts: Sequence[Prompt], responses: Sequence[Response]
) -> list[Judgment]:
    """What each response follows: a score of 1 or 0 for each instruction, strict and then loose; the score of the
    response is 1 if it strictly follows all."""
    judgments = []
    for prompt, response in with_prompts(prompts, responses):
        instructed = by_id[prompt.id]
        result = check(instructed, response.text)
        texts = [f"{kind}, {rule}" for rule in Followed._fields for kind in instructed.instructions]
        flags = (*result.strict, *result.loose)
        judgment = Judgment(
            id=response.id, prompt_id=prompt.id, scores=tuple(map(float, flags)), score=float(all(result.strict)),
            texts=tuple(texts), fingerprint="", template="",
        )  # fmt: skip
        judgments.append(judgment)
    return judgments


def _followed(judgments: Sequence[Judgment]) -> dict[str, Followed]:
    """By the prompt's id."""
    found = {}
    for judgment in judgments:
        flags, half = tuple(score == 1 for score in judgment.scores), len(judgment.scores) // 2
        found[judgment.prompt_id] = Followed(flags[:half], flags[half:])
    return found


def _gain(now: Mapping[str, Followed], before: Mapping[str, Followed]) -> dict[str, Any]:
    """How much more is followed now than before, on the prompts of both; without figures if there are none. If nothing
    differs, resampling says nothing of how much could: the share of instructions has no interval then."""
    both = [(now[id].strict, before[id].strict) for id in now if id in before]
    if not both:
        return {"prompts": 0}
    better = [(float(all(a)) - float(all(b)) + 1) / 2 for a, b in both]  # 1/2: as before
    mean, low, high = share_ci(better)
    gains = [sum(a) - sum(b) for a, b in both]
    single = ratio_ci(gains, [len(a) for a, _ in both])
    return {
        "prompts": len(both),
        "prompt_strict": {"mean": 2 * mean - 1, "ci95": [2 * low - 1, 2 * high - 1]},
        "instruction_strict": {"mean": single[0], "ci95": list(single[1:]) if any(gains) else [None, None]},
    }
