"""Where this repository and the files that it ships are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
