"""From scalars on the device to the line of metrics.jsonl that a step has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def read_scalars(figures: list[dict[str, Tensor]], *, device: torch.device) -> list[dict[str, float]]:
    """Values of scalar tensors, one dict per step; what is on the device comes over in one transfer."""
    flat = [value for step in figures for value in step.values()]
    on_device = [value.to(torch.float64) for value in flat if value.device.type == device.type]
    read = iter(torch.stack(on_device).tolist())
    values = iter([next(read) if value.device.type == device.type else float(value) for value in flat])
    return [{name: next(values) for name in step} for step in figures]


def step_line(known: Mapping[str, Any], figures: Mapping[str, float]) -> dict[str, Any]:
    """One step's line; `expected/hidden` among the figures becomes `expected: {hidden: …}`."""
    line: dict[str, Any] = {
        "step": known["step"],
        "tokens": known["tokens"],
        "loss": figures["loss"],
        "loss_max": figures["loss_max"],
        "grad_norm": figures["grad_norm"],
        "learning_rate": known["learning_rate"],
        "skipped": int(figures["skipped"]),
        "weights": known["weights"],
        "expected": {},
        "target": {},
        "violation": {},
        "lambda_1": {},
        "lambda_2": {},
    }
    for name, value in figures.items():
        kind, _, granularity = name.partition("/")
        if granularity:
            line.setdefault(kind, {})[granularity] = value
    return line
