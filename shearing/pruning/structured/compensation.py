"""What the units that stay can make up for: an order in which to let units go, and the weights that make up for them.

Training refits the weights that stay, so a unit that the others can stand in for costs nothing in the end, however
active it is. Both functions here ask how much of a layer's output a linear refit of the rest would recover.

Legend: T tokens, L layers, d hidden, m intermediate, K KV groups, G query heads per group, dh head dimension; I and O
inputs and outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families import Family
from shearing.models.masked import MaskedModel, Masks
from shearing.pruning.calibration.places import readers, reading_modules, weight_of
from shearing.pruning.calibration.walk import Reached, first_inputs, listening, run_layer
from shearing.pruning.structured.importance.reconstruction import damped, token_weights

RIDGE = 1.5
"""The same where weights are refitted: how strongly they are held where they are. Small values fit the calibration
text, see docs/lab-log.md."""


@torch.no_grad()
def compensate(
    model: MaskedModel,
    *,
    masks: Masks,
    batches: Sequence[Inputs],
    ridge: float = RIDGE,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Refit the weights that stay under binary masks to what the whole model computes, layer by layer, in place.

    A linear layer W that reads x' under the masks, where the whole model reads x and should give y, becomes

        W + argmin_D Σ_t w_t |y_t - (W + D) x'_t|² + δ tr(D diag(Σ_t w_t x'_t x'_tᵀ) Dᵀ),   δ = `ridge`

    over the columns and rows that stay. For what reads the residual stream, y = W x. For what writes into it, y leads
    to the residual stream of the whole model; so a layer also makes up for the layers below it that are gone. Inputs
    x' come from layers that are refitted already (as in SparseGPT). Biases, norms, embedding and head stay as they are.

    Args:
        model: masked model, on any device; its masks are left as `masks`.
        masks: binary.
        batches: tokens [B, S], on the model's device.
        ridge: how strongly weights are held where they are.
        advance: called with 1 after every layer.
    """
    source_model = model.model
    family = anatomy_of(source_model)
    was_training = source_model.training
    source_model.eval()
    model.set_masks(None)
    whole, calls = first_inputs(source_model, batches)
    model.set_masks(masks)
    masked, _ = first_inputs(source_model, batches)
    hidden = None if masks.hidden is None else masks.hidden.nonzero()[:, 0]
    reads = reading_modules(family, "attention read", "mlp norm", "mlp read")
    writes = reading_modules(family, "attention write", "mlp norm")
    for index, layer in enumerate(decoder_layers(source_model)):
        model.set_masks(None)
        dense = [
            run_layer(layer.forward, layer, stream, of_layers[index], places=reads)
            for stream, of_layers in zip(whole, calls, strict=True)
        ]
        whole = [after for _, after in dense]
        model.set_masks(masks)
        units = None if masks.intermediate is None else masks.intermediate[index].nonzero()[:, 0]
        if _kept(masks.attention, index):
            heads = _inputs_of_heads(masks.heads(index), inputs=weight_of(layer, family.attention.write).shape[1])
            norm = layer.get_submodule(family.attention.entry)
            _refit_readers(
                layer,
                "attention",
                family,
                inputs=[norm(x) for x in masked],
                dense=dense,
                fit=_Fit(columns=hidden, ridge=ridge),
            )
            found = [
                run_layer(layer.forward, layer, x, of_layers[index], places=writes, until="mlp norm")
                for x, of_layers in zip(masked, calls, strict=True)
            ]
            wanted = [seen["mlp norm"] for seen, _ in dense]
            inputs = [seen["attention write"] for seen, _ in found]
            masked = _refit_write(
                layer, family.attention.write, masked, inputs, wanted, rows=hidden, fit=_Fit(columns=heads, ridge=ridge)
            )
        if _kept(masks.mlp, index):
            normed = [layer.get_submodule(family.mlp.entry)(x) for x in masked]
            _refit_readers(layer, "mlp", family, inputs=normed, dense=dense, fit=_Fit(columns=hidden, ridge=ridge))
            inputs = [_inputs_of_write(layer, family, x) for x in normed]
            masked = _refit_write(
                layer, family.mlp.write, masked, inputs, whole, rows=hidden, fit=_Fit(columns=units, ridge=ridge)
            )
        advance(1)
    source_model.train(was_training)


def _refit_readers(
    layer: nn.Module,
    kind: str,
    family: Family,
    *,
    inputs: Sequence[Tensor],
    dense: Sequence[tuple[Mapping[str, Tensor], Tensor]],
    fit: _Fit,
) -> None:
    """Corrects what reads the residual stream, from its inputs with masks and without."""
    for x, (seen, _) in zip(inputs, dense, strict=True):
        fit.add(x, residual=seen[f"{kind} read"] - x)
    gain = fit.solve()
    for name in readers(family, kind):
        weight = weight_of(layer, name)
        # What the output lacks is W (x - x').
        weight[:, fit.columns_of(weight)] += (weight.double() @ gain.T).to(weight.dtype)


def _refit_write(
    layer: nn.Module,
    name: str,
    streams: Sequence[Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    *,
    rows: Tensor | None,
    fit: _Fit,
) -> list[Tensor]:
    """Corrects what writes into the residual stream; returns the stream after it."""
    write, weight = layer.get_submodule(name), weight_of(layer, name)
    for stream, x, y in zip(streams, inputs, wanted, strict=True):
        residual = y - stream - write(x)
        fit.add(x, residual=residual if rows is None else residual[..., rows], weights=token_weights(y))
    index_O = torch.arange(weight.shape[0], device=weight.device) if rows is None else rows
    weight[index_O[:, None], fit.columns_of(weight)] += fit.solve().T.to(weight.dtype)
    return [stream + write(x) for stream, x in zip(streams, inputs, strict=True)]


def _kept(mask: Tensor | None, index: int) -> bool:
    return mask is None or bool(mask[index])


def _inputs_of_heads(heads: Tensor | None, *, inputs: int) -> Tensor | None:
    """Indices of the kept inputs of the attention's write, from a mask of its heads or groups."""
    return None if heads is None else heads.repeat_interleave(inputs // heads.numel()).nonzero()[:, 0]


class _Fit:
    """Normal equations of a linear correction: what is read, and what the output lacks.

    Args:
        columns: indices of the inputs that take part; None: all.
        ridge: share of the moment's diagonal that is added to it.
    """

    def __init__(self, *, columns: Tensor | None, ridge: float) -> None:
        self._columns, self._ridge = columns, ridge
        self._moment = self._cross = torch.zeros(())

    def add(self, x: Tensor, *, residual: Tensor, weights: Tensor | None = None) -> None:
        """Inputs [..., I], what the output lacks [..., O], and how much each token counts [...]."""
        x, residual = x.flatten(0, -2).float(), residual.flatten(0, -2).float()
        x = x if self._columns is None else x[:, self._columns]
        weighted = x if weights is None else x * weights.flatten()[:, None]
        self._moment = self._moment.to(x.device) + (weighted.T @ x).double()
        self._cross = self._cross.to(x.device) + (weighted.T @ residual).double()

    def columns_of(self, weight: Tensor) -> Tensor:
        """Indices of the columns of `weight` [O, I] that are corrected."""
        return torch.arange(weight.shape[1], device=weight.device) if self._columns is None else self._columns

    def solve(self) -> Tensor:
        """Transposed correction [inputs that take part, O]."""
        return torch.cholesky_solve(self._cross, torch.linalg.cholesky(damped(self._moment, by=self._ridge)))


def _inputs_of_write(layer: nn.Module, family: Family, x: Tensor) -> Tensor:
    """What the MLP's write reads when the MLP reads x."""
    with listening(layer, reading_modules(family, "mlp write"), until="mlp write") as seen, suppress(Reached):
        layer.get_submodule(family.mlp.module)(x)
    return seen["mlp write"]
