"""Losses of several models on the held-out text of the same domains: a table on disk that grows model by model."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shearing.data.corpus.format import ONE_PART
from shearing.errors import ShearingError, nearest_name
from shearing.files.durable import write_json
from shearing.settings.quantities import parse_parameter_count

KIND = "loss table"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What losses depend on besides the model; only losses under equal conditions can be compared.

    Attributes:
        corpus_fingerprint: of the domains measured, see `Corpus.fingerprint`.
        tokenizer_fingerprint: of the corpus and of every model of the table.
        sequence_length: tokens of context at the end of a row.
        tokens_per_domain: held-out tokens read of each domain, fewer where it has fewer.
        precision: dtype of the forward pass.
        split: what was read, see `Corpus.named_split`; unsaid: the one held-out part of corpora of format 2.
        attention: `full` or `documents`, see `DataRecipe`; None: nobody says, as in older tables.
        loss_across_documents: whether a document's first token counts as a label; None likewise.
    """

    corpus_fingerprint: str
    tokenizer_fingerprint: str
    sequence_length: int
    tokens_per_domain: int
    precision: str
    split: str = ONE_PART
    attention: str | None = None
    loss_across_documents: bool | None = None

    def differing(self, other: Conditions) -> list[str]:
        """Names of those that differ; what one of the two does not say does not."""
        mine, others = asdict(self), asdict(other)
        return [name for name in mine if None not in (mine[name], others[name]) and mine[name] != others[name]]


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One model.

    Attributes:
        model: folder or hub name.
        parameters: embeddings included, tied ones once.
        losses: mean loss of each domain, nats per token.
        tokens: predicted tokens of each domain; empty where nobody says.
    """

    model: str
    parameters: int
    losses: Mapping[str, float]
    tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LossTable:
    """Models and their losses.

    Attributes:
        origin: where the figures come from, for people.
        conditions: None where nobody says, as in a published table.
    """

    origin: str
    conditions: Conditions | None
    rows: tuple[LossRow, ...]

    @classmethod
    def read(cls, path: Path) -> LossTable:
        """Read a table that `write` wrote, or one made by hand.

        Args:
            path: JSON as `write` writes it, of which `rows` with `model`, `parameters` and `losses` is enough; or CSV
                with the columns `model`, `parameters` (7B or 6738415616) and one for each domain.

        Raises:
            ShearingError: it cannot be read; a row lacks something or has a loss that is none; models have different
                domains, or two have one name.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values = _from_csv(text) if path.suffix.lower() == ".csv" else json.loads(text)
            rows = [_row(row) for row in values["rows"]]
            conditions = values.get("conditions")
            table = cls(
                origin=str(values.get("origin", path)),
                conditions=None if conditions is None else Conditions(**conditions),
                rows=tuple(rows),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ShearingError):
                raise
            raise ShearingError(
                str(path),
                value=f"{type(error).__name__}: {error}",
                allowed='a loss table: JSON {"rows": [{"model": "7B", "parameters": 6738415616, "losses": '
                '{"books": 1.9}}, …]}, or CSV with the columns model, parameters and one for each domain',
                mend="correct the path or file",
            ) from error
        _refuse_mixed(table, path=path)
        return table

    def write(self, path: Path) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(path, {"kind": KIND, "format": FORMAT, **asdict(self)})

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of the first row."""
        return list(self.rows[0].losses) if self.rows else []

    def select(self, models: Sequence[str]) -> LossTable:
        """The rows of these models alone.

        Raises:
            ShearingError: there is no such model.
        """
        names = [row.model for row in self.rows]
        for model in models:
            if model not in names:
                raise ShearingError(
                    "--model",
                    value=model,
                    allowed=f"a model of the table: {', '.join(names)}",
                    mend=nearest_name(model, names) or "measure it first",
                )
        kept = tuple(row for row in self.rows if row.model in models)
        return LossTable(origin=self.origin, conditions=self.conditions, rows=kept)


def _from_csv(text: str) -> dict[str, Any]:
    rows = []
    for values in csv.DictReader(text.splitlines(), skipinitialspace=True):
        row = {"model": values.pop("model"), "parameters": values.pop("parameters")}
        rows.append({**row, "losses": {name: float(loss) for name, loss in values.items()}})
    return {"rows": rows}


def _row(values: Mapping[str, Any]) -> LossRow:
    losses = dict(values["losses"])
    for name, loss in losses.items():
        if isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss) or loss <= 0:
            raise ShearingError(
                f"loss of {values['model']} on {name}",
                value=loss,
                allowed="a finite number above 0, in nats per token",
                mend="correct it in the table",
            )
    return LossRow(
        model=str(values["model"]),
        parameters=parse_parameter_count(values["parameters"]),
        losses={str(name): float(loss) for name, loss in losses.items()},
        tokens=dict(values.get("tokens") or {}),
    )


def _refuse_mixed(table: LossTable, *, path: Path) -> None:
    names = [row.model for row in table.rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    odd = next((row for row in table.rows if set(row.losses) != set(table.domains)), None)
    if twice or odd is not None:
        differing = set() if odd is None else set(odd.losses) ^ set(table.domains)
        raise ShearingError(
            str(path),
            value=f"two rows of {', '.join(twice)}"
            if odd is None
            else f"{odd.model} and {names[0]} differ in {', '.join(sorted(differing))}",
            allowed="each model once, all with the same domains",
            mend="correct the table",
        )
