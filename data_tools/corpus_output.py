"""The folder of a corpus that domains are added to: what they have to have in common, and one who writes at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shearing.data.corpus.bos import Bos
from shearing.data.corpus.domain_folder import LEFT_OUT, domains_of
from shearing.data.corpus.format import MANIFEST_NAME, DomainManifest
from shearing.errors import ShearingError
from shearing.files.checksums import sha256_of_file
from shearing.files.durable import LOCK


def require_tokenizer(output: Path, *, tokenizer: str, fingerprint: str) -> None:
    """Check that the domains which are there have the same tokenizer.

    Args:
        output: folder of the corpus, there or not.
        tokenizer: folder or hub name of the one that is used now.
        fingerprint: its own.

    Raises:
        ShearingError: one does not.
    """
    for name in domains_of(output):
        manifest = DomainManifest.read(output / name)
        if manifest.tokenizer_fingerprint != fingerprint:
            raise ShearingError(
                "tokenizer",
                value=f"{tokenizer} (fingerprint {fingerprint})",
                allowed=f"the tokenizer of the domains that are there: {manifest.tokenizer} "
                f"(fingerprint {manifest.tokenizer_fingerprint})",
                mend="choose another output, or that tokenizer",
            )


def require_begun_alike(output: Path, *, bos: Bos, field: str, mend: str) -> None:
    """Check that the domains which are there begin their texts as those that are to come.

    Args:
        output: folder of the corpus, there or not.
        bos: how the new ones begin theirs.
        field: what the user calls that.
        mend: what else than another output would help; {} stands for how those that are there begin.

    Raises:
        ShearingError: one does not.
    """
    for name in domains_of(output):
        found = DomainManifest.read(output / name).bos
        if found != bos:
            raise ShearingError(
                field,
                value=str(bos),
                allowed=f"as in the domains that are there: {found}",
                mend=f"choose another output, or {mend.format(found.mode)}",
            )


def require_nothing_skipped(name: str, *, left_out: Mapping[str, int], mend: str) -> None:
    """Check that an earlier start of a command left out nothing of a domain that this one is to stop at.

    Args:
        left_out: documents, by reason; those that are left out whatever bad_input is are not looked at.
        mend: what else than leaving it out again would help.

    Raises:
        ShearingError: it did.
    """
    if bad := {reason: count for reason, count in left_out.items() if reason not in ("empty", *LEFT_OUT.values())}:
        raise ShearingError(
            f"domain {name}",
            value=", ".join(f"{count} {reason}" for reason, count in bad.items()),
            allowed="no bad input, as bad_input is stop now and was skip when its files were read",
            mend=f"choose bad_input=skip again, or {mend}",
        )


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Keep others that write out of the folder: what is held out here must be known there.

    Raises:
        ShearingError: there is one.
    """
    folder = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShearingError(
                "output",
                value=str(output),
                allowed="one preparation in a folder at a time",
                mend="another one is running there: wait until it has ended",
            ) from None
        yield
    finally:
        os.close(folder)


@contextmanager
def publishing(output: Path) -> Iterator[None]:
    """Keep others from adding domains to the folder for a moment, on other machines too; waits for them.

    Jobs of a cluster write while nobody is `alone_in` the folder. The file that is locked stays: if it came and went,
    two could each hold one of their own.
    """
    with (output / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def standing(output: Path) -> dict[str, str]:
    """SHA-256 of the manifest of each domain that is whole in the folder: it knows all its documents by split."""
    return {name: sha256_of_file(output / name / MANIFEST_NAME) for name in domains_of(output)}


def newcomers(output: Path, *, known: Callable[[], Mapping[str, str]]) -> list[str]:
    """Names of the domains in the folder that are not as they were `known`, see `standing`; sorted.

    What is known is asked for last, as a domain that is published meanwhile may be one of it.
    """
    there = standing(output)
    before = known()
    return [name for name, digest in there.items() if before.get(name) != digest]


def require_no_newcomers(output: Path, *, known: Callable[[], Mapping[str, str]]) -> None:
    """Check that no domain has come since it was decided what is held out: its texts may be on the other side.

    Raises:
        ShearingError: one has.
    """
    if new := newcomers(output, known=known):
        raise ShearingError(
            "output",
            value=f"{output}, into which another command has written {', '.join(new)} meanwhile",
            allowed="no domains but those beside which it was decided what is held out",
            mend="type the same command again: it is decided anew, with those as they are",
        )
