"""What a recipe has to know of every way to share a budget out, said once, and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class AllocationFacts:
    """What is known of an allocation before anything is computed.

    Attributes:
        reads_text: whether it needs calibration text, beyond what the criterion needs.
        reads_loss: whether it goes by losses on that text, in which not every token may count.
        rule: whether levels follow from scores by a formula; a search can begin with those of the rules.
        starts: whether a search begins with it unless told otherwise.
    """

    reads_text: bool
    rule: bool
    starts: bool = False
    reads_loss: bool = False


ALLOCATIONS: Mapping[str, AllocationFacts] = {
    "uniform": AllocationFacts(reads_text=False, rule=False),
    "depth": AllocationFacts(reads_text=False, rule=True, starts=True),
    "alpha": AllocationFacts(reads_text=False, rule=True, starts=True),
    "owl": AllocationFacts(reads_text=True, rule=True, starts=True),
    "rank": AllocationFacts(reads_text=True, rule=True, starts=True, reads_loss=True),
    "redundancy": AllocationFacts(reads_text=False, rule=True, starts=True),
    "hessian": AllocationFacts(reads_text=True, rule=True, reads_loss=True),
    "msp": AllocationFacts(reads_text=True, rule=False, reads_loss=True),
}
"""By name, as recipes say it."""

RULES = [name for name, facts in ALLOCATIONS.items() if facts.rule]
"""Names of the rules."""

STARTS = [name for name, facts in ALLOCATIONS.items() if facts.starts]
"""Names of those that a search begins with: all but what costs as much as the search."""

if TYPE_CHECKING:
    AllocationName = str
    RuleName = str
else:
    AllocationName = Literal[tuple(ALLOCATIONS)]
    RuleName = Literal[tuple(RULES)]
