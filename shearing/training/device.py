"""Where and how layers are computed: device, precision, offloading, activation checkpointing, compilation."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
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
        "_grouped_mm",
        "linear",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of `mallopt`, as malloc.h numbers them."""


def resolve_device(device: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for here; a GPU with its number, in whatever thread it is used.

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
    if not available or device == "cpu":
        return torch.device("cpu")
    # Without the number it would be GPU 0 in other threads, in which transformers loads weights.
    return torch.device("cuda", torch.cuda.current_device())


def keep_freed_memory(device: torch.device, *, processes: int) -> None:
    """Let the one process of a run that computes on a CPU reuse the memory of freed tensors.

    As glibc is set, what a tensor of over 32 MB frees, such as the logits of a chunk, goes back to the system, and the
    next one like it waits for every page to be cleared again: a fifth of a step of training on vocabularies of 50
    thousand. Elsewhere, and on other C libraries, nothing changes; nor with several processes, where what one of them
    keeps is what the others of its machine do not have.
    """
    if device.type != "cpu" or processes > 1 or os.name != "posix":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # all from the heap
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # which then keeps its size


def memory_of(device: torch.device) -> int | None:
    """Bytes that a process has there: a GPU's, or its share of the machine's; None where that is not known."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    try:
        of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not every system says so
        return None
    return of_machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def offload_layers(model: PreTrainedModel, *, device: torch.device) -> None:
    """Keep the weights of decoder layers in host memory: a layer's are on the device while it runs, and no longer.

    What is outside of the layers (embedding, final norm, head) goes to the device and stays. For models that are not
    trained: a backward pass would find the weights gone.

    Args:
        model: on the CPU, changed in place.
        device: where it is to run.
    """
    layers = decoder_layers(model)
    inside = {id(tensor) for tensor in _tensors(layers)}
    for tensor in _tensors(model):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    for layer in layers:
        tensors = _tensors(layer)
        # Page-locked memory is read by the GPU itself, beside its work.
        host = [tensor.data.pin_memory() if device.type == "cuda" else tensor.data for tensor in tensors]
        layer.register_forward_pre_hook(partial(_fetch, tensors, host, device))
        layer.register_forward_hook(partial(_release, tensors, host), always_call=True)
        _release(tensors, host)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _fetch(tensors: Sequence[Tensor], host: Sequence[Tensor], device: torch.device, *_: Any) -> None:
    for tensor, kept in zip(tensors, host, strict=True):
        tensor.data = torch.empty_like(kept, device=device).copy_(kept, non_blocking=True)


def _release(tensors: Sequence[Tensor], host: Sequence[Tensor], *_: Any) -> None:
    for tensor, kept in zip(tensors, host, strict=True):
        tensor.data = kept


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer in place; parameter names do not change.

    Layers are alike, so the first one's code serves them all.
    """
    for layer in decoder_layers(model):
        layer.compile()


def _keep_products(_context: Any, operator: Any, *_arguments: Any, **_keywords: Any) -> CheckpointPolicy:
    kept = getattr(operator, "overloadpacket", operator) in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
