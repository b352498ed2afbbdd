"""Low-rank adapters for sparse models that are merged without losing a zero (LoRA, arXiv 2106.09685).

The usual adapter adds s B A to a weight, and merging it fills the zeros. Here every adapted weight is

    W + s M ⊙ (B A)        s = alpha / rank, M the stored mask

in training as after merging, so the merged model computes what was trained, and W's zeros are M's.

Shapes: O outputs and I inputs of a linear layer, r rank of the adapter, N tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.training.adapters.adapted import ADAPTER, require_dropped

if TYPE_CHECKING:
    from peft import PeftModel


def add_adapters(
    model: PreTrainedModel,
    *,
    masks: Iterable[tuple[str, Tensor]],
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
) -> PeftModel:
    """Adapters on linear layers of a sparse model, as a peft model: any trainer trains it, and saves what it trained.

    The defaults are those of Wanda's published fine-tuning (arXiv 2306.11695, section 5), but for its dropout of 0.05.

    Args:
        model: changed in place; its own weights are frozen.
        masks: name of a weight and its bool mask [O, I], True where kept; each is read once. Adapted layers without
            one are dense.
        rank, alpha: of the adapters.
        dropout: share of the adapters' inputs that is zeroed in training; above 0 it costs a second product.
        targets: last parts of the names of the layers that get one.

    Raises:
        ShearingError: peft is not installed, or no layer has such a name.
    """
    peft = _import_peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    # The only door that peft leaves for a layer of one's own.
    config._register_custom_module({nn.Linear: _masked_linear()})  # noqa: SLF001
    try:
        with warnings.catch_warnings():
            # peft asks a model by a name that newer releases of transformers warn about.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            adapted: PeftModel = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
        raise ShearingError(
            "targets", value=list(targets), allowed=f"names of linear layers: {', '.join(names)}", mend=str(error)
        ) from error
    layers = {f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "kept")}
    for name, mask in masks:
        if (layer := layers.get(name)) is not None:
            layer.kept = mask.to(layer.base_layer.weight.device)
    return adapted


def merge_adapters(adapted: PeftModel, *, masks: Iterable[tuple[str, Tensor]]) -> PreTrainedModel:
    """The plain model with its adapters in its weights.

    Args:
        adapted: from `add_adapters`; not to be used afterwards.
        masks: as there; checked after merging.

    Raises:
        ShearingError: a weight that a mask drops is not 0.
    """
    model: PreTrainedModel = adapted.merge_and_unload()
    require_dropped(model, masks=masks)
    return model


class _MaskedProduct(torch.autograd.Function):
    """x (W + s M ⊙ (B A))ᵀ for frozen W; the sum is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor | None, a_rI: Tensor, b_Or: Tensor, kept_OI: Tensor | None, s: float
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI, a_rI, b_Or, kept_OI)
        ctx.s = s
        return linear(x_NI, _weight(weight_OI, a_rI, b_Or, kept_OI, s=s, dtype=x_NI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_rI, b_Or, kept_OI = ctx.saved_tensors
        grad_x_NI = grad_a_rI = grad_b_Or = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ _weight(weight_OI, a_rI, b_Or, kept_OI, s=ctx.s, dtype=grad_NO.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            delta_OI = grad_NO.flatten(0, -2).t() @ x_NI.flatten(0, -2)
            delta_OI = delta_OI.to(a_rI.dtype).mul_(ctx.s)
            if kept_OI is not None:
                delta_OI.mul_(kept_OI)
            grad_a_rI, grad_b_Or = b_Or.t() @ delta_OI, delta_OI @ a_rI.t()
        return grad_x_NI, None, grad_a_rI, grad_b_Or, None, None


_product: Callable[..., Tensor] = _MaskedProduct.apply


def _weight(
    weight_OI: Tensor | None, a_rI: Tensor, b_Or: Tensor, kept_OI: Tensor | None, *, s: float, dtype: torch.dtype
) -> Tensor:
    delta_OI = _delta(a_rI, b_Or, kept_OI, s=s)
    return (delta_OI if weight_OI is None else delta_OI.add_(weight_OI)).to(dtype)


def _delta(a_rI: Tensor, b_Or: Tensor, kept_OI: Tensor | None, *, s: float) -> Tensor:
    delta_OI = (b_Or @ a_rI).mul_(s)
    return delta_OI if kept_OI is None else delta_OI.mul_(kept_OI)


def _masked_linear() -> type[nn.Module]:
    """The adapted layer; a class that can only be made where peft is installed."""
    from peft.tuners.lora import Linear

    class MaskedLinear(Linear):
        kept: Tensor | None

        def __init__(self, base_layer: nn.Linear, adapter_name: str, **settings: Any) -> None:
            super().__init__(base_layer, adapter_name, **settings)
            self.register_buffer("kept", None, persistent=False)

        @torch.no_grad()
        def get_delta_weight(self, adapter: str) -> Tensor:
            """What merging adds."""
            a_rI, b_Or = (cast("Tensor", part[adapter].weight) for part in (self.lora_A, self.lora_B))
            return _delta(a_rI, b_Or, self.kept, s=self.scaling[adapter])

        def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                output: Tensor = super().forward(x, *arguments, **keywords)
                return output
            x_NI, base, dropout = x, cast("nn.Linear", self.base_layer), self.lora_dropout[ADAPTER]
            a_rI, b_Or, s = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
            if torch.is_autocast_enabled(x_NI.device.type):
                x_NI = x_NI.to(torch.get_autocast_dtype(x_NI.device.type))
            with torch.autocast(x_NI.device.type, enabled=False):
                if self.training and getattr(dropout, "p", 0.0) > 0.0:
                    plain = linear(x_NI, base.weight.to(x_NI.dtype))
                    y_NO = plain + _product(dropout(x_NI), None, a_rI, b_Or, self.kept, s)
                else:
                    y_NO = _product(x_NI, base.weight, a_rI, b_Or, self.kept, s)
                return y_NO if base.bias is None else y_NO + base.bias.to(y_NO.dtype)

    return MaskedLinear


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ShearingError(
            "lora", value="peft", allowed=f"an environment with peft ({error})", mend="pip install 'shearing[lora]'"
        ) from error
    return peft
