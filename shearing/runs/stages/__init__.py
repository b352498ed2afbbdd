"""The stages of a run, each a function of the recipe: it reads the folder of the one before and writes its own."""

from __future__ import annotations
