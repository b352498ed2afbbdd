"""What an export says at its end: each sort of layer, its ratios, converted or why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from shearing.pruning.calibration.places import Matrix
from shearing.settings.quantities import format_parameters


@dataclass(frozen=True)
class Verdict:
    """What becomes of a layer.

    Attributes:
        refusal: why it stays dense, in two words; None if it is converted.
        detail: the same in a sentence.
        backend: the best one, where it was timed.
        ratios: tokens at a time -> speed of `backend` over that of dense.
    """

    refusal: str | None
    detail: str
    backend: str | None = None
    ratios: Mapping[int, float] = field(default_factory=dict)

    @property
    def converted(self) -> bool:
        """Whether it is converted."""
        return self.refusal is None

    def described(self) -> dict[str, Any]:
        """As JSON."""
        reason = {} if self.converted else {"reason": f"{self.refusal}: {self.detail}"}
        timed = {"backend": self.backend, "ratios": {str(tokens): round(of, 4) for tokens, of in self.ratios.items()}}
        return {**reason, **(timed if self.backend else {})}


def print_summary(verdicts: Mapping[Matrix, Verdict], *, batches: Sequence[int], console: Console) -> None:
    """Print a row for layers that differ in nothing but their number, why some stay dense, and totals.

    Args:
        verdicts: of every linear layer, in the model's order.
        batches: tokens at a time.
        console: where.
    """
    rows: dict[tuple[str, tuple[int, int], str], list[tuple[Matrix, Verdict]]] = {}
    for matrix, verdict in verdicts.items():
        key = (_kind(matrix), (matrix.rows, matrix.columns), verdict.refusal or "")
        rows.setdefault(key, []).append((matrix, verdict))
    columns = sorted(set(batches))
    table = Table(title="speed of 2:4 layers over dense ones, by tokens at a time", title_justify="left")
    table.add_column("layers")
    for name in ("number", "outputs × inputs", *(f"{tokens:,}" for tokens in columns)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for (kind, _, refusal), members in rows.items():
        matrix, verdict = members[0]
        ratios = [f"{verdict.ratios[tokens]:.2f}" if tokens in verdict.ratios else "–" for tokens in columns]
        result = f"dense: {refusal}" if refusal else f"2:4, {verdict.backend}"
        table.add_row(kind, str(len(members)), f"{matrix.rows} × {matrix.columns}", *ratios, result)
    console.print(table)
    for (_, _, refusal), members in rows.items():
        if refusal in ("not 2:4", "not aligned", "wrong"):
            matrix, verdict = members[0]
            others = f", and {len(members) - 1} more layers like it" if len(members) > 1 else ""
            text = f"{matrix.name} is {refusal} ({verdict.detail}){others}"
            console.print(text, soft_wrap=True, highlight=False)
    converted = [matrix for matrix, verdict in verdicts.items() if verdict.converted]
    console.print(
        f"{len(converted)} of {len(verdicts)} linear layers are faster as 2:4: "
        f"{format_parameters(sum(matrix.size for matrix in converted))} of "
        f"{format_parameters(sum(matrix.size for matrix in verdicts))} weights in them",
        soft_wrap=True,
        highlight=False,
    )


def _kind(matrix: Matrix) -> str:
    """The layer's name inside its decoder layer."""
    return matrix.name.removesuffix(".weight").partition(f".{matrix.layer}.")[2]
