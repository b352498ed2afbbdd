"""Steps by DeepSpeed: ZeRO 0 to 3, with offloading; see `Engine`.

DeepSpeed is driven directly. accelerate's wrapper would do the optimiser's step inside `backward` and, on a machine
without a GPU, count one process (docs/distributed.md). Its checkpoints are not used either: see `checkpoints.pieces`.

What is read of DeepSpeed's insides is in two places: `_pieces` knows which elements a process holds, `_empty` what
outlives an engine. What comes back from a checkpoint is compared with what was saved, so a release that lays its memory
out differently is refused and not trained with.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from typing_extensions import Self

from shearing.errors import ShearingError, key
from shearing.models.stored.paging.paged import stop_paging
from shearing.models.stored.paging.places import Place
from shearing.processes.processes import Processes
from shearing.training.checkpoints.fingerprints import Fingerprints
from shearing.training.checkpoints.pieces import MOMENTS, WEIGHT, Piece, SavedState
from shearing.training.engines.deepspeed_config import deepspeed_config
from shearing.training.engines.engine import EngineParts
from shearing.training.engines.held_state import (
    StagedShard,
    fill_from_files,
    fill_moments,
    load_pieces,
    materialise,
    require_loaded,
    whole_pieces,
)
from shearing.training.engines.kept_zeros import KeptZeros
from shearing.training.engines.moving_masks import MovingMasks
from shearing.training.engines.optimizer import Optimization, adamw, set_learning_rate, start_state
from shearing.training.recipe import DeepSpeedRecipe


class DeepSpeedEngine:
    """ZeRO on the processes of the run.

    Args:
        optimization: AdamW and its schedule.
        settings: the recipe's section.
        device, precision: where and in what forward passes are computed; bf16 keeps fp32 master weights.
        processes: those of the run.
        micro_batch_size: sequences of a forward pass of one process.
        accumulation: micro-batches of a step of one process.

    Raises:
        ShearingError: DeepSpeed is not installed, or its settings are wrong (see `deepspeed_config`).
    """

    def __init__(
        self,
        optimization: Optimization,
        *,
        settings: DeepSpeedRecipe,
        device: torch.device,
        precision: torch.dtype,
        processes: Processes,
        micro_batch_size: int,
        accumulation: int,
    ) -> None:
        self.device = device
        # DeepSpeed averages over processes; a loss is already a share of the global batch.
        self.loss_scale = float(processes.size)
        self._optimization = optimization
        self._settings = settings
        self._precision = precision
        self._processes = processes
        self._micro_batch_size, self._accumulation = micro_batch_size, accumulation
        self._grad_norm = torch.zeros((), device=device)
        self._engine: Any = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.AdamW
        self._zeros: KeptZeros | None = None
        self._moving: MovingMasks | None = None

    @classmethod
    def of(cls, parts: EngineParts) -> Self:
        """See `Engine.of`."""
        return cls(
            parts.optimization,
            settings=parts.training.deepspeed,
            device=parts.device,
            precision=parts.precision,
            processes=parts.processes,
            micro_batch_size=parts.micro_batch_size,
            accumulation=parts.accumulation,
        )

    @property
    def _stage(self) -> int:
        return self._settings.zero_stage

    @property
    def _low_precision(self) -> bool:
        # ZeRO-0 shares out nothing, so it computes as plain torch does: fp32 weights under autocast.
        return self._precision == torch.bfloat16 and self._stage > 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """See `Engine.prepare`."""
        deepspeed = import_deepspeed(self.device)
        _join(self._processes, device=self.device)
        places = stop_paging(model)
        originals = self._originals(model, places=places) if self._low_precision else {}
        config = deepspeed_config(
            self._settings,
            low_precision=self._low_precision,
            gradient_clipping=self._optimization.gradient_clipping,
            micro_batch_size=self._micro_batch_size,
            accumulation=self._accumulation,
            num_processes=self._processes.size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            on_gpu=self.device.type == "cuda",
        )
        with _told_of_gpu(self.device):
            buffers = self._place(model, config=config, deepspeed=deepspeed, places=places)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._parameters = dict(model.named_parameters())
            self._optimizer = adamw(trained, optimization=self._optimization)
            # What it has for ZeRO-1 in bf16 prints how much memory there is before and after each thing it makes.
            with contextlib.redirect_stdout(io.StringIO()):
                self._engine, *_ = deepspeed.initialize(
                    model=model, optimizer=self._optimizer, config=config, dist_init_required=False
                )
        for name, buffer in buffers.items():
            # Casting a model casts its rotary frequencies too, which costs long sequences their positions.
            module, _, own_name = name.rpartition(".")
            model.get_submodule(module).register_buffer(own_name, buffer, persistent=False)
        if self._stage == 0:
            start_state(self._optimizer)
        else:
            self._start_sharded_state()
        self._restore_precision(originals, places=places)
        prepared: nn.Module = self._engine
        return prepared

    def autocast(self) -> AbstractContextManager[object]:
        """See `Engine.autocast`."""
        if self._precision == torch.bfloat16 and not self._low_precision:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Engine.backward`."""
        self._engine.backward(loss * self.loss_scale, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch

    def step(self, *, step: int) -> Tensor:
        """See `Engine.step`."""
        set_learning_rate(self._optimizer, self._optimization.rates.at(step))
        if self._stage == 0:
            return self._plain_step()
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        norm = self._engine.get_global_grad_norm()
        self._grad_norm = torch.as_tensor(float("nan") if skipped or norm is None else norm, device=self.device)
        return torch.tensor(skipped, device=self.device)

    def _plain_step(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        self._grad_norm = get_total_norm(gradients)
        skipped = ~self._grad_norm.isfinite()
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._engine.step()
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
        pieces = self._saved(self._pieces(shared=True))
        return StagedShard(pieces, optimizer=self._optimizer, processes=self._processes, copied=copied)

    def load(self, folder: Path, *, saved: Fingerprints) -> None:
        """See `Engine.load`."""
        load_pieces(folder, self._saved(self._pieces(shared=False)), optimizer=self._optimizer, shapes=self._shapes())
        self._publish()
        require_loaded(folder, self._saved(self._pieces(shared=True)), saved=saved, processes=self._processes)

    def load_moments(self, moments: SavedState) -> None:
        """See `Engine.load_moments`."""
        fill_moments(self._pieces(shared=False), moments, optimizer=self._optimizer, shapes=self._shapes())

    def keep_zeros(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.keep_zeros`."""
        self._zeros = KeptZeros(self._pieces(shared=False), shapes=self._shapes(), masks=masks)
        self._zeros.enforce()
        self._publish()
        # ZeRO hands out its master weights after this optimiser's own step, so what it hands out has the zeros.
        self._optimizer.register_step_post_hook(self._zeros.enforce)

    def move_masks(self, masks: MovingMasks) -> None:
        """See `Engine.move_masks`."""
        self._moving = masks
        masks.take(self._pieces(shared=False), shapes=self._shapes(), optimizer=self._optimizer, publish=self._publish)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._engine is None:
            return
        zero = self._engine.optimizer
        self._engine.destroy()
        if self._stage > 0:
            # Hooks of the parameters lead to it for as long as there is a model, and it holds master weights.
            self._engine.optimizer = None
            vars(zero).clear()
        if self._stage == 3:
            _empty(self._parameters.values())
        elif self._stage > 0:
            for parameter in self._parameters.values():
                vars(parameter).clear()  # DeepSpeed's own of it, which may keep it and its gradients alive
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        if self._moving is not None:
            self._moving.close()
        self._engine, self._parameters, self._zeros, self._moving = None, {}, None, None

    # -- placement -------------------------------------------------------------------------------------------------

    def _place(
        self, model: nn.Module, *, config: Mapping[str, Any], deepspeed: Any, places: Mapping[Tensor, Place]
    ) -> dict[str, Tensor]:
        """Bring weights to the devices, cut up for ZeRO-3; returns the buffers as they are."""
        if self._stage < 3:
            tensors = (*model.parameters(), *model.buffers())
            dtype = torch.bfloat16 if self._low_precision else None
            materialise(tensors, device=self.device, processes=self._processes, places=places, dtype=dtype)
        else:
            self._cut_up(model, config=config, deepspeed=deepspeed, places=places)
        return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    @torch.no_grad()
    def _cut_up(
        self, model: nn.Module, *, config: Mapping[str, Any], deepspeed: Any, places: Mapping[Tensor, Place]
    ) -> None:
        """ZeRO-3: one module's weights at a time exist whole; DeepSpeed hands out those of the main process."""
        dtype = torch.bfloat16 if self._low_precision else torch.float32

        def bring(parameters: Sequence[nn.Parameter]) -> None:
            for parameter in parameters:
                if (place := places.get(parameter)) is not None:
                    parameter.data = place.read(device=self.device, dtype=dtype).view(parameter.shape)
                else:
                    parameter.data = parameter.data.to(self.device, dtype)

        for module in model.modules():
            # One that is tied is cut up already.
            whole = [parameter for parameter in module.parameters(recurse=False) if not hasattr(parameter, "ds_id")]
            if whole:
                self._processes.on_main(partial(bring, whole))
            for parameter in () if self._processes.is_main else whole:
                parameter.data = torch.empty(parameter.shape, dtype=dtype, device=self.device)
            if any(not hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False)):
                only_own = nn.Module()
                for name, parameter in module.named_parameters(recurse=False):
                    only_own.register_parameter(name, parameter)
                deepspeed.zero.Init(module=only_own, config_dict_or_path=dict(config), dtype=dtype)
            for buffer in module.buffers(recurse=False):
                buffer.data = buffer.data.to(self.device)
                if self._processes.size > 1:
                    dist.broadcast(buffer.data, src=0)

    def _originals(self, model: nn.Module, *, places: Mapping[Tensor, Place]) -> dict[str, Tensor]:
        """The main process's fp32 weights on the host: DeepSpeed makes its master weights from rounded ones."""
        if not self._processes.is_main:
            return {}
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in model.named_parameters()
            if parameter not in places
        }

    @torch.no_grad()
    def _restore_precision(self, originals: Mapping[str, Tensor], *, places: Mapping[Tensor, Place]) -> None:
        if not self._low_precision:
            return
        by_name = {name: places[parameter] for name, parameter in self._parameters.items() if parameter in places}
        fill_from_files(self._pieces(shared=False), by_name, processes=self._processes)
        held = {piece.name: piece for piece in self._pieces(shared=False)}
        for name, shape in self._shapes().items():
            if name in by_name:
                continue
            whole = (
                originals[name].to(self.device) if self._processes.is_main else torch.empty(shape, device=self.device)
            )
            if self._processes.size > 1:
                dist.broadcast(whole, src=0)
            if (piece := held.get(name)) is not None:
                piece.values[WEIGHT].copy_(whole.view(-1)[piece.start : piece.start + piece.numel])

    # -- what this process holds -----------------------------------------------------------------------------------

    def _saved(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        """Pieces with all that a checkpoint has of them."""
        return pieces if self._moving is None else self._moving.joined(pieces)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    def _flat(self) -> list[Tensor]:
        """The fp32 master weights of this process, flat, as AdamW sees them."""
        zero = self._engine.optimizer
        # Of ZeRO-3, of ZeRO-1 and 2, and of what DeepSpeed has for ZeRO-1 with fp32 sums of bf16 gradients.
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        flat: list[Tensor] = next(getattr(zero, name) for name in names if hasattr(zero, name))
        return flat

    def _start_sharded_state(self) -> None:
        for flat in self._flat():
            self._optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }

    def _pieces(self, *, shared: bool) -> Iterator[Piece]:
        """What this process holds of every parameter; where all hold all (ZeRO-0) and `shared`, its share of it."""
        if self._stage == 0:
            among = self._processes if shared else None
            yield from whole_pieces(self._parameters, optimizer=self._optimizer, among=among)
            return
        for name, parameter in self._parameters.items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            numel = torch.Size(shape).numel()
            if self._stage < 3:
                mapping: Any = vars(parameter)["_hp_mapping"]  # set by DeepSpeed; see the module's docstring
                if mapping is None:
                    continue  # all of it is held elsewhere
                flat = self._flat()[mapping.param_group_index]
                inside = mapping.hp_fragment_address
                yield self._piece(
                    name, shape, mapping.lp_fragment_address.start, flat=flat, first=inside.start, numel=inside.numel
                )
            else:
                zero = self._engine.optimizer
                group, first, partition = zero.grad_position[zero.get_param_id(parameter)]
                start = min(self._processes.rank * partition, numel)
                # The last partitions are padded.
                yield self._piece(
                    name, shape, start, flat=self._flat()[group], first=first, numel=min(partition, numel - start)
                )

    def _piece(self, name: str, shape: tuple[int, ...], start: int, *, flat: Tensor, first: int, numel: int) -> Piece:
        state = self._optimizer.state[flat]
        whole = {WEIGHT: flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
        values = {kind: value.narrow(0, first, numel) for kind, value in whole.items()}
        return Piece(name=name, shape=shape, start=start, values=values)

    @torch.no_grad()
    def _publish(self) -> None:
        """The weights that forward passes use, from the master weights."""
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero._partition_all_parameters()  # noqa: SLF001  as in the optimiser's own step
            for group in range(len(self._flat())):
                zero._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


@torch.no_grad()
def _empty(parameters: Iterable[nn.Parameter]) -> None:
    """Free what ZeRO-3 holds of parameters.

    Two places of DeepSpeed 0.19.8 outlive the engine: a list of modules under way, in which every prepared model stays,
    and a cache behind a method, of what each module lets go of at each step. Whatever else may keep modules alive, in
    this release or another, keeps them without weights.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
    for parameter in parameters:
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        vars(parameter).clear()  # this process's share of it among what is there


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet.

    Args:
        device: where it is to compute; the first one in a process counts.

    Raises:
        ShearingError: it is not installed.
    """
    # DeepSpeed asks each operator at import what it could build; the answers are of no use here.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls torch's exchanges by names that torch is about to change, in every process.
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed.c10d_logger")
    try:
        import deepspeed
    except ImportError as error:
        raise ShearingError(
            "engine",
            value="deepspeed",
            allowed=f"torch: DeepSpeed cannot be imported ({error})",
            mend=f"pip install 'shearing[deepspeed]', or set {key('engine')}=torch",
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An extension for processes on CPUs that it compiles, a minute or two, and that waits for ever for a lost process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _told_of_gpu(device: torch.device) -> Iterator[None]:
    """DeepSpeed takes the GPU of the number LOCAL_RANK, which is another where each process sees its own alone."""
    launchers = os.environ["LOCAL_RANK"]
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = launchers


def _join(processes: Processes, *, device: torch.device) -> None:
    """What DeepSpeed expects of its surroundings: a process group, also of one, and the launcher's variables."""
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("RANK", str(processes.rank))
    os.environ.setdefault("WORLD_SIZE", str(processes.size))
    processes.require_group(device)
    from deepspeed import comm

    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
