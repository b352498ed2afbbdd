"""Anatomy of the supported families: which parameter has which prunable dimension on which axis.

Adding a family is one `Family` declaration. A parameter that a declaration does not name makes the
model refused, so that a variant with extra weights is never cut wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
            "source (architecture)",
            value=config.model_type,
            allowed=", ".join(sorted(FAMILIES)),
            mend="choose a source model of a supported family, or declare the family in shearing/models/anatomy.py",
        )
    if isinstance(model_or_config, nn.Module):
        undeclared = sorted({name for name, _ in model_or_config.named_parameters() if not _declared(family, name)})
        if undeclared:
            raise ShearingError(
                "source (parameters)",
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
