"""A family of sizes: engines and numbers of processes train the same sizes in turns, and leave the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from tests.distributed import runs
from tests.distributed.conftest import Once
from tests.distributed.harness import spawn

STAGES: tuple[Stage, ...] = ("prune", "compact", "pretrain")
SIZES = {
    "medium": {"num_hidden_layers": 2, "intermediate_size": 24},
    "small": {"hidden_size": 16, "num_attention_heads": 2},
}


def _recipe(inputs: Path, run_dir: Path, **settings: Any) -> Recipe:
    data = runs.recipe(inputs, run_dir=run_dir, steps=6, checkpoint_interval=6, **settings).model_dump(mode="json")
    data["target"] |= {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    data["prune"] |= {"duration": "0 steps", "mask_draws": 1, "freeze": "100%", "initial_masks": "activations"}
    data["prune"]["batch_size"] = "3 sequences"  # of which none is dealt
    data["family"] = {"sizes": SIZES, "draws": 2, "calibration_tokens": 64}
    data["model"]["save_dtype"] = "fp32"
    return Recipe.model_validate(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine": "deepspeed", "zero_stage": 3},
        {"engine": "fsdp2"},
    ],
    ids=["torch", "ZeRO-3", "FSDP2"],
)
def test_two_processes_train_the_family_that_one_does(
    settings: dict[str, Any], tiny_inputs: Path, tmp_path: Path, once: Once
) -> None:
    if settings.get("engine") == "deepspeed":
        pytest.importorskip("deepspeed")
    one, two = once(lambda run_dir: _recipe(tiny_inputs, run_dir), STAGES), tmp_path / "run"
    spawn(runs.train, _recipe(tiny_inputs, two, **settings), STAGES, size=2, folder=tmp_path / "out")
    turns = [[line["size"] for line in runs.lines(each, "pretrain") if "size" in line] for each in (one, two)]
    assert len(turns[0]) == 6
    assert turns[0] == turns[1]
    assert runs.difference(runs.trajectory(one, "pretrain"), runs.trajectory(two, "pretrain")) < 1e-5
    for name in SIZES:
        expected, found = (load_file(each / "family" / name / "model.safetensors") for each in (one, two))
        assert expected.keys() == found.keys()
        for tensor, weight in expected.items():
            assert found[tensor].shape == weight.shape
            assert float((found[tensor] - weight).abs().max()) < 1e-5
