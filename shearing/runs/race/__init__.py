"""A race: every way to choose what goes, at one shape, on the same samples, at the same learning rates."""

from __future__ import annotations
