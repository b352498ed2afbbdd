from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shearing.errors import ShearingError
from shearing.runs.context import RunContext
from shearing.runs.planning.preflight import preflight
from shearing.runs.recipe import Recipe, split_batch
from shearing.training.engines.deepspeed_config import deepspeed_config, user_config
from shearing.training.recipe import DeepSpeedRecipe
from tests.conftest import tiny_recipe_data


def _config(settings: DeepSpeedRecipe, **changes: Any) -> dict[str, Any]:
    values = {
        "low_precision": False,
        "gradient_clipping": 0.0,
        "micro_batch_size": 2,
        "accumulation": 3,
        "num_processes": 4,
        "parameters": 1000,
        "on_gpu": False,
    }
    return deepspeed_config(settings, **(values | changes))


def test_clipping_is_written_even_when_there_is_none() -> None:
    assert _config(DeepSpeedRecipe())["gradient_clipping"] == 0.0


def test_batches_agree() -> None:
    config = _config(DeepSpeedRecipe())
    assert config["train_batch_size"] == 24
    assert config["gradient_accumulation_steps"] == 3


def test_users_settings_win_over_ours_and_leave_the_rest() -> None:
    config = _config(
        DeepSpeedRecipe(config={"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True})
    )
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True


def test_offloading_and_precision() -> None:
    config = _config(
        DeepSpeedRecipe(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"), low_precision=True
    )
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["bf16"]["enabled"] is True
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"zero_optimisation": {}}, "did you mean zero_optimization"),
        ({"gradient_clipping": 0.5}, "set gradient_clipping"),
        ({"optimizer": {"type": "Adam"}}, "the recipe decides it"),
        ({"zero_optimization": {"stage": 3}}, "set zero_stage"),
        ({"fp16": {"enabled": True}}, "set precision"),
    ],
)
def test_what_would_be_ignored_or_contradict_the_recipe_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ShearingError, match=message):
        user_config(DeepSpeedRecipe(config=extra))


def test_unknown_zero_key_is_refused() -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(ShearingError, match=r"did you mean zero_optimization\.reduce_bucket_size"):
        user_config(DeepSpeedRecipe(config={"zero_optimization": {"reduce_bucketsize": 1}}))


def test_values_left_to_the_launcher_are_ours(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": "auto", "sub_group_size": 5}})
    )
    config = _config(DeepSpeedRecipe(config=path))
    assert config["train_batch_size"] == 24
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["sub_group_size"] == 5


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ShearingError, match=r"^config = "):
        user_config(DeepSpeedRecipe(config=path))


def _recipe(inputs: Path, tmp_path: Path, **sections: dict[str, Any]) -> Recipe:
    data = tiny_recipe_data(inputs, run_dir=tmp_path / "run")
    for name, values in sections.items():
        data[name] |= values
    return Recipe.model_validate(data)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"engine": "deepspeed", "deepspeed": {"zero_stage": 2, "offload_parameters": "cpu"}}, "zero_stage=3"),
        ({"engine": "deepspeed", "deepspeed": {"zero_stage": 0, "offload_optimizer": "cpu"}}, "zero_stage=1"),
        ({"engine": "deepspeed", "deepspeed": {"config": {"zero_optimise": 1}}}, "zero_optimise"),
    ],
)
def test_engine_is_checked_before_anything_starts(
    training: dict[str, Any], message: str, tiny_inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShearingError, match=message):
        preflight(RunContext(_recipe(tiny_inputs, tmp_path, training=training)))


def test_an_engine_that_is_not_installed_says_what_to_type(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shearing.runs.planning.checks.settings.find_spec", lambda _: None)
    with pytest.raises(ShearingError, match=r"pip install 'shearing\[deepspeed\]'"):
        preflight(RunContext(_recipe(tiny_inputs, tmp_path, training={"engine": "deepspeed"})))


def test_batches_are_shared_equally_or_refused(tiny_inputs: Path, tmp_path: Path) -> None:
    prune = {"batch_size": "12 sequences", "micro_batch_size": 3}
    recipe = _recipe(tiny_inputs, tmp_path, prune=prune)
    whole = split_batch(recipe, stage="prune", num_processes=1)
    assert (whole.sequences, whole.micro_batch_size, whole.accumulation) == (12, 3, 4)
    small = split_batch(recipe, stage="prune", num_processes=6)
    assert (small.sequences, small.micro_batch_size, small.accumulation) == (2, 2, 1)
    with pytest.raises(ShearingError, match="start 4 processes"):
        split_batch(recipe, stage="prune", num_processes=5)
    with pytest.raises(ShearingError, match=r"prune\.micro_batch_size=3"):
        split_batch(
            _recipe(tiny_inputs, tmp_path, prune={**prune, "micro_batch_size": 4}), stage="prune", num_processes=2
        )


@pytest.mark.parametrize("draws", [5, 12])
def test_draws_of_the_masks_are_whole_micro_batches(draws: int, tiny_inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prune\.mask_draws"):
        _recipe(tiny_inputs, tmp_path, prune={"batch_size": "12 sequences", "micro_batch_size": 3, "mask_draws": draws})
