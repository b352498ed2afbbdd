"""Anatomy of a model: its family's declaration as its config has it, and the parts that everything else asks for.

A parameter that the declaration does not name makes the model refused, so that a variant with extra weights is never
cut wrongly.

Legend: d hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import Self

from shearing.errors import ShearingError
from shearing.models.families import FAMILIES, Family
from shearing.models.families.unsupported import unsupported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def anatomy_of(model_or_config: PreTrainedModel | PretrainedConfig) -> Family:
    """Family of a model or config, without the parameters that its config leaves out.

    Raises:
        ShearingError: the architecture is not supported, see `unsupported`; or it has parameters that are not declared,
            or something in its config is not supported.
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    family = FAMILIES.get(config.model_type)
    if family is None or getattr(config, "use_bidirectional_attention", None):
        raise unsupported(config.to_dict())
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


def end_names(model: PreTrainedModel) -> tuple[str, str]:
    """Of the modules that have the embedding and the head; their weights may be one."""
    family = anatomy_of(model.config)
    return family.embedding, family.head


def head_weight(model: PreTrainedModel) -> Tensor:
    """Weight [V, d] of the language-model head (the embedding's, when tied)."""
    weight = model.get_submodule(anatomy_of(model.config).head).weight
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True, eq=False)
class Head:
    """Logits of hidden states h after the final norm: l = W h / `divisor`, and with a cap c: c tanh(l / c).

    Whatever turns hidden states into logits by itself goes through this, so that no family's losses leave a scale out.

    Attributes:
        weight: W [V, d], the embedding's where they are tied.
        divisor: 1 in most families.
        cap: None in most families.
    """

    weight: Tensor
    divisor: float = 1.0
    cap: float | None = None

    @classmethod
    def of_config(cls, config: PretrainedConfig, *, weight: Tensor) -> Self:
        """The head of a model of a config, with its weight [V, d]."""
        family = anatomy_of(config)
        divisor: Any = getattr(config, family.logits_divisor) if family.logits_divisor else 1.0
        cap: Any = getattr(config, family.logits_cap) if family.logits_cap else None
        return cls(weight, float(divisor), None if cap is None else float(cap))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states [..., d]: [..., V], with gradient."""
        products = hidden @ self.weight.T
        if self.divisor != 1.0:
            products = products / self.divisor
        return products if self.cap is None else (products / self.cap).tanh() * self.cap

    def finish_(self, products_CV: Tensor) -> Tensor:
        """Logits in place of what the weight gave."""
        if self.divisor != 1.0:
            products_CV.div_(self.divisor)
        return products_CV if self.cap is None else products_CV.div_(self.cap).tanh_().mul_(self.cap)

    def backward_(self, gradient_CV: Tensor, *, logits_CV: Tensor) -> Tensor:
        """The gradient with respect to the weight's products, in place of that with respect to the logits.

        Args:
            gradient_CV: with respect to the logits.
            logits_CV: as `finish_` left them; used up.
        """
        if self.cap is not None:
            # d tanh(x) = 1 - tanh(x)²
            gradient_CV.addcmul_(gradient_CV, logits_CV.div_(self.cap).square_(), value=-1.0)
        return gradient_CV if self.divisor == 1.0 else gradient_CV.div_(self.divisor)

    def with_weight(self, weight: Tensor) -> Head:
        """The same scale and cap over another weight [V, d]."""
        return Head(weight, self.divisor, self.cap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model; its weight is the parameter itself."""
    return Head.of_config(model.config, weight=head_weight(model))
