"""What a stage hands to its objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shearing.objectives.registry import OBJECTIVES
from shearing.runs.context import RunContext
from shearing.runs.recipe import load_recipe
from shearing.runs.stages.source_model import load_whole_or_skeleton
from shearing.runs.stages.training_task import task_of
from tests.objectives.teacher import TeachersLoss


@pytest.mark.parametrize("attention", ["full", "documents"])
def test_a_teacher_is_the_source_and_attends_as_the_model_does(
    attention: str, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "language_model", "tests.objectives.teacher:TeachersLoss")
    recipe = load_recipe(tiny_recipe, overrides=[f"data.attention={attention}"])
    context = RunContext(recipe)
    model, source = (
        load_whole_or_skeleton(context, source=recipe.model.source, revision=None, whole=True) for _ in range(2)
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    mixture = context.initial_mixture()
    objective = task_of(context, stage="prune", model=model, mixture=mixture, masking=None, reference={}).objective
    assert isinstance(objective, TeachersLoss)
    kernels = {each.config._attn_implementation for each in (model, objective.teacher)}
    assert kernels == {"documents_sdpa" if attention == "documents" else "causal_sdpa"}
    for found, weight in zip(objective.teacher.parameters(), source.parameters(), strict=True):
        assert torch.equal(found, weight)
