"""Another way on from a checkpoint of a run: a decay, more training, another rate; in another folder or where it is.

A schedule says nothing of its end until its decay begins, so what was trained until then is also the beginning of a
run that decays earlier, or later: such a branch is the run that had its recipe from the start. Where there is no such
checkpoint, or none is wanted, a run goes on from the newest: what was before it stays and is written down
(`changes`), and keys are others from there on. Either way it is an interrupted run then, which `run` continues as any
other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearing.errors import CombinedShearingError, ShearingError
from shearing.files.durable import flush_folder, flush_tree, read_json, require_writable, write_json, write_text
from shearing.runs.continuation.changes import (
    Change,
    changed_until,
    changes_of,
    onward_keys,
    schedule_keys,
    write_changes,
)
from shearing.runs.continuation.moved import recipe_in
from shearing.runs.recipe import Recipe, overridden
from shearing.runs.run_directory import RunDirectory
from shearing.settings.neutral import is_neutral, neutral_keys
from shearing.settings.quantities import Duration
from shearing.training.callbacks.layer_choice import LayerChoice
from shearing.training.callbacks.mixture_updates import MixtureUpdates
from shearing.training.callbacks.save_checkpoints import left_in
from shearing.training.checkpoints.checkpoints import checkpoints_in, damage_of
from shearing.training.stage import PREFETCHED_STEPS


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
    onward: bool = False,
) -> Extension:
    """Put together a run that goes on from a checkpoint of another one's continued pretraining.

    It is taken from the newest checkpoint until which the learning rates, the updates of domain weights, and what masks
    that move and layers that are chosen have done, are those of the new recipe, so the result is the run that had this
    recipe from the start, bit for bit (unless `mixture.reference` is `online`, which looks at the end of the stage from
    its beginning). Stages before are taken over; files that never change are linked where the file system can. The
    other run is only read.

    Args:
        run: with checkpoints of continued pretraining.
        to: folder of the new run.
        decay: ends the new run with schedule wsd, decaying from the checkpoint on; None: overrides say what it does.
        step: the checkpoint to go on from; None: the newest that can be.
        overrides: `dotted.key=value` on top of the run's recipe.
        onward: from the newest checkpoint, whatever the rates were until there; see `change`.

    Raises:
        ShearingError: no such checkpoint, a key that changes what was before it, or a folder that is not empty, or in
            which nothing can be written.
    """
    _require_run(run, decay=decay)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ShearingError(
            "NEW_DIR", value=str(to), allowed="a folder that is new or empty", mend="choose another, or remove that one"
        )
    require_writable(to, field="NEW_DIR")
    before = recipe_in(run)
    start = before.model_dump(mode="json") if onward else _in_steps(before)
    way = _Way(start | {"run_dir": str(to)}, decay=decay, overrides=overrides, onward=onward)
    first, checkpoint, recipe = _choose(run, way, step=step)
    changes = changes_of(run)
    if onward and (changed := Change.between(before, recipe, step=first)).keys:
        changes.append(changed)
    _put_together(run, recipe, checkpoint=checkpoint, to=to, changes=changes)
    return Extension(directory=RunDirectory(to), step=first, total_steps=_total(recipe))


def change(run: RunDirectory, *, decay: Duration | None = None, overrides: Sequence[str] = ()) -> Extension:
    """Have a run go on from its newest checkpoint with other keys, where it is, finished or not.

    Weights, moments, samples and domain weights go on where they are; a run that was moved goes on in the folder that
    is named. What was trained stays as it was; which keys changed, and at which step, is in pretrain/changes.json and
    on the page about the run. What a finished run has made is kept under names with its step. Masks that had come to
    rest (`ast`) move again where the run is longer by then, from weights of 0 where they had dropped some: what was
    set aside is gone.

    Args:
        run: with checkpoints of continued pretraining.
        decay: ends the run with schedule wsd, decaying from the checkpoint on; None: overrides say what it does.
        overrides: `dotted.key=value` on top of the run's recipe.

    Raises:
        ShearingError: no checkpoint, a key that changes what was before it, nothing left to do, or a run at work.
    """
    _require_run(run, decay=decay)
    with run.locked():
        before = recipe_in(run)
        way = _Way(before.model_dump(mode="json"), decay=decay, overrides=overrides, onward=True)
        first, _, recipe = _choose(run, way, step=None)
        if recipe.run_dir.resolve() != run.path.resolve():
            raise ShearingError(
                "run_dir",
                value=str(recipe.run_dir),
                allowed=f"{before.run_dir}, as it is: the run goes on where it is",
                mend="for a run of its own: shear extend RUN_DIR NEW_DIR --onward",
            )
        changed = Change.between(before, recipe, step=first)
        # In this order, killed anywhere, it is the run that it was or the one that it is to be.
        write_changes(run, [*changes_of(run), *([changed] if changed.keys else [])])
        _set_aside(run, step=_total(before))
        write_text(run.recipe, recipe.to_yaml())
    return Extension(directory=run, step=first, total_steps=_total(recipe))


def _require_run(run: RunDirectory, *, decay: Duration | None) -> None:
    if not run.recipe.is_file():
        raise ShearingError(
            "RUN_DIR",
            value=str(run.path),
            allowed="the folder of a run",
            mend="check the path: recipe.yaml is not there",
        )
    if decay is not None and (decay.fraction is not None or 0 in (decay.steps, decay.tokens)):
        raise ShearingError(
            "--decay",
            value=str(decay),
            allowed="at least one step, in steps or tokens: a share of what is not known yet",
            mend="write '100 steps' or '0.1B tokens'",
        )


def _set_aside(run: RunDirectory, *, step: int) -> None:
    """Keep what a finished run has made, under names with its last step, and have its last stages run again."""
    mark = run.pretrain / f"complete-step-{step:08d}.json"
    if run.is_complete("pretrain"):
        run.complete("pretrain").rename(mark)  # first: without its model the run is not complete
        flush_folder(run.pretrain)
    if not mark.is_file():
        return
    for model in (run.model, run.kept_tokens, run.family):
        if model.is_dir():
            aside = run.path / f"{model.name}-step-{step:08d}"
            shutil.rmtree(aside, ignore_errors=True)  # of the same step
            model.rename(aside)
    evaluation = read_json(run.evaluation) if run.evaluation.is_file() else {"models": {}}
    if "final" in evaluation["models"]:
        write_json(run.path / f"evaluation-step-{step:08d}.json", evaluation)
        for name in [name for name in evaluation["models"] if name == "final" or name.startswith("family-")]:
            del evaluation["models"][name]
        write_json(run.evaluation, evaluation)


def _total(recipe: Recipe) -> int:
    return recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)


def _in_steps(recipe: Recipe) -> dict[str, Any]:
    """A recipe whose past does not depend on how long it goes on: what was a share of pretraining, in steps."""
    data: dict[str, Any] = recipe.model_dump(mode="json")
    rates = recipe.learning_rates("pretrain")
    for stage in recipe.training_stages if recipe.one_schedule else ("pretrain",):
        data[stage] |= {"warmup": f"{rates.warmup_steps} steps", "decay": f"{rates.decay_steps} steps"}
    length = recipe.data.sequence_length
    pretrain = recipe.pretrain

    def steps(duration: Duration, *, least: int = 1) -> str:
        return f"{max(least, pretrain.in_steps(duration, sequence_length=length))} steps"

    data["mixture"]["pretrain_interval"] = steps(recipe.mixture.pretrain_interval)
    if (ast := pretrain.ast) is not None:
        in_steps = {"interval": steps(ast.interval), "ramp": steps(ast.ramp), "freeze": steps(ast.freeze, least=0)}
        data["pretrain"]["ast"] |= in_steps
    if (ist := pretrain.ist) is not None:
        data["pretrain"]["ist"] |= {"interval": steps(ist.interval)}
    return data


@dataclass(frozen=True)
class _Way:
    """How a run is to go on.

    Attributes:
        start: its recipe so far, as plain values.
        decay, overrides, onward: see `extend`.
    """

    start: dict[str, Any]
    decay: Duration | None
    overrides: Sequence[str]
    onward: bool

    def recipe(self, *, step: int) -> Recipe:
        """The recipe from a step on: as it was, but for what was asked for."""
        recipe = Recipe.model_validate(self.start)
        said = []
        if self.decay is not None:
            per_step = recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)
            steps = self.decay.in_steps(tokens_per_step=per_step)
            said.append(f"pretrain.duration={step + steps} steps")
            for stage in recipe.training_stages if recipe.one_schedule else ("pretrain",):
                said += [f"{stage}.schedule=wsd", f"{stage}.decay={steps} steps"]
        return overridden(recipe, overrides=[*said, *self.overrides])

    def may_change(self, recipe: Recipe) -> set[str]:
        """The keys that may be others from a checkpoint on."""
        return onward_keys(recipe) if self.onward else schedule_keys(recipe)


def _choose(run: RunDirectory, way: _Way, *, step: int | None) -> tuple[int, Path, Recipe]:
    """The newest step and checkpoint from which a run may go on that way, and its recipe."""
    before = Recipe.model_validate(way.start)
    settled = changed_until(run)
    found = checkpoints_in(run.checkpoints("pretrain"))
    wanted = found if step is None else {at: folder for at, folder in found.items() if at == step}
    for at, checkpoint in reversed(wanted.items()):
        recipe = way.recipe(step=at)
        _require_past(before, recipe, way=way)
        old, new = (_rates_of(each) for each in (before, recipe))
        first = settled or -recipe.learning_rates("pretrain").first_step
        same_past = way.onward or all(old(done) == new(done) for done in range(first, at))
        longer = _total(recipe) > at >= settled
        whole = longer and same_past and damage_of(checkpoint) is None
        if whole and (way.onward or _is_beginning(checkpoint, at, before, recipe, settled=settled)):
            return at, checkpoint, recipe
        if way.onward and damage_of(checkpoint) is None:
            break  # what came after an older one would be trained anew
    raise _no_checkpoint(run, before, steps=list(found), step=step, way=way)


def _rates_of(recipe: Recipe) -> Callable[[int], tuple[float, ...]]:
    """What a step does by the schedule: its learning rate, and how far it listens to the teacher if that goes by it."""
    rates = recipe.learning_rates("pretrain")
    if recipe.distill is None or recipe.distill.schedule != "learning_rate":
        return lambda step: (rates.at(step),)
    return lambda step: (rates.at(step), rates.height_at(step))


def _is_beginning(checkpoint: Path, at: int, before: Recipe, recipe: Recipe, *, settled: int) -> bool:
    """Whether what goes on around the steps was, until a checkpoint, what it is in the new, longer run.

    What was left out behind the checkpoint's own step is made up for where it is continued, if it says so.
    """
    old, new = (_masks_stay_from(each) for each in (before, recipe))
    # Behind the step from which on they stay, what masks drop is gone, and the step itself chooses out of turn.
    masks = old == new or (old is not None and new is not None and at < min(old, new))
    looks = at < _total(before) or not _looks_at(before, at) or LayerChoice.__name__ in left_in(checkpoint)
    return masks and looks and not _lacks_update(checkpoint, at, before, recipe, settled=settled)


def _masks_stay_from(recipe: Recipe) -> int | None:
    """The step from which on masks that move stay; None: none move."""
    if (ast := recipe.pretrain.ast) is None:
        return None
    return ast.freeze_step(recipe.pretrain, sequence_length=recipe.data.sequence_length)


def _looks_at(recipe: Recipe, step: int) -> bool:
    """Whether what layers are worth is looked at behind a step, unless it is the last."""
    if (ist := recipe.pretrain.ist) is None:
        return False
    every = recipe.pretrain.in_steps(ist.interval, sequence_length=recipe.data.sequence_length)
    return step % max(1, every) == 0


def _lacks_update(checkpoint: Path, at: int, before: Recipe, recipe: Recipe, *, settled: int) -> bool:
    """Whether domain weights were left as they were for the run's end alone, where the new one updates them."""
    if recipe.mixture.update == "constant":
        return False
    every = before.pretrain.in_steps(before.mixture.pretrain_interval, sequence_length=before.data.sequence_length)
    missing = [
        step
        for step in range(settled + 1, at + 1)
        if step % max(1, every) == 0 and _total(before) <= step + PREFETCHED_STEPS < _total(recipe)
    ]
    return any(step < at or MixtureUpdates.__name__ not in left_in(checkpoint) for step in missing)


def _no_checkpoint(
    run: RunDirectory, before: Recipe, *, steps: Sequence[int], step: int | None, way: _Way
) -> ShearingError:
    """That there is none to go on from, and why."""
    there = f"the checkpoints of continued pretraining are of steps {', '.join(map(str, steps)) or '(none)'}"
    stable, stay = before.learning_rates("pretrain").stable_steps, _masks_stay_from(before)
    if way.onward:
        return _no_onward(run, before, steps=steps, step=step, way=way)
    return ShearingError(
        "RUN_DIR" if step is None else "--from",
        value=str(run.path) if step is None else step,
        allowed="a run with an undamaged checkpoint until which its learning rates, and the updates of its domain "
        f"weights, are those of the new one, which ends later; {there}"
        + ("" if stable is None else f", the decay begins after step {stable}")
        + ("" if stay is None else f"; from step {stay} on masks stay, and what they had set aside is gone")
        + (
            ""
            if before.pretrain.ist is None
            else "; the last one has to say that its end left out a look at "
            "what layers are worth (ist), as those of earlier versions do not"
        ),
        mend=("" if stay is None else f"set pretrain.ast.freeze so that masks stay from step {stay} on in it too, or ")
        + "add --onward to go on from the newest with other rates from there on; to have such a checkpoint, train "
        "with pretrain.schedule wsd or constant, and keep checkpoints with pretrain.keep_every"
        + ("" if stay is None else ", from before masks stay"),
    )


def _no_onward(
    run: RunDirectory, before: Recipe, *, steps: Sequence[int], step: int | None, way: _Way
) -> ShearingError:
    """That there is none to go on from with other keys, and why."""
    last = max(steps, default=0)
    from_step = last if step is None else step
    end = _total(way.recipe(step=from_step))
    if not steps:
        allowed = "a run with checkpoints of continued pretraining"
        mend = "change the keys in its recipe: what has not begun takes them as they are"
    elif end <= from_step and from_step in steps:
        newest = "its newest checkpoint" if from_step == last else "that checkpoint"
        allowed = f"a run that trains on behind {newest}: it is of step {from_step}, and pretraining ends at step {end}"
        mend = f"give a longer duration: pretrain.duration='{from_step + _total(before)} steps', say"
    else:
        settled = changed_until(run)
        allowed = "an undamaged checkpoint" if step is not None else "a run with an undamaged checkpoint"
        allowed += f", of step {settled} or later" if settled else ""
        allowed += f"; those of continued pretraining are of steps {', '.join(map(str, steps))}"
        mend = "start a run of its own" if step is None else "name another, or leave --from out, for the newest"
    return ShearingError(
        "RUN_DIR" if step is None else "--from",
        value=str(run.path) if step is None else step,
        allowed=allowed,
        mend=mend,
    )


def _require_past(before: Recipe, recipe: Recipe, *, way: _Way) -> None:
    """Nothing that has been used is another now, but for lengths and shapes of schedules, whose rates are compared."""
    allowed = way.may_change(recipe)
    earlier, now, neutral = before.flat(), recipe.flat(), neutral_keys(Recipe)
    errors = [
        ShearingError(
            name,
            value=value,
            allowed=f"{earlier.get(name)}, with which the run began; an extension sets " + ", ".join(sorted(allowed)),
            mend="add --onward, to go on with it from the newest checkpoint on"
            if not way.onward and name in onward_keys(recipe)
            else "leave it as it was, or start a run of its own",
        )
        for name, value in now.items()
        if value != earlier.get(name) and name not in allowed and not is_neutral(name, among=neutral)
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else CombinedShearingError(errors)
    hidden, steps = None if recipe.distill is None else recipe.distill.hidden, [_total(before), _total(recipe)]
    if not way.onward and hidden is not None and hidden.decay.fraction is not None and steps[0] != steps[1]:
        raise ShearingError(
            "distill.hidden.decay",
            value=str(hidden.decay),
            allowed="steps or tokens in a run that is extended: the weight fell as in one of its own length",
            mend=f"start with distill.hidden.decay='{steps[1]} steps', say",
        )


def _put_together(run: RunDirectory, recipe: Recipe, *, checkpoint: Path, to: Path, changes: list[Change]) -> None:
    """Write the new folder as a whole or not at all."""
    beside = to.with_name(f".{to.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    new = RunDirectory(beside)
    try:
        for stage in ("prune", "compact", "sparsify"):
            if run.folder(stage).is_dir():
                _take_over(run.folder(stage), new.folder(stage), without=run.path / "prune" / "checkpoints")
        _take_over(checkpoint, new.checkpoints("pretrain") / checkpoint.name)
        # What was chosen before the first step cannot be chosen again: the weights are others now.
        chosen = [path for path in (run.family_masks, run.salient, run.input_norms) if path.is_file()]
        for path in (*run.pretrain.glob("*.json*"), *chosen):
            # Of changes the file may name one that was killed before it was made.
            if path != run.changes and not path.name.startswith(run.complete("pretrain").stem):
                shutil.copyfile(path, new.pretrain / path.name)
        if changes:
            write_changes(new, changes)
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
