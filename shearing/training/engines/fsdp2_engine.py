"""Steps by torch's own fully sharded data parallelism (`fully_shard`, FSDP2); see `Engine`.

Every parameter is cut along its first dimension, so what a process holds of it is one piece of the flattened parameter.
The weights of a decoder layer are whole while the layer runs. So are the embedding's and the head's, in the forward
pass alone: no gradient needs them, as the loss has made the head's own by then (`objectives.chunked`). What is left
(the final norm; an embedding that is the head too) is whole as long as a forward and its backward pass take.

AdamW sees what this process holds as plain tensors, in the memory that FSDP cuts up and gathers from: it is the same
optimiser, with the same kernel, as that of the other engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from typing_extensions import Self

from shearing.errors import ShearingError, key
from shearing.models.anatomy import decoder_layers, end_names
from shearing.models.stored.paging.paged import stop_paging
from shearing.models.stored.paging.places import Place
from shearing.objectives.objective import Objective
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import Fingerprints
from shearing.training.checkpoints.pieces import MOMENTS, WEIGHT, Piece, SavedState
from shearing.training.engines.engine import EngineParts
from shearing.training.engines.held_state import (
    StagedShard,
    fill_from_files,
    fill_moments,
    load_pieces,
    materialise,
    require_loaded,
)
from shearing.training.engines.kept_zeros import KeptZeros
from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.engines.optimizer import Optimization, adamw, set_learning_rate, start_state
from shearing.training.recipe import Fsdp2Recipe


@dataclass
class _Held:
    """What this process holds of a parameter.

    Attributes:
        cut: the parameter as FSDP has it while it is cut up; takes the sum of gradients.
        own: this process's rows of it, a parameter of its own in the same memory.
        shape: of the whole.
        start: position of the first own element in the whole, flattened.
    """

    cut: Any
    own: nn.Parameter
    shape: tuple[int, ...]
    start: int


class Fsdp2Engine:
    """fp32 weights, gradients and moments cut up among the processes; bf16 weights are gathered for bf16 products.

    Nothing here waits for the device: whether a step is skipped is decided there.

    Args:
        optimization: AdamW and its schedule.
        settings: the recipe's section.
        device, precision: where and in what forward passes are computed.
        processes: those of the run.

    Raises:
        ShearingError: this release of torch cannot.
    """

    def __init__(
        self,
        optimization: Optimization,
        *,
        settings: Fsdp2Recipe,
        device: torch.device,
        precision: torch.dtype,
        processes: Processes | None = None,
    ) -> None:
        require_fsdp2()
        self.device = device
        self.loss_scale = 1.0
        self._optimization = optimization
        self._settings = settings
        self._precision = precision
        self._processes = processes or Processes()
        self._units: list[Any] = []
        self._held: dict[str, _Held] = {}
        self._trained: list[_Held] = []
        self._optimizer: torch.optim.AdamW
        self._grad_norm = torch.zeros((), device=device)
        self._losses_finite = torch.ones((), dtype=torch.bool, device=device)
        self._zeros: KeptZeros | None = None
        self._moving: MovingMasks | None = None

    @classmethod
    def of(cls, parts: EngineParts) -> Self:
        """See `Engine.of`."""
        return cls(
            parts.optimization,
            settings=parts.training.fsdp2,
            device=parts.device,
            precision=parts.precision,
            processes=parts.processes,
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        """See `Engine.prepare`."""
        self._processes.require_group(self.device)
        materialise(model.buffers(), device=self.device, processes=self._processes)
        ends, layers = _ends_and_layers(model) if isinstance(model, Objective) else ((), ())
        places = stop_paging(model)
        by_name = {name: places[parameter] for name, parameter in model.named_parameters() if parameter in places}
        everyone = dist.group.WORLD
        assert everyone is not None
        cut_up = partial(self._cut_up, mesh=DeviceMesh.from_group(everyone, self.device.type), places=places)
        for unit in ends:
            cut_up(unit, passing=True).set_unshard_in_backward(False)
        for unit in layers:
            cut_up(unit, passing=self._settings.reshard_after_forward)
        cut_up(model, passing=False)  # the backward pass begins with what is outside of layers
        self._held = {name: self._held_of(parameter) for name, parameter in model.named_parameters()}
        self._trained = [held for held in self._held.values() if held.cut.requires_grad]
        # AdamW counts steps by a parameter: where this process has no row of any, by an empty one.
        trained = [held.own for held in self._trained if held.own.numel()] or [self._trained[0].own]
        self._optimizer = adamw(trained, optimization=self._optimization)
        fill_from_files(self._pieces(), by_name, processes=self._processes)
        start_state(self._optimizer)
        return model

    def autocast(self) -> AbstractContextManager[object]:
        """See `Engine.autocast`."""
        return contextlib.nullcontext()  # gathered weights have the products' precision, and so has what comes of them

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        self._losses_finite = self._losses_finite & loss.detach().isfinite()
        if self._settings.sum_gradients == "step":
            for unit in self._units:
                unit.set_requires_gradient_sync(last, recurse=False)
        loss.backward()

    def step(self, *, step: int) -> Tensor:
        """See `Engine.step`."""
        for held in self._trained:
            held.own.grad = None if held.cut.grad is None else held.cut.grad.to_local()
            held.cut.grad = None
        graded = [held.own for held in self._trained if held.own.grad is not None]
        self._grad_norm, finite = self._agreed_norm([own.grad for own in graded if own.grad is not None])
        skipped = ~(finite & self._grad_norm.isfinite())
        if self._optimization.gradient_clipping:
            clip_grads_with_norm_(graded, self._optimization.gradient_clipping, self._grad_norm)
        set_learning_rate(self._optimizer, self._optimization.rates.at(step))
        # As in the torch engine: the fused kernel returns at once and the step count does not move.
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        for own in graded:
            own.grad = None
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
        pieces = self._saved(self._pieces())
        return StagedShard(pieces, optimizer=self._optimizer, processes=self._processes, copied=copied)

    def load(self, folder: Path, *, saved: Fingerprints) -> None:
        """See `Engine.load`."""
        load_pieces(folder, self._saved(self._pieces()), optimizer=self._optimizer, shapes=self._shapes())
        self._let_go()
        require_loaded(folder, self._saved(self._pieces()), saved=saved, processes=self._processes)

    def load_moments(self, moments: SavedState) -> None:
        """See `Engine.load_moments`."""
        fill_moments(self._pieces(), moments, optimizer=self._optimizer, shapes=self._shapes())

    def keep_zeros(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.keep_zeros`."""
        self._zeros = KeptZeros(self._pieces(), shapes=self._shapes(), masks=masks)
        self._zeros.enforce()
        self._let_go()
        self._optimizer.register_step_post_hook(self._zeros.enforce)

    def move_masks(self, masks: MovingMasks) -> None:
        """See `Engine.move_masks`."""
        self._moving = masks
        masks.take(self._pieces(), shapes=self._shapes(), optimizer=self._optimizer, publish=self._let_go)

    @torch.no_grad()
    def close(self) -> None:
        """See `Engine.close`."""
        if not self._units:
            return
        self._let_go()
        for held in self._held.values():
            held.cut.grad = held.own.grad = None
            # FSDP's modules and their states refer to each other: whatever may keep them, keeps them without weights.
            held.own.untyped_storage().resize_(0)
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        if self._moving is not None:
            self._moving.close()
        self._units, self._held, self._trained, self._zeros, self._moving = [], {}, [], None, None

    def _cut_up(self, unit: nn.Module, *, mesh: DeviceMesh, places: Mapping[Tensor, Place], passing: bool) -> Any:
        """Share out a module's weights, but for those that are already; what is in files comes later.

        Args:
            unit: to be changed in place.
            mesh: of all processes.
            places: of weights that are in files.
            passing: what its forward pass has gathered is let go of behind it.

        Returns:
            The same module.
        """
        products = torch.bfloat16 if self._precision == torch.bfloat16 else None
        whole = [parameter for parameter in unit.parameters() if not _is_cut(parameter)]
        for parameter in whole:
            if parameter in places:  # what is cut up is room for it
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        in_memory = [parameter for parameter in whole if parameter not in places]
        materialise(in_memory, device=self.device, processes=self._processes)
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=passing,
            ignored_params={parameter for parameter in unit.parameters() if _is_cut(parameter)},
            mp_policy=MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False),
        )
        for parameter in whole:  # modules that masks have replaced still have them
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        # A sum, where FSDP by itself would take the mean: a loss is already a share of the global batch.
        sharded: Any = unit
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        self._units.append(sharded)
        return sharded

    def _held_of(self, parameter: Any) -> _Held:
        rows, processes = parameter.shape[0], self._processes
        first = min(processes.rank * -(-rows // processes.size), rows)
        own = nn.Parameter(parameter.detach().to_local(), requires_grad=parameter.requires_grad)
        return _Held(
            cut=parameter, own=own, shape=tuple(parameter.shape), start=first * (parameter.numel() // max(1, rows))
        )

    def _agreed_norm(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Norm of all gradients, and whether all losses were finite, over all processes: one exchange."""
        norm = get_total_norm(gradients).to(self.device, torch.float32)
        everyone = self._processes.all_gather(torch.stack([norm, self._losses_finite.float()]))
        return torch.linalg.vector_norm(everyone[:, 0]), everyone[:, 1].bool().all()

    def _let_go(self) -> None:
        """Free gathered weights, so that the next forward pass gathers them anew."""
        for unit in self._units:
            unit.reshard()

    def _saved(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        """Pieces with all that a checkpoint has of them."""
        return pieces if self._moving is None else self._moving.joined(pieces)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: held.shape for name, held in self._held.items()}

    def _pieces(self) -> Iterator[Piece]:
        """What this process holds; over all processes every element occurs once."""
        for name, held in self._held.items():
            state = self._optimizer.state.get(held.own, {})
            whole = {WEIGHT: held.own.detach(), **{kind: state[kind] for kind in MOMENTS if kind in state}}
            values = {kind: value.view(-1) for kind, value in whole.items()}
            yield Piece(name=name, shape=held.shape, start=held.start, values=values)


def _ends_and_layers(objective: Objective) -> tuple[Sequence[nn.Module], Iterable[nn.Module]]:
    """Modules whose weights come and go: embedding and head, where these are two, and the decoder layers."""
    model = objective.model
    embedding, head = (model.get_submodule(name) for name in end_names(model))
    if embedding.weight is head.weight:
        return (), decoder_layers(model)
    # The head's own forward pass never runs: what is computed with its weight is the forward pass of this module.
    objective.head_pass.head = head
    return (embedding, objective.head_pass), decoder_layers(model)


def _is_cut(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "to_local")


def require_fsdp2() -> None:
    """Refuse releases of torch whose `fully_shard` cannot take sums.

    Raises:
        ShearingError: this is one.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ShearingError(
            "engine",
            value="fsdp2",
            allowed=f"torch or deepspeed: fully_shard of torch {torch.__version__} cannot add up gradients",
            mend=f"install a newer torch (2.13 is tested), or set {key('engine')}=torch",
        )
