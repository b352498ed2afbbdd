"""Recipe sections `model` and `target`: what is pruned, and the shape to reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from shearing.errors import ShearingError, key
from shearing.settings.neutral import Neutral
from shearing.settings.quantities import ParameterCount
from shearing.settings.section import Section


class ModelRecipe(Section):
    """The source model."""

    source: str = Field(description="Folder or hub name of a Hugging Face causal language model.")
    revision: str | None = Field(None, description="Hub revision; only for hub names.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention kernel; sdpa is eager for Gemma 2, whose scores have a cap."
    )
    save_dtype: Neutral[Literal["source", "fp32", "bf16", "fp16"]] = Field(
        "source",
        description="Of the weights in model/, the final model; source: as the source's are stored. "
        "Stages hand over fp32 to each other.",
    )


class Sizes(Section):
    """Sizes by name; unset: as in the model that is cut."""

    num_hidden_layers: int | None = Field(None, ge=1, description="Layers kept.")
    hidden_size: int | None = Field(None, ge=1, description="Width of the residual stream.")
    intermediate_size: int | None = Field(
        None, ge=1, description="Units kept in each MLP; of a model with experts, in each expert."
    )
    num_experts: int | None = Field(
        None, ge=1, description="Experts kept in each MLP of a model that has some: at least those of a token."
    )
    num_attention_heads: int | None = Field(None, ge=1, description="Query heads kept in each layer.")
    num_key_value_heads: int | None = Field(None, ge=1, description="KV groups kept in each layer.")


class TargetRecipe(Sizes):
    """The shape to reach: sizes by name (unset: as in the source), or a parameter budget alone."""

    parameters: ParameterCount | None = Field(
        None, description="Parameter budget (64M, 1.3B), embeddings included; excludes every size above."
    )
    uniform: bool = Field(
        False,
        description="With `parameters`: project the learned sizes onto one size for all layers, "
        "the only kind of result that an ordinary config can hold.",
    )
    multiple_of: int = Field(
        1, ge=1, description="With `uniform`: hidden_size and intermediate_size are multiples of it; 64 suits most."
    )
    vocab_size: Neutral[Annotated[int, Field(ge=1)] | Literal["auto"] | None] = Field(
        None,
        description="Tokens of the final model: `model-kept-tokens/` beside `model/` has the embedding's and head's "
        "rows of those that the corpus uses most, and a tokenizer cut with them; auto: all that it uses. Test text "
        "is not counted. Training and evaluation are with the source's vocabulary, and a budget in `parameters` counts "
        "it.",
    )


def target_contradictions(target: TargetRecipe) -> Iterator[ShearingError]:
    """A budget and sizes at once, neither of them, or `uniform` without a budget."""
    sizes = sorted(Sizes.model_fields)
    given = [name for name in sizes if getattr(target, name) is not None]
    if target.parameters is not None and given:
        yield ShearingError(
            "parameters",
            value=target.parameters,
            allowed="either a budget or sizes by name",
            mend=f"remove {key('parameters')}, or {', '.join(map(key, given))}",
        )
    if target.parameters is None and not given:
        yield ShearingError(
            "target",
            value="empty",
            allowed=f"parameters, or at least one of {', '.join(sizes)}",
            mend="say what to reach, as parameters: 64M",
        )
    if target.uniform and target.parameters is None:
        yield ShearingError(
            "uniform",
            value=True,
            allowed=f"true only with {key('parameters')}: sizes by name are the same in every layer anyway",
            mend=f"remove {key('uniform')}",
        )
    if target.multiple_of > 1 and not target.uniform:
        yield ShearingError(
            "multiple_of",
            value=target.multiple_of,
            allowed=f"1 without {key('uniform')}: sizes by name are what they are, and without it there is no one size",
            mend=f"set {key('uniform')}=true with {key('parameters')}, or remove {key('multiple_of')}",
        )
