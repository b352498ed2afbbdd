"""What a model is worth: held-out loss per domain, bits per byte, speed, and the table of a run."""

from __future__ import annotations
