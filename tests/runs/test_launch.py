"""Starting a run on many processes: the script of a Slurm job is run for real, on stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from shearing.errors import ShearingError
from shearing.runs.launch import SlurmJob, commands, slurm_script, submit
from tests.cli.test_cli import error_of, shear

OVERRIDES = ["prune.duration=100 steps", 'name=it\'s "quoted" $HOME']

# srun: starts the tasks, passes SIGUSR1 on to them, ends with the highest exit code; as the real one does.
SRUN = """\
    import os, signal, subprocess, sys
    arguments = [argument for argument in sys.argv[1:]]
    while arguments[0].startswith("--"):
        arguments.pop(0)
    number = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
    for index in range(number):
        own = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_NTASKS": str(number)}
        tasks.append(subprocess.Popen(arguments, env={**os.environ, **own}))
    with open("tasks", "w") as file:
        print(*[task.pid for task in tasks], file=file)
    codes = [task.wait() for task in tasks]
    sys.exit(max(128 - code if code < 0 else code for code in codes))
"""

SCONTROL = """\
    import os, sys
    if sys.argv[1:3] == ["show", "hostnames"]:
        print("127.0.0.1\\nanother")
    else:
        with open("requeued", "a") as file:
            print(*sys.argv[1:], file=file)
        sys.exit(int(os.environ.get("REQUEUE_FAILS", "0")))
"""

# In the place of `python -m shearing`: counts to the end in step with the others and continues where it was stopped.
# Connections in the place of torch's, whose import would be all that such a process does.
PROGRAM = """\
    import json, os, signal, sys, time
    from pathlib import Path
    asked = []
    if "deaf" not in sys.argv:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, _: asked.append(number))
    from multiprocessing.connection import Client, Listener
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, others, state = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), [], Path("state")
    if rank == 0:
        listener = Listener(address)
        others = [listener.accept() for _ in range(size - 1)]
    while rank > 0 and not others:
        try:
            others = [Client(address)]
        except ConnectionRefusedError:
            time.sleep(0.01)
    def total(value):
        if rank > 0:
            others[0].send(value)
            return others[0].recv()
        value += sum(other.recv() for other in others)
        for other in others:
            other.send(value)
        return value
    step = int(state.read_text()) if state.exists() else 0
    if rank == 0:
        names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "SET_UP")
        Path("seen.json").write_text(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]))
        Path("started").touch()
    while step < 1000:
        if step == 3 and rank == 1 and "fail" in sys.argv:
            os._exit(3)
        time.sleep(0.01)
        stop = total(len(asked))
        step = 1000 if Path("hurry").exists() else step + 1
        if stop > 0 and step < 1000:
            if rank == 0:
                state.write_text(str(step))
            total(0)
            time.sleep(0.3 * rank)  # processes do not end together
            sys.exit(75)
    total(0)
"""


@pytest.fixture
def tiny_recipe(tiny_recipe: Path) -> Path:
    """With batches that many processes can share."""
    data = yaml.safe_load(tiny_recipe.read_text())
    for stage in ("prune", "pretrain"):
        data[stage] |= {"batch_size": "16 sequences", "micro_batch_size": 1}
    tiny_recipe.write_text(yaml.safe_dump(data))
    return tiny_recipe


class Cluster:
    """A folder with stand-ins for Slurm's commands; a job's script runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(int(os.getpid()) + 1_000_000),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS_PER_NODE": "2",
        }
        (folder / "bin").mkdir()
        self.command("srun", SRUN)
        self.command("scontrol", SCONTROL)
        self.python = self.command("python", PROGRAM)

    def command(self, name: str, code: str) -> Path:
        path = self.folder / "bin" / name
        path.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
        path.chmod(0o755)
        return path

    def script(self, *overrides: str, setup: Sequence[str] = ()) -> Path:
        job = SlurmJob(name="test", gpus_per_node=2, python=str(self.python), setup=setup)
        path = self.folder / "job.sh"
        path.write_text(
            slurm_script(job, recipe=Path("tiny.yaml"), overrides=overrides, folder=self.folder, gpus=False)
        )
        return path

    def start(self, script: Path) -> subprocess.Popen[bytes]:
        for name in ("started", "tasks"):
            (self.folder / name).unlink(missing_ok=True)
        # Not in the job's folder: the script goes there.
        return subprocess.Popen(["bash", script], env=self.environment, cwd="/")

    def wait_for(self, name: str) -> Path:
        path = self.folder / name
        for _ in range(1200):
            if path.exists() and (name == "started" or path.read_text().endswith("\n")):
                return path
            time.sleep(0.05)
        raise AssertionError(f"{name} does not appear")

    def signal_tasks(self, number: signal.Signals) -> None:
        for task in self.wait_for("tasks").read_text().split():
            os.kill(int(task), number)

    @property
    def requeues(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def script_of(recipe: Path, *options: str) -> str:
    result = shear("launch", "--slurm", recipe, *options)
    assert result.exit_code == 0, result.output
    return result.stdout


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_script_asks_for_what_it_is_told(tiny_recipe: Path) -> None:
    script = script_of(
        tiny_recipe,
        *("--nodes", "2", "--gpus-per-node", "4", "--time", "1-12:00:00", "--partition", "gpu", "--account", "a"),
        *("--qos", "long", "--cpus-per-task", "12", "--mem", "0", "--job-name", "n", "--output", "logs/%j.out"),
        *("--signal-before", "600", "--sbatch", "constraint=h100", "--sbatch", "--exclusive", "training.device=auto"),
        *("--setup", "module load cuda", "--setup", "source env"),
    )
    assert directives(script) == [
        "--job-name=n",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=12",
        "--mem=0",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--account=a",
        "--qos=long",
        "--output=logs/%j.out",
        "--constraint=h100",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        "--signal=USR1@600",
    ]
    assert f"cd -- {Path.cwd()} || exit\nmodule load cuda\nsource env\nprogram=({sys.executable} " in script


def test_script_of_defaults(tiny_recipe: Path) -> None:
    script = script_of(tiny_recipe, "training.device=cuda", "name='a \\t #1'")
    assert "--job-name=shear-a-t-1" in directives(script)
    assert "--gpus-per-node=8" in directives(script)
    # sbatch reads directives up to the first command.
    assert "#SBATCH" not in script[script.index("\ncd ") :]


def test_gpus_are_asked_for_once_or_not_at_all(tiny_recipe: Path) -> None:
    def asks(*options: str) -> list[str]:
        return [line for line in directives(script_of(tiny_recipe, *options)) if "gpu" in line]

    assert asks("training.device=cpu") == []
    assert asks("training.device=cuda", "--sbatch", "gres=gpu:h100:8") == ["--gres=gpu:h100:8"]


def test_script_knows_the_exit_codes() -> None:
    from shearing.training.stage import INTERRUPTED_EXIT_CODE

    script = slurm_script(SlurmJob(name="a"), recipe=Path("a"), overrides=(), folder=Path("/"), gpus=True)
    assert f'"$code" -eq {INTERRUPTED_EXIT_CODE} ]' in script
    assert f'"$code" -eq {128 + signal.SIGUSR1} ]' in script


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=40)
@given(overrides=st.lists(texts, max_size=4), recipe=texts.filter(lambda text: text not in ("", ".", "..")))
def test_arguments_arrive_as_they_were_given(overrides: list[str], recipe: str) -> None:
    path = Path(recipe)
    script = slurm_script(SlurmJob(name="a"), recipe=path, overrides=overrides, folder=Path("/"), gpus=True)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # The first part of the script makes the array, the last part passes it on through another shell.
    shown = script[: script.index("\n# The processes meet")] + (
        '\nbash -c \'exec "$@"\' task printf "%s\\0" "${program[@]}"\n'
    )
    output = subprocess.run(["bash"], input=shown.encode(), capture_output=True, check=True).stdout
    expected = [sys.executable, "-m", "shearing", "run", str(path), *overrides]
    assert output.decode().split("\0")[:-1] == expected
    for nodes, processes in ((1, 1), (1, 2), (2, 1)):
        for line in commands(path, overrides=overrides, nodes=nodes, processes=processes).split("\n\n"):
            if line.startswith(("torchrun", "accelerate", "deepspeed", "shear")):
                words = shlex.split(line, comments=False)
                assert words[len(words) - len(overrides) - 1 :] == [str(path), *overrides]


@pytest.mark.slow
def test_a_job_runs_to_its_end(cluster: Cluster) -> None:
    import json

    (cluster.folder / "hurry").touch()
    script = cluster.script(*OVERRIDES, setup=["export SET_UP=yes"])
    assert cluster.start(script).wait(timeout=120) == 0
    assert cluster.requeues == 0
    arguments, environment = json.loads((cluster.folder / "seen.json").read_text())
    assert arguments == ["-m", "shearing", "run", "tiny.yaml", *OVERRIDES]
    assert environment == {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(10_000 + int(cluster.environment["SLURM_JOB_ID"]) % 20_000),
        "OMP_NUM_THREADS": "1",
        "SET_UP": "yes",
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_stopped_is_requeued_and_continues(cluster: Cluster, number: signal.Signals) -> None:
    cluster.environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    script = cluster.script()
    job = cluster.start(script)
    cluster.wait_for("started")
    cluster.signal_tasks(number)
    assert job.wait(timeout=120) == 0
    assert (cluster.folder / "requeued").read_text() == f"requeue {cluster.environment['SLURM_JOB_ID']}\n"
    done = int((cluster.folder / "state").read_text())
    assert 0 < done < 1000
    (cluster.folder / "hurry").touch()
    assert cluster.start(script).wait(timeout=120) == 0
    assert cluster.requeues == 1
    seen = (cluster.folder / "seen.json").read_text()
    assert f'"MASTER_ADDR": "localhost", "MASTER_PORT": "{cluster.environment["MASTER_PORT"]}"' in seen


@pytest.mark.slow
def test_a_signal_to_the_shell_reaches_the_tasks(cluster: Cluster) -> None:
    job = cluster.start(cluster.script())
    cluster.wait_for("started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 0
    assert cluster.requeues == 1


@pytest.mark.slow
def test_a_signal_while_the_program_does_not_listen_requeues(cluster: Cluster) -> None:
    job = cluster.start(cluster.script("deaf"))
    cluster.signal_tasks(signal.SIGUSR1)
    assert job.wait(timeout=120) == 0
    assert cluster.requeues == 1


@pytest.mark.slow
def test_a_job_that_slurm_ends_is_not_requeued(cluster: Cluster) -> None:
    job = cluster.start(cluster.script())
    cluster.wait_for("started")
    job.send_signal(signal.SIGTERM)
    cluster.signal_tasks(signal.SIGTERM)
    assert job.wait(timeout=120) == 75
    assert cluster.requeues == 0


@pytest.mark.slow
def test_a_failure_ends_the_job_with_its_code(cluster: Cluster) -> None:
    job = cluster.start(cluster.script("fail"))
    assert job.wait(timeout=120) == 3
    assert cluster.requeues == 0


@pytest.mark.slow
def test_a_job_that_cannot_be_requeued_says_so(cluster: Cluster) -> None:
    cluster.environment["REQUEUE_FAILS"] = "1"
    job = cluster.start(cluster.script())
    cluster.wait_for("started")
    cluster.signal_tasks(signal.SIGUSR1)
    assert job.wait(timeout=120) == 75


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in sbatch's place."""

    def put(code: str) -> None:
        (tmp_path / "bin").mkdir()
        path = tmp_path / "bin" / "sbatch"
        path.write_text(f"#!/bin/bash\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    return put


def test_submit_prints_the_number_of_the_job(tiny_recipe: Path, tmp_path: Path, sbatch: Callable[[str], None]) -> None:
    sbatch(f'echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/script; echo "123;cluster"')
    result = shear("launch", tiny_recipe, "--slurm", "--submit", "seed=3")
    assert (result.exit_code, result.stdout) == (0, "123\n")
    assert (tmp_path / "arguments").read_text() == "--parsable\n"
    assert (tmp_path / "script").read_text() == script_of(tiny_recipe, "seed=3")


def test_what_sbatch_refuses_is_reported(tiny_recipe: Path, sbatch: Callable[[str], None]) -> None:
    sbatch("echo 'invalid partition specified: gpu' >&2; exit 1")
    assert "invalid partition specified" in error_of("launch", tiny_recipe, "--slurm", "--submit")


def test_submit_wants_a_folder_for_the_log(tiny_recipe: Path, sbatch: Callable[[str], None]) -> None:
    sbatch("echo 1")
    assert "mkdir -p absent" in error_of("launch", tiny_recipe, "--slurm", "--submit", "--output", "absent/%j.out")
    # A folder with a pattern in its name cannot be looked at here.
    assert submit("", job=SlurmJob(name="a", output="%x/%j.out")) == "1"


def test_submit_wants_sbatch(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "no sbatch on PATH" in error_of("launch", tiny_recipe, "--slurm", "--submit")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--slurm", "prune.lr=1"], "prune.lr"),
        (["--slurm", "--nodes", "0"], "--nodes = 0"),
        (["--nodes", "0", "--gpus-per-node", "1"], "--nodes = 0"),
        (["--slurm", "--gpus-per-node", "0"], "--gpus-per-node = 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node = 0"),
        (["--slurm", "--cpus-per-task", "0"], "--cpus-per-task = 0"),
        (["--slurm", "--time", "1 day"], "--time = '1 day'"),
        (["--slurm", "--time", "1-2-3"], "--time = '1-2-3'"),
        (["--slurm", "--time", "1:2:3:4"], "--time = '1:2:3:4'"),
        (["--slurm", "--time", "4"], "1 to 239 seconds"),
        (["--slurm", "--signal-before", "0"], "--signal-before = 0"),
        (["--slurm", "--signal-before", "65536", "--time", "7-0"], "1 to 65535 seconds"),
        (["--slurm", "--partition", "a b"], "--partition = 'a b'"),
        (["--slurm", "--job-name", "a\n#SBATCH --nodes=9"], "--job-name = 'a\\n"),
        (["--slurm", "--sbatch", "time=1"], "use --time"),
        (["--slurm", "--sbatch", "--no-requeue"], "leave it out"),
        (["--slurm", "--sbatch", "constraint=a b"], "--sbatch constraint = 'a b'"),
        (["--slurm", "--sbatch", "C=h100"], "--sbatch = 'C=h100'"),
        (["--submit"], "add --slurm"),
        (["--partition", "gpu"], "add --slurm"),
        (["--time", "1:00"], "add --slurm"),
        (["--slurm", "--nodes", "3", "--gpus-per-node", "1"], "prune.batch_size"),
        (["--gpus-per-node", "3"], "prune.batch_size"),
    ],
)
def test_bad_input_is_refused(tiny_recipe: Path, options: list[str], expected: str) -> None:
    assert expected in error_of("launch", tiny_recipe, *options)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:30", 5430),
        ("2-0", 172_800),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:05", 131_405),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    with pytest.raises(ShearingError, match=f"1 to {min(seconds - 1, 65535)} seconds"):
        SlurmJob(name="a", time=time, signal_before=10**6)


def test_launch_alone_says_what_to_type(tiny_recipe: Path) -> None:
    result = shear("launch", tiny_recipe, "prune.duration=100 steps", "--gpus-per-node", "8")
    assert result.exit_code == 0, result.output
    program = f"-m shearing run {tiny_recipe} 'prune.duration=100 steps'"
    for line in (
        f"torchrun --standalone --nproc-per-node=8 {program}",
        "accelerate launch --multi_gpu --num_machines=1 --num_processes=8 --mixed_precision=no --dynamo_backend=no "
        + program,
        f"deepspeed --num_gpus=8 --no_local_rank --module {program.removeprefix('-m ')}",
        f"shear launch --slurm --nodes 1 --gpus-per-node 8 {tiny_recipe} 'prune.duration=100 steps'",
    ):
        assert line in result.stdout.splitlines()


def test_launch_of_one_process_needs_no_launcher(tiny_recipe: Path) -> None:
    result = shear("launch", tiny_recipe, "seed=1", "--gpus-per-node", "1")
    assert result.stdout.splitlines()[-1] == f"shear run {tiny_recipe} seed=1"


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 1)])
def test_torchrun_command_works(tmp_path: Path, nodes: int, processes: int) -> None:
    module = tmp_path / "shearing"
    module.mkdir()
    (module / "__init__.py").touch()
    (module / "__main__.py").write_text(
        "import os, sys, pathlib\npathlib.Path('rank' + os.environ['RANK']).write_text('\\n'.join(sys.argv[1:]))\n"
    )
    text = commands(Path("tiny.yaml"), overrides=OVERRIDES, nodes=nodes, processes=processes)
    command = next(part for part in text.split("\n\n") if part.startswith("torchrun"))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    starts = [
        subprocess.Popen(["bash", "-c", command], env={**environment, "NODE_RANK": str(rank)}, cwd=tmp_path)
        for rank in range(nodes)
    ]
    assert [start.wait(timeout=200) for start in starts] == [0] * nodes
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text().split("\n") == ["run", "tiny.yaml", *OVERRIDES]
