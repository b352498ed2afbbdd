"""Which units of an MLP go together, and what tells of a token which of the groups it wants.

Shapes: T tokens, I units, d hidden, E experts of I / E units.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 10
SPREAD = 0.01
"""Standard deviation of a router's logits: the order among experts counts, and their weights stay within a percent."""
RIDGE = 0.01
"""Share of the mean diagonal that is added to the inputs' second moment."""


def at_random(units: int, *, experts: int, generator: torch.Generator) -> Tensor:
    """Units [E, I / E], drawn by chance."""
    return torch.randperm(units, generator=generator).view(experts, -1).sort(1).values


def by_coactivation(activations_TI: Tensor, *, experts: int, generator: torch.Generator) -> Tensor:
    """Units [E, I / E] that are active on the same tokens: k-means on |activation| by unit, with groups of one size.

    Units and centres are compared by cosine; centres begin at units that are unlike each other. In each of `ITERATIONS`
    rounds the surest of all pairs of a unit and a centre is taken first, among centres that have room.

    Args:
        activations_TI: what the output projection reads.
        experts: E, which divides I.
        generator: draws the unit that the first centre begins at.
    """
    size = activations_TI.shape[1] // experts
    profiles_IT = torch.nn.functional.normalize(activations_TI.abs().t().float(), dim=1)
    centres_ET = _far_apart(profiles_IT, experts=experts, generator=generator)
    groups = torch.empty(0)
    for _ in range(ITERATIONS):
        found = _equal_groups((profiles_IT @ centres_ET.t()).cpu(), size=size)
        if groups.shape == found.shape and torch.equal(groups, found):
            break
        groups = found
        centres_ET = torch.nn.functional.normalize(profiles_IT[found.to(profiles_IT.device)].mean(1), dim=1)
    return groups


def _far_apart(profiles_IT: Tensor, *, experts: int, generator: torch.Generator) -> Tensor:
    """Units [E, T], the first drawn, each next the one least like any before."""
    chosen = [int(torch.randint(len(profiles_IT), (), generator=generator))]
    nearest_I = profiles_IT @ profiles_IT[chosen[0]]
    nearest_I[chosen[0]] = float("inf")
    while len(chosen) < experts:
        chosen.append(int(nearest_I.argmin()))
        nearest_I = torch.maximum(nearest_I, profiles_IT @ profiles_IT[chosen[-1]])
        nearest_I[chosen[-1]] = float("inf")
    return profiles_IT[chosen]


def _equal_groups(likeness_IE: Tensor, *, size: int) -> Tensor:
    units, experts = likeness_IE.shape
    room = [size] * experts
    members: list[list[int]] = [[] for _ in range(experts)]
    placed = [False] * units
    for pair in likeness_IE.flatten().sort(descending=True, stable=True).indices.tolist():
        unit, expert = divmod(pair, experts)
        if not placed[unit] and room[expert]:
            placed[unit] = True
            room[expert] -= 1
            members[expert].append(unit)
    return torch.tensor([sorted(each) for each in members])


def outputs_of(activations_TI: Tensor, down_dI: Tensor, *, groups: Tensor) -> Tensor:
    """What each expert adds to the residual stream, [E, T, d]."""
    return torch.stack([activations_TI[:, units] @ down_dI[:, units].t() for units in groups])


def router_of(inputs_Td: Tensor, outputs_ETd: Tensor) -> Tensor:
    """Router [E, d] whose logits say which experts add most: ridge regression of the norms of what they add.

    Norms are standardised by expert over the tokens, so that all are chosen about as often.
    """
    norms_TE = outputs_ETd.float().norm(dim=-1).t()
    wanted_TE = (norms_TE - norms_TE.mean(0)) / norms_TE.std(0).clamp(min=1e-12)
    x_Td = inputs_Td.float()
    moment_dd = x_Td.t() @ x_Td
    moment_dd.diagonal().add_(RIDGE * moment_dd.diagonal().mean())
    router_Ed: Tensor = torch.linalg.solve(moment_dd, x_Td.t() @ wanted_TE).t()
    spread = (x_Td @ router_Ed.t()).std().clamp(min=1e-12)
    return router_Ed * (SPREAD / spread)


def strength_of(inputs_Td: Tensor, outputs_ETd: Tensor, *, router: Tensor, active: int) -> tuple[float, float]:
    """By what the sum of the chosen experts is multiplied, so that it is as large as that of all; and how wrong it is.

    Returns:
        Ratio of norms over all tokens, 1 where all are chosen; and the norm of what is left over that of the whole.
    """
    logits_TE = inputs_Td.float() @ router.t()
    chosen_TE = torch.zeros_like(logits_TE).scatter_(1, logits_TE.topk(active, dim=1).indices, 1.0)
    whole_Td = outputs_ETd.float().sum(0)
    part_Td = torch.einsum("te,etd->td", chosen_TE, outputs_ETd.float())
    strength = float(whole_Td.norm() / part_Td.norm().clamp(min=1e-12)) if active < len(outputs_ETd) else 1.0
    return strength, float((whole_Td - strength * part_Td).norm() / whole_Td.norm().clamp(min=1e-12))
