"""What a recipe has to know of every update rule, said once.

A new rule is a file beside this one and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True)
class RuleFacts:
    """What is known of a rule before anything is computed.

    Attributes:
        home: `module:class`.
        constants: keys of the section `mixture` that are arguments of the class.
        knows_prior: whether the weights before the first update are another one, `prior`.
    """

    home: str
    constants: tuple[str, ...] = ()
    knows_prior: bool = False


_EXPONENTIAL = ("step_size", "smoothing")

RULES: Mapping[str, RuleFacts] = {
    "paper": RuleFacts(home="shearing.data.mixture.rules.exponential:Paper", constants=_EXPONENTIAL),
    "released": RuleFacts(home="shearing.data.mixture.rules.exponential:Released", constants=_EXPONENTIAL),
    "bandit": RuleFacts(home="shearing.data.mixture.rules.exponential:Bandit", constants=_EXPONENTIAL),
    "constant": RuleFacts(home="shearing.data.mixture.rules.constant:Constant"),
    "robust": RuleFacts(
        home="shearing.data.mixture.rules.robust:Robust",
        constants=("divergence", "floor", "loss_ema"),
        knows_prior=True,
    ),
}
"""By name, as recipes say it; constant weights are never updated, and their losses not measured."""

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]
