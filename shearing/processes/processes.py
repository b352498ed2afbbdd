"""The processes of one run: who they are, and how they agree, wait and fail together.

Launchers (torchrun, accelerate, deepspeed, a Slurm script) say who a process is through RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. What is agreed on here goes over the CPU, in a group of its own, so that it neither waits
for the device nor shares the time limit of training's own exchanges: the main process may score units for an hour
while the others wait.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from typing_extensions import Self

from shearing.errors import ShearingError, key, named
from shearing.processes.launcher import launcher_guard
from shearing.processes.watch import Watch, exit_code

Value = TypeVar("Value")
Mendable = Callable[[BaseException], ShearingError | None]

_PATIENCE = timedelta(days=7)
"""For what the main process does alone. Whether it is alive at all is the watch's business."""

_SECONDS_TO_TELL = 2.0
"""For the process that failed to print why: a launcher kills it as soon as another one has ended."""


class AgreedEnd(SystemExit):
    """An end that all processes of the run know of: each of them raises it, or the error that is its reason."""


class FailedElsewhere(AgreedEnd):
    """Another process failed and says so itself; this one ends without a word, with the same exit code."""


class Processes:
    """One process among those of the run; as a context manager, what fails in one ends all of them.

    Args:
        rank: this process's number; 0 is the main one, which alone prints and writes what is not sharded.
        size: number of processes.
        mendable: what a user can mend of an error that is none of our own, such as the operating system's about a
            file; None where it is nothing of the kind.

    Raises:
        ValueError: a rank outside of the size.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, mendable: Mendable | None = None) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        self.rank, self.size = rank, size
        self._mendable = mendable or (lambda _: None)
        self._control: dist.ProcessGroup | None = None
        self._watch: Watch | None = None
        self._agreed: BaseException | None = None  # the error of this process that the others have been told

    @classmethod
    def start(
        cls,
        *,
        device: str = "auto",
        timeout: float = 1800.0,
        names: Mapping[str, str] | None = None,
        mendable: Mendable | None = None,
    ) -> Self:
        """Join the processes that the launcher started; alone where there was none.

        Args:
            device: `auto`, `cpu` or `cuda`.
            timeout: seconds that training's exchanges wait for the slowest process.
            names: what people call these two (see `errors.named`): what fails here may be said here, and end the
                process.
            mendable: see the class.

        Raises:
            ShearingError: the launcher's variables are incomplete or do not fit this machine; the processes do not
                come, or cannot reach each other.
        """
        said = named(names or {})
        rank, size, local_rank = _environment()
        on_gpu = device != "cpu" and torch.cuda.is_available()
        processes = cls(rank=rank, size=size, mendable=mendable)
        guard = launcher_guard()
        if size == 1:
            if on_gpu:
                said(_take_gpu)(local_rank, alone=True)
            return processes
        meeting = _meet(size, seconds=timeout)
        tells = rank == 0 or local_rank == 0
        # The watch is first: what fails from here on, on whatever host, ends all.
        watch = said(Watch.start)(rank=rank, size=size, meeting=meeting, seconds=timeout, tells=tells)
        processes._watch = watch
        guard.tell_through(watch.lose_launcher)
        try:
            if on_gpu:
                said(_take_gpu)(local_rank, alone=False)
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            processes._control = _connect(backend, store=meeting, rank=rank, size=size, seconds=timeout)
            if on_gpu:
                said(_require_own_gpus)(processes.gather(_own_gpu()))
        except BaseException as error:  # noqa: BLE001  told to all, and the end of this process
            watch.fail(error, lost_peer=_is_lost_peer(error))
        return processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return self.rank == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        assert self._watch is not None
        agreed = error is None or error is self._agreed or isinstance(error, AgreedEnd)
        if error is not None and not agreed:
            said = self._mendable(error)
            if said is not None:
                said.__cause__ = error
            self._watch.fail(said or error, lost_peer=_is_lost_peer(error))
        try:
            self.barrier()
        except BaseException as lost:  # noqa: BLE001  told to all, and the end of this process
            if error is None or isinstance(error, AgreedEnd):
                self._watch.fail(lost, lost_peer=_is_lost_peer(lost))
            self._watch.fail(error, lost_peer=False)
        self._watch.close()
        dist.destroy_process_group()
        if isinstance(error, FailedElsewhere):
            time.sleep(_SECONDS_TO_TELL)

    def broadcast(self, value: Value | None = None) -> Value:
        """The main process's value, on every process; it is pickled."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self._control, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, on every process, by rank; they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def on_main(self, function: Callable[[], Value]) -> Value:
        """Run `function` on the main process alone; its result on all.

        Raises:
            FailedElsewhere: on the others, when the main process raised; there the error itself is raised.
        """
        return self._same_fate(function, only_main=True)[0]

    def together(self, function: Callable[[], Value]) -> list[Value]:
        """Run `function` on every process; everyone's results by rank, once all are done.

        Raises:
            FailedElsewhere: another process raised; of several, the one with the lowest rank raises its error.
        """
        return self._same_fate(function, only_main=False)

    def each(self, function: Callable[[], Value]) -> Value:
        """As `together`, but only this process's own result, which need not be picklable."""
        own: list[Value] = []
        self.together(lambda: own.append(function()))
        return own[0]

    def _same_fate(self, function: Callable[[], Value], *, only_main: bool) -> list[Value]:
        result, error = None, None
        if self.is_main or not only_main:
            try:
                result = function()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as raised:  # noqa: BLE001  told to the others first, then raised
                error = raised
        own = (0 if error is None else exit_code(self._mendable(error) or error), result)
        outcomes = [self.broadcast(own)] if only_main else self.gather(own)
        failed = [rank for rank, (code, _) in enumerate(outcomes) if code]
        if failed and failed[0] == self.rank and error is not None:
            self._agreed = error
            raise error
        if failed:
            raise FailedElsewhere(outcomes[failed[0]][0])
        return [outcome for _, outcome in outcomes]  # type: ignore[misc]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes of a tensor [...] on any device, in place of it; in training's own group."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_on(self, values: Tensor, *, rank: int) -> Tensor:
        """As `sum`, but only one process has the result; what the others are left with is of no use."""
        if self.size > 1:
            dist.reduce(values, dst=rank)
        return values

    def share(self, values: Tensor, *, rank: int = 0) -> Tensor:
        """One process's tensor [...] on all, in place of one of its shape that they have; in training's own group."""
        if self.size > 1:
            values = values.contiguous()  # what is sent is memory, in whatever order it lies
            dist.broadcast(values, src=rank)
        return values

    def largest(self, value: int) -> tuple[Any, Tensor]:
        """What to wait for, and where the largest value of several processes is then; over the CPU."""
        tensor = torch.tensor(value)
        return dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control, async_op=True), tensor

    def require_group(self, device: torch.device) -> None:
        """Make training's group where there is none yet: some libraries want one of a single process too.

        Args:
            device: of what will be exchanged.
        """
        if not dist.is_initialized():
            assert self.size == 1, "several processes have met"
            alone: Any = vars(dist)["HashStore"]
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=alone(), rank=0, world_size=1)

    def all_gather(self, values: Tensor) -> Tensor:
        """Every process's tensor [...], stacked by rank: [processes, ...]."""
        if self.size == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)


class Question:
    """A small number that every process gives at each step, and the largest of them one step later.

    Nobody waits in the step that asks, neither for the device nor, unless it is a step ahead, for another process.

    Args:
        processes: that ask together, as often as each other.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._asked: tuple[Any, Tensor] | None = None

    def ask(self, value: int) -> int:
        """Asks; returns the answer to the question before, 0 where there was none. One process alone gets `value`."""
        if self._processes.size == 1:
            return value
        answer = self.answer()
        self._asked = self._processes.largest(value)
        return answer

    def answer(self) -> int:
        """The answer to the last question, 0 where there was none; the next one has none before it."""
        if self._asked is None:
            return 0
        (work, largest), self._asked = self._asked, None
        work.wait()
        return int(largest)


def _take_gpu(local_rank: int, *, alone: bool) -> None:
    """Make one GPU this process's own.

    Of several processes each may see one alone, which a cluster has bound to it: it is number 0 to each of them. If it
    is the same one to all, only `_require_own_gpus` can tell.
    """
    count = torch.cuda.device_count()
    bound = count == 1 and not alone
    if local_rank >= count and not bound:
        raise _too_few_gpus("LOCAL_RANK (set by the launcher)", value=local_rank, count=count)
    torch.cuda.set_device(0 if bound else local_rank)


def _own_gpu() -> tuple[str, str]:
    """Host, and number and name of the GPU: where each process sees another one, numbers are the same."""
    number = torch.cuda.current_device()
    # Builds for some GPUs have no names; a GPU that is bound to a process then cannot be told from one that all share.
    return socket.gethostname(), f"{number} {getattr(torch.cuda.get_device_properties(number), 'uuid', None)}"


def _require_own_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Refuse two processes on one GPU.

    Args:
        gpus: of each process, see `_own_gpu`.

    Raises:
        ShearingError: two are the same.
    """
    if shared := [gpu for gpu, processes in Counter(gpus).items() if processes > 1]:
        host, ranks = shared[0][0], [rank for rank, gpu in enumerate(gpus) if gpu == shared[0]]
        raise ShearingError(
            "GPUs (of the processes)",
            value=f"one on {host} for ranks {ranks}",
            allowed="a GPU of its own for each process",
            mend="bind another one to each task (Slurm: --gpus-per-task=1), or let every process see all GPUs of its "
            f"host; fewer processes (torchrun --nproc-per-node), or {key('device')}=cpu, where there are no more GPUs",
        )


def _too_few_gpus(field: str, *, value: object, count: int) -> ShearingError:
    return ShearingError(
        field,
        value=value,
        allowed=f"one process per GPU: this machine has {count}",
        mend=f"start as many processes as there are GPUs (torchrun --nproc-per-node), or set {key('device')}=cpu",
    )


def _meet(size: int, *, seconds: float) -> Any:
    """The launcher's store, or the main process's where the launcher has none."""
    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise ShearingError(
            "MASTER_ADDR and MASTER_PORT (environment)",
            value=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            allowed=f"an address of the first host, reached by all {size} processes, with a free port; "
            f"instead: {_first_line(error)}",
            mend="try another port; on several hosts: are all of them started, with the same MASTER_ADDR, and does the "
            "firewall let them in?",
        ) from error


def _connect(backend: str, *, store: Any, rank: int, size: int, seconds: float) -> dist.ProcessGroup:
    """Make training's group, and one for what is agreed on."""
    prefixed: Any = vars(dist)["PrefixStore"]
    try:
        dist.init_process_group(
            backend,
            store=prefixed("training", store),
            timeout=timedelta(seconds=seconds),
            rank=rank,
            world_size=size,
        )
        control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise ShearingError(
            "GLOO_SOCKET_IFNAME (environment)",
            value=os.environ.get("GLOO_SOCKET_IFNAME"),
            allowed="the network interface that reaches the other hosts; unset, it is the one to which this host's "
            f"own name leads. {_first_line(error)}",
            mend="on every host: export GLOO_SOCKET_IFNAME=eth0, as `ip addr` names it there (docs/distributed.md)",
        ) from error
    return control


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _environment() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK; (0, 1, 0) where no launcher set them."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 1, 0
    numbers: dict[str, int] = {}
    for name, default in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if text is None or not text.isdigit():
            raise ShearingError(
                f"{name} (environment)",
                value=text,
                allowed="a whole number, set by the launcher together with RANK, WORLD_SIZE and LOCAL_RANK",
                mend="start with torchrun, accelerate launch, deepspeed or `shear launch --slurm`; "
                "for one process: unset RANK WORLD_SIZE (see docs/distributed.md)",
            )
        numbers[name] = int(text)
    if numbers["WORLD_SIZE"] > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise ShearingError(
                    f"{name} (environment)",
                    value=None,
                    allowed="address and port at which the processes meet",
                    mend="start with torchrun, or set MASTER_ADDR to the first host and MASTER_PORT to a free port",
                )
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ShearingError(
            "RANK (environment)",
            value=numbers["RANK"],
            allowed=f"0 to WORLD_SIZE - 1 = {numbers['WORLD_SIZE'] - 1}",
            mend="give every process a number of its own, or start with a launcher",
        )
    return numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]


def _is_lost_peer(error: BaseException) -> bool:
    """Whether an exchange failed, so that the cause is probably another process's end."""
    if isinstance(error, ShearingError) or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(
        sign in text
        for sign in ("connection closed by peer", "connection reset", "broken pipe", "timed out", "gloo", "socket")
    )
