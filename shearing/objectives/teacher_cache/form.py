"""What every form of keeping a distribution can do, and the forms by name, as a cache's index has them.

Shapes: S positions of a row, N of several rows, K tokens of the vocabulary that are kept of each, C tokens of a chunk,
V vocabulary, R random numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pkgutil import resolve_name
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from shearing.objectives.teacher import Comparison
from shearing.objectives.teacher_cache.said import Said

FORMS: Mapping[str, str] = {
    "draws": "shearing.objectives.teacher_cache.draws:Draws",
    "top_k": "shearing.objectives.teacher_cache.top_k:TopK",
}
"""Name -> the class that is one, as `module:class`."""


@dataclass(frozen=True, kw_only=True)
class KeptOnDevice:
    """`Said` of N positions as tensors, the same by name.

    Attributes:
        label_losses, entropies, rest: [N].
        ids: int64 [N, K].
        values: [N, K].
    """

    label_losses: Tensor
    entropies: Tensor
    ids: Tensor
    values: Tensor
    rest: Tensor


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """A way to keep little of a distribution; its fields are its constants.

    Attributes:
        name: in `FORMS`.
        kind: the divergence that what is kept gives.
    """

    name: ClassVar[str]
    kind: ClassVar[str]

    def noise(self, domain: str, row: int, *, positions: int) -> npt.NDArray[np.float64]:
        """Random numbers in [0, 1) for a row, [S, R]; a function of these arguments alone."""
        del domain, row
        return np.empty((positions, 0))

    @abstractmethod
    def taken(self, p_CV: Tensor, log_p_CV: Tensor, noise_CR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept of a chunk's distributions: ids [C, K] and values [C, K] of `sorted_out`, and `Said.rest`."""

    @abstractmethod
    def sorted_out(
        self, ids_SK: npt.NDArray[np.int64], values_SK: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """`Said.ids` and `Said.values` of what was taken of a row."""

    @abstractmethod
    def encoded(self, said: Said, *, vocab_size: int) -> bytes:
        """A row as it lies on disk."""

    @abstractmethod
    def decoded(self, stored: bytes, *, positions: int, vocab_size: int) -> Said:
        """What `encoded` was given, for so many positions.

        Raises:
            ValueError: that are not the bytes of such a row.
        """

    @abstractmethod
    def compared(self, kept: KeptOnDevice, tokens: slice, log_student_CV: Tensor) -> Comparison:
        """See `Targets.compare`; the student's distributions are at temperature 1."""

    def settings(self) -> dict[str, Any]:
        """Its name and constants; JSON-able."""
        return {"name": self.name, **asdict(self)}

    @property
    def words(self) -> str:
        """The same for people."""
        return ", ".join(f"{name} {value}" for name, value in self.settings().items())


def form_of(settings: Mapping[str, Any]) -> Form:
    """The form whose `settings` these are."""
    constants = {name: value for name, value in settings.items() if name != "name"}
    make: Callable[..., Form] = resolve_name(FORMS[settings["name"]])
    return make(**constants)
