"""New prompts by self-instruct: a few-shot request, and the filters that keep the pool of prompts varied.

Self-Rewarding (arXiv 2401.10020) uses the recipe of Self-Instruct (arXiv 2212.10560) with 8 examples: 6 seeds and 2
generated ones. The ROUGE-L threshold of 0.7 and the kind of blacklisted words are from Self-Instruct.
"""

import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Prompt, RecordError, Response, as_prompts
from jaxsi.sampling import generate
from jaxsi.stages.prompts import parse_new_prompt, render_few_shot
from jaxsi.stages.user_data import columns_of, read_prompts
from jaxsi.text import tensorflow_text
from jaxsi.text.chat import render_prompt

_log = logging.getLogger(__name__)

# Words of tasks that need input which a text model does not have.
BLACKLIST = (
    *("image", "images", "picture", "pictures", "photo", "photos", "graph", "graphs", "plot", "draw", "diagram"),
    *("flowchart", "map", "maps", "file", "files", "video", "videos", "audio", "music", "go to"),
)
_PAIRS_PER_CALL = 200_000  # limits the memory of one ROUGE-L call
_FEW_PAIRS_OF_WORDS = 50_000_000  # NumPy takes two seconds for these, importing TensorFlow four


class InstructError(RuntimeError):
    """Self-instruct found no new prompt at all; the message counts the reasons."""


@stored_as("instruct.SelfInstruct")
@dataclass(frozen=True, kw_only=True)
class SelfInstruct:
    """How to write `num_prompts` new prompts. Lengths are in words; `blacklist` holds whole words or phrases, any case.

    A prompt is kept if its ROUGE-L F-measure with every seed and every kept prompt is below `rouge_threshold`
    (1.0 keeps all but identical word sequences). `max_rounds` limits the requests if few prompts pass the filters.
    `generator` is the MODEL that writes them; None is the run's own M_0.
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
    if isinstance(source, PromptFile):
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


def check_used(source: PromptFile, prompts: Sequence[Prompt], used: Sequence[Prompt]) -> None:
    """Whether the ``prompts`` of a file, which may have moved, are those from which a run took the ``used`` ones, or
    more. Ids do not count, as in `without_used`.

    Raises: RecordError naming the first used prompt that is gone or was edited.
    """
    there = {json.dumps(prompt.messages) for prompt in prompts}
    gone = [prompt for prompt in used if json.dumps(prompt.messages) not in there]
    if gone and source.max_prompts is not None:  # added lines may have moved them beyond the limit
        there |= {json.dumps(prompt.messages) for prompt in dataclasses.replace(source, max_prompts=None).read()}
        gone = [prompt for prompt in gone if json.dumps(prompt.messages) not in there]
    if gone:
        raise RecordError(
            source.path,
            None,
            f"this run has used {len(used)} prompts, {len(gone)} of which are not in this file now; the first is "
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
    exclude: frozenset[str] = frozenset(),
    *,
    prefix: str = "new",
    counts: Counter[str] | None = None,
) -> list[Prompt]:
    """Up to `cfg.num_prompts` new single-message prompts in the style of `seeds`, with the ids "{prefix}-000000", ...

    Each request shows `num_seed_shots` seeds and `num_generated_shots` prompts kept in earlier rounds (more seeds while
    there are none), drawn from `key` and the request's number. The first line of a reply is kept if it passes these
    checks, in this order: it parses, length, blacklist, not a duplicate, ROUGE-L.

    Args:
      exclude: texts (of held-out or earlier prompts) that must not come back; case and spacing are ignored.
      counts: receives the numbers of requests, rounds, kept prompts, and dropped ones by reason:
        "too_long_request", "cut_off", "unparsable", "length", "blacklist", "duplicate", "similar", and
        "surplus" (passed after enough were kept).

    Raises: InstructError if no prompt passes in `cfg.max_rounds` rounds; ValueError without seeds.
    """
    if not seeds:
        raise ValueError("new_prompts got 0 seeds; it needs prompts to imitate")
    counts = Counter() if counts is None else counts
    seed_texts = sorted({prompt.text for prompt in seeds})
    known = {_normal(text) for text in (*seed_texts, *exclude)}
    kept: list[str] = []
    shots_seed = np.asarray(jax.random.key_data(fold(key, "shots"))).tolist()
    wanted = cfg.num_prompts
    for round_number in range(cfg.max_rounds):
        requests = [
            Prompt.of(f"{prefix}/{round_number}/{i}", _request(seed_texts, kept, cfg, [*shots_seed, round_number, i]))
            for i in range(wanted)
        ]
        replies = _sample(lm, requests, cfg, fold(key, "sample", round_number), counts)
        _keep_new(replies, seed_texts, kept, known, cfg, counts)
        counts.update(rounds=1, requests=len(requests))
        missing = cfg.num_prompts - len(kept)
        if missing == 0:
            break
        # Request as many as the acceptance rate so far suggests, at most twice the whole number, and at least a full
        # batch: a smaller one takes as long, and surplus prompts are not kept.
        needed = -(-missing * counts["requests"] // max(len(kept), 1))
        wanted = min(max(needed, cfg.batch_size), 2 * cfg.num_prompts)
    counts["kept"] = len(kept)
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    if not kept:
        raise InstructError(
            f"self-instruct kept 0 of {cfg.num_prompts} prompts in {cfg.max_rounds} rounds ({reasons}); "
            "relax the filter that drops most, raise max_rounds, or read prompts from a file"
        )
    if len(kept) < cfg.num_prompts:
        _log.warning(
            "self-instruct kept %d of %d prompts in %d rounds (%s)", len(kept), cfg.num_prompts, cfg.max_rounds, reasons
        )
    return [Prompt.of(f"{prefix}-{number:06d}", text) for number, text in enumerate(kept)]


def rouge_l(candidates: Sequence[str], pool: Sequence[str]) -> np.ndarray:
    """ROUGE-L F-measure [len(candidates), len(pool)] float32 of every pair, over lower-case words.

    Many pairs are computed by tensorflow-text on the CPU if that is installed, else in NumPy. For few pairs importing
    TensorFlow would take longest, so NumPy computes them. Scores have six digits, so that both fall on the same side of
    a threshold. Texts without words score 0.
    """
    ids: dict[str, int] = {}
    words = [
        [np.asarray([ids.setdefault(word, len(ids)) for word in _words(text)], np.int64) for text in texts]
        for texts in (candidates, pool)
    ]
    scores = np.zeros((len(candidates), len(pool)), np.float32)
    if not len(candidates) or not len(pool):
        return scores
    pairs_of_words = math.prod(sum(map(len, texts)) for texts in words)
    many = pairs_of_words > _FEW_PAIRS_OF_WORDS and importlib.util.find_spec("tensorflow_text") is not None
    f_measure = _f_measure_tensorflow if many else _f_measure_numpy
    rows = max(1, _PAIRS_PER_CALL // len(pool))
    for start in range(0, len(candidates), rows):
        scores[start : start + rows] = f_measure(words[0][start : start + rows], words[1])
    return scores.round(6)


def _request(seed_texts: list[str], kept: list[str], cfg: SelfInstruct, seed: list[int]) -> str:
    """The few-shot request for one seed: seed prompts and kept prompts, drawn without replacement and shuffled."""
    rng = np.random.default_rng(seed)
    num_kept = min(cfg.num_generated_shots, len(kept))
    num_seeds = min(cfg.num_seed_shots + cfg.num_generated_shots - num_kept, len(seed_texts))
    shots = [seed_texts[i] for i in rng.choice(len(seed_texts), num_seeds, replace=False)]
    shots += [kept[i] for i in rng.choice(len(kept), num_kept, replace=False)] if num_kept else []
    return render_few_shot([shots[i] for i in rng.permutation(len(shots))])


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


def _keep_new(
    replies: list[Response],
    seed_texts: list[str],
    kept: list[str],
    known: set[str],
    cfg: SelfInstruct,
    counts: Counter[str],
) -> None:
    """Appends what passes every filter to `kept` (and `known`), in the order of the replies, until there is enough."""
    blacklist = (
        re.compile(rf"\b(?:{'|'.join(map(re.escape, cfg.blacklist))})\b", re.IGNORECASE) if cfg.blacklist else None
    )
    fresh: list[str] = []
    for reply in replies:
        found = _parsed(reply, cfg, blacklist)
        if isinstance(found, _Dropped):
            counts[found.reason] += 1
        elif _normal(found) in known:
            counts["duplicate"] += 1
        else:
            known.add(_normal(found))
            fresh.append(found)
    nearest = rouge_l(fresh, [*seed_texts, *kept]).max(axis=1, initial=0.0)
    distinct = [text for text, score in zip(fresh, nearest, strict=True) if score < cfg.rouge_threshold]
    counts["similar"] += len(fresh) - len(distinct)
    among = rouge_l(distinct, distinct)
    accepted: list[int] = []
    for i, text in enumerate(distinct):
        if len(kept) == cfg.num_prompts:
            counts["surplus"] += 1
        elif among[i, accepted].max(initial=0.0) >= cfg.rouge_threshold:
            counts["similar"] += 1
        else:
            accepted.append(i)
            kept.append(text)


@dataclass(frozen=True)
class _Dropped:
    reason: str


def _parsed(reply: Response, cfg: SelfInstruct, blacklist: re.Pattern[str] | None) -> str | _Dropped:
    """The new prompt in a reply, or why there is none."""
    text = parse_new_prompt(reply.text)
    if text is None:
        return _Dropped("unparsable")
    if reply.finish_reason != "stop" and "\n" not in reply.text.strip():
        return _Dropped("cut_off")  # the token limit came before the end of the first line
    if not cfg.min_words <= _word_count(text) <= cfg.max_words:
        return _Dropped("length")
    if blacklist is not None and blacklist.search(text):
        return _Dropped("blacklist")
    return text


def _word_count(text: str) -> int:
    """Words between spaces; characters count as words in scripts without spaces."""
    return sum(max(1, len(re.findall(f"[{_UNSPACED}]", word))) for word in text.split())


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


# Scripts that put no spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


def _words(text: str) -> list[str]:
    """The words in lower case; each character of a script without spaces is a word."""
    return _WORD.findall(text.lower())


def _f_measure_tensorflow(candidates: list[np.ndarray], pool: list[np.ndarray]) -> np.ndarray:
    """[len(candidates), len(pool)] by one call of tensorflow_text.metrics.rouge_l over all pairs."""
    tf, tf_text = tensorflow_text.load()
    ragged = functools.partial(tf.RaggedTensor.from_row_lengths, validate=False)
    lengths = [len(words) for words in candidates]
    hypotheses = np.concatenate([np.tile(words, len(pool)) for words in candidates])
    references = np.tile(np.concatenate(pool), len(candidates))
    with tf.device("CPU:0"):
        scores = tf_text.metrics.rouge_l(
            ragged(hypotheses, np.repeat(lengths, len(pool))),
            ragged(references, np.tile([len(words) for words in pool], len(candidates))),
        ).f_measure.numpy()
    return scores.reshape(len(candidates), len(pool))


def _f_measure_numpy(candidates: list[np.ndarray], pool: list[np.ndarray]) -> np.ndarray:
    """The same if tensorflow-text has no wheels: longest common subsequences, for the whole pool at once."""
    lengths = np.asarray([len(words) for words in pool])
    padded = np.full((len(pool), lengths.max(initial=0)), -1, np.int64)
    for row, words in zip(padded, pool, strict=True):
        row[: len(words)] = words
    scores = np.zeros((len(candidates), len(pool)), np.float32)
    for i, words in enumerate(candidates):
        table = np.zeros((len(pool), padded.shape[1] + 1), np.int32)
        for word in words:
            extended = np.where(padded == word, table[:, :-1] + 1, table[:, 1:])
            table[:, 1:] = np.maximum.accumulate(extended, axis=1)
        common = table[:, -1]
        scores[i] = 2.0 * common / np.maximum(len(words) + lengths, 1)
    return scores
