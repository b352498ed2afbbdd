"""Recipe section `distill`: what training learns from a teacher beside the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shearing.errors import ShearingError, key, nearest_name
from shearing.objectives.registry import DIVERGENCES, DivergenceName
from shearing.settings.neutral import Neutral
from shearing.settings.quantities import Duration
from shearing.settings.section import BelowOne, Fraction, Positive, Section

SOURCE = "source"
"""The teacher that is the source model itself."""


class HiddenRecipe(Section):
    """Activation matching: the residual stream is drawn to the teacher's too, behind the layers that both have."""

    weight: Positive = Field(
        0.2,
        description="At first, of the mean squared error over the teacher's mean square, mean over layers; it is added "
        "to the loss, in each domain as far as the teacher is listened to.",
    )
    decay: Duration = Field(
        Duration(fraction=1.0), description="From a stage's start until the weight, which falls linearly, is 0."
    )
    layers: Literal["all"] | list[Annotated[int, Field(ge=0)]] = Field(
        "all", description="Of the source, from 0, those behind which streams are compared, as far as they are kept."
    )


class DistillRecipe(Section):
    """Distillation wherever weights are trained: (1 - a) cross-entropy + a T^2 divergence from a teacher."""

    weight: Fraction = Field(0.5, description="a, share of the divergence in the loss; the rest is cross-entropy.")
    temperature: Positive = Field(1.0, description="T, by which both models' logits are divided for the divergence.")
    teacher: str = Field(
        SOURCE,
        description="source: the source model as it was before anything was cut or refitted; or a folder or hub name "
        "of a model of the same vocabulary, whatever its sizes.",
    )
    revision: str | None = Field(None, description="Hub revision of the teacher; only for hub names.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Of the teacher's weights and products; auto: bf16 where training.precision is."
    )
    placement: Neutral[Literal["replicate", "shard", "offload"]] = Field(
        "replicate",
        description="Where the teacher's weights are. replicate: on the device of each process; shard: those of its "
        "layers shared out among the processes, whatever the engine, each whole while it runs; offload: those of its "
        "layers in host memory, from which each comes when it runs.",
    )
    kind: DivergenceName = Field(
        "forward_kl", description="; ".join(f"{name}: {facts.summary}" for name, facts in DIVERGENCES.items()) + "."
    )
    top_k: int = Field(64, ge=1, description="top_k: tokens that are kept.")
    schedule: Literal["constant", "learning_rate"] = Field(
        "constant",
        description="learning_rate: the weight rises and falls with the learning rate, to 0 where that is at its end.",
    )
    domains: Literal["all", "auto"] | list[str] | dict[str, Fraction] = Field(
        "auto",
        description="Where the teacher is listened to. auto: in each domain as far as its own loss on the last steps' "
        "tokens is below the model's (margin); all; a list of domains; or a factor of the weight for each domain, 0 "
        "for those that are left out.",
    )
    margin: Positive = Field(
        1.0, description="auto: nats below the model's loss at which the teacher has its whole weight; it falls to 0."
    )
    skip_low_entropy: BelowOne = Field(
        0.0,
        description="Share of each sequence's tokens that learn from the text alone: those of which the teacher is "
        "surest (0.15 in arXiv 2509.01649). Above 0 the teacher's head is multiplied twice.",
    )
    by_label: bool = Field(
        False, description="Whether a token's weight is multiplied by the probability that the teacher gives its label."
    )
    hidden: HiddenRecipe | None = None

    cache: Path | None = Field(
        None,
        description="Folder of what the teacher says of rows, as `shear data teacher` writes it, for kind forward_kl "
        "(draws) or top_k at temperature 1; unset: the teacher reads along.",
    )
    cache_missing: Neutral[Literal["refuse", "compute"]] = Field(
        "refuse",
        description="Rows that are not in the cache. refuse: there may be none, and the teacher is never loaded; "
        "compute: it is, and is asked of these rows alone.",
    )

    @property
    def listens_online(self) -> bool:
        """Whether the teacher itself is there."""
        return self.cache is None or self.cache_missing == "compute"

    @property
    def named_domains(self) -> Sequence[str]:
        """Domains that it calls by name."""
        return [] if isinstance(self.domains, str) else list(self.domains)


def distill_contradictions(distill: DistillRecipe) -> Iterator[ShearingError]:
    """Keys that mean nothing beside others."""
    if distill.teacher == SOURCE and distill.revision is not None:
        yield ShearingError(
            "revision",
            value=distill.revision,
            allowed=f"null with {key('teacher')}={SOURCE}",
            mend="leave it out, or name the teacher",
        )
    unheard = {
        "top_k": ("kind", "top_k", distill.kind == "top_k"),
        "margin": ("domains", "auto", distill.domains == "auto"),
        "cache_missing": ("cache", "a folder", distill.cache is not None),
    }
    for name, (other, wanted, is_heard) in unheard.items():
        default = DistillRecipe.model_fields[name].default
        if not is_heard and getattr(distill, name) != default:
            yield ShearingError(
                name,
                value=getattr(distill, name),
                allowed=f"{default}, as it is unless given, where {key(other)} is not {wanted}: nothing reads it",
                mend=f"leave it out, or set {key(other)}={wanted}",
            )
    if not isinstance(distill.domains, str) and not distill.domains:
        yield ShearingError("domains", value=distill.domains, allowed="at least one domain", mend="write all or auto")
    if distill.hidden is not None and not distill.hidden.layers:
        yield ShearingError(
            "layers", value=[], allowed="at least one layer", mend="write all, or leave the section out"
        )
    if distill.hidden is not None and distill.cache is not None:
        yield ShearingError(
            "hidden",
            value="given",
            allowed=f"nothing beside {key('cache')}: only a teacher that runs has a residual stream",
            mend=f"leave the section out, or {key('cache')}",
        )


def require_domains(distill: DistillRecipe, *, domains: Sequence[str]) -> None:
    """Check the domains that are called by name.

    Raises:
        ShearingError: one is not among those that are trained on.
    """
    if unknown := [name for name in distill.named_domains if name not in domains]:
        raise ShearingError(
            "domains",
            value=unknown,
            allowed=f"domains that are trained on: {', '.join(domains)}",
            mend=nearest_name(unknown[0], domains) or f"remove {', '.join(unknown)}",
        )
