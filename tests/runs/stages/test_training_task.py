"""What a stage hands to its objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shearing.objectives.distillation import Distillation
from shearing.objectives.teacher import OnlineTeacher
from shearing.runs.context import RunContext
from shearing.runs.recipe import load_recipe
from shearing.runs.stages.source_model import load_source_model
from shearing.runs.stages.training_task import task_of


@pytest.mark.parametrize("attention", ["full", "documents"])
def test_a_teacher_is_the_source_and_attends_as_the_model_does(
    attention: str, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[OnlineTeacher] = []
    begin = OnlineTeacher.__init__

    def noted(self: OnlineTeacher, *arguments: Any, **keywords: Any) -> None:
        begin(self, *arguments, **keywords)
        held.append(self)

    monkeypatch.setattr(OnlineTeacher, "__init__", noted)
    recipe = load_recipe(tiny_recipe, overrides=[f"data.attention={attention}", "distill={precision: fp32}"])
    context = RunContext(recipe)
    model, source = load_source_model(context), load_source_model(context)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    mixture = context.initial_mixture()
    objective = task_of(context, stage="prune", model=model, mixture=mixture, masking=None, reference={}).objective
    assert isinstance(objective, Distillation)
    (teacher,) = (each.model for each in held)
    kernels = {each.config._attn_implementation for each in (model, teacher)}
    assert kernels == {"documents_sdpa" if attention == "documents" else "causal_sdpa"}
    for found, weight in zip(teacher.parameters(), source.parameters(), strict=True):
        assert torch.equal(found, weight)
