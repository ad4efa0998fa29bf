"""ROUGE-L (Lin 2004): how much two texts have in common, as the longest common subsequence of their words."""

import functools
import importlib.util
import math
import re
from collections.abc import Sequence

import numpy as np

from jaxsi.text import tensorflow_text

_PAIRS_PER_CALL = 200_000  # limits the memory of one ROUGE-L call
_FEW_PAIRS_OF_WORDS = 50_000_000  # NumPy takes two seconds for these, importing TensorFlow four


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


def word_count(text: str) -> int:
    """Words between spaces; characters count as words in scripts without spaces."""
    return sum(max(1, len(re.findall(f"[{_UNSPACED}]", word))) for word in text.split())


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
