"""The source model of a run: how it is loaded, and the losses that it sets as reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from shearing.data.corpus.corpus import Corpus
from shearing.data.mixture.reference import resolve_reference
from shearing.files.durable import read_json, write_json
from shearing.models.loading import load_config, load_source, skeleton
from shearing.progress import activity
from shearing.runs.recipe import Recipe, TrainingStage
from shearing.runs.stages.training_task import heldout_tokens, measure_heldout
from shearing.training.device import resolve_device


def load_whole_or_skeleton(recipe: Recipe, *, source: str, revision: str | None, whole: bool) -> PreTrainedModel:
    """A model with fp32 weights, or without any, which the engine then brings over from the main process.

    Args:
        recipe: says on which device and with which attention.
        source, revision: of the model.
        whole: with its weights.

    Raises:
        ShearingError: see `load_source`.
    """
    attention, device = recipe.model.attn_implementation, resolve_device(recipe.training)
    if not whole:
        return skeleton(load_config(source, revision=revision), attn_implementation=attention, device=device)
    return load_source(source, revision=revision, attn_implementation=attention, device=device, dtype=torch.float32)


def reference_losses(
    recipe: Recipe,
    *,
    stage: TrainingStage,
    source: Callable[[], PreTrainedModel],
    path: Path,
    corpus: Corpus,
    console: Console,
) -> dict[str, float]:
    """Reference loss of each domain, resolved once per run; none where domain weights are constant.

    Args:
        recipe: what to do.
        stage: the first that trains.
        source: gives the source model; called if its own losses are the reference and have not been measured.
        path: file (JSON) that keeps them.
        corpus: whose held-out text is read.
        console: where progress goes.
    """
    if recipe.mixture.update == "constant":
        return {}

    def measure() -> dict[str, float]:
        model, total = source(), heldout_tokens(recipe, corpus=corpus)
        with activity("held-out losses of the source", total=total, console=console) as advance:
            return measure_heldout(recipe, stage=stage, model=model, corpus=corpus, advance=advance)

    if not path.is_file():
        write_json(path, resolve_reference(recipe.mixture, domains=corpus.domains, measure_source=measure))
    return read_json(path)
