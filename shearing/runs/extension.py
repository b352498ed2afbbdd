"""Another way on from a checkpoint of a run: a decay, or more training, as a run of its own in another folder.

A schedule says nothing of its end until its decay begins, so what was trained until then is also the beginning of a
run that decays earlier, or later. Such a run is put together here, up to a checkpoint; from there on it is an
interrupted run, which `run` continues as any other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearing.errors import ShearingError
from shearing.files.durable import flush_folder, flush_tree, write_text
from shearing.runs.recipe import Recipe, load_recipe, overridden
from shearing.runs.run_directory import RunDirectory
from shearing.settings.neutral import is_neutral, neutral_keys
from shearing.settings.quantities import Duration
from shearing.training.checkpoints.checkpoints import checkpoints_in, damage_of

MAY_CHANGE = ("duration", "schedule", "decay", "warmup", "final_learning_rate")
"""Keys of `pretrain` that an extension may set, and with one schedule of `prune` too, but for its duration."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A run that begins as another one.

    Attributes:
        directory: its folder.
        step: of continued pretraining, that it goes on from.
        total_steps: of its continued pretraining.
    """

    directory: RunDirectory
    step: int
    total_steps: int


def extend(
    run: RunDirectory,
    *,
    to: Path,
    decay: Duration | None = None,
    step: int | None = None,
    overrides: Sequence[str] = (),
) -> Extension:
    """Put together a run that goes on from a checkpoint of another one's continued pretraining.

    It is taken from the newest checkpoint until which the learning rates are those of the new recipe, so the result is
    the run that had this recipe from the start, bit for bit (unless `mixture.reference` is `online`, which looks at the
    end of the stage from its beginning). Stages before are taken over; files that never change are linked where the
    file system can. The other run is only read.

    Args:
        run: with checkpoints of continued pretraining.
        to: folder of the new run.
        decay: ends the new run with schedule wsd, decaying from the checkpoint on; None: overrides say what it does.
        step: the checkpoint to go on from; None: the newest that can be.
        overrides: `dotted.key=value` on top of the run's recipe.

    Raises:
        ShearingError: no such checkpoint, a key that changes what was before it, or a folder that is not empty.
    """
    if not run.recipe.is_file():
        raise ShearingError(
            "RUN_DIR",
            value=str(run.path),
            allowed="the folder of a run",
            mend="check the path: recipe.yaml is not there",
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ShearingError(
            "NEW_DIR", value=str(to), allowed="a folder that is new or empty", mend="choose another, or remove that one"
        )
    if decay is not None and (decay.fraction is not None or 0 in (decay.steps, decay.tokens)):
        raise ShearingError(
            "--decay",
            value=str(decay),
            allowed="at least one step, in steps or tokens: a share of what is not known yet",
            mend="write '100 steps' or '0.1B tokens'",
        )
    start = _in_steps(load_recipe(run.recipe))
    first, checkpoint, recipe = _choose(run, start, to=to, decay=decay, step=step, overrides=overrides)
    _put_together(run, recipe, checkpoint=checkpoint, to=to)
    total = recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)
    return Extension(directory=RunDirectory(to), step=first, total_steps=total)


def _in_steps(recipe: Recipe) -> dict[str, Any]:
    """A recipe whose past does not depend on how long it goes on: what was a share of pretraining, in steps."""
    data: dict[str, Any] = recipe.model_dump(mode="json")
    rates = recipe.learning_rates("pretrain")
    for stage in recipe.training_stages if recipe.one_schedule else ("pretrain",):
        data[stage] |= {"warmup": f"{rates.warmup_steps} steps", "decay": f"{rates.decay_steps} steps"}
    length = recipe.data.sequence_length
    interval = recipe.pretrain.in_steps(recipe.mixture.pretrain_interval, sequence_length=length)
    data["mixture"]["pretrain_interval"] = f"{max(1, interval)} steps"
    return data


def _choose(
    run: RunDirectory,
    start: dict[str, Any],
    *,
    to: Path,
    decay: Duration | None,
    step: int | None,
    overrides: Sequence[str],
) -> tuple[int, Path, Recipe]:
    """The newest step and checkpoint until which a run of the new recipe is the run that there was, and that recipe."""
    before = Recipe.model_validate(start)
    found = checkpoints_in(run.checkpoints("pretrain"))
    wanted = found if step is None else {at: folder for at, folder in found.items() if at == step}
    for at, checkpoint in reversed(wanted.items()):
        recipe = _recipe(start, to=to, step=at, decay=decay, overrides=overrides)
        _require_past(before, recipe)
        old, new = before.learning_rates("pretrain"), recipe.learning_rates("pretrain")
        longer = recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length) > at
        same_past = all(old.at(done) == new.at(done) for done in range(-new.first_step, at))
        if longer and same_past and damage_of(checkpoint) is None:
            return at, checkpoint, recipe
    stable = before.learning_rates("pretrain").stable_steps
    raise ShearingError(
        "RUN_DIR" if step is None else "--from",
        value=str(run.path) if step is None else step,
        allowed="a run with an undamaged checkpoint until which its learning rates are those of the new one, which "
        f"ends later; the checkpoints of continued pretraining are of steps {', '.join(map(str, found)) or '(none)'}"
        + ("" if stable is None else f", the decay begins after step {stable}"),
        mend="train with pretrain.schedule wsd or constant, and keep checkpoints with pretrain.keep_every",
    )


def _recipe(start: dict[str, Any], *, to: Path, step: int, decay: Duration | None, overrides: Sequence[str]) -> Recipe:
    """The new run's: as it was, but for what the extension says."""
    recipe = Recipe.model_validate(start | {"run_dir": str(to)})
    said = []
    if decay is not None:
        per_step = recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)
        steps = decay.in_steps(tokens_per_step=per_step)
        said.append(f"pretrain.duration={step + steps} steps")
        for stage in recipe.training_stages if recipe.one_schedule else ("pretrain",):
            said += [f"{stage}.schedule=wsd", f"{stage}.decay={steps} steps"]
    return overridden(recipe, overrides=[*said, *overrides])


def _require_past(before: Recipe, recipe: Recipe) -> None:
    """Nothing that has been used is another now, but for lengths and shapes of schedules, whose rates are compared."""
    stages = recipe.training_stages if recipe.one_schedule else ("pretrain",)
    allowed = {f"{stage}.{name}" for stage in stages for name in MAY_CHANGE} - {"prune.duration"}
    earlier, now, neutral = before.flat(), recipe.flat(), neutral_keys(Recipe)
    for name, value in now.items():
        if value != earlier.get(name) and name not in allowed and not is_neutral(name, among=neutral):
            raise ShearingError(
                name,
                value=value,
                allowed=f"{earlier.get(name)}, with which the run began; an extension sets "
                + ", ".join(sorted(allowed)),
                mend="leave it as it was, or start a run of its own",
            )
    hidden, length = None if recipe.distill is None else recipe.distill.hidden, recipe.data.sequence_length
    steps = [each.pretrain.total_steps(sequence_length=length) for each in (before, recipe)]
    if hidden is not None and hidden.decay.fraction is not None and steps[0] != steps[1]:
        raise ShearingError(
            "distill.hidden.decay",
            value=str(hidden.decay),
            allowed="steps or tokens in a run that is extended: the weight fell as in one of its own length",
            mend=f"start with distill.hidden.decay='{recipe.pretrain.total_steps(sequence_length=length)} steps', say",
        )


def _put_together(run: RunDirectory, recipe: Recipe, *, checkpoint: Path, to: Path) -> None:
    """Write the new folder as a whole or not at all."""
    beside = to.with_name(f".{to.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    new = RunDirectory(beside)
    try:
        for stage in ("prune", "compact", "sparsify"):
            if run.folder(stage).is_dir():
                _take_over(run.folder(stage), new.folder(stage), without=run.path / "prune" / "checkpoints")
        _take_over(checkpoint, new.checkpoints("pretrain") / checkpoint.name)
        for path in run.pretrain.glob("*.json*"):
            if path != run.complete("pretrain"):
                shutil.copyfile(path, new.pretrain / path.name)
        write_text(new.recipe, recipe.to_yaml())
        flush_tree(beside)
        if to.exists():
            to.rmdir()
        beside.rename(to)
        flush_folder(to.absolute().parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _take_over(folder: Path, to: Path, *, without: Path | None = None) -> None:
    """Link or copy what is below a folder; logs, which a run goes on writing, are copied."""
    for path in folder.rglob("*"):
        place = to / path.relative_to(folder)
        if not path.is_file() or (without is not None and path.is_relative_to(without)):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix == ".jsonl":
                shutil.copyfile(path, place)
            else:
                os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)
