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
        home: module of this package and class in it.
        constants: keys of the section `mixture` that are arguments of the class.
        knows_prior: whether the weights before the first update are another one, `prior`.
    """

    home: str
    constants: tuple[str, ...] = ()
    knows_prior: bool = False


_EXPONENTIAL = ("step_size", "smoothing")

RULES: Mapping[str, RuleFacts] = {
    "paper": RuleFacts(home="exponential.Paper", constants=_EXPONENTIAL),
    "released": RuleFacts(home="exponential.Released", constants=_EXPONENTIAL),
    "bandit": RuleFacts(home="exponential.Bandit", constants=_EXPONENTIAL),
    "constant": RuleFacts(home="constant.Constant"),
    "robust": RuleFacts(home="robust.Robust", constants=("divergence", "floor", "loss_ema"), knows_prior=True),
}
"""By name, as recipes say it; constant weights are never updated, and their losses not measured."""

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]
