from __future__ import annotations

import math

import pytest

from shearing.data.mixture.weights import resolve_weights
from shearing.errors import ShearingError


def test_resolve_weights() -> None:
    tokens = {"books": 300, "code": 100}
    assert resolve_weights("uniform", tokens=tokens) == {"books": 0.5, "code": 0.5}
    assert resolve_weights("proportional", tokens=tokens) == {"books": 0.75, "code": 0.25}
    assert resolve_weights({"code": 6.0, "books": 2.0}, tokens=tokens) == {"books": 0.25, "code": 0.75}
    for weights, message in (
        ({"books": 1.0, "cod": 1.0}, "did you mean code"),
        ({"books": 1.0}, "nothing for domain code"),
        ({"books": 1.0, "code": -1.0}, r"^initial_weights\.code = -1"),
        ({"books": 1.0, "code": math.nan}, "at least 0"),
        ({"books": 0.0, "code": 0.0}, "above 0"),
    ):
        with pytest.raises(ShearingError, match=message):
            resolve_weights(weights, tokens=tokens)
