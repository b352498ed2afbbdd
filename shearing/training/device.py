"""Where and how layers are computed: device, precision, activation checkpointing, compilation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from shearing.errors import ShearingError, key
from shearing.models.anatomy import decoder_layers
from shearing.models.attention import VARLEN_OPERATORS
from shearing.training.recipe import TrainingRecipe

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


def resolve_device(device: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for here.

    Raises:
        ShearingError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ShearingError(
            "device",
            value="cuda",
            allowed="cpu or auto: torch finds no GPU here",
            mend=f"set {key('device')}=auto, or install a torch build and a driver that fit the GPU",
        )
    return torch.device("cuda" if available and device != "cpu" else "cpu")


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


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer in place; parameter names do not change.

    Layers are alike, so the first one's code serves them all.
    """
    for layer in decoder_layers(model):
        layer.compile()


def _keep_products(_context: Any, operator: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    kept = getattr(operator, "overloadpacket", operator) in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
