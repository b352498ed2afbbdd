"""Training: objectives, engine, checkpoints, metrics and the one loop that both stages share."""

from __future__ import annotations
