"""Where masks start: every unit open, or graded by a metric's scores around the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.pruning.structured import hard_concrete
from shearing.pruning.structured.granularities import Granularity
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.rounding import alternating


@dataclass(frozen=True)
class Start:
    """Where masks start.

    Attributes:
        log_alpha: by granularity.
        order: by granularity, rank of each unit in its row from 0, the best, over the length of the row; by chance
            where all units start alike, so that those of a low index are not kept for it.
    """

    log_alpha: dict[str, Tensor]
    order: dict[str, Tensor]


def open_start(granularities: Sequence[Granularity], *, settings: MaskSettings) -> Start:
    """Every unit as open as it can be: the paper's."""
    generator = torch.Generator().manual_seed(settings.seed)
    return Start(
        {g.name: torch.full(g.size, settings.log_alpha_limit) for g in granularities},
        {g.name: _ranks(torch.rand(g.size, generator=generator)).float() / g.units for g in granularities},
    )


def graded_start(
    scores: Mapping[str, Tensor],
    *,
    granularities: Sequence[Granularity],
    shares: Mapping[str, float],
    settings: MaskSettings,
) -> Start:
    """Every row graded by its scores, see `grade`.

    Args:
        scores: by granularity, higher is kept.
        granularities: what is masked.
        shares: by granularity, expected share alive of each row.
        settings: how steeply.
    """
    reachable = _reachable(scores, granularities=granularities)
    return Start(
        {g.name: grade(reachable[g.name], share=shares[g.name], settings=settings) for g in granularities},
        {g.name: _ranks(reachable[g.name]).float() / g.units for g in granularities},
    )


def _reachable(scores: Mapping[str, Tensor], *, granularities: Sequence[Granularity]) -> Mapping[str, Tensor]:
    """Scores whose best units can be kept together: sub-layers that rounding would drop come last.

    Attention and MLP sub-layers are compared by their share of their kind's total: what one of them does to the
    residual stream says little about what the other kind does.
    """
    keep = {g.name: g.target for g in granularities}
    attention, mlp = keep.get("attention"), keep.get("mlp")
    if attention is None or mlp is None:
        return scores
    shares = {name: scores[name] / scores[name].sum() for name in ("attention", "mlp")}
    kept_attention, kept_mlp = alternating(shares["attention"], shares["mlp"], keep=attention)
    return {**scores, "attention": shares["attention"] + kept_attention, "mlp": shares["mlp"] + kept_mlp}


def grade(scores: Tensor, *, share: float, settings: MaskSettings) -> Tensor:
    """log_alpha graded by rank, rows shifted so that the expected share alive is `share`.

    From one unit of a row to the next best it falls by `2 * warm_start_scale / n`, and by no less than
    `warm_start_step`, all within the limit. So the scale says what share of a row starts in doubt, and the step how
    many units at most.

    Args:
        scores: [..., n], higher is kept.
        share: expected share alive in each row.
        settings: scale, step, limit and temperature.

    Returns:
        [..., n] log_alpha.
    """
    units, limit = scores.shape[-1], settings.log_alpha_limit
    scale = max(settings.warm_start_scale, settings.warm_start_step * units / 2)
    spread = scale * (1 - 2 * (_ranks(scores) + 0.5) / units)
    low = torch.full(scores.shape[:-1], -limit - scale, dtype=torch.float64)
    high = -low
    # All saturated would lose the order; 3 % is what the ramp takes back in its first steps.
    share = min(share, 0.97)
    for _ in range(60):
        shift = (low + high) / 2
        log_alpha = (spread + shift[..., None]).clamp(-limit, limit)
        alive = hard_concrete.expected_alive(log_alpha, limit=limit, temperature=settings.temperature)
        too_low = alive.mean(-1) < share
        low, high = torch.where(too_low, shift, low), torch.where(too_low, high, shift)
    return (spread + ((low + high) / 2)[..., None]).clamp(-limit, limit).float()


def _ranks(scores: Tensor) -> Tensor:
    """Rank of each unit in its row from 0, the best, in double precision; ties to the lower index."""
    order = torch.argsort(scores.float(), dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1).double()
