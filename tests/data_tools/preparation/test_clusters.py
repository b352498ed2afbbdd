"""Slurm and Ray: the same bytes as on one machine, with a stand-in for Slurm's commands and with Ray itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_tools.preparation.prepare import prepare
from data_tools.preparation.recipe import load_preparation
from data_tools.preparation.work_folder import WorkFolder
from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.errors import ShearingError
from tests.data_tools.conftest import content, write_lines
from tests.data_tools.processes import gone, shards, start, wait_for
from tests.repository import ROOT

Prepared = Callable[..., Corpus]

SBATCH = r"""#!/bin/bash
# Runs every task of an array at once, where Slurm would queue it.
echo "$@" >> "$FAKE_SLURM/submitted"
script="${@: -1}"
number=$(( $(cat "$FAKE_SLURM/count" 2>/dev/null || echo 100) + 1 ))
echo $number > "$FAKE_SLURM/count"
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
for i in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$i RUN_OFFSET=0 SLURM_NODELIST=here bash "$script" > "$FAKE_SLURM/log-$number-$i" 2>&1 || exit 1
done
echo "Submitted batch job $number"
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'
SCONTROL = "#!/bin/bash\necho here\n"


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    generator = np.random.default_rng(0)
    lines = ["".join(generator.choice(list("abcdef "), size=200)) for _ in range(100)]
    return {"a": str(write_lines(tmp_path / "a.jsonl", lines))}


@pytest.mark.slow
def test_slurm_makes_the_same_bytes(
    texts: dict[str, str], prepared: Prepared, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    for name, value in (
        ("PATH", f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"),
        ("FAKE_SLURM", str(tmp_path)),
        ("PYTHONPATH", str(ROOT)),
    ):
        monkeypatch.setenv(name, value)
    options = [f"a={texts['a']}", "--tokenizer", str(letters), "-o", str(tmp_path / "slurm"), "--executor", "slurm"]
    command = ["data", "prepare", "slurm.partition=cpu", "slurm.account=us", "--domain", *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "submitted finish: job 104" in result.output
    assert "squeue -j 101,102,103,104" in result.output
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert [line.count("--dependency=afterok:10") for line in submitted] == [0, 1, 1, 1]
    log = (tmp_path / "slurm").glob(".preparing-*/logs/tokenise/launch_script.slurm")
    assert "#SBATCH --account=us" in next(log).read_text()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "corpus" in result.output
    here = prepared(texts, output=tmp_path / "local")
    assert content(tmp_path / "slurm") == content(here.path)


def test_slurm_that_is_not_there(prepared: Prepared, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ShearingError, match="login node"):
        prepared(texts, executor="slurm", slurm={"partition": "cpu"})


def test_jobs_in_the_queue_are_not_submitted_again(
    prepared: Prepared, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in (("sbatch", "echo Submitted batch job 7"), ("squeue", "echo 7 PENDING")):
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    keys = {"executor": "slurm", "slurm": {"partition": "cpu"}}
    with pytest.raises(AssertionError):  # nothing is there yet
        prepared(texts, **keys)
    with pytest.raises(ShearingError, match="scancel 7"):
        prepared(texts, **keys)
    for executor in ("slurm", "local"):  # they will write into the folder, and know of nothing that is decided here
        with pytest.raises(ShearingError, match="7 of another preparation"):
            prepared({"b": texts["a"]}, **keys | {"executor": executor})


def test_why_a_job_of_a_cluster_failed_is_told_once(
    prepared: Prepared, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in (("sbatch", "echo Submitted batch job 7"), ("squeue", f"cat {tmp_path}/queue")):
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    keys = {"executor": "slurm", "slurm": {"partition": "cpu"}}
    (tmp_path / "queue").touch()
    for _ in range(2):
        with pytest.raises(AssertionError):  # submitted
            prepared(texts, **keys)
        (folder,) = (tmp_path / "corpus").glob(".preparing-*")
        launched = folder / "logs" / "decide" / "launch_script.slurm"
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in launched.read_text()
        with pytest.raises(ShearingError), WorkFolder(folder).noting_failure("tokenise", 0):
            raise ShearingError("a.jsonl:2", value="no JSON", allowed="JSON", mend="correct it")
        (tmp_path / "queue").write_text("8 PENDING\n")
        with pytest.raises(ShearingError, match=r"a\.jsonl:2 = no JSON[^$]*end them: scancel 7"):
            prepared(texts, **keys)
        (tmp_path / "queue").write_text("")
        with pytest.raises(ShearingError, match=r"^a\.jsonl:2 = 'no JSON'\n.*\n.*correct it$"):
            prepared(texts, **keys)
    assert prepared(texts).domains == ["a"]


def test_ray_that_is_not_installed(prepared: Prepared, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(ShearingError, match=r"pip install 'shearing\[ray\]'"):
        prepared(texts, executor="ray")


@pytest.mark.slow
def test_ray_killed_and_continued_makes_the_same_bytes(prepared: Prepared, letters: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(4):
        texts = ["".join(generator.choice(list("abcdef "), size=2000)) for _ in range(200)]
        write_lines(tmp_path / "texts" / f"{i}.jsonl", texts)
    output = tmp_path / "corpus"
    command = ["data", "prepare", "task_bytes=1000", "--domain", f"a={tmp_path / 'texts'}", "--tokenizer", str(letters)]
    process = start([*command, "--executor", "ray", "--workers", "1"], output=output)
    wait_for(lambda: len(shards(output)) >= 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    kept = shards(output)
    assert not (output / "corpus.json").exists()
    process = start([*command, "--executor", "ray", "--workers", "2"], output=output)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"{len(kept)} finished before" in said
    here = prepared({"a": str(tmp_path / "texts")}, output=tmp_path / "here", task_bytes=1000)
    assert content(output) == content(here.path)
    wait_for(lambda: gone(process.pid), seconds=30.0)


@pytest.mark.slow
def test_an_error_of_a_ray_task_is_one_message(texts: dict[str, str], letters: Path, tmp_path: Path) -> None:
    Path(texts["a"]).write_text('{"text": "good"}\n{"text": \n')
    options = {"output": str(tmp_path / "c"), "tokenizer": str(letters), "domains": texts, "executor": "ray"}
    recipe = load_preparation(None, options={key: (value, key) for key, value in options.items()})
    with pytest.raises(ShearingError, match=r"a\.jsonl:2"):
        prepare(recipe, console=Console(quiet=True))
