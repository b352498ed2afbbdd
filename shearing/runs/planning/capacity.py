"""Whether the GPUs at hand can hold what a run puts on them, and whether some are left idle: said before loading."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from shearing.errors import ShearingError
from shearing.models.families.axes import count
from shearing.models.shape import Shape
from shearing.runs.planning.hardware import USABLE, Hardware, gpu_of
from shearing.runs.planning.plan import RunPlan, plans, what_would_fit
from shearing.runs.planning.step.stage_plan import StagePlan
from shearing.runs.planning.summary import gigabytes
from shearing.runs.recipe import Recipe, split_batch
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.training.adapters.recipe import SpeftRecipe

_USUAL_MFU = 0.4  # for times, of which nothing is said here
_CHOICE = "choosing weights for"


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The GPUs of a machine.

    Attributes:
        name: what the driver calls them.
        memory: bytes of one.
        count: how many.
    """

    name: str
    memory: int
    count: int

    @classmethod
    def here(cls, device: torch.device) -> Devices | None:
        """Those of this machine, of the kind of `device`; None where that is no GPU."""
        if device.type != "cuda":
            return None
        properties = torch.cuda.get_device_properties(device)
        return cls(name=properties.name, memory=properties.total_memory, count=torch.cuda.device_count())

    def under(self, *, processes: int) -> Hardware:
        """What to plan for, where each of so many processes has one."""
        return Hardware(processes=processes, name=self.name, gpu=gpu_of(self.name), memory=self.memory, mfu=_USUAL_MFU)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What is to be said of the GPUs.

    Attributes:
        unfit: why they cannot hold the run; None: they can.
        notes: what else, a sentence each.
    """

    unfit: ShearingError | None
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _Need:
    """Bytes that a moment of a run wants of one GPU, and whether that much is sure."""

    run: str
    what: str
    memory: int
    certain: bool


def capacity(recipe: Recipe, *, stages: Collection[Stage], processes: int, devices: Devices) -> Capacity:
    """Compare what stages hold with what there is.

    Args:
        recipe: of the run.
        stages: those that are about to run.
        processes: of all hosts together, one on each GPU.
        devices: of this machine; other hosts are taken to have the same.

    Raises:
        ShearingError: see `plan`.
    """
    runs = plans(recipe, hardware=devices.under(processes=processes), stages=stages)
    last = runs[-1][0]
    needs = [
        need
        for each, made in runs
        for need in _needs(each, made=made, evaluates=each is last and "evaluate" in stages, one_of=len(runs))
    ]
    beyond = [need for need in needs if need.memory > devices.memory]
    refused = [need for need in beyond if need.certain]
    tight = [need for need in needs if USABLE * devices.memory < need.memory <= devices.memory]
    there = gigabytes(devices.memory)
    notes = [f"perhaps too large: {_in_words(need)} of {there}" for need in beyond if not need.certain]
    notes += [
        f"tight: {_in_words(need)} of {there}, and about a tenth goes to CUDA's context, workspaces and fragmentation"
        for need in tight
    ]
    if runs[-1][1].stages:  # nothing else is shared out
        notes += _idle(recipe, stages=stages, processes=processes, devices=devices)
    unfit = None
    if refused:
        # Of a cascade the first that is too large: those after it are smaller.
        made = next(made for _, made in runs if made.name == refused[0].run)
        unfit = ShearingError(
            "training.engine",
            value=f"{recipe.training.engine} on {processes} x {devices.name}",
            allowed=f"what fits into the {there} of one GPU: " + "; ".join(_in_words(need) for need in refused),
            mend=f"{_mend(recipe, made=made, stages=stages, refused=refused, processes=processes, devices=devices)}; "
            "training.memory_check=warn starts it all the same",
        )
    return Capacity(unfit=unfit, notes=notes)


def _needs(recipe: Recipe, *, made: RunPlan, evaluates: bool, one_of: int) -> Iterator[_Need]:
    """The moments at which a GPU holds most: loading, choices, steps of the training stages, evaluation."""
    run, of = made.name, "" if one_of == 1 else f" of {made.name}"
    for each in made.stages:
        # The teacher is beside it, whole unless layers of it are elsewhere.
        heard = each.listening
        memory = loaded(each.shape, recipe=recipe, made=made)
        memory += 0 if heard is None else heard.loaded
        yield _Need(run=run, what=f"loading for {each.stage}{of}", memory=memory, certain=_is_known(made, each))
        speft = recipe.pretrain.adapters
        if each.stage == "pretrain" and isinstance(speft, SpeftRecipe):
            memory = weighed(each.shape, settings=speft, recipe=recipe, made=made)
            if not RunDirectory(recipe.run_dir).salient.is_file():
                yield _Need(run=run, what=f"{_CHOICE} {each.stage}{of}", memory=memory, certain=_is_known(made, each))
        step = each.held(made.choice).total
        # Adapters, compiled layers and a stage of no steps take less than is counted.
        certain = _is_known(made, each) and each.steps > 0 and not recipe.training.compile
        certain = certain and not (made.adapters and each.stage == "pretrain")
        yield _Need(run=run, what=f"a step of {each.stage}{of}", memory=step, certain=certain)
    if evaluates:
        memory = max(measured(made), judged(recipe, made=made))
        # Nothing is lost where only the tables are missing: `shear eval` can be typed again for another device.
        yield _Need(run=run, what="evaluation", memory=memory, certain=False)


def loaded(shape: Shape, *, recipe: Recipe, made: RunPlan) -> int:
    """Bytes of weights on a GPU before the engine has them: all in fp32, or what is outside of layers and a layer."""
    if recipe.training.holds_all_in_fp32(bf16=made.precision == torch.bfloat16):
        return _fp32(shape)
    return one_layer(shape)


def one_layer(shape: Shape) -> int:
    """Bytes of what is outside of layers and of a single layer, in fp32."""
    return _fp32(shape) - 4 * (shape.num_hidden_layers - 1) * sum(shape.layer_parameters())


def weighed(shape: Shape, *, settings: SpeftRecipe, recipe: Recipe, made: RunPlan) -> int:
    """Bytes on the main process's GPU when it knows how much each weight matters, before it chooses; at least.

    It has the whole model in fp32, beside the one to be trained where that is not whole, the sums by which weights of
    the targets will be chosen, and for these the gradients of a micro-batch.
    """
    linears = (*shape.family.attention.linears, *shape.family.mlp.linears)
    ends = tuple(f"{target}.weight" for target in settings.targets)
    entries: int = count((each for each in linears if each.name.endswith(ends) and len(each.axes) == 2), shape.units())
    sums = 4 * shape.num_hidden_layers * entries
    memory = _fp32(shape) + sums
    if settings.salience != "magnitude":
        memory += sums + copies(shape, made=made)
    if loaded(shape, recipe=recipe, made=made) < _fp32(shape):
        memory += _fp32(shape) - 4 * shape.num_hidden_layers * sum(shape.layer_parameters())
    return memory


def measured(made: RunPlan) -> int:
    """Bytes of weights on a GPU while losses on test text are measured."""
    source = made.first_source
    if made.hardware.processes > 1:
        return one_layer(source)
    # The source stays where baselines are cut from it.
    return _fp32(source) + _fp32(made.target or made.source) + copies(source, made=made)


def judged(recipe: Recipe, *, made: RunPlan) -> int:
    """Bytes of weights on a GPU while the source answers tasks or writes, or is timed beside the result."""
    source = made.first_source
    if is_shared_out(recipe, made=made):
        of_layers = _fp32(source) - one_layer(source)
        return one_layer(source) + of_layers // made.hardware.processes
    at_work, timed = _fp32(source) + copies(source, made=made), 0
    if recipe.evaluation.speed:
        other = _fp32(made.target or made.source)
        timed = other + (copies(source, made=made) or _fp32(source))  # in the precision of training
    return max(at_work, timed)


def is_shared_out(recipe: Recipe, *, made: RunPlan) -> bool:
    """Whether the source is, when it answers tasks or writes."""
    return recipe.evaluation.shares_out(
        parameters=made.first_source.num_parameters(),
        processes=made.hardware.processes,
        copies=bool(copies(made.first_source, made=made)),
        memory=made.hardware.memory,
    )


def copies(shape: Shape, *, made: RunPlan) -> int:
    """Bytes of what autocast makes of fp32 weights."""
    return 2 * shape.num_parameters() if made.precision == torch.bfloat16 else 0


def _is_known(made: RunPlan, stage: StagePlan) -> bool:
    """Whether the shape is, which a budget leaves open after mask learning."""
    return not made.learned and (made.budget is None or stage.stage == "prune")


def _fp32(shape: Shape) -> int:
    return 4 * shape.num_parameters()


def _in_words(need: _Need) -> str:
    return f"{need.what} takes {gigabytes(need.memory)}"


def _idle(recipe: Recipe, *, stages: Collection[Stage], processes: int, devices: Devices) -> list[str]:
    """What to say of GPUs that no process will use."""
    if processes >= devices.count:
        return []
    most = _most_processes(recipe, stages=stages, devices=devices)
    there = f"idle: {devices.count - processes} of this machine's {devices.count} GPUs"
    return [f"{there}; --gpus {most} starts a process on each of {most}" if most > processes else there]


def _most_processes(recipe: Recipe, *, stages: Collection[Stage], devices: Devices) -> int:
    """As many processes as there are GPUs, or as can share the batches equally."""

    def can_share(count: int) -> bool:
        try:
            for stage in recipe.training_stages:
                if stage in stages:
                    split_batch(recipe, stage=stage, num_processes=count)
        except ShearingError:
            return False
        return True

    return next(count for count in range(devices.count, 0, -1) if count == 1 or can_share(count))


def _mend(
    recipe: Recipe,
    *,
    made: RunPlan,
    stages: Collection[Stage],
    refused: list[_Need],
    processes: int,
    devices: Devices,
) -> str:
    """What to change, with the GPUs of this machine first."""
    if all(need.what.startswith(_CHOICE) for need in refused):
        speft = recipe.pretrain.speft
        lighter = speft is not None and speft.salience != "magnitude"
        more = "take GPUs with more memory"
        return f"pretrain.speft.salience=magnitude takes no gradients; or {more}" if lighter else more
    if any(need.what.startswith("loading") for need in refused) and recipe.training.holds_as == 3:
        return "take GPUs with more memory: a layer, what is outside of layers and a teacher are not shared out"
    most = max(processes, _most_processes(recipe, stages=stages, devices=devices))
    if most > processes:
        runs = plans(recipe, hardware=devices.under(processes=most), stages=stages)
        made = next(each for _, each in runs if each.name == made.name)
    ways = what_would_fit(recipe, made=made)
    if ways is None:
        return "take GPUs with more memory, or more of them"
    if most > processes and not any("--gpus" in way for way in ways):
        ways.append(f"--gpus {most}")
    return " and ".join(ways)
