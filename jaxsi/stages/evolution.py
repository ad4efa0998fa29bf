"""When a policy stops evolving, and which of its rounds was best (SEFT, arXiv 2406.10813).

The rules are this project's: the paper's text could not be read. They look at the share of responses to held-out
prompts that the reviser would keep, and ask for evidence: over a few hundred prompts it moves by points on its own.
"""

import math
from collections.abc import Mapping, Sequence

from jaxsi.runs import metrics

Kept = Mapping[str, bool]  # whether the reviser would keep the response to a held-out prompt, by the prompt's id


def stops(kept: Sequence[Kept], *, first: int, patience: int) -> bool:
    """Whether evolution stops after its newest round.

    It stops if the share of kept responses has fallen below that of the best round before, or if in none of the last
    ``patience`` rounds it has risen above that of the best round before these. A share has fallen or risen if the 95 %
    interval of its `change` lies below or above zero.

    Args:
      kept: for the policy before the first round, and after each.
      first: the first round that may stop evolution; earlier ones are only compared with.
    """
    newest, before = len(kept) - 1, len(kept) - 1 - patience
    if newest < first:
        return False
    if change(kept[best_round(kept[:newest])], kept[newest])[1] < 0:
        return True
    if before < first - 1:
        return False
    reference = kept[best_round(kept[: before + 1])]
    return not any(change(reference, later)[0] > 0 for later in kept[before + 1 :])


def best_round(kept: Sequence[Kept]) -> int:
    """The round with the greatest share of kept responses; among equal ones the first."""
    shares = [sum(round.values()) / len(round) if round else 0.0 for round in kept]
    return shares.index(max(shares))


def change(before: Kept, after: Kept) -> tuple[float, float]:
    """The 95 % interval of how much the share rises, paired by prompt, over the prompts that both have; from -inf to
    inf without one."""
    changes = [float(after[id]) - float(before[id]) for id in before if id in after]
    return metrics.mean_ci(changes, samples=2000, seed=0)[1:] if changes else (-math.inf, math.inf)
