"""Statistics of what the writes of every layer read: the inputs of `o_proj` and `down_proj`, from one forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.models.stored.paging.passing import last_states
from shearing.processes.processes import Processes
from shearing.pruning.calibration.places import weight_of
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def write_inputs(
    model: PreTrainedModel,
    text: Sequence[Inputs],
    *,
    needs: frozenset[Need],
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
) -> dict[str, list[InputStatistics]]:
    """Statistics of the inputs of the writes of the dense model, for `attention` and `mlp` layer by layer; fp64 sums.

    Args:
        model: plain model.
        text: what this process has it read.
        needs: which statistics.
        advance: called with 1 after every batch.
        processes: whose statistics are added up; this one's alone if None.
    """
    family = anatomy_of(model)
    found: dict[str, list[InputStatistics]] = {kind: [] for kind in family.sublayers}
    handles = []
    for layer in decoder_layers(model):
        for kind, sublayer in family.sublayers.items():
            weight = weight_of(layer, sublayer.write)
            statistics = InputStatistics(weight.shape[1], needs=needs, device=weight.device, dtype=torch.float64)
            found[kind].append(statistics)
            write = layer.get_submodule(sublayer.write)
            handles.append(write.register_forward_pre_hook(partial(_add, statistics)))
    try:
        for _ in last_states(model, (batch.keywords() for batch in text)):
            advance(1)
    finally:
        for handle in handles:
            handle.remove()
    for of_layers in found.values():
        for statistics in of_layers:
            statistics.combine(processes or Processes())
    return found


def _add(statistics: InputStatistics, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
    statistics.add(arguments[0])


class WriteInputMetric(ABC):
    """Scores heads, groups and intermediate units by a number for every input of the writes; see `Metric`.

    Args:
        needs: statistics that the numbers are made of.
    """

    def __init__(self, *, needs: frozenset[Need]) -> None:
        self._needs = needs

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One pass for each batch of the text.

        Raises:
            ShearingError: the MLPs are made of experts, which have no one write.
        """
        if source.num_experts:
            raise ShearingError(
                "initial_masks",
                value=f"a metric of what writes read, as wanda, for {source.family.model_type}",
                allowed="models whose MLPs are not made of experts",
                mend="choose another metric, as activations",
            )
        return len(evidence.own)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """One forward pass over the text."""
        del source
        return Cost(forward_tokens=evidence.text_tokens)

    @torch.no_grad()
    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """A head's score is the mean over its channels, a group's the mean over its heads."""
        evidence.require_text()
        source, family = Shape.of(model.config), anatomy_of(model)
        text = [share.inputs for share in evidence.own]
        found = write_inputs(model, text, needs=self._needs, advance=advance, processes=evidence.processes)
        numbers: dict[str, list[Tensor]] = {kind: [] for kind in family.sublayers}
        for index, layer in enumerate(decoder_layers(model)):
            with weights_here(layer):
                for kind, sublayer in family.sublayers.items():
                    weight = weight_of(layer, sublayer.write).double()
                    numbers[kind].append(self.of_inputs(weight, found[kind][index], kind=kind).cpu())
        of_kind = {kind: torch.stack(of_layers) for kind, of_layers in numbers.items()}
        K, G, dh = source.num_key_value_heads, source.query_heads_per_group, source.head_dim
        heads = of_kind["attention"].view(-1, K, G, dh).mean(-1)
        return {
            "kv_groups": heads.mean(-1).float(),
            "query_heads": heads.float(),
            "intermediate": of_kind["mlp"].float(),
        }

    @abstractmethod
    def of_inputs(self, weight: Tensor, statistics: InputStatistics, *, kind: str) -> Tensor:
        """A number for each input [I] of a write.

        Args:
            weight: [O, I], fp64.
            statistics: of its inputs.
            kind: attention or mlp.
        """
