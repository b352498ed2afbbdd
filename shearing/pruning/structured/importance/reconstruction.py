"""Importance by reconstruction: what the other units of a layer could not make up for.

Legend: T tokens, O outputs and I inputs of a linear layer; B sequences, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families import Family, SubLayer
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.processes.processes import Processes
from shearing.pruning.calibration.inverse import damped_factors
from shearing.pruning.calibration.places import named_places, weight_of
from shearing.pruning.calibration.statistics import InputStatistics
from shearing.pruning.calibration.walk import first_inputs, run_layer
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.importance.activations import ActivationRecorder
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DAMPING = 0.01
"""Share of its diagonal that is added to a second moment before it is inverted (SparseGPT, arXiv 2301.00774, adds 1 %
of the mean), so that a unit is not said to be replaceable by a thin difference of others."""

_BLOCK = 64
"""Columns that go between two updates of the whole matrices."""


def elimination_order(weight: Tensor, moment: Tensor, *, rows: int, units: int, remove: int) -> Tensor:
    """Scores of the units that a linear layer reads: how late each would go if the cheapest always went first.

    Taking the columns P of W away and refitting the columns that stay costs, with C = E[x xᵀ],

        tr( W_P [(C⁻¹)_PP]⁻¹ W_Pᵀ )

    of the output's mean square (Optimal Brain Surgeon for blocks of columns, as in ZipLM, arXiv 2302.04089). After
    each single unit W and C⁻¹ are those of the refitted layer, so of two units that say the same, one goes early and
    the other late. A unit's cost may fall when another goes, so no cheaper bound finds the same order.

    Args:
        weight: [O, I], I = rows * units * (inputs of a unit); a unit's inputs are neighbours.
        moment: C [I, I].
        rows: rows of units; all of them lose units equally fast.
        units: units in a row.
        remove: units of a row to remove; the rest is scored by its cost then.

    Returns:
        [rows, units] fp32 scores, higher goes later.
    """
    left = _Refitted(weight.double(), moment, width=weight.shape[1] // (rows * units))
    scores = torch.full((rows, units), float("inf"), dtype=torch.float64, device=weight.device)
    for place in range(remove):
        owing = torch.ones(rows, dtype=torch.bool, device=weight.device)
        for _ in range(rows):
            costs = left.removal_costs().view(rows, units)
            cheapest = costs.masked_fill(scores.isfinite() | ~owing[:, None], float("inf")).argmin().view(1)
            scores.view(-1)[cheapest] = float(place)
            owing[cheapest // units] = False
            left.remove(cheapest)
    costs = left.removal_costs().view(rows, units).masked_fill(scores.isfinite(), -1.0)
    ranks = costs.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.where(scores.isfinite(), scores, ranks).float()


class _Refitted:
    """A linear layer while blocks P of its columns go and those that stay are refitted: C⁻¹ and G = Wᵀ W.

    With L Lᵀ = (C⁻¹)_PP a block takes

        C⁻¹ ← C⁻¹ - Uᵀ U,        U = L⁻¹ (C⁻¹)_P
        W ← W - (L⁻¹ W_Pᵀ)ᵀ U,   so  G ← G - Uᵀ Y - Yᵀ U,   Y = V - ½ L⁻¹ (V_P)ᵀ U,   V = L⁻¹ G_P

    with it. Costs need no more of both than the blocks on their diagonals, which are always up to date. The whole
    matrices wait until `_BLOCK` columns have gone, as in SparseGPT's lazy batches (arXiv 2301.00774, section 3.3); what
    a block reads of them is brought up to date as it is read.

    Legend: I inputs; w inputs of a block; n columns gone since the last update of the whole matrices.

    Args:
        weight: W [O, I], fp64.
        moment: C [I, I].
        width: w.
    """

    def __init__(self, weight: Tensor, moment: Tensor, *, width: int) -> None:
        lower, _ = next(damped_factors(moment.to(torch.float64, copy=True), damping=DAMPING, of="each"))
        self._inverse_II, self._gram_II = torch.cholesky_inverse(lower), weight.T @ weight
        self._inverses, self._grams = (
            _diagonal_blocks(each, width=width) for each in (self._inverse_II, self._gram_II)
        )
        self._u_nI = weight.new_zeros(_BLOCK + width, weight.shape[1])
        self._y_nI = torch.zeros_like(self._u_nI)
        self._gone, self._width = 0, width

    def removal_costs(self) -> Tensor:
        """tr(W_P [(C⁻¹)_PP]⁻¹ W_Pᵀ) of every block: [I / w]; of those that went, 0."""
        if self._width == 1:
            return (self._grams / self._inverses).flatten()
        lower, _ = torch.linalg.cholesky_ex(self._inverses)
        return torch.cholesky_solve(self._grams, lower).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, block: Tensor) -> None:
        """Take a block, an index [1] on the device, and refit the others."""
        width = self._width
        columns = block * width + torch.arange(width, device=block.device)
        u_nI, y_nI = self._u_nI[: self._gone], self._y_nI[: self._gone]
        of_gone = u_nI[:, columns].T, y_nI[:, columns].T
        inverse_wI = self._inverse_II[columns] - of_gone[0] @ u_nI
        gram_wI = self._gram_II[columns] - of_gone[0] @ y_nI - of_gone[1] @ u_nI
        lower, _ = torch.linalg.cholesky_ex(inverse_wI[:, columns])
        u_wI, v_wI = (torch.linalg.solve_triangular(lower, each, upper=False) for each in (inverse_wI, gram_wI))
        y_wI = v_wI - 0.5 * torch.linalg.solve_triangular(lower, v_wI[:, columns].T, upper=False) @ u_wI
        self._u_nI[self._gone : self._gone + width] = u_wI
        self._y_nI[self._gone : self._gone + width] = y_wI
        self._gone += width
        u, y = (each.view(width, -1, width).permute(1, 2, 0) for each in (u_wI, y_wI))
        self._inverses -= u @ u.mT
        self._grams -= u @ y.mT + y @ u.mT
        self._inverses[block] = torch.eye(width, dtype=u.dtype, device=u.device)
        self._grams[block] = 0.0
        if self._gone >= _BLOCK:
            self._update()

    def _update(self) -> None:
        u_nI, y_nI = self._u_nI[: self._gone], self._y_nI[: self._gone]
        self._inverse_II.addmm_(u_nI.T, u_nI, alpha=-1.0)
        self._gram_II.addmm_(u_nI.T, y_nI, alpha=-1.0).addmm_(y_nI.T, u_nI, alpha=-1.0)
        self._gone = 0


def _diagonal_blocks(matrix_II: Tensor, *, width: int) -> Tensor:
    """[I / w, w, w]."""
    blocks = matrix_II.shape[0] // width
    each = torch.arange(blocks, device=matrix_II.device)
    return matrix_II.view(blocks, width, blocks, width)[each, :, each, :]


class Reconstruction:
    """Heads, groups and intermediate units by `elimination_order`, where any go; the rest by `Activations`.

    Units of experts are among the rest: few of the text's tokens pass through each of them.

    A token counts by the inverse mean square of the residual stream after the write, which is what the next norm
    divides by; so attention sinks, a thousand times as large as anything else, count like other tokens. Where a norm
    with gain g stands between the write and the residual stream, it is g W whose output counts, and a token by the
    inverse mean square of what is written too: the norm's differential, but for its part along the output itself.

    See `Metric`. Layers are visited one after the other, with one layer's moments at a time. The target says how many
    units of a row go; without one, half of each row.
    """

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each layer."""
        del evidence
        return source.num_hidden_layers

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One forward pass over the text, its second moments, and an elimination in every layer."""
        goes, d = _units_that_go(source, target=evidence.target), source.hidden_size
        K, G, m = source.num_key_value_heads, source.query_heads_per_group, source.intermediate_size
        m = 0 if source.num_experts else m
        heads = K * G * source.head_dim
        flops = 2.0 * evidence.text_tokens * (heads**2 + m**2)
        for sublayer, inputs in zip(source.family.sublayers.values(), (heads, m), strict=True):
            flops += 2.0 * evidence.text_tokens * inputs * d if sublayer.after else 0.0
        columns = {"kv_groups": G * source.head_dim, "query_heads": K * source.head_dim, "intermediate": 1}
        for name, inputs in ((name, m if name == "intermediate" else heads) for name, count in goes.items() if count):
            # Inverse of the moment: n^3 for the factor and its use; the Gram matrix of the weights.
            flops += 2.0 * inputs**3 + 2.0 * inputs**2 * d
            # Each column that goes: one update of C^-1 and two of G, and as it is read, of half a block on average.
            flops += 6.0 * goes[name] * columns[name] * inputs * (inputs + _BLOCK / 2)
        return Cost(forward_tokens=evidence.text_tokens, other_flops=flops * source.num_hidden_layers)

    @torch.no_grad()
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `Reconstruction`."""
        evidence.require_text()
        source, family = Shape.of(model.config), anatomy_of(model)
        processes, layers = evidence.processes, decoder_layers(model)
        of_units = family.mlp.experts is None
        places = named_places(family, "attention write", "mlp norm", *(["mlp write"] if of_units else []))
        elimination = _Elimination(source, goes=_units_that_go(source, target=evidence.target))
        streams, calls = first_inputs(model, [share.inputs for share in evidence.own])
        waiting: _Layer | None = None
        with ActivationRecorder.listening(model) as recorder:
            for index, layer in enumerate(layers):
                heads = _statistics_for(weight_of(layer, family.attention.write))
                units = _statistics_for(weight_of(layer, family.mlp.write)) if of_units else None
                for batch, of_layers in enumerate(calls):
                    seen, after = run_layer(layer, layer, streams[batch], of_layers[index], places=places)
                    # Side by side, both are added to what the next norm reads.
                    written = after if family.parallel else seen["mlp norm"]
                    for sublayer, read, name, stream in (
                        (family.attention, heads, "attention write", written),
                        (family.mlp, units, "mlp write", after),
                    ):
                        if read is not None:
                            read.add(seen[name], weights=_token_weights(layer, sublayer, seen[name], stream=stream))
                    streams[batch] = after
                # What goes of one layer says nothing of the next: as many are solved at once as there are processes.
                turn = index % processes.size
                for statistics in (heads, units):
                    if statistics is not None:
                        statistics.combine(processes, rank=turn)
                if turn == processes.rank:
                    waiting = _Layer(index, layer, heads=heads, units=units)
                del heads, units
                if waiting is not None and (turn == processes.size - 1 or index == len(layers) - 1):
                    elimination.solve(waiting, family=family)
                    waiting = None
                advance(1)
        return {**recorder.scores(source, processes=processes), **elimination.scores(processes)}


@dataclass(frozen=True)
class _Layer:
    """A layer and what its writes read, of all processes."""

    index: int
    module: nn.Module
    heads: InputStatistics
    units: InputStatistics | None


class _Elimination:
    """Orders of elimination, layer by layer.

    Args:
        source: shape of the model.
        goes: units of a row that are removed, by granularity.
    """

    def __init__(self, source: Shape, *, goes: Mapping[str, int]) -> None:
        K, G, m = source.num_key_value_heads, source.query_heads_per_group, source.intermediate_size
        self._goes = {name: count for name, count in goes.items() if count}
        self._rows = {"kv_groups": (1, K), "query_heads": (K, G), "intermediate": (1, m)}
        self._orders = {name: torch.zeros(unit_sizes(source)[name]) for name in self._goes}

    def solve(self, layer: _Layer, *, family: Family) -> None:
        """Find out in which order the units of a layer go."""
        with weights_here(layer.module):
            for name, order in self._orders.items():
                of_mlp = name == "intermediate"
                sublayer, read = (family.mlp, layer.units) if of_mlp else (family.attention, layer.heads)
                assert read is not None
                rows, count = self._rows[name]
                write = _added_write(layer.module, sublayer)
                found = elimination_order(write, read.token_moment, rows=rows, units=count, remove=self._goes[name])
                order[layer.index] = found.cpu().view(order[layer.index].shape)

    def scores(self, processes: Processes) -> Scores:
        """What all processes have found."""
        return {name: processes.sum(order) for name, order in self._orders.items()}


def _added_write(layer: nn.Module, sublayer: SubLayer) -> Tensor:
    """Weight of a sub-layer's write, its rows times the gain of the norm behind it."""
    weight = weight_of(layer, sublayer.write)
    if sublayer.after is None:
        return weight
    return weight * (sublayer.after.kind.offset + weight_of(layer, sublayer.after.name))[:, None]


def _token_weights(layer: nn.Module, sublayer: SubLayer, x: Tensor, *, stream: Tensor) -> Tensor:
    """How much tokens [B, S] count, from what the write reads and the stream behind it."""
    weights = token_weights(stream)
    if sublayer.after is None:
        return weights
    return weights * token_weights(layer.get_submodule(sublayer.write)(x))


def _units_that_go(source: Shape, *, target: Shape | None) -> dict[str, int]:
    """Units of a row that are removed, by granularity."""
    K, G, m = source.num_key_value_heads, source.query_heads_per_group, source.intermediate_size
    if target is None:
        goes = {"kv_groups": K // 2, "query_heads": G // 2, "intermediate": m // 2}
    else:
        goes = {
            "kv_groups": K - target.num_key_value_heads,
            "query_heads": G - target.query_heads_per_group,
            "intermediate": m - target.intermediate_size,
        }
    return {**goes, "intermediate": 0} if source.num_experts else goes


def _statistics_for(weight: Tensor) -> InputStatistics:
    return InputStatistics(weight.shape[1], needs=frozenset({"moment"}), device=weight.device, dtype=torch.float64)


def token_weights(stream: Tensor) -> Tensor:
    """Inverse mean square of each token of a residual stream [B, S, d]: [B, S]."""
    return stream.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
