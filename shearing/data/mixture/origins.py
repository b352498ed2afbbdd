"""Where rows come from: what else than their tokens is known of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Of B rows.

    Attributes:
        domains: int64 [B] on the device, into the domains of the mixture.
        places: int64 [B, 2] on the host, the same domain and the row of it; None: rows of no corpus.
    """

    domains: Tensor
    places: Tensor | None = None
