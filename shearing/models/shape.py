"""Sizes of a model, what they cost in parameters, and which sizes an ordinary config accepts.

Legend: L layers, d hidden, m intermediate, H query heads, K KV groups, G = H / K query heads per group, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of
from shearing.models.families import Family
from shearing.models.families.axes import Parameter, Unit, count
from shearing.models.recipe import Sizes, TargetRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


SIZE_NAMES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
EXPERTS = "num_experts"
"""The size that a model with experts has beside those."""
EXPERT_ALIGNMENT = 8
"""Rows of an expert's matrices have to be whole multiples of 16 bytes for transformers' grouped products."""


@dataclass(frozen=True, repr=False)
class Shape:
    """The sizes of a model, and the family that says what they cost.

    Attributes:
        intermediate_size: of an MLP, or of each expert.
        tied: the embedding is the head.
        family: as the model's config has it (`anatomy_of`).
        num_experts: of each MLP; 0: MLPs have none.
        num_experts_per_tok: how many of them a token is computed by.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    family: Family
    num_experts: int = 0
    num_experts_per_tok: int = 0

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """Shape of a config of a supported family."""
        family = anatomy_of(config)
        tied: Any = config.tie_word_embeddings
        return cls(**family.read_sizes(config), tied=bool(tied), family=family)

    def __repr__(self) -> str:
        return f"Shape({', '.join(f'{name}={value}' for name, value in self.facts().items())})"

    @property
    def query_heads_per_group(self) -> int:
        """G = H / K."""
        return self.num_attention_heads // self.num_key_value_heads

    def sizes(self) -> dict[str, int]:
        """The sizes that can be pruned, by their config names: five, and the number of experts if there are any."""
        return {name: getattr(self, name) for name in (*SIZE_NAMES, *([EXPERTS] if self.num_experts else []))}

    def facts(self) -> dict[str, int | bool]:
        """Sizes and what there is, as a record keeps them."""
        attention, mlp = self.family.attention, self.family.mlp
        return {
            **self.sizes(),
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tied": self.tied,
            "qkv_bias": any(attention.has_bias(reader) for reader in attention.readers),
            "output_bias": attention.has_bias(attention.write),
            "mlp_bias": mlp.has_bias(mlp.write),
            "qk_norms": bool(attention.inside),
            **({"num_experts_per_tok": self.num_experts_per_tok} if self.num_experts else {}),
        }

    def units(self) -> dict[Unit, int]:
        """Entries of an axis by what they belong to."""
        return {
            "hidden": self.hidden_size,
            "query_heads": self.num_attention_heads * self.head_dim,
            "kv_groups": self.num_key_value_heads * self.head_dim,
            "intermediate": self.intermediate_size,
            "experts": self.num_experts,
            "head": self.head_dim,
            "vocabulary": self.vocab_size,
        }

    def layer_parameters(self) -> tuple[int, int]:
        """Parameters of the attention and of the MLP sub-layer, each with its norms."""
        units = self.units()
        return count(self.family.attention.parameters, units), count(self.family.mlp.parameters, units)

    def outer_parameters(self, *, embeddings: bool = True) -> tuple[Parameter, ...]:
        """Parameters outside the layers; `embeddings=False` leaves out the embedding and the head."""
        embedding, head = self.family.embeddings
        outer = (embedding,) if self.tied else (embedding, head)
        return (*(outer if embeddings else ()), *self.family.final_norm.parameters)

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters; `embeddings=False` leaves out the embedding and the head."""
        outer: int = count(self.outer_parameters(embeddings=embeddings), self.units())
        return self.num_hidden_layers * sum(self.layer_parameters()) + outer

    def active_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters that a token is computed by: of the experts those that it is sent to; see `num_parameters`."""
        stacks: int = count(self.family.mlp.stacks, self.units())
        idle = 0 if not self.num_experts else stacks - stacks * self.num_experts_per_tok // self.num_experts
        return self.num_parameters(embeddings=embeddings) - self.num_hidden_layers * idle


def config_for(source: PretrainedConfig, *, shape: Shape, attention_layers: Sequence[int]) -> PretrainedConfig:
    """The source's config at another shape; everything else (RoPE, activations, tokens) is kept.

    Where the source's own class refuses the shape, the config is of the first architecture of `Family.holders` that
    computes the same.

    Args:
        source: config of the source model.
        shape: target sizes.
        attention_layers: source layer whose attention each new layer takes, for per-layer settings.

    Raises:
        ValueError: Hugging Face's own validation refuses the combination.
    """
    from transformers import AutoConfig

    values = _values_at(source, shape=shape, attention_layers=attention_layers)
    try:
        return _accepted(type(source).from_dict(values))
    except Exception:  # see `export_error`
        for holder in shape.family.holders:
            if (others := holder(values)) is not None:
                return _accepted(AutoConfig.for_model(**others))
        raise


def _values_at(source: PretrainedConfig, *, shape: Shape, attention_layers: Sequence[int]) -> dict[str, Any]:
    values = source.to_dict()
    for name in shape.family.per_layer:
        if values.get(name):
            values[name] = [values[name][layer] for layer in attention_layers]
    return shape.family.write_values(values, sizes=shape.sizes(), head_dim=shape.head_dim)


def _accepted(config: PretrainedConfig) -> PretrainedConfig:
    validate = getattr(config, "validate_architecture", None)
    if validate is not None:
        validate()
    return config


def other_architecture(shape: Shape, *, source: PretrainedConfig) -> str | None:
    """Hugging Face's class of a model of this shape, where the source's own config refuses it; None where it does not.

    Args:
        shape: one that `export_error` has nothing against.
        source: config of the source model.
    """
    config = config_for(source, shape=shape, attention_layers=range(shape.num_hidden_layers))
    return None if type(config) is type(source) else architecture_name(config)


def architecture_name(config: PretrainedConfig) -> str:
    """Hugging Face's class of a causal language model with this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    architectures: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    name: str = architectures[type(config)].__name__
    return name


def resolve_target(target: Sizes, *, source: PretrainedConfig) -> Shape:
    """Target shape named by a recipe; sizes that it leaves out are the source's.

    Raises:
        ShearingError: a size exceeds the source's, the heads do not divide, or the exported config would be
            refused; the nearest valid sizes are listed. Or the target is a number of parameters.
    """
    if isinstance(target, TargetRecipe) and target.parameters is not None:
        raise ShearingError(
            "parameters",
            value=target.parameters,
            allowed=f"null where a shape is asked for: which sizes make up so many {key('parameters')} is learned",
            mend="name sizes, as hidden_size: 480; for masks, `shearing.pruning.structured.shape_or_budget` takes both",
        )
    have = Shape.of(source)
    wanted = {name: getattr(target, name) for name in (*SIZE_NAMES, EXPERTS)}
    _require_experts(wanted[EXPERTS], have=have)
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
                name,
                value=value,
                allowed=f"1 to {limit}, the source's size",
                mend=f"set {key(name)}={limit} to leave it as it is, or something smaller",
            )
    if shape.num_experts < have.num_experts_per_tok:
        raise ShearingError(
            EXPERTS,
            value=shape.num_experts,
            allowed=f"{have.num_experts_per_tok} to {have.num_experts}: each token is computed by "
            f"{have.num_experts_per_tok} experts (num_experts_per_tok), and stays so",
            mend=f"set {key(EXPERTS)}={have.num_experts_per_tok}, or more",
        )
    _require_aligned(shape, have=have)
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if heads % groups or heads // groups > have.query_heads_per_group:
        valid = [groups * per_group for per_group in range(1, have.query_heads_per_group + 1)]
        raise ShearingError(
            "num_attention_heads",
            value=heads,
            allowed=f"with num_key_value_heads={groups}: {_nearest(valid, heads)}",
            mend=f"every one of the {groups} KV groups keeps the same 1 to {have.query_heads_per_group} query heads: "
            f"set {key('num_attention_heads')}={_nearest(valid, heads)[0]}",
        )
    _refuse_unexportable(shape, source=source)
    return shape


def _require_experts(wanted: int | None, *, have: Shape) -> None:
    if wanted is not None and not have.num_experts:
        raise ShearingError(
            EXPERTS,
            value=wanted,
            allowed=f"nothing: the MLPs of this {have.family.model_type} are not made of experts",
            mend=f"remove {key(EXPERTS)}",
        )


def _require_aligned(shape: Shape, *, have: Shape) -> None:
    """Widths that experts read and write, as transformers' product for all experts at once wants them."""
    for name in ("hidden_size", "intermediate_size") if shape.num_experts else ():
        size = getattr(shape, name)
        if size != getattr(have, name) and size % EXPERT_ALIGNMENT:
            near = max(EXPERT_ALIGNMENT, round(size / EXPERT_ALIGNMENT) * EXPERT_ALIGNMENT)
            raise ShearingError(
                name,
                value=size,
                allowed=f"multiples of {EXPERT_ALIGNMENT} in a model with experts, whose products transformers cannot "
                "compute otherwise",
                mend=f"set {key(name)}={near}",
            )


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
    grouped = have.query_heads_per_group > 1
    groups = shape.num_key_value_heads
    counts = range(groups, have.num_attention_heads + 1, groups) if grouped else range(1, have.num_attention_heads + 1)
    heads = [
        count
        for count in counts
        if export_error(
            dataclasses.replace(shape, num_attention_heads=count, num_key_value_heads=groups if grouped else count),
            source=source,
        )
        is None
    ]
    raise ShearingError(
        "hidden_size",
        value=shape.hidden_size,
        allowed=f"what {type(source).__name__} accepts with {shape.num_attention_heads} heads: "
        f"hidden_size {_nearest(widths, shape.hidden_size)}"
        + (f", or num_attention_heads {_nearest(heads, shape.num_attention_heads)} at this width" if heads else ""),
        mend=f"set {key('hidden_size')}={_nearest(widths, shape.hidden_size)[0]} ({message})"
        if widths
        else f"choose other sizes ({message})",
    )


def export_error(shape: Shape, *, source: PretrainedConfig, own: bool = False) -> str | None:
    """What Hugging Face's config validation says against a shape, or None when it accepts it.

    Args:
        shape: sizes to write.
        source: config of the source model.
        own: the source's own class has to accept it, not another that computes the same.
    """
    layers = range(shape.num_hidden_layers)
    try:
        if own:
            values = _values_at(source, shape=shape, attention_layers=layers)
            config = _accepted(type(source).from_dict(values))
        else:
            config = config_for(source, shape=shape, attention_layers=layers)
    except Exception as error:  # noqa: BLE001 - the hub's validators raise classes of their own, not ValueError
        return str(error).strip().splitlines()[-1].strip()
    held = Shape.of(config)
    if type(config) is not type(source):
        held = dataclasses.replace(held, family=shape.family)
    if held != shape:
        return f"{type(source).__name__} cannot hold head_dim={shape.head_dim} beside these sizes"
    return None


def _nearest(values: Sequence[int], wanted: int, *, count: int = 4) -> list[int]:
    return sorted(values, key=lambda value: (abs(value - wanted), value))[:count]
