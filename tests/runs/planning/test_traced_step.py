"""A step measured without memory: of many layers from few, and as arithmetic has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from shearing.models.shape import Shape
from shearing.objectives.recipe import DistillRecipe
from shearing.runs.planning.memory import Checkpointing, Layerwise, Listening, Sharding, Workload
from shearing.runs.planning.step import traced_step
from shearing.runs.planning.step.estimate import estimate
from shearing.runs.planning.step.live_memory import LiveMemory
from shearing.runs.planning.step.traced_step import NotTraceable, StepModel, Taught, measure, traced_moments

GRANULARITIES = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")
WORKLOAD = Workload(
    micro_batch_size=5,
    micro_batches=1,
    sequence_length=64,
    bf16=True,
    checkpointing="full",
    chunk_tokens=64,
    masked=True,
)
SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    tie_word_embeddings=False,
)
LLAMA_2_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=32000,
    tie_word_embeddings=False,
)
QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)


def test_what_is_alive_is_counted() -> None:
    weight = torch.ones(8, 4)
    with LiveMemory([weight]) as live:
        cast = weight.to(torch.bfloat16)  # 64 bytes
        product = weight @ weight.T  # 256 bytes
        view = product[1:]
        live.mark("both")
        del cast, product, view
        torch.zeros(3)
        live.mark("neither")
    (first, both), (second, neither) = live.intervals()
    assert (first, second) == ("both", "neither")
    assert max(both.alive) == (256, 64, 0)
    assert max(neither.alive) == (12, 0, 0)


@pytest.mark.parametrize(
    ("calls", "others", "expected"),
    [
        ("abcxyd", "abcxyd", [0, 1, 2, 3, 4, 5]),
        ("abcbcd", "abcbcbcd", [0, 1, 2, 5, 6, 7]),  # of the loop bc the first turn and the last
        ("abcxyd", "abcxybcxybcxyd", [0, 9, 10, 11, 12, 13]),
        ("abcxyd", "abcqqd", [0, 1, 2, -1, -1, 5]),
    ],
)
def test_calls_of_loops_with_more_turns_are_found(calls: str, others: str, expected: list[int]) -> None:
    assert traced_step.places(list(calls), list(others)) == expected


def test_a_teacher_s_layers_take_turns() -> None:
    """What one of its layers holds on the way is gone before the next one's, however many there are."""
    distill = DistillRecipe.model_validate({"domains": "all"})
    held = []
    for layers in (3, 12):
        config = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": layers})
        taught = Taught(config=config, distill=distill, dtype=torch.float32)
        moments = traced_moments(StepModel(config=config, taught=taught), workload=WORKLOAD, dtype=torch.float32)
        held.append(next(each.activations for each in moments if each.name == "forward, before the layers"))
    assert held[1] == pytest.approx(held[0], rel=0.01)


@pytest.mark.parametrize(
    ("checkpointing", "masked", "taught", "dtype"),
    [
        ("none", True, False, torch.float32),
        ("full", False, False, torch.bfloat16),
        ("selective", False, True, torch.bfloat16),
        ("full", True, True, torch.float32),
    ],
)
def test_many_layers_and_sequences_follow_from_few(
    checkpointing: Checkpointing, masked: bool, taught: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six layers and five sequences, against the same step traced as it is."""
    workload = dataclasses.replace(WORKLOAD, checkpointing=checkpointing, masked=masked)
    distill = DistillRecipe.model_validate({"domains": "all", "hidden": {}, "temperature": 2.0})
    listening = Taught(config=SMALL, distill=distill, dtype=torch.bfloat16) if taught else None
    model = StepModel(config=SMALL, granularities=GRANULARITIES if masked else (), taught=listening)
    found = traced_moments(model, workload=workload, dtype=dtype)
    # More layers than there are: nothing is left to follow from anything.
    monkeypatch.setattr(traced_step, "_LAYERS", (6, 6))
    monkeypatch.setattr(traced_step, "_few_sequences", lambda *_, **__: 100)
    whole = {each.name: each for each in traced_moments(model, workload=workload, dtype=dtype)}
    assert len(found) > 10
    assert [each.accumulated for each in found] == [whole[each.name].accumulated for each in found]
    ours, theirs = (
        {each.name: each.activations + each.copies + each.loose for each in moments}
        for moments in (found, whole.values())
    )
    assert max(ours.values()) == pytest.approx(max(theirs.values()), rel=0.005)
    # Less exact where less is alive: gradients of masks do not grow with the sequences, and what is between two loops
    # of different lengths has no place.
    assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=0.15)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA_2_7B, {"micro_batch_size": 4, "sequence_length": 4096, "chunk_tokens": 1024}),
        (LLAMA_2_70B, {"micro_batch_size": 1, "sequence_length": 4096, "chunk_tokens": 1024}),
        (QWEN3_4B, {"micro_batch_size": 2, "sequence_length": 2048, "checkpointing": "selective", "masked": False}),
        (SMALL, {"bf16": False, "checkpointing": "none", "micro_batches": 2}),
    ],
    ids=["7B", "70B", "qwen3", "small"],
)
def test_measured_and_by_arithmetic(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    """Two ways to the same figure: within 3 % for every engine, what is measured rather more."""
    workload = dataclasses.replace(WORKLOAD, **changes)
    model = StepModel(config=config, granularities=GRANULARITIES if workload.masked else ())
    ways = [Sharding(processes=8, zero_stage=stage) for stage in (0, 2, 3)]  # type: ignore[arg-type]
    ways.append(Sharding(processes=8, zero_stage=3, layerwise=Layerwise(reshard=True, sums_once=True)))
    for sharding in ways:
        measured = measure(model, workload=workload, sharding=sharding)
        estimated = estimate(model.shape, workload=workload, sharding=sharding)
        assert (measured.traced, estimated.traced) == (True, False)
        assert 0.99 < measured.total / estimated.total < 1.03
        assert measured.optimizer == estimated.optimizer


def test_named_layers_are_a_share_of_all() -> None:
    found = {}
    for layers in (None, "all", [0, 3, 5]):
        hidden = None if layers is None else {"layers": layers}
        distill = DistillRecipe.model_validate({"domains": "all", "hidden": hidden})
        taught = Taught(config=SMALL, distill=distill, dtype=torch.float32)
        moments = traced_moments(StepModel(config=SMALL, taught=taught), workload=WORKLOAD, dtype=torch.float32)
        found[str(layers)] = next(each.activations for each in moments if each.name == "loss")
    assert found["[0, 3, 5]"] == pytest.approx((found["None"] + found["all"]) / 2, rel=0.01)
    assert found["all"] > found["None"]


def test_a_teacher_in_host_memory_is_there_layer_by_layer() -> None:
    held = {}
    for placement in ("replicate", "offload"):
        distill = DistillRecipe.model_validate({"domains": "all", "placement": placement})
        taught = Taught(config=SMALL, distill=distill, dtype=torch.float32)
        moments = traced_moments(StepModel(config=SMALL, taught=taught), workload=WORKLOAD, dtype=torch.float32)
        held[placement] = next(each.activations for each in moments if each.name == "forward, before the layers")
    layer = 4 * sum(Shape.of(SMALL).layer_parameters())
    assert held["offload"] - held["replicate"] == pytest.approx(layer, rel=0.01)


def test_what_cannot_be_traced_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotTraceable

    monkeypatch.setattr(traced_step, "_traced", refuse)
    listening = Listening(shape=Shape.of(SMALL), bf16=True, buffers=2)
    distill = DistillRecipe.model_validate({"domains": "all"})
    model = StepModel(config=SMALL, taught=Taught(config=SMALL, distill=distill, dtype=torch.bfloat16))
    found = measure(model, workload=WORKLOAD, sharding=Sharding(), listening=listening)
    assert found == estimate(model.shape, workload=WORKLOAD, sharding=Sharding(), listening=listening)
    assert not found.traced
