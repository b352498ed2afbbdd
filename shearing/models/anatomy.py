"""Anatomy of a model: its family's declaration as its config has it, and the parts that everything else asks for.

A parameter that the declaration does not name makes the model refused, so that a variant with extra weights is never
cut wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.models.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def anatomy_of(model_or_config: PreTrainedModel | PretrainedConfig) -> Family:
    """Family of a model or config, without the parameters that its config leaves out.

    Raises:
        ShearingError: the architecture is not supported, and the supported ones are listed; or something in the config
            is not.
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ShearingError(
            "source (architecture)",
            value=config.model_type,
            allowed=", ".join(sorted(FAMILIES)),
            mend="choose a source model of a supported family, or declare the family under shearing/models/families",
        )
    if (refused := family.refuses(config)) is not None:
        raise ShearingError(
            "source (architecture)",
            value=refused,
            allowed=f"a {family.model_type} without it",
            mend="choose another source model",
        )
    family = family.of(config)
    if isinstance(model_or_config, nn.Module):
        undeclared = sorted({name for name, _ in model_or_config.named_parameters() if not _declared(family, name)})
        if undeclared:
            raise ShearingError(
                "source (parameters)",
                value=undeclared[:5],
                allowed=f"the parameters declared for {family.model_type!r}",
                mend="declare their axes under shearing/models/families",
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
