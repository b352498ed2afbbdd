"""Hugging Face's `Trainer`, and what is derived from it: mask learning as a callback, our samples as its data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.integrations.trainer.callback import LearnMasks
    from shearing.integrations.trainer.rows import MixtureRows

__all__ = ["LearnMasks", "MixtureRows"]

__getattr__ = late(__name__, {"LearnMasks": "callback", "MixtureRows": "rows"})
