"""How one optimiser step is computed: the protocol, and plain torch on one process.

The protocol is the seam for sharded engines. The mask learner is not behind it: its few fp32 tensors are replicated
and have their own optimiser, because an engine would cast, clip and shard them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.anatomy import decoder_layers
from shearing.recipe import TrainingRecipe
from shearing.training.checkpoint import write_tensors

_PRODUCTS = frozenset(
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
    """What the loop asks of whatever computes its steps."""

    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Take charge of a model's parameters: placement, optimiser state. Called once, first; returns what to call."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision in which forward passes and losses are computed."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's share of the step's loss (a scalar)."""
        ...

    def step(self, *, step: int) -> Tensor:
        """Clip, update the weights and clear the gradients.

        Args:
            step: optimiser steps done before this one; the learning rate is a function of it alone.

        Returns:
            Boolean scalar on the device: True if loss or gradient was not finite, in which case neither weights nor
            optimiser state have changed.
        """
        ...

    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradient before clipping; scalar on the device."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state, bit for bit, into an existing folder."""
        ...

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state by kind (`exp_avg`, `exp_avg_sq` of the parameter's shape; `step`, a scalar) and parameter.

        The tensors are the optimiser's own, not copies. Empty before the first step.
        """
        ...

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Start from AdamW state of the form `moments` returns, instead of from nothing; copies it.

        Raises:
            ShearingError: it is not of the prepared model's parameters.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into the prepared model.

        Raises:
            ShearingError: the folder holds another model's parameters.
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
    """One process, one device, fp32 weights; see `Engine`.

    Nothing here waits for the device: whether a step is skipped is decided there.
    """

    def __init__(self, optimization: Optimization, *, device: torch.device, precision: torch.dtype) -> None:
        self.device = device
        self._optimization = optimization
        self._precision = precision
        self._parameters: dict[str, nn.Parameter] = {}
        self._grad_norm = torch.zeros((), device=device)
        self._losses_finite = torch.ones((), dtype=torch.bool, device=device)

    def prepare(self, model: nn.Module) -> nn.Module:
        """See `Engine.prepare`."""
        model.to(self.device)
        self._parameters = dict(model.named_parameters())
        trained = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self._optimization.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self._optimization.learning_rate,
            betas=self._optimization.betas,
            eps=self._optimization.epsilon,
            fused=True,
        )
        return model

    def autocast(self) -> AbstractContextManager[object]:
        """See `Engine.autocast`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._precision == torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """See `Engine.backward`."""
        self._losses_finite = self._losses_finite & loss.detach().isfinite()
        loss.backward()

    def step(self, *, step: int) -> Tensor:
        """See `Engine.step`."""
        parameters = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
        self._grad_norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        skipped = ~(self._losses_finite & self._grad_norm.isfinite())
        if self._optimization.gradient_clipping:
            clip_grads_with_norm_(parameters, self._optimization.gradient_clipping, self._grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._optimization.learning_rate_at(step)
        # The switch torch.amp.GradScaler uses: the fused kernel returns at once and the step count does not move.
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses_finite = torch.ones_like(self._losses_finite)
        return skipped

    def grad_norm(self) -> Tensor:
        """See `Engine.grad_norm`."""
        return self._grad_norm

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        write_tensors(folder / "weights.safetensors", {n: p.detach() for n, p in self._parameters.items()})
        write_moments(folder / "optimizer.safetensors", self.moments())

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """See `Engine.moments`."""
        moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            for kind, value in self._optimizer.state.get(parameter, {}).items():
                moments.setdefault(kind, {})[name] = value
        return moments

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `Engine.load_moments`."""
        for kind, of_kind in moments.items():
            for name, value in of_kind.items():
                parameter = self._parameters.get(name)
                if parameter is None or value.shape not in (parameter.shape, torch.Size()):
                    raise ShearingError(
                        f"optimiser state ({kind} of {name})",
                        value=tuple(value.shape),
                        allowed="state of the model's own parameters"
                        + ("" if parameter is None else f"; this one has shape {tuple(parameter.shape)}"),
                        mend="set pretrain.optimizer=fresh, or learn the masks again in a new run_dir",
                    )
        self._optimizer.state.clear()
        for kind, of_kind in moments.items():
            for name, value in of_kind.items():
                # A copy, aligned as an optimiser's own: what a file's buffer is aligned to can change rounding.
                self._optimizer.state[self._parameters[name]][kind] = value.to(self.device, copy=True)

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        weights = load_file(folder / "weights.safetensors")
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        expected = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        if shapes != expected:
            different = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
            raise ShearingError(
                str(folder),
                value=f"{len(different)} parameters that differ from the model's, the first {different[0]}: "
                f"{shapes.get(different[0])} instead of {expected.get(different[0])}",
                allowed="a checkpoint of this model",
                mend="use another run_dir, or go back to the model this run was started with",
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
        self.load_moments(read_moments(folder / "optimizer.safetensors"))


def write_moments(path: Path, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write AdamW state, as `Engine.moments` returns it, to one file with keys `KIND/PARAMETER`."""
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
