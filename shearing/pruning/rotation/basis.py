"""A rotated model: one orthogonal matrix through everything that reads or writes the residual stream.

A norm's gain is folded into what reads it, g ← 1; then, with x' = x Q, what writes is multiplied by Qᵀ, what reads by
Q, and the embedding is E Q. An RMSNorm without gain commutes with Q, so the model computes what it did (SliceGPT,
arXiv 2401.15024, section 3). A head that is the embedding cannot take the last norm's gain: then a diagonal one is
fitted in the new basis.

Legend: d hidden, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families import Family
from shearing.models.families.axes import HIDDEN, Parameter
from shearing.models.families.family import SubLayer
from shearing.models.families.norms import Norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Side = Literal["reads", "writes", "bias"]


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Coordinates of the residual stream.

    Attributes:
        rotation: Q [d, d], orthogonal, fp64: a stream x becomes x Q.
        moment: C [d, d], fp64: mean of n nᵀ over what the last norm puts out, before its gain, in the old basis.
    """

    rotation: Tensor
    moment: Tensor


def require_rotatable(family: Family) -> None:
    """Check that gains can be folded away, so that norms commute with a rotation.

    Raises:
        ShearingError: a norm after a write, a norm that takes a mean, or one with a bias.
    """
    problem = next(_problems(family), None)
    if problem is not None:
        raise ShearingError(
            "rotate",
            value=f"pca, of {family.model_type}",
            allowed=f"none in this family: {problem}",
            mend=f"set {key('rotate')}=none",
        )


def _problems(family: Family) -> Iterator[str]:
    for sublayer in family.sublayers.values():
        if sublayer.after is not None:
            yield "a norm stands between a write and the residual stream, and its gain belongs to single coordinates"
    for norm in (*(each.before for each in family.sublayers.values()), family.final_norm):
        if norm is not None and norm.kind.centred:
            yield "its norms take the mean over coordinates from them"
        if norm is not None and norm.bias:
            yield "its norms have a bias, which belongs to single coordinates"
    for sublayer in family.sublayers.values():
        for parameter in sublayer.linears:
            if any("hidden" in axis.segments for axis in parameter.axes) and _side_of(parameter) is None:
                yield f"{parameter.name} has hidden dimensions where nothing is known of how they are read or written"


def _side_of(parameter: Parameter) -> Side | None:
    """Whether a parameter reads the residual stream or writes into it; None for neither, or where it is not known."""
    places = [index for index, axis in enumerate(parameter.axes) if "hidden" in axis.segments]
    last = len(parameter.axes) - 1
    if len(places) != 1 or parameter.axes[places[0]] != HIDDEN:
        return None
    if parameter.name.endswith(".bias"):
        return "bias" if places[0] == last else None
    return {last: "reads", last - 1: "writes"}.get(places[0])  # type: ignore[return-value]


@torch.no_grad()
def rotate(model: PreTrainedModel, basis: Basis) -> float:
    """Rotate a model in place.

    Args:
        model: of a family that `require_rotatable` takes, on any device.
        basis: to rotate into.

    Returns:
        What a tied head loses: the root mean square of the change of the logits as a share of theirs; 0 without one.
    """
    family = anatomy_of(model)
    rotation = basis.rotation.to(next(model.parameters()).device)
    for layer in decoder_layers(model):
        for sublayer in family.sublayers.values():
            _rotate_sublayer(layer, sublayer, rotation=rotation)
    embedding, head = (weight_of(model, name) for name in (family.embedding, family.head))
    norm = model.get_submodule(family.final_norm.name)
    gain = _gain(norm, family.final_norm)
    if head is embedding:
        moment = rotation.T @ basis.moment.to(rotation.device) @ rotation
        wanted = rotation.T @ (gain[:, None] * rotation)
        fitted, lost = fitted_gain(embedding.double() @ rotation, wanted=wanted, moment=moment)
        _set_gain(norm, family.final_norm, fitted)
        embedding.copy_(embedding.double() @ rotation)
        return lost
    head.copy_((head.double() * gain) @ rotation)
    _set_gain(norm, family.final_norm, torch.ones_like(gain))
    embedding.copy_(embedding.double() @ rotation)
    return 0.0


def fitted_gain(embedding_Vd: Tensor, *, wanted: Tensor, moment: Tensor) -> tuple[Tensor, float]:
    """The diagonal gain g' that comes nearest to a matrix A between norm and head.

    With M = EᵀE and C = mean n nᵀ, it minimises mean |E (A - diag g') n|² over g': (M ∘ C) g' = diag(M A C).

    Args:
        embedding_Vd: E, the head, fp64.
        wanted: A [d, d], fp64.
        moment: C [d, d], of what the norm puts out, fp64.

    Returns:
        g' [d], and the root of what is left over mean |E A n|².
    """
    inner = embedding_Vd.T @ embedding_Vd
    system = inner * moment
    # What is never there, or never read, has no gain to fit: it keeps the diagonal of A.
    hold = 1e-9 * system.diagonal().mean()
    system = system + hold * torch.eye(len(system), dtype=system.dtype, device=system.device)
    gain = torch.linalg.solve(system, (inner @ wanted @ moment).diagonal() + hold * wanted.diagonal())
    left = wanted - gain.diag()
    whole = (wanted.T @ inner @ wanted * moment).sum()
    return gain, float(((left.T @ inner @ left * moment).sum().clamp_min(0) / whole).sqrt())


def _rotate_sublayer(layer: nn.Module, sublayer: SubLayer, *, rotation: Tensor) -> None:
    gain = None
    if sublayer.before is not None:
        norm = layer.get_submodule(sublayer.before.name)
        gain = _gain(norm, sublayer.before)
        _set_gain(norm, sublayer.before, torch.ones_like(gain))
    for parameter in sublayer.linears:
        weight = layer.get_parameter(parameter.name)
        side, double = _side_of(parameter), weight.double()
        if side == "writes":
            weight.copy_(rotation.T @ double)
        elif side == "bias":
            weight.copy_(double @ rotation)
        elif side == "reads":
            weight.copy_((double if gain is None else double * gain) @ rotation)


def weight_of(module: nn.Module, name: str = "") -> Tensor:
    """The weight of a module below another, or of this one."""
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _gain(module: nn.Module, norm: Norm) -> Tensor:
    return weight_of(module).double() + norm.kind.offset


def _set_gain(module: nn.Module, norm: Norm, gain: Tensor) -> None:
    weight_of(module).copy_(gain - norm.kind.offset)
