"""The work that speed is measured with: prompts and output lengths for generation, rows for scoring and training."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxsi.model.decoder import ModelConfig
from jaxsi.model.kv_cache import KVCache
from jaxsi.sampling import prefixes
from jaxsi.sampling.engine import Grouping

SPREAD = 0.8  # sigma of the lognormal output lengths


class WorkError(ValueError):
    """The work is empty, badly described, or does not fit the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateWork:
    """``limits``: the number of new tokens of each row, [prompts][rows of a prompt]; nothing else ends a row.
    ``slots``: rows generated at the same time. ``cache``: of their keys and values."""

    prompts: Sequence[Sequence[int]]
    limits: Sequence[Sequence[int]]
    slots: int
    temperature: float
    top_p: float
    group: Grouping = prefixes.group
    cache: KVCache = "exact"

    def apart(self) -> "GenerateWork":
        """The same rows, with one prompt for each, and no prefix shared between prompts."""
        prompts, limits = zip(*self.rows, strict=True)
        return dataclasses.replace(self, prompts=prompts, limits=[[limit] for limit in limits], group=prefixes.alone)

    @property
    def num_samples(self) -> int:
        return len(self.limits[0])

    @property
    def longest(self) -> int:
        """New tokens of the longest row."""
        return max(max(row) for row in self.limits)

    @property
    def new_tokens(self) -> int:
        return sum(sum(row) for row in self.limits)

    @property
    def rows(self) -> list[tuple[Sequence[int], int]]:
        """(prompt, new tokens) of every row."""
        pairs = zip(self.prompts, self.limits, strict=True)
        return [(prompt, limit) for prompt, limits in pairs for limit in limits]


@dataclasses.dataclass(frozen=True)
class Lognormal:
    """Lengths whose mean is ``mean`` after they are clipped to ``low`` and ``high``: many are short, few are long."""

    low: int
    high: int
    mean: float

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count] integers. They are quantiles in random order, so even a small ``count`` has the mean."""
        from statistics import NormalDist

        quantiles = (np.arange(count) + 0.5) / count
        normal = np.asarray([NormalDist().inv_cdf(float(q)) for q in quantiles])

        def lengths(mu: float) -> np.ndarray:
            return np.clip(np.rint(np.exp(mu + SPREAD * normal)), self.low, self.high)

        low, high = math.log(self.low) - 4, math.log(self.high) + 4
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if lengths(middle).mean() < self.mean else (low, middle)
        return rng.permutation(lengths(high)).astype(np.int64)


def read_range(text: str, option: str) -> tuple[int, int]:
    """Reads LOW:HIGH, or one number for both. Raises: WorkError."""
    numbers = _integers(text)
    if len(numbers) not in (1, 2) or min(numbers) < 1 or numbers[0] > numbers[-1]:
        raise WorkError(f"{option} {text!r}: give LOW:HIGH with 1 <= LOW <= HIGH, or one number of tokens")
    return numbers[0], numbers[-1]


def read_lengths(text: str) -> Lognormal:
    """Reads lognormal:LOW:HIGH:MEAN. Raises: WorkError."""
    name, _, rest = text.partition(":")
    numbers = _integers(rest)
    if name != "lognormal" or len(numbers) != 3 or not 1 <= numbers[0] < numbers[2] < numbers[1]:
        raise WorkError(f"--stop-lengths {text!r}: give lognormal:LOW:HIGH:MEAN with 1 <= LOW < MEAN < HIGH tokens")
    return Lognormal(numbers[0], numbers[1], numbers[2])


def read_judge(text: str) -> tuple[int, int, int]:
    """Reads N:K:RUBRIC. Raises: WorkError."""
    numbers = _integers(text)
    if len(numbers) != 3 or min(numbers[:2]) < 1 or numbers[2] < 0:
        raise WorkError(
            f"--judge {text!r}: give N:K:RUBRIC with responses N >= 1, judgments of each K >= 1, rubric tokens >= 0"
        )
    return numbers[0], numbers[1], numbers[2]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(":")] if all(part.isdecimal() for part in text.split(":")) else []


def generate_work(
    config: ModelConfig,
    *,
    prompts: int,
    prompt_length: tuple[int, int],
    new: int,
    stop_lengths: Lognormal | None,
    judge: tuple[int, int, int] | None,
    slots: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> GenerateWork:
    """Prompts of random tokens, with lengths drawn uniformly from ``prompt_length``.

    With ``judge`` = (N, K, rubric) these are instructions. A prompt is then the rubric, an instruction and one of its N
    responses, which are as long as outputs; each prompt is sampled K times.

    Raises:
      WorkError: if a row does not fit the model's positions, or there is nothing to do.
    """
    if min(prompts, new, slots) < 1:
        raise WorkError(f"--prompts {prompts} --new {new} --batch-size {slots}: each must be at least 1")
    rng = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return rng.integers(0, config.vocab_size, length).tolist()

    def outputs(count: int) -> list[int]:
        return (np.full(count, new) if stop_lengths is None else stop_lengths.draw(count, rng)).tolist()

    texts = [ids(n) for n in rng.integers(prompt_length[0], prompt_length[1] + 1, prompts)]
    samples = 1
    if judge is not None:
        responses, samples, rubric_length = judge
        rubric = ids(rubric_length)
        lengths = np.reshape(outputs(prompts * responses), (prompts, responses)).tolist()
        texts = [rubric + text + ids(n) for text, row in zip(texts, lengths, strict=True) for n in row]
    limits = np.reshape(outputs(len(texts) * samples), (len(texts), samples)).tolist()
    work = GenerateWork(prompts=texts, limits=limits, slots=slots, temperature=temperature, top_p=top_p)
    longest = max(len(prompt) + limit for prompt, limit in work.rows)
    if longest > config.max_positions:
        raise WorkError(
            f"a row of prompt and output has {longest} tokens, but the model has {config.max_positions} positions: "
            "lower --prompt-length, --new, --stop-lengths or the rubric of --judge"
        )
    return work


def texts(config: ModelConfig, count: int, length: int, seed: int) -> list[list[int]]:
    """``count`` rows of ``length`` random tokens.

    Raises:
      WorkError: if they do not fit the model's positions, or ``count`` is below 1.
    """
    if count < 1 or not 2 <= length <= config.max_positions:
        raise WorkError(
            f"{count} rows of {length} tokens: give at least 1 row, and 2 to {config.max_positions} tokens, the "
            "positions of the model; change --batch, --steps or --length"
        )
    return np.random.default_rng(seed).integers(0, config.vocab_size, (count, length)).tolist()
