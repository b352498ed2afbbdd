"""The residual streams of all calibration sequences between two layers, kept where there is room for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Offload = Literal["none", "cpu", "disk"]


class Streams:
    """Residual streams [samples, seqlen, hidden]; a few sequences at a time are on the compute device.

    Args:
        shape: samples, seqlen, hidden.
        dtype: of the activations.
        device: the compute device.
        offload: none: all of it stays on the device; cpu: in memory; disk: in a file that is mapped into memory.
        folder: where that file is.
        name: of the file.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        offload: Offload,
        folder: Path,
        name: str = "activations",
    ) -> None:
        self._device = device
        if offload == "disk":
            file = folder / f"{name}.bin"
            file.unlink(missing_ok=True)
            count = shape[0] * shape[1] * shape[2]
            self._all = torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
        else:
            self._all = torch.empty(shape, dtype=dtype, device=device if offload == "none" else "cpu")

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self._all.shape[-1]

    def read(self, chunk: slice) -> Tensor:
        """Streams [B, S, d] of some sequences, on the device."""
        return self._all[chunk].to(self._device, copy=True)

    def write(self, chunk: slice, streams: Tensor) -> None:
        """Replace the streams of some sequences."""
        self._all[chunk] = streams.to(self._all.device)
