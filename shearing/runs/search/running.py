"""One candidate of a search through one round: an ordinary run that goes on, then its loss."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from shearing.errors import ShearingError
from shearing.files.durable import locked, write_json
from shearing.runs.context import RunContext
from shearing.runs.continuation.extension import change
from shearing.runs.continuation.moved import recipe_in
from shearing.runs.race.judging import load_model, losses_of
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.search.candidates import Candidate
from shearing.runs.search.plan import STAGES, SearchFolder, onward_of, recipe_of, steps_of
from shearing.runs.stages.run import run

OF_THE_FOLDER = ("run_dir", "folder", "--output")
"""Fields of errors that are no candidate's fault: a full disk, another process."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What one process does with candidates.

    Attributes:
        recipe: of the search.
        folder: of the search.
        console: where losses are measured in sight; runs say what they say in their logs.
    """

    recipe: Recipe
    folder: SearchFolder
    console: Console

    def advance(self, candidate: Candidate, *, number: int) -> bool:
        """Bring a candidate to the end of a round and write down what it is worth; False if another process does.

        Args:
            candidate: which one.
            number: of the round, from 1.

        Raises:
            ShearingError: something that is no candidate's fault.
            Interrupted: a signal asked to stop.
        """
        with contextlib.ExitStack() as claim:
            try:
                claim.enter_context(locked(self.folder.of(candidate.name), field="--output"))
            except ShearingError:
                return False
            place = self.folder.record(candidate.name, number=number)
            if not place.is_file():
                write_json(place, self._record(candidate, number=number))
        return True

    def drop_weights(self, candidate: Candidate) -> None:
        """Remove what only a run that goes on needs; its recipe, its metrics and its figures stay."""
        directory = RunDirectory(self.folder.run(candidate.name))
        directory.complete("pretrain").unlink(missing_ok=True)  # first: without its model it is not
        directory.changes.unlink(missing_ok=True)  # run again, it has its keys from the first step on
        for path in (directory.prune, directory.compact, directory.model, directory.checkpoints("pretrain")):
            shutil.rmtree(path, ignore_errors=True)

    def _record(self, candidate: Candidate, *, number: int) -> dict[str, Any]:
        try:
            return self._worth(candidate, number=number)
        except OSError as error:
            if error.errno is not None:  # of the disk; without a number it is transformers', of a model
                raise
            return {"failed": (str(error).strip() or type(error).__name__).splitlines()[0]}
        except ShearingError as error:
            if error.field.partition(" ")[0] in OF_THE_FOLDER:
                raise
            return {"failed": str(error).splitlines()[0]}
        except Exception as error:  # noqa: BLE001 - whatever becomes of one shape, the search goes on and says so
            return {"failed": (str(error).strip() or type(error).__name__).splitlines()[0]}

    def _worth(self, candidate: Candidate, *, number: int) -> dict[str, Any]:
        directory = self._trained(candidate, number=number)
        context = RunContext(recipe_in(directory), console=self.console)
        steps = steps_of(self.recipe)
        found: dict[str, Any] = {
            "tokens": steps[number - 1]
            * context.recipe.pretrain.tokens_per_step(sequence_length=context.recipe.data.sequence_length),
            "steps": steps[number - 1],
        }
        if number == 1:
            cut = load_model(directory.compact, context=context)
            found["after_cutting"] = losses_of(cut, context=context, split="validation")
            del cut
        model = load_model(directory.model, context=context)
        found["validation"] = losses_of(model, context=context, split="validation")
        if found["validation"]["mean"] is None:
            raise ArithmeticError("the loss after training is no number")
        if number == len(steps):
            found["test"] = losses_of(model, context=context)
        found["seconds"] = round(sum(_seconds_of(directory)), 3)
        return found

    def _trained(self, candidate: Candidate, *, number: int) -> RunDirectory:
        """The run of a candidate, trained to the end of a round from wherever it is."""
        directory = RunDirectory(self.folder.run(candidate.name))
        wanted = recipe_of(self.recipe, candidate, number=number, folder=self.folder)
        there = recipe_in(directory) if directory.recipe.is_file() else wanted
        self._run(there, candidate=candidate)
        if _total(there) < _total(wanted):  # also where it was killed, or failed, before its recipe was the longer one
            change(directory, overrides=onward_of(self.recipe, number=number))
            self._run(recipe_in(directory), candidate=candidate)
        steps = directory.read_complete("pretrain")["steps"]
        if steps != _total(wanted):
            raise RuntimeError(
                f"trained for {steps} steps, not the {_total(wanted)} of round {number}: remove {directory.path} "
                "and add --retry-failed"
            )
        # Of the source's size, and read by nothing any more.
        shutil.rmtree(directory.checkpoints("prune"), ignore_errors=True)
        (directory.prune / "model.safetensors").unlink(missing_ok=True)
        return directory

    def _run(self, recipe: Recipe, *, candidate: Candidate) -> None:
        """Train what the recipe of a candidate's folder says, unless it is there."""
        directory = RunDirectory(recipe.run_dir)
        for aside in directory.path.glob("model-step-*"):  # of the round before
            shutil.rmtree(aside)
        if not directory.is_complete("pretrain"):
            with self.folder.log(candidate.name).open("a", encoding="utf-8") as log:
                run(recipe, stages=STAGES, console=Console(file=log, width=120))


def _total(recipe: Recipe) -> int:
    return recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)


def _seconds_of(directory: RunDirectory) -> Iterator[float]:
    """Of the steps of training, those of processes that were killed included."""
    for line in map(json.loads, directory.metrics("pretrain").read_text(encoding="utf-8").splitlines()):
        if "event" not in line:
            yield line["seconds"]
