"""What continued pretraining starts from: the sparse model of the run, the cut one, or the source itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shearing.models.loading import load_config, skeleton
from shearing.models.stored.companions import folder_of
from shearing.models.stored.saving import DTYPES
from shearing.models.stored.stored_model import dtype_of_weights
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME, read_masks
from shearing.pruning.sparse.stored.trained import masks_beside
from shearing.runs.context import RunContext
from shearing.training.checkpoints.pieces import WEIGHT, ShardedState
from shearing.training.checkpoints.state import seed_random
from shearing.training.lora import add_adapters, merge_adapters
from shearing.training.recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Start:
    """A model to train.

    Attributes:
        source, revision: its folder, or its name and revision on the hub.
        folder: where its config, tokenizer and masks are.
        masks: of a sparse model; None for a dense one.
    """

    source: str
    revision: str | None
    folder: Path
    masks: Path | None

    @classmethod
    def of(cls, context: RunContext) -> Start:
        """What the stages before have left.

        Raises:
            ShearingError: masks without manifest, or the other way round.
        """
        recipe, run = context.recipe, context.directory
        source, revision = recipe.model.source, recipe.model.revision
        for stage, made in (("compact", run.compact), ("sparsify", run.sparse)):
            if stage in recipe.stages:
                source, revision = str(made), None
        folder = folder_of(source, revision=revision, also=[FILE_NAME, EARLIER_NAME])
        return cls(source, revision, folder, masks_beside(folder))

    def kept(self, *, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names of masked weights, after a prefix, and their bool masks, one at a time; nothing for a dense model."""
        if self.masks is not None:
            for name, mask in read_masks(self.masks):
                yield prefix + name, mask

    def adapt(self, model: PreTrainedModel, *, lora: LoraRecipe, seed: int) -> PeftModel:
        """Put adapters into a model of this kind, in place.

        Raises:
            ShearingError: peft is not installed, or no layer has such a name.
        """
        seed_random(seed)
        return add_adapters(
            model,
            masks=self.kept(),
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets,
        )

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, its config as it is stored."""
        config = load_config(self.source, revision=self.revision)
        uses_cache = config.use_cache
        model = skeleton(config)
        model.config.use_cache = uses_cache
        return model

    def weights(self, state: ShardedState) -> Iterator[tuple[str, Tensor]]:
        """The weights of a checkpoint of this model one after the other, fp32 on the CPU."""
        for name, weight in state.whole(WEIGHT):
            yield name.removeprefix(PARAMETER_PREFIX), weight

    @torch.no_grad()
    def restored(self, state: ShardedState, *, lora: LoraRecipe | None) -> PreTrainedModel | PeftModel:
        """The model with the weights of a checkpoint as training has it, fp32 on the CPU; adapters are beside it."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.source, revision=self.revision, dtype=torch.float32
        )
        adapted = None if lora is None else self.adapt(model, lora=lora, seed=0)
        for name, weight in self.weights(state):
            model.get_parameter(name).copy_(weight)
        return model if adapted is None else adapted

    @torch.no_grad()
    def merged(self, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
        """The plain model of what `restored` gave, which is not to be used afterwards.

        Raises:
            ShearingError: a weight that a mask drops is not 0 after merging.
        """
        return model if isinstance(model, PreTrainedModel) else merge_adapters(model, masks=self.kept())


def result_dtype(context: RunContext) -> torch.dtype:
    """Of the final model's weights, from which nothing is trained on."""
    model = context.recipe.model
    if model.save_dtype == "source":
        return dtype_of_weights(model.source, config=context.config)
    return DTYPES[model.save_dtype]
