"""Which units of an MLP go together, and what tells of a token which of the groups it wants.

Shapes: T tokens, I units, d hidden, E experts of I / E units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def outputs_of(
    activations_TI: Tensor, down_dI: Tensor, *, groups: Tensor, chunk_tokens: int = 4096
) -> Iterator[tuple[slice, Tensor]]:
    """What each expert adds to the residual stream, fp32 [E, C, d], for some tokens at a time, and which these are."""
    for start in range(0, len(activations_TI), chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        of_experts = [activations_TI[tokens, units] @ down_dI[:, units].t() for units in groups]
        yield tokens, torch.stack(of_experts).float()


def router_of(inputs_Td: Tensor, outputs: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """Router [E, d] whose logits say which experts add most: ridge regression of the norms of what they add.

    Norms are standardised by expert over the tokens, so that all are chosen about as often.

    Args:
        inputs_Td: what the MLP reads.
        outputs: see `outputs_of`.
    """
    norms_TE = torch.cat([outputs_ECd.norm(dim=-1).t() for _, outputs_ECd in outputs])
    wanted_TE = (norms_TE - norms_TE.mean(0)) / norms_TE.std(0).clamp(min=1e-12)
    x_Td = inputs_Td.float()
    moment_dd = x_Td.t() @ x_Td
    moment_dd.diagonal().add_(RIDGE * moment_dd.diagonal().mean())
    router_Ed: Tensor = torch.linalg.solve(moment_dd, x_Td.t() @ wanted_TE).t()
    spread = (x_Td @ router_Ed.t()).std().clamp(min=1e-12)
    return router_Ed * (SPREAD / spread)


def strength_of(
    inputs_Td: Tensor, outputs: Iterable[tuple[slice, Tensor]], *, router: Tensor, active: int
) -> tuple[float, float]:
    """By what the sum of the chosen experts is multiplied, so that it is as large as that of all; and how wrong it is.

    Args:
        inputs_Td: what the MLP reads.
        outputs: see `outputs_of`.
        router: [E, d].
        active: experts that each token has.

    Returns:
        Ratio of norms over all tokens, 1 where all are chosen; and the norm of what is left over that of the whole.
    """
    logits_TE = inputs_Td.float() @ router.t()
    chosen_TE = torch.zeros_like(logits_TE).scatter_(1, logits_TE.topk(active, dim=1).indices, 1.0)
    of_whole = of_part = of_both = 0.0  # squares and product, summed over tokens
    for tokens, outputs_ECd in outputs:
        whole_Cd = outputs_ECd.sum(0).double()
        part_Cd = torch.einsum("ce,ecd->cd", chosen_TE[tokens], outputs_ECd).double()
        of_whole += float(whole_Cd.square().sum())
        of_part += float(part_Cd.square().sum())
        of_both += float((whole_Cd * part_Cd).sum())
    least = 1e-24
    strength = (of_whole / max(of_part, least)) ** 0.5 if active < len(router) else 1.0
    left = max(0.0, of_whole - 2 * strength * of_both + strength**2 * of_part)
    return strength, (left / max(of_whole, least)) ** 0.5
