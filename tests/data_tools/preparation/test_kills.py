"""Real signals in the middle of real preparations: what is finished stays, and the result is the same bytes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_tools.preparation.work_folder import PREFIX
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import SPLITS
from tests.data_tools.conftest import content, write_lines
from tests.data_tools.processes import gone, shards, start, wait_for

NUM_FILES = 8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A preparation of two domains that takes some seconds; the output has to be added."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    letters_of = list("abcdefghij klmnop\n")
    for i in range(NUM_FILES):
        texts = ["".join(generator.choice(letters_of, size=2000)) for _ in range(400)]
        write_lines(folder / f"{i}.jsonl", texts)
    domains = ["--domain", f"all={folder}", "--domain", f"some={folder / '[02].jsonl'}"]
    options = ["--tokenizer", str(letters), "--workers", "2"]
    return ["data", "prepare", "task_bytes=1000", *domains, *options]


@pytest.fixture(scope="module")
def undisturbed(command: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the command makes when nobody disturbs it."""
    output = tmp_path_factory.mktemp("undisturbed")
    process = start(command, output=output)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return content(output)


def test_killed_twice_and_continued(command: list[str], undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    kept: dict[str, tuple[int, int]] = {}
    for count, kill_all in ((2, True), (5, False)):
        process = start(command, output=output)
        wait_for(lambda count=count: len(shards(output)) >= count)  # type: ignore[misc]
        if kill_all:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
            process.wait()  # what is not waited for still counts as a process
            wait_for(lambda pid=process.pid: gone(pid))  # type: ignore[misc]
        process.communicate(timeout=20)
        now = shards(output)
        assert len(now) < NUM_FILES + 2
        assert {name: now[name] for name in kept} == kept
        kept = now
        assert not (output / "corpus.json").exists()
    process = start(command, output=output)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"{len(kept)} finished before" in said
    assert content(output) == undisturbed


def test_killed_behind_the_decision_before_another_domain_came(
    command: list[str], tmp_path: Path, letters: Path
) -> None:
    output, shared = tmp_path / "corpus", Path(command[command.index("--domain") + 1].removeprefix("all=")) / "0.jsonl"
    process = start(command, output=output)
    wait_for(lambda: any(output.glob(f"{PREFIX}*/places")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert not (output / "corpus.json").exists()
    other = ["data", "prepare", "--domain", f"other={shared}", "--tokenizer", str(letters), "--workers", "1"]
    for each in (other, command):
        process = start(each, output=output)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert "other came meanwhile" in said
    corpus = Corpus.open(output)
    sides = [
        {each for name in corpus.domains for each in corpus.document_hashes(name, split=split).tolist()}
        for split in SPLITS
    ]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_a_worker_that_is_killed_is_an_error_and_not_a_wait(letters: Path, tmp_path: Path) -> None:
    import psutil

    # Tasks of seconds: one that is killed between two tasks is replaced, and nothing is lost.
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", [f"{name} " * 3000] * 6000)
    sources = ["--domain", f"all={tmp_path}", "--tokenizer", str(letters), "--workers", "2"]
    process = start(["data", "prepare", "task_bytes=1000", *sources], output=tmp_path / "corpus")
    main = psutil.Process(process.pid)

    def busy() -> list[psutil.Process]:
        found = []
        for child in main.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end while it is looked at
                if child.ppid() != main.pid and sum(child.cpu_times()[:2]) > 1.0:
                    found.append(child)
        return found

    wait_for(lambda: bool(busy()))
    busy()[0].kill()
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert "fewer --workers" in said
    wait_for(lambda: gone(process.pid))


def test_an_error_in_one_task_ends_the_others_with_one_message(command: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": \n')
    process = start([*command, "--domain", f"bad={bad}"], output=tmp_path / "corpus")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert said.count("error:") == 1
    assert f"{bad}:2 = " in said
    assert "Traceback" not in said
    wait_for(lambda: gone(process.pid))
