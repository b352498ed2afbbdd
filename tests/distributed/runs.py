"""Tiny runs on several processes: their recipe, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from shearing.runs.stages.run import run
from shearing.training.metrics import TIMING_FIELDS
from tests.conftest import tiny_recipe_data

STEPS = 12
LISTENING = {
    "weight": 0.6,
    "domains": "auto",
    "margin": 0.05,
    "skip_low_entropy": 0.2,
    "hidden": {"weight": 0.2, "decay": "75%"},
}
"""To the source, with all that a step may have to know of the steps before it."""


def recipe(
    inputs: Path,
    *,
    run_dir: Path,
    engine: str = "torch",
    zero_stage: int = 2,
    micro_batch_size: int = 1,
    steps: int = STEPS,
    checkpoint_interval: int = 4,
    estimator: str = "hard_concrete",
    listening: bool = False,
    **training: Any,
) -> Recipe:
    """Four sequences a step in two draws of the masks, and domain weights that move; a teacher, if `listening`."""
    data = tiny_recipe_data(inputs, run_dir=run_dir)
    for stage in ("prune", "pretrain"):
        # A large epsilon: with the usual one AdamW turns the sign of gradients near zero, which is rounding, into
        # whole steps.
        data[stage] |= {
            "duration": f"{steps} steps",
            "batch_size": "4 sequences",
            "micro_batch_size": micro_batch_size,
            "checkpoint_interval": f"{checkpoint_interval} steps",
            "weight_decay": 0.1,
            "epsilon": 1e-3,
        }
    data["prune"] |= {"mask_draws": 2, "freeze": "6 steps", "estimator": estimator, "mask_learning_rate": 0.1}
    if listening:
        data["distill"] = LISTENING
        # No divisor of the checkpoints': each has losses that no update has used.
        data["mixture"] |= {"reference": "teacher", "losses": "training", "interval": "3 steps"}
    data["training"] |= {
        "engine": engine,
        "deepspeed": {
            "zero_stage": zero_stage,
            **{key: training.pop(key) for key in ("offload_optimizer", "offload_parameters") if key in training},
        },
        "fsdp2": {key: training.pop(key) for key in ("reshard_after_forward", "sum_gradients") if key in training},
        **training,
    }
    return Recipe.model_validate(data)


def train(chosen: Recipe, stages: tuple[Stage, ...]) -> None:
    """What every process runs."""
    run(chosen, stages=stages)


def lines(run_dir: Path, stage: Stage) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    path = run_dir / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def trajectory(run_dir: Path, stage: Stage, *, listening: bool = False) -> list[dict[str, Any]]:
    """What every step computed, without times."""
    kept = ["step", "loss", "grad_norm", "skipped", "expected", "lambda_1", "lambda_2", "weights", "losses", "changed"]
    if listening:
        kept += ["domain_teacher_losses", "domain_divergences", "domain_teacher_weights", "domain_hidden_errors"]
    return [{name: line[name] for name in kept if name in line} for line in lines(run_dir, stage)]


def contents(run_dir: Path, stage: Stage) -> Iterator[tuple[str, Any]]:
    """Everything that a stage leaves, bit for bit, without times."""
    found = lines(run_dir, stage)
    yield "metrics", [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in found]
    for path in sorted((run_dir / stage).rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            tensors = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        yield str(path.relative_to(run_dir)), tensors


def difference(ours: Any, theirs: Any, *, floor: float = 1e-2) -> float:
    """Largest relative difference of two trajectories; infinite where they differ in form.

    What is below `floor` is compared in absolute terms: for multipliers, which start at 0 and may come back to it, that
    is 1, as each is a sum of violations at their rate of 1.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        floors = {key: 1.0 if key.startswith("lambda") else floor for key in ours}
        return max((difference(ours[key], theirs[key], floor=floors[key]) for key in ours), default=0.0)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return max((difference(a, b, floor=floor) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return abs(ours - theirs) / max(abs(ours), abs(theirs), floor)
    return 0.0 if ours == theirs else float("inf")
