"""Keys that may differ between a run and its continuation are marked where they are declared, and only these are."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, ValidationError

from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.runs.recipe import Recipe
from shearing.settings.neutral import Neutral, is_neutral, neutral_keys
from shearing.settings.section import Positive, Section


class Inner(Section):
    """Inner."""

    pace: Neutral[Literal["slow", "fast"]] = Field("slow", description="Pace.")
    size: int = Field(1, ge=1, description="Size.")


class Outer(Section):
    """Outer."""

    seconds: Neutral[Positive] = Field(1.0, description="Seconds.")
    inner: Inner = Inner()
    perhaps: Inner | None = None
    watched: Neutral[Inner] = Inner()


class Plain(Section):
    """Outer."""

    seconds: Positive = Field(1.0, description="Seconds.")
    inner: Inner = Inner()
    perhaps: Inner | None = None
    watched: Inner = Inner()


def test_marks_are_found_in_sections_and_below() -> None:
    found = neutral_keys(Outer)
    assert found == {"seconds", "inner.pace", "perhaps.pace", "watched"}
    assert is_neutral("watched.size", among=found)
    assert not is_neutral("watchedness", among=found)
    assert not is_neutral("inner.size", among=found)


def test_a_mark_changes_neither_the_schema_nor_what_is_taken() -> None:
    assert Outer.model_json_schema() == {**Plain.model_json_schema(), "title": "Outer"}
    for wrong in ({"seconds": 0}, {"seconds": True}, {"inner": {"pace": "late"}}):
        with pytest.raises(ValidationError):
            Outer.model_validate(wrong)


def test_neutral_keys_of_a_run() -> None:
    stage = (
        "micro_batch_size",
        "validation_interval",
        "checkpoint_interval",
        "checkpoint_minutes",
        "keep_last",
        "keep_every",
    )
    training = (
        "engine",
        "deepspeed",
        "fsdp2",
        "activation_checkpointing",
        "compile",
        "device",
        "loss_chunk_tokens",
        "checkpoint_writing",
        "log_interval",
        "trackers",
        "timeout",
        "memory_check",
    )
    assert neutral_keys(Recipe) == {
        "name",
        "run_dir",
        "resume",
        "model.save_dtype",
        "target.vocab_size",
        "data.bos",
        "sparsify.bos",
        *(f"prune.{name}" for name in stage),
        *(f"pretrain.{name}" for name in stage),
        "sparsify.micro_batch_size",
        "sparsify.offload",
        "distill.placement",
        "distill.cache_missing",
        *(f"training.{name}" for name in training),
        "evaluation",
        "search",
    }


def test_neutral_keys_of_one_shot_sparsity() -> None:
    assert neutral_keys(SparsifyRecipe) == {
        "output",
        "evaluate",
        "evaluate_tokens",
        "offload",
        "device",
        "micro_batch_size",
        "bos",
    }
