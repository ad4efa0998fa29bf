"""``jaxsi improve``: improves a model's responses at inference time, round by round, in a folder that resumes."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from jaxsi.cli.arguments import ChatOptions, Dtype, Model, Out, PromptOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.judges import JUDGES
from jaxsi.cli.output_file import digest
from jaxsi.cli.stored import Mesh, mesh_for, run_of, stored_value
from jaxsi.cli.tables import rounds_table
from jaxsi.runs.config_snapshot import may_change, same_name, stored_as

if TYPE_CHECKING:
    from jaxsi.lm import LM
    from jaxsi.runs.records import Prompt
    from jaxsi.sampling.generate import SamplingConfig
    from jaxsi.stages.improve.rounds import Method, Scorer

Value = TypeVar("Value")

FILES = """OUT becomes a folder: round_0/responses.jsonl, round_1/responses.jsonl, ... with one line per prompt
(response, outcome, score, quality, feedback), and summary.json. If the command is killed, run it again: it goes on from
there. --rounds may be raised. Prompts and responses that do not fit in the context are counted as "too long"."""

SRT = f"""A model that SRT trained continues its own response with feedback and a refined response. As in the paper, the
first refined response is the answer, whatever its score. With --rounds 2 or more, a later one replaces it if the model
scores it higher in a separate call. --gate asks this of the first one, too.

{FILES}

Examples:
  jaxsi improve srt runs/srt --prompts prompts.jsonl -o improved --rounds 2
  jaxsi improve srt runs/srt --prompts toy.jsonl -o improved --grade toy --max-new-tokens 24"""

SEFT = f"""SEFT's adaptive reviser labels each response of MODEL. A response with the label "no revise" stays byte for
byte; any other is revised.

{FILES}

Examples:
  jaxsi improve seft runs/seft --reviser runs/seft/reviser/checkpoint --prompts prompts.jsonl -o improved --rounds 2"""

PIT = f"""PIT's improver improves each response of MODEL. With --gap-rm a new response is accepted only if the gap
reward model sees a gain of more than --delta over the previous response; without --gap-rm it is always accepted.

{FILES}

Examples:
  jaxsi improve pit MODEL --improver runs/pit --gap-rm runs/pit/gap_reward/checkpoint --prompts prompts.jsonl -o OUT
  jaxsi improve pit MODEL --improver runs/pit --prompts prompts.jsonl -o improved --temperature 0.4"""

REFINE = f"""Self-Refine: MODEL is asked for feedback on its response, then for a response that follows the feedback,
until the feedback says that nothing needs to be improved.

{FILES}

Examples:
  jaxsi improve self-refine MODEL --prompts prompts.jsonl -o improved --rounds 3
  jaxsi improve self-refine MODEL --critic LARGER --prompts prompts.jsonl -o improved --judge LARGER"""

BEST = f"""Takes the best of --num-samples responses by the judge's mean score (MODEL itself, unless --critic names
another judge) or by a reward model; each further round adds as many samples.

{FILES}

{JUDGES}

Examples:
  jaxsi improve best-of-n MODEL --prompts prompts.jsonl -o best --num-samples 8
  jaxsi improve best-of-n MODEL --critic endpoint:gpt-4o-mini --rubric ranking_judge --prompts prompts.jsonl -o best
  jaxsi improve best-of-n MODEL --reward-rm runs/pit/policy_reward/checkpoint --prompts prompts.jsonl -o best"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common(PromptOptions, ChatOptions):
    model: Model
    out: Out
    """A folder for the responses of every round. If this command began it before, it goes on there."""
    rounds: int = 1
    """Rounds of improvement after the first response."""
    temperature: float = 0.7
    """Temperature of the drafts and of the responses that replace them; 0 is greedy."""
    top_p: float = 0.9
    top_k: int = 0
    """0 is off."""
    max_new_tokens: int = 256
    seed: int = 0
    dtype: Dtype = "auto"
    """Of the computation. auto: bfloat16 if this device computes in it at speed, else float32. A command that goes on
    keeps the dtype with which it began."""
    batch_size: int = 64
    """Rows generated at the same time."""
    grade: Literal["toy"] | None = None
    """Measure quality by the exact grader of the embedded world, 0 to 100."""
    judge: str | None = None
    """Measure quality by the mean score of this model or other judge. It does not decide which responses are
    accepted."""
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging:
    rubric: str | None = None
    """The rubric of every judge: the name of a shipped rubric, or a file. Default: the rubric of the judge's run if it
    has one, else self_rewarding_judge."""
    judgments: int = 3
    """Judgments of each response; the score is the mean of the valid ones."""
    judge_tokens: int = 256
    """Most new tokens of a judgment."""
    expected: bool = False
    """Score by the expectation over all possible scores instead of the number that the judge wrote."""


Shared = Annotated[Common, tyro.conf.arg(name="")]
Judges = Annotated[Judging, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Srt:
    common: Shared
    judging: Judges = Judging()
    template: Path | None = None
    """JSON file with the fields of a CritiqueTemplate. Default: the template of MODEL's SRT run, else the paper's."""
    feedback_tokens: int | None = None
    """Most new tokens of feedback and refined response together. Default: as in MODEL's SRT run, else 1024."""
    gate: bool = False
    """Keep the first response unless the model scores its refinement higher."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seft:
    common: Shared
    judging: Judges = Judging()
    reviser: str
    """The adaptive reviser: RUN/reviser/checkpoint of a SEFT run, or any model that was trained as a reviser."""
    template: Path | None = None
    """JSON file with the fields of a ReviserTemplate. Default: the template of the reviser's run, else the shipped
    one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pit:
    common: Shared
    judging: Judges = Judging()
    improver: str
    """PIT's improver: a PIT run, or any model that was trained as an improver."""
    gap_rm: str | None = None
    """The gap reward model: RUN/gap_reward/checkpoint of a PIT run. Without it every new response is accepted."""
    delta: float = 0.0
    """A response is accepted if its gain is larger than this."""
    request: Path | None = None
    """Text file with the request to improve. Default: the request of the improver's run, else the shipped one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refine:
    common: Shared
    judging: Judges = Judging()
    critic: str | None = None
    """The model that writes the feedback. Default: MODEL."""
    template: Path | None = None
    """JSON file with "feedback", "refine" and "enough". Default: the shipped requests."""
    feedback_tokens: int | None = None
    """Most new tokens of feedback. Default: --max-new-tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    common: Shared
    judging: Judges = Judging()
    num_samples: int = 4
    """Samples added by each round, at least 2; round r takes the best of r times as many."""
    critic: str | None = None
    """The model or other judge that scores the samples. Default: MODEL."""
    reward_rm: str | None = None
    """Rank by this reward model r(x, y) instead of a judge: RUN/policy_reward/checkpoint of a PIT run, or a Hugging
    Face sequence classifier with one label."""


def srt(argv: list[str]) -> Report:
    """Refines by the model's own feedback."""
    args = parse(Srt, argv, "jaxsi improve srt", SRT)
    from jaxsi.stages.critique import CritiqueConfig
    from jaxsi.stages.improve.srt import srt
    from jaxsi.stages.prompts.critique import CritiqueTemplate, load_critique_template

    work = Work(args.common, args.judging)
    run = _run_of(args.common.model, "methods.srt.Config")
    template = _template(CritiqueTemplate, args.template, run and run["template"], load_critique_template)
    cfg = CritiqueConfig(max_new_tokens=1024) if run is None else stored_value(CritiqueConfig, run["critique"])
    tokens = cfg.max_new_tokens if args.feedback_tokens is None else args.feedback_tokens
    cfg = dataclasses.replace(cfg, max_new_tokens=tokens, batch_size=args.common.batch_size)
    lm = work.writer("model", args.common.model, max(tokens, args.common.max_new_tokens))
    method = srt(lm, work.sampling(), template, cfg, gate=args.gate)
    return work.carry_out("srt", method, template=template, critique=cfg, gate=args.gate)


def seft(argv: list[str]) -> Report:
    """Keeps or revises by a reviser."""
    args = parse(Seft, argv, "jaxsi improve seft", SEFT)
    from jaxsi.stages.improve.seft import seft
    from jaxsi.stages.prompts.reviser import ReviserTemplate, load_reviser_template
    from jaxsi.stages.reviser import ReviseConfig

    work, tokens = Work(args.common, args.judging), args.common.max_new_tokens
    sampling = work.sampling()
    run = _run_of(args.reviser, "methods.seft.Config")
    stored = None if run is None else run["reviser"]["template"]
    template = _template(ReviserTemplate, args.template, stored, load_reviser_template)
    cfg = ReviseConfig(
        temperature=sampling.temperature, top_p=sampling.top_p, max_new_tokens=tokens, batch_size=sampling.batch_size
    )
    lm, reviser = work.writer("model", args.common.model, tokens), work.writer("reviser", args.reviser, tokens)
    return work.carry_out("seft", seft(lm, sampling, reviser, template, cfg), template=template)


def pit(argv: list[str]) -> Report:
    """Improves by an improver."""
    args = parse(Pit, argv, "jaxsi improve pit", PIT)
    from jaxsi.stages.improve.pit import pit
    from jaxsi.stages.prompts import load_template

    work, tokens = Work(args.common, args.judging), args.common.max_new_tokens
    run = _run_of(args.improver, "methods.pit.Config")
    request = load_template("improve") if run is None else run["request"]
    if args.request is not None:
        request = _text(args.request, "--request").removesuffix("\n")
    lm, improver = work.writer("model", args.common.model, tokens), work.writer("improver", args.improver, tokens)
    gap_lm = None if args.gap_rm is None else work.loaded("gap_rm", args.gap_rm)
    method = pit(lm, work.sampling(), improver, request, gap_lm=gap_lm, delta=args.delta)
    return work.carry_out("pit", method, request=request, delta=args.delta)


def refine(argv: list[str]) -> Report:
    """Refines by asking the model for feedback."""
    args = parse(Refine, argv, "jaxsi improve self-refine", REFINE)
    from jaxsi.stages.improve.self_refine import self_refine
    from jaxsi.stages.prompts.self_refine import SelfRefineTemplate, load_self_refine_template

    work = Work(args.common, args.judging)
    sampling, path = work.sampling(), args.common.model
    tokens = sampling.max_new_tokens if args.feedback_tokens is None else args.feedback_tokens
    cfg = dataclasses.replace(sampling, max_new_tokens=tokens)
    template = _template(SelfRefineTemplate, args.template, None, load_self_refine_template)
    lm = work.writer("model", path, sampling.max_new_tokens)
    critic = work.writer("critic", path if args.critic is None else args.critic, tokens)
    method = self_refine(lm, sampling, template, critic, cfg)
    return work.carry_out("self-refine", method, template=template, feedback=cfg)


def best(argv: list[str]) -> Report:
    """Takes the best of several samples."""
    args = parse(Best, argv, "jaxsi improve best-of-n", BEST)
    from jaxsi.stages.improve.best_of_n import best_of_n
    from jaxsi.stages.prompts import Rubric

    if args.critic is not None and args.reward_rm is not None:
        raise UsageError("--critic and --reward-rm both rank the samples; give one of the two")
    if args.num_samples < 2:
        raise UsageError(f"--num-samples {args.num_samples}: give at least 2, to take the best of")
    work, path = Work(args.common, args.judging), args.common.model
    sampling = work.sampling(args.num_samples)
    lm = work.writer("model", path, sampling.max_new_tokens)
    critic = args.critic or (f"reward:{args.reward_rm}" if args.reward_rm is not None else path)
    scorer, rubric = work.judge("critic", critic)
    return work.carry_out("best-of-n", best_of_n(lm, sampling, scorer, compares=not isinstance(rubric, Rubric)))


# --------------------------------------------------------------------------------------- the parts that all five share


@stored_as("commands.improve.Settings")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the responses in a folder depend on. It is the folder's config, so only the same command may go
    on there. ``prompts`` is a digest; ``models`` are fingerprints; ``iterations`` is the number of rounds."""

    method: str
    prompts: str
    models: dict[str, str]
    settings: dict[str, Any] = dataclasses.field(
        metadata=may_change(*(f"{part}.batch_size" for part in ("sampling", "critique", "feedback", "judging")))
    )
    iterations: int
    seed: int


class Work:
    """One command's prompts and models, each loaded once."""

    def __init__(self, args: Common, judging: Judging):
        if args.rounds < 0:
            raise UsageError(f"--rounds {args.rounds}: give at least 0")
        if args.grade is not None and args.judge is not None:
            raise UsageError("--grade and --judge both measure quality; give one of the two")
        if args.out.is_file():
            raise UsageError(f"--out {args.out} is a file; give the name of a folder")
        from jaxsi.model.compute_dtype import settled

        self.args, self.judging = args, judging
        self.prompts = args.read()
        if args.grade == "toy":
            _check_world(args.prompts, self.prompts)
        kept = settled({"settings": {"sampling": {"dtype": args.dtype}}}, args.out)  # as in the config of the folder
        self.dtype = kept["settings"]["sampling"]["dtype"]
        self.settings: dict[str, Any] = {}
        self._models: dict[str, LM] = {}
        self._roles: dict[str, LM] = {}

    def sampling(self, num_samples: int = 1) -> "SamplingConfig":
        """How responses are sampled."""
        from jaxsi.sampling.generate import SamplingConfig

        args = self.args
        try:
            config = SamplingConfig(
                num_samples=num_samples,
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                dtype=self.dtype,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.settings["sampling"] = config
        return config

    def loaded(self, role: str, path: str) -> "LM":
        """The model of a role. A model with several roles is loaded once."""
        from jaxsi.lm import load
        from jaxsi.methods.preflight import check_lengths

        if path not in self._models:
            chat = self.args.model_chat if path == self.args.model else None
            self._models[path] = load(path, mesh_for(self.args.model, self.args.mesh), self.dtype, chat=chat)
            if path == self.args.model:  # too long prompts are counted later
                check_lengths(
                    self.args.prompts, self.prompts, self._models[path].tokenizer, None, "", self.args.reading
                )
        self._roles[role] = self._models[path]
        return self._models[path]

    def writer(self, role: str, path: str, max_new_tokens: int) -> "LM":
        """`loaded`, for a model that writes text. Raises: UsageError: if it is a reward model, or if ``max_new_tokens``
        leaves no room for a prompt."""
        lm = self.loaded(role, path)
        if lm.config.scalar_head:
            raise UsageError(f"{path} is a reward model, which writes no text; give a language model as the {role}")
        if max_new_tokens >= lm.config.max_positions:
            raise UsageError(
                f"{path} has {lm.config.max_positions} positions; with {max_new_tokens} new tokens that leaves no room "
                "for a prompt; lower --max-new-tokens, --feedback-tokens or --judge-tokens"
            )
        return lm

    def judge(self, role: str, judge: str) -> tuple["Scorer", Any]:
        """A judge that scores by the command's rubric; and the rubric."""
        from jaxsi.cli.judges import judge_of, rubric_for
        from jaxsi.stages.improve.best_of_n import scored_by
        from jaxsi.stages.judge import judge as by_itself
        from jaxsi.stages.judges import ModelJudge, RewardJudge, rewarded
        from jaxsi.stages.verdicts import JudgeConfig
        from jaxsi.training.reward import lm_config

        judging = self.judging
        try:
            cfg = JudgeConfig(
                num_samples=judging.judgments,
                max_new_tokens=judging.judge_tokens,
                expected=judging.expected,
                batch_size=self.args.batch_size,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        found = judge_of(self.args.model if judge == "self" else judge, cache=self.args.out / "judge_answers.jsonl")
        rubric = rubric_for(judging.rubric, found.model if isinstance(found, ModelJudge) else "")
        self.settings[f"{role}_rubric"], self.settings["judging"] = rubric, cfg
        if isinstance(found, ModelJudge):
            return scored_by(by_itself, self.writer(role, found.model, judging.judge_tokens), rubric, cfg), rubric
        if isinstance(found, RewardJudge):
            reward_lm = self.loaded(role, found.model)
            lm_config(reward_lm)
            found = functools.partial(rewarded, reward_lm)
        else:
            self.settings[role] = found
        return scored_by(found, self.loaded("model", self.args.model), rubric, cfg), rubric

    def carry_out(self, name: str, method: "Method", **settings: Any) -> Report:
        """Runs all rounds, and reports the figures of each."""
        from jaxsi.runs.records import Improvement
        from jaxsi.runs.run import Run
        from jaxsi.stages.improve.rounds import improve, round_statistics
        from jaxsi.stages.prompts import Rubric

        grade = None
        if self.args.judge is not None:
            grade, rubric = self.judge("judge", self.args.judge)
            if not isinstance(rubric, Rubric):
                raise UsageError(
                    f"--judge measures each response, and rubric {rubric.name!r} compares; give another one"
                )
        if self.args.grade == "toy":
            grade, self.settings["grade"] = _exact, "toy"
        config = Settings(
            method=name,
            prompts=digest(self.prompts, "prompts"),
            models={role: lm.fingerprint for role, lm in self._roles.items()},
            settings=self.settings | settings,
            iterations=self.args.rounds,
            seed=self.args.seed,
        )
        with Run.open(self.args.out, config) as run:

            def keep(number: int, items: Sequence[Any], stage: Callable[[Sequence[Any]], Any]) -> list[Improvement]:
                return run.at(f"round_{number}").sharded("responses", items, stage, of=Improvement)

            rounds = improve(self.prompts, method, rounds=self.args.rounds, seed=self.args.seed, grade=grade, keep=keep)
            lines = [
                {"iteration": r, **round_statistics(records), "seconds": run.at(f"round_{r}").seconds()}
                for r, records in enumerate(rounds)
            ]
            run.update_summary({"status": "complete", "method": name, "base": lines[0], "iterations": lines[1:]})
        value = {"out": str(self.args.out), "method": name, "prompts": len(self.prompts), "rounds": lines}
        return Report(value, rounds_table(lines))


def _exact(prompts: Sequence["Prompt"], responses: Sequence[Any], key: Any) -> list[Any]:
    """The exact grade, 0 to 100, of responses to instructions of the embedded world."""
    from jaxsi.stages.improve.rounds import Scored
    from jaxsi.toyworld.evaluate import exact

    texts = {prompt.id: prompt.text for prompt in prompts}
    return [Scored(10 * exact(texts[response.prompt_id], response.text), 0) for response in responses]


def _check_world(path: Path, prompts: Sequence["Prompt"]) -> None:
    from jaxsi.toyworld import world

    for prompt in prompts:
        if world.parse(prompt.text) is None:
            raise UsageError(
                f"--grade toy: prompt {prompt.id!r} of {path} is not an instruction of the embedded world, "
                f"{prompt.text!r:.80}; leave --grade out, or give its prompts"
            )


def _run_of(model: str, config: str) -> dict[str, Any] | None:
    """The config of the run that contains a model, or another checkpoint such as RUN/reviser/checkpoint; None if it is
    not of the type with the stored id ``config``."""
    found = run_of(model)
    return found if found is not None and same_name(found["__type__"], config) else None


def _template(
    cls: type[Value], file: Path | None, stored: dict[str, Any] | None, default: Callable[[], Value]
) -> Value:
    """The template in a file, else the stored one of a run, else the default."""
    value = stored if file is None else _object(file)
    if value is None:
        return default()
    fields = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    try:
        return cls(**{name: item for name, item in fields.items() if name != "__type__"})
    except (TypeError, ValueError) as error:
        raise UsageError(f"--template {file}: {error}; give the fields of {cls.__name__}") from error


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(file, "--template"))
    except ValueError as error:
        raise UsageError(f"--template {file} is broken JSON: {error}; give a JSON object") from error
    if not isinstance(value, dict):
        raise UsageError(f"--template {file} holds {value!r:.80}; give a JSON object of the template's fields")
    return value


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path} cannot be read: {error}") from error
