"""Layers whose weights are in host memory, and the memory of freed tensors."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from shearing.models.anatomy import backbone, decoder_layers
from shearing.training.device import offload_layers
from tests.models.tiny import tiny_ids, tiny_model

CPU = torch.device("cpu")


@torch.no_grad()
def test_offloaded_layers_give_the_same_numbers_one_after_the_other() -> None:
    """No more than one layer is there at a time; a copy even on a CPU, so that it differs from what stays at home."""
    ids = tiny_ids()
    expected = backbone(tiny_model())(input_ids=ids, use_cache=False).last_hidden_state
    model = tiny_model()
    layers = decoder_layers(model)
    at_home = [[weight.data_ptr() for weight in layer.parameters()] for layer in layers]

    def away() -> list[int]:
        found = [[weight.data_ptr() for weight in layer.parameters()] for layer in layers]
        return [number for number, (now, home) in enumerate(zip(found, at_home, strict=True)) if now != home]

    offload_layers(model, device=CPU)
    assert away() == []
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        seen.append(away())

    for layer in layers:
        layer.mlp.register_forward_hook(look)
    for _ in range(2):
        assert torch.equal(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state, expected)
        assert away() == []
    assert seen == [[0], [1], [2], [3]] * 2


_FAULTS = """
import resource, sys, torch
from shearing.training.device import keep_freed_memory
keep_freed_memory(torch.device("cpu"), processes=int(sys.argv[1]))
logits = torch.ones(2**25)
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    logits.log_softmax(-1).exp()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps or returns memory as it likes")
def test_freed_tensors_are_reused() -> None:
    """In processes of their own, since what is set stays so; each of 128 MiB has 32 Ki pages, if they are of 4 KiB."""

    def faults(processes: int) -> int:
        command = [sys.executable, "-c", _FAULTS, str(processes)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults(1) < 100 < faults(2)
