"""The one error a user sees: which field, its value, what is allowed, how to mend it.

A component says it in its own words, the names of its arguments. Whoever hands a recipe's keys to it renames them.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

_MARK = "\0"


def key(name: str) -> str:
    """The name of a setting for the text of an error, where renaming finds it."""
    return f"{_MARK}{name}{_MARK}"


class ShearingError(ValueError):
    """What the user asked for cannot be done; raised before any expensive work starts.

    Args:
        field: name of the setting or the file at fault; what it is of that setting may follow in brackets. A name that
            is only a part of the field is marked by `key`.
        value: what was found there.
        allowed: what would have been accepted; other settings are named by `key`, here and in `mend`.
        mend: what to type or change.
        where: file and line, or the override, that set it.
    """

    def __init__(self, field: str, *, value: object, allowed: str, mend: str, where: str | None = None) -> None:
        self.value, self.where = value, where
        if _MARK not in field:
            name, bracket, what = field.partition(" (")
            field = f"{key(name)}{bracket}{what}"
        self._marked = (field, allowed, mend)
        super().__init__()
        self.rename({})

    def rename(self, names: Mapping[str, str]) -> None:
        """Call settings otherwise, in the field and in the text.

        The error stays the same object: processes that have agreed on it know it again.

        Args:
            names: as they are called so far -> as they are called from now on; others stay.
        """
        field, allowed, mend = (
            re.sub(f"{_MARK}(.*?){_MARK}", lambda found: key(names.get(found[1], found[1])), text)
            for text in self._marked
        )
        self._marked = (field, allowed, mend)
        self.field, self.allowed, self.mend = (text.replace(_MARK, "") for text in self._marked)
        place = f"{self.where}: " if self.where else ""
        self.args = (f"{place}{self.field} = {self.value!r}\n  allowed: {self.allowed}\n  to mend: {self.mend}",)

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
        self.errors = tuple(errors)
        super().__init__(first.field, value=first.value, allowed=first.allowed, mend=first.mend, where=first.where)

    def rename(self, names: Mapping[str, str]) -> None:
        """Call settings otherwise in each of the errors."""
        for error in self.errors:
            error.rename(names)
        first = self.errors[0]
        self.field, self.allowed, self.mend = first.field, first.allowed, first.mend
        self.args = ("\n".join(str(error) for error in self.errors),)


def _restored(kind: type[ShearingError], arguments: tuple[object, ...], attributes: Mapping[str, Any]) -> ShearingError:
    error = kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


@contextlib.contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the block, or of the function that this decorates, under other names of settings.

    Args:
        names: as a component calls them -> as people know them: `{"corpus": "data.corpus"}`.
    """
    try:
        yield
    except ShearingError as error:
        error.rename(names)
        raise


def nearest_name(name: str, names: Iterable[str]) -> str:
    """'did you mean X?' for the nearest of `names`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]}?" if near else ""
