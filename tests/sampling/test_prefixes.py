"""Beginnings that prompts share: the best grouping, against all groupings of small sets."""

import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.sampling.prefixes import common_length, group


def saved(prompts: list[list[int]], root: int, groups: list[tuple[int, tuple[int, ...]]]) -> int:
    """Number of tokens saved because a group computes its beginning only once."""
    return sum((len(members) - 1) * (shared - root) for shared, members in groups)


def best_by_brute_force(prompts: list[list[int]], root: int, shortest: int) -> int:
    """The most tokens that a partition saves, if each group has all prompts with its beginning."""

    def partitions(rest: list[int]):
        if not rest:
            yield []
            return
        first, *others = rest
        for chosen in range(2 ** len(others)):
            members = [first, *(x for i, x in enumerate(others) if chosen >> i & 1)]
            left = [x for i, x in enumerate(others) if not chosen >> i & 1]
            for partition in partitions(left):
                yield [members, *partition]

    def worth(members: list[int]) -> int:
        """Tokens that the group saves; 0 if it leaves out a prompt with the same beginning."""
        common = min(common_length(prompts[members[0]], prompts[i]) for i in members)
        if any(prompt[:common] == prompts[members[0]][:common] for i, prompt in enumerate(prompts) if i not in members):
            return 0
        shared = min(common, *(len(prompts[i]) - 1 for i in members))
        return (len(members) - 1) * (shared - root) if shared - root >= shortest else 0

    return max(sum(map(worth, partition)) for partition in partitions(list(range(len(prompts)))))


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=6), st.integers(1, 3))
def test_grouping_saves_the_most_tokens(prompts: list[list[int]], shortest: int) -> None:
    root, groups = group(prompts, shortest=shortest)
    assert sorted(i for g in groups for i in g.prompts) == list(range(len(prompts)))
    assert root == 0 or root >= shortest
    for g in groups:
        assert g.shared == root or (g.shared - root >= shortest and len(g.prompts) > 1)
        for i in g.prompts:
            assert prompts[i][: g.shared] == prompts[g.prompts[0]][: g.shared] and g.shared < len(prompts[i])
    common = min(min(len(p) - 1, common_length(p, prompts[0])) for p in prompts)
    assert root == (common if len(prompts) > 1 and common >= shortest else 0)
    assert saved(prompts, root, [(g.shared, g.prompts) for g in groups]) == best_by_brute_force(prompts, root, shortest)


def test_prompts_of_a_judge_share_the_rubric_and_each_instruction() -> None:
    rubric = list(range(100, 300))
    prompts = [[*rubric, *[i] * 30, *[50 + i, 60 + j] * 10, 7] for i in range(3) for j in range(4)]
    root, groups = group(prompts)
    assert root == 200
    assert sorted((g.shared, g.prompts) for g in groups) == [
        (231, (4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3)) for i in range(3)
    ]


def test_groups_do_not_depend_on_the_order_of_prompts_and_short_ones_come_first() -> None:
    prompts = [[1] * 20 + [i] * i for i in range(2, 9)] + [[9, 9], [1] * 20 + [2, 2, 2] * 9]

    def texts(prompts: list[list[int]]) -> list[list[list[int]]]:
        return [[prompts[i] for i in g.prompts] for g in group(prompts)[1]]

    assert texts(prompts) == texts(prompts[::-1])
    longest = [max(map(len, g)) for g in texts(prompts)]
    assert longest == sorted(longest)


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[4]] * 3])
def test_single_prompt_and_prompts_of_one_token_share_nothing(prompts: list[list[int]]) -> None:
    root, groups = group(prompts, shortest=1)
    assert root == 0 and all(g.shared == 0 for g in groups)


def test_two_thousand_nested_prompts_are_grouped() -> None:
    prompts = [[1] * n for n in range(1, 2001)]
    root, groups = group(prompts)
    assert root == 0 and sum(len(g.prompts) for g in groups) == 2000
