"""Recipe section `distill`: what training learns from a teacher beside the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from shearing.errors import ShearingError, key, nearest_name
from shearing.objectives.registry import DIVERGENCES, DivergenceName
from shearing.settings.section import BelowOne, Fraction, Positive, Section

SOURCE = "source"
"""The teacher that is the source model itself."""


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
    if not isinstance(distill.domains, str) and not distill.domains:
        yield ShearingError("domains", value=distill.domains, allowed="at least one domain", mend="write all or auto")


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
