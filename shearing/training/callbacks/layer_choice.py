"""Adapters of some layers are trained in a step, important ones more often (IST, arXiv 2410.11772, reconstructed).

The paper's exact update was not available; of it is known: every step updates a drawn subset of layers, and a second
loop estimates what each is worth by weakening what its adapters do and looking at the loss. Ours:

- a step trains k layers, drawn without replacement with chances softmax(importance); others have no gradient, and stay;
- a look weakens the adapters of half of the layers, drawn by chance, then those of the other half, so many times over;
  importance += rate * (mean loss with a layer weakened - mean loss with it whole).

Draws are functions of the seed and the step, importance is in checkpoints: a run that is continued is the same.

Shapes: L layers that have adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from shearing.training.adapters.layers import LayerAdapters, weakened
from shearing.training.callbacks.heldout_at_end import measure_held_out
from shearing.training.stage import HeldOut
from shearing.training.task import Callback, Run, StepResult

_OF_STEPS, _OF_LOOKS = 0, 1


@dataclass(frozen=True, kw_only=True)
class LayerChoiceSettings:
    """How layers are chosen.

    Attributes:
        layers: k, at most; fewer where fewer have adapters.
        interval: steps between two looks.
        pairs: of forward passes of a look.
        strength: of weakened adapters.
        rate: of the importance, per nat.
        seed: of all draws.
    """

    layers: int
    interval: int
    pairs: int
    strength: float
    rate: float
    seed: int


class LayerChoice(Callback):
    """Chooses the layers that each step trains.

    Args:
        adapters: by layer.
        settings: how.
        text: that looks read.
    """

    def __init__(self, adapters: Sequence[LayerAdapters], *, settings: LayerChoiceSettings, text: HeldOut) -> None:
        self._adapters, self._settings, self._text = adapters, settings, text
        self._importance_L = torch.zeros(len(adapters), dtype=torch.float64)

    @override
    def before_step(self, run: Run) -> None:
        """Let the layers of this step be trained, and no others."""
        chosen = set(self.drawn(run.step))
        for index, layer in enumerate(self._adapters):
            layer.train(index in chosen)

    def drawn(self, step: int) -> list[int]:
        """Which of the layers with adapters the step after `step` trains, with chances softmax(importance)."""
        # The largest of logits plus Gumbel noise are a draw without replacement.
        uniform_L = torch.rand(len(self._adapters), generator=self._generator(_OF_STEPS, step), dtype=torch.float64)
        gumbel_L = -(-uniform_L.clamp(min=1e-300).log()).log()
        count = min(self._settings.layers, len(self._adapters))
        return sorted((self._importance_L + gumbel_L).topk(count).indices.tolist())

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        """Look at what layers are worth, if it is due, and the stage still chooses by it; a longer one would."""
        due = run.step % self._settings.interval == 0
        self.left_out = due and run.ends
        if not due or self.left_out:
            return
        run.report()
        self._importance_L += self._settings.rate * self._worth(run)
        values = self._importance_L.tolist()
        importance = {str(each.layer): value for each, value in zip(self._adapters, values, strict=True)}
        run.log({"step": run.step, "event": "layers", "importance": importance})

    def _worth(self, run: Run) -> Tensor:
        """What weakening each layer's adapters costs, in nats."""
        size, generator = len(self._adapters), self._generator(_OF_LOOKS, run.step)
        worth_L = torch.zeros(size, dtype=torch.float64)
        if size == 1:
            return worth_L
        for _ in range(self._settings.pairs):
            order = torch.randperm(size, generator=generator).tolist()
            halves = order[: size // 2], order[size // 2 :]
            losses = [self._loss(run, half) for half in halves]
            for half, loss, other in zip(halves, losses, reversed(losses), strict=True):
                worth_L[half] += (loss - other) / self._settings.pairs
        return worth_L

    def _loss(self, run: Run, half: Sequence[int]) -> float:
        with weakened([self._adapters[index] for index in half], strength=self._settings.strength):
            losses = measure_held_out(run, self._text, name="what layers are worth")
        return sum(losses.values()) / len(losses)

    def _generator(self, kind: int, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self._settings.seed << 32) + 2 * step + kind) % (1 << 63))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Importance of each layer."""
        return {"importance": self._importance_L.clone()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._importance_L = state["importance"].double()
