"""A tiny task as a stage would make it, with or without masks, from the sections of a recipe and no run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules, Documents
from shearing.data.mixture.sampler import Mixture
from shearing.models.loading import load_source
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.objectives.language_model import LanguageModelLoss
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.masking import Masking
from shearing.settings.quantities import Duration
from shearing.training.callbacks.stop_requests import StopRequests
from shearing.training.engines.optimizer import Optimization
from shearing.training.engines.torch_engine import TorchEngine
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import StageRecipe, TrainingRecipe
from shearing.training.stage import HeldOut, Schedule
from shearing.training.task import Callback, Run, StepResult, Task

STEPS, SEQUENCES, MICRO_BATCH, LENGTH, DRAWS = 8, 4, 2, 16, 2
RATE, BETAS, EPSILON, DECAY, CLIPPING = 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5
CPU = torch.device("cpu")


def masked_objective(
    inputs: Path, *, estimator: str = "hard_concrete", warmup: int = 3
) -> tuple[LanguageModelLoss, Masking]:
    """The tiny model, masked, and what learns its masks: they close in `warmup` steps and move until the last two."""
    model = load_source(str(inputs / "model"), device=CPU, dtype=torch.float32)
    source = Shape.of(model.config)
    learner = MaskLearner(
        ["layers", "query_heads", "intermediate", "hidden"],
        source=source,
        target=dataclasses.replace(
            source, num_hidden_layers=2, intermediate_size=24, hidden_size=16, num_attention_heads=2
        ),
        settings=MaskSettings(
            total_steps=STEPS,
            sparsity_warmup_steps=warmup,
            freeze_step=STEPS - 2,
            warmup_steps=2,
            estimator=estimator,
            mask_learning_rate=0.5,
            multiplier_learning_rate=1.0,
            final_learning_rate=0.1,
            quadratic_penalty=10.0,
            temperature=2 / 3,
            log_alpha_limit=10.0,
            doubtful_share=1.0,
            seed=5,
        ),
    )
    masking = Masking(model=MaskedModel(model), learner=learner, draws=DRAWS)
    return LanguageModelLoss(model, chunk_tokens=32), masking


def mixture_of(inputs: Path) -> Mixture:
    """Both domains in equal parts, from their first samples."""
    corpus = Corpus.open(inputs / "corpus", vocab_size=20, sequence_length=LENGTH)
    weights = {domain: 1 / len(corpus.domains) for domain in corpus.domains}
    return Mixture(corpus, seed=3, sequence_length=LENGTH, weights=weights, documents=DocumentRules())


def tiny_task(
    inputs: Path,
    folder: Path,
    *,
    callbacks: tuple[Callback, ...] = (),
    estimator: str = "hard_concrete",
    training: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Task:
    """Mask learning in `STEPS` steps at a constant rate; `training` and `changes`: keys of both sections."""
    stage = StageRecipe.model_validate(
        {
            "duration": STEPS,
            "batch_size": SEQUENCES,
            "micro_batch_size": MICRO_BATCH,
            "learning_rate": RATE,
            "final_learning_rate": 1.0,
            "warmup": 0,
            "betas": BETAS,
            "epsilon": EPSILON,
            "weight_decay": DECAY,
            "gradient_clipping": CLIPPING,
            "checkpoint_interval": 2,
            "keep_last": STEPS,
            **changes,
        }
    )
    tokens_per_step = SEQUENCES * LENGTH
    optimization = Optimization.of(stage, rates=LearningRates.of(stage, tokens_per_step=tokens_per_step))
    objective, masking = masked_objective(inputs, estimator=estimator)
    return Task(
        name="prune",
        folder=folder,
        schedule=Schedule.of(
            stage,
            training=TrainingRecipe.model_validate({"log_interval": 3, **(training or {})}),
            tokens_per_step=tokens_per_step,
            sequence_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            mixture_interval=Duration(steps=3),
        ),
        objective=objective,
        engine=TorchEngine(optimization, device=CPU, precision=torch.float32),
        optimization=optimization,
        mixture=mixture_of(inputs),
        masking=masking,
        dynamic=None,
        heldout=HeldOut(tokens=2 * LENGTH, measure=_measure),
        average_weight=None,
        callbacks=callbacks,
    )


def _measure(forward: Callable[[Tensor, Documents | None], Tensor], advance: Callable[[int], None]) -> dict[str, float]:
    tokens_BT = torch.arange(2 * (LENGTH + 1)).view(2, -1) % 20
    advance(2 * LENGTH)
    return {"letters": float(forward(tokens_BT, None)) / (2 * LENGTH)}


def stop_at(step: int, *, patch: pytest.MonkeyPatch) -> None:
    """A signal comes in that step."""
    after_step = StopRequests.after_step

    def signalled(requests: StopRequests, run: Run, result: StepResult) -> None:
        if run.step == step:
            requests.requested = "SIGTERM"
        after_step(requests, run, result)

    patch.setattr(StopRequests, "after_step", signalled)
