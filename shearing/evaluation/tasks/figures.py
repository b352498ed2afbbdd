"""What a model reached on tasks, as people read it: shares in percent with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHARES = ("acc", "exact_match", "em", "f1")

INTERVAL = 1.96
"""Standard errors on either side of a figure that hold 95 % of a normal distribution."""


def is_share(result: Mapping[str, Any]) -> bool:
    """Whether the metric that is shown lies between 0 and 1, the higher the better."""
    return str(result["metric"]).startswith(_SHARES)


def written(result: Mapping[str, Any]) -> str:
    """The figure that is shown, with its standard error where there is one: 64.2±3.4, in percent if it is a share."""
    value, error = result["value"], result["stderr"]
    if value is None:
        return "–"
    if not is_share(result):
        return f"{value:.3g}" + ("" if error is None else f"±{error:.2g}")
    # A full hundred needs no decimal, and would not fit a cell with one.
    text = "100" if value > 0.9995 else f"{100 * value:.1f}"
    return text + ("" if error is None else f"±{100 * error:.1f}")


def in_words(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All tasks of a model in a line."""
    return ", ".join(f"{name} {written(each)}{' %' * is_share(each)}" for name, each in results.items())


def mean_share(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean over tasks of the figures that are shares, each task counted once; None where there is none."""
    shares = [each["value"] for each in results.values() if is_share(each) and each["value"] is not None]
    return sum(shares) / len(shares) if shares else None
