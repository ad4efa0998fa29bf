"""New prompts by self-instruct: a few-shot request, and the filters that keep the pool of prompts varied.

Self-Rewarding (arXiv 2401.10020) uses the recipe of Self-Instruct (arXiv 2212.10560) with 8 examples: 6 seeds and 2
generated ones. The filters are those of Self-Instruct's code, with its ROUGE-L threshold of 0.7; the list of
blacklisted words is longer here.
"""

import dataclasses
import itertools
import json
import logging
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Prompt, RecordError, Response, as_prompts
from jaxsi.sampling import generate
from jaxsi.stages.prompts.few_shot import FewShot, load_few_shot
from jaxsi.stages.rouge import rouge_l, word_count
from jaxsi.stages.user_data import columns_of, read_prompts
from jaxsi.text.chat import render_prompt

_log = logging.getLogger(__name__)

# Words of tasks that need input which a text model does not have.
BLACKLIST = (
    *("image", "images", "picture", "pictures", "photo", "photos", "graph", "graphs", "plot", "draw", "diagram"),
    *("flowchart", "map", "maps", "file", "files", "video", "videos", "audio", "music", "go to"),
)


class InstructError(RuntimeError):
    """Self-instruct found no new prompt at all; the message counts the reasons."""


@stored_as("instruct.SelfInstruct")
@dataclass(frozen=True, kw_only=True)
class SelfInstruct:
    """How to write `num_prompts` new prompts. Lengths are in words; `blacklist` holds whole words or phrases, any case.

    A prompt is kept if its ROUGE-L F-measure with every seed, every generated prompt and every held-out prompt is below
    `rouge_threshold` (1.0 keeps all but identical word sequences). At most `max_rounds` * `num_prompts` requests are
    made. `generator` is the MODEL that writes them; None is the run's own M_0. `format` is the text of a request, and
    how its reply is read.

    Three filters look at how a prompt begins: it may not begin with one of `banned_starts` (in any case), with
    punctuation (unless `punctuation_first`), or with a character that is not ASCII (unless `non_ascii_first`, which
    prompts in other languages need).
    """

    num_prompts: int
    generator: str | None = None
    num_seed_shots: int = 6
    num_generated_shots: int = 2
    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 128
    batch_size: int = 64
    rouge_threshold: float = 0.7
    min_words: int = 4
    max_words: int = 150
    blacklist: tuple[str, ...] = BLACKLIST
    max_rounds: int = 10
    format: FewShot = load_few_shot()
    banned_starts: tuple[str, ...] = ("Write a program",)
    punctuation_first: bool = False
    non_ascii_first: bool = False

    def __post_init__(self) -> None:
        least = {"num_prompts": 1, "num_seed_shots": 1, "num_generated_shots": 0, "max_new_tokens": 1, "max_rounds": 1}
        for name, limit in (least | {"min_words": 1}).items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {limit}")
        generate.check_sampling(self.temperature, self.max_new_tokens, self.batch_size, self.top_p)
        if self.max_words < self.min_words:
            raise ValueError(f"max_words is {self.max_words}, below min_words = {self.min_words}")
        if not 0.0 < self.rouge_threshold <= 1.0:
            raise ValueError(f"rouge_threshold is {self.rouge_threshold}; it must lie in (0, 1]")


@stored_as("instruct.PromptFile")
@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Prompts from a file, an equal part of it for each iteration (with `repeat`, all of it). `path` and the other
    fields are arguments of `user_data.read_prompts`; `columns` holds texts such as "prompt=ask". On resume the file may
    lie elsewhere and have more prompts: see `check_used`."""

    path: str = dataclasses.field(metadata=may_move())
    max_prompts: int | None = None
    repeat: bool = False
    columns: tuple[str, ...] = ()
    split: str = "train"
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        columns_of(self.columns)

    def read(self) -> list[Prompt]:
        return read_prompts(
            self.path,
            self.max_prompts,
            columns=columns_of(self.columns),
            split=self.split,
            skip_bad_rows=self.skip_bad_rows,
        )


@stored_as("self_instruct.PromptList")
@dataclass(frozen=True)
class PromptList:
    """Prompts as texts, an equal part of them for each iteration. The id of a text is its index."""

    texts: tuple[str, ...]

    def __call__(self) -> list[Prompt]:
        return as_prompts(self.texts)


def prompt_source(source: Any) -> Any:
    """A path becomes a `PromptFile`, a list of texts a `PromptList`; anything else is returned unchanged."""
    if isinstance(source, str | os.PathLike):
        return PromptFile(path=os.fspath(source))
    if isinstance(source, list | tuple):
        if wrong := [text for text in source if not isinstance(text, str) or not text.strip()]:
            raise ValueError(f"prompts holds {wrong[0]!r:.80}; give a list of texts, the path of a file, or a function")
        return PromptList(tuple(source))
    return source


def read_source(source: PromptFile | Callable[[], list[Prompt]]) -> list[Prompt]:
    """The prompts of a user's file, or those that a function returns.

    Raises: RecordError if a file cannot be read. ValueError if there are no prompts, or if two have the same id.
    """
    if isinstance(source, PromptFile):
        return source.read()
    prompts = source()
    repeated = [id for id, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if not prompts or repeated:
        fault = f"{len(repeated)} ids more than once, the first is {repeated[0]!r}" if repeated else "no prompts"
        raise ValueError(f"{source} returned {fault}; it must return prompts with unique ids")
    return prompts


def next_part(
    source: PromptFile | Callable[[], list[Prompt]],
    earlier: Sequence[Prompt],
    parts: int,
    exclude: frozenset[str] = frozenset(),
) -> list[Prompt]:
    """The first of `parts` equal parts of the prompts that are neither among the `earlier` ones nor texts of `exclude`.

    Raises: like `read_source` and `check_used`; ValueError if no prompts are left.
    """
    known = {_normal(text) for text in exclude}
    everything = read_source(source)
    check_used(source, everything, earlier)
    everything = [p for p in everything if _normal(p.text) not in known]
    if isinstance(source, PromptFile) and source.repeat and everything:
        return everything
    unused = without_used(everything, earlier)
    if not unused:
        raise ValueError(
            f"{source.path if isinstance(source, PromptFile) else source}: earlier iterations have used all of its "
            f"{len(everything)} prompts (held-out ones do not count); add prompts, or set prompts.repeat of a file"
        )
    return unused[: -(-len(unused) // parts)]


def check_used(
    source: PromptFile | Callable[[], list[Prompt]], prompts: Sequence[Prompt], used: Sequence[Prompt]
) -> None:
    """Whether the ``prompts`` of a file, which may have moved, or of a function, which may read one, are those from
    which a run took the ``used`` ones, or more. Ids do not count, as in `without_used`.

    Raises: RecordError naming the first used prompt that is gone or was edited.
    """
    there = {json.dumps(prompt.messages) for prompt in prompts}
    gone = [prompt for prompt in used if json.dumps(prompt.messages) not in there]
    is_file = isinstance(source, PromptFile)
    if gone and is_file and source.max_prompts is not None:  # added lines may have moved them beyond the limit
        there |= {json.dumps(prompt.messages) for prompt in dataclasses.replace(source, max_prompts=None).read()}
        gone = [prompt for prompt in gone if json.dumps(prompt.messages) not in there]
    if gone:
        place, what = (source.path, "in this file") if is_file else (str(source), "among its prompts")
        raise RecordError(
            place,
            None,
            f"this run has used {len(used)} prompts, {len(gone)} of which are not {what} now; the first is "
            f"{gone[0].id!r}, {gone[0].text!r:.80}. Put back what was removed or edited (added prompts are fine), or "
            "start a new run directory",
        )


def without_used(prompts: Sequence[Prompt], used: Iterable[Prompt]) -> list[Prompt]:
    """The prompts without as many of each content as are ``used``. Ids do not count: they are often numbers of lines,
    which move when a line is added."""
    left = Counter(json.dumps(prompt.messages) for prompt in used)
    unused = []
    for prompt in prompts:
        content = json.dumps(prompt.messages)
        if left[content]:
            left[content] -= 1
        else:
            unused.append(prompt)
    return unused


def new_prompts(
    lm: LM,
    seeds: Sequence[Prompt],
    cfg: SelfInstruct,
    key: jax.Array,
    *,
    earlier: Sequence[str] = (),
    held_out: Sequence[str] = (),
    prefix: str = "new",
    counts: Counter[str] | None = None,
) -> list[Prompt]:
    """Up to `cfg.num_prompts` new single-message prompts in the style of `seeds`, with the ids "{prefix}-000000", ...

    Requests are made in waves. Each request shows `num_seed_shots` seeds and `num_generated_shots` generated prompts:
    `earlier` ones, and those kept in earlier waves (more seeds while there are too few). They are drawn from `key`, the
    wave's number and the request's number. The task in a reply is kept if it passes these checks, in this order: it
    parses, length, blacklist, how it begins, not a duplicate, ROUGE-L with held-out prompts, ROUGE-L with all others.

    Args:
      earlier: texts that were generated before, in a fixed order; they are shown, and may not come back.
      held_out: texts that must not come back, nor anything similar; they are never shown.
      counts: receives the numbers of requests, waves, kept prompts, requests that showed fewer generated prompts than
        asked ("few_generated_shots"), and dropped prompts by reason: "too_long_request", "cut_off", "unparsable",
        "length", "blacklist", "banned_start", "punctuation_first", "non_ascii_first", "duplicate", "held_out" (similar
        to a held-out one), "similar", and "surplus" (passed after enough were kept).

    Raises: InstructError if no prompt passes in all the requests that may be made; ValueError without seeds.
    """
    if not seeds:
        raise ValueError("new_prompts got 0 seeds; it needs prompts to imitate")
    counts = Counter() if counts is None else counts
    seed_texts = sorted({prompt.text for prompt in seeds})
    known = {_normal(text) for text in (*seed_texts, *earlier, *held_out)}
    generated, kept = list(earlier), list[str]()
    shots_seed = np.asarray(jax.random.key_data(fold(key, "shots"))).tolist()
    asked, limit = 0, cfg.max_rounds * cfg.num_prompts
    sizes = _wave_sizes(cfg, len(generated))
    for wave in itertools.count():
        missing = cfg.num_prompts - len(kept)
        if missing == 0 or asked == limit:
            break
        # As many as the acceptance rate so far suggests, at most twice the whole number, and at least a full batch: a
        # smaller one takes as long, and surplus prompts are not kept.
        needed = -(-missing * max(asked, 1) // max(len(kept), 1))
        wanted = min(next(sizes), max(needed, cfg.batch_size), 2 * cfg.num_prompts, limit - asked)
        requests = [
            Prompt.of(f"{prefix}/{wave}/{i}", _request(seed_texts, generated, cfg, [*shots_seed, wave, i]))
            for i in range(wanted)
        ]
        replies = _sample(lm, requests, cfg, fold(key, "sample", wave), counts)
        fresh = _fresh(replies, known, cfg, counts)
        new = _distinct(fresh, missing, [*seed_texts, *generated], held_out, cfg.rouge_threshold, counts)
        counts.update(waves=1, requests=wanted)
        counts["few_generated_shots"] += wanted if len(generated) < cfg.num_generated_shots else 0
        asked += wanted
        kept += new
        generated += new
    counts["kept"] = len(kept)
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    if not kept:
        raise InstructError(
            f"self-instruct kept 0 of {cfg.num_prompts} prompts in {asked} requests ({reasons}); "
            "relax the filter that drops most, raise max_rounds, or read prompts from a file"
        )
    if len(kept) < cfg.num_prompts:
        _log.warning(
            "self-instruct kept %d of %d prompts in %d requests (%s)", len(kept), cfg.num_prompts, asked, reasons
        )
    return [Prompt.of(f"{prefix}-{number:06d}", text) for number, text in enumerate(kept)]


def _wave_sizes(cfg: SelfInstruct, generated: int) -> Iterator[int]:
    """The number of requests in each wave, if there are enough to make.

    The first wave is an eighth of a batch, because it can show no generated prompts. Each later one is four times as
    large, up to four batches: slots wait for the longest reply of a wave, so waves of one batch would waste many, and
    each size below a batch compiles programs of its own. If there are enough ``generated`` prompts at the start, all
    waves have the full size.
    """
    full = 4 * cfg.batch_size
    size = max(1, cfg.batch_size // 8) if generated < cfg.num_generated_shots else full
    while True:
        yield size
        size = min(4 * size, full)


def _request(seed_texts: list[str], generated: list[str], cfg: SelfInstruct, seed: list[int]) -> str:
    """The few-shot request for one seed: seed prompts and generated ones, drawn without replacement and shuffled."""
    rng = np.random.default_rng(seed)
    num_generated = min(cfg.num_generated_shots, len(generated))
    num_seeds = min(cfg.num_seed_shots + cfg.num_generated_shots - num_generated, len(seed_texts))
    shots = [seed_texts[i] for i in rng.choice(len(seed_texts), num_seeds, replace=False)]
    shots += [generated[i] for i in rng.choice(len(generated), num_generated, replace=False)] if num_generated else []
    return cfg.format.render([shots[i] for i in rng.permutation(len(shots))])


def _sample(lm: LM, requests: list[Prompt], cfg: SelfInstruct, key: jax.Array, counts: Counter[str]) -> list[Response]:
    """One reply to each request that fits the model's context, in the order of the requests."""
    room = lm.config.max_positions - cfg.max_new_tokens
    fitting = [prompt for prompt in requests if len(render_prompt(lm.tokenizer, prompt.messages)) <= room]
    counts["too_long_request"] += len(requests) - len(fitting)
    if not fitting:
        return []
    replies = generate.generate(
        lm,
        fitting,
        num_samples=1,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_new_tokens=cfg.max_new_tokens,
        key=key,
        batch_size=cfg.batch_size,
    )
    by_prompt = {reply.prompt_id: reply for reply in replies}
    return [by_prompt[prompt.id] for prompt in fitting]


def _fresh(replies: list[Response], known: set[str], cfg: SelfInstruct, counts: Counter[str]) -> list[str]:
    """The tasks in the replies that pass the checks of a single text and are not `known`, to which they are added."""
    fresh: list[str] = []
    for reply in replies:
        text = cfg.format.parse(reply.text, cut_off=reply.finish_reason != "stop")
        if text is None:
            counts["unparsable" if reply.finish_reason == "stop" else "cut_off"] += 1
        elif (reason := _fault(text, cfg)) is not None:
            counts[reason] += 1
        elif _normal(text) in known:
            counts["duplicate"] += 1
        else:
            known.add(_normal(text))
            fresh.append(text)
    return fresh


def _fault(text: str, cfg: SelfInstruct) -> str | None:
    """Why a text is no prompt to keep: the first of Self-Instruct's filters that drops it."""
    if not cfg.min_words <= word_count(text) <= cfg.max_words:
        return "length"
    words = "|".join(map(re.escape, cfg.blacklist))
    if words and re.search(rf"\b(?:{words})\b", text, re.IGNORECASE):
        return "blacklist"
    if text.casefold().startswith(tuple(start.casefold() for start in cfg.banned_starts)):
        return "banned_start"
    if text[0] in string.punctuation and not cfg.punctuation_first:
        return "punctuation_first"
    if not text[0].isascii() and not cfg.non_ascii_first:
        return "non_ascii_first"
    return None


def _distinct(
    fresh: list[str],
    missing: int,
    pool: Sequence[str],
    held_out: Sequence[str],
    threshold: float,
    counts: Counter[str],
) -> list[str]:
    """The first `missing` of the texts that are similar neither to a held-out text, nor to one of the pool, nor to one
    another."""
    too_near = rouge_l(fresh, held_out).max(axis=1, initial=0.0) >= threshold
    similar = rouge_l(fresh, pool).max(axis=1, initial=0.0) >= threshold
    among = rouge_l(fresh, fresh)
    accepted: list[int] = []
    for i in range(len(fresh)):
        if too_near[i]:
            counts["held_out"] += 1
        elif similar[i] or among[i, accepted].max(initial=0.0) >= threshold:
            counts["similar"] += 1
        elif len(accepted) == missing:
            counts["surplus"] += 1
        else:
            accepted.append(i)
    return [fresh[i] for i in accepted]


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
