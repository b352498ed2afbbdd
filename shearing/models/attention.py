"""Causal attention without a mask tensor: no S x S mask, and no look at the device to find out that none is needed.

Hugging Face's mask preparation asks the device, once a forward pass, whether sequences were packed. Training rows
are always whole, so the answer is known: an attention kernel registered without a mask function is handed no mask
and is causal by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "causal_"
MASKLESS = ("sdpa", "flash_attention_2")
"""Kernels that are causal without a mask; flash attention also applies a sliding window by itself."""


def needs_mask(config: PretrainedConfig, *, kernel: str, sequence_length: int) -> bool:
    """Whether attention over `sequence_length` tokens is anything but plainly causal for this kernel."""
    if kernel not in MASKLESS:
        return True
    values: Any = config
    window = getattr(values, "sliding_window", None)
    layer_types = getattr(values, "layer_types", None)
    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return False
    return kernel == "sdpa" and bool(window < sequence_length)


def drop_attention_mask(model: PreTrainedModel, *, sequence_length: int) -> None:
    """Makes `model` attend without mask tensors, where its kernel and `sequence_length` tokens allow it."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = str(model.config._attn_implementation)  # noqa: SLF001 - transformers has no public reader
    if kernel.startswith(PREFIX) or needs_mask(model.config, kernel=kernel, sequence_length=sequence_length):
        return
    AttentionInterface.register(PREFIX + kernel, ALL_ATTENTION_FUNCTIONS[kernel])
    model.set_attn_implementation(PREFIX + kernel)
