"""Causal attention without a mask tensor: no S x S mask, and no look at the device to find out that none is needed.

Hugging Face's mask preparation asks the device, once a forward pass, whether sequences were packed. Where documents
begin in training rows is known on the host, so the answer is known: an attention kernel registered without a mask
function is handed no mask and is causal by itself, over whole rows or inside documents (`data.documents`).

Legend: B rows, S positions, H query heads, K KV heads, dh head dimension, N stretches of documents, n tokens of one.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of
from shearing.models.families import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)

PREFIX = "causal_"
MASKLESS = ("sdpa", "flash_attention_2")
"""Kernels that are causal without a mask; flash attention also applies a sliding window by itself."""
DOCUMENTS_SDPA = "documents_sdpa"
DOCUMENTS_CAPPED = "documents_capped"
"""The same function for models whose scores have a cap: transformers refuses them a kernel that is called sdpa."""
CAUSAL_FLASH = PREFIX + "fa2"
"""Not called flash: transformers would look for a package of that name."""

_QUERIES_AT_ONCE = 512


def requested(attn_implementation: str) -> str | None:
    """What transformers is asked for: sdpa is its own default, and eager instead where scores have a cap."""
    return None if attn_implementation == "sdpa" else attn_implementation


def is_eager(family: Family, *, attn_implementation: str) -> bool:
    """Whether attention weights of a family's models are tensors, with that setting."""
    return attn_implementation == "eager" or (attn_implementation == "sdpa" and bool(family.attention_cap))


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
    """Makes `model` attend without mask tensors, where its kernel and `sequence_length` tokens allow it.

    For training and scores of whole rows alone: every token attends to all before it, so an `attention_mask` is
    ignored, padding counts as text, and rows are not to be longer. Keys and values of a cache are heeded by single
    tokens that follow them; several at once are refused under sdpa. `model.set_attn_implementation` takes it back.

    Args:
        model: changed in place.
        sequence_length: of the longest row.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = _kernel(model)
    if kernel.startswith(PREFIX) or needs_mask(model.config, kernel=kernel, sequence_length=sequence_length):
        return
    if kernel == "sdpa":
        AttentionInterface.register(PREFIX + kernel, _causal(ALL_ATTENTION_FUNCTIONS[kernel]))
        model.set_attn_implementation(PREFIX + kernel)
    else:
        AttentionInterface.register(CAUSAL_FLASH, flash_attention)
        model.set_attn_implementation(CAUSAL_FLASH)


@functools.cache  # one object for all models, as compiled layers are made anew for another
def _causal(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' function of a kernel that takes the first query to be of the first key."""

    def causal(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **keywords: Any) -> Any:
        if 1 < query.shape[2] != key.shape[2]:
            raise ShearingError(
                "past_key_values",
                value=f"{key.shape[2]} keys for {query.shape[2]} tokens",
                allowed="whole rows, or one token at a time: without a mask the kernel cannot tell where these are",
                mend="call the model without a cache, or undo `drop_attention_mask` by "
                'model.set_attn_implementation("sdpa")',
            )
        return attend(module, query, key, *rest, **keywords)

    return causal


def keep_attention_within_documents(model: PreTrainedModel) -> None:
    """Makes `model` attend inside documents, for calls with the keywords of `Documents`; there are no others then.

    Raises:
        ValueError: a kernel that would need an S x S mask.
    """
    from transformers import AttentionInterface

    kernel = _kernel(model)
    if kernel in (DOCUMENTS_SDPA, DOCUMENTS_CAPPED, CAUSAL_FLASH):
        return
    if kernel in ("sdpa", PREFIX + "sdpa"):
        AttentionInterface.register(DOCUMENTS_SDPA, documents_sdpa)
        model.set_attn_implementation(DOCUMENTS_SDPA)
    elif kernel == "eager" and anatomy_of(model.config).attention_cap:
        AttentionInterface.register(DOCUMENTS_CAPPED, documents_sdpa)
        model.set_attn_implementation(DOCUMENTS_CAPPED)
    elif kernel == "flash_attention_2":
        AttentionInterface.register(CAUSAL_FLASH, flash_attention)
        model.set_attn_implementation(CAUSAL_FLASH)
    elif "flash" not in kernel:  # transformers' other flash attentions heed the same keywords
        raise ValueError(f"no attention within documents with the kernel {kernel}")


@contextmanager
def attention_within_documents(model: PreTrainedModel, *, on: bool) -> Iterator[None]:
    """As `keep_attention_within_documents`, and back at the end; not `on`: nothing changes."""
    before = _kernel(model)
    if on:
        keep_attention_within_documents(model)
    try:
        yield
    finally:
        if _kernel(model) != before:
            model.set_attn_implementation(before)


def _kernel(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)  # noqa: SLF001 - transformers has no public reader


def documents_sdpa(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    document_boundaries: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside documents, in the form that transformers calls.

    Half precision on a GPU: torch's flash attention for stretches of any length. Elsewhere stretch after stretch, with
    boundaries that the host knows.

    Args:
        query: [B, H, S, dh].
        key, value: [B, K, S, dh].
        attention_mask: None.
        dropout, scaling: of the attention weights, of the scores.
        sliding_window: tokens that a token attends to at most, itself included.
        softcap: c of scores that are c tanh(s / c); which of torch's kernels has none.
        cu_seq_lens_q, max_length_q, document_boundaries: from `Documents.keywords`.

    Returns:
        [B, S, H, dh], and no attention weights.
    """
    if attention_mask is not None or cu_seq_lens_q is None or max_length_q is None or document_boundaries is None:
        raise RuntimeError("attention within documents was called without documents, or with a mask")
    rows, length = query.shape[0], query.shape[2]
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _VARLEN is not None and dropout == 0.0 and softcap is None and _has_varlen_kernel(query):
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        window = -1 if sliding_window is None else sliding_window - 1
        attended = _VARLEN(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(window, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        attended = _stretch_by_stretch(
            *(x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)),
            boundaries=document_boundaries.values,
            dropout=dropout,
            scaling=scaling,
            window=sliding_window,
            softcap=softcap,
        )
    return attended.unflatten(0, (rows, length)), None


# Lengths differ from batch to batch: compiled, each would be a program of its own.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _stretch_by_stretch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    boundaries: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of query [H, B * S, dh] over key and value [K, B * S, dh]; [B * S, H, dh]."""
    if _is_on_gpu(query):
        _say_slow(query.dtype, capped=softcap is not None)
    lengths = [length for length in boundaries.diff().tolist() if length]
    attended = [
        _attend(q[None], k[None], v[None], dropout=dropout, scaling=scaling, window=window, softcap=softcap)[0]
        for q, k, v in zip(query.split(lengths, 1), key.split(lengths, 1), value.split(lengths, 1), strict=True)
    ]
    return torch.cat(attended, 1).transpose(0, 1).contiguous()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of query [1, H, n, dh] over the last `window` of key and value [1, K, n, dh]."""
    length = query.shape[2]
    attend: Callable[..., Tensor] = partial(
        F.scaled_dot_product_attention if softcap is None else partial(_capped_attention, softcap=softcap),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    window = length if window is None else window
    if softcap is None and length <= window:
        return attend(query, key, value, is_causal=True)
    attended = []
    for first in range(0, length, _QUERIES_AT_ONCE):
        last, oldest = min(first + _QUERIES_AT_ONCE, length), max(0, first - window + 1)
        seen_from, seen = (torch.arange(start, last, device=query.device) for start in (first, oldest))
        distance = seen_from[:, None] - seen
        mask = (distance >= 0) & (distance < window)
        seen_key, seen_value = key[:, :, oldest:last], value[:, :, oldest:last]
        attended.append(attend(query[:, :, first:last], seen_key, seen_value, attn_mask=mask))
    return torch.cat(attended, 2)


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    softcap: float,
) -> Tensor:
    """`scaled_dot_product_attention` with the cap, step by step in transformers' precisions."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = ((scores / softcap).tanh() * softcap).masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout_p) @ value


def _has_varlen_kernel(query: Tensor) -> bool:
    head_size = query.shape[-1]
    return (
        _is_on_gpu(query)
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_size % 8 == 0
        and head_size <= 256
        and _is_ampere_or_newer()
    )


def _is_on_gpu(query: Tensor) -> bool:
    return query.device.type == "cuda"


@functools.cache
def _say_slow(dtype: torch.dtype, *, capped: bool) -> None:
    """Said once: on a GPU the loop over documents can take longer than all else of a step."""
    if capped:
        why = "of torch's kernels for all of them at once none caps scores; flash_attention_2 does"
    elif _VARLEN is None:
        why = f"torch {torch.__version__} has no kernel for all of them at once; torch 2.12 has"
    else:
        why = f"torch's kernel for all of them at once wants bf16 and an Ampere GPU or newer; these are {dtype}"
    logger.warning("attention within documents goes from one document to the next, which is slow on a GPU: %s", why)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_ampere_or_newer() -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= (8, 0)


def _varlen_function() -> Callable[..., Any] | None:
    """Attention of torch over stretches of any length; None in releases whose own lacks windows or grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    function: Callable[..., Any] = varlen_attn
    return function if {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(function).parameters) else None


_VARLEN = _varlen_function()
VARLEN_OPERATORS: frozenset[Any] = frozenset([torch.ops.torch_attn._varlen_attn] if _VARLEN is not None else [])  # noqa: SLF001
"""What computes attention within documents on a GPU, for those that decide what is computed twice."""


def flash_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Causal flash attention over whole rows, or inside documents where it is told of them; as `documents_sdpa`.

    Transformers' own function looks for a package called like the kernel, and asks the device about positions.
    """
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    forward: Callable[..., Tensor] = _flash_attention_forward
    device_type, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    stretches = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    attended = forward(
        *(x.transpose(1, 2).to(dtype) for x in (query, key, value)),
        attention_mask,
        query_length=query.shape[2],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        attn_implementation="flash_attention_2",
        **{name: keywords[name] for name in stretches if name in keywords},
    )
    return attended, None
