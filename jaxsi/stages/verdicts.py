"""From a judge's texts to judgments: each response by itself, in pairs in both orders, or all of a prompt in a ranking.

A `Writer` writes the texts: a model in this process (`LocalWriter`), or one behind an endpoint. A text that does not
parse, or a request that is too long for the writer, stays None everywhere, never a number.
"""

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.sampling import generate, scoring
from jaxsi.stages.answers import Answers, answers, with_prompts, with_room
from jaxsi.stages.prompts import Rubric, question_text
from jaxsi.stages.prompts.comparison import AnyRubric, PairwiseRubric, RankingRubric
from jaxsi.text.chat import render_prompt, render_request, render_response
from jaxsi.text.tokenizer import Tokenizer

# Extra tokens that a generated justification may take when its text is encoded again.
_SPARE_TOKENS = 8

Written = Mapping[str, Sequence[Response]]  # the K texts for each request, by its id; without those that are too long


@stored_as("feedback.JudgeConfig")
@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How each response is judged: K = `num_samples` justifications with their verdicts, averaged over the valid ones.

    `expected` takes the expectation over the possible verdicts after each justification in place of the written one:
    it is finer (fewer ties), always parses, and works with a model that does not write verdicts. Defaults: K of the
    Self-Rewarding paper, and the sampling settings of its open re-implementations (the paper states none). `batch_size`
    judgments are sampled at a time. Below `min_parse_rate` a method stops: it would learn from the few judgments that
    did parse.
    """

    num_samples: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    expected: bool = False
    batch_size: int = 64
    min_parse_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        generate.check_sampling(self.temperature, self.max_new_tokens, self.batch_size, self.top_p)
        if not 0 <= self.min_parse_rate <= 1:
            raise ValueError(f"min_parse_rate is {self.min_parse_rate}; it must lie in [0, 1]")


class Writer(Protocol):
    """Who writes a judge's texts; `fingerprint` and `template` are those of the judgments."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def template(self) -> str: ...

    def write(
        self, requests: Sequence[Prompt], cfg: JudgeConfig, key: jax.Array, num_samples: int, forced: Sequence[str] = ()
    ) -> Written:
        """`num_samples` texts for each request, ordered by sample, after each of which one of the texts `forced` has
        room. A request that is too long is left out."""
        ...

    def expected(
        self, requests: Sequence[Prompt], written: Written, rubric: Rubric | PairwiseRubric, cfg: JudgeConfig
    ) -> dict[str, list[float | None]]:
        """For each text: the mean of `rubric.choices` under their probabilities after the text; None if there is
        none."""
        ...

    def choice_logps(
        self, requests: Sequence[Prompt], choices: Sequence[str], cfg: JudgeConfig
    ) -> Mapping[str, Sequence[float]]:
        """The log-prob of each of the texts `choices` as the beginning of the answer. A request that is too long is
        left out."""
        ...


# ------------------------------------------------------------------------------------------------------ the three ways


def judged(
    writer: Writer,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    rubric: AnyRubric,
    cfg: JudgeConfig,
    key: jax.Array,
) -> list[Judgment]:
    """One judgment for each response, in the order of `responses`. All responses to a prompt have to be among them if
    the rubric compares. Two kinds of responses are not judged, so they have no scores: those that were cut off within
    their thought, and with a rubric that compares those that are the only one to their prompt.

    Raises: ValueError if a response id occurs twice, if a response's prompt is not among `prompts`, or if expected
      scores are asked of a ranking.
    """
    pairs = [(p, r) for p, r in with_prompts(prompts, responses) if r.text or not r.reasoning]  # or within a thought
    if isinstance(rubric, Rubric):
        found = _by_themselves(writer, pairs, rubric, cfg, key)
    else:
        answered = [response for _, response in pairs]
        groups = [
            Answers(group.prompt, _in_order(group)) for group in answers(prompts, answered) if len(group.responses) > 1
        ]
        if isinstance(rubric, PairwiseRubric):
            found = _in_pairs(writer, groups, rubric, cfg, key)
        elif cfg.expected:
            raise ValueError(f"rubric {rubric.name!r} ranks, which gives no expected scores; set expected to False")
        else:
            found = _in_rankings(writer, groups, rubric, cfg, key)
    return [_judgment(writer, response, *found.get(response.id, ((), ("",)))) for response in responses]


def ask(
    writer: Writer,
    requests: Sequence[Prompt],
    about: Sequence[Response],
    rubric: Rubric | PairwiseRubric,
    cfg: JudgeConfig,
    key: jax.Array,
) -> list[Judgment]:
    """Sends judge prompts of any kind as they are: one judgment for each of `about`, by the request with its id."""
    written, scores = _scored(writer, requests, rubric, cfg, key)
    unread = (None,) * cfg.num_samples
    return [
        _judgment(writer, r, scores.get(r.id, unread), [text.text for text in written.get(r.id, ())]) for r in about
    ]


Found = dict[str, tuple[Sequence[float | None], Sequence[str]]]  # scores and texts of each response


def _by_themselves(
    writer: Writer, pairs: Sequence[tuple[Prompt, Response]], rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> Found:
    """K scores of each response (Self-Rewarding, arXiv 2401.10020, figure 2)."""
    requests = [
        Prompt.of(response.id, rubric.render(question_text(prompt.messages), response.text))
        for prompt, response in pairs
    ]
    written, scores = _scored(writer, requests, rubric, cfg, key)
    return {
        request.id: (
            scores.get(request.id, (None,) * cfg.num_samples),
            [text.text for text in written.get(request.id, ())],
        )
        for request in requests
    }


def _in_pairs(
    writer: Writer, groups: Sequence[Answers], rubric: PairwiseRubric, cfg: JudgeConfig, key: jax.Array
) -> Found:
    """Each response against every other one of its prompt, in both orders: 1 for a win in both, 0 for a loss in both,
    and 1/2 if the two orders disagree, as position decided then (MT-Bench, arXiv 2306.05685, section 3.4). Expected
    wins are averaged over the orders. Equal texts are a tie without a question."""
    requests = [
        Prompt.of(_pair_id(a, b), rubric.render(question_text(group.prompt.messages), a.text, b.text))
        for group in groups
        for a, b in itertools.permutations(group.responses, 2)
        if a.text != b.text
    ]
    written, firsts = _scored(writer, requests, rubric, cfg, key)
    unread = (None,) * cfg.num_samples
    found: Found = {}
    for group in groups:
        for a in group.responses:
            others = [b for b in group.responses if b is not a]
            scores: list[float | None] = []
            for b in others:
                if a.text == b.text:
                    scores += [0.5] * cfg.num_samples
                    continue
                orders = firsts.get(_pair_id(a, b), unread), firsts.get(_pair_id(b, a), unread)
                scores += [_both_orders(first, second, cfg) for first, second in zip(*orders, strict=True)]
            texts = [text.text for b in others for text in written.get(_pair_id(a, b), ())]
            found[a.id] = scores, texts
    return found


def _both_orders(as_first: float | None, of_other: float | None, cfg: JudgeConfig) -> float | None:
    """A response's score from its score as response A, and the score of the other one as response A."""
    if as_first is None or of_other is None:
        return None
    mean = (as_first + 1.0 - of_other) / 2
    return mean if cfg.expected or mean in (0.0, 1.0) else 0.5


def _in_rankings(
    writer: Writer, groups: Sequence[Answers], rubric: RankingRubric, cfg: JudgeConfig, key: jax.Array
) -> Found:
    """K rankings of all responses to a prompt, each of the responses in another random order."""
    orders = {
        f"{group.prompt.id}@{k}": (group, _shuffled(group, k)) for group in groups for k in range(cfg.num_samples)
    }
    requests = [
        Prompt.of(id, rubric.render(question_text(group.prompt.messages), [r.text for r in order]))
        for id, (group, order) in orders.items()
    ]
    written = writer.write(requests, cfg, key, 1)
    scores: dict[str, list[float | None]] = {r.id: [] for group in groups for r in group.responses}
    texts: dict[str, list[str]] = {id: [] for id in scores}
    for id, (_, order) in orders.items():
        ranking = written[id][0].text if id in written else None
        places = None if ranking is None else rubric.parse(ranking, len(order))
        for number, response in enumerate(order):
            scores[response.id].append(None if places is None else places[number])
            texts[response.id] += [] if ranking is None else [ranking]
    return {id: (scores[id], texts[id]) for id in scores}


def _scored(
    writer: Writer, requests: Sequence[Prompt], rubric: Rubric | PairwiseRubric, cfg: JudgeConfig, key: jax.Array
) -> tuple[Written, Mapping[str, Sequence[float | None]]]:
    """The texts, and the scores that they give, or that are expected after them."""
    forced = [f"\n{rubric.marker}{choice}" for choice in rubric.choices] if cfg.expected else []
    written = writer.write(requests, cfg, key, cfg.num_samples, forced)
    if cfg.expected:
        return written, writer.expected([r for r in requests if r.id in written], written, rubric, cfg)
    return written, {id: [_parsed(rubric, text) for text in texts] for id, texts in written.items()}


def _parsed(rubric: Rubric | PairwiseRubric, text: Response) -> float | None:
    verdict = rubric.parse(text.text, cut_off=text.finish_reason != "stop")
    if verdict is None or isinstance(verdict, int):
        return None if verdict is None else float(verdict)
    return rubric.choices[f" {verdict}"]


def _judgment(writer: Writer, response: Response, scores: Sequence[float | None], texts: Sequence[str]) -> Judgment:
    valid = [score for score in scores if score is not None]
    return Judgment(
        id=response.id,
        prompt_id=response.prompt_id,
        scores=tuple(scores),
        score=sum(valid) / len(valid) if valid else None,
        texts=tuple(texts),
        fingerprint=writer.fingerprint,
        template=writer.template,
    )


def _in_order(group: Answers) -> tuple[Response, ...]:
    """The responses by sample number: what is asked must not depend on the order in which they are given."""
    return tuple(sorted(group.responses, key=lambda response: (response.sample, response.id)))


def _pair_id(a: Response, b: Response) -> str:
    return f"{a.id}|{b.id}"


def _shuffled(group: Answers, k: int) -> list[Response]:
    digest = hashlib.sha256("\0".join([str(k), *(r.id for r in group.responses)]).encode()).digest()
    return random.Random(int.from_bytes(digest, "big")).sample(group.responses, len(group.responses))


# ------------------------------------------------------------------------------------------- a model in this process


@dataclass(frozen=True)
class LocalWriter:
    """`lm` writes. A text's noise is folded from the key, the request's id and the sample number."""

    lm: LM

    @property
    def fingerprint(self) -> str:
        return self.lm.fingerprint

    @property
    def template(self) -> str:
        return self.lm.tokenizer.template_hash

    def write(
        self, requests: Sequence[Prompt], cfg: JudgeConfig, key: jax.Array, num_samples: int, forced: Sequence[str] = ()
    ) -> Written:
        lm, longest = self.lm, cfg.max_new_tokens
        if forced:
            longest += max(len(lm.tokenizer.encode_text(text)) for text in forced) + _SPARE_TOKENS
        fitting = with_room(lm, requests, longest)
        written: dict[str, list[Response]] = {p.id: [] for p in fitting}
        if not fitting:
            return written
        for text in generate.generate(
            lm,
            fitting,
            num_samples=num_samples,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_new_tokens=cfg.max_new_tokens,
            key=key,
            batch_size=cfg.batch_size,
        ):
            written[text.prompt_id].append(text)
        for id, texts in written.items():
            texts.sort(key=lambda text: text.sample)
            if [text.sample for text in texts] != list(range(num_samples)):
                raise AssertionError(
                    f"the judgments of {id!r} are samples {[t.sample for t in texts]}, not one of each"
                )
        return written

    def expected(
        self, requests: Sequence[Prompt], written: Written, rubric: Rubric | PairwiseRubric, cfg: JudgeConfig
    ) -> dict[str, list[float | None]]:
        expected: dict[str, list[float | None]] = {r.id: [None] * len(written[r.id]) for r in requests}
        places: list[tuple[str, int]] = []
        prefixes: list[list[int]] = []
        choices: list[list[list[int]]] = []
        for request in requests:
            for k, text in enumerate(written[request.id]):
                if (head := _before_answer(self.lm.tokenizer, request, text)) is None:
                    continue
                texts = [head[1] + rubric.forced(text.text) + choice for choice in rubric.choices]
                prefix, ends = _split_at_choice(self.lm.tokenizer, texts, rubric, cfg.max_new_tokens)
                places.append((request.id, k))
                prefixes.append([*head[0], *prefix])
                choices.append(ends)
        if places:
            logps_NG = np.asarray(
                scoring.score_choices(self.lm, prefixes, choices, batch_size=cfg.batch_size), np.float64
            )
            values = np.asarray(list(rubric.choices.values()))
            for (id, k), logps_G in zip(places, logps_NG, strict=True):
                expected[id][k] = _expectation(logps_G, values)
        return expected

    def choice_logps(
        self, requests: Sequence[Prompt], choices: Sequence[str], cfg: JudgeConfig
    ) -> dict[str, list[float]]:
        ends = [render_response(self.lm.tokenizer, choice)[:-1] for choice in choices]  # without the end of the turn
        _check_apart(ends, choices, "give choices that begin with other letters")
        prefixes = [render_request(self.lm.tokenizer, request.messages) for request in requests]
        room = self.lm.config.max_positions - max(map(len, ends))
        fitting = [i for i, prefix in enumerate(prefixes) if len(prefix) <= room]
        if not fitting:
            return {}
        logps_NG = scoring.score_choices(
            self.lm, [prefixes[i] for i in fitting], [ends] * len(fitting), batch_size=cfg.batch_size
        )
        return {requests[i].id: row.tolist() for i, row in zip(fitting, np.asarray(logps_NG, np.float64), strict=True)}


def _before_answer(tokenizer: Tokenizer, request: Prompt, text: Response) -> tuple[list[int], str] | None:
    """The ids before an answer (the request, and the thought if there is one) and the line breaks at which the answer
    begins. None if the text ends within its thought: no verdict may follow there."""
    head = render_prompt(tokenizer, request.messages)
    if not text.reasoning and not tokenizer.opens_thought:
        return head, ""
    tag, ids = tokenizer.thought_end, list(text.token_ids)
    if tag is None or tag not in ids:
        return None if text.finish_reason != "stop" else (render_request(tokenizer, request.messages), "")
    end = len(ids) - ids[::-1].index(tag)
    answer = tokenizer.decode(ids[end:])
    return [*head, *ids[:end]], answer[: len(answer) - len(answer.lstrip("\n"))]


def _expectation(logps_G: np.ndarray, values_G: np.ndarray) -> float | None:
    """Mean of the values under softmax(logps); None if a log-prob is NaN or all are -inf."""
    if np.isnan(logps_G).any() or not np.isfinite(logps_G.max()):
        return None
    p_G = np.exp(logps_G - logps_G.max())
    return float(p_G @ values_G / p_G.sum())


def _split_at_choice(
    tokenizer: Tokenizer, texts: Sequence[str], rubric: Rubric | PairwiseRubric, max_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """Texts that differ only in the choice at their end -> their shared ids, and the remaining ids of each.

    Justification and verdict are encoded in one piece, as in the texts that a model was trained on. Scoring starts
    where the ids first differ.
    """
    rows = [tokenizer.encode_text(text) for text in texts]
    forced = [tokenizer.encode_text(f"\n{rubric.marker}{choice}") for choice in rubric.choices]
    if max(map(len, rows)) > max_tokens + max(map(len, forced)) + _SPARE_TOKENS:
        # Encoding random bytes (from random weights) can take many more ids than were sampled. Cut them to fit.
        head = tokenizer.encode_text(texts[0])[:max_tokens]
        rows = [head + row for row in forced]
    shared = 0
    while shared < min(map(len, rows)) and len({row[shared] for row in rows}) == 1:
        shared += 1
    ends = [row[shared:] for row in rows]
    _check_apart(
        ends, tuple(rubric.choices), f"rubric {rubric.name!r}: use scores of one digit, or judge with expected=False"
    )
    return rows[0][:shared], ends


def _check_apart(ends: Sequence[Sequence[int]], choices: Sequence[str], fix: str) -> None:
    """Raises: ValueError: if one of the choices is a prefix of another, in token ids."""
    if any(list(a) == list(b[: len(a)]) for i, a in enumerate(ends) for j, b in enumerate(ends) if i != j):
        raise ValueError(
            f"with this tokenizer one of the verdicts {tuple(choices)} is a prefix of another, so their probabilities "
            f"overlap; {fix}"
        )
