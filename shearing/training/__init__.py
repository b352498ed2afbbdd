"""Training of both stages: the loop, callbacks around it, engines that compute its steps, and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.training.adapters.adapted import merge_in_place
    from shearing.training.adapters.lora import add_adapters, merge_adapters
    from shearing.training.adapters.recipe import LoraRecipe, SpeftRecipe, SppRecipe
    from shearing.training.adapters.speft import add_deltas
    from shearing.training.adapters.spp import add_factors
    from shearing.training.callbacks.heldout_at_end import measure_held_out
    from shearing.training.engines.deepspeed_engine import DeepSpeedEngine
    from shearing.training.engines.engine import Engine, EngineParts, engine_of
    from shearing.training.engines.facts import ENGINES, EngineFacts
    from shearing.training.engines.fsdp2_engine import Fsdp2Engine
    from shearing.training.engines.optimizer import Optimization
    from shearing.training.engines.torch_engine import TorchEngine
    from shearing.training.learning_rates import LearningRates
    from shearing.training.loop import train
    from shearing.training.recipe import (
        DeepSpeedRecipe,
        Fsdp2Recipe,
        PretrainRecipe,
        StageRecipe,
        TrainingRecipe,
    )
    from shearing.training.stage import Compute, HeldOut, Interrupted, MaskedTraining, Schedule, Trained
    from shearing.training.task import Callback, Run, StepResult, Task
    from shearing.training.trackers import Trackers

__all__ = [
    "ENGINES",
    "Callback",
    "Compute",
    "DeepSpeedEngine",
    "DeepSpeedRecipe",
    "Engine",
    "EngineFacts",
    "EngineParts",
    "Fsdp2Engine",
    "Fsdp2Recipe",
    "HeldOut",
    "Interrupted",
    "LearningRates",
    "LoraRecipe",
    "MaskedTraining",
    "Optimization",
    "PretrainRecipe",
    "Run",
    "Schedule",
    "SpeftRecipe",
    "SppRecipe",
    "StageRecipe",
    "StepResult",
    "Task",
    "TorchEngine",
    "Trackers",
    "Trained",
    "TrainingRecipe",
    "add_adapters",
    "add_deltas",
    "add_factors",
    "engine_of",
    "measure_held_out",
    "merge_adapters",
    "merge_in_place",
    "train",
]

__getattr__ = late(
    __name__,
    {
        "Callback": "task",
        "Compute": "stage",
        "DeepSpeedEngine": "engines.deepspeed_engine",
        "DeepSpeedRecipe": "recipe",
        "ENGINES": "engines.facts",
        "Engine": "engines.engine",
        "EngineFacts": "engines.facts",
        "EngineParts": "engines.engine",
        "Fsdp2Engine": "engines.fsdp2_engine",
        "Fsdp2Recipe": "recipe",
        "HeldOut": "stage",
        "Interrupted": "stage",
        "LearningRates": "learning_rates",
        "LoraRecipe": "adapters.recipe",
        "MaskedTraining": "stage",
        "Optimization": "engines.optimizer",
        "PretrainRecipe": "recipe",
        "Run": "task",
        "Schedule": "stage",
        "StageRecipe": "recipe",
        "StepResult": "task",
        "Task": "task",
        "TorchEngine": "engines.torch_engine",
        "Trackers": "trackers",
        "Trained": "stage",
        "TrainingRecipe": "recipe",
        "SppRecipe": "adapters.recipe",
        "SpeftRecipe": "adapters.recipe",
        "add_adapters": "adapters.lora",
        "add_deltas": "adapters.speft",
        "add_factors": "adapters.spp",
        "merge_in_place": "adapters.adapted",
        "engine_of": "engines.engine",
        "measure_held_out": "callbacks.heldout_at_end",
        "merge_adapters": "adapters.lora",
        "train": "loop",
    },
)
