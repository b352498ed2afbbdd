"""What a test's process needs, imported once by the server that its processes are forks of."""

from __future__ import annotations

import contextlib

from shearing.errors import ShearingError
from shearing.training.engines.deepspeed_engine import import_deepspeed

with contextlib.suppress(ShearingError):
    import_deepspeed()
