"""Which layers a step trains, and how what they are worth is learned."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from shearing.models.loading import load_source
from shearing.objectives.language_model import LanguageModelLoss
from shearing.training.adapters.layers import LayerAdapters, adapters_by_layer
from shearing.training.adapters.spp import add_factors
from shearing.training.callbacks.layer_choice import LayerChoice, LayerChoiceSettings
from shearing.training.loop import train
from shearing.training.stage import HeldOut
from shearing.training.task import Callback, Run, StepResult, Task
from tests.training.tasks import CPU, STEPS, tiny_task

SETTINGS = LayerChoiceSettings(layers=1, interval=3, pairs=2, strength=0.25, rate=10.0, seed=7)


def adapted_task(inputs: Path, folder: Path, *, text: HeldOut) -> tuple[Task, LayerChoice, list[LayerAdapters]]:
    torch.manual_seed(0)
    model = load_source(str(inputs / "model"), device=CPU, dtype=torch.float32)
    add_factors(model, rank=4, targets=("q_proj", "down_proj"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "spp_outputs" in name:
                parameter.fill_(0.1)
    layers = adapters_by_layer(model)
    choice = LayerChoice(layers, settings=SETTINGS, text=text)
    task = tiny_task(inputs, folder)
    objective = LanguageModelLoss(model, chunk_tokens=32)
    return dataclasses.replace(task, objective=objective, masking=None, callbacks=(choice,)), choice, layers


def nothing_to_read() -> HeldOut:
    return HeldOut(tokens=1, measure=lambda _forward, _advance: {"letters": 1.0})


class Watch(Callback):
    """Remembers which layers each step has changed."""

    def __init__(self, layers: list[LayerAdapters], engine: Any) -> None:
        self.changed: list[list[int]] = []
        self._layers, self._engine = layers, engine

    def _state(self, layer: LayerAdapters) -> list[Tensor]:
        moments = [self._engine._optimizer.state[each] for each in layer.parameters]
        kinds = ("exp_avg", "exp_avg_sq")
        return [each.detach().clone() for each in layer.parameters] + [of[k].clone() for of in moments for k in kinds]

    @override
    def before_step(self, run: Run) -> None:
        self._before = [self._state(layer) for layer in self._layers]

    @override
    def after_step(self, run: Run, result: StepResult) -> None:
        after = [self._state(layer) for layer in self._layers]
        same = [all(map(torch.equal, a, b)) for a, b in zip(self._before, after, strict=True)]
        self.changed.append([index for index, each in enumerate(same) if not each])


def test_a_step_changes_the_layers_that_were_drawn_and_no_others(tiny_inputs: Path, tmp_path: Path) -> None:
    task, choice, layers = adapted_task(tiny_inputs, tmp_path, text=nothing_to_read())
    watch = Watch(layers, task.engine)
    train(dataclasses.replace(task, callbacks=(choice, watch)), console=Console(quiet=True))
    # Nothing is worth anything where the text does not tell: what is drawn depends on the step alone.
    assert watch.changed == [choice.drawn(step) for step in range(STEPS)]
    assert len({tuple(each) for each in watch.changed}) > 1
    assert all(len(each) == 1 for each in watch.changed)


def test_layers_whose_weakening_costs_more_are_drawn_more_often(tiny_inputs: Path, tmp_path: Path) -> None:
    layers: list[LayerAdapters] = []

    def measure(_forward: Callable[..., Tensor], _advance: Callable[[int], None]) -> dict[str, float]:
        weak = [index for index, layer in enumerate(layers) if layer.modules[0].strength != 1.0]
        assert len(weak) == 2
        assert all(layers[index].modules[0].strength == SETTINGS.strength for index in weak)
        return {"letters": 1.0 + 0.25 * (2 in weak), "digits": 1.0}

    task, choice, found = adapted_task(tiny_inputs, tmp_path, text=HeldOut(tokens=1, measure=measure))
    layers += found
    train(task, console=Console(quiet=True))
    importance = choice.state_dict()["importance"]
    # Two looks (steps 3 and 6): in every pair the half with layer 2 costs 0.25 in one of two domains.
    assert importance[2] == pytest.approx(2 * 10.0 * 0.125)
    for index in (0, 1, 3):
        assert -2.5 <= float(importance[index]) < 2.5
    drawn = Counter(layer for step in range(400) for layer in choice.drawn(step))
    expected = importance.softmax(0)
    for index in range(4):
        assert drawn[index] / 400 == pytest.approx(float(expected[index]), abs=0.07)
    assert all(layer.modules[0].strength == 1.0 for layer in layers)


def test_parameters_rest_and_the_clock_goes_on() -> None:
    from shearing.training.engines.torch_engine import TorchEngine
    from tests.training.engines.test_kept_zeros import OPTIMIZATION

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    engine = TorchEngine(OPTIMIZATION, device=CPU, precision=torch.float32)
    engine.prepare(model)
    for step in range(4):
        model[0].requires_grad_(step % 2 == 0)
        engine.backward(model(torch.ones(2, 3)).square().sum(), last=True)
        engine.step(step=step)
    counts = {float(state["step"]) for state in engine._optimizer.state.values()}
    assert counts == {4.0}
