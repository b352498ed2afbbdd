"""Compensation by means: what goes is replaced by what it writes on average, which a bias can hold.

Legend: I inputs and O outputs of a write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from shearing.data.documents import Inputs
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.masked import MaskedModel, Masks
from shearing.pruning.calibration.places import weight_of
from shearing.pruning.structured.importance.inputs.write_inputs import write_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

_FLAGS = ("attention_bias", "attention_out_bias", "mlp_bias")
"""What Hugging Face's configs call it that linear layers of a kind have biases."""


@dataclass(frozen=True)
class MeanBias:
    """What came of compensating by means.

    Attributes:
        folded: sub-layers whose write has a bias, which holds it: attention, mlp.
        left_out: sub-layers that lost heads or units and whose write has no bias: nothing makes up for them.
    """

    folded: tuple[str, ...]
    left_out: tuple[str, ...]


@torch.no_grad()
def fold_means(
    model: MaskedModel, *, masks: Masks, batches: Sequence[Inputs], advance: Callable[[int], None] = lambda _: None
) -> MeanBias:
    """Adds W_P x̄_P to the bias of every write, P the inputs that go: FLAP's compensation (arXiv 2312.11983).

    x̄ is the mean over tokens of what the dense model's write reads. In place; the masks are left as `masks`.

    Args:
        model: masked model, on any device.
        masks: binary.
        batches: tokens [B, S], on the model's device.
        advance: called with 1 after every batch.
    """
    family = anatomy_of(model.model)
    losing = {
        "attention": masks.kv_groups is not None or masks.query_heads is not None,
        "mlp": masks.intermediate is not None,
    }
    concerned = [kind for kind, loses in losing.items() if loses]
    folded = tuple(kind for kind in concerned if family.sublayers[kind].has_bias(family.sublayers[kind].write))
    model.set_masks(None)
    means = write_inputs(model.model, batches if folded else (), needs=frozenset({"sums"}), advance=advance)
    for index, layer in enumerate(decoder_layers(model.model)):
        for kind in folded:
            write = family.sublayers[kind].write
            weight, bias = weight_of(layer, write).double(), layer.get_submodule(write).bias
            assert isinstance(bias, Tensor)
            kept = masks.heads(index) if kind == "attention" else None
            if kind == "mlp" and masks.intermediate is not None:
                kept = masks.intermediate[index]
            assert kept is not None
            goes = (kept == 0).repeat_interleave(weight.shape[1] // kept.numel()).to(weight.device)
            bias += (weight[:, goes] @ means[kind][index].mean[goes]).to(bias.dtype)
    model.set_masks(masks)
    return MeanBias(folded, tuple(kind for kind in concerned if kind not in folded))


def with_biases(model: Model) -> Model:
    """The same model with biases of zero wherever its config can have them; the model itself where there are no more.

    A config's `attention_bias` and `mlp_bias` give biases to all linear layers of a sub-layer, not to its write alone.
    Weights are shared with the model.
    """
    from accelerate import init_empty_weights

    config: Any = model.config
    values = config.to_dict()
    flags = [flag for flag in _FLAGS if flag in values and not values[flag]]
    if not flags:
        return model
    changed = type(config).from_dict({**values, **dict.fromkeys(flags, True)})
    with init_empty_weights(include_buffers=False):
        result: Any = type(model)(changed)
    state = dict(model.state_dict(keep_vars=True))
    for name, parameter in result.named_parameters():
        if name not in state:
            beside = state[name.removesuffix("bias") + "weight"]
            state[name] = torch.nn.Parameter(beside.new_zeros(parameter.shape))
    result.load_state_dict(state, strict=True, assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    biased: Model = result.to(model.device).train(model.training)
    return biased
