"""How one optimiser step is computed: the protocol, and plain torch on one process or several.

The protocol is the seam for sharded engines. The mask learner is not behind it: its few fp32 tensors are replicated
and have their own optimiser, because an engine would cast, clip and shard them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.anatomy import decoder_layers
from shearing.models.attention import VARLEN_OPERATORS
from shearing.recipe import TrainingRecipe
from shearing.training.checkpoint import write_tensors
from shearing.training.fingerprints import Fingerprints, add_fingerprints, require_same
from shearing.training.processes import Processes
from shearing.training.reduction import GradientSum
from shearing.training.sharded import (
    MOMENTS,
    STEP,
    WEIGHT,
    Piece,
    SavedState,
    ShardedState,
    fingerprints,
    require_parameters,
    write_pieces,
)
from shearing.training.zeros import KeptZeros

_PRODUCTS = VARLEN_OPERATORS | frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "mm",
        "addmm",
        "bmm",
        "linear",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
)


class Engine(Protocol):
    """What the loop asks of whatever computes its steps.

    All processes call every method together.
    """

    device: torch.device
    loss_scale: float
    """What `backward` multiplies a loss by; gradients of parameters that the engine does not hold have it too."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Take charge of a model's parameters: placement, optimiser state. Called once, first; returns what to call.

        The main process's weights are taken. On the others they may be placeholders (see `models.anatomy.skeleton`).
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision in which forward passes and losses are computed."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of one micro-batch's share of the step's loss.

        Args:
            loss: scalar; the step's loss is the sum over micro-batches and processes.
            last: whether this is the step's last micro-batch.
        """
        ...

    def step(self, *, step: int) -> Tensor:
        """Clip, update the weights and clear the gradients.

        Args:
            step: optimiser steps done before this one; the learning rate is a function of it alone.

        Returns:
            Boolean scalar on the device, the same on all processes: True if loss or gradient was not finite, in which
            case neither weights nor optimiser state have changed.
        """
        ...

    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradient before clipping; scalar on the device."""
        ...

    def save(self, folder: Path) -> Fingerprints:
        """Write this process's share of weights and optimiser state, bit for bit, into an existing folder.

        Returns:
            Fingerprints of what it wrote.
        """
        ...

    def load(self, folder: Path, *, saved: Fingerprints) -> None:
        """Read what all processes of `save` wrote, however many they were, into the prepared model.

        Args:
            folder: the checkpoint.
            saved: the sum of what `save` returned (`add_fingerprints`).

        Raises:
            ShearingError: the folder holds another model's parameters, or they did not come back as they were.
        """
        ...

    def load_moments(self, moments: SavedState) -> None:
        """Start from AdamW state instead of from nothing.

        Raises:
            ShearingError: it is not of the prepared model's parameters.
        """
        ...

    def keep_zeros(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        """Train a sparse model: what the masks drop is 0 from now on, after every step, and checked in `save`.

        Args:
            masks: parameter and bool mask of its shape, True where a weight is kept; each is read once.

        Raises:
            ShearingError: a mask is of no parameter of the prepared model, or of another shape.
        """
        ...


@dataclass(frozen=True)
class Optimization:
    """AdamW with a cosine schedule after a linear warm-up (arXiv 2310.06694, table 7).

    Args:
        learning_rate: peak.
        total_steps: length of the schedule, in optimiser steps.
        warmup_steps: steps until the peak.
        final_learning_rate: learning rate after `total_steps`, share of the peak.
        betas: AdamW betas.
        epsilon: AdamW epsilon.
        weight_decay: decoupled weight decay; matrices only, not biases and norms.
        gradient_clipping: maximum global norm of the gradient; 0: none.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int
    final_learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    gradient_clipping: float

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the step that follows `step` done ones."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


class TorchEngine:
    """Plain torch: fp32 weights, every process holds everything and gradients are summed; see `Engine`.

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
        self._grad_norm = torch.zeros((), device=device)
        self._losses_finite = torch.ones((), dtype=torch.bool, device=device)
        self._sum: GradientSum | None = None
        self._zeros: KeptZeros | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """See `Engine.prepare`."""
        materialise(model, device=self.device, processes=self._processes)
        self._parameters = dict(model.named_parameters())
        trained = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        self._optimizer = adamw(trained, optimization=self._optimization)
        start_state(self._optimizer)
        if self._processes.size > 1:
            self._sum = GradientSum(trained)
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
        parameters = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        self._grad_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        skipped = ~(self._losses_finite & self._grad_norm.isfinite())
        if self._optimization.gradient_clipping:
            clip_grads_with_norm_(parameters, self._optimization.gradient_clipping, self._grad_norm)
        set_learning_rate(self._optimizer, self._optimization.learning_rate_at(step))
        # The switch torch.amp.GradScaler uses: the fused kernel returns at once and the step count does not move.
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses_finite = torch.ones_like(self._losses_finite)
        return skipped

    def grad_norm(self) -> Tensor:
        """See `Engine.grad_norm`."""
        return self._grad_norm

    def save(self, folder: Path) -> Fingerprints:
        """See `Engine.save`."""
        if self._zeros is not None:
            self._zeros.require()
        return save_pieces(folder, self._pieces(whole=False), optimizer=self._optimizer, processes=self._processes)

    def load(self, folder: Path, *, saved: Fingerprints) -> None:
        """See `Engine.load`."""
        state = ShardedState(folder)
        require_parameters(state, shapes=shapes_of(self._pieces(whole=True)), folder=folder)
        fill(self._pieces(whole=True), state, kinds=(WEIGHT, *MOMENTS))
        set_steps(self._optimizer, state.step)
        found = self._processes.gather(fingerprints(self._pieces(whole=False)))
        require_same(add_fingerprints(found), saved=saved, folder=folder)

    def load_moments(self, moments: SavedState) -> None:
        """See `Engine.load_moments`."""
        require_moments(moments, shapes=shapes_of(self._pieces(whole=True)))
        fill(self._pieces(whole=True), moments, kinds=MOMENTS)
        set_steps(self._optimizer, moments.step)

    def keep_zeros(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.keep_zeros`."""
        self._zeros = KeptZeros(self._pieces(whole=True), shapes=shapes_of(self._pieces(whole=True)), masks=masks)
        self._zeros.enforce()
        self._optimizer.register_step_post_hook(self._zeros.enforce)

    def _pieces(self, *, whole: bool) -> Iterator[Piece]:
        """Every parameter: all of it, or this process's share."""
        for name, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {})
            values = {WEIGHT: parameter.detach(), **{kind: state[kind] for kind in MOMENTS if kind in state}}
            numel = parameter.numel()
            share = numel if whole else -(-numel // self._processes.size)
            start = 0 if whole else min(self._processes.rank * share, numel)
            yield Piece(
                name=name,
                shape=tuple(parameter.shape),
                start=start,
                values={kind: value.view(-1)[start : start + share] for kind, value in values.items()},
            )


def adamw(parameters: Iterable[nn.Parameter], *, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW with weight decay of matrices alone."""
    chosen = list(parameters)
    # A parameter that ZeRO-3 has cut up is flat; its own shape is elsewhere.
    matrices = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [(matrices, optimization.weight_decay), (vectors, 0.0)]
    return torch.optim.AdamW(
        [{"params": of_group, "weight_decay": decay} for of_group, decay in groups if of_group],
        lr=optimization.learning_rate,
        betas=optimization.betas,
        eps=optimization.epsilon,
        fused=True,
    )


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state of step 0, which it would make itself in its first step: so that there is something to restore."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                STEP: torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{kind: torch.zeros_like(parameter, memory_format=torch.preserve_format) for kind in MOMENTS},
            }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_steps(optimizer: torch.optim.Optimizer, step: float) -> None:
    """AdamW's step count of all parameters, in a tensor of its own for each."""
    for state in optimizer.state.values():
        state[STEP] = torch.full((), step, dtype=torch.float32, device=state[MOMENTS[0]].device)


def save_pieces(
    folder: Path, pieces: Iterable[Piece], *, optimizer: torch.optim.Optimizer, processes: Processes
) -> Fingerprints:
    """Write this process's file of a checkpoint."""
    counts = {float(state[STEP]) for state in optimizer.state.values()}
    if len(counts) > 1:
        raise RuntimeError(f"AdamW counts different steps for different parameters: {sorted(counts)}")
    return write_pieces(
        folder / f"shard-{processes.rank:05d}-of-{processes.size:05d}.safetensors",
        pieces,
        step=counts.pop() if counts else 0.0,
    )


@torch.no_grad()
def fill(pieces: Iterable[Piece], state: SavedState, *, kinds: Iterable[str]) -> None:
    """Copy what a state holds of each piece into the engine's memory; moments that it lacks become zero."""
    for piece in pieces:
        for kind in kinds:
            if kind not in piece.values:
                continue
            if kind in state.kinds:
                # A copy into the optimiser's own memory: what a file's buffer is aligned to can change rounding.
                piece.values[kind].copy_(state.read(kind, piece.name, start=piece.start, numel=piece.numel))
            else:
                piece.values[kind].zero_()


def shapes_of(pieces: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape."""
    return {piece.name: piece.shape for piece in pieces}


def require_moments(moments: SavedState, *, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that AdamW state is of these parameters.

    Raises:
        ShearingError: it is not.
    """
    for name, shape in moments.shapes.items():
        if shapes.get(name) != shape:
            raise ShearingError(
                f"optimiser state of {name}",
                value=shape,
                allowed="state of the model's own parameters"
                + (f"; this one has shape {shapes[name]}" if name in shapes else ""),
                mend="set pretrain.optimizer=fresh, or learn the masks again in a new run_dir",
            )


@torch.no_grad()
def materialise(model: nn.Module, *, device: torch.device, processes: Processes) -> None:
    """Put a model on the device, with the main process's weights and buffers on all processes."""
    if processes.is_main:
        model.to(device)
    else:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if processes.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, src=0)


class SavedMoments:
    """AdamW state of whole tensors in memory, as a `SavedState`.

    Args:
        moments: kind -> parameter -> tensor of its shape; and `step` -> parameter -> the count, the same for all.
    """

    def __init__(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._moments = {kind: moments[kind] for kind in MOMENTS}
        self.kinds = frozenset(MOMENTS)
        self.shapes = {name: tuple(value.shape) for name, value in moments[MOMENTS[0]].items()}
        self.step = max((float(count) for count in moments[STEP].values()), default=0.0)

    def read(self, kind: str, name: str, *, start: int, numel: int) -> Tensor:
        """See `SavedState.read`."""
        return self._moments[kind][name].reshape(-1)[start : start + numel]


def write_moments(path: Path, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write AdamW state by kind and parameter to one file with keys `KIND/PARAMETER`."""
    write_tensors(
        path, {f"{kind}/{name}": value for kind, of_kind in moments.items() for name, value in of_kind.items()}
    )


def read_moments(path: Path) -> dict[str, dict[str, Tensor]]:
    """What `write_moments` wrote, on the CPU."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        kind, name = key.split("/", 1)
        moments.setdefault(kind, {})[name] = value
    return moments


def checkpoint_activations(model: PreTrainedModel, *, selective: bool) -> None:
    """Recompute decoder layers in the backward pass instead of keeping their activations.

    Args:
        model: changed in place.
        selective: keep what matrix products and attention return, and recompute the rest, which costs little.
    """
    settings: dict[str, Any] = {"use_reentrant": False}
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    # Newer releases of transformers call it so and warn about the old name; older ones have the old name alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def _keep_products(_context: Any, operator: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    kept = getattr(operator, "overloadpacket", operator) in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer in place; parameter names do not change.

    Layers are alike, so the first one's code serves them all.
    """
    for layer in decoder_layers(model):
        layer.compile()


def resolve_device(training: TrainingRecipe) -> torch.device:
    """The device a recipe asks for.

    Raises:
        ShearingError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise ShearingError(
            "training.device",
            value="cuda",
            allowed="cpu or auto on this machine",
            mend="set training.device=auto, or install a torch build that sees the GPU",
        )
    return torch.device("cuda" if available and training.device != "cpu" else "cpu")


def resolve_precision(training: TrainingRecipe, *, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto` takes bfloat16 where the hardware multiplies it faster than float32."""
    if training.precision != "auto":
        return torch.bfloat16 if training.precision == "bf16" else torch.float32
    if device.type == "cuda":
        # Emulated bf16 is slower than fp32.
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Private in every release; torch.cpu.get_capabilities replaces them in later ones.
        probes: Iterable[str] = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32
