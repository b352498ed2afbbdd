"""What a stage does is what its recipe section says: one source of defaults."""

from __future__ import annotations

import dataclasses

import pytest

from shearing.settings.quantities import Duration
from shearing.training.engines.optimizer import Optimization
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import StageRecipe, TrainingRecipe
from shearing.training.stage import Schedule

STAGE = StageRecipe.model_validate(
    {
        "duration": "100 steps",
        "batch_size": "8 sequences",
        "learning_rate": 0.25,
        "schedule": "wsd",
        "warmup": "20%",
        "decay": "2400 tokens",
        "final_learning_rate": 0.5,
        "betas": (0.7, 0.8),
        "epsilon": 1e-6,
        "weight_decay": 0.3,
        "gradient_clipping": 2.0,
        "checkpoint_interval": "1600 tokens",
        "keep_last": 4,
        "keep_every": "50%",
        "validation_interval": "25%",
    }
)


def test_optimisation_is_that_of_the_section() -> None:
    rates = LearningRates.of(STAGE, tokens_per_step=80)
    assert rates == LearningRates(
        schedule="wsd",
        peak=0.25,
        total_steps=100,
        warmup_steps=20,
        decay_steps=30,
        final=0.5,
        first_step=0,
    )
    assert Optimization.of(STAGE, rates=rates) == Optimization(
        rates=rates,
        betas=(0.7, 0.8),
        epsilon=1e-6,
        weight_decay=0.3,
        gradient_clipping=2.0,
    )


def test_schedule_is_that_of_the_sections() -> None:
    found = Schedule.of(
        STAGE,
        training=TrainingRecipe(log_interval=7, max_skipped_steps=3),
        tokens_per_step=80,
        sequence_length=10,
        micro_batch_size=2,
        mixture_interval=Duration(tokens=240),
    )
    assert found == Schedule(
        total_steps=100,
        sequences_per_step=8,
        micro_batch_size=2,
        checkpoint_interval=20,
        checkpoint_seconds=1800.0,
        keep_last=4,
        keep_every=50,
        background_checkpoints=True,
        mixture_interval=3,
        validation_interval=25,
        log_interval=7,
        max_skipped_steps=3,
    )


@pytest.mark.parametrize("settings", [Optimization, LearningRates, Schedule])
def test_sections_are_the_only_source_of_defaults(settings: type[Optimization | LearningRates | Schedule]) -> None:
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(settings))
    assert all(field.default_factory is dataclasses.MISSING for field in dataclasses.fields(settings))
