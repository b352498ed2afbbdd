"""The memory of a training step, measured: the real model and the real objective compute one with fake tensors.

Layers are alike, and so are sequences. So models of two and of three layers are traced, with few sequences and with
one more, and what a step of all layers and all sequences holds follows from the differences. Nothing here knows what a
layer computes: masks, the chunked loss, a teacher and activation checkpointing are those that train.

What depends on the numbers and not only on the sizes (experts that tokens choose) cannot be traced: `NotTraceable`.

Shapes: K traces, C calls of operators, B = 3 kinds of bytes (see `live_memory.Bytes`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from shearing.data.mixture.origins import Origins
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.attention import drop_attention_mask
from shearing.models.correspondence import Correspondence
from shearing.models.loading import skeleton
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape, config_for
from shearing.objectives.objective import PARAMETER_PREFIX, Objective, Parts, objective_of
from shearing.objectives.recipe import DistillRecipe
from shearing.pruning.structured.granularities import as_masks, granularities_of
from shearing.runs.planning.memory import (
    BEFORE_LAYERS,
    LOSS,
    Listening,
    Memory,
    Moment,
    Sharding,
    Workload,
    largest,
    weight_dtype,
)
from shearing.runs.planning.step.estimate import estimate
from shearing.runs.planning.step.live_memory import Interval, LiveMemory
from shearing.training.device import checkpoint_activations, offload_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LAYERS = (2, 3)
"""Of the models that are traced: the first and the last layer are not the same, and one may be between them."""

_Trace = dict[str, Interval]
FloatArray = npt.NDArray[np.float64]


class NotTraceable(Exception):  # noqa: N818  it is caught, and no mistake
    """What the model computes depends on numbers, or on an operator that fake tensors do not have."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A teacher that reads along.

    Attributes:
        config: of the teacher.
        distill: how it is listened to.
        dtype: of its weights.
    """

    config: PretrainedConfig
    distill: DistillRecipe
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class StepModel:
    """What computes a step.

    Attributes:
        config: of the model that is trained.
        attention: its kernel, as `attn_implementation` says it.
        granularities: of the masks on it; none: there are no masks.
        taught: by whom; None: by nobody.
    """

    config: PretrainedConfig
    attention: str = "sdpa"
    granularities: tuple[str, ...] = ()
    taught: Taught | None = None

    @property
    def shape(self) -> Shape:
        """Of the model that is trained."""
        return Shape.of(self.config)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        taught = None
        if self.taught is not None:
            one = self.taught
            taught = (_facts(one.config), one.distill.model_dump_json(), one.dtype)
        return (_facts(self.config), self.attention, self.granularities, taught)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepModel) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _facts(config: PretrainedConfig) -> str:
    """All that a config says, but for where it was found."""
    return json.dumps({name: value for name, value in config.to_dict().items() if name != "_name_or_path"}, default=str)


def measure(model: StepModel, *, workload: Workload, sharding: Sharding, listening: Listening | None = None) -> Memory:
    """Peak memory of a training step of one process; `estimate`'s where the model cannot be traced.

    Args:
        model: what computes it.
        workload: what it computes.
        sharding: what of it this process holds.
        listening: to whom; its weights alone are read here, the rest is traced. None: to nobody.
    """
    shape = model.shape
    try:
        moments = traced_moments(model, workload=workload, dtype=weight_dtype(workload, sharding=sharding))
    except NotTraceable:
        return estimate(shape, workload=workload, sharding=sharding, listening=listening)
    taught = None if listening is None else partial(_weights_of_teacher, listening)
    host = 0 if listening is None else listening.host
    found = largest(moments, shape=shape, workload=workload, sharding=sharding, teacher=taught, host=host)
    return dataclasses.replace(found, traced=True)


def _weights_of_teacher(listening: Listening, moment: str) -> int:
    return listening.loaded if moment == BEFORE_LAYERS and listening.shared_by is not None else listening.weights


def traced_moments(model: StepModel, *, workload: Workload, dtype: torch.dtype) -> list[Moment]:
    """The moments of a step's last micro-batch at which memory can be largest.

    Args:
        model: what computes it.
        workload: what it computes.
        dtype: of the weights that are multiplied; fp32 ones are cast by autocast where products are in bf16.

    Raises:
        NotTraceable: see there.
    """
    if anatomy_of(model.config).mlp.experts is not None:
        raise NotTraceable("which tokens an expert has is not known before its router has run")
    found = _whole_step(model, workload=workload, dtype=dtype)
    taught = model.taught
    if taught is not None and taught.distill.hidden is not None and not isinstance(taught.distill.hidden.layers, str):
        # Layers that are named are a share of all: matched streams are of one size.
        layers = model.shape.num_hidden_layers
        share = min(len(set(taught.distill.hidden.layers)), layers) / layers
        none, every = (_whole_step(each, workload=workload, dtype=dtype) for each in _matched(model))
        found = [_between(one, other, share=share) for one, other in zip(none, every, strict=True)]
    total = model.shape.num_parameters()
    if workload.micro_batches > 1:
        found = [dataclasses.replace(moment, accumulated=total) for moment in found]
    return [*found, Moment(name="optimizer", activations=0, copies=0, accumulated=total, loose=0)]


def _matched(model: StepModel) -> tuple[StepModel, StepModel]:
    """The same with no stream that is matched, and with all of them."""
    taught = model.taught
    assert taught is not None
    assert taught.distill.hidden is not None
    all_layers = taught.distill.hidden.model_copy(update={"layers": "all"})
    ways = [taught.distill.model_copy(update={"hidden": hidden}) for hidden in (None, all_layers)]
    none, every = (dataclasses.replace(model, taught=dataclasses.replace(taught, distill=way)) for way in ways)
    return none, every


def _between(one: Moment, other: Moment, *, share: float) -> Moment:
    """What is that share of the way from one to the other."""

    def mean(first: int, second: int) -> int:
        return round(first + share * (second - first))

    return dataclasses.replace(
        one,
        activations=mean(one.activations, other.activations),
        copies=mean(one.copies, other.copies),
        loose=mean(one.loose, other.loose),
    )


def _whole_step(model: StepModel, *, workload: Workload, dtype: torch.dtype) -> list[Moment]:
    """Of all layers and sequences, a moment for each interval: a sum of traces, each so many times.

    What a layer adds of activations grows with the sequences; what it adds of weights and gradients does not.
    """
    shape, sequences = model.shape, workload.micro_batch_size
    layers, (two, three) = shape.num_hidden_layers, _LAYERS
    few, start = _few_sequences(shape, workload=workload), layers if layers <= three else two
    exact = sequences <= few + 1
    traced = sequences if exact else few
    sizes, times = [(start, traced)], [[1.0, 1.0]]
    if not exact:
        sizes.append((start, few + 1))
        times.append([sequences - few, sequences - few])
    if layers > start:
        sizes.append((three, traced))
        times.append([(layers - two) * sequences / traced, layers - two])
    times[0] = [1 - sum(of_other[kind] for of_other in times[1:]) for kind in (0, 1)]
    factors = np.array(times)[:, [0, 1, 1]]  # of activations, copies and gradients
    alike = dataclasses.replace(workload, micro_batches=1, micro_batch_size=1)
    moments = []
    for name, accumulated, traces_KCB in _aligned(model, alike, dtype, tuple(sizes)):
        held_CB = np.einsum("kb,kcb->cb", factors, traces_KCB)
        activations, copies, loose = (round(float(size)) for size in held_CB[held_CB.sum(1).argmax()])
        moments.append(
            Moment(
                name=name,
                activations=activations,
                copies=copies,
                accumulated=round(float(factors[:, 1] @ accumulated)),
                loose=loose,
            )
        )
    return moments


def _few_sequences(shape: Shape, *, workload: Workload) -> int:
    """With so many the loss takes several chunks, and masks are on weights instead of activations, as with any more."""
    return max(workload.chunk_tokens, shape.hidden_size) // workload.sequence_length + 1


@lru_cache(maxsize=256)
def _aligned(
    model: StepModel, workload: Workload, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]
) -> list[tuple[str, FloatArray, FloatArray]]:
    """What is alive after the calls that traces of several sizes (layers, sequences) have in common, by interval.

    Returns:
        Of each interval its name; [K], what has been accumulated in each trace; and [K, C, 3], bytes after each call.
    """
    traces = [_traced(model, workload, dtype, layers, sequences) for layers, sequences in sizes]
    found = []
    for name in traces[0]:
        if not all(name in trace for trace in traces):
            continue
        intervals = [trace[name] for trace in traces]
        places_KC = np.array([places(intervals[0].operators, interval.operators) for interval in intervals])
        common_C = (places_KC >= 0).all(0)
        if common_C.any():
            alive = [np.array(interval.alive, dtype=np.float64) for interval in intervals]
            held_KCB = np.stack([own[of_trace[common_C]] for own, of_trace in zip(alive, places_KC, strict=True)])
            found.append((name, np.array([float(interval.accumulated) for interval in intervals]), held_KCB))
    return found


def places(calls: Sequence[str], others: Sequence[str]) -> list[int]:
    """Of each call the same one among others, -1 where there is none.

    A loop may have more turns there. Its last turn is the same as the last one here, and its first as the first: those
    may hold something that the turns between them do not.
    """
    same = [own == other for own, other in zip(calls, others, strict=False)]
    same_behind = [own == other for own, other in zip(reversed(calls), reversed(others), strict=False)]
    first = next((place for place, is_same in enumerate(same) if not is_same), len(same))
    behind = next((place for place, is_same in enumerate(same_behind) if not is_same), len(same_behind))
    turn, shift = len(calls) - behind, len(others) - len(calls)
    if turn <= first:
        turn = first = max(turn, first - shift)  # one more turn is as long as the difference
    return [place if place < first else place + shift if place >= turn else -1 for place in range(len(calls))]


@lru_cache(maxsize=1024)
def _traced(model: StepModel, workload: Workload, dtype: torch.dtype, layers: int, sequences: int) -> _Trace:
    """One step of a model of so many layers with so many sequences."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _computed(model, workload, dtype, layers, sequences)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise NotTraceable(str(error)) from error


def _computed(model: StepModel, workload: Workload, dtype: torch.dtype, layers: int, sequences: int) -> _Trace:
    student = _fake(model.config, layers=layers, dtype=dtype, attention=model.attention).train()
    drop_attention_mask(student, sequence_length=workload.sequence_length)
    if model.granularities:
        units = granularities_of(model.granularities, source=Shape.of(student.config), target=None)
        masks = as_masks({each.name: torch.ones(each.size, requires_grad=True) for each in units})
        MaskedModel(student).set_masks(masks)
    if workload.checkpointing != "none":
        checkpoint_activations(student, selective=workload.checkpointing == "selective")
    teachers: list[PreTrainedModel] = []
    objective = _objective(model, student=student, workload=workload, teachers=teachers).train()
    held = [tensor for each in (student, *teachers) for tensor in (*each.parameters(), *each.buffers())]
    tokens = torch.zeros(sequences, workload.sequence_length + 1, dtype=torch.int64)
    origins = Origins(domains=torch.zeros(sequences, dtype=torch.int64))
    objective.begin_step(0)
    with LiveMemory(held) as live:
        casts = workload.bf16 and dtype == torch.float32
        with _marked_forward(student, live), torch.autocast("cpu", torch.bfloat16, enabled=casts):
            loss = objective(tokens, None, origins).total
        live.mark(LOSS)
        _mark_backward(objective, live, layers=layers)
        loss.backward()
    return dict(live.intervals())


def _objective(
    model: StepModel, *, student: PreTrainedModel, workload: Workload, teachers: list[PreTrainedModel]
) -> Objective:
    """The objective of a student; its teacher is put among `teachers`."""
    taught, layers = model.taught, student.config.num_hidden_layers

    def teacher() -> PreTrainedModel:
        assert taught is not None
        whole = _fake(taught.config, layers=layers, dtype=taught.dtype, attention=model.attention)
        drop_attention_mask(whole, sequence_length=workload.sequence_length)
        if taught.distill.placement == "offload":
            offload_layers(whole, device=torch.device("cpu"))
        teachers.append(whole)
        return whole

    width = student.config.hidden_size
    fewer = taught is not None and taught.config.hidden_size != width
    parts = Parts(
        model=student,
        chunk_tokens=workload.chunk_tokens,
        domains=["all"],
        distill=None if taught is None else taught.distill,
        teacher=teacher,
        height=lambda _: 1.0,
        correspondence=Correspondence(layers=tuple(range(layers)), hidden=torch.arange(width) if fewer else None),
        hidden_steps=1,
    )
    return objective_of("language_model" if taught is None else "distillation", parts=parts)


def _fake(config: PretrainedConfig, *, layers: int, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A model of so many layers, whose weights have a size and no memory."""
    shape = dataclasses.replace(Shape.of(config), num_hidden_layers=layers)
    fewer = config_for(config, shape=shape, attention_layers=range(layers))
    model = skeleton(fewer, attn_implementation=attention)
    filled: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                filled[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
            setattr(module, name, filled[id(parameter)])
    return model


@contextmanager
def _marked_forward(model: PreTrainedModel, live: LiveMemory) -> Iterator[None]:
    """Ends an interval where a layer begins, and where the last one ends."""
    layers = decoder_layers(model)

    def enter(place: int, *_: Any) -> None:
        live.mark(f"forward, {_role(place - 1, layers=len(layers))} layer" if place else BEFORE_LAYERS)

    hooks = [layer.register_forward_pre_hook(partial(enter, place)) for place, layer in enumerate(layers)]
    hooks.append(layers[-1].register_forward_hook(lambda *_: live.mark("forward, last layer")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mark_backward(objective: Objective, live: LiveMemory, *, layers: int) -> None:
    """Ends an interval where a parameter has its gradient, and lets go of that; the first one is of the loss itself."""
    prefix = f"{PARAMETER_PREFIX}{anatomy_of(objective.model.config).layers}."
    names: list[str] = []

    def arrived(name: str, parameter: Tensor) -> None:
        interval = f"backward, {name.removeprefix(PARAMETER_PREFIX)}" if names else f"{LOSS}, backward"
        if names and name.startswith(prefix):
            place, _, inside = name.removeprefix(prefix).partition(".")
            interval = f"backward, {inside} of the {_role(int(place), layers=layers)} layer"
        names.append(name)
        live.accumulated(parameter, name=interval)

    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(arrived, name))


def _role(place: int, *, layers: int) -> str:
    return "last" if place == layers - 1 else "first" if place == 0 else "middle"
