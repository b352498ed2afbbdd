"""Masks are driven by any training loop: a plain one gives what ours gives, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shearing.errors import ShearingError
from shearing.models.loading import load_source
from shearing.models.shape import Shape
from shearing.pruning.structured.masking import Masking
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.training.loop import train
from tests.repository import ROOT
from tests.training import tasks


def _plain_loop(inputs: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mask learning as in a notebook; weights, masks and log_alpha."""
    objective, masking = tasks.masked_objective(inputs)
    mixture = tasks.mixture_of(inputs)
    matrices = [p for p in objective.parameters() if p.ndim >= 2]
    vectors = [p for p in objective.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": tasks.DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=tasks.RATE,
        betas=tasks.BETAS,
        eps=tasks.EPSILON,
        fused=True,
    )
    objective.train()
    for step in range(tasks.STEPS):
        batch = mixture.batch(first_sample=step * tasks.SEQUENCES, num_sequences=tasks.SEQUENCES)
        for sequence in range(0, tasks.SEQUENCES, tasks.MICRO_BATCH):
            masking.draw(step=step, sequence=sequence, of=tasks.SEQUENCES)
            total = objective(batch.tokens[sequence : sequence + tasks.MICRO_BATCH]).total
            (total / (tasks.SEQUENCES * tasks.LENGTH)).backward()
        masking.after_backward(step=step, scale=1.0)
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), tasks.CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        masking.update(step=step, skip=~norm.isfinite())
    weights = {name: parameter.detach() for name, parameter in objective.named_parameters()}
    return weights, masking.learner.final_masks().tensors(), masking.state_dict()["log_alpha"]


def test_a_plain_loop_ends_where_ours_does(tiny_inputs: Path, tmp_path: Path) -> None:
    task = tasks.tiny_task(tiny_inputs, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in task.objective.named_parameters()}
    assert task.masking is not None
    start = {name: value.clone() for name, value in task.masking.state_dict()["log_alpha"].items()}
    train(task, console=Console(file=io.StringIO()))
    weights, masks, log_alpha = _plain_loop(tiny_inputs)
    ours = dict(task.objective.named_parameters())
    assert ours.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(ours[name], weight), name
        assert not torch.equal(before[name], weight), name
    learned = task.masking.state_dict()
    assert learned["log_alpha"].keys() == log_alpha.keys() == {"layers", "query_heads", "intermediate", "hidden"}
    for name, value in log_alpha.items():
        assert torch.equal(learned["log_alpha"][name], value), name
        assert not torch.equal(start[name], value), name
    assert learned["frozen"].keys() == log_alpha.keys()
    assert masks["hidden"].sum() == 16
    for name, mask in learned["frozen"].items():
        of_model = masks["attention" if name == "layers" else name]
        assert torch.equal(mask.reshape(of_model.shape), of_model), name


@pytest.mark.parametrize(("estimator", "moves"), [("hard_concrete", "log_alpha"), ("straight_through", "votes")])
def test_gradients_of_masks_that_are_not_finite_skip_the_step(estimator: str, moves: str, tiny_inputs: Path) -> None:
    """Whatever the weights' step did; the first step is a good one, so that there is something to lose."""
    objective, masking = tasks.masked_objective(tiny_inputs, estimator=estimator)
    batch = tasks.mixture_of(tiny_inputs).batch(first_sample=0, num_sequences=2)
    states = [copy.deepcopy(masking.state_dict())]
    for spoilt in (False, True):
        masking.draw(step=1, of=tasks.SEQUENCES)
        objective(batch.tokens).total.backward()
        masking.after_backward(step=1)
        gradient = masking.learner.log_alpha["hidden"].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        if spoilt:
            gradient.flatten()[0] = float("nan")
        assert bool(masking.update(step=1)) is spoilt
        states.append(copy.deepcopy(masking.state_dict()))
    start, before, after = states
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for name, value in before[moves].items():
        assert not torch.equal(value, start[moves][name]), name


@pytest.mark.parametrize("way", ["staged", "gradual"])
def test_ways_that_learn_no_masks_are_refused_and_named(way: str, tiny_inputs: Path) -> None:
    model = load_source(str(tiny_inputs / "model"), device=tasks.CPU, dtype=torch.float32)
    stage = PruneRecipe.model_validate({"duration": "6 steps", "batch_size": "2 sequences", "masks": way})
    target = dataclasses.replace(Shape.of(model.config), hidden_size=16)
    with pytest.raises(ShearingError, match=rf"{way.title()}Removal\(MaskedModel\(model\)") as raised:
        Masking.of(model, stage, target=target, tokens_per_step=32)
    assert raised.value.field == "masks"


def test_shares_that_micro_batches_do_not_fit_are_refused(tiny_inputs: Path) -> None:
    _, masking = tasks.masked_objective(tiny_inputs)
    assert masking.draws == 2
    with pytest.raises(ShearingError, match=r"which is said to have 1 \(`of`\)"):
        masking.draw(step=0)
    masking.require_shares(sequences=4, micro_batch_size=2)
    for sequences, size in ((3, 1), (4, 4), (12, 4)):
        with pytest.raises(ShearingError, match=f"micro-batch of {size}"):
            masking.require_shares(sequences=sequences, micro_batch_size=size)
    dataclasses.replace(masking, draws=1).require_shares(sequences=3, micro_batch_size=2)


def test_a_loop_that_ends_early_settles_on_what_is_cut(tiny_inputs: Path) -> None:
    objective, masking = tasks.masked_objective(tiny_inputs)
    batch = tasks.mixture_of(tiny_inputs).batch(first_sample=0, num_sequences=2)
    losses = []
    for step in (1, None):
        masking.settle(step=step)
        losses.append(objective(batch.tokens).total.detach())
    labels = batch.tokens[:, 1:].numel()
    cut = masking.cut()(input_ids=batch.tokens, labels=batch.tokens).loss.detach() * labels
    assert abs(losses[0] - cut) > 1e-2
    torch.testing.assert_close(losses[1], cut)
    with pytest.raises(ShearingError, match="taken off"):
        masking.draw(step=0, of=2)
    with pytest.raises(ShearingError, match="taken off"):
        masking.settle()


def test_the_loop_that_the_documents_show(tiny_inputs: Path) -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [shown] = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "def prune(" in block]
    names: dict[str, Any] = {}
    exec(shown, names)
    model = load_source(str(tiny_inputs / "model"), device=tasks.CPU, dtype=torch.float32)
    target = dataclasses.replace(
        Shape.of(model.config), num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2
    )
    stage = PruneRecipe.model_validate({"duration": "6 steps", "batch_size": "2 sequences", "freeze": "2 steps"})
    small = names["prune"](model, mixture=tasks.mixture_of(tiny_inputs), target=target, stage=stage)
    assert Shape.of(small.config) == target
