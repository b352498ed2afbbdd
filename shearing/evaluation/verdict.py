"""What a run achieved, in a few sentences computed from its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shearing.evaluation.table import UNITS, Evaluation, changed_units, round_of
from shearing.evaluation.tasks.figures import mean_share
from shearing.settings.quantities import format_parameters, format_tokens


def verdict(evaluation: Evaluation) -> str:
    """One or two sentences on what a run achieved, computed from its numbers.

    Args:
        evaluation: the content of evaluation.json; models that are absent are left out of the sentence.
    """
    models = evaluation["models"]
    source, cut, sparse, final = (models.get(name) for name in ("source", "compact", "sparse", "final"))
    result = final or sparse or cut
    sentences = []
    rounds = Counter(round_of(model) for model in models.values() if cut and model["group"] == cut["group"])
    for each, count in rounds.items():
        measured = [model for model in models.values() if round_of(model) == each and model["mean"]["loss"] is not None]
        if count > 1 and len(measured) == count:
            sentences.append(_lowest(measured))
    if cut and cut.get("changed_from_start") and cut["started_by"] != "open":
        sentences.append(_learned(cut))
    if source and result and source["mean"]["loss"] is not None and result["mean"]["loss"] is not None:
        after = (
            "after continued pretraining"
            if final
            else "right after sparsification"
            if sparse
            else "right after cutting"
        )
        sentence = (
            f"{_size(source, result)} the mean held-out loss is {result['mean']['loss']:.2f} {after}, "
            f"against {source['mean']['loss']:.2f} for the source"
        )
        if final and sparse and sparse["mean"]["loss"] is not None:
            sentence += f" and {sparse['mean']['loss']:.2f} before training"
        if source.get("speed") and result.get("speed"):
            faster = source["speed"]["decode_milliseconds"] / result["speed"]["decode_milliseconds"]
            sentence += f", and it writes a token {faster:.1f}× as fast"
        sentences.append(sentence + ".")
    sentences += _sizes(models)
    if source and result and result is not source:
        sentences += _on_tasks(source, result)
        sentences += _in_writing(source, result)
    return " ".join(sentences) or "Nothing has been compared yet."


def _sizes(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The smaller sizes of a family, where there is one."""
    family = [each for name, each in models.items() if name.startswith("family-")]
    listed = [
        f"{each['mean']['loss']:.2f} at {format_parameters(each['parameters'])}"
        for each in family
        if each["mean"]["loss"] is not None
    ]
    return [f"Smaller sizes of the same training: {', '.join(listed)}."] if listed else []


def _size(source: dict[str, Any], result: dict[str, Any]) -> str:
    """How much of the source is left, as the beginning of a sentence."""
    before, after, nonzero = source["parameters"], result["parameters"], result.get("nonzero")
    if after < before:
        parameters = f"At {format_parameters(after)} of {format_parameters(before)} parameters"
        zeros = "" if nonzero is None else f", {100 * nonzero / after:.1f} % of them not zero"
        return f"{parameters} ({before / after:.1f}× smaller{zeros})"
    if nonzero is None:
        return "At the size of the source"
    return f"With {format_parameters(nonzero)} of {format_parameters(after)} parameters not zero"


def _lowest(models: Sequence[dict[str, Any]]) -> str:
    """Which of several ways to choose the same shape has the lowest loss."""
    first, second = sorted(models, key=lambda model: model["mean"]["loss"])[:2]
    domains = [domain for domain, figures in first["domains"].items() if figures["loss"] is not None]
    won = sum(
        all(
            other is first
            or other["domains"][domain]["loss"] is None
            or first["domains"][domain]["loss"] < other["domains"][domain]["loss"]
            for other in models
            if domain in other["domains"]
        )
        for domain in domains
    )
    trained = first["training_tokens"]
    after = f"after {format_tokens(trained)} training tokens" if trained else "untrained"
    return (
        f"Of {len(models)} ways to choose the same shape, {after}, the lowest loss is that of: {first['label']} "
        f"(mean {first['mean']['loss']:.2f}, lowest on {won} of {len(domains)} domains; next, {second['label']}: "
        f"{second['mean']['loss']:.2f})."
    )


def _learned(cut: Mapping[str, Any]) -> str:
    """How much mask learning had to do with the units that stay."""
    counts = {name: count for name, count in cut["changed_from_start"].items() if count}
    if not counts:
        return f"Mask learning changed none of the units chosen by {cut['started_by']}."
    listed = ", ".join(f"{changed_units(cut, name=name)} {UNITS[name]}" for name in UNITS if name in counts)
    return f"Mask learning changed, of what {cut['started_by']} chose: {listed}."


def _on_tasks(source: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Mean over the tasks that both were asked."""
    before, after = source.get("tasks") or {}, result.get("tasks") or {}
    both = [name for name in before if name in after]
    reached, sources = (mean_share({name: tasks[name] for name in both}) for tasks in (after, before))
    if reached is None or sources is None:
        return []
    over = f"Over {len(both)} tasks" if len(both) > 1 else f"On {both[0]}"
    return [f"{over} it reaches {100 * reached:.1f} %, against {100 * sources:.1f} % for the source."]


def _in_writing(source: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """How near it is to the source, and how it writes."""
    before, after = source.get("generation") or {}, result.get("generation") or {}
    sentences = []
    if after.get("agreement") is not None:
        sentences.append(
            f"Its likeliest next token is the source's in {100 * after['agreement']:.0f} % of places "
            f"(KL {after['kl_from_source']:.2f} nats)."
        )
    repeated = [
        model["greedy"]["repeated"]
        for model in (after, before)
        if model.get("greedy") and model["greedy"]["repeated"] is not None
    ]
    if len(repeated) == 2:
        own, sources = (f"{100 * share:.0f} %" for share in repeated)
        sentences.append(f"Writing greedily, it repeats {own} of its 4-grams, the source {sources}.")
    return sentences
