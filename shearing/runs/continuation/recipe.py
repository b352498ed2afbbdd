"""Recipe section `cascade`: sizes on the way to the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from pydantic import Field

from shearing.errors import ShearingError
from shearing.models.recipe import Sizes, TargetRecipe, target_contradictions
from shearing.settings.quantities import Duration
from shearing.settings.section import Section
from shearing.training.recipe import PretrainRecipe

SIZES = (*Sizes.model_fields, "parameters")


class CascadeRecipe(Section):
    """Sizes on the way: a run prunes and trains to each, and goes on from it to the next, up to `target`.

    A list in `target` is short for it: the last is the target, those before are these.
    """

    targets: dict[str, TargetRecipe] = Field(
        min_length=1,
        description="By the names of their folders, from large to small, each like `target`.",
    )
    duration: Duration = Field(
        Duration(fraction=0.25),
        description="Of pretrain in each run before the last; a share is of pretrain.duration.",
    )


def split_list(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose `target` is a list, with the last as its target and those before as a cascade.

    Args:
        data: plain data of a recipe; left as it is.
    """
    targets = data.get("target")
    if not isinstance(targets, list) or not targets:
        return data
    *before, last = targets
    if not before:
        return {**data, "target": last}
    cascade = data.get("cascade") or {}
    steps = {f"step-{number}": target for number, target in enumerate(before, start=1)}
    return {**data, "target": last, "cascade": {**cascade, "targets": steps}}


def cascade_contradictions(cascade: CascadeRecipe, *, target: TargetRecipe) -> Iterator[ShearingError]:
    """Targets that are none, or do not shrink, as far as they say it themselves.

    Args:
        cascade: the section.
        target: the last.
    """
    for name, each in cascade.targets.items():
        for error in target_contradictions(each):
            yield ShearingError(
                f"targets.{name} ({error.field})", value=error.value, allowed=error.allowed, mend=error.mend
            )
        if each.vocab_size is not None:
            yield ShearingError(
                f"targets.{name}.vocab_size",
                value=each.vocab_size,
                allowed="null: the vocabulary is cut in the end, as the last target says",
                mend="give it to the last target",
            )
        if each.parameters is not None and not each.uniform:
            yield ShearingError(
                f"targets.{name}.uniform",
                value=False,
                allowed="true with a budget: the next run is cut from an ordinary model, with one size for all layers",
                mend=f"set uniform=true in {name}, or give it sizes by name",
            )
    named = {**cascade.targets, "the last": target}
    for (before_name, before), (name, after) in pairwise(named.items()):
        pairs = {size: (getattr(before, size), getattr(after, size)) for size in SIZES}
        both = {size: pair for size, pair in pairs.items() if None not in pair}
        grown = [size for size, (earlier, later) in both.items() if later > earlier]
        if grown or (pairs and all(earlier == later for earlier, later in pairs.values())):
            shown = grown or list(both)
            yield ShearingError(
                "targets",
                value=", ".join(f"{size} {both[size][0]} then {both[size][1]}" for size in shown),
                allowed=f"targets that shrink from each to the next: {name} does not from {before_name}",
                mend="order the list from large to small",
            )
    if cascade.duration.steps == 0 or cascade.duration.tokens == 0 or cascade.duration.fraction == 0:
        yield ShearingError(
            "duration", value=str(cascade.duration), allowed="at least a step", mend="write a share, as 25%"
        )


def on_the_way(cascade: CascadeRecipe, *, pretrain: PretrainRecipe, sequence_length: int) -> PretrainRecipe:
    """Continued pretraining of each run before the last: at least a step.

    Args:
        cascade: the section.
        pretrain: of the last run.
        sequence_length: tokens of a sequence.
    """
    steps = pretrain.in_steps(cascade.duration, sequence_length=sequence_length)
    return pretrain.model_copy(update={"duration": Duration(steps=max(1, steps))})


def contradictions_on_the_way(
    cascade: CascadeRecipe,
    *,
    pretrain: PretrainRecipe,
    sequence_length: int,
    found: Callable[[Mapping[str, Section]], Iterable[ShearingError]],
) -> Iterator[ShearingError]:
    """What the runs before the last contradict, though the last does not, by the key that makes them differ.

    Args:
        cascade, pretrain, sequence_length: see `on_the_way`.
        found: what contradicts itself in the recipe with these sections in place of its own.
    """
    short = on_the_way(cascade, pretrain=pretrain, sequence_length=sequence_length)
    for error in found({"pretrain": short}):
        yield ShearingError(
            "duration",
            value=f"{cascade.duration}, {short.duration} of pretrain",
            allowed=f"a length at which {error.field} = {error.value!r} is right: {error.allowed}",
            mend=f"lengthen it, or, of {error.field}: {error.mend}",
        )
    for name, target in cascade.targets.items():
        for error in found({"target": target}):
            yield ShearingError(
                f"targets.{name} ({error.field})", value=error.value, allowed=error.allowed, mend=error.mend
            )


_BESIDE_A_FAMILY = {
    "cascade": "none with a family: one has sizes one after the other, the other all at once",
    "distill.hidden": "none with a family, as residual streams of different widths do not compare",
    "target.parameters": "null with a family: the largest size by name, as the others are parts of it",
    "target.vocab_size": "null with a family, as all sizes share an embedding",
}


def beside_a_family(found: Mapping[str, object]) -> Iterator[ShearingError]:
    """Keys of a run that do not go with several sizes out of one training.

    Args:
        found: by key; None where there is nothing.
    """
    for key, value in found.items():
        if value is not None:
            yield ShearingError(
                key,
                value=value if isinstance(value, int | str) else "a section",
                allowed=_BESIDE_A_FAMILY.get(key, "none with a family, which trains all weights of all its sizes"),
                mend=f"set {key}=null, or family=null",
            )
