"""Recipe sections of the training stages and of `training`: how long, how fast, on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from shearing.settings.neutral import Neutral
from shearing.settings.quantities import BatchSize, Duration
from shearing.settings.section import BelowOne, Fraction, Positive, Section
from shearing.training.adapters.recipe import AdapterRecipe, IstRecipe, LoraRecipe, SpeftRecipe, SppRecipe
from shearing.training.engines.facts import ENGINES, EngineName

ScheduleName = Literal["cosine", "wsd", "linear", "constant"]


class StageRecipe(Section):
    """What mask learning and continued pretraining have in common."""

    duration: Duration = Field(description="Length of the stage: '3200 steps' or '0.4B tokens'.")
    batch_size: BatchSize = Field(description="Global batch per step: '32 sequences' or '131072 tokens'.")
    micro_batch_size: Neutral[int] = Field(4, ge=1, description="Sequences per forward pass.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of the weights.")
    schedule: ScheduleName = Field(
        "cosine",
        description="What the learning rate does after the warm-up. cosine, linear: falls to its end; wsd: stays at "
        "the peak and falls linearly in the last stretch, so that `shear extend` can go on from before it; constant: "
        "stays.",
    )
    warmup: Duration = Field(Duration(fraction=0.03), description="Linear warm-up of the learning rate.")
    decay: Duration = Field(Duration(fraction=0.2), description="Last stretch of wsd, in which the rate falls.")
    final_learning_rate: Fraction = Field(
        0.1, description="Learning rate at the end of the schedule, share of the peak; not of constant."
    )
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), description="AdamW betas.")
    epsilon: Positive = Field(1e-8, description="AdamW epsilon.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay of matrices.")
    gradient_clipping: float = Field(1.0, ge=0.0, description="Maximum norm of the weights' gradient; 0: none.")
    validation_interval: Neutral[Duration | None] = Field(
        Duration(fraction=0.1),
        description="Time between two looks at the loss on validation text, where domain weights do not follow it "
        "anyway. As much text as takes a twentieth of the training FLOPs in between, at most "
        "evaluation.tokens_per_domain of each domain. null: none.",
    )
    checkpoint_interval: Neutral[Duration] = Field(Duration(fraction=0.1), description="Time between two checkpoints.")
    checkpoint_minutes: Neutral[Positive | None] = Field(
        30.0,
        description="A checkpoint is written sooner where the last is about to be older than this; looked at whenever "
        "metrics are read (training.log_interval). null: by checkpoint_interval alone.",
    )
    keep_last: Neutral[int] = Field(2, ge=1, description="Checkpoints kept, newest first.")
    keep_every: Neutral[Duration | None] = Field(
        None, description="Checkpoints at multiples of this are written, whatever the interval, and kept for good."
    )

    def tokens_per_step(self, *, sequence_length: int) -> int:
        """Tokens of one global batch.

        Args:
            sequence_length: tokens of a sequence.

        Raises:
            ShearingError: a batch in tokens that is no whole number of sequences.
        """
        return self.batch_size.in_sequences(sequence_length=sequence_length) * sequence_length

    def total_steps(self, *, sequence_length: int) -> int:
        """Optimiser steps of the stage.

        Args:
            sequence_length: tokens of a sequence.

        Raises:
            ShearingError: as `tokens_per_step`.
        """
        return self.duration.in_steps(tokens_per_step=self.tokens_per_step(sequence_length=sequence_length))

    def in_steps(self, duration: Duration, *, sequence_length: int) -> int:
        """Another duration in optimiser steps; a share is of this stage.

        Args:
            duration: as of a warm-up.
            sequence_length: tokens of a sequence.

        Raises:
            ShearingError: as `tokens_per_step`.
        """
        return duration.in_steps(
            tokens_per_step=self.tokens_per_step(sequence_length=sequence_length),
            total_steps=self.total_steps(sequence_length=sequence_length),
        )


class AstRecipe(Section):
    """Masks of a sparse model are chosen anew while its weights are trained (AST, arXiv 2407.20584); N:M alone."""

    interval: Duration = Field(Duration(steps=10), description="Time between two choices.")
    scores: Literal["magnitude", "wanda"] = Field(
        "magnitude",
        description="What is compared in a group. magnitude: |w|; wanda: |w| times the norm of its input, measured "
        "once, on the sparse model as training begins.",
    )
    samples: int = Field(32, ge=1, description="wanda: training sequences that norms are measured on.")
    decay: Fraction = Field(
        6e-5,
        description="Share by which each step shrinks what is dropped, once it is at its height. Published for ten "
        "thousand steps and more: a short stage wants more, if masks are to come to rest.",
    )
    ramp: Duration = Field(Duration(fraction=0.25), description="First stretch, in which the decay rises from 0.")
    freeze: Duration = Field(
        Duration(fraction=0.2), description="Last stretch, in which masks stay, and what they drop is 0 for good."
    )

    def freeze_step(self, stage: StageRecipe, *, sequence_length: int) -> int:
        """The step of a stage from which on masks stay.

        Raises:
            ShearingError: as `StageRecipe.tokens_per_step`.
        """
        total = stage.total_steps(sequence_length=sequence_length)
        return total - min(total, stage.in_steps(self.freeze, sequence_length=sequence_length))


class PretrainRecipe(StageRecipe):
    """Continued pretraining of the cut or sparse model, or of the source itself; zeros of a sparse model stay."""

    optimizer: Literal["carried", "fresh"] = Field(
        "carried",
        description="carried: AdamW keeps what mask learning knew of each weight that was kept, as if there had been "
        "no cut; fresh: it starts anew (paper), which wants a warm-up. Without mask learning it always does.",
    )
    lora: LoraRecipe | None = None
    spp: SppRecipe | None = None
    speft: SpeftRecipe | None = None
    ist: IstRecipe | None = None
    ast: AstRecipe | None = None

    @property
    def adapters(self) -> AdapterRecipe | None:
        """What is trained in place of all weights; None: all are."""
        return self.lora or self.spp or self.speft

    @property
    def carries(self) -> bool:
        """Whether the optimiser's state of mask learning is used; adapters have none."""
        return self.optimizer == "carried" and self.adapters is None


class DeepSpeedRecipe(Section):
    """ZeRO: what of the training state is shared out among the processes."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="0: nothing; 1: optimiser state; 2: gradients too; 3: weights too."
    )
    offload_optimizer: Literal["none", "cpu"] = Field("none", description="Where the optimiser's state is kept.")
    offload_parameters: Literal["none", "cpu"] = Field("none", description="Where idle weights are kept (ZeRO-3).")
    config: Path | dict[str, Any] | None = Field(
        None, description="Further settings in DeepSpeed's own form, inline or a JSON file; they win over the defaults."
    )


class Fsdp2Recipe(Section):
    """FSDP2: weights, gradients and optimiser state are shared out among the processes, layer by layer."""

    reshard_after_forward: bool = Field(
        True,
        description="Whether a layer's weights are let go of behind its forward pass and gathered again for its "
        "backward pass; false: gathered once a micro-batch, and whole on every process in between.",
    )
    sum_gradients: Literal["step", "micro_batch"] = Field(
        "step",
        description="When gradients are summed over the processes. step: once, after every process has added up whole "
        "ones in fp32; micro_batch: after each, so that a process holds its share alone.",
    )


class TrainingRecipe(Section):
    """How steps are computed; none of it changes what is computed beyond rounding."""

    engine: Neutral[EngineName] = Field(
        "torch", description="; ".join(f"{name}: {facts.summary}" for name, facts in ENGINES.items()) + "."
    )
    deepspeed: Neutral[DeepSpeedRecipe] = DeepSpeedRecipe()
    fsdp2: Neutral[Fsdp2Recipe] = Fsdp2Recipe()
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="bf16: products in bf16, of fp32 weights under autocast (torch, ZeRO-0) or of bf16 weights of "
        "which the optimiser has fp32 masters (ZeRO-1 to 3, FSDP2); auto: bf16 where the hardware has it.",
    )
    activation_checkpointing: Neutral[Literal["none", "selective", "full"]] = Field(
        "none",
        description="What the backward pass recomputes in each layer; selective: all but the matrix products and "
        "attention.",
    )
    compile: Neutral[bool] = Field(False, description="torch.compile every decoder layer.")
    device: Neutral[Literal["auto", "cpu", "cuda"]] = Field("auto", description="auto: a GPU if there is one.")
    memory_check: Neutral[Literal["refuse", "warn"]] = Field(
        "refuse", description="What to do where the plan says that a GPU cannot hold the run."
    )
    loss_chunk_tokens: Neutral[int] = Field(1024, ge=1, description="Tokens whose logits exist at the same time.")
    checkpoint_writing: Neutral[Literal["background", "foreground"]] = Field(
        "background",
        description="background: training waits for a copy in host memory alone, and goes on while that is written; "
        "foreground: it waits until the checkpoint is on disk, and a tensor is copied at a time.",
    )
    max_skipped_steps: int = Field(10, ge=1, description="Non-finite steps in a row that stop the run.")
    log_interval: Neutral[int] = Field(
        10, ge=1, description="Steps between two reads of metrics from the device, each of which waits for it."
    )
    trackers: Neutral[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]]] = Field(
        [], description="Where metrics go besides metrics.jsonl; each is a package of its own."
    )
    timeout: Neutral[Positive] = Field(
        1800.0, description="Seconds that a process waits for the others in one exchange."
    )

    @property
    def holds_as(self) -> int:
        """The stage of ZeRO that shares out what the engine shares out."""
        holds_as = ENGINES[self.engine].holds_as
        return self.deepspeed.zero_stage if holds_as is None else holds_as

    def holds_all_in_fp32(self, *, bf16: bool) -> bool:
        """Whether every process has all weights in fp32, as it then does from the start; else they come from files.

        Args:
            bf16: whether products are.
        """
        return self.holds_as == 0 or (self.holds_as < 3 and not bf16)
