"""Hugging Face's `Trainer` gives what our loop gives, and continues what was stopped."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from shearing import ShearingError
from shearing.data import DocumentRules, Mixture
from shearing.integrations.trainer import LearnMasks, MixtureRows
from shearing.training.loop import train
from tests.data.corpus.answers import with_answers, with_beginnings
from tests.training import tasks


def _answers(inputs: Path, folder: Path, *, share: float) -> Path:
    """The same inputs, of whose letters some tokens do not count."""
    folder.mkdir()
    for path in inputs.iterdir():
        if path.name != "corpus":
            (folder / path.name).symlink_to(path)
    with_answers(inputs / "corpus", folder / "corpus", domain="letters", share=share)
    return folder


def _begun(inputs: Path, folder: Path) -> Path:
    """The same inputs, of whose documents the first token is one that begins texts."""
    folder.mkdir()
    (folder / "model").symlink_to(inputs / "model")
    with_beginnings(inputs / "corpus", folder / "corpus")
    return folder


def _trainer(
    inputs: Path,
    folder: Path,
    *,
    estimator: str = "hard_concrete",
    warmup: int = 3,
    evaluated: Any = None,
    **settings: Any,
) -> tuple[Trainer, LearnMasks]:
    """Mask learning as in `tasks.tiny_task`."""
    objective, masking = tasks.masked_objective(inputs, estimator=estimator, warmup=warmup)
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
        per_device_train_batch_size=tasks.MICRO_BATCH,
        max_grad_norm=tasks.CLIPPING,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{
            "max_steps": tasks.STEPS,
            "gradient_accumulation_steps": tasks.SEQUENCES // tasks.MICRO_BATCH,
            "save_strategy": "no",
            **settings,
        },
    )
    learn = LearnMasks(masking)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=MixtureRows(tasks.mixture_of(inputs)),
        eval_dataset=evaluated,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[learn],
    )
    return trainer, learn


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        ("hard_concrete", "plain"),
        ("straight_through", "plain"),
        ("straight_through", "answers"),
        ("hard_concrete", "begun"),
    ],
)
def test_the_trainer_ends_where_our_loop_does(tiny_inputs: Path, tmp_path: Path, estimator: str, text: str) -> None:
    inputs = tiny_inputs
    if text == "answers":  # so many tokens that every row has a label: of the others, the trainer has none
        inputs = _answers(tiny_inputs, tmp_path / "answers", share=0.8)
    elif text == "begun":
        inputs = _begun(tiny_inputs, tmp_path / "begun")
    task = tasks.tiny_task(inputs, tmp_path / "ours", estimator=estimator)
    train(task, console=Console(file=io.StringIO()))
    trainer, learn = _trainer(inputs, tmp_path / "theirs", estimator=estimator)
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


@pytest.mark.parametrize(
    "saving",
    [
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"},
    ],
    ids=["steps", "best"],
)
def test_what_is_killed_while_it_saves_continues(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: dict[str, Any]
) -> None:
    batch = tasks.mixture_of(tiny_inputs).batch(first_sample=0, num_sequences=2)
    settings = {"evaluated": [{"input_ids": row, "labels": row} for row in batch.tokens], "save_total_limit": 1}
    whole, first = _trainer(tiny_inputs, tmp_path / "whole", **saving, **settings)
    monkeypatch.setattr(Trainer, "_determine_best_metric", lambda *_, **__: True)
    whole.train()

    class KilledError(Exception):
        pass

    def killed(learn: LearnMasks, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == 4:
            raise KilledError
        save(learn, args, state, control, **keywords)

    save = LearnMasks.on_save
    with monkeypatch.context() as patch:
        patch.setattr(LearnMasks, "on_save", killed)
        with pytest.raises(KilledError):
            _trainer(tiny_inputs, tmp_path / "killed", **saving, **settings)[0].train()
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    again, second = _trainer(tiny_inputs, tmp_path / "killed", **saving, **settings)
    again.train(resume_from_checkpoint=True)
    log_alpha = first.masking.state_dict()["log_alpha"]
    for name, value in second.masking.state_dict()["log_alpha"].items():
        assert torch.equal(log_alpha[name], value), name
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [f"checkpoint-{tasks.STEPS}"]


def test_labels_are_the_tokens_that_count(tiny_inputs: Path, tmp_path: Path) -> None:
    inputs = _answers(tiny_inputs, tmp_path / "answers", share=0.02)
    mixture = tasks.mixture_of(inputs)
    batch = mixture.batch(first_sample=0, num_sequences=16)
    assert batch.counted is not None
    labels = batch.tokens.masked_fill(~batch.counted, -100)
    with_labels = [row for row in range(16) if batch.counted[row, 1:].any()]
    assert 0 < len(with_labels) < 16
    for row, dealt in zip(with_labels, MixtureRows(mixture), strict=False):
        assert torch.equal(dealt["input_ids"], batch.tokens[row])
        assert torch.equal(dealt["labels"][1:], labels[row, 1:])


def test_what_begins_a_document_is_no_label(tiny_inputs: Path, tmp_path: Path) -> None:
    mixture = tasks.mixture_of(_begun(tiny_inputs, tmp_path / "begun"))
    batch = mixture.batch(first_sample=0, num_sequences=8)
    assert batch.positions is not None
    assert (batch.positions[:, 1:] == 0).any()
    labels = batch.tokens.masked_fill(batch.positions == 0, -100)
    for row, dealt in zip(range(8), MixtureRows(mixture), strict=False):
        assert torch.equal(dealt["input_ids"], batch.tokens[row])
        assert torch.equal(dealt["labels"][1:], labels[row, 1:])


class _Compared(TrainerCallback):
    """What the trainer measures, beside the loss under masks without noise of that step."""

    def __init__(self, learn: LearnMasks, tokens_BT: torch.Tensor) -> None:
        self.learn, self.tokens_BT = learn, tokens_BT
        self.losses: dict[int, tuple[float, float]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learn.masking.settle(step=state.global_step)
        with torch.no_grad():
            loss = kwargs["model"](input_ids=self.tokens_BT, labels=self.tokens_BT).loss
        self.losses[state.global_step] = (kwargs["metrics"]["eval_loss"], float(loss))


def test_what_is_measured_before_the_first_step_is_without_noise(tiny_inputs: Path, tmp_path: Path) -> None:
    tokens_BT = tasks.mixture_of(tiny_inputs).batch(first_sample=0, num_sequences=2).tokens
    settings = {"warmup": 0, "save_strategy": "steps", "save_steps": 3}
    measured = {"eval_on_start": True, "evaluated": [{"input_ids": row, "labels": row} for row in tokens_BT]}
    plain, _ = _trainer(tiny_inputs, tmp_path / "plain", **settings)
    plain.train()
    for step, from_checkpoint in ((0, None), (3, str(tmp_path / "plain" / "checkpoint-3"))):
        trainer, learn = _trainer(tiny_inputs, tmp_path / "plain", **settings, **measured)
        with torch.no_grad():
            unmasked = float(trainer.model(input_ids=tokens_BT, labels=tokens_BT).loss)
        compared = _Compared(learn, tokens_BT)
        trainer.add_callback(compared)
        trainer.train(resume_from_checkpoint=from_checkpoint)
        found, settled = compared.losses[step]
        assert found == pytest.approx(settled, abs=1e-6)
        assert abs(settled - unmasked) > 1e-3
        # And what is drawn afterwards is what it would have been.
        weights = dict(plain.model.named_parameters())
        for name, weight in trainer.model.named_parameters():
            assert torch.equal(weights[name], weight), name


def test_what_a_failed_attempt_leaves_is_forgotten(tiny_inputs: Path, tmp_path: Path) -> None:
    """As under `auto_find_batch_size`, which begins training anew with gradients of the step that had no room."""
    ends = []
    for failed in (False, True):
        trainer, learn = _trainer(tiny_inputs, tmp_path, max_steps=1)
        if failed:
            for parameter in learn.masking.learner.parameters():
                parameter.grad = torch.full_like(parameter, 100.0)
        trainer.train()
        ends.append({name: value.clone() for name, value in learn.masking.state_dict()["log_alpha"].items()})
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def test_a_run_that_ends_early_leaves_the_masks_that_are_cut(tiny_inputs: Path, tmp_path: Path) -> None:
    tokens_BT = tasks.mixture_of(tiny_inputs).batch(first_sample=0, num_sequences=2).tokens
    trainer, learn = _trainer(tiny_inputs, tmp_path, max_steps=2)
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        left = trainer.model(input_ids=tokens_BT).logits
        torch.testing.assert_close(left, learn.masking.cut()(input_ids=tokens_BT).logits)


def test_one_worker_deals_the_sequence_and_two_are_refused(tiny_inputs: Path) -> None:
    mixture = tasks.mixture_of(tiny_inputs)
    rows = MixtureRows(mixture)
    found = next(iter(DataLoader(rows, batch_size=3, num_workers=1)))
    assert torch.equal(found["input_ids"], mixture.batch(first_sample=0, num_sequences=3).tokens)
    with pytest.raises(RuntimeError, match="dataloader_num_workers = 2"):  # of what a worker raises, the words are left
        next(iter(DataLoader(rows, batch_size=3, num_workers=2)))


def test_what_is_not_right_is_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    mixture = tasks.mixture_of(tiny_inputs)
    rules = DocumentRules(attention_within=True)
    within = Mixture(mixture.corpus, seed=0, sequence_length=tasks.LENGTH, weights=mixture.weights, documents=rules)
    with pytest.raises(ShearingError, match="attention_within=False"):
        MixtureRows(within)
    trainer, learn = _trainer(tiny_inputs, tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(ShearingError, match="bf16=True"):
        learn.on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.args.fp16, trainer.args.deepspeed = False, {}
    with pytest.raises(ShearingError, match="shear run"):
        learn.on_train_begin(trainer.args, trainer.state, trainer.control)
    with pytest.raises(ShearingError, match="batch of 2 sequences") as raised:
        _trainer(tiny_inputs, tmp_path, gradient_accumulation_steps=1)[0].train()
    assert raised.value.field == "mask_draws"
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "evaluated": []}
    with pytest.raises(ShearingError, match="the least pruned") as raised:
        _trainer(tiny_inputs, tmp_path, **best)[0].train()
    assert raised.value.field == "load_best_model_at_end"
