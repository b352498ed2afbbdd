"""Recipe sections `data` and `mixture`: what is trained on, and how it is mixed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shearing.data.corpus.bos import BosChoice
from shearing.data.mixture.rules.facts import RULES, RuleName
from shearing.errors import ShearingError, key
from shearing.settings.neutral import Neutral
from shearing.settings.quantities import Duration
from shearing.settings.section import Fraction, Positive, Section


class DataRecipe(Section):
    """Tokenised domains."""

    corpus: Path = Field(description="Folder written by data_tools: one sub-folder per domain.")
    sequence_length: int = Field(4096, ge=2, description="Tokens per sequence; chosen here, not when tokenising.")
    domains: list[str] | None = Field(None, description="Domains to train on; all of the corpus if unset.")
    bos: Neutral[BosChoice] = Field(
        "auto",
        description="How the corpus is to begin its texts: with the token that the source's tokenizer puts in front of "
        "a text (auto), with one in front of each document or each row, or with none; another corpus is refused.",
    )
    attention: Literal["full", "documents"] = Field(
        "full",
        description="full: a token attends to all tokens before it in its row (paper); documents: to those of its own "
        "document alone, in which positions count from 0.",
    )
    loss_across_documents: bool = Field(
        True,
        description="Whether the separator that ends a document has to predict the first token of the next one; "
        "false: that token does not count in any loss. A token that stands in front of each document (bos) never does.",
    )


PUBLISHED_HELDOUT_TOKENS = 500 * 4096
"""Validation tokens per domain that Sheared LLaMA reads at each update."""


class MixtureRecipe(Section):
    """Dynamic batch loading: which domain each sample comes from."""

    initial_weights: dict[str, float] | Literal["uniform", "proportional"] = Field(
        "proportional", description="Starting domain weights; proportional: by tokens in the corpus."
    )
    update: RuleName = Field(
        "paper",
        description="Rule that turns excess loss into new weights: paper (Sheared LLaMA, Algorithm 1), released (its "
        "published code), bandit (the same code, undocumented), constant, or robust (the worst mix near the initial "
        "one, after DRPruning).",
    )
    interval: Duration = Field(Duration(steps=50), description="Time between two updates (while pruning).")
    pretrain_interval: Duration = Field(Duration(steps=400), description="Time between two updates in pretraining.")
    step_size: Positive = Field(1.0, description="Multiplies the excess loss in the exponent; not with robust.")
    smoothing: Fraction = Field(
        1e-4, description="Share of the uniform mix blended into every update (c); not with robust."
    )
    divergence: Positive = Field(
        0.05,
        description="robust: largest chi-square divergence from the initial weights, 1/2 sum_i p_i (w_i / p_i - 1)^2 "
        "(rho of DRPruning, arXiv 2411.14055).",
    )
    floor: Fraction = Field(
        0.2, description="robust: least share of its initial weight that a domain keeps (DRPruning's code: 0.2)."
    )
    loss_ema: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.1,
        description="robust: share of the newest loss in the running loss (DRPruning: 0.1 of a step's training loss; "
        "its code takes held-out losses as they are: 1).",
    )
    reference: dict[str, float] | Path | Literal["source", "online", "teacher"] = Field(
        "source",
        description="Reference loss of each domain: numbers, a JSON file (as of `shear data reference-loss`), the "
        "source model's own loss, online: the loss at the target size at the end of the stage, predicted from the "
        "losses so far (after DRPruning), and the source's own until there are enough; or teacher: the teacher's loss "
        "of the tokens trained on since the last update (distill; with losses: training).",
    )
    losses: Literal["heldout", "training"] = Field(
        "heldout",
        description="Losses that the rule compares with the reference. heldout: measured on validation text at each "
        "update; training: a "
        "moving average of each domain's training loss, at no cost. While pruning that is the loss under masks drawn "
        "with noise, which is higher than that of the masks' means.",
    )
    ema: Positive = Field(
        0.1,
        le=1.0,
        description="Weight of a step's loss in the average of its domain (losses: training; not with reference: "
        "teacher, which takes the mean since the last update).",
    )
    heldout_tokens: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        "auto",
        description="Validation tokens per domain read at each update. auto: as many as take a tenth of the training "
        "FLOPs between two updates, 2,048,000 (the paper's 500 x 4096) at the most; where no update reads them, "
        "evaluation.tokens_per_domain.",
    )


def mixture_contradictions(mixture: MixtureRecipe, *, domains: Sequence[str] | None) -> Iterator[ShearingError]:
    """Constants that the rule does not have, and numbers by domain that do not fit the domains.

    Args:
        mixture: the section.
        domains: `data.domains`.
    """
    yield from _rule_contradictions(mixture)
    if domains is not None and (not domains or len(set(domains)) < len(domains)):
        yield ShearingError(
            "domains", value=domains, allowed="at least one domain, each once", mend="leave it out to take all"
        )
    for field, values in (
        ("initial_weights", mixture.initial_weights),
        ("reference", mixture.reference),
    ):
        if not isinstance(values, dict):
            continue
        if not values or min(values.values()) <= 0:
            yield ShearingError(
                field,
                value=values,
                allowed="a positive number for each domain",
                mend=f"leave a domain out of {key('domains')} rather than give it 0",
            )
        # A reference may know more domains than this run reads.
        unfit = set() if domains is None else set(domains) - set(values)
        if domains is not None and field == "initial_weights":
            unfit |= set(values) - set(domains)
        if domains is not None and unfit:
            yield ShearingError(
                field,
                value=sorted(values),
                allowed=f"the domains of {key('domains')}: {', '.join(domains)}",
                mend=_domain_mend(values, domains=domains),
            )


def _rule_contradictions(mixture: MixtureRecipe) -> Iterator[ShearingError]:
    """Constants of another rule than the one chosen, and an average's where none is taken.

    With constant weights no constant says anything: they wait for the rule that `update` switches on again.
    """
    if mixture.update == "constant":
        return
    owners: dict[str, list[str]] = {}
    for rule, facts in RULES.items():
        for name in facts.constants:
            owners.setdefault(name, []).append(rule)
    for name, rules in owners.items():
        value, default = getattr(mixture, name), MixtureRecipe.model_fields[name].default
        if mixture.update not in rules and value != default:
            named = " or ".join(filter(None, [", ".join(rules[:-1]), rules[-1]]))
            yield ShearingError(
                name,
                value=value,
                allowed=f"only with {key('update')} = {named}; it is {mixture.update}",
                mend=f"set {key(name)}={default}, or {key('update')}={rules[0]}",
            )
    default = MixtureRecipe.model_fields["ema"].default
    averaged = mixture.losses == "training" and mixture.reference != "teacher"
    if mixture.ema != default and not averaged:
        yield ShearingError(
            "ema",
            value=mixture.ema,
            allowed=f"only where averages of training losses move the weights: {key('losses')}=training, "
            f"{key('reference')} not teacher",
            mend=f"set {key('ema')}={default}, or those",
        )


def _domain_mend(values: dict[str, float], *, domains: Sequence[str]) -> str:
    missing, unknown = sorted(set(domains) - set(values)), sorted(set(values) - set(domains))
    parts = [f"add {', '.join(missing)}"] if missing else []
    for name in unknown:
        near = difflib.get_close_matches(name, domains, n=1)
        parts.append(f"remove {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    return "; ".join(parts)
