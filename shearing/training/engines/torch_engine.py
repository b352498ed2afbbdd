"""Steps by plain torch, on one process or several; see `Engine`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from typing_extensions import Self

from shearing.models.stored.paging.paged import stop_paging
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import Fingerprints
from shearing.training.checkpoints.pieces import Piece, SavedState
from shearing.training.engines.engine import EngineParts
from shearing.training.engines.gradient_sum import GradientSum
from shearing.training.engines.held_state import (
    StagedShard,
    fill_moments,
    load_pieces,
    materialise,
    require_loaded,
    whole_pieces,
)
from shearing.training.engines.kept_zeros import KeptZeros
from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.engines.optimizer import Optimization, adamw, count_step, set_learning_rate, start_state


class TorchEngine:
    """fp32 weights; every process holds everything, and gradients are summed.

    Nothing here waits for the device: whether a step is skipped is decided there.
    """

    def __init__(
        self,
        optimization: Optimization,
        *,
        device: torch.device,
        precision: torch.dtype,
        processes: Processes | None = None,
    ) -> None:
        self.device = device
        self.loss_scale = 1.0
        self._optimization = optimization
        self._precision = precision
        self._processes = processes or Processes()
        self._parameters: dict[str, nn.Parameter] = {}
        self._trained: list[nn.Parameter] = []
        self._grad_norm = torch.zeros((), device=device)
        self._losses_finite = torch.ones((), dtype=torch.bool, device=device)
        self._sum: GradientSum | None = None
        self._zeros: KeptZeros | None = None
        self._moving: MovingMasks | None = None

    @classmethod
    def of(cls, parts: EngineParts) -> Self:
        """See `Engine.of`."""
        return cls(parts.optimization, device=parts.device, precision=parts.precision, processes=parts.processes)

    def prepare(self, model: nn.Module) -> nn.Module:
        """See `Engine.prepare`."""
        places = stop_paging(model)
        tensors = (*model.parameters(), *model.buffers())
        materialise(tensors, device=self.device, processes=self._processes, places=places)
        self._parameters = dict(model.named_parameters())
        self._trained = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        self._optimizer = adamw(self._trained, optimization=self._optimization)
        start_state(self._optimizer)
        if self._processes.size > 1:
            self._sum = GradientSum(self._trained)
        return model

    def autocast(self) -> AbstractContextManager[object]:
        """See `Engine.autocast`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._precision == torch.bfloat16)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        self._losses_finite = self._losses_finite & loss.detach().isfinite()
        if self._sum is not None:
            self._sum.armed = last
        loss.backward()

    def step(self, *, step: int) -> Tensor:
        """See `Engine.step`."""
        if self._sum is not None:
            self._sum.finish()
            dist.all_reduce(finite := self._losses_finite.to(torch.int32), op=dist.ReduceOp.MIN)
            self._losses_finite = finite.bool()
        for parameter in self._trained:
            if not parameter.requires_grad:
                parameter.grad = None  # this step does not train it
        parameters = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        self._grad_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        skipped = ~(self._losses_finite & self._grad_norm.isfinite())
        if self._optimization.gradient_clipping:
            clip_grads_with_norm_(parameters, self._optimization.gradient_clipping, self._grad_norm)
        set_learning_rate(self._optimizer, self._optimization.rates.at(step))
        # The switch torch.amp.GradScaler uses: the fused kernel returns at once and the step count does not move.
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        count_step(self._optimizer, skipped=skipped)
        self._optimizer.zero_grad(set_to_none=True)
        self._losses_finite = torch.ones_like(self._losses_finite)
        return skipped

    def grad_norm(self) -> Tensor:
        """See `Engine.grad_norm`."""
        return self._grad_norm

    def stage(self, *, copied: bool = True) -> StagedShard:
        """See `Engine.stage`."""
        if self._zeros is not None:
            self._zeros.require()
        if self._moving is not None:
            self._moving.require()
        pieces = self._saved(self._shares())
        return StagedShard(pieces, optimizer=self._optimizer, processes=self._processes, copied=copied)

    def load(self, folder: Path, *, saved: Fingerprints) -> None:
        """See `Engine.load`."""
        load_pieces(folder, self._saved(self._wholes()), optimizer=self._optimizer, shapes=self._shapes())
        require_loaded(folder, self._saved(self._shares()), saved=saved, processes=self._processes)

    def load_moments(self, moments: SavedState) -> None:
        """See `Engine.load_moments`."""
        fill_moments(self._wholes(), moments, optimizer=self._optimizer, shapes=self._shapes())

    def keep_zeros(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.keep_zeros`."""
        self._zeros = KeptZeros(self._wholes(), shapes=self._shapes(), masks=masks)
        self._zeros.enforce()
        self._optimizer.register_step_post_hook(self._zeros.enforce)

    def move_masks(self, masks: MovingMasks) -> None:
        """See `Engine.move_masks`."""
        self._moving = masks
        masks.take(self._wholes(), shapes=self._shapes(), optimizer=self._optimizer)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._sum is not None:
            self._sum.close()
        for parameter in self._parameters.values():
            parameter.grad = None
        if self._parameters:
            self._optimizer.state.clear()
            self._optimizer.param_groups.clear()
        if self._moving is not None:
            self._moving.close()
        self._parameters, self._trained = {}, []
        self._sum = self._zeros = self._moving = None

    def _saved(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        """Pieces with all that a checkpoint has of them."""
        return pieces if self._moving is None else self._moving.joined(pieces)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def _wholes(self) -> Iterator[Piece]:
        """All of every parameter, as each process holds it."""
        return whole_pieces(self._parameters, optimizer=self._optimizer, among=None)

    def _shares(self) -> Iterator[Piece]:
        """Of every parameter the share that is this process's to write."""
        return whole_pieces(self._parameters, optimizer=self._optimizer, among=self._processes)
