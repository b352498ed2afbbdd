"""`shear launch`: commands that start a recipe on many processes, and the Slurm job that keeps it going to its end.

A Slurm job ends at its time limit or when it is preempted; a run ends when it is complete. The script between them
rests on two things that the program does: asked by a signal, it saves and exits with a code of its own; and the same
command continues the run. Nothing heavy is imported here: this runs on login nodes.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shearing.errors import ShearingError
from shearing.runs.recipe import Recipe, split_batch
from shearing.runs.run_directory import Stage

GPUS_PER_NODE = 8
"""What a node has unless the user says otherwise."""

_STOP_SECONDS = 300  # for a step and its checkpoint, as Slurm is asked for
_MOST_SIGNAL_SECONDS = 65535  # Slurm keeps it in 16 bits
_TIME_FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, or all four: 1-12:00:00"
_SAFE_VALUE = re.compile(r"[^\s\"'\\#]+")
_DIRECTIVE = re.compile(r"(?:--)?(?P<key>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?:=(?P<value>.*))?", re.DOTALL)
_OWN_OPTIONS = {
    "account": "--account",
    "cpus-per-task": "--cpus-per-task",
    "gpus-per-node": "--gpus-per-node",
    "job-name": "--job-name",
    "mem": "--mem",
    "nodes": "--nodes",
    "ntasks": "--nodes and --gpus-per-node",
    "ntasks-per-node": "--gpus-per-node",
    "output": "--output",
    "partition": "--partition",
    "qos": "--qos",
    "signal": "--signal-before",
    "time": "--time",
}
_FIXED = ("no-requeue", "open-mode", "requeue")

# What follows is the same in every script. Each choice in it was tried on a real Slurm, with two nodes.
_BODY = r"""
# The processes meet on the first node, at a port of this job's own. MASTER_ADDR and MASTER_PORT that you have set stay.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# Slurm signals the tasks itself: SIGUSR1 before the time limit (--signal above), SIGTERM when the job is preempted.
# This shell only hears of it where somebody signals the shell (scancel --batch): srun passes SIGUSR1 on to all tasks.
step=
trap '[ -z "$step" ] || kill -USR1 "$step"' USR1
# SIGTERM comes here when Slurm ends the job for good or requeues it by itself: scancel, the time limit, the end of the
# grace of a preemption. It is not passed on: the tasks get their own, and srun answers SIGTERM by killing them.
ended_by_slurm=
trap 'ended_by_slurm=yes' TERM

# One task for each GPU, without torchrun between Slurm and Python: torchrun dies of SIGUSR1 and hides exit codes.
# exec, because with cgroups Slurm signals nobody but the task itself: no child of a shell would hear of it.
# No --kill-on-bad-exit: the first task to stop in order would have the others killed while they do the same, and a
# task that fails would have the others asked to stop, which looks like a stop in order. Instead, tasks that are left
# over (hung because one failed) are killed 5 minutes after the first has ended.
srun --export=ALL --kill-on-bad-exit=0 --wait=300 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c 'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"; exec "$@"' \
    task "${program[@]}" &
step=$!
# A signal that is trapped interrupts `wait`; once the step has ended, `wait` still knows its exit code.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$? # the highest of all tasks

# 75: asked to stop, checkpoint saved. 138: SIGUSR1 came where the program does not listen, as while it loads; nothing
# that was complete is lost. Whatever else is a failure, and would only fail again.
if [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; then
    if [ -n "$ended_by_slurm" ]; then
        echo "shear: ended by Slurm; the same script continues the run" >&2
    else
        echo "shear: stopped on request; job $SLURM_JOB_ID goes back into the queue and continues the run" >&2
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
fi
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What is asked of Slurm; None leaves it to the site's default.

    Attributes:
        name: of the job; its log lines in `squeue`.
        nodes: how many.
        gpus_per_node: and processes: there is one for each.
        time: limit of one start of the job, in one of Slurm's forms. A run that needs longer is requeued.
        partition, account, qos, mem: as sbatch takes them.
        cpus_per_task: CPU cores of each process.
        output: file of the log, with sbatch's patterns; relative to where the job is submitted.
        signal_before: seconds before the limit at which the run is asked to save and stop.
        directives: further sbatch options, `key=value` or `key`.
        setup: shell lines that run before the program, as `module load cuda`.
        python: interpreter on the nodes; None: the one that runs now.

    Raises:
        ShearingError: numbers out of range, a time or a directive that sbatch would not read as it is meant.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int = GPUS_PER_NODE
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    output: str = "slurm-%j.out"
    signal_before: int = 300
    directives: Sequence[str] = ()
    setup: Sequence[str] = ()
    python: str | None = None

    def __post_init__(self) -> None:
        _require_at_least_one("--nodes", value=self.nodes)
        _require_at_least_one("--gpus-per-node", value=self.gpus_per_node)
        if self.cpus_per_task is not None:
            _require_at_least_one("--cpus-per-task", value=self.cpus_per_task)
        most = min(_seconds(self.time) - 1, _MOST_SIGNAL_SECONDS)
        if not 1 <= self.signal_before <= most:
            raise ShearingError(
                "--signal-before",
                value=self.signal_before,
                allowed=f"1 to {most} seconds: less than --time {self.time}",
                mend="leave the run time to work and enough seconds to write one checkpoint",
            )
        for directive in self.directives:
            _parse_directive(directive)


def slurm_script(job: SlurmJob, *, recipe: Path, overrides: Sequence[str], folder: Path, gpus: bool) -> str:
    """The batch script that runs a recipe to its end, over as many starts of the job as that takes.

    Args:
        job: what is asked of Slurm.
        recipe: file of the recipe.
        overrides: `key=value` on top of it.
        folder: working directory of the run, to which paths of the recipe are relative.
        gpus: whether to ask for GPUs; otherwise `job.gpus_per_node` only counts processes.

    Returns:
        A bash script for `sbatch`.

    Raises:
        ShearingError: a value that cannot be written in a directive.
    """
    directives = "\n".join(f"#SBATCH {option}" for option in _options(job, gpus=gpus))
    program = shlex.join([job.python or sys.executable, *_program(recipe, overrides=overrides)])
    lines = [
        "#!/bin/bash",
        directives,
        "# One job number and one log over all its starts:",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "# To every task, so that it saves and stops. Slurm may send it up to a minute early:",
        f"#SBATCH --signal=USR1@{job.signal_before}",
        "",
        "# Written by `shear launch --slurm`, for `sbatch`. `scancel --signal=USR1 JOB` has the run save and puts the",
        "# job back into the queue; `scancel JOB` ends it.",
        "",
        f"cd -- {shlex.quote(str(folder))} || exit",
        *job.setup,
        f"program=({program})",
    ]
    return "\n".join(lines) + "\n" + _BODY


def submit(script: str, *, job: SlurmJob) -> str:
    """Hand a script to `sbatch`; returns the number of the job.

    Args:
        script: from `slurm_script`.
        job: what it was made from.

    Raises:
        ShearingError: no `sbatch` here, no folder for the log, or sbatch refuses.
    """
    if shutil.which("sbatch") is None:
        raise ShearingError(
            "--submit",
            value="no sbatch on PATH",
            allowed="a machine that submits Slurm jobs",
            mend="go to a login node of the cluster, or print the script (no --submit) and take it there",
        )
    folder = Path(job.output).parent
    if "%" not in str(folder) and not folder.is_dir():
        raise ShearingError(
            "--output",
            value=job.output,
            allowed="a file in a folder that exists: Slurm makes none, and a job without a log fails without a word",
            mend=f"mkdir -p {shlex.quote(str(folder))}",
        )
    result = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ShearingError(
            "sbatch",
            value=(result.stderr or result.stdout).strip(),
            allowed="a job that this cluster takes",
            mend="`sinfo` lists partitions and nodes; options that have no flag here go in --sbatch KEY=VALUE",
        )
    return result.stdout.strip().partition(";")[0]  # `job;cluster` in a federation


def commands(recipe: Path, *, overrides: Sequence[str], nodes: int, processes: int) -> str:
    """Commands of other launchers for the same run, ready to paste.

    Args:
        recipe: file of the recipe.
        overrides: `key=value` on top of it.
        nodes: how many; with more than one, each command is for every node.
        processes: on each node.

    Raises:
        ShearingError: fewer than one node or process.
    """
    _require_at_least_one("--nodes", value=nodes)
    _require_at_least_one("--gpus-per-node", value=processes)
    program = shlex.join(_program(recipe, overrides=overrides))
    if nodes == processes == 1:
        return (
            "# One process needs no launcher; --nodes and --gpus-per-node say how many there are to be.\n"
            f"shear {program.removeprefix('-m shearing ')}\n"
        )
    if nodes == 1:
        intro = f"# One node, {processes} processes. Each of these does the same, and continues what another began."
        torchrun = f"--standalone --nproc-per-node={processes}"
        accelerate = f"--num_machines=1 --num_processes={processes}"
        deepspeed = f"--num_gpus={processes}"
    else:
        each = "1 process" if processes == 1 else f"{processes} processes"
        intro = (
            f"# {nodes} nodes, {each} on each. torchrun and accelerate: on every node, with MASTER_ADDR (the first\n"
            f"# node) and NODE_RANK (0 to {nodes - 1}) set. deepspeed: on the first alone, which reaches the others\n"
            f"# by pdsh; `hostfile` has a line `NODE slots={processes}` for each. Each continues what another began."
        )
        address, port, rank = '"$MASTER_ADDR"', '"${MASTER_PORT:-29500}"', '"$NODE_RANK"'
        torchrun = (
            f"--nnodes={nodes} --nproc-per-node={processes} --node-rank={rank} "
            f"--master-addr={address} --master-port={port}"
        )
        accelerate = (
            f"--num_machines={nodes} --num_processes={nodes * processes} --machine_rank={rank} "
            f"--main_process_ip={address} --main_process_port={port}"
        )
        deepspeed = f"--hostfile=hostfile --num_nodes={nodes} --num_gpus={processes} --master_addr={address}"
    arguments = shlex.join([str(recipe), *overrides])
    parts = [
        intro,
        f"torchrun {torchrun} {program}",
        # Said in full, because what is not said comes from the user's configuration of accelerate.
        f"accelerate launch --multi_gpu {accelerate} --mixed_precision=no --dynamo_backend=no {program}",
        # Else it adds --local_rank=… to the program's arguments.
        f"deepspeed {deepspeed} --no_local_rank --module {program.removeprefix('-m ')}",
        "# A Slurm job that runs on until the run is complete; --submit submits it, --help tells the rest.",
    ]
    return "\n\n".join(parts) + f"\nshear launch --slurm --nodes {nodes} --gpus-per-node {processes} {arguments}\n"


def processes_here(recipe: Recipe, *, wanted: str, stages: Sequence[Stage] | None) -> int:
    """How many processes to start on this machine.

    Args:
        recipe: of the run.
        wanted: a number, or `all`: one for each GPU.
        stages: those that are to run; None: all.

    Raises:
        ShearingError: no such number, more than there are GPUs, a launcher has started this process already, or
            processes that cannot share a batch equally.
    """
    if "WORLD_SIZE" in os.environ:
        raise ShearingError(
            "--gpus",
            value=wanted,
            allowed="without a launcher: this process was started by one (WORLD_SIZE is set)",
            mend="leave --gpus out, or the launcher",
        )
    here, on_gpus = gpus_here(), recipe.training.device != "cpu"
    processes = here if wanted == "all" else int(wanted) if wanted.isascii() and wanted.isdigit() else 0
    if processes < 1 or (on_gpus and processes > here):
        raise ShearingError(
            "--gpus",
            value=wanted,
            allowed=f"all, or 1 to {here}, the GPUs of this machine" if on_gpus else "all, or a number from 1",
            mend="several machines: see shear launch; without GPUs: add training.device=cpu",
        )
    for stage in recipe.training_stages:
        if stages is None or stage in stages:
            split_batch(recipe, stage=stage, num_processes=processes)
    return processes


def run_here(arguments: Sequence[str], *, processes: int) -> int:
    """Run `shear ARGUMENTS` on several processes of this machine, by torchrun's own launcher, and wait for them.

    Args:
        arguments: of the program.
        processes: how many.

    Returns:
        Exit code: 75 where a signal has stopped them, else that of the process that failed first; 0 if none did.
    """
    logging.disable()  # this process only waits, and its launcher would repeat what the others say themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which warns of it
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from shearing.training.stage import INTERRUPTED_EXIT_CODE

    options = parse_args(["--standalone", f"--nproc-per-node={processes}", "-m", "shearing", *arguments])
    # Left alone, torch dies of SIGUSR1, and kills after 30 seconds what is still writing a checkpoint. One that is too
    # old for these options does not look at them.
    options.signals_to_handle = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    options.shutdown_timeout = _STOP_SECONDS
    try:
        run(options)
    except SignalException:
        return INTERRUPTED_EXIT_CODE
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # a signal, as shells count
    return 0


def job_name(recipe: Recipe) -> str:
    """The recipe's name as Slurm takes one."""
    return "shear-" + "-".join(_SAFE_VALUE.findall(recipe.name))


def require_slurm(options: Mapping[str, object]) -> None:
    """Refuse what only a Slurm job has.

    Args:
        options: of the command by name, whose values are false where they were not given.

    Raises:
        ShearingError: one was given, and there is no such job.
    """
    if given := next((option for option, value in options.items() if value), None):
        raise ShearingError(
            given,
            value="without --slurm",
            allowed="a Slurm job that it is of",
            mend=f"add --slurm, or leave out {given}",
        )


def require_equal_shares(recipe: Recipe, *, num_processes: int) -> None:
    """Refuse a number of processes that cannot share the batches: better here than after days in a queue.

    Raises:
        ShearingError: see `split_batch`.
    """
    for stage in recipe.training_stages:
        split_batch(recipe, stage=stage, num_processes=num_processes)


def gpus_here() -> int:
    """GPUs of this machine, 1 where there is none: the processes that a node can hold."""
    import torch  # late: everything else here does without

    return max(1, torch.cuda.device_count())


def _require_at_least_one(field: str, *, value: int) -> None:
    if value < 1:
        raise ShearingError(field, value=value, allowed="a whole number from 1", mend=f"write {field} 1 or more")


def _program(recipe: Path, *, overrides: Sequence[str]) -> list[str]:
    return ["-m", "shearing", "run", str(recipe), *overrides]


def _options(job: SlurmJob, *, gpus: bool) -> list[str]:
    """The options of the job, checked and in sbatch's spelling."""
    further = [_parse_directive(directive) for directive in job.directives]
    # A site may want GPUs asked for in another way: --sbatch gres=gpu:h100:8.
    asked = any(key == "gres" or key.startswith("gpus") for key, _ in further)
    options: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gpus-per-node": job.gpus_per_node if gpus and not asked else None,
        "cpus-per-task": job.cpus_per_task,
        "mem": job.mem,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "output": job.output,
    }
    for key, value in options.items():
        if value is not None:
            _require_safe(f"--{key}", value=str(value))
    written = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return written + [f"--{key}" if value is None else f"--{key}={value}" for key, value in further]


def _parse_directive(text: str) -> tuple[str, str | None]:
    match = _DIRECTIVE.fullmatch(text)
    if match is None:
        raise ShearingError(
            "--sbatch",
            value=text,
            allowed="a long option of sbatch: KEY=VALUE or KEY",
            mend="as --sbatch constraint=h100",
        )
    key, value = match["key"], match["value"]
    if key in _OWN_OPTIONS:
        raise ShearingError(
            "--sbatch", value=text, allowed="options that have no flag here", mend=f"use {_OWN_OPTIONS[key]}"
        )
    if key in _FIXED:
        raise ShearingError(
            "--sbatch",
            value=text,
            allowed="options that the script does not rest on",
            mend="leave it out: a job that cannot be requeued, or forgets its log, cannot continue a run",
        )
    if value is not None:
        _require_safe(f"--sbatch {key}", value=value)
    return key, value


def _require_safe(field: str, *, value: str) -> None:
    if not _SAFE_VALUE.fullmatch(value) or not value.isprintable():
        raise ShearingError(
            field,
            value=value,
            allowed="text without white space, quotes, backslashes and #, which sbatch does not read as they stand",
            mend="choose another name or path",
        )


def _seconds(time: str) -> int:
    """Length of a time in one of Slurm's forms, in seconds."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    numbers = [*([days] if dash else []), *parts]
    if len(parts) > 3 or not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers):
        raise ShearingError("--time", value=time, allowed=_TIME_FORMS, mend="as --time 24:00:00, one day")
    values = [int(part) for part in parts]
    # Alone, the first number is minutes; two are minutes and seconds; after days, or as three, hours come first.
    hours_first = bool(dash) or len(values) == 3
    hours, minutes, seconds = (values if hours_first else [0, *values]) + [0] * (3 - len(values) - (not hours_first))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
