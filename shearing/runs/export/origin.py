"""What is exported: a checkpoint of a run, the model that a run has so far, or a model's own folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from shearing.errors import ShearingError
from shearing.models.loading import load_config, load_source, require_weights
from shearing.models.stored.companions import folder_of
from shearing.models.stored.stored_model import dtype_of_weights
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME
from shearing.pruning.sparse.stored.trained import masks_beside
from shearing.runs.context import RunContext
from shearing.runs.continuation.moved import recipe_in
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.pretraining.start import Start, moved_masks, result_dtype
from shearing.training.adapters.recipe import AdapterRecipe
from shearing.training.checkpoints.checkpoints import checkpoints_in, damage_of
from shearing.training.checkpoints.pieces import ShardedState

if TYPE_CHECKING:
    from peft import PeftModel

_WHAT = "a run with a checkpoint of continued pretraining or a model, such a checkpoint, a model's folder or a hub name"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A state that a model is made of.

    Attributes:
        title: in words.
        start: the model whose config, companions and masks the result has; without a checkpoint the model itself.
        checkpoint: of continued pretraining, whose weights are taken.
        step: of continued pretraining that it is the state after; None: of none.
        context: of the run that it belongs to; None for a folder or a name.
    """

    title: str
    start: Start
    checkpoint: Path | None = None
    step: int | None = None
    context: RunContext | None = None

    @property
    def name(self) -> str:
        """What it is called elsewhere, where nobody knows the folders here."""
        return Path(self.title).name if self.context is None else self.context.recipe.name

    @property
    def adapters(self) -> AdapterRecipe | None:
        """Those that the checkpoint is of."""
        return None if self.checkpoint is None or self.context is None else self.context.recipe.pretrain.adapters

    @property
    def moved(self) -> Callable[[], Iterator[tuple[str, Tensor]]] | None:
        """Masks of the checkpoint, where they move; None: they are those of `start`."""
        return None if self.checkpoint is None else moved_masks(ShardedState(self.checkpoint))

    def dtype(self) -> torch.dtype:
        """Of the result where nobody says another."""
        if self.context is not None:
            return result_dtype(self.context)
        config = load_config(self.start.source, revision=self.start.revision)
        return dtype_of_weights(self.start.source, config=config)

    def model(self) -> PreTrainedModel | PeftModel:
        """The model as training has it: fp32 on the CPU, adapters beside its weights, in evaluation mode."""
        if self.checkpoint is None:
            return load_source(self.start.source, revision=self.start.revision)
        return self.start.restored(ShardedState(self.checkpoint), adapters=self.adapters).eval()


def open_origin(target: str, *, revision: str | None = None) -> Origin:
    """Find what is meant; no weights are read.

    Args:
        target: folder of a run (its newest whole checkpoint, or the model of its last complete stage), of a checkpoint,
            of a model, or a hub name.
        revision: of a hub name.

    Raises:
        ShearingError: there is nothing of that kind.
    """
    path = Path(target)
    if (path / "recipe.yaml").is_file():
        return _of_run(RunDirectory(path))
    if any(path.glob("shard-*.safetensors")):
        return _of_checkpoint(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ShearingError("model", value=target, allowed=_WHAT, mend="check the path")
    require_weights(target, revision=revision)
    folder = folder_of(target, revision=revision, also=[FILE_NAME, EARLIER_NAME])
    start = Start(target, None if path.is_dir() else revision, folder, masks_beside(folder))
    return Origin(title=target, start=start)


def _of_run(run: RunDirectory) -> Origin:
    found = checkpoints_in(run.checkpoints("pretrain"))
    for step, checkpoint in reversed(found.items()):
        if damage_of(checkpoint) is None:
            return _at(run, step=step, checkpoint=checkpoint)
    context = _context(run)
    for folder in (run.model, run.sparse, run.compact):
        if (folder / "config.json").is_file():
            start = Start(str(folder), None, folder, masks_beside(folder))
            last = _total(context) if folder == run.model else None
            return Origin(title=str(folder), start=start, step=last, context=context)
    raise ShearingError(
        "model",
        value=str(run.path),
        allowed=_WHAT,
        mend="run it further: `shear compact` or `shear run` with its recipe",
    )


def _of_checkpoint(path: Path) -> Origin:
    path = path.resolve()
    stage, run = path.parent.parent, RunDirectory(path.parent.parent.parent)
    if path.parent.name != "checkpoints" or stage.name != "pretrain" or not run.recipe.is_file():
        raise ShearingError(
            "model",
            value=str(path),
            allowed="a checkpoint of continued pretraining, in its run: RUN/pretrain/checkpoints/step-…",
            mend="of mask learning, cut what was learned with `shear compact`, and export the run",
        )
    if damage := damage_of(path):
        raise ShearingError(
            "model", value=f"{path}: {damage}", allowed="a checkpoint that is whole", mend="export one before it"
        )
    return _at(run, step=int(path.name.removeprefix("step-")), checkpoint=path)


def _at(run: RunDirectory, *, step: int, checkpoint: Path) -> Origin:
    context = _context(run)
    return Origin(
        title=f"{run.path}, step {step:,} of {_total(context):,} of continued pretraining",
        start=Start.of(context),
        checkpoint=checkpoint,
        step=step,
        context=context,
    )


def _total(context: RunContext) -> int:
    recipe = context.recipe
    return recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)


def _context(run: RunDirectory) -> RunContext:
    return RunContext(recipe_in(run), console=Console(quiet=True))
