"""Importance by reconstruction: what the other units of a layer could not make up for.

Legend: T tokens, O outputs and I inputs of a linear layer; B sequences, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.families import Family
from shearing.models.shape import Shape
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
    lower, _ = next(damped_factors(moment.to(torch.float64, copy=True), damping=DAMPING, of="each"))
    weight, inverse = weight.double(), torch.cholesky_inverse(lower)
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


class Reconstruction:
    """Heads, groups and intermediate units by `elimination_order`, where any go; the rest by `Activations`.

    A token counts by the inverse mean square of the residual stream after the write, which is what the next norm
    divides by; so attention sinks, a thousand times as large as anything else, count like other tokens.

    See `Metric`. Layers are visited one after the other, with one layer's moments at a time. The target says how many
    units of a row go; without one, half of each row.

    Both methods raise `ShearingError` for a family whose sub-layers have a norm after their write: the residual stream
    has not what they write in it, but that normalised.
    """

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each layer."""
        del evidence
        _require_added_writes(source.family)
        return source.num_hidden_layers

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One forward pass over the text, its second moments, and an elimination in every layer."""
        goes, d = _units_that_go(source, target=evidence.target), source.hidden_size
        K, G, m = source.num_key_value_heads, source.query_heads_per_group, source.intermediate_size
        heads = K * G * source.head_dim
        flops = 2.0 * evidence.text_tokens * (heads**2 + m**2)
        # Inverse of the moment: n^3 for the factor and its use; each column that goes: an update of C^-1 and of W.
        flops += 2.0 * (heads**3 + m**3)
        for name, inputs in (("kv_groups", G * source.head_dim), ("query_heads", K * source.head_dim)):
            flops += 2.0 * goes[name] * inputs * heads * (heads + d)
        flops += 2.0 * goes["intermediate"] * m * (m + d)
        return Cost(forward_tokens=evidence.text_tokens, other_flops=flops * source.num_hidden_layers)

    @torch.no_grad()
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `Reconstruction`."""
        source, family = Shape.of(model.config), anatomy_of(model)
        _require_added_writes(family)
        K, G, m = source.num_key_value_heads, source.query_heads_per_group, source.intermediate_size
        goes = _units_that_go(source, target=evidence.target)
        rows_of = {"kv_groups": (1, K), "query_heads": (K, G), "intermediate": (1, m)}
        orders: dict[str, list[Tensor]] = {name: [] for name, count in goes.items() if count}
        places = named_places(family, "attention write", "mlp norm", "mlp write")
        streams, calls = first_inputs(model, evidence.text)
        with ActivationRecorder.listening(model) as recorder:
            for index, layer in enumerate(decoder_layers(model)):
                writes = weight_of(layer, family.attention.write), weight_of(layer, family.mlp.write)
                heads, units = (_statistics_for(write) for write in writes)
                for batch, of_layers in enumerate(calls):
                    seen, after = run_layer(layer, layer, streams[batch], of_layers[index], places=places)
                    heads.add(seen["attention write"], weights=token_weights(seen["mlp norm"]))
                    units.add(seen["mlp write"], weights=token_weights(after))
                    streams[batch] = after
                for name, earlier in orders.items():
                    weight, read = (writes[1], units) if name == "intermediate" else (writes[0], heads)
                    rows, count = rows_of[name]
                    at_once = max(1, goes[name] // _ROUNDS)
                    order = elimination_order(
                        weight, read.token_moment, rows=rows, units=count, remove=goes[name], at_once=at_once
                    )
                    earlier.append(order.cpu())
                advance(1)
        sizes = unit_sizes(source)
        eliminated = {name: torch.stack(of_layers).view(sizes[name]) for name, of_layers in orders.items()}
        return {**recorder.scores(source), **eliminated}


def _require_added_writes(family: Family) -> None:
    if not all(sublayer.adds_its_write for sublayer in family.sublayers.values()):
        raise ShearingError(
            "source (architecture)",
            value=family.model_type,
            allowed="for importance by reconstruction, a family whose sub-layers add what they write to the residual "
            "stream as it is, without a norm in between",
            mend=f"choose another {key('initial_masks')}, as activations",
        )


def _units_that_go(source: Shape, *, target: Shape | None) -> dict[str, int]:
    """Units of a row that are removed, by granularity."""
    K, G, m = source.num_key_value_heads, source.query_heads_per_group, source.intermediate_size
    if target is None:
        return {"kv_groups": K // 2, "query_heads": G // 2, "intermediate": m // 2}
    return {
        "kv_groups": K - target.num_key_value_heads,
        "query_heads": G - target.query_heads_per_group,
        "intermediate": m - target.intermediate_size,
    }


def _statistics_for(weight: Tensor) -> InputStatistics:
    return InputStatistics(weight.shape[1], needs=frozenset({"moment"}), device=weight.device, dtype=torch.float64)


def token_weights(stream: Tensor) -> Tensor:
    """Inverse mean square of each token of a residual stream [B, S, d]: [B, S]."""
    return stream.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
