"""Refit: weights that stay make up for the units that go, layer by layer, before any of them is trained.

Legend: T tokens, B sequences, S positions; I and O inputs and outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families import Family
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.models.stored.on_demand import weights_here
from shearing.models.stored.passing import Reached
from shearing.processes.processes import Processes
from shearing.pruning.calibration.inverse import damped_factors
from shearing.pruning.calibration.places import Place, named_places, weight_of
from shearing.pruning.calibration.shares import shares_of
from shearing.pruning.calibration.statistics import InputStatistics, Need, add_products, weigh
from shearing.pruning.calibration.walk import first_inputs, listening, run_layer
from shearing.pruning.structured.importance.metric import Cost
from shearing.pruning.structured.importance.reconstruction import token_weights

RIDGE = 1.5
"""How strongly refitted weights are held where they are. Small values fit the calibration text, see docs/lab-log.md."""

_BARELY = 1e-9
"""Damping that only keeps inputs which are always zero from making a matrix singular."""


@torch.no_grad()
def refit(
    model: MaskedModel,
    *,
    masks: Masks,
    batches: Sequence[Inputs],
    ridge: float = RIDGE,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
    keep: Callable[[int, nn.Module], None] = lambda _index, _layer: None,
) -> None:
    """Refit the weights that stay under binary masks to what the whole model computes, layer by layer, in place.

    A linear layer W that reads x' under the masks, where the whole model reads x and should give y, becomes

        W + argmin_D Σ_t w_t |y_t - (W + D) x'_t|² + δ tr(D diag(Σ_t w_t x'_t x'_tᵀ) Dᵀ),   δ = `ridge`

    over the columns and rows that stay. For what reads the residual stream, y = W x. For what writes into it, y leads
    to the residual stream of the whole model; so a layer also makes up for the layers below it that are gone. Inputs
    x' come from layers that are refitted already (as in SparseGPT). Where a write has a bias, it is refitted with it,
    free of δ: so it holds the mean of what goes (as in FLAP, arXiv 2312.11983). Other biases, norms, embedding and head
    stay as they are.

    Args:
        model: masked model, on any device, whole or with weights that come on demand; its masks are left as `masks`.
        masks: binary.
        batches: tokens [B, S], on the model's device; all of them on every process.
        ridge: how strongly weights are held where they are.
        advance: called with 1 after every layer.
        processes: those that refit together, each with a share of the text; all of them call this, and the weights of
            all become the same.
        keep: called with every layer's index and the layer, whose refitted weights are there for the last time where
            they come on demand.

    Raises:
        ShearingError: the model is of a family that cannot be refitted, see `require_refittable`.
    """
    source_model = model.model
    family = anatomy_of(source_model)
    require_refittable(family)
    processes = processes or Processes()
    own = [share.inputs for share in shares_of(batches, processes=processes)]
    was_training = source_model.training
    source_model.eval()
    model.set_masks(None)
    whole, calls = first_inputs(source_model, own)
    model.set_masks(masks)
    masked, _ = first_inputs(source_model, own)
    hidden = None if masks.hidden is None else masks.hidden.nonzero()[:, 0]
    attention_read, attention_write, mlp_norm, mlp_read = named_places(
        family, "attention read", "attention write", "mlp norm", "mlp read"
    )
    refit_readers = partial(_refit_readers, ridge=ridge, processes=processes)
    refit_write = partial(_refit_write, ridge=ridge, processes=processes)
    for index, layer in enumerate(decoder_layers(source_model)):
        with weights_here(layer):
            model.set_masks(None)
            dense = [
                run_layer(layer.forward, layer, stream, of_layers[index], places=(attention_read, mlp_norm, mlp_read))
                for stream, of_layers in zip(whole, calls, strict=True)
            ]
            whole = [after for _, after in dense]
            model.set_masks(masks)
            units = None if masks.intermediate is None else masks.intermediate[index].nonzero()[:, 0]
            if _kept(masks.attention, index):
                heads = _inputs_of_heads(masks.heads(index), inputs=weight_of(layer, family.attention.write).shape[1])
                norm = layer.get_submodule(family.attention.entry)
                inputs = [norm(x) for x in masked]
                refit_readers(layer, attention_read, inputs=inputs, dense=dense, columns=hidden)
                places = (attention_write, mlp_norm)
                found = [
                    run_layer(layer.forward, layer, x, of_layers[index], places=places, until=mlp_norm.name)
                    for x, of_layers in zip(masked, calls, strict=True)
                ]
                wanted = [seen[mlp_norm.name] for seen, _ in dense]
                inputs = [seen[attention_write.name] for seen, _ in found]
                write = family.attention.write
                masked = refit_write(layer, write, masked, inputs, wanted, rows=hidden, columns=heads)
            if _kept(masks.mlp, index):
                normed = [layer.get_submodule(family.mlp.entry)(x) for x in masked]
                refit_readers(layer, mlp_read, inputs=normed, dense=dense, columns=hidden)
                inputs = [_inputs_of_write(layer, family, x) for x in normed]
                write = family.mlp.write
                masked = refit_write(layer, write, masked, inputs, whole, rows=hidden, columns=units)
            keep(index, layer)
        advance(1)
    source_model.train(was_training)


def refit_cost(source: Shape, *, target: Shape, text_tokens: int) -> Cost:
    """What `refit` takes: two passes over the text, and in each layer that stays four systems of equations.

    A system with n inputs that take part and O outputs takes 2 T n (n + O) for its sums, n^3 / 3 for the factor and
    2 n^2 O for the solution.

    Args:
        source: shape of the model.
        target: shape that its masks leave.
        text_tokens: T, of the batches.
    """
    d, kept = source.hidden_size, target.hidden_size
    heads, units = target.num_attention_heads * target.head_dim, target.intermediate_size
    flops = 0.0
    for inputs, outputs in ((kept, d), (heads, kept), (kept, d), (units, kept)):
        flops += 2.0 * text_tokens * inputs * (inputs + outputs)
        flops += inputs**3 / 3 + 2.0 * inputs**2 * outputs
    return Cost(forward_tokens=2 * text_tokens, other_flops=flops * target.num_hidden_layers)


def require_refittable(family: Family) -> None:
    """Check that each sub-layer is norm, write, add: what is solved for here is that the residual stream is a sum.

    Raises:
        ShearingError: one has no norm before it, or one after its write.
    """
    if not all(sublayer.before and sublayer.adds_its_write for sublayer in family.sublayers.values()):
        raise ShearingError(
            "source (architecture)",
            value=family.model_type,
            allowed="for refitting the weights that stay, a family whose sub-layers read the residual stream through a "
            "norm and add what they write to it as it is",
            mend=f"switch {key('compensate')} off",
        )


def _refit_readers(
    layer: nn.Module,
    place: Place,
    *,
    inputs: Sequence[Tensor],
    dense: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    columns: Tensor | None,
    ridge: float,
    processes: Processes,
) -> None:
    """Corrects what reads the residual stream, from its inputs with masks and without."""
    first = weight_of(layer, place.members[0])
    fit = _Fit(first, columns=columns, outputs=first.shape[1], ridge=ridge)
    for x, (seen, _) in zip(inputs, dense, strict=True):
        fit.add(x, lacks=seen[place.name] - x)
    gain, _ = fit.solve(processes)
    for name in place.members:
        weight = weight_of(layer, name)
        # What the output lacks is W (x - x').
        weight[:, fit.columns] += (weight.double() @ gain.T).to(weight.dtype)


def _refit_write(
    layer: nn.Module,
    name: str,
    streams: Sequence[Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    *,
    rows: Tensor | None,
    columns: Tensor | None,
    ridge: float,
    processes: Processes,
) -> list[Tensor]:
    """Corrects what writes into the residual stream; returns the stream after it."""
    write, weight = layer.get_submodule(name), weight_of(layer, name)
    index_O = torch.arange(weight.shape[0], device=weight.device) if rows is None else rows
    bias = write.bias
    assert bias is None or isinstance(bias, Tensor)
    fit = _Fit(weight, columns=columns, outputs=index_O.numel(), ridge=ridge, intercept=bias is not None)
    for stream, x, y in zip(streams, inputs, wanted, strict=True):
        lacks = y - stream - write(x)
        fit.add(x, lacks=lacks if rows is None else lacks[..., rows], weights=token_weights(y))
    correction, intercept = fit.solve(processes)
    weight[index_O[:, None], fit.columns] += correction.T.to(weight.dtype)
    if bias is not None:
        assert intercept is not None
        bias[index_O] += intercept.to(bias.dtype)
    return [stream + write(x) for stream, x in zip(streams, inputs, strict=True)]


def _kept(mask: Tensor | None, index: int) -> bool:
    return mask is None or bool(mask[index])


def _inputs_of_heads(heads: Tensor | None, *, inputs: int) -> Tensor | None:
    """Indices of the kept inputs of the attention's write, from a mask of its heads or groups."""
    return None if heads is None else heads.repeat_interleave(inputs // heads.numel()).nonzero()[:, 0]


class _Fit:
    """Normal equations of a linear correction, as sums over tokens: what is read, and what the output lacks.

    Args:
        weight: [O, I], what is corrected.
        columns: indices of the inputs that take part; None: all.
        outputs: number of outputs that lack something.
        ridge: share of the moment's diagonal that is added to it.
        intercept: whether a constant is fitted beside it.

    Attributes:
        columns: indices of the inputs that take part.
    """

    def __init__(
        self, weight: Tensor, *, columns: Tensor | None, outputs: int, ridge: float, intercept: bool = False
    ) -> None:
        self._all, self._ridge = columns is None, ridge
        self.columns = torch.arange(weight.shape[1], device=weight.device) if columns is None else columns
        taking_part = self.columns.numel()
        needs: frozenset[Need] = frozenset({"moment", "sums"} if intercept else {"moment"})
        self._read = InputStatistics(taking_part, needs=needs, device=weight.device, dtype=torch.float64)
        self._cross = torch.zeros(taking_part, outputs, dtype=torch.float64, device=weight.device)
        self._lacks = torch.zeros(outputs, dtype=torch.float64, device=weight.device) if intercept else None

    def add(self, x: Tensor, *, lacks: Tensor, weights: Tensor | None = None) -> None:
        """Inputs [B, S, I], what the output lacks [B, S, O], and how much each token counts [B, S]."""
        x = x if self._all else x[..., self.columns]
        self._read.add(x, weights=weights)
        lacks_TO = lacks.flatten(0, -2).float()
        add_products(self._cross, weigh(x.flatten(0, -2).float(), weights), lacks_TO)
        if self._lacks is not None:
            self._lacks += weigh(lacks_TO, weights).sum(0, dtype=torch.float64)

    def solve(self, processes: Processes) -> tuple[Tensor, Tensor | None]:
        """Transposed correction [inputs that take part, O], and the constant [O] beside it, from the sums of all.

        The main process solves, and the others take what it finds: every next sum depends on it to the last bit.
        """
        self._read.combine(processes, rank=0)
        for sums in (self._cross, self._lacks):
            if sums is not None:
                processes.sum_on(sums, rank=0)
        correction, intercept = torch.empty_like(self._cross), self._lacks
        if processes.is_main:
            correction = self._correction()
            intercept = None if self._lacks is None else self._intercept(correction)
        return processes.share(correction), None if intercept is None else processes.share(intercept)

    def _correction(self) -> Tensor:
        if self._lacks is None:
            lower, _ = next(damped_factors(self._read.products, damping=self._ridge, of="each"))
            return torch.cholesky_solve(self._cross, lower)
        # The best constant for any correction leaves what is around the means; what holds weights stays as it is.
        products, mean = self._read.products, self._read.mean
        centred = products - self._read.tokens * mean[:, None] * mean
        centred.diagonal().add_(self._ridge * products.diagonal())
        lower, _ = next(damped_factors(centred, damping=_BARELY, of="each"))
        return torch.cholesky_solve(self._cross - mean[:, None] * self._lacks, lower)

    def _intercept(self, correction: Tensor) -> Tensor:
        assert self._lacks is not None
        return self._lacks / self._read.tokens - self._read.mean @ correction


def _inputs_of_write(layer: nn.Module, family: Family, x: Tensor) -> Tensor:
    """What the MLP's write reads when the MLP reads x."""
    with listening(layer, named_places(family, "mlp write"), until="mlp write") as seen, suppress(Reached):
        layer.get_submodule(family.mlp.module)(x)
    return seen["mlp write"]
