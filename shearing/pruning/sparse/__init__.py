"""One-shot sparsity: criterion x allocation x reconstruction over a pattern, block by block.

N:M means N kept of M, here and everywhere in this project.
"""

from __future__ import annotations
