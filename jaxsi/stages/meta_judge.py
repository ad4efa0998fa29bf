"""The meta-judge of Meta-Rewarding (Wu et al. 2024, arXiv 2407.19594): it compares judgments of one
response, and the best and the worst of them become a preference pair, from which the judge learns.

    j_1 .. j_n    judgments of one response to a prompt, the one whose scores vary most             `contests`
    s_ab          1 if the meta-judge prefers j_a, which stands first, to j_b; 0 if it prefers j_b  a comparison
    w_1, w_2      = W_2 / (W_1 + W_2), W_1 / (W_1 + W_2)   W_p: all wins of judgments in place p    `weights`
    B_ab          = w_1 s_ab + w_2 (1 - s_ba)              the wins of j_a over j_b                 `wins`
    e             = argmax  sum_ab B_ab log(sigma(e_a - e_b))                                       `elo`
    chosen j_a    a = argmax e;   rejected j_b   b = argmin e                                       `judge_pairs`

Weights by place take out what the meta-judge gives a judgment for standing first or last.
"""

import dataclasses
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, Response
from jaxsi.stages.answers import with_prompts
from jaxsi.stages.judge import scored
from jaxsi.stages.prompts import Rubric, load_template, question_text, up_to_verdict
from jaxsi.stages.prompts.comparison import PairwiseRubric
from jaxsi.stages.verdicts import JudgeConfig, LocalWriter, ask
from jaxsi.text.chat import written_response
from jaxsi.text.tokenizer import Tokenizer

PRIOR = 0.05  # wins that any two judgments have over each other before the first comparison
SAME = 1e-4  # Elo points; smaller differences are rounding


class Entry(NamedTuple):
    """One of the N judgments of a response: its number, its score, and its text up to the verdict."""

    number: int
    score: float
    text: str


class Contest(NamedTuple):
    """The judgments of one response, all with different texts. ``request`` is what the judge was asked, with the id of
    the response; ``mean`` is the mean of all N scores."""

    request: Prompt
    mean: float
    entries: tuple[Entry, ...]


class Match(NamedTuple):
    """Two judgments of a contest in the order in which the meta-judge reads them."""

    contest: Contest
    first: Entry
    second: Entry

    @property
    def about(self) -> Response:
        """What the comparison is about, as a judgment names it: id "17#2@0|3" for judgments 0 and 3 of "17#2"."""
        response = self.contest.request.id
        return Response.of(f"{response}@{self.first.number}|{self.second.number}", response, 0, "")


# ------------------------------------------------------------------------------------------------- what is compared


def contests(
    prompts: Sequence[Prompt], responses: Sequence[Response], judgments: Sequence[Judgment], rubric: Rubric
) -> list[Contest]:
    """For each prompt the response whose scores have the largest variance; among equal ones, the first sample.

    Judgments without a score, or without a verdict in their text, are left out; so is the text after a verdict. Of
    equal texts the first counts. A prompt without a response that has two different judgments has no contest: so it is
    if a plain function judges, which writes nothing.

    Raises: ValueError if a response has no judgment, or if its prompt is not among ``prompts``.
    """
    by_id = {judgment.id: judgment for judgment in judgments}
    found: dict[str, tuple[float, Contest]] = {}
    for prompt, response in sorted(with_prompts(prompts, responses), key=lambda both: (both[1].sample, both[1].id)):
        if response.id not in by_id:
            raise ValueError(f"response {response.id!r} has no judgment; give one for every response")
        judgment = by_id[response.id]
        entries = _entries(judgment, rubric)
        if len(entries) < 2 or judgment.score is None:
            continue
        variance = statistics.pvariance([score for score in judgment.scores if score is not None])
        if prompt.id not in found or variance > found[prompt.id][0]:
            request = Prompt.of(response.id, rubric.render(question_text(prompt.messages), response.text))
            found[prompt.id] = variance, Contest(request, judgment.score, entries)
    return [found[prompt.id][1] for prompt in prompts if prompt.id in found]


def _entries(judgment: Judgment, rubric: Rubric) -> tuple[Entry, ...]:
    """A rubric that gives each response a score has one text for each score."""
    different: dict[str, Entry] = {}
    for number, (score, written) in enumerate(zip(judgment.scores, judgment.texts, strict=False)):
        text = up_to_verdict(written)
        if score is not None and text is not None and rubric.parse(text) is not None:
            different.setdefault(text, Entry(number, score, text))
    return tuple(different.values())


def matches(contests: Sequence[Contest]) -> list[Match]:
    """Every two judgments of each contest, in both orders."""
    return [Match(contest, a, b) for contest in contests for a, b in itertools.permutations(contest.entries, 2)]


# ------------------------------------------------------------------------------------------------------ who compares


@stored_as("meta_judge.compare_judgments")
def compare_judgments(
    contests: Sequence[Contest], lm: LM, rubric: PairwiseRubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """`lm` as the meta-judge: it reads the judge's whole task and two judgments, reasons, and ends in a verdict.

    Returns: one comparison for each of `matches`, in their order: a Judgment whose score is 1 if the first judgment
      wins, 0 if the second does, 1/2 for a tie, and None without a verdict or without room for the request.
    """
    met = matches(contests)
    requests = [
        Prompt.of(m.about.id, rubric.render(question_text(m.contest.request.messages), m.first.text, m.second.text))
        for m in met
    ]
    return ask(LocalWriter(lm), requests, [m.about for m in met], rubric, cfg, key)


@stored_as("meta_judge.nearest_to_mean")
def nearest_to_mean(contests: Sequence[Contest], lm: LM | None, *_: object) -> list[Judgment]:
    """A meta-judge for models that cannot read the task of one. Not from the paper: of two judgments the one wins whose
    score is nearer to the mean of all N; both at the same distance are a tie. It reads no text, and needs no knowledge
    from outside."""
    met = matches(contests)
    distances = [[abs(entry.score - m.contest.mean) for entry in (m.first, m.second)] for m in met]
    return scored([m.about for m in met], [(a < b) + 0.5 * (a == b) for a, b in distances], lm)


@stored_as("meta_judge.MetaJudgeConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaJudgeConfig:
    """How judgments are compared and become pairs.

    ``judging(contests, lm, rubric, judge, key)`` gives a comparison for each of `matches`: by default the model itself,
    by ``rubric``, with the settings ``judge``. Pairs of judgments are at most ``judge_share`` of all pairs of an
    iteration (this project's choice), and only those of the first ``judge_iterations`` rounds of DPO are trained on:
    the paper's meta-judge comes to prefer high scores, and later rounds there train the actor alone. A pair is left out
    if its chosen judgment is longer than ``max_characters``: one limit for each round, the last one for later rounds,
    none by default (the paper, for an 8B: 1,100, then 1,000).
    """

    judging: Callable[..., list[Judgment]] = compare_judgments
    rubric: PairwiseRubric = PairwiseRubric(name="meta_judge", template=load_template("meta_judge"))
    judge: JudgeConfig = JudgeConfig(num_samples=1)
    judge_share: float = 0.15
    judge_iterations: int = 2
    max_characters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.judge_share < 1:
            raise ValueError(f"judge_share is {self.judge_share}; it lies in (0, 1). judge_iterations = 0 has no pairs")
        if self.judge_iterations < 0 or any(limit < 1 for limit in self.max_characters):
            raise ValueError(
                f"judge_iterations is {self.judge_iterations} (at least 0), max_characters {self.max_characters} (each "
                "at least 1)"
            )

    def longest(self, number: int) -> int | None:
        """The limit of round ``number`` = 1, 2, ... in characters."""
        return self.max_characters[min(number, len(self.max_characters)) - 1] if self.max_characters else None


# ----------------------------------------------------------------------------------------------- from wins to pairs


def weights(comparisons: Iterable[float]) -> tuple[float, float]:
    """(w_1, w_2): what a win of the first, and of the second judgment counts. They add up to 1.

    Args:
      comparisons: the share of each win that goes to the first judgment, in [0, 1]; of the whole iteration.
    """
    shares = list(comparisons)
    if not shares:
        return 0.5, 0.5
    first = math.fsum(shares) / len(shares)
    return 1.0 - first, first


def wins(contest: Contest, scores: Mapping[str, float | None], place: tuple[float, float]) -> np.ndarray:
    """[n, n] float64: the weighted wins of each judgment (row) over each other one.

    Args:
      scores: by the id of a match, the share of the win that goes to the first judgment; None is no comparison.
      place: `weights`.
    """
    rows = {entry.number: row for row, entry in enumerate(contest.entries)}
    matrix = np.zeros((len(rows), len(rows)))
    for match in matches([contest]):
        if (score := scores[match.about.id]) is not None:
            first, second = rows[match.first.number], rows[match.second.number]
            matrix[first, second] += place[0] * score
            matrix[second, first] += place[1] * (1.0 - score)
    return matrix


def elo(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """The Elo scores of n players, [n] float64 with the mean 0: the maximum likelihood of the Bradley-Terry model, by
    minorisation-maximisation (Hunter 2004, Annals of Statistics 32).

    A player who beats another one ten times in eleven games stands 400 points above.

    Args:
      wins: [n, n], the (weighted) wins of each player over each other one.
      prior: wins of every player over every other one that are added, so that scores are finite if one always wins, and
        so that all players are connected.
    """
    wins = np.asarray(wins, np.float64) + prior * (1.0 - np.eye(len(wins)))
    total, games = wins.sum(axis=1), wins + wins.T
    strength, change = np.ones(len(wins)), math.inf
    while change > 1e-11:
        new = total / (games / (strength[:, None] + strength[None, :])).sum(axis=1)
        new /= np.exp(np.log(new).mean())
        change, strength = float(np.abs(np.log(new / strength)).max()), new
    return 400.0 * np.log10(strength)


def judge_pairs(
    contests: Sequence[Contest],
    comparisons: Sequence[Judgment],
    tokenizer: Tokenizer,
    cfg: MetaJudgeConfig,
    *,
    number: int,
    actor_pairs: int,
    seed: int,
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """The pairs that train the judge: its task, with the judgment of the highest Elo score as the chosen response, and
    that of the lowest as the rejected one. Among equal ones the first judgment counts.

    Args:
      comparisons: one for each of ``matches(contests)``, in any order.
      number: of the round of DPO, from 1.
      actor_pairs: how many pairs train the actor; those of the judge are at most ``cfg.judge_share`` of both together.
      seed: draws the pairs that stay, by their ids.

    Returns: the pairs in the order of the contests, and counts:
      "contests"; "comparisons"; "parse_rate", the share of them that have a verdict; "no_room", requests that did not
        fit into the context.
      "position_bias": share of the wins that go to the first judgment (1/2: none). "orders_agree": share of the pairs
        of judgments, each compared in both orders, in which the same one wins both times, or none.
      "prefers_higher": share of the comparisons of different scores in which the higher one wins, ties counting half;
        in the paper it rises as the meta-judge drifts.
      "ties" of the Elo scores, "too_long" for ``max_characters``, "thinned" by ``judge_share``: contests without a
        pair. "pairs"; "chosen_score" and "rejected_score": the mean scores of their judgments.

    Raises: ValueError if a comparison is missing, or if fewer of them have a verdict than ``cfg.judge.min_parse_rate``.
    """
    scores = {comparison.id: comparison.score for comparison in comparisons}
    met = matches(contests)
    if missing := [m.about.id for m in met if m.about.id not in scores]:
        raise ValueError(
            f"{len(missing)} comparisons are missing, the first is {missing[0]!r}; give one for each match"
        )
    counts = {"contests": len(contests)} | _comparison_counts(met, scores)
    counts["no_room"] = sum(not comparison.texts for comparison in comparisons)
    if met and counts["parse_rate"] < cfg.judge.min_parse_rate:
        raise ValueError(
            f"{counts['parse_rate']:.1%} of the meta-judge's comparisons have a verdict, fewer than min_parse_rate = "
            f"{cfg.judge.min_parse_rate:.1%} of pairs.meta.judge; in a new run directory, set its expected, or "
            "judge_iterations = 0 of pairs.meta, which trains the actor alone"
        )
    place = weights(score for score in scores.values() if score is not None)
    limit = cfg.longest(number)
    counts |= dict.fromkeys(("ties", "too_long"), 0)
    found: list[tuple[Entry, Entry, PreferencePair]] = []
    for contest in contests:
        points = elo(wins(contest, scores, place))
        top, bottom = float(points.max()), float(points.min())
        chosen, rejected = (
            contest.entries[int(np.argmax(near))] for near in (points >= top - SAME, points <= bottom + SAME)
        )
        if top - bottom <= SAME:
            counts["ties"] += 1
        elif limit is not None and len(chosen.text) > limit:
            counts["too_long"] += 1
        else:
            found.append((chosen, rejected, _pair(contest, chosen, rejected, top, bottom, tokenizer)))
    most = math.floor(cfg.judge_share / (1.0 - cfg.judge_share) * actor_pairs + 1e-9)
    drawn = set(sorted((pair.id for *_, pair in found), key=lambda id: _drawn(seed, id))[:most])
    kept = [(chosen, rejected, pair) for chosen, rejected, pair in found if pair.id in drawn]
    counts |= {
        "thinned": len(found) - len(kept),
        "pairs": len(kept),
        "chosen_score": _mean([chosen.score for chosen, _, _ in kept]),
        "rejected_score": _mean([rejected.score for _, rejected, _ in kept]),
    }
    return [pair for *_, pair in kept], counts


def _pair(
    contest: Contest, chosen: Entry, rejected: Entry, top: float, bottom: float, tokenizer: Tokenizer
) -> PreferencePair:
    """A pair's id is not that of a prompt, so that both kinds of pairs can stand together."""
    id = contest.request.id
    better, worse = (written_response(tokenizer, f"{id}@{e.number}", id, e.text) for e in (chosen, rejected))
    return PreferencePair(
        id=f"judge {id}",
        messages=contest.request.messages,
        chosen=better,
        rejected=worse,
        chosen_score=top,
        rejected_score=bottom,
    )


def _comparison_counts(met: Sequence[Match], scores: Mapping[str, float | None]) -> dict[str, Any]:
    """What the comparisons say about the meta-judge; a share of nothing is None."""
    read = [(m, score) for m in met if (score := scores[m.about.id]) is not None]
    both = [(score, other) for m, score in read if m.first.number < m.second.number
            and (other := scores[Match(m.contest, m.second, m.first).about.id]) is not None]  # fmt: skip
    higher = [score if m.first.score > m.second.score else 1.0 - score for m, score in read
              if m.first.score != m.second.score]  # fmt: skip
    return {
        "comparisons": len(met),
        "parse_rate": len(read) / len(met) if met else None,
        "position_bias": _mean([score for _, score in read]),
        "orders_agree": _mean([(a - 0.5) * (b - 0.5) < 0 or a == b == 0.5 for a, b in both]),
        "prefers_higher": _mean(higher),
    }


def _drawn(seed: int, id: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{id}".encode()).digest()


def _mean(values: Sequence[float | bool]) -> float | None:
    return math.fsum(values) / len(values) if values else None
