"""What prompts have in common, so that it is computed once: the beginning of all of them, and of groups of them."""

import dataclasses
import itertools
from collections.abc import Sequence

SHORTEST = 16  # tokens: a shorter common beginning is not worth a program of its own


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts, by number, with their first ``shared`` tokens in common."""

    shared: int
    prompts: tuple[int, ...]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """In how many first tokens two prompts agree."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def group(prompts: Sequence[Sequence[int]], *, shortest: int = SHORTEST) -> tuple[int, list[Group]]:
    """How many first tokens all prompts share, and the groups that share more: of all that begin
    alike, so that the fewest tokens are left to compute.

    A shared beginning is ``shortest`` tokens or none (0), and never a whole prompt: its last token is what the first
    new token is drawn after. Every prompt is in one group; one that shares nothing more is a group by itself whose
    ``shared`` is that of all. Groups are in the order of their longest prompt, and of their tokens.
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
    """As ``group``, of prompts that share nothing, whatever they begin with."""
    return 0, [Group(0, (i,)) for i in range(len(prompts))]


class _Node:
    """Neighbours ``first`` to ``last`` of the sorted order, which agree in ``agree`` tokens; ``worth``: the tokens that
    they save, as one group (``whole``) or in their parts."""

    def __init__(self, first: int, agree: int, parts: list["_Node"]) -> None:
        self.first, self.last, self.agree, self.parts = first, first, agree, parts
        self.shared, self.worth, self.whole = 0, 0, False

    def close(self, last: int, length: int, root: int, shortest: int) -> None:
        """Nothing more belongs to it; ``length`` is that of its shortest prompt."""
        self.last, self.shared = last, min(self.agree, length - 1)
        more = self.shared - root
        together = (last - self.first) * more if more >= shortest else 0
        apart = sum(part.worth for part in self.parts)
        self.whole, self.worth = together > apart, max(together, apart)


def _best(agree: Sequence[int], lengths: Sequence[int], root: int, shortest: int) -> list[tuple[int, int, int]]:
    """(first, last, shared) of each group, over places in sorted order of which neighbours agree in ``agree`` tokens.

    Prompts that agree in n tokens are an interval of the sorted order, the shortest first; the intervals form a tree,
    in which a node is worth the tokens that it saves as one group, or what its parts are worth, whichever is more.
    """
    stack = [_Node(0, 0, [])]
    for place, shared in enumerate([*agree, 0]):
        first = place
        closed: _Node | None = None
        while stack[-1].agree > shared:
            closed = stack.pop()
            closed.close(place, lengths[closed.first], root, shortest)
            first = closed.first
            if stack[-1].agree >= shared:
                stack[-1].parts.append(closed)
                closed = None
        if stack[-1].agree < shared:
            stack.append(_Node(first, shared, [closed] if closed is not None else []))
    wanted: list[_Node] = []
    pending = stack[0].parts
    while pending:
        node = pending.pop()
        if node.whole:
            wanted.append(node)
        else:
            pending.extend(node.parts)
    groups, place = [], 0
    for node in sorted(wanted, key=lambda node: node.first):
        groups += [(i, i, root) for i in range(place, node.first)]
        groups.append((node.first, node.last, node.shared))
        place = node.last + 1
    return groups + [(i, i, root) for i in range(place, len(lengths))]
