"""Where each dimension of a model lives, how to mask it and how to cut it; knows nothing of how masks are learned."""

from __future__ import annotations
