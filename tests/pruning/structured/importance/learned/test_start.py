"""What masks that are tried begin with."""

from __future__ import annotations

import torch

from shearing.data.documents import Inputs
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.learned.start import Start
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import EVERYTHING, metric_of
from tests.models.tiny import tiny_ids, tiny_model


def test_what_a_metric_does_not_give_activations_do() -> None:
    model = tiny_model()
    source, evidence = Shape.of(model.config), Evidence(text=[Inputs(tiny_ids())])
    calls: list[int] = []
    scores = Start("wanda").scores(model, evidence=evidence, advance=calls.append)
    wanda, activations = (metric_of(name).scores(model, evidence=evidence) for name in ("wanda", "activations"))
    assert scores.keys() == EVERYTHING - {"experts"}
    for name, values in scores.items():
        assert torch.equal(values, wanda.get(name, activations[name]))
    assert len(calls) == Start("wanda").units_of_work(source, evidence=evidence)
    whole, alone = Start("activations"), metric_of("activations")
    assert whole.units_of_work(source, evidence=evidence) == alone.units_of_work(source, evidence=evidence)
    assert whole.cost(source, evidence=evidence, forward_tokens=7.0).forward_tokens == 7 + evidence.text_tokens
