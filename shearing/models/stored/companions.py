"""What lies beside a model's weights and is not changed when they are: tokenizer, chat templates, licence and the like.

They go with a result byte for byte. Saved anew they would be of another version, whose tokenizer class may be one that
other readers refuse, and templates in sub-folders or a `tokenizer.model` would be lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.md",
    "*.tiktoken",
    "*.model",
    "tokenizer.model.*",
    "README*",
    "LICEN[CS]E*",
    "[Ll]icen[cs]e*",
    "NOTICE*",
)
"""Names in a model's folder; `*` is any text, and for the hub also sub-folders."""

_IN_FOLDERS = ("*/*.jinja",)
"""Named chat templates are in `additional_chat_templates/`."""

_OF_THE_WEIGHTS = ("config.json", "params.json", "*.index.json")
"""Say of which shape the weights are, or where: written with them."""

OURS = frozenset(
    {
        "sparsity.json",
        "allocation.json",
        "evaluation.json",
        "semi_structured.json",
        "shape.json",
        "kept_tokens.json",
        "experts.json",
        "complete.json",
    }
)
"""Files of this project beside a model, which are not the model's."""


def companions(folder: Path) -> list[str]:
    """Files beside the weights of a model that belong to any model made of it, as paths from its folder."""
    found = {path for pattern in (*FILES, *_IN_FOLDERS) for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix() for path in found}
    return sorted(name for name in names - OURS if not any(Path(name).match(pattern) for pattern in _OF_THE_WEIGHTS))


def copy_companions(folder: Path, *, to: Path) -> None:
    """Copy them byte for byte into another folder, which is there."""
    for name in companions(folder):
        (to / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, to / name)


def folder_of(name: str, *, revision: str | None, also: Sequence[str] = ()) -> Path:
    """A model's folder; that of a name on the hub is a download of what is beside its weights.

    Args:
        name: folder or hub name.
        revision: of a hub name.
        also: patterns of more files to have there.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=[*FILES, *also]))
