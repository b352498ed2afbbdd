"""Importance by gates under a hard budget: at each step exactly as many units of a row are open as the target keeps.

Legend: g gates, p their openness; sg() is no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.models.anatomy import head_weight
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_here
from shearing.processes.processes import Processes
from shearing.pruning.structured.granularities import Granularity
from shearing.pruning.structured.importance.learned.masked_loss import frozen, steps_for
from shearing.pruning.structured.importance.learned.rows import ranks, searched
from shearing.pruning.structured.importance.learned.start import Start
from shearing.pruning.structured.importance.metric import Cost, Evidence, Scores
from shearing.pruning.structured.importance.text_loss import finite
from shearing.pruning.structured.rounding import top_k

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEMPERATURE = 1.5
_RATE = 1e-2
_BETAS = (0.9, 0.99)
_TIE = 1e-4
_DOUBT = 0.3
"""Share of what a gate can travel in all steps by which the best and the worst of a graded row begin away from 0. At 1
a wrong start was hardly mended in tests; 0.1 and 0.3 mended it alike."""


class HardBudget:
    """Gates of all units that the target takes from, learned on the language loss with frozen weights (GRASPrune).

    p = sigmoid(g / 1.5), and a mask z = top-k(p) + p - sg(p): what is computed is the model at exactly the target
    shape, what is learned sees every unit. An expert that is closed is sent no token, so nothing would be learned of
    it: models with experts are refused. AdamW, rate 0.01, betas 0.9 and 0.99, no weight decay; one step for every
    `STEP_SEQUENCES` sequences (4). Published is one ranking of KV groups and MLP units over all layers, as the budget
    is one of parameters; here each row keeps the target's number of units, and layers, query heads and hidden
    dimensions have gates too. The scales that GRASPrune learns afterwards and folds into weights are left out: this
    chooses units and changes no weight. Scores of what the target leaves whole, and of sub-layers, are those of
    `start`. See `Metric`.

    Args:
        epochs: how often the text is gone through (published: 4, of 512 sequences of 512 tokens, one a step).
        start: name of a metric, see `graded`.
        graded: gates begin in the order of `start`, evenly over a part of what these steps can move them. Otherwise all
            are equal, as published; which of them are open at the first step is then chance, by the seed.
    """

    def __init__(self, *, epochs: int = 4, start: str = "activations", graded: bool = False) -> None:
        self._epochs, self._start, self._graded = epochs, Start(start), graded

    def units_of_work(self, source: Shape, *, evidence: Evidence) -> int:
        """One for each step, and those of `start`.

        Raises:
            ShearingError: the MLPs are made of experts.
        """
        if source.num_experts:
            raise ShearingError(
                "initial_masks",
                value=f"a metric of gates that are open or closed, as hard_budget, for {source.family.model_type}",
                allowed="models whose MLPs are not made of experts: one that is closed is sent no token to learn from",
                mend="choose another metric, as activations",
            )
        before = self._start.units_of_work(source, evidence=evidence)
        return before + self._epochs * len(evidence.steps)

    def cost(self, source: Shape, *, evidence: Evidence) -> Cost:
        """The text forward and backward in each epoch, as in training, and what `start` costs."""
        tokens = self._epochs * evidence.text_tokens
        return self._start.cost(source, evidence=evidence, forward_tokens=tokens, backward_tokens=tokens)

    def scores(
        self, model: PreTrainedModel, *, evidence: Evidence, advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """See `HardBudget`."""
        self.units_of_work(Shape.of(model.config), evidence=evidence)
        start = self._start.scores(model, evidence=evidence, advance=advance)
        granularities = searched(Shape.of(model.config), target=evidence.target)
        device = head_weight(model).device
        text, processes = steps_for(evidence), evidence.processes
        steps = self._epochs * len(text)
        generator = torch.Generator().manual_seed(evidence.seed)
        gates = {}
        for g in granularities:
            values = _TIE * torch.randn(g.size, generator=generator)
            if self._graded:
                values = graded_gates(start[g.name], spread=_DOUBT * _RATE * steps)
            gates[g.name] = nn.Parameter(values.to(device))
        # A target that takes nothing has no gates, and no optimiser wants none.
        groups = [{"params": list(gates.values())}]
        optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS, weight_decay=0.0) if gates else None
        # A step goes back through all layers: their weights are there together.
        with weights_here(model), frozen(model) as loss_of, torch.enable_grad():
            for step in range(steps):
                here, total = text[step % len(text)], torch.zeros((), dtype=torch.float64)
                for piece in here.own:
                    z = {g.name: straight_through(gates[g.name], granularity=g) for g in granularities}
                    loss = loss_of(z, piece) / here.labels
                    total += float(loss.detach())
                    if optimizer is not None:
                        loss.backward()
                finite(float(processes.sum(total)), metric="hard_budget")
                if optimizer is not None:
                    _add_gradients(gates.values(), processes=processes)
                    optimizer.step()
                    optimizer.zero_grad()
                advance(1)
        return {**start, **{name: values.detach().float().cpu() for name, values in gates.items()}}


def _add_gradients(gates: Iterable[nn.Parameter], *, processes: Processes) -> None:
    """Gradients of all processes, alike on each."""
    for gate in gates:
        if gate.grad is None and processes.size > 1:
            gate.grad = torch.zeros_like(gate)
        if gate.grad is not None:
            gate.grad = processes.sum(gate.grad)


def straight_through(gates: Tensor, *, granularity: Granularity) -> Tensor:
    """Masks whose values are those of the units that stay, and whose gradients are those of the gates' openness."""
    assert granularity.target is not None
    openness = torch.sigmoid(gates / _TEMPERATURE)
    return top_k(gates, keep=granularity.target) + (openness - openness.detach())


def graded_gates(scores: Tensor, *, spread: float) -> Tensor:
    """Gates in the order of the scores, evenly from `spread` below 0 to `spread` above it."""
    units = scores.shape[-1]
    return spread * (2 * (ranks(scores) + 0.5) / units - 1)
