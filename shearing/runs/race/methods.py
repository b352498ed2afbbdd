"""The methods of a race by name: what tables call each, where it stands, how it runs. Imports no torch.

A metric of `METRICS` is a method as soon as it has its line there. A method that is no ranking is one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from shearing.pruning.structured.importance.registry import EVERYTHING, METRICS
from shearing.pruning.structured.masking.facts import MASKINGS


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Units are scored once, the source is cut at step 0, what is left is trained.

    Attributes:
        metric: name in `METRICS`.
    """

    metric: str


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Nothing of the source but its tokenizer: the target's config, initialised by chance, is trained."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of a run: masks (and weights) at the source's size, the cut, the rest of the steps.

    Attributes:
        overrides: of the recipe, `key=value`.
        share: of the steps, before the cut; None: as the recipe's two durations have it.
    """

    overrides: tuple[str, ...] = ()
    share: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class RaceMethod:
    """What is to be known of a method before anything is imported.

    Attributes:
        title: what tables call it.
        how: how it runs.
        source: where it stands, as `arXiv 2310.06694`; empty for what needs no source.
        reconstructed: its exact rule is not public, and this is our reading of it: no figure of it is the paper's.
        refits: whether the weights that stay may be refitted, and whether they may be left as they are.
    """

    title: str
    how: Ranking | Scratch | Stages
    source: str = ""
    reconstructed: bool = False
    refits: frozenset[bool] = frozenset({False, True})


START = "start"
LEARNED = "learned"
WHILE_TRAINING = Fraction(1, 2)
"""Share of the steps in which units go, for methods that prune through the training; the rest is at the target."""

METHODS: dict[str, RaceMethod] = {
    **{
        name: RaceMethod(
            title=facts.title, how=Ranking(metric=name), source=facts.source, reconstructed=facts.reconstructed
        )
        for name, facts in METRICS.items()
    },
    "scratch": RaceMethod(title="trained from scratch", how=Scratch(), refits=frozenset({False})),
    START: RaceMethod(
        title="start of the masks, frozen",
        how=Stages(overrides=("prune.masks=learned", "prune.freeze=100%", "prune.sparsity_warmup=0 steps")),
    ),
    LEARNED: RaceMethod(
        title="learned masks", how=Stages(overrides=("prune.masks=learned",)), source="arXiv 2310.06694"
    ),
    "paper": RaceMethod(
        title="learned masks, as published",
        how=Stages(
            overrides=(
                "prune.masks=learned",
                "prune.estimator=hard_concrete",
                "prune.initial_masks=open",
                "prune.sparsity_warmup=20%",  # table 6: 640 of 3,200 steps
                "prune.freeze=0 steps",
                "prune.mask_learning_rate=1.0",
                "prune.multiplier_learning_rate=1.0",
                "prune.quadratic_penalty=0.0",
                "prune.log_alpha_limit=4.605170185988092",  # ln 100, of the published code
            )
        ),
        source="arXiv 2310.06694",
        refits=frozenset({False}),
    ),
    **{
        name: RaceMethod(
            title=facts.title,
            how=Stages(overrides=(f"prune.masks={name}", "prune.freeze=0 steps"), share=WHILE_TRAINING),
            source=facts.source,
            reconstructed=facts.reconstructed,
            refits=frozenset({False}),
        )
        for name, facts in MASKINGS.items()
        if name != LEARNED
    },
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method in one of its forms.

    Attributes:
        method: name in `METHODS`.
        refitted: whether the weights that stay are refitted to make up for the units that go.
        rest_by: metric that scores what this method's own leaves out; None where nothing is left out.
        own_sizes: with the sizes by layer that its scores would give, of as many parameters: no ordinary config holds
            them, so it is only evaluated.
    """

    method: str
    refitted: bool
    rest_by: str | None = None
    own_sizes: bool = False

    @property
    def facts(self) -> RaceMethod:
        """The method's line."""
        return METHODS[self.method]

    @property
    def name(self) -> str:
        """Of files and in JSON: `activations-refitted`."""
        rest = "" if self.rest_by is None else f"-rest-by-{self.rest_by}"
        own = "-own-sizes" if self.own_sizes else ""
        return f"{self.method}{rest}{own}{'-refitted' if self.refitted else ''}"

    @property
    def folds_means(self) -> bool:
        """Whether biases hold the mean of what goes: part of a method's own form, without a refit."""
        how = self.facts.how
        return self.own_sizes and not self.refitted and isinstance(how, Ranking) and METRICS[how.metric].folds_means

    @property
    def title(self) -> str:
        """In tables; says what is another metric's choice, and what is our reading of a method."""
        parts = [self.facts.title]
        if self.rest_by is not None and isinstance(self.facts.how, Ranking):
            gives = METRICS[self.facts.how.metric].gives
            parts = [f"{_in_words(gives)} by {self.facts.title}, rest by {METRICS[self.rest_by].title}"]
        parts += ["sizes by layer"] if self.own_sizes else []
        parts += ["means as biases"] if self.folds_means else []
        parts += ["refitted"] if self.refitted else []
        parts += ["our reading of it"] if self.facts.reconstructed else []
        return ", ".join(parts)


def chooses_sublayers(how: Ranking) -> bool:
    """Whether a ranking scores attention and MLPs apart, and no layers."""
    gives = METRICS[how.metric].gives
    return "layers" not in gives and {"attention", "mlp"} <= gives


def _in_words(granularities: frozenset[str]) -> str:
    """What is scored, as tables say it."""
    kinds = {
        "layers": {"layers", "attention", "mlp"},
        "heads": {"kv_groups", "query_heads"},
        "units": {"intermediate"},
        "hidden dimensions": {"hidden"},
    }
    return " and ".join(kind for kind, names in kinds.items() if names & granularities)


def contender_of(method: str, *, refitted: bool, rest_by: str) -> Contender:
    """A method in one of its forms, completed by another metric where its own leaves something out."""
    how = METHODS[method].how
    partial = isinstance(how, Ranking) and METRICS[how.metric].gives != EVERYTHING
    return Contender(method=method, refitted=refitted, rest_by=rest_by if partial else None)
