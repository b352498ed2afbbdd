"""Recipe sections of what may be trained in place of all weights, and of the choice of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from shearing.settings.quantities import Duration
from shearing.settings.section import BelowOne, Positive, Section

SalienceName = Literal["gradient", "snip", "fisher", "magnitude"]
UnitName = Literal["weight", "row", "column"]

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraRecipe(Section):
    """Low-rank adapters are trained instead of all weights, and merged in the end (LoRA, arXiv 2106.09685)."""

    rank: int = Field(8, ge=1, description="Of the adapters.")
    alpha: Positive = Field(
        16.0, description="A weight changes by alpha / rank times the product of its adapter's two matrices."
    )
    dropout: BelowOne = Field(
        0.0,
        description="Share of the adapters' inputs zeroed in training; above 0 it costs a second product, and results "
        "depend on the number of processes.",
    )
    targets: list[str] = Field(
        ["q_proj", "v_proj"], min_length=1, description="Linear layers that get one, by the last part of their names."
    )


class SppRecipe(Section):
    """Factors of weights are trained instead of weights, and multiplied in the end (SPP, arXiv 2405.16057)."""

    rank: int = Field(
        16, ge=1, description="Rows of factors; each serves as many outputs, so it divides the outputs of every target."
    )
    scale: Positive = Field(2.0, description="c in w (1 + c a b); as published.")
    dropout: BelowOne = Field(
        0.0,
        description="Share of the inputs zeroed for the change that the factors make; published 0.05. Above 0 it costs "
        "a second product, and results depend on the number of processes.",
    )
    targets: list[str] = Field(
        _LINEAR, min_length=1, description="Linear layers that get them, by the last part of their names."
    )


class SpeftRecipe(Section):
    """The most salient weights are trained and no others (SPEFT, arXiv 2412.13488)."""

    share: float = Field(0.01, gt=0.0, le=1.0, description="Of the weights that are not pruned.")
    salience: SalienceName = Field(
        "gradient",
        description="What a weight is chosen by. gradient: |g| of the mean loss, as good as any by the paper; snip: "
        "|w g|; fisher: mean over sequences of g²; magnitude: |w|, which reads no text.",
    )
    unit: UnitName = Field(
        "weight",
        description="What is chosen: single weights, or rows (outputs) or columns (inputs) with all their weights that "
        "are not pruned, by their mean.",
    )
    among: Literal["matrix", "model"] = Field(
        "matrix", description="What the share is of: every matrix, or all targets together."
    )
    samples: int = Field(64, ge=1, description="Training sequences whose gradients are taken, by the main process.")
    targets: list[str] = Field(
        _LINEAR, min_length=1, description="Linear layers it is chosen in, by the last part of their names."
    )


AdapterRecipe = LoraRecipe | SppRecipe | SpeftRecipe
"""Those of which a stage may have one."""

ADAPTERS: Mapping[str, type[AdapterRecipe]] = {"lora": LoraRecipe, "spp": SppRecipe, "speft": SpeftRecipe}
"""By the names of their sections."""


def adapter_name(settings: AdapterRecipe) -> str:
    """The name of its section."""
    return next(name for name, section in ADAPTERS.items() if isinstance(settings, section))


class IstRecipe(Section):
    """Each step trains adapters of some layers, important ones more often (IST, arXiv 2410.11772, reconstructed)."""

    layers: float = Field(0.25, gt=0.0, le=1.0, description="Share of the decoder layers that a step trains.")
    interval: Duration = Field(Duration(fraction=0.1), description="Time between two looks at what layers are worth.")
    pairs: int = Field(
        2,
        ge=1,
        description="Of forward passes of a look, over validation text; in the two of a pair, adapters of one half of "
        "the layers and of the other are weakened.",
    )
    strength: BelowOne = Field(0.25, description="What is left of a weakened adapter's change.")
    rate: Positive = Field(
        10.0,
        description="By how much a layer's importance rises for a nat that weakening it costs; layers are drawn with "
        "chances softmax(importance).",
    )
    tokens: int = Field(1024, ge=1, description="Validation tokens of each domain that a forward pass reads.")
