"""Masks while weights are trained: learned, or unit after unit taken out. One file for each way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.structured.masking.learned import Masking

__all__ = ["Masking"]

__getattr__ = late(__name__, {"Masking": "learned"})
