"""What tensors are alive while something is computed with fake ones: sizes without memory, op by op.

Fake tensors have shapes and storages of a size, and no numbers. Each storage that an operator makes is noted when it
appears and when it goes, so what is alive is known after every operator: what a caching allocator would have to hold,
without fragmentation and without what kernels take for themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import override

Bytes = tuple[int, int, int]
"""Of what is alive: activations and all that has no other name, copies of weights, gradients of weights."""

_ACTIVATIONS, _COPIES, _GRADIENTS = range(3)
_CAST = "aten._to_copy.default"


@dataclass
class Interval:
    """What was alive between two marks.

    Attributes:
        accumulated: parameters that had their gradient when it began.
        operators: those that were called, in their order.
        alive: bytes after each call.
    """

    accumulated: int
    operators: list[str] = field(default_factory=list)
    alive: list[Bytes] = field(default_factory=list)


class LiveMemory(TorchDispatchMode):
    """Records what operators inside the `with` leave alive.

    Args:
        weights: tensors that are there already; they are not counted, and what is cast from them is a copy.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {id(weight.untyped_storage()): weight.untyped_storage() for weight in weights}
        self._alive: dict[int, tuple[int, Any]] = {}  # id of a storage -> its number, and what tells of its end
        self._sizes: list[int] = []  # of every storage by its number
        self._kinds: list[int] = []
        # A storage that came (its number), one that went (-1 - its number), a call (a name), a mark (None, name, …).
        self._events: list[Any] = []

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and notes what it made."""
        result = func(*args, **(kwargs or {}))
        kind = _COPIES if str(func) == _CAST and self._is_weight(args[0]) else _ACTIVATIONS
        tensors = [value for value in tree_iter(result) if isinstance(value, Tensor)]
        for tensor in tensors:
            self._note(tensor, kind=kind)
        if tensors:  # what asks for a device or a size comes when it comes
            self._events.append(str(func))
        return result

    def mark(self, name: str) -> None:
        """Ends an interval, which has this name."""
        self._events.append((name, 0))

    def accumulated(self, parameter: Tensor, *, name: str) -> None:
        """Ends an interval, which has this name: a parameter has its gradient, which is not counted from here on."""
        gradient = parameter.grad
        assert gradient is not None
        number, _ = self._alive.get(id(gradient.untyped_storage()), (None, None))
        if number is not None:
            self._kinds[number] = _GRADIENTS
        parameter.grad = None
        del gradient
        self._events.append((name, parameter.numel()))

    def intervals(self) -> Iterator[tuple[str, Interval]]:
        """Every interval with its name, in their order."""
        alive, accumulated = [0, 0, 0], 0
        interval = Interval(accumulated)
        for event in self._events:
            if isinstance(event, int):
                number, sign = (event, 1) if event >= 0 else (-1 - event, -1)
                alive[self._kinds[number]] += sign * self._sizes[number]
            elif isinstance(event, str):
                interval.operators.append(event)
                interval.alive.append((alive[0], alive[1], alive[2]))
            else:
                name, parameters = event
                yield name, interval
                accumulated += parameters
                interval = Interval(accumulated)

    def _note(self, tensor: Tensor, *, kind: int) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._alive or id(storage) in self._weights:
            return
        number, place = len(self._sizes), id(storage)
        self._sizes.append(storage.nbytes())
        self._kinds.append(kind)

        def gone(_: object) -> None:
            self._alive.pop(place, None)
            self._events.append(-1 - number)

        self._alive[place] = (number, weakref.ref(storage, gone))
        self._events.append(number)

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value.untyped_storage()) in self._weights
