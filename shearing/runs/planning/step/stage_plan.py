"""What one training stage takes, and the settings that decide what its steps hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from shearing.models.shape import Shape
from shearing.runs.planning.memory import Checkpointing, Layerwise, Listening, Memory, Sharding, Workload, ZeroStage
from shearing.runs.planning.step.traced_step import StepModel, measure
from shearing.runs.recipe import Recipe, TrainingStage
from shearing.training.engines.facts import ENGINES


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that decide what a step holds, beside the micro-batch.

    Attributes:
        zero_stage: DeepSpeed's, or the one that holds what the engine holds; 0: the torch engine.
        checkpointing: `training.activation_checkpointing`.
        offload_optimizer, offload_parameters: whether they are in host memory.
        layerwise: how FSDP2 shares out, where that is the engine.
    """

    zero_stage: ZeroStage
    checkpointing: Checkpointing
    offload_optimizer: bool
    offload_parameters: bool
    layerwise: Layerwise | None

    @classmethod
    def of(cls, recipe: Recipe) -> Choice:
        """The recipe's."""
        training, deepspeed = recipe.training, recipe.training.deepspeed
        holds_as = ENGINES[training.engine].holds_as
        return cls(
            zero_stage=deepspeed.zero_stage if holds_as is None else holds_as,
            checkpointing=training.activation_checkpointing,
            offload_optimizer=deepspeed.offload_optimizer == "cpu",
            offload_parameters=deepspeed.offload_parameters == "cpu",
            layerwise=layerwise_of(recipe) if training.engine == "fsdp2" else None,
        )

    def sharding(self, processes: int) -> Sharding:
        """What it shares out among so many processes."""
        return Sharding(
            processes=processes,
            zero_stage=self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            layerwise=self.layerwise,
        )

    @property
    def offloads(self) -> int:
        """How much of it is in host memory."""
        return int(self.offload_optimizer) + int(self.offload_parameters)

    def shared_by_layers(self, layerwise: Layerwise) -> Choice:
        """The same under FSDP2."""
        return dataclasses.replace(
            self, zero_stage=3, offload_optimizer=False, offload_parameters=False, layerwise=layerwise
        )

    def overrides(self, before: Choice) -> list[str]:
        """What to add to a command to get this choice instead of the one before."""
        changed = []
        shared = self.layerwise
        if shared is not None and before.layerwise is None:
            changed.append("training.engine=fsdp2")
        if shared is not None and not shared.sums_once and (before.layerwise is None or before.layerwise.sums_once):
            changed.append("training.fsdp2.sum_gradients=micro_batch")
        if shared is None and self.zero_stage != before.zero_stage:
            changed += ["training.engine=deepspeed", f"training.deepspeed.zero_stage={self.zero_stage}"]
        if self.checkpointing != before.checkpointing:
            changed.append(f"training.activation_checkpointing={self.checkpointing}")
        if self.offload_optimizer != before.offload_optimizer:
            changed.append("training.deepspeed.offload_optimizer=cpu")
        if self.offload_parameters != before.offload_parameters:
            changed.append("training.deepspeed.offload_parameters=cpu")
        return changed


def layerwise_of(recipe: Recipe) -> Layerwise:
    """How FSDP2 shares out with a recipe's settings."""
    settings = recipe.training.fsdp2
    return Layerwise(reshard=settings.reshard_after_forward, sums_once=settings.sum_gradients == "step")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one training stage takes.

    Attributes:
        stage: which one.
        model: what computes a step.
        sequences: of a step, over all processes; of a stage without steps, a micro-batch of each.
        micro_batch_size: the recipe's; a process with fewer sequences of a step has a smaller one.
        steps: optimiser steps.
        tokens: training tokens.
        workload: what one process computes in a step, with the recipe's settings.
        flops: of training.
        heldout_flops: of the held-out losses that the mixture follows; None where the domains are not known.
        reference_flops: those of them in which the source reads, before the first step.
        teacher_flops: of the model that is listened to.
        seconds: of all; None where the GPU's peak is not known.
        listening: the model that is listened to, as a process holds it; None: there is none.
        processes: that share the work.
        choice: the recipe's.
        layerwise: how FSDP2 would share out.
        disk: bytes of all checkpoints that are there at the same time.
    """

    stage: TrainingStage
    model: StepModel
    sequences: int
    micro_batch_size: int
    steps: int
    tokens: int
    workload: Workload
    flops: float
    heldout_flops: float | None
    reference_flops: float
    teacher_flops: float
    seconds: float | None
    listening: Listening | None
    processes: int
    choice: Choice
    layerwise: Layerwise
    disk: int

    @property
    def shape(self) -> Shape:
        """Of the model it trains."""
        return self.model.shape

    def held(self, choice: Choice) -> Memory:
        """Peak of one process under a choice, otherwise with the recipe's settings."""
        workload = dataclasses.replace(self.workload, checkpointing=choice.checkpointing)
        return measure(
            self.model, workload=workload, sharding=choice.sharding(self.processes), listening=self.listening
        )

    def under_zero(self, zero_stage: ZeroStage) -> Memory:
        """Peak of one process under a stage of ZeRO; 0: under the torch engine."""
        return self.held(dataclasses.replace(self.choice, layerwise=None, zero_stage=zero_stage))

    def under_fsdp2(self) -> Memory:
        """Peak of one process under FSDP2."""
        return self.held(self.choice.shared_by_layers(self.layerwise))


def workload_at(workload: Workload, *, sequences: int, processes: int, micro_batch_size: int) -> Workload:
    """The workload of one of so many processes at another micro-batch."""
    own = sequences // processes
    size = min(micro_batch_size, own)
    return dataclasses.replace(workload, micro_batch_size=size, micro_batches=-(-own // size))
