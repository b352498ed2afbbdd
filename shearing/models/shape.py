"""Sizes of a model, what they cost in parameters, and which sizes an ordinary config accepts.

Legend: L layers, d hidden, m intermediate, H query heads, K KV groups, G = H / K query heads per group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from shearing.models.recipe import TargetRecipe


SIZE_NAMES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Shape:
    """Everything the parameter count of a supported family depends on."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norms: bool = False

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """Shape of a config of a supported family."""
        family = anatomy_of(config)
        values: Any = config
        heads = values.num_attention_heads
        attention_bias = bool(getattr(values, "attention_bias", False))
        return cls(
            num_hidden_layers=values.num_hidden_layers,
            hidden_size=values.hidden_size,
            intermediate_size=values.intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=getattr(values, "num_key_value_heads", None) or heads,
            head_dim=getattr(values, "head_dim", None) or values.hidden_size // heads,
            vocab_size=values.vocab_size,
            tied=bool(values.tie_word_embeddings),
            qkv_bias=attention_bias or family.model_type == "qwen2",
            output_bias=attention_bias,
            mlp_bias=bool(getattr(values, "mlp_bias", False)),
            qk_norms=family.qk_norms,
        )

    @property
    def query_heads_per_group(self) -> int:
        """G = H / K."""
        return self.num_attention_heads // self.num_key_value_heads

    def sizes(self) -> dict[str, int]:
        """The five sizes that can be pruned, by their config names."""
        return {name: getattr(self, name) for name in SIZE_NAMES}

    def layer_parameters(self) -> tuple[int, int]:
        """Parameters of the attention and of the MLP sub-layer, each with its norm."""
        d, m, dh = self.hidden_size, self.intermediate_size, self.head_dim
        query, kv = self.num_attention_heads * dh, self.num_key_value_heads * dh
        attention = d + 2 * d * query + 2 * d * kv
        attention += (query + 2 * kv if self.qkv_bias else 0) + (d if self.output_bias else 0)
        attention += 2 * dh if self.qk_norms else 0
        mlp = d + 3 * d * m + (2 * m + d if self.mlp_bias else 0)
        return attention, mlp

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters of the model; `embeddings=False` leaves out the embedding and the head."""
        body = self.num_hidden_layers * sum(self.layer_parameters()) + self.hidden_size
        return body + (self.vocab_size * self.hidden_size * (1 if self.tied else 2) if embeddings else 0)


def config_for(source: PretrainedConfig, *, shape: Shape, attention_layers: Sequence[int]) -> PretrainedConfig:
    """The source's config at another shape; everything else (RoPE, activations, tokens) is kept.

    Args:
        source: config of the source model.
        shape: target sizes.
        attention_layers: source layer whose attention each new layer takes, for per-layer settings.

    Raises:
        ValueError: Hugging Face's own validation refuses the combination.
    """
    values = source.to_dict()
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][layer] for layer in attention_layers]
    values.update(shape.sizes())
    if "head_dim" in values or shape.head_dim != shape.hidden_size // shape.num_attention_heads:
        values["head_dim"] = shape.head_dim
    config: PretrainedConfig = type(source).from_dict(values)
    return config


def resolve_target(target: TargetRecipe, *, source: PretrainedConfig) -> Shape:
    """Target shape named by a recipe; sizes that it leaves out are the source's.

    Raises:
        ShearingError: a size exceeds the source's, the heads do not divide, or the exported config would be
            refused; the nearest valid sizes are listed.
    """
    have = Shape.of(source)
    wanted = {name: getattr(target, name) for name in SIZE_NAMES}
    if wanted["num_attention_heads"] is not None and wanted["num_key_value_heads"] is None:
        mha = have.num_attention_heads == have.num_key_value_heads
        wanted["num_key_value_heads"] = wanted["num_attention_heads"] if mha else have.num_key_value_heads
    if wanted["num_key_value_heads"] is not None and wanted["num_attention_heads"] is None:
        wanted["num_attention_heads"] = wanted["num_key_value_heads"] * have.query_heads_per_group
    shape = dataclasses.replace(have, **{name: value for name, value in wanted.items() if value is not None})

    for name, value in shape.sizes().items():
        limit = getattr(have, name)
        if value > limit:
            raise ShearingError(
                f"target.{name}",
                value=value,
                allowed=f"1 to {limit}, the source's size",
                mend=f"set target.{name}={limit} to leave it as it is, or something smaller",
            )
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if heads % groups or heads // groups > have.query_heads_per_group:
        valid = [groups * per_group for per_group in range(1, have.query_heads_per_group + 1)]
        raise ShearingError(
            "target.num_attention_heads",
            value=heads,
            allowed=f"with num_key_value_heads={groups}: {_nearest(valid, heads)}",
            mend=f"every one of the {groups} KV groups keeps the same 1 to {have.query_heads_per_group} query heads: "
            f"set target.num_attention_heads={_nearest(valid, heads)[0]}",
        )
    _refuse_unexportable(shape, source=source)
    return shape


def _refuse_unexportable(shape: Shape, *, source: PretrainedConfig) -> None:
    message = export_error(shape, source=source)
    if message is None:
        return
    have = Shape.of(source)
    widths = [
        width
        for width in range(shape.num_attention_heads, have.hidden_size + 1)
        if export_error(dataclasses.replace(shape, hidden_size=width), source=source) is None
    ]
    heads = [
        count
        for count in range(shape.num_key_value_heads, have.num_attention_heads + 1, shape.num_key_value_heads)
        if export_error(dataclasses.replace(shape, num_attention_heads=count), source=source) is None
    ]
    raise ShearingError(
        "target.hidden_size",
        value=shape.hidden_size,
        allowed=f"what {type(source).__name__} accepts with {shape.num_attention_heads} heads: "
        f"hidden_size {_nearest(widths, shape.hidden_size)}"
        + (f", or num_attention_heads {_nearest(heads, shape.num_attention_heads)} at this width" if heads else ""),
        mend=f"set target.hidden_size={_nearest(widths, shape.hidden_size)[0]} ({message})"
        if widths
        else f"choose other sizes ({message})",
    )


def export_error(shape: Shape, *, source: PretrainedConfig) -> str | None:
    """What Hugging Face's config validation says against a shape, or None when it accepts it."""
    layers = range(shape.num_hidden_layers)
    try:
        config = config_for(source, shape=shape, attention_layers=layers)
        validate = getattr(config, "validate_architecture", None)
        if validate is not None:
            validate()
    except Exception as error:  # noqa: BLE001 - the hub's validators raise classes of their own, not ValueError
        return str(error).strip().splitlines()[-1].strip()
    if Shape.of(config) != shape:
        return f"{type(source).__name__} cannot hold head_dim={shape.head_dim} beside these sizes"
    return None


def _nearest(values: Sequence[int], wanted: int, *, count: int = 4) -> list[int]:
    return sorted(values, key=lambda value: (abs(value - wanted), value))[:count]
