"""Linear layers whose weights are 2:4, on GPUs that multiply them faster: measured, exported, loaded.

N:M means N kept of M. `load` gives the model that `shear export --semi-structured` wrote.
"""

from __future__ import annotations

from shearing.pruning.sparse.semi_structured.loading import load

__all__ = ["load"]
