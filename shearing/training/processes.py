"""The processes of one run: who they are, and how they agree, wait and fail together.

Launchers (torchrun, accelerate, deepspeed, a Slurm script) say who a process is through RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. What is agreed on here goes over the CPU, in a group of its own, so that it neither waits
for the device nor shares the time limit of training's own exchanges: the main process may score units for an hour
while the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from shearing.errors import ShearingError
from shearing.training.watch import Watch

Value = TypeVar("Value")

_PATIENCE = timedelta(days=7)
"""For what the main process does alone. Whether it is alive at all is the watch's business."""


class FailedElsewhere(SystemExit):
    """Another process failed and says so itself; this one ends without a word."""

    def __init__(self) -> None:
        super().__init__(2)


class Processes:
    """One process among those of the run; as a context manager, what fails in one ends all of them.

    Args:
        rank: this process's number; 0 is the main one, which alone prints and writes what is not sharded.
        size: number of processes.

    Raises:
        ValueError: a rank outside of the size.
    """

    def __init__(self, *, rank: int = 0, size: int = 1) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}")
        self.rank, self.size = rank, size
        self._control: dist.ProcessGroup | None = None
        self._watch: Watch | None = None
        self._agreed = False  # whether all processes know that they end

    @classmethod
    def start(cls, *, device: str = "auto", timeout: float = 1800.0) -> Self:
        """Join the processes that the launcher started; alone where there was none.

        Args:
            device: `training.device` of the recipe.
            timeout: seconds that training's exchanges wait for the slowest process.

        Raises:
            ShearingError: the launcher's variables are incomplete or do not fit this machine.
        """
        rank, size, local_rank = _environment()
        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            if local_rank >= torch.cuda.device_count():
                raise ShearingError(
                    "LOCAL_RANK (set by the launcher)",
                    value=local_rank,
                    allowed=f"one process per GPU: this machine has {torch.cuda.device_count()}",
                    mend="start as many processes as there are GPUs (torchrun --nproc-per-node), "
                    "or set training.device=cpu",
                )
            torch.cuda.set_device(local_rank)
        processes = cls(rank=rank, size=size)
        if size > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                timeout=timedelta(seconds=timeout),
                rank=rank,
                world_size=size,
            )
            processes._control = dist.new_group(backend="gloo", timeout=_PATIENCE)
            processes._watch = Watch.start(rank=rank, size=size, share=processes.broadcast)
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
        if error is not None and not self._agreed and not isinstance(error, SystemExit):
            self._watch.fail(error, lost_peer=_is_lost_peer(error))
        self.barrier()
        self._watch.close()
        dist.destroy_process_group()

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
        if only_main:
            box = self.broadcast((error is not None, result))
            outcomes = [box]
        else:
            outcomes = self.gather((error is not None, result))
        failed = [rank for rank, (has_failed, _) in enumerate(outcomes) if has_failed]
        self._agreed = bool(failed)
        if failed and failed[0] == self.rank and error is not None:
            raise error
        if failed:
            raise FailedElsewhere
        return [outcome for _, outcome in outcomes]  # type: ignore[misc]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes of a tensor [...] on any device, in place of it; in training's own group."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """Every process's tensor [...], stacked by rank: [processes, ...]."""
        if self.size == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)


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
