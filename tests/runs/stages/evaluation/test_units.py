"""Units that are left after several cuts, as those of the first source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shearing.models.cutting import Selection, compact
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.rounding import select
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.evaluation.units import Cut, digest_of, through
from tests.models.experts import expert_configs
from tests.models.tiny import tiny_model


@pytest.fixture(autouse=True, scope="module")
def _configs() -> Iterator[None]:
    with expert_configs():
        yield


def chosen(source: Shape, *, seed: int, **sizes: Any) -> tuple[Masks, Shape, Selection]:
    """Units by chance, the shape that they are of, and the same as a selection."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(size, generator=generator) for name, size in unit_sizes(source).items()}
    target = dataclasses.replace(source, **sizes)
    masks, selection = select(scores, source=source, target=target)
    return masks, target, selection


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        (
            "llama",
            {"num_hidden_layers": 3, "hidden_size": 30, "num_attention_heads": 6, "intermediate_size": 32},
            {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2},
        ),
        (
            "qwen3_moe",
            {"num_hidden_layers": 3, "num_experts": 4, "intermediate_size": 16},
            {"num_hidden_layers": 2, "num_experts": 3, "intermediate_size": 8, "num_attention_heads": 3},
        ),
    ],
)
def test_two_cuts_are_one(family: str, first: dict[str, int], second: dict[str, int], tmp_path: Path) -> None:
    model = tiny_model(family)
    source = Shape.of(model.config)
    masks, between, of_first = chosen(source, seed=0, **first)
    more, target, of_second = chosen(between, seed=1, **second)
    twice = compact(compact(model, masks=masks, selection=of_first), masks=more, selection=of_second)
    found = through(of_first, of_second)
    once = compact(model, masks=Masks(), selection=found)
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert all(weight.equal(once.state_dict()[name]) for name, weight in twice.state_dict().items())
    # So says the hash, of what runs have in their folders.
    cuts = []
    for name, kept, had, left in (("a", masks, source, between), ("b", more, between, target)):
        cuts.append(Cut(run=RunDirectory(tmp_path / name), source=had, shape=left))
        cuts[-1].run.prune.mkdir(parents=True)
        tensors = {unit: mask.clone() for unit, mask in kept.tensors().items()}
        save_file(tensors, cuts[-1].run.prune / "masks.safetensors")
    assert digest_of(cuts[:1]) == of_first.digest
    assert digest_of(cuts) == found.digest
    assert digest_of(cuts) not in (of_first.digest, of_second.digest)
    (cuts[0].run.prune / "masks.safetensors").unlink()
    assert digest_of(cuts) is None


def test_sublayers_of_a_layer_may_come_from_two() -> None:
    source = Shape.of(tiny_model("llama").config)
    three, two = (dataclasses.replace(source, num_hidden_layers=layers) for layers in (3, 2))
    first = Selection.of(
        Masks(attention=torch.tensor([1.0, 1, 0, 1]), mlp=torch.tensor([1.0, 0, 1, 1])), source=source, target=three
    )
    second = Selection.of(
        Masks(attention=torch.tensor([1.0, 0, 1]), mlp=torch.tensor([0.0, 1, 1])), source=three, target=two
    )
    assert (first.layers, second.layers) == (((0, 0), (1, 2), (3, 3)), ((0, 1), (2, 2)))
    assert through(first, second).layers == ((0, 2), (3, 3))
