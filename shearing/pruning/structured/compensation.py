"""What the units that stay can make up for: an order in which to let units go, and the weights that make up for them.

Training refits the weights that stay, so a unit that the others can stand in for costs nothing in the end, however
active it is. Both functions here ask how much of a layer's output a linear refit of the rest would recover.

Legend: T tokens, L layers, d hidden, m intermediate, K KV groups, G query heads per group, dh head dimension; I and O
inputs and outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.masks.granularities import unit_sizes
from shearing.masks.importance import ActivationRecorder, Scores
from shearing.models.anatomy import Family, anatomy_of, backbone, decoder_layers
from shearing.models.documents import Inputs
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.models.walking import Call, Reached, listening, readers, run_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01
"""Share of its diagonal that is added to a second moment before it is inverted (SparseGPT, arXiv 2301.00774, adds 1 %
of the mean), so that a unit is not said to be replaceable by a thin difference of others."""

RIDGE = 1.5
"""The same where weights are refitted: how strongly they are held where they are. Small values fit the calibration
text, see docs/lab-log.md."""

_ROUNDS = 16


def elimination_order(
    weight: Tensor, moment: Tensor, *, rows: int, units: int, remove: int, at_once: int = 1
) -> Tensor:
    """Scores of the units that a linear layer reads: how late each would go if the cheapest always went first.

    Taking the columns P of W away and refitting the columns that stay costs, with C = E[x xᵀ],

        tr( W_P [(C⁻¹)_PP]⁻¹ W_Pᵀ )

    of the output's mean square (Optimal Brain Surgeon for blocks of columns, as in ZipLM, arXiv 2302.04089). After
    each removal W and C⁻¹ are those of the refitted layer, so of two units that say the same, one goes early and the
    other late.

    Args:
        weight: [O, I], I = rows * units * (inputs of a unit); a unit's inputs are neighbours.
        moment: C [I, I].
        rows: rows of units; all of them lose units equally fast.
        units: units in a row.
        remove: units of a row to remove; the rest is scored by its cost then.
        at_once: units of a row that go between two updates of the costs.

    Returns:
        [rows, units] fp32 scores, higher goes later.
    """
    weight, inverse = weight.double(), torch.cholesky_inverse(torch.linalg.cholesky(_damped(moment, by=DAMPING)))
    width = weight.shape[1] // (rows * units)
    scores = torch.full((rows, units), float("inf"), dtype=torch.float64, device=weight.device)
    for first in range(0, remove, at_once):
        count = min(at_once, remove - first)
        owing = torch.ones(rows, dtype=torch.bool, device=weight.device)
        for _ in range(rows):
            costs = _removal_costs(weight, inverse, width=width).view(rows, units)
            costs = costs.masked_fill(scores.isfinite() | ~owing[:, None], float("inf"))
            row = int(costs.min(dim=1).values.argmin())
            cheapest = costs[row].argsort(stable=True)[:count]
            scores[row, cheapest] = torch.arange(first, first + count, dtype=torch.float64, device=weight.device)
            owing[row] = False
            starts = (row * units + cheapest) * width
            gone = (starts[:, None] + torch.arange(width, device=weight.device)).flatten()
            weight, inverse = _without(weight, inverse, gone)
    costs = _removal_costs(weight, inverse, width=width).view(rows, units).masked_fill(scores.isfinite(), -1.0)
    ranks = costs.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.where(scores.isfinite(), scores, ranks).float()


def _removal_costs(weight: Tensor, inverse: Tensor, *, width: int) -> Tensor:
    """tr(W_P [(C⁻¹)_PP]⁻¹ W_Pᵀ) of every block of `width` neighbouring columns: [I / width]."""
    if width == 1:
        squares: Tensor = weight.square().sum(0)
        return squares / inverse.diagonal()
    blocks = inverse.shape[0] // width
    of_block = torch.arange(blocks, device=inverse.device)
    diagonal = inverse.view(blocks, width, blocks, width)[of_block, :, of_block, :]
    columns = weight.view(-1, blocks, width).permute(1, 2, 0)
    halves: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(diagonal), columns, upper=False)
    return halves.square().sum((1, 2))


def _without(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Refitted weight and inverse moment after the columns `gone` went; theirs become zero and the identity."""
    rows = torch.cholesky_solve(inverse[gone], torch.linalg.cholesky(inverse[gone][:, gone]))
    weight = weight - weight[:, gone] @ rows
    inverse = inverse - inverse[:, gone] @ rows
    weight[:, gone] = 0.0
    inverse[gone] = 0.0
    inverse[:, gone] = 0.0
    inverse[gone, gone] = 1.0
    return weight, inverse


def _damped(moment: Tensor, *, by: float) -> Tensor:
    moment = moment.double()
    diagonal = moment.diagonal()
    # An input that is always zero has no part in anything, and must not make the matrix singular.
    return moment + torch.diag(by * diagonal + 1e-8 * diagonal.mean() + torch.finfo(torch.float32).tiny)


@torch.no_grad()
def reconstruction_importance(
    model: PreTrainedModel,
    *,
    batches: Sequence[Inputs],
    target: Shape | None,
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Heads, groups and intermediate units by `elimination_order`, where any go; the rest by `activation_importance`.

    A token counts by the inverse mean square of the residual stream after the write, which is what the next norm
    divides by; so attention sinks, a thousand times as large as anything else, count like other tokens.

    Args:
        model: plain model, on any device; layers are visited one after the other, with one layer's moments at a time.
        batches: tokens [B, S], on the model's device.
        target: shape to reach: how many units of a row go. None: as if half of each row went.
        advance: called with 1 after every layer.
    """
    source, family = Shape.of(model.config), anatomy_of(model)
    K, G, m = source.num_key_value_heads, source.query_heads_per_group, source.intermediate_size
    goes = {"kv_groups": K // 2, "query_heads": G // 2, "intermediate": m // 2}
    if target is not None:
        goes = {
            "kv_groups": K - target.num_key_value_heads,
            "query_heads": G - target.query_heads_per_group,
            "intermediate": m - target.intermediate_size,
        }
    orders: dict[str, list[Tensor]] = {name: [] for name, count in goes.items() if count}
    writes = _places(family, "attention write", "mlp norm", "mlp write")
    streams, calls = _first_inputs(model, batches)
    with ActivationRecorder.listening(model) as recorder:
        for index, layer in enumerate(decoder_layers(model)):
            heads, units = _Moment(), _Moment()
            for batch, of_layers in enumerate(calls):
                seen, after = run_layer(layer, layer, streams[batch], of_layers[index], places=writes)
                heads.add(seen["attention write"], weights=_token_weights(seen["mlp norm"]))
                units.add(seen["mlp write"], weights=_token_weights(after))
                streams[batch] = after
            for name, write, moment, rows, count in (
                ("kv_groups", family.attention_write, heads, 1, K),
                ("query_heads", family.attention_write, heads, K, G),
                ("intermediate", family.mlp_write, units, 1, m),
            ):
                if name in orders:
                    at_once = max(1, goes[name] // _ROUNDS)
                    order = elimination_order(
                        _weight(layer, write), moment.mean(), rows=rows, units=count, remove=goes[name], at_once=at_once
                    )
                    orders[name].append(order.cpu())
            advance(1)
    sizes = unit_sizes(source)
    reconstructed = {name: torch.stack(of_layers).view(sizes[name]) for name, of_layers in orders.items()}
    return {**recorder.scores(source), **reconstructed}


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
    whole, calls = _first_inputs(source_model, batches)
    model.set_masks(masks)
    masked, _ = _first_inputs(source_model, batches)
    hidden = None if masks.hidden is None else masks.hidden.nonzero()[:, 0]
    reads = _places(family, "attention read", "mlp norm", "mlp read")
    writes = _places(family, "attention write", "mlp norm")
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
            heads = _inputs_of_heads(masks.heads(index), inputs=_weight(layer, family.attention_write).shape[1])
            norm = layer.get_submodule(family.attention_norm)
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
                layer, family.attention_write, masked, inputs, wanted, rows=hidden, fit=_Fit(columns=heads, ridge=ridge)
            )
        if _kept(masks.mlp, index):
            normed = [layer.get_submodule(family.mlp_norm)(x) for x in masked]
            _refit_readers(layer, "mlp", family, inputs=normed, dense=dense, fit=_Fit(columns=hidden, ridge=ridge))
            inputs = [_inputs_of_write(layer, family, x) for x in normed]
            masked = _refit_write(
                layer, family.mlp_write, masked, inputs, whole, rows=hidden, fit=_Fit(columns=units, ridge=ridge)
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
        weight = _weight(layer, name)
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
    write, weight = layer.get_submodule(name), _weight(layer, name)
    for stream, x, y in zip(streams, inputs, wanted, strict=True):
        residual = y - stream - write(x)
        fit.add(x, residual=residual if rows is None else residual[..., rows], weights=_token_weights(y))
    index_O = torch.arange(weight.shape[0], device=weight.device) if rows is None else rows
    weight[index_O[:, None], fit.columns_of(weight)] += fit.solve().T.to(weight.dtype)
    return [stream + write(x) for stream, x in zip(streams, inputs, strict=True)]


def _kept(mask: Tensor | None, index: int) -> bool:
    return mask is None or bool(mask[index])


def _inputs_of_heads(heads: Tensor | None, *, inputs: int) -> Tensor | None:
    """Indices of the kept inputs of the attention's write, from a mask of its heads or groups."""
    return None if heads is None else heads.repeat_interleave(inputs // heads.numel()).nonzero()[:, 0]


class _Moment:
    """Weighted second moment of vectors [T, I]."""

    def __init__(self) -> None:
        self._sum = torch.zeros(())
        self._total = 0.0

    def add(self, x: Tensor, *, weights: Tensor) -> None:
        x, weights = x.flatten(0, -2).float(), weights.flatten()
        self._sum = self._sum.to(x.device) + ((x * weights[:, None]).T @ x).double()
        self._total += float(weights.sum())

    def mean(self) -> Tensor:
        return self._sum / self._total


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
        return torch.cholesky_solve(self._cross, torch.linalg.cholesky(_damped(self._moment, by=self._ridge)))


def _first_inputs(model: PreTrainedModel, batches: Iterable[Inputs]) -> tuple[list[Tensor], list[list[Call]]]:
    """The residual stream that the first decoder layer reads, and what every layer is called with, batch by batch."""
    layers = list(decoder_layers(model))
    # Layers that attend through windows are called otherwise than the rest; a pass has to go through all of them.
    alike = len(set(getattr(model.config, "layer_types", None) or ["full_attention"])) == 1
    streams: list[Tensor] = []
    calls: list[list[Call]] = []

    def record(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        call = Call(arguments[1:], dict(keywords))
        if layer is layers[0]:
            streams.append(arguments[0])
            calls.append([call] * len(layers) if alike else [])
        if not alike:
            calls[-1].append(call)
        if alike or layer is layers[-1]:
            raise Reached

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers[: 1 if alike else None]]
    try:
        for batch in batches:
            with suppress(Reached):
                backbone(model)(**batch.keywords())
    finally:
        for handle in handles:
            handle.remove()
    return streams, calls


def _places(family: Family, *names: str) -> dict[str, str]:
    """Place -> the module of a layer whose input it is."""
    modules = {
        "attention read": readers(family, "attention")[0],
        "attention write": family.attention_write,
        "mlp norm": family.mlp_norm,
        "mlp read": readers(family, "mlp")[0],
        "mlp write": family.mlp_write,
    }
    return {name: modules[name] for name in names}


def _inputs_of_write(layer: nn.Module, family: Family, x: Tensor) -> Tensor:
    """What the MLP's write reads when the MLP reads x."""
    with listening(layer, _places(family, "mlp write"), until="mlp write") as seen, suppress(Reached):
        layer.get_submodule(family.mlp)(x)
    return seen["mlp write"]


def _weight(layer: nn.Module, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _token_weights(stream: Tensor) -> Tensor:
    """Inverse mean square of each token of a residual stream [B, S, d]: [B, S]."""
    return stream.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
