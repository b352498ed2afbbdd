"""What a model is worth: held-out losses, speed, and the table of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.evaluation.heldout import DomainLoss, heldout_loss, macro_mean
    from shearing.evaluation.speed import measure_speed
    from shearing.evaluation.table import comparison_table
    from shearing.evaluation.text_bytes import token_bytes

__all__ = ["DomainLoss", "comparison_table", "heldout_loss", "macro_mean", "measure_speed", "token_bytes"]

__getattr__ = late(
    __name__,
    {
        "DomainLoss": "heldout",
        "comparison_table": "table",
        "heldout_loss": "heldout",
        "macro_mean": "heldout",
        "measure_speed": "speed",
        "token_bytes": "text_bytes",
    },
)
