"""Reference losses: what each domain's loss is compared with when weights are updated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from shearing.data.recipe import MixtureRecipe
from shearing.errors import ShearingError, key, nearest_name
from shearing.files.durable import write_json

FIELD = "reference"

_MEASURE_AGAIN = "measure them again with `shear data reference-loss`, on this corpus and at this length"
# What `shear data reference-loss measure` cannot do otherwise.
_MENDS = {"loss_across_documents": f"set {key(FIELD)} to source, whose losses are over the labels of this run"}


def resolve_reference(
    mixture: MixtureRecipe,
    *,
    domains: Iterable[str],
    measure_source: Callable[[], Mapping[str, float]],
    conditions: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Reference loss of every domain, from the recipe, a JSON file, or the source model's own loss.

    With `online` it is the source's loss that holds until there is a prediction. With `teacher` there is none: the
    teacher's loss comes with the text of each update.

    The paper predicts it from scaling laws over a model family (section 2.2); where there is no family, the source
    model's loss serves as well (its appendix F.4).

    Args:
        mixture: whose `reference` is a mapping, a path to a JSON object {domain: loss} or to one that has such an
            object under `losses` (what `shear data reference-loss` writes), `source`, `online` or `teacher`.
        domains: domains that need one; others in the mapping are ignored.
        measure_source: called only for `source` and `online`; the source model's mean held-out loss by domain, in nats.
        conditions: of this run, `tokenizer_fingerprint`, `sequence_length` and `loss_across_documents`; a file that
            names others is refused, as losses per token cannot be compared then.

    Raises:
        ShearingError: the file cannot be read or was measured otherwise, or a domain has no finite positive loss in it.
    """
    given = mixture.reference
    if given == "teacher":
        return {}
    if given in ("source", "online"):
        losses: Mapping[str, object] = measure_source()
        origin = "the source model"
    elif isinstance(given, Mapping):
        losses, origin = given, "the recipe"
    else:
        losses, origin = _read(Path(given), conditions=conditions or {}), str(given)
    return {name: _loss(name, losses=losses, origin=origin) for name in domains}


def write_reference(
    path: Path, *, losses: Mapping[str, float], parameters: int, method: str, provenance: Mapping[str, object]
) -> None:
    """Write reference losses in the form that `mixture.reference` reads.

    Args:
        path: JSON file.
        losses: of each domain, nats per token.
        parameters: size of the model whose losses they are meant to be, embeddings included.
        method: how they were found, for people.
        provenance: what they were found from, with `conditions` where they are known; JSON-able.
    """
    write_json(
        path,
        {
            "kind": "reference losses",
            "format": 1,
            "losses": dict(losses),
            "parameters": parameters,
            "method": method,
            **provenance,
        },
    )


def measured_conditions(path: Path) -> Mapping[str, object]:
    """What losses in a file were measured under, by the names of `Conditions`; empty: it does not say.

    Raises:
        ShearingError: the file cannot be read.
    """
    return _conditions_in(_load(path))


def _read(path: Path, *, conditions: Mapping[str, object]) -> Mapping[str, object]:
    losses = _load(path)
    _require_conditions(_conditions_in(losses), path=path, conditions=conditions)
    within = losses.get("losses", losses) if isinstance(losses, Mapping) else losses
    # A domain may be called losses.
    losses = within if isinstance(within, Mapping) else losses
    if not isinstance(losses, Mapping):
        raise ShearingError(FIELD, value=str(path), allowed='a JSON object such as {"books": 2.1}', mend="correct it")
    return losses


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ShearingError(
            FIELD,
            value=f"{path} ({error})",
            allowed='a JSON file such as {"books": 2.1}',
            mend="correct the path or file",
        ) from error


def _conditions_in(read: object) -> Mapping[str, object]:
    if isinstance(read, Mapping):
        # Fits of earlier versions have them in the table.
        for holder in (read, read.get("table")):
            if isinstance(holder, Mapping) and isinstance(found := holder.get("conditions"), Mapping):
                return found
    return {}  # numbers by hand, or published ones: nothing is known of them


def _require_conditions(measured: Mapping[str, object], *, path: Path, conditions: Mapping[str, object]) -> None:
    for name, mine in conditions.items():
        found = measured.get(name)
        if found is not None and found != mine:
            raise ShearingError(
                FIELD,
                value=f"{path}, measured with {name} {found}",
                allowed=f"losses measured as this run measures its own: {name} {mine}",
                mend=_MENDS.get(name, _MEASURE_AGAIN),
            )


def _loss(name: str, *, losses: Mapping[str, object], origin: str) -> float:
    if name not in losses:
        near = nearest_name(name, losses)
        raise ShearingError(
            FIELD,
            value=f"nothing for domain {name} in {origin}",
            allowed=f"a loss for each domain; there are: {', '.join(losses) or 'none'}",
            mend=near or f"add a loss for {name}, or set {key(FIELD)} to source",
        )
    loss = losses[name]
    if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not math.isfinite(loss) or loss <= 0:
        raise ShearingError(
            f"{key(FIELD)}.{name}",
            value=loss,
            allowed="a finite number above 0, in nats per token",
            mend=f"correct it in {origin}",
        )
    return float(loss)
