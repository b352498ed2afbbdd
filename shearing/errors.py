"""The one error a user sees: which field, its value, what is allowed, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class ShearingError(ValueError):
    """What the user asked for cannot be done; raised before any expensive work starts.

    Args:
        field: dotted name of the setting or the file at fault.
        value: what was found there.
        allowed: what would have been accepted.
        mend: what to type or change.
        where: file and line, or the override, that set it.
    """

    def __init__(self, field: str, *, value: object, allowed: str, mend: str, where: str | None = None) -> None:
        self.field, self.value, self.allowed, self.mend, self.where = field, value, allowed, mend, where
        place = f"{where}: " if where else ""
        super().__init__(f"{place}{field} = {value!r}\n  allowed: {allowed}\n  to mend: {mend}")

    def __reduce__(self) -> tuple[Callable[..., ShearingError], tuple[object, ...]]:
        # What exceptions do by default calls the class with `args`: the error of a worker process would not arrive.
        return _restored, (type(self), self.args, self.__dict__)


class CombinedShearingError(ShearingError):
    """Several independent errors, reported together; the fields are those of the first.

    Args:
        errors: at least one error.
    """

    def __init__(self, errors: Sequence[ShearingError]) -> None:
        first = errors[0]
        super().__init__(first.field, value=first.value, allowed=first.allowed, mend=first.mend, where=first.where)
        self.errors = tuple(errors)
        self.args = ("\n".join(str(error) for error in errors),)


def _restored(kind: type[ShearingError], arguments: tuple[object, ...], attributes: Mapping[str, Any]) -> ShearingError:
    error = kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


def nearest_name(name: str, names: Iterable[str]) -> str:
    """'did you mean X?' for the nearest of `names`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]}?" if near else ""
