"""ROUGE-L against a table by hand, on every path; words of scripts without spaces."""

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.stages import rouge
from jaxsi.stages.rouge import rouge_l, word_count


def by_hand(a, b):
    """F-measure of the longest common subsequence by its textbook table."""
    a, b = a.split(), b.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


sentences = st.lists(st.lists(st.sampled_from("abcde"), max_size=8).map(" ".join), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sentences, sentences)
def test_rouge_l_matches_the_textbook_on_every_path(candidates, pool):
    expected = np.array([[by_hand(a, b) for b in pool] for a in candidates])
    for few in (0, math.inf):  # by tensorflow-text, in NumPy
        with mock.patch.object(rouge, "_FEW_PAIRS_OF_WORDS", few):
            found = rouge_l(candidates, pool)
        assert found.dtype == np.float32 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_scripts_without_spaces_have_a_word_in_each_character():
    near = rouge_l(["写一首关于春天的诗"], ["写一首关于秋天的诗"])
    assert near[0, 0] == pytest.approx(8 / 9, abs=1e-5)
    assert rouge_l(["写一首诗"], ["解释重力"])[0, 0] == 0
    assert rouge_l(["วันนี้"], ["วันนี้"])[0, 0] == 1
    texts = {"写一首关于春天的诗": 9, "Write 诗 now": 3, "two words": 2, "한국어 문장": 2}
    assert {text: word_count(text) for text in texts} == texts


@pytest.mark.parametrize("few", [0, math.inf], ids=["tensorflow", "numpy"])
def test_rouge_l_ignores_case_and_punctuation_and_batches(few, monkeypatch):
    monkeypatch.setattr(rouge, "_FEW_PAIRS_OF_WORDS", few)
    assert rouge_l(["Name THREE rivers!"], ["name three, rivers"]) == 1.0
    assert rouge_l([], ["a"]).shape == (0, 1) and rouge_l(["a"], []).shape == (1, 0)
    texts = [" ".join(f"w{(i * j) % 7}" for j in range(i % 9)) for i in range(40)]
    whole = rouge_l(texts, texts)
    monkeypatch.setattr(rouge, "_PAIRS_PER_CALL", 100)
    np.testing.assert_array_equal(rouge_l(texts, texts), whole)
