"""Beginnings that prompts have in common, all of them or in groups, so that each is computed only once."""

import dataclasses
import itertools
from collections.abc import Sequence

SHORTEST = 16  # tokens; a shorter common beginning is not worth a program of its own


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts, by number, that have their first ``shared`` tokens in common."""

    shared: int
    prompts: tuple[int, ...]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that two prompts share at their beginnings."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def group(prompts: Sequence[Sequence[int]], *, shortest: int = SHORTEST) -> tuple[int, list[Group]]:
    """Number of first tokens that all prompts share, and the groups of prompts that share more.

    A group has all prompts with the same beginning. The groups are chosen so that the fewest tokens are left to
    compute.

    A shared beginning has at least ``shortest`` tokens, or else 0. It is never a whole prompt: the first new token is
    drawn after the prompt's last token. Every prompt is in one group; a prompt that shares nothing more is alone in its
    group, whose ``shared`` is that of all prompts. Groups are sorted by their longest prompt, then by their tokens.
    """
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i], i))
    agree = [common_length(prompts[i], prompts[j]) for i, j in itertools.pairwise(order)]
    root = min([*agree, len(prompts[order[0]]) - 1]) if agree else 0
    root = root if root >= shortest else 0
    groups = [
        Group(shared, tuple(order[first : last + 1]))
        for first, last, shared in _best(agree, [len(prompts[i]) for i in order], root, shortest)
    ]
    groups.sort(key=lambda g: (max(len(prompts[i]) for i in g.prompts), prompts[g.prompts[0]], g.prompts[0]))
    return root, groups


def alone(prompts: Sequence[Sequence[int]]) -> tuple[int, list[Group]]:
    """Like ``group``, but treats all prompts as if they shared nothing."""
    return 0, [Group(0, (i,)) for i in range(len(prompts))]


class _Node:
    """Neighbours ``first`` to ``last`` in sorted order, which share their first ``agree`` tokens.

    ``worth`` is the number of tokens that they save, as one group (``whole``) or in their parts.
    """

    def __init__(self, first: int, agree: int, parts: list["_Node"]) -> None:
        self.first, self.last, self.agree, self.parts = first, first, agree, parts
        self.shared, self.worth, self.whole = 0, 0, False

    def close(self, last: int, length: int, root: int, shortest: int) -> None:
        """Ends the node at ``last``; ``length`` is that of its shortest prompt."""
        self.last, self.shared = last, min(self.agree, length - 1)
        more = self.shared - root
        group_worth = (last - self.first) * more if more >= shortest else 0
        parts_worth = sum(part.worth for part in self.parts)
        self.whole, self.worth = group_worth > parts_worth, max(group_worth, parts_worth)


def _best(agree: Sequence[int], lengths: Sequence[int], root: int, shortest: int) -> list[tuple[int, int, int]]:
    """(first, last, shared) of each group of places in sorted order; neighbours share ``agree`` first tokens.

    Prompts that share n tokens are an interval of the sorted order, with the shortest prompt first. These intervals
    form a tree. The worth of a node is the number of tokens that it saves as one group, or the sum over its parts,
    whichever is more.
    """
    stack = [_Node(0, 0, [])]
    for place, shared in enumerate([*agree, 0]):
        first = place
        child: _Node | None = None
        while stack[-1].agree > shared:
            child = stack.pop()
            child.close(place, lengths[child.first], root, shortest)
            first = child.first
            if stack[-1].agree >= shared:
                stack[-1].parts.append(child)
                child = None
        if stack[-1].agree < shared:
            stack.append(_Node(first, shared, [child] if child is not None else []))
    chosen: list[_Node] = []
    pending = stack[0].parts
    while pending:
        node = pending.pop()
        if node.whole:
            chosen.append(node)
        else:
            pending.extend(node.parts)
    groups, place = [], 0
    for node in sorted(chosen, key=lambda node: node.first):
        groups += [(i, i, root) for i in range(place, node.first)]
        groups.append((node.first, node.last, node.shared))
        place = node.last + 1
    return groups + [(i, i, root) for i in range(place, len(lengths))]
