"""From a loss table to the reference losses of a size: one law a domain, what it predicts, and how far to trust it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shearing.data.mixture.reference import write_reference
from shearing.errors import ShearingError
from shearing.evaluation.reference_losses.power_law import CONSTANTS, PowerLaw, fit_power_law, leave_one_out
from shearing.evaluation.reference_losses.table import LossTable
from shearing.settings.quantities import format_count


@dataclass(frozen=True, kw_only=True)
class DomainFit:
    """The law of one domain.

    Attributes:
        law: fitted to all models of the table.
        predicted: its loss at the target size, nats per token.
        residuals: predicted less measured at each model.
        errors: the same at each model for a law fitted to the others; None for three sizes, which leave no model to
            spare.
        unbounded: the same law with c free, where c >= 0 was asked for and makes a difference.
    """

    law: PowerLaw
    predicted: float
    residuals: list[float]
    errors: list[float] | None
    unbounded: PowerLaw | None


@dataclass(frozen=True, kw_only=True)
class ReferenceFit:
    """Reference losses of a size.

    Attributes:
        table: what was fitted to.
        parameters: the size, embeddings included.
        bounded: whether c >= 0 was asked for.
        factor: how far the size is outside of the table's: 1 inside, 5 where it is five times smaller than the
            smallest or larger than the largest.
        domains: one fit each.
    """

    table: LossTable
    parameters: int
    bounded: bool
    factor: float
    domains: Mapping[str, DomainFit]

    @property
    def losses(self) -> dict[str, float]:
        """Predicted loss of each domain, nats per token."""
        return {name: fit.predicted for name, fit in self.domains.items()}

    def write(self, path: Path) -> None:
        """Write what `mixture.reference` reads, with where it comes from."""
        conditions = self.table.conditions
        write_reference(
            path,
            losses=self.losses,
            parameters=self.parameters,
            method=_method(bounded=self.bounded),
            provenance={
                "conditions": None if conditions is None else vars(conditions),
                "extrapolated_by": self.factor,
                "laws": {name: _as_json(fit) for name, fit in self.domains.items()},
                "table": {
                    "origin": self.table.origin,
                    "models": {row.model: row.parameters for row in self.table.rows},
                },
            },
        )


def fit_reference(
    table: LossTable, *, parameters: int, bounded: bool = True, extrapolate: bool = False
) -> ReferenceFit:
    """Fit L(N) = a N^-b + c to each domain of a table and predict at a size.

    Args:
        table: at least three models of different sizes.
        parameters: the size, embeddings included.
        bounded: c >= 0.
        extrapolate: allow a size outside of the table's.

    Raises:
        ShearingError: too few sizes, losses that do not fall with size, or a size outside without `extrapolate`.
    """
    sizes = [float(row.parameters) for row in table.rows]
    factor = max(1.0, min(sizes, default=1.0) / parameters, parameters / max(sizes, default=1.0))
    fits = {}
    for name in table.domains or ["(none)"]:
        losses = [row.losses[name] for row in table.rows]
        try:
            law = fit_power_law(sizes, losses=losses, bounded=bounded)
            errors = leave_one_out(sizes, losses=losses, bounded=bounded)
        except ShearingError as error:
            raise ShearingError(
                f"{error.field} (domain {name})", value=error.value, allowed=error.allowed, mend=error.mend
            ) from error
        free = fit_power_law(sizes, losses=losses, bounded=False) if bounded and law.offset == 0.0 else None
        fits[name] = DomainFit(
            law=law,
            predicted=law.at(parameters),
            residuals=[law.at(size) - loss for size, loss in zip(sizes, losses, strict=True)],
            errors=errors,
            unbounded=free,
        )
    if factor > 1.0 and not extrapolate:
        smallest, largest = (format_count(round(size, -7)) for size in (int(min(sizes)), int(max(sizes))))
        raise ShearingError(
            "--at",
            value=format_count(parameters),
            allowed=f"a size within the table's, {smallest} to {largest}; this is {factor:.1f} times outside",
            mend="measure models nearer to it, or say --extrapolate",
        )
    return ReferenceFit(table=table, parameters=parameters, bounded=bounded, factor=factor, domains=fits)


def render(fit: ReferenceFit) -> RenderableType:
    """The fit for a terminal: constants, predictions, errors, and what to beware of."""
    left_out = any(each.errors for each in fit.domains.values())
    heading = f"at {fit.parameters:,}"
    table = Table("domain", box=None, pad_edge=False, header_style="bold")
    columns = ["a", "b", "c", heading, "largest residual", *(["largest error, left out"] if left_out else [])]
    for name in columns:
        table.add_column(name, justify="right")
    for name, each in fit.domains.items():
        cells = [f"{each.law.a:.4g}", f"{each.law.exponent:.4f}", f"{each.law.offset:.4f}", f"{each.predicted:.4f}"]
        cells.append(f"{max(map(abs, each.residuals)):.4f}")
        cells += [f"{max(map(abs, each.errors)):.4f}"] if each.errors else []
        table.add_row(name, *cells)
    return Group(Text(_method(bounded=fit.bounded)), "", table, *(Text(note) for note in _notes(fit)))


def _notes(fit: ReferenceFit) -> Iterator[str]:
    if not any(each.errors for each in fit.domains.values()):
        yield (
            f"no error estimate: {CONSTANTS} sizes determine {CONSTANTS} constants, "
            "a fourth would say how well others are met"
        )
    if fit.factor > 1.0:
        yield f"extrapolated: {fit.factor:.1f} times outside of the sizes of the table"
    for name, each in fit.domains.items():
        if each.unbounded is not None:
            free = each.unbounded.at(fit.parameters)
            yield (
                f"{name}: c is at its bound; unbounded c = {each.unbounded.offset:.2f}, b = "
                f"{each.unbounded.exponent:.3f}, and {free:.4f} at the target ({each.predicted - free:+.4f} here)"
            )
        elif each.law.offset < 0:
            yield f"{name}: c = {each.law.offset:.2f} is no entropy: this law has no meaning far outside of the table"
        if each.law.exponent <= 0.001 or each.law.exponent >= 3.9:
            yield f"{name}: b is at an end of what is tried; these losses do not follow the law"


def _method(*, bounded: bool) -> str:
    return "L(N) = a N^-b + c of each domain, N with embeddings" + (", a > 0, b > 0, c >= 0" if bounded else ", c free")


def _as_json(fit: DomainFit) -> dict[str, Any]:
    values: dict[str, Any] = {
        "a": fit.law.a,
        "b": fit.law.exponent,
        "c": fit.law.offset,
        "residuals": fit.residuals,
        "leave_one_out": fit.errors,
    }
    if fit.unbounded is not None:
        values["unbounded"] = {"a": fit.unbounded.a, "b": fit.unbounded.exponent, "c": fit.unbounded.offset}
    return values
