"""From raw text to tokenised domains; the demo's model and text."""

from __future__ import annotations
