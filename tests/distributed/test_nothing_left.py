"""A stage leaves no engine, optimiser, model or weight in memory, whichever engine it had."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shearing.processes.processes import Processes
from shearing.runs.context import RunContext
from shearing.runs.recipe import Recipe
from shearing.runs.stages.prune import prune
from tests.distributed import runs
from tests.distributed.harness import start

pytestmark = pytest.mark.slow

FEW = 500
"""Elements; the smallest matrix of the model has 512, all of it 31,000."""


def _alive() -> list[object]:
    gc.collect()
    return gc.get_objects()


def _kinds() -> tuple[type, ...]:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine as Theirs
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from transformers import LlamaForCausalLM

    from shearing.training.engines.deepspeed_engine import DeepSpeedEngine
    from shearing.training.engines.fsdp2_engine import Fsdp2Engine
    from shearing.training.engines.torch_engine import TorchEngine

    zero = (Theirs, BF16_Optimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    return (TorchEngine, DeepSpeedEngine, Fsdp2Engine, torch.optim.Optimizer, LlamaForCausalLM, *zero)


def _learn_masks(recipes: Sequence[Recipe]) -> None:
    kinds = _kinds()
    with Processes.start(device="cpu") as processes:
        for recipe in recipes:
            before = {id(each) for each in _alive() if isinstance(each, torch.Tensor)}
            prune(RunContext(recipe, console=Console(quiet=True), processes=processes))
            alive = _alive()
            engine = f"{recipe.training.engine}, ZeRO-{recipe.training.deepspeed.zero_stage}"
            kept = [type(each).__name__ for each in alive if isinstance(each, kinds)]
            assert not kept, f"{engine}: {kept}"
            tensors = [each for each in alive if isinstance(each, torch.Tensor) and id(each) not in before]
            left = [tuple(each.shape) for each in tensors if each.numel() > FEW]
            assert not left, f"{engine}: {left}"
            assert sum(each.numel() for each in tensors) < 4 * FEW, engine
            del alive, tensors


def test_after_a_stage_nothing_of_it_is_alive(tiny_inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    engines: dict[str, dict[str, Any]] = {"torch": {}, "fsdp2": {"engine": "fsdp2"}}
    engines |= {f"zero-{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)}
    engines["zero-1"]["precision"] = "bf16"  # DeepSpeed has an optimiser of its own for it
    recipes = [
        runs.recipe(tiny_inputs, run_dir=tmp_path / name, steps=8, **settings) for name, settings in engines.items()
    ]
    group = start(_learn_masks, recipes, size=2, folder=tmp_path / "out")
    assert group.wait(seconds=540) == [0, 0], group.said()  # six stages, where a test usually has one
