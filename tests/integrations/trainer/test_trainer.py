"""Hugging Face's `Trainer` gives what our loop gives, and continues what was stopped."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments

from shearing import ShearingError
from shearing.data import DocumentRules, Mixture
from shearing.integrations.trainer import LearnMasks, MixtureRows
from shearing.training.loop import train
from tests.training import tasks


def _trainer(
    inputs: Path, folder: Path, *, estimator: str = "hard_concrete", **settings: Any
) -> tuple[Trainer, LearnMasks]:
    """Mask learning as in `tasks.tiny_task`."""
    objective, masking = tasks.masked_objective(inputs, estimator=estimator)
    model = objective.model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": tasks.DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=tasks.RATE,
        betas=tasks.BETAS,
        eps=tasks.EPSILON,
        fused=True,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=tasks.STEPS,
        per_device_train_batch_size=tasks.MICRO_BATCH,
        gradient_accumulation_steps=tasks.SEQUENCES // tasks.MICRO_BATCH,
        max_grad_norm=tasks.CLIPPING,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )
    learn = LearnMasks(masking)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=MixtureRows(tasks.mixture_of(inputs)),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[learn],
    )
    return trainer, learn


@pytest.mark.parametrize("estimator", ["hard_concrete", "straight_through"])
def test_the_trainer_ends_where_our_loop_does(tiny_inputs: Path, tmp_path: Path, estimator: str) -> None:
    task = tasks.tiny_task(tiny_inputs, tmp_path / "ours", estimator=estimator)
    train(task, console=Console(file=io.StringIO()))
    trainer, learn = _trainer(tiny_inputs, tmp_path / "theirs", estimator=estimator)
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    for name, weight in task.objective.model.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=1e-5)
    assert task.masking is not None
    ours, theirs = task.masking.state_dict(), learn.masking.state_dict()
    for name, value in ours["log_alpha"].items():
        torch.testing.assert_close(theirs["log_alpha"][name], value, rtol=0.0, atol=1e-5)
        assert torch.equal(theirs["frozen"][name], ours["frozen"][name])


def test_what_is_stopped_continues(tiny_inputs: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, first = _trainer(tiny_inputs, tmp_path, **saving)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    again, second = _trainer(tiny_inputs, tmp_path, **saving)
    again.train(resume_from_checkpoint=str(checkpoint))
    weights = dict(whole.model.named_parameters())
    for name, weight in again.model.named_parameters():
        assert torch.equal(weights[name], weight), name
    log_alpha = first.masking.state_dict()["log_alpha"]
    for name, value in second.masking.state_dict()["log_alpha"].items():
        assert torch.equal(log_alpha[name], value), name
    (checkpoint / "masks.pt").unlink()
    with pytest.raises(ShearingError, match=r"a checkpoint with masks\.pt"):
        _trainer(tiny_inputs, tmp_path)[0].train(resume_from_checkpoint=str(checkpoint))


def test_what_is_not_right_is_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    mixture = tasks.mixture_of(tiny_inputs)
    rules = DocumentRules(loss_across=False)
    within = Mixture(mixture.corpus, seed=0, sequence_length=tasks.LENGTH, weights=mixture.weights, documents=rules)
    with pytest.raises(ShearingError, match="without document rules"):
        MixtureRows(within)
    trainer, learn = _trainer(tiny_inputs, tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(ShearingError, match="bf16=True"):
        learn.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.args.fp16, trainer.args.deepspeed = False, {}
    with pytest.raises(ShearingError, match="shear run"):
        learn.on_train_begin(trainer.args, trainer.state, trainer.control)
