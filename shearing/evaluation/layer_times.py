"""How long one layer takes on this device, by width, MLP and heads, and what that says of models of any depth.

Models of two depths are timed: their difference is that of layers, what is left is of embedding, head and the rest.
Between the sizes that were timed, times are interpolated.

Legend: L layers, d hidden, m intermediate, H query heads.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shearing.evaluation.speed import measure_speed
from shearing.models.shape import Shape, config_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEPTHS = (2, 6)
_DECODED = 8


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of a model, or of a part of one.

    Attributes:
        prompt: milliseconds to read a prompt.
        next_token: milliseconds for one more token, with the prompt in the cache.
    """

    prompt: float
    next_token: float

    def plus(self, other: Times, *, times: float = 1.0) -> Times:
        """What it takes with so many of another."""
        return Times(prompt=self.prompt + times * other.prompt, next_token=self.next_token + times * other.next_token)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table.

    Attributes:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads: of the layer.
        layer: times of one layer.
        rest: of what every model of this width has once.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    layer: Times
    rest: Times


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """The table of a device.

    Attributes:
        entries: for each number of heads, a grid of widths and MLPs.
        context: tokens of the prompt.
        dtype: of the weights.
    """

    entries: Sequence[Entry]
    context: int
    dtype: str

    def is_of(self, shapes: Sequence[Shape], *, context: int, dtype: torch.dtype) -> bool:
        """Whether `measure_layers` of these would time the same."""
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        there, wanted = ({tuple(getattr(each, name) for name in names) for each in of} for of in (self.entries, shapes))
        return there == wanted and (self.context, self.dtype) == (context, _name_of(dtype))

    def of(self, shape: Shape) -> Times:
        """What a model of a shape takes; outside of what was timed it is that of the nearest size."""
        heads = sorted({entry.num_attention_heads for entry in self.entries})
        found = Times(prompt=0.0, next_token=0.0)
        for H, weight in _weights(heads, shape.num_attention_heads):
            found = found.plus(self._with_heads(H, shape=shape), times=weight)
        return found

    def _with_heads(self, heads: int, *, shape: Shape) -> Times:
        grid = {
            (entry.hidden_size, entry.intermediate_size): entry
            for entry in self.entries
            if entry.num_attention_heads == heads
        }
        widths, mlps = (sorted({place[axis] for place in grid}) for axis in (0, 1))
        found = Times(prompt=0.0, next_token=0.0)
        for (d, of_width), (m, of_mlp) in product(
            _weights(widths, shape.hidden_size), _weights(mlps, shape.intermediate_size)
        ):
            entry = grid[d, m]
            whole = entry.rest.plus(entry.layer, times=shape.num_hidden_layers)
            found = found.plus(whole, times=of_width * of_mlp)
        return found

    def to_json(self) -> dict[str, Any]:
        """As a file keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> LayerTimes:
        """What `to_json` gave."""
        entries = [
            Entry(**{**entry, "layer": Times(**entry["layer"]), "rest": Times(**entry["rest"])})
            for entry in payload["entries"]
        ]
        return cls(entries=entries, context=payload["context"], dtype=payload["dtype"])


def measure_layers(
    shapes: Sequence[Shape],
    *,
    config: PretrainedConfig,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> LayerTimes:
    """Time layers of these sizes, with weights by chance.

    Args:
        shapes: a full grid of widths and MLPs for each number of heads; their depth does not matter.
        config: of the source model.
        context: tokens of the prompt, and in the cache when the next token is timed.
        dtype: of the weights.
        device: that is timed.
        advance: called with 1 after each shape.
    """
    entries = []
    kinds, (few, many) = layer_kinds(config), DEPTHS
    first = next(iter(kinds))
    for shape in shapes:
        layers = {"few": [first] * few, **{str(kind): [first] * few + [kind] * (many - few) for kind in kinds}}
        models = {
            name: model_by_chance(
                dataclasses.replace(shape, num_hidden_layers=len(attention)),
                config=config,
                dtype=dtype,
                device=device,
                attention_layers=attention,
            )
            for name, attention in layers.items()
        }
        times = times_of(models, context=context)
        of_first = _between(times["few"], times[str(first)])
        layer = Times(prompt=0.0, next_token=0.0)
        for kind, share in kinds.items():
            layer = layer.plus(_between(times["few"], times[str(kind)]), times=share)
        rest = times["few"].plus(of_first, times=-few)
        entries.append(
            Entry(
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                num_attention_heads=shape.num_attention_heads,
                num_key_value_heads=shape.num_key_value_heads,
                layer=layer,
                rest=Times(prompt=max(0.0, rest.prompt), next_token=max(0.0, rest.next_token)),
            )
        )
        advance(1)
    return LayerTimes(entries=entries, context=context, dtype=_name_of(dtype))


def layer_kinds(config: PretrainedConfig) -> dict[int, float]:
    """One of each kind of layers that a model has, as those that attend through a window, and their share of all."""
    values, shape = config.to_dict(), Shape.of(config)
    settings = [values[name] for name in shape.family.per_layer if values.get(name)]
    found: dict[str, list[int]] = {}
    for layer in range(shape.num_hidden_layers):
        found.setdefault(str([of_layers[layer] for of_layers in settings]), []).append(layer)
    return {layers[0]: len(layers) / shape.num_hidden_layers for layers in found.values()}


def _between(few: Times, many: Times) -> Times:
    """One of the layers that are between the two depths."""
    between = DEPTHS[1] - DEPTHS[0]
    return Times(
        prompt=max(0.0, many.prompt - few.prompt) / between,
        next_token=max(0.0, many.next_token - few.next_token) / between,
    )


def times_of(models: Mapping[str, PreTrainedModel], *, context: int) -> dict[str, Times]:
    """Time whole models, which take turns.

    Args:
        models: by name, on their devices.
        context: tokens of the prompt, and in the cache when the next token is timed.
    """
    speeds = measure_speed(models, prompt_tokens=context, decode_context=context, decode_tokens=_DECODED, repetitions=5)
    return {
        name: Times(prompt=1000 * context / speed.prefill_tokens_per_second, next_token=speed.decode_milliseconds)
        for name, speed in speeds.items()
    }


def model_by_chance(
    shape: Shape,
    *,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention_layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """A model of a shape with weights by chance: only its speed means anything.

    Args:
        shape: of the model.
        config: of the source model.
        dtype, device: of the weights.
        attention_layers: source layer whose settings each layer has; None: spread evenly over the source's.
    """
    depth, of_source = shape.num_hidden_layers, Shape.of(config).num_hidden_layers
    layers = [layer * of_source // depth for layer in range(depth)] if attention_layers is None else attention_layers
    small = config_for(copy.deepcopy(config), shape=shape, attention_layers=layers)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=dtype)
    model.train(False)
    return model


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(values: Sequence[int], value: int) -> list[tuple[int, float]]:
    """The one or two neighbours of a value among ascending ones, with their shares in it."""
    below = max((each for each in values if each <= value), default=values[0])
    above = min((each for each in values if each >= value), default=values[-1])
    if above <= below:
        return [(below if below == above else min(values, key=lambda each: abs(each - value)), 1.0)]
    share = (value - below) / (above - below)
    return [(below, 1 - share), (above, share)]
