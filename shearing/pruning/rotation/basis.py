"""A rotated model: one orthogonal matrix through everything that reads or writes the residual stream.

A norm's gain is folded into what reads it, g ← 1; then, with x' = x Q, what writes is multiplied by Qᵀ, what reads by
Q, and the embedding is E Q. An RMSNorm without gain commutes with Q, so the model computes what it did (SliceGPT,
arXiv 2401.15024, section 3). A head that is the embedding cannot take the last norm's gain: then a diagonal one is
fitted in the new basis.

Legend: d hidden, V vocabulary, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from shearing.models.stored.paging.on_demand import weights_by_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Side = Literal["reads", "writes", "bias"]

_ROWS = 4096
"""Of a matrix, that are in fp64 at the same time."""


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
        model: of a family that `require_rotatable` takes, whole, on any device.
        basis: to rotate into.

    Returns:
        What a tied head loses: the root mean square of the change of the logits as a share of theirs; 0 without one.
    """
    family, weights = anatomy_of(model), weights_by_name(model)
    gain, lost = None, 0.0
    if weight_of(model, family.head) is weight_of(model, family.embedding):
        gain, lost = tied_gain(family, weights, basis)
    for name, rotated in rotated_in_turn(family, weights, basis, layers=len(decoder_layers(model)), last_gain=gain):
        model.get_parameter(name).copy_(rotated)
    return lost


def tied_gain(family: Family, weights: Mapping[str, Tensor], basis: Basis) -> tuple[Tensor, float]:
    """The last norm's gain [d] that comes nearest to the source's in another basis, fp64, and what it loses.

    Args:
        family: of the model.
        weights: its weights by name; the head is its embedding.
        basis: that it is rotated into.
    """
    embedding = weights[f"{family.embedding}.weight"]
    rotation = basis.rotation.to(embedding.device)
    inner = rotation.T @ _second_moment(embedding) @ rotation
    gain = _gain(weights, family.final_norm)
    moment = rotation.T @ basis.moment.to(rotation.device) @ rotation
    return fitted_gain(inner, wanted=rotation.T @ (gain[:, None] * rotation), moment=moment)


def rotated_in_turn(
    family: Family, weights: Mapping[str, Tensor], basis: Basis, *, layers: int, last_gain: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """The weights that a rotation changes, of which one exists at a time beside what it is made of.

    Args:
        family: one that `require_rotatable` takes.
        weights: of the model, by name; each is asked for when its turn comes.
        basis: to rotate into.
        layers: of the model.
        last_gain: of the last norm where the head is the embedding and stays it [d], see `tied_gain`; None: the head
            takes the source's, and is a matrix of its own, if it was not one before.

    Returns:
        Name and new weight, in the dtype and on the device of the old one.
    """
    rotation = basis.rotation
    for index in range(layers):
        for sublayer in family.sublayers.values():
            yield from _rotated_sublayer(weights, f"{family.layers}.{index}.", sublayer, rotation=rotation)
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    gain = _gain(weights, family.final_norm)
    if last_gain is None:
        yield head, _read_by(weights[head if head in weights else embedding], gain, rotation=rotation)
        last_gain = torch.ones_like(gain)
    yield _with_gain(weights, family.final_norm, last_gain)
    yield embedding, _read_by(weights[embedding], None, rotation=rotation)


def fitted_gain(inner: Tensor, *, wanted: Tensor, moment: Tensor) -> tuple[Tensor, float]:
    """The diagonal gain g' that comes nearest to a matrix A between norm and head.

    With M = EᵀE and C = mean n nᵀ, it minimises mean |E (A - diag g') n|² over g': (M ∘ C) g' = diag(M A C).

    Args:
        inner: M [d, d], of the head, fp64.
        wanted: A [d, d], fp64.
        moment: C [d, d], of what the norm puts out, fp64.

    Returns:
        g' [d], and the root of what is left over mean |E A n|².
    """
    system = inner * moment
    # What is never there, or never read, has no gain to fit: it keeps the diagonal of A.
    hold = 1e-9 * system.diagonal().mean()
    system = system + hold * torch.eye(len(system), dtype=system.dtype, device=system.device)
    gain = torch.linalg.solve(system, (inner @ wanted @ moment).diagonal() + hold * wanted.diagonal())
    left = wanted - gain.diag()
    whole = (wanted.T @ inner @ wanted * moment).sum()
    return gain, float(((left.T @ inner @ left * moment).sum().clamp_min(0) / whole).sqrt())


def _rotated_sublayer(
    weights: Mapping[str, Tensor], prefix: str, sublayer: SubLayer, *, rotation: Tensor
) -> Iterator[tuple[str, Tensor]]:
    gain = None
    if sublayer.before is not None:
        gain = _gain(weights, sublayer.before, prefix=prefix)
        yield _with_gain(weights, sublayer.before, torch.ones_like(gain), prefix=prefix)
    for parameter in sublayer.linears:
        name, side = prefix + parameter.name, _side_of(parameter)
        if side == "writes":
            yield name, _written_to(weights[name], rotation=rotation)
        elif side is not None:
            yield name, _read_by(weights[name], gain if side == "reads" else None, rotation=rotation)


def _read_by(weight: Tensor, gain_d: Tensor | None, *, rotation: Tensor) -> Tensor:
    """W diag(g) Q of rows [..., d], in fp64 some rows at a time."""
    rotation, result = rotation.to(weight.device), torch.empty_like(weight)
    rows, into = weight.reshape(-1, weight.shape[-1]), result.view(-1, weight.shape[-1])
    for part, place in zip(rows.split(_ROWS), into.split(_ROWS), strict=True):
        double = part.double() if gain_d is None else part.double() * gain_d
        place.copy_(double @ rotation)
    return result


def _written_to(weight: Tensor, *, rotation: Tensor) -> Tensor:
    """Qᵀ W of matrices [..., d, I], in fp64 some columns at a time."""
    rotation, result = rotation.to(weight.device), torch.empty_like(weight)
    matrices, into = (each.view(-1, *weight.shape[-2:]) for each in (weight, result))
    for matrix, place in zip(matrices, into, strict=True):
        for columns, part in zip(matrix.split(_ROWS, dim=1), place.split(_ROWS, dim=1), strict=True):
            part.copy_(rotation.T @ columns.double())
    return result


def _second_moment(weight_Vd: Tensor) -> Tensor:
    """WᵀW, fp64."""
    d = weight_Vd.shape[1]
    total = torch.zeros(d, d, dtype=torch.float64, device=weight_Vd.device)
    for rows in weight_Vd.split(_ROWS):
        double = rows.double()
        total.addmm_(double.T, double)
    return total


def weight_of(module: nn.Module, name: str = "") -> Tensor:
    """The weight of a module below another, or of this one."""
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _gain(weights: Mapping[str, Tensor], norm: Norm, *, prefix: str = "") -> Tensor:
    return weights[f"{prefix}{norm.name}.weight"].double() + norm.kind.offset


def _with_gain(weights: Mapping[str, Tensor], norm: Norm, gain: Tensor, *, prefix: str = "") -> tuple[str, Tensor]:
    name = f"{prefix}{norm.name}.weight"
    return name, (gain - norm.kind.offset).to(weights[name])
