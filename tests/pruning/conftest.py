"""What all tests of one-shot sparsity share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the cache of the one who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SHEARING_CACHE", str(folder))
    return folder
