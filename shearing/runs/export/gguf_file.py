"""A model as one GGUF file, as llama.cpp and the programs built on it read it.

Weights have llama.cpp's names and its order of rows: its `llama` rotates neighbouring dimensions of a head where
Hugging Face rotates the two halves against each other, so rows of queries and keys change places there; its `qwen2` and
`qwen3` rotate halves.

Shapes: H heads, D dimensions of a head.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from shearing.errors import ShearingError
from shearing.runs.export.gguf_tokenizer import vocabulary_of, write_vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

KINDS: Mapping[str, str] = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""Of the matrices' weights, and what llama.cpp calls such a file; vectors are always f32."""

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_BLOCK = 32  # weights of q8_0 that share a scale, along a row


def require_gguf(kind: str) -> None:
    """Check that such a file can be written here.

    Raises:
        ShearingError: no such kind, or the package is not installed.
    """
    if kind not in KINDS:
        raise ShearingError("--gguf", value=kind, allowed=", ".join(KINDS), mend="choose one of them")
    if importlib.util.find_spec("gguf") is None:
        raise ShearingError(
            "package gguf",
            value="not installed",
            allowed="installed, to write GGUF files",
            mend="pip install 'shearing[gguf]'",
        )


def require_convertible(config: Any, *, folder: Path) -> None:
    """Check that llama.cpp can have a model and its tokenizer, before anything is written.

    Args:
        config: of the model.
        folder: with its tokenizer.

    Raises:
        ShearingError: it cannot.
    """
    _architecture(config)
    _rope_factors(config)
    vocabulary_of(folder, rows=config.vocab_size)


def write_gguf(model: PreTrainedModel, path: Path, *, folder: Path, kind: str) -> list[str]:
    """Write a model and the tokenizer of its folder.

    Tensors are converted one at a time.

    Args:
        model: whole, with fp32 weights.
        path: of the file.
        folder: with the model's tokenizer.
        kind: of `KINDS`. q8_0: 32 weights of a row share a scale; matrices whose rows cannot be cut so are f16.

    Returns:
        What holds with limits only, a sentence each.

    Raises:
        ShearingError: a model or tokenizer that llama.cpp cannot have, or a weight that is too large for f16.
    """
    from gguf import GGUFWriter, LlamaFileType
    from gguf.quants import quant_shape_to_byte_shape

    config: Any = model.config
    architecture = _architecture(config)
    vocabulary = vocabulary_of(folder, rows=config.vocab_size)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[KINDS[kind]])
    if kind == "q8_0":
        writer.add_quantization_version(2)
    limits = [*_write_sizes(config, writer=writer), *vocabulary.limits]
    write_vocabulary(vocabulary, folder=folder, writer=writer)
    parts = list(_parts(model, architecture=architecture))
    for part in parts:
        of = _type_of(part.tensor, kind=kind)
        shape = quant_shape_to_byte_shape(part.tensor.shape, of)
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        writer.write_tensor_data(_encoded(part.rows(), name=part.name, kind=kind))
    writer.close()
    return limits


def context_of(config: Any) -> int:
    """Tokens up to which a file is the model: llama.cpp has no windows in these architectures."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) if sliding else None
    length: int = config.max_position_embeddings
    return length if window is None else min(window, length)


@torch.no_grad()
def round_as(model: PreTrainedModel, *, kind: str) -> None:
    """Give a model, in place, the weights that a file of a kind holds."""
    from gguf import dequantize

    for name, parameter in model.named_parameters():
        values = dequantize(_encoded(parameter, name=name, kind=kind), _type_of(parameter, kind=kind))
        parameter.copy_(torch.from_numpy(np.array(values, np.float32)).view_as(parameter))


def opened_gguf(path: Path, *, config: Any) -> PreTrainedModel:
    """The model of a file as transformers reads it, in fp32.

    Args:
        path: of the file.
        config: of the model that it was written from, as transformers takes less than all of it from a file.
    """
    if _ARCHITECTURES[config.model_type] == "llama":  # the file knows no other name for it
        config = LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"})
    with contextlib.redirect_stderr(io.StringIO()):  # its bar, which no setting turns off
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
    model.eval()
    return model


@dataclass(frozen=True)
class _Part:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        tensor: as the model has it.
        heads: whose rows change places; None: none do.
    """

    name: str
    tensor: Tensor
    heads: int | None = None

    def rows(self) -> Tensor:
        """The tensor as it is written: dimension j of a head beside dimension j + D / 2, which it is rotated with."""
        if self.heads is None:
            return self.tensor
        rows_H2D: Tensor = self.tensor.unflatten(0, (self.heads, 2, -1))
        return rows_H2D.transpose(1, 2).flatten(0, 2)


def _architecture(config: Any) -> str:
    """llama.cpp's architecture of a model that it computes as Hugging Face does.

    Raises:
        ShearingError: it has none.
    """
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise _refused(f"model_type {kind}", allowed=", ".join(_ARCHITECTURES))
    if (activation := config.hidden_act) != "silu":
        raise _refused(f"hidden_act {activation}", allowed="silu, as llama.cpp has in these models")
    width = config.num_attention_heads * _head_dim(config)
    if kind == "qwen2" and width != config.hidden_size:
        raise _refused(
            f"qwen2 with {config.num_attention_heads} query heads of {_head_dim(config)}, {width} together",
            allowed=f"query heads as wide as the hidden size together, {config.hidden_size}, in qwen2",
        )
    return _ARCHITECTURES[kind]


def _refused(value: str, *, allowed: str) -> ShearingError:
    return ShearingError(
        "--gguf", value=value, allowed=f"a model that llama.cpp computes as it is: {allowed}", mend="leave --gguf out"
    )


def _write_sizes(config: Any, *, writer: GGUFWriter) -> list[str]:
    """Say shape, norms and positions in the header; returns what holds with limits only."""
    limits, context = [], context_of(config)
    if context < config.max_position_embeddings:
        limits.append(f"its context is {context:,} tokens: beyond the window llama.cpp would attend to all")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = _head_dim(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _write_rope(config, writer=writer)
    return limits


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> Mapping[str, Any]:
    said = dict(config.rope_parameters)
    if "rope_theta" not in said or said.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        raise _refused(f"rope {said}", allowed="rope of one kind in all layers: default, linear, llama3 or yarn")
    if extra := {"attention_factor", "mscale", "mscale_all_dim"} & {name for name in said if said[name] is not None}:
        raise _refused(f"rope {said}", allowed=f"without {', '.join(sorted(extra))}, which llama.cpp works out itself")
    return said


def _write_rope(config: Any, *, writer: GGUFWriter) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original_positions(rope, config=config))
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _original_positions(rope: Mapping[str, Any], *, config: Any) -> int:
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def _rope_factors(config: Any) -> Tensor | None:
    """What each frequency of llama3's scaling is divided by [D / 2]; None for others (Llama 3.1's reference code)."""
    rope, head_dim = _rope(config), _head_dim(config)
    if rope.get("rope_type") != "llama3":
        return None
    if _ARCHITECTURES[config.model_type] != "llama":
        raise _refused("rope llama3", allowed="in a model of llama's or mistral's kind")
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = _original_positions(rope, config=config) / lengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / (share + (1 - share) / rope["factor"])
    return factors.float()


def _parts(model: PreTrainedModel, *, architecture: str) -> Iterator[_Part]:
    """Every tensor of the file, in its order."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = model.config
    factors = _rope_factors(config)
    if factors is not None:
        yield _Part("rope_freqs.weight", factors)
    kind = next(kind for kind in MODEL_ARCH if MODEL_ARCH_NAMES[kind] == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _refused(name, allowed="no weights but those that it knows")
        permuted = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        yield _Part(found, parameter.detach(), permuted)


def _type_of(tensor: Tensor, *, kind: str) -> GGMLQuantizationType:
    """How a tensor is stored."""
    from gguf import GGMLQuantizationType

    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    whole_blocks = tensor.shape[-1] % _BLOCK == 0
    return GGMLQuantizationType["F16" if kind == "q8_0" and not whole_blocks else kind.upper()]


def _encoded(tensor: Tensor, *, name: str, kind: str) -> npt.NDArray[Any]:
    """The bytes of a tensor, row by row."""
    from gguf import quantize

    values = tensor.detach().float().contiguous().numpy()
    with np.errstate(over="ignore"):
        encoded: npt.NDArray[Any] = quantize(values, _type_of(tensor, kind=kind))
    if encoded.dtype == np.float16 and not np.isfinite(encoded).all():
        raise ShearingError(
            "--gguf",
            value=f"{kind}, with {float(np.abs(values).max()):g} in {name}",
            allowed=f"weights of at most {np.finfo(np.float16).max:g} in f16",
            mend="choose bf16 or f32",
        )
    return encoded
