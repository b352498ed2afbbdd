"""Learning which units to keep: hard-concrete masks under Lagrangian constraints on the exact target shape."""

from __future__ import annotations
