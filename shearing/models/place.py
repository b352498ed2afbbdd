"""Where a model's files are: a folder, or a name on the hub, whose files may be here already."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from shearing.errors import ShearingError, key

_SECONDS = 10
"""How long the hub may take to say that it knows a name."""
_FIRST = ("config.json", "tokenizer.json")
"""Files of which one is downloaded before all others."""


def require_place(name: str, *, revision: str | None = None, what: str = "model") -> None:
    """Check that there is such a folder, or such a name on the hub, without the minutes that downloads try again.

    Args:
        name: folder or hub name.
        revision: of a hub name.
        what: is looked for there.

    Raises:
        ShearingError: there is neither, or the hub cannot be reached and nothing of the name is here.
    """
    path = Path(name)
    if path.is_dir():
        return
    allowed = f"an existing {what} folder, or a hub name that can be reached"
    if path.exists():
        raise ShearingError("source", value=name, allowed=allowed, mend=f"{name} is a file: name the folder it is in")
    if _is_path(name):
        raise ShearingError("source", value=name, allowed=allowed, mend="check the path: there is no such folder")
    if folder_here(name, revision=revision) is None:
        _ask_hub(name, revision, allowed)


def folder_here(name: str, *, revision: str | None = None) -> Path | None:
    """The folder of a model, or what of a name on the hub is on this machine; None: nothing. Nothing is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file, revision=revision) for file in _FIRST]
    except HFValidationError:
        return None
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: hub names are OWNER/NAME, or NAME alone."""
    first, _, rest = name.partition("/")
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or (name.find("/") >= 0 and (not rest or Path(first).is_dir()))
    )


@cache
def _ask_hub(name: str, revision: str | None, allowed: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=_SECONDS)
    except Exception as error:  # of whatever library the hub's client uses
        said = str(error).strip() or type(error).__name__
        raise ShearingError(
            "source",
            value=name,
            allowed=allowed,
            mend=f"there is no folder {name} here; of a hub name, check it, {key('revision')} and the network "
            f"({said.splitlines()[0]})",
        ) from error
