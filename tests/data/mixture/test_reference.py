from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from shearing.data.mixture.reference import resolve_reference, write_reference
from shearing.errors import ShearingError


def reference(given: object) -> dict[str, float]:
    return resolve_reference(
        SimpleNamespace(reference=given),  # type: ignore[arg-type]
        domains=["books", "code"],
        measure_source=lambda: {"books": 3.5, "code": 2.5},
    )


def test_references_from_recipe_file_and_source(tmp_path: Path) -> None:
    assert reference("source") == reference("online") == {"books": 3.5, "code": 2.5}
    assert reference({"books": 1, "code": 2.0, "more": 9.0}) == {"books": 1.0, "code": 2.0}
    file = tmp_path / "reference.json"
    file.write_text(json.dumps({"books": 1.25, "code": 2.5}))
    assert reference(file) == {"books": 1.25, "code": 2.5}


def test_a_file_may_say_where_its_losses_come_from(tmp_path: Path) -> None:
    file = tmp_path / "reference.json"
    write_reference(
        file, losses={"books": 1.25, "code": 2.5}, parameters=10, method="by hand", provenance={"of": "nobody"}
    )
    assert reference(file) == {"books": 1.25, "code": 2.5}
    file.write_text(json.dumps({"books": 1.25, "code": 2.5, "losses": 3.0}))
    assert reference(file) == {"books": 1.25, "code": 2.5}


def test_losses_that_were_measured_otherwise_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "reference.json"
    measured = {"tokenizer_fingerprint": "abc", "sequence_length": 4096, "loss_across_documents": True}

    def write(**provenance: object) -> None:
        write_reference(file, losses={"books": 1.0}, parameters=10, method="", provenance=provenance)

    def resolve(**conditions: object) -> dict[str, float]:
        mixture = SimpleNamespace(reference=file)
        return resolve_reference(mixture, domains=["books"], measure_source=dict, conditions=conditions)  # type: ignore[arg-type]

    # The latter as fits of earlier versions have them.
    for provenance in ({"conditions": measured}, {"conditions": None, "table": {"conditions": measured}}):
        write(**provenance)
        assert resolve(tokenizer_fingerprint="abc", sequence_length=4096) == {"books": 1.0}
        with pytest.raises(ShearingError, match="measured with sequence_length 4096"):
            resolve(tokenizer_fingerprint="abc", sequence_length=2048)
        with pytest.raises(ShearingError, match="measured with tokenizer_fingerprint abc"):
            resolve(tokenizer_fingerprint="abd", sequence_length=4096)
        with pytest.raises(ShearingError, match="measured with loss_across_documents True") as raised:
            resolve(tokenizer_fingerprint="abc", sequence_length=4096, loss_across_documents=False)
        assert "set reference to source" in raised.value.mend
    for unsaid in ({}, {"loss_across_documents": None}):
        write(conditions={"sequence_length": 4096, **unsaid})
        assert resolve(sequence_length=4096, loss_across_documents=False) == {"books": 1.0}


def test_reference_errors(tmp_path: Path) -> None:
    file = tmp_path / "reference.json"
    with pytest.raises(ShearingError, match="correct the path"):
        reference(file)
    file.write_text("[1]")
    with pytest.raises(ShearingError, match="JSON object"):
        reference(file)
    with pytest.raises(ShearingError, match="did you mean cod"):
        reference({"books": 1.0, "cod": 2.0})
    with pytest.raises(ShearingError, match=r"set reference to source"):
        reference({"books": 1.0})
    for bad in (math.nan, -1.0, "2", None, True):
        with pytest.raises(ShearingError, match="nats"):
            reference({"books": 1.0, "code": bad})
