"""Public names of a package that are imported when they are first asked for.

Reading a recipe, `shear --help` and an error message run the `__init__.py` of most packages; none of them may wait for
torch, and each of them may go wrong before torch is there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def late(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that imports its public names late.

    Args:
        package: its `__name__`.
        homes: public name -> the module that defines it, from inside the package: `corpus.writer`.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get
