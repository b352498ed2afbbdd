"""Where masks start: every unit open, or graded by a metric's scores around the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shearing.errors import ShearingError
from shearing.pruning.structured import hard_concrete
from shearing.pruning.structured.granularities import Granularity
from shearing.pruning.structured.importance.registry import complete_metrics
from shearing.pruning.structured.mask_settings import BAND, MaskSettings
from shearing.pruning.structured.rounding import alternating, ranks


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
        {g.name: ranks(torch.rand(g.size, generator=generator)).float() / g.units for g in granularities},
    )


def graded_start(
    scores: Mapping[str, Tensor],
    *,
    granularities: Sequence[Granularity],
    shares: Mapping[str, float],
    final: Mapping[str, float],
    settings: MaskSettings,
) -> Start:
    """Every row graded by its scores, see `grade`.

    Args:
        scores: by granularity, higher is kept.
        granularities: what is masked.
        shares: by granularity, expected share alive of each row at the first step.
        final: by granularity, that of the target.
        settings: how much of a row is in doubt.

    Raises:
        ShearingError: there are no scores of a granularity.
    """
    if missing := [g.name for g in granularities if g.name not in scores]:
        raise ShearingError(
            "scores",
            value=f"of {', '.join(sorted(scores)) or 'nothing'}",
            allowed=f"scores of all that is masked, also of {', '.join(missing)}",
            mend="take a metric that scores everything: "
            f"{', '.join(complete_metrics())}; or the rest from one of them: {{**scores_of_it, **scores}}",
        )
    reachable = _reachable(scores, granularities=granularities)
    return Start(
        {
            g.name: grade(reachable[g.name], share=shares[g.name], final=final[g.name], settings=settings)
            for g in granularities
        },
        {g.name: ranks(reachable[g.name]).float() / g.units for g in granularities},
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


def grade(scores: Tensor, *, share: float, final: float, settings: MaskSettings) -> Tensor:
    """log_alpha by rank: a `band`, shifted so that the expected share alive of the row is `share`.

    Args:
        scores: [..., n], higher is kept.
        share: expected share alive in each row at the first step.
        final: in the end.
        settings: share in doubt, limit and temperature.

    Returns:
        [..., n] log_alpha.
    """
    limit = settings.log_alpha_limit
    graded = band(scores, share=final, first=share, settings=settings).double()
    certain = graded.abs() >= limit
    # All saturated would lose the order; 3 % is what the ramp takes back in its first steps.
    share = min(share, 0.97)
    high = graded.new_full(graded.shape[:-1], limit + BAND)
    low = -high
    for _ in range(60):
        shift = (low + high) / 2
        log_alpha = torch.where(certain, graded, graded + shift[..., None]).clamp(-limit, limit)
        alive = hard_concrete.expected_alive(log_alpha, limit=limit, temperature=settings.temperature)
        too_low = alive.mean(-1) < share
        low, high = torch.where(too_low, shift, low), torch.where(too_low, high, shift)
    return torch.where(certain, graded, graded + ((low + high) / 2)[..., None]).clamp(-limit, limit).float()


def band(scores: Tensor, *, share: float, settings: MaskSettings, first: float | None = None) -> Tensor:
    """log_alpha by rank: linear over the units in doubt around the cut, saturated on either side of them.

    The band is `units_in_doubt` ranks wide, half of it on either side of the cut; with a ramp it reaches from there to
    the first cut. Within it log_alpha falls by `BAND`. A row that is in doubt as a whole has no saturated units.

    Args:
        scores: [..., n], higher is kept.
        share: of the units of a row that is kept in the end.
        settings: share in doubt and limit.
        first: share that is kept at first, where a ramp leads from there to `share`.

    Returns:
        [..., n] log_alpha.
    """
    units, limit = scores.shape[-1], settings.log_alpha_limit
    width = settings.units_in_doubt(units)
    top, bottom = share * units - width / 2, (share if first is None else first) * units + width / 2
    place = ranks(scores) + 0.5
    graded = BAND * (0.5 - (place - top) / (bottom - top))
    if width < units:
        graded = torch.where(place < top, limit, torch.where(place > bottom, -limit, graded))
    return graded.clamp(-limit, limit).float()
