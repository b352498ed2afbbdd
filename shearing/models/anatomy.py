"""Anatomy of the supported families: which parameter has which prunable dimension on which axis.

Adding a family is one `Family` declaration. A parameter that a declaration does not name makes the
model refused, so that a variant with extra weights is never cut wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from shearing.errors import ShearingError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Axis = Literal["hidden", "query_heads", "kv_groups", "intermediate", "fixed"]
Axes = tuple[Axis, ...]

LLAMA_ATTENTION_AXES: Mapping[str, Axes] = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query_heads", "hidden"),
    "self_attn.q_proj.bias": ("query_heads",),
    "self_attn.k_proj.weight": ("kv_groups", "hidden"),
    "self_attn.k_proj.bias": ("kv_groups",),
    "self_attn.v_proj.weight": ("kv_groups", "hidden"),
    "self_attn.v_proj.bias": ("kv_groups",),
    "self_attn.o_proj.weight": ("hidden", "query_heads"),
    "self_attn.o_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": ("fixed",),
    "self_attn.k_norm.weight": ("fixed",),
}
LLAMA_MLP_AXES: Mapping[str, Axes] = {
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("intermediate", "hidden"),
    "mlp.gate_proj.bias": ("intermediate",),
    "mlp.up_proj.weight": ("intermediate", "hidden"),
    "mlp.up_proj.bias": ("intermediate",),
    "mlp.down_proj.weight": ("hidden", "intermediate"),
    "mlp.down_proj.bias": ("hidden",),
}
LLAMA_OUTER_AXES: Mapping[str, Axes] = {
    "model.embed_tokens.weight": ("fixed", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("fixed", "hidden"),
}


@dataclass(frozen=True)
class Family:
    """One model family: module names and the axes of every parameter.

    Attributes:
        model_type: `config.model_type` of Hugging Face.
        attention_axes, mlp_axes: parameter name inside a layer -> what each of its axes is.
        outer_axes: the same for parameters outside the layers.
        attention_write, mlp_write: the linear layers that write into the residual stream.
        mlp: the MLP, from its norm's output to what it writes.
        attention_norm, mlp_norm, final_norm: RMSNorms over the residual stream.
    """

    model_type: str
    attention_axes: Mapping[str, Axes]
    mlp_axes: Mapping[str, Axes]
    outer_axes: Mapping[str, Axes]
    backbone: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_write: str = "self_attn.o_proj"
    mlp_write: str = "mlp.down_proj"
    mlp: str = "mlp"
    qk_norms: bool = False

    def axes(self, name: str) -> Axes:
        """Axes of the parameter called `name` in the model's state dict; `KeyError` for one that is not declared."""
        prefix = self.layers + "."
        if not name.startswith(prefix):
            return self.outer_axes[name]
        inner = name[len(prefix) :].split(".", 1)[1]
        return self.attention_axes[inner] if inner in self.attention_axes else self.mlp_axes[inner]


def _llama_like(model_type: str, *, qk_norms: bool = False) -> Family:
    return Family(
        model_type=model_type,
        attention_axes=LLAMA_ATTENTION_AXES,
        mlp_axes=LLAMA_MLP_AXES,
        outer_axes=LLAMA_OUTER_AXES,
        qk_norms=qk_norms,
    )


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3", qk_norms=True),
    )
}


def anatomy_of(model_or_config: PreTrainedModel | PretrainedConfig) -> Family:
    """Family of a model or config.

    Raises:
        ShearingError: the architecture is not supported; the supported ones are listed.
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ShearingError(
            "model.source (architecture)",
            value=config.model_type,
            allowed=", ".join(sorted(FAMILIES)),
            mend="choose a source model of a supported family, or declare the family in shearing/models/anatomy.py",
        )
    if isinstance(model_or_config, nn.Module):
        undeclared = sorted({name for name, _ in model_or_config.named_parameters() if not _declared(family, name)})
        if undeclared:
            raise ShearingError(
                "model.source (parameters)",
                value=undeclared[:5],
                allowed=f"the parameters declared for {family.model_type!r}",
                mend="declare their axes in shearing/models/anatomy.py",
            )
    return family


def _declared(family: Family, name: str) -> bool:
    try:
        family.axes(name)
    except KeyError:
        return False
    return True


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head; called with `input_ids` [B, S] it returns `.last_hidden_state` [B, S, d]."""
    return model.get_submodule(anatomy_of(model.config).backbone)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, first to last."""
    layers = model.get_submodule(anatomy_of(model.config).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def head_weight(model: PreTrainedModel) -> Tensor:
    """Weight [V, d] of the language-model head (the embedding's, when tied)."""
    weight = model.get_submodule(anatomy_of(model.config).head).weight
    assert isinstance(weight, Tensor)
    return weight


def load_config(source: str, *, revision: str | None = None) -> PretrainedConfig:
    """Config of the source model.

    Raises:
        ShearingError: there is no model there, or its family is not supported.
    """
    from transformers import AutoConfig

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ShearingError(
            "model.source",
            value=source,
            allowed="a Hugging Face model folder (config.json, *.safetensors, tokenizer) or a hub name",
            mend="point model.source at the folder that holds config.json",
        )
    try:
        if Path(source).is_dir():
            model_type = json.loads((Path(source) / "config.json").read_text()).get("model_type")
            if model_type not in FAMILIES:
                raise ShearingError(
                    "model.source (architecture)",
                    value=model_type,
                    allowed=", ".join(sorted(FAMILIES)),
                    mend="choose a source model of a supported family, "
                    "or declare the family in shearing/models/anatomy.py",
                )
        config: PretrainedConfig = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, json.JSONDecodeError) as error:
        raise ShearingError(
            "model.source",
            value=source,
            allowed="an existing model folder, or a hub name that can be reached",
            mend=f"check the path or the network ({str(error).splitlines()[0]})",
        ) from error
    anatomy_of(config)
    return config


def load_source(
    source: str,
    *,
    revision: str | None = None,
    attn_implementation: str = "sdpa",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Loads a causal language model of a supported family, in evaluation mode, cache off.

    Raises:
        ShearingError: no such model, an unsupported family, weights missing, or weights that are not finite.
    """
    from transformers import AutoModelForCausalLM

    load_config(source, revision=revision)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
    )
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:
        raise ShearingError(
            "model.source (weights)",
            value=sorted(report["missing_keys"])[:5],
            allowed="a checkpoint with every parameter of its config",
            mend="the checkpoint is incomplete: fetch or convert it again",
        )
    anatomy_of(model)
    refuse_nonfinite(model, source=source)
    model.config.use_cache = False
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


def skeleton(
    config: PretrainedConfig, *, attn_implementation: str = "sdpa", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A model without weights: each parameter has its shape and dtype fp32, and takes no memory until it is filled.

    What every process but the main one starts from, so that the weights exist once and not once per process.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
    model.tie_weights()
    placeholders: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            setattr(module, name, placeholders.setdefault(id(parameter), nn.Parameter(empty)))
    model.config.use_cache = False
    model.eval()
    return model


def refuse_nonfinite(model: PreTrainedModel, *, source: str) -> None:
    """Raises `ShearingError` naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ShearingError(
                f"model.source (parameter {name})",
                value=source,
                allowed="finite weights",
                mend="the checkpoint holds NaN or infinity: fetch or convert it again",
            )
