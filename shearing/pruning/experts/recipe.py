"""Keys of `shear moe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from shearing.data.corpus.bos import BosChoice
from shearing.errors import CombinedShearingError, ShearingError
from shearing.settings.mistakes import located
from shearing.settings.reading import Places
from shearing.settings.section import Section


class MoeRecipe(Section):
    """A dense model is written as a mixture of experts (LLaMA-MoE, arXiv 2406.16554)."""

    model: str = Field(description="Folder or hub name of a dense model.")
    revision: str | None = Field(None, description="Hub revision of the model.")
    output: Path = Field(description="Folder that the mixture is written to.")
    experts: int = Field(8, ge=2, description="Into how many experts of equal size the units of every MLP go.")
    active: int = Field(2, ge=1, description="Experts that each token goes through; all of them: the dense model.")
    split: Literal["coactivation", "random"] = Field(
        "coactivation",
        description="Which units go together. coactivation: those that are active on the same tokens (k-means of equal "
        "sizes); random: drawn by seed, as in LLaMA-MoE.",
    )
    calibration: list[Path] = Field(
        description="Folder of a prepared corpus, or files of text, on which units and routers are looked at.",
    )
    text_field: str = Field(
        "text", description="Of calibration files with documents (JSON, Parquet): field of the text; data.text: nested."
    )
    samples: int = Field(16, ge=1, description="Sequences of calibration text.")
    seqlen: int = Field(256, ge=8, description="Tokens of a sequence.")
    bos: BosChoice = Field(
        "auto",
        description="How texts begin: auto: with the token that the model's tokenizer puts in front of a text, if any; "
        "document or row: with one in front of each; or none. A corpus that begins its texts otherwise is refused.",
    )
    seed: int = Field(0, ge=0, description="Draws the text, the units where split is random, and where k-means begins.")

    @model_validator(mode="after")
    def _active_of_experts(self) -> Self:
        if self.active > self.experts:
            allowed = f"at most the {self.experts} experts"
            error = ShearingError("active", value=self.active, allowed=allowed, mend="let fewer be active")
            raise CombinedShearingError([error])
        return self


def moe_recipe_of(options: Mapping[str, Any]) -> MoeRecipe:
    """What the options of a command say.

    Raises:
        ShearingError: all errors found, each with the option at fault.
    """
    places, given = Places("command line"), {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        places.set_override((name,), text=f"--{name.replace('_', '-')} {value}")
    try:
        return MoeRecipe.model_validate(given)
    except ValidationError as error:
        errors: Sequence[ShearingError] = located(error, model=MoeRecipe, data=dict(given), places=places)
    raise errors[0] if len(errors) == 1 else CombinedShearingError(errors)
