"""Where the tasks of a preparation run: datatrove's executors for this machine, Slurm and Ray.

A preparation is a list of stages; each has a pipeline and a number of tasks, and needs all tasks of the one before.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from loguru import logger

from data_tools.preparation.recipe import RaySettings, SlurmSettings
from data_tools.preparation.work_folder import PREFIX, WorkFolder
from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_json
from shearing.settings.extras import require_extra

_WATCH_SECONDS = 0.5
_UNWIND_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


def require_none_queued(work: WorkFolder) -> None:
    """Check that no cluster is to write into the folder of the corpus: none of its jobs can know what is decided here.

    Raises:
        ShearingError: jobs of this preparation or another one wait or run.
    """
    for folder in sorted(work.path.parent.glob(f"{PREFIX}*")):
        if queued := _queued(WorkFolder(folder)):
            which = "this preparation" if folder == work.path else f"another preparation ({folder})"
            value, end = f"jobs {', '.join(queued)} of {which} are in the queue", f"scancel {' '.join(queued)}"
            if failure := WorkFolder(folder).first_failure():
                # Those that wait for a task that failed may wait for ever.
                value += f", and a task of it has failed: {failure.field} = {failure.value}"
                mend = f"end them: {end}; the command that submitted them, typed again, then says more"
            else:
                mend = f"wait for them (squeue -j {','.join(queued)}), or end them: {end}"
            raise ShearingError("executor", value=value, allowed="one preparation at a time", mend=mend)


@dataclass(frozen=True)
class Stage:
    """Tasks that may run at once; `pipeline` is the same for all, and learns its rank."""

    name: str
    pipeline: Sequence[Callable[..., Any]]
    tasks: int


def run_locally(stages: Sequence[Stage], *, work: WorkFolder, workers: int, watch: Callable[[], None]) -> None:
    """Run stages in processes of this machine, or, with one worker, in this one.

    Args:
        watch: called every half second while a stage runs, in a thread of its own.

    Raises:
        ShearingError: a task failed, or its process was killed.
    """
    logger.remove()
    # Workers are forked from one process that has imported all this already, instead of importing it each.
    loaded = {"shearing.cli"} & set(sys.modules)
    multiprocess.set_forkserver_preload(["data_tools.preparation.steps", __name__, *loaded])
    for stage in stages:
        executor = _LocalExecutor(
            list(stage.pipeline),
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            logging_dir=str(work.logs(stage.name)),
        )
        with _watching(executor, work=work, watch=watch), _helpers_end_with_this_process():
            executor.run()


def run_on_ray(
    stages: Sequence[Stage], *, work: WorkFolder, workers: int | None, settings: RaySettings, watch: Callable[[], None]
) -> None:
    """Run stages as Ray tasks, on a running cluster or one that is started here.

    Raises:
        ShearingError: Ray is not installed or not reached, or a task failed.
    """
    require_extra("ray", modules=["ray"], what="executor")
    import ray

    logger.remove()
    paths = os.pathsep.join(path for path in [str(Path.cwd()), *sys.path] if path)
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(
                address=settings.address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=None if settings.address else {"env_vars": {"PYTHONPATH": paths}},
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ShearingError(
                "ray.address",
                value=settings.address,
                allowed="a Ray cluster that can be reached, or none to start one here",
                mend=str(error).splitlines()[0],
            ) from error
    try:
        for stage in stages:
            executor = _RayExecutor(
                list(stage.pipeline),
                tasks=stage.tasks,
                workers=min(workers or _ray_cores(settings), stage.tasks),
                logging_dir=str(work.logs(stage.name)),
                cpus_per_task=settings.cpus_per_task,
                mem_per_cpu_gb=settings.memory_gb,
            )
            with _watching(executor, work=work, watch=watch):
                executor.run()
            # datatrove logs what went wrong with a task, and ends as if nothing had.
            if missing := executor.get_incomplete_ranks():
                raise work.first_failure() or ShearingError(
                    f"tasks {missing} of {stage.name}",
                    value="ended without a word",
                    allowed="tasks that end well",
                    mend=f"type the same command again; if it stays so, lower workers: {work.logs(stage.name)}/logs",
                )
    finally:
        if started:
            ray.shutdown()


def submit_to_slurm(
    stages: Sequence[Stage], *, work: WorkFolder, workers: int | None, settings: SlurmSettings, name: str
) -> dict[str, str]:
    """Submit each stage as an array of jobs that waits for the one before; returns the number of each job.

    Raises:
        ShearingError: no Slurm here, or Slurm refuses.
    """
    if shutil.which("sbatch") is None:
        raise ShearingError(
            "executor",
            value="slurm, without sbatch on PATH",
            allowed="a machine that submits Slurm jobs",
            mend="go to a login node of the cluster, or choose executor=local or ray",
        )
    logger.remove()
    activate = f"source {Path(sys.prefix) / 'bin' / 'activate'}" if sys.prefix != sys.base_prefix else None
    previous: _SlurmExecutor | None = None
    jobs = {}
    for stage in stages:
        executor = _SlurmExecutor(
            list(stage.pipeline),
            tasks=stage.tasks,
            time=settings.time,
            partition=settings.partition,
            cpus_per_task=settings.cpus_per_task,
            mem_per_cpu_gb=settings.mem_per_cpu_gb,
            workers=workers or -1,
            job_name=f"{name}-{stage.name}",
            qos=settings.qos,
            env_command=settings.setup or activate,
            # Jobs that wait for one that failed end, instead of staying in the queue.
            sbatch_args={"kill-on-invalid-dep": "yes"} | ({"account": settings.account} if settings.account else {}),
            depends=previous,
            logging_dir=str(work.logs(stage.name)),
            with_srun=settings.srun,
        )
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            raise ShearingError(
                "sbatch",
                value=f"exit code {error.returncode}",
                allowed="a job that this cluster takes",
                mend="what sbatch said is above; `sinfo` lists partitions",
            ) from error
        if executor.job_id != -1:
            jobs[stage.name] = str(executor.job_id)
            write_json(work.jobs, {"jobs": jobs})
        previous = executor
    return jobs


class _Quiet:
    """Keeps datatrove's log of a task in its file, off the terminal."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        if multiprocess.parent_process():
            # Control-C reaches every process of the terminal; the first one ends the others.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)  # type: ignore[misc]
            finally:
                logger.remove()  # datatrove leaves one that writes to what is standard error here


class _LocalExecutor(_Quiet, LocalPipelineExecutor):  # type: ignore[misc]
    pass


class _RayExecutor(_Quiet, RayPipelineExecutor):  # type: ignore[misc]
    def __setstate__(self, state: dict[str, Any]) -> None:
        # This is in Ray's process, which has many threads and which datatrove forks: what one of them has locked at
        # that moment would stay locked in the child for ever.
        multiprocess.set_start_method("forkserver", force=True)
        self.__dict__.update(state)


class _SlurmExecutor(SlurmPipelineExecutor):  # type: ignore[misc]
    def launch_merge_stats(self) -> None:
        """A job that only adds up datatrove's own counts, which nobody reads: left out."""


def _ray_cores(settings: RaySettings) -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)) // settings.cpus_per_task)


def _queued(work: WorkFolder) -> list[str]:
    """Jobs of a preparation that Slurm still knows as waiting or running."""
    if not work.jobs.is_file() or shutil.which("squeue") is None:
        return []
    numbers = [str(number) for number in read_json(work.jobs)["jobs"].values()]
    found = []
    for number in numbers:
        listed = subprocess.run(["squeue", "-h", "-j", number], capture_output=True, text=True, check=False)
        if listed.returncode == 0 and listed.stdout.strip():
            found.append(number)
    return found


@contextmanager
def _watching(executor: Any, *, work: WorkFolder, watch: Callable[[], None]) -> Iterator[None]:
    """Call `watch` while the block runs, and end the block if a process of the pool was killed.

    A pool replaces a process that was killed but never hears of its task, and would wait for ever.
    """
    done = threading.Event()
    killed = threading.Event()

    def look() -> None:
        seen: set[int] = set()
        suspected = False
        while not done.wait(_WATCH_SECONDS):
            watch()
            alive = {child.pid for child in multiprocess.active_children()}
            gone = bool(seen - alive) and bool(executor.get_incomplete_ranks()) and work.first_failure() is None
            if gone and suspected and threading.main_thread().is_alive():
                killed.set()
                os.kill(os.getpid(), signal.SIGINT)
                if not done.wait(_UNWIND_SECONDS):
                    _end_at_once(seen)
                return
            suspected = gone
            seen |= alive

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not killed.is_set():
            raise
        raise _killed_worker() from None
    finally:
        done.set()
        thread.join()
        watch()


def _killed_worker() -> ShearingError:
    return ShearingError(
        "workers",
        value="a process was killed, most often for lack of memory",
        allowed="as many tasks at a time as fit into memory",
        mend="type the same command again with fewer --workers: finished shards are kept",
    )


def _end_at_once(processes: set[int]) -> None:
    """The process that was killed held a lock that its pool wants, so nobody can end in good order any more."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    print(f"error: {_killed_worker()}", file=sys.stderr, flush=True)
    os._exit(2)


_forking = threading.Event()


def _end_with_parent() -> None:
    if _forking.is_set():
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_end_with_parent)


@contextmanager
def _helpers_end_with_this_process() -> Iterator[None]:
    """A helper process that datatrove forks here would outlive a `kill -9` of this one; on Linux the kernel ends it."""
    _forking.set()
    try:
        yield
    finally:
        _forking.clear()
