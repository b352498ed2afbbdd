"""Pushing a folder to a hub of models."""

from __future__ import annotations

from pathlib import Path

from shearing.errors import ShearingError


def require_repository_name(name: str) -> None:
    """Check a name before anything is read.

    Raises:
        ShearingError: no hub has such a name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ShearingError(
            "--push", value=name, allowed="a repository, as NAME or ORGANISATION/NAME", mend=str(error)
        ) from error


def files_to_push(folder: Path) -> list[str]:
    """What would be pushed, a line each: size and name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.stat().st_size:>15,} bytes  {path.relative_to(folder)}" for path in paths]


def push(folder: Path, *, repository: str, private: bool, message: str) -> str:
    """Make a repository of models if it is not there, and put the files of a folder into it.

    Args:
        folder: with the model.
        repository: name of the repository.
        private: whether a new one is for its owners alone.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        ShearingError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(folder_path=folder, repo_id=repository, commit_message=message)
    except Exception as error:  # of whichever library the hub's client sends requests with
        raise ShearingError(
            "--push",
            value=repository,
            allowed="a repository that you may write to",
            mend=f"the folder is complete in {folder}: log in with `hf auth login`, and push it with "
            f"`hf upload {repository} {folder}` ({(str(error).strip() or type(error).__name__).splitlines()[0]})",
        ) from error
    return str(commit.commit_url)
