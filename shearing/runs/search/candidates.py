"""The candidates of a search: those named in the recipe, or a cover of the shapes at its budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from shearing.errors import ShearingError, named
from shearing.evaluation.layer_times import LayerTimes
from shearing.models.shape import Shape, export_error, resolve_target
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.checks.pruning import target_of
from shearing.runs.recipe import Pruning, Recipe
from shearing.runs.search.recipe import SearchRecipe
from shearing.runs.search.space import AtBudget, Bounds, cover, memory_of, shapes_at

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_UNITS = {"parameters": "parameters", "memory": "bytes", "latency": "ms"}
_TIMED_WIDTHS, _TIMED_MLPS = 3, 2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape of a search.

    Attributes:
        name: of its folder and in tables.
        shape: all its sizes.
        is_target: whether it is what the recipe's `target` says.
    """

    name: str
    shape: Shape
    is_target: bool = False

    @property
    def overrides(self) -> list[str]:
        """What makes it the target of a recipe."""
        return [f"target.{name}={size}" for name, size in self.shape.sizes().items()]

    def to_json(self) -> dict[str, Any]:
        """As a file keeps it."""
        return {"name": self.name, **self.shape.sizes(), "is_target": self.is_target}

    @classmethod
    def from_json(cls, payload: Mapping[str, Any], *, source: Shape) -> Candidate:
        """What `to_json` gave, of the same source."""
        sizes = {name: payload[name] for name in source.sizes()}
        shape = dataclasses.replace(source, **sizes)
        return cls(name=payload["name"], shape=shape, is_target=payload["is_target"])


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend.

    Attributes:
        kind: `parameters`, `memory` or `latency`.
        amount: in parameters, bytes or milliseconds.
    """

    kind: str
    amount: float

    @property
    def key(self) -> str:
        """The key that says it."""
        return f"search.{self.kind}"

    def words(self, cost: float) -> str:
        """An amount for people."""
        text = f"{cost:,.2f}" if self.kind == "latency" else f"{round(cost):,}"
        return f"{text} {_UNITS[self.kind]}"


def budget_of(recipe: Recipe, *, config: PretrainedConfig) -> Budget | None:
    """The recipe's; None where it names its candidates.

    Raises:
        ShearingError: a target that the source cannot become.
    """
    search, target = search_of(recipe), recipe.pruning.target
    if search.candidates:
        return None
    amounts = {"parameters": search.parameters, "memory": search.bytes, "latency": search.latency}
    for kind, amount in amounts.items():
        if amount is not None:
            return Budget(kind=kind, amount=amount)
    if target.parameters is not None:
        return Budget(kind="parameters", amount=target.parameters)
    with named(COMPONENT_NAMES):
        shape = resolve_target(target, source=config)
    return Budget(kind="parameters", amount=shape.num_parameters())


def search_of(recipe: Recipe) -> SearchRecipe:
    """The section, or what it is where a recipe has none."""
    return recipe.search or SearchRecipe()


def bounds_of(recipe: Recipe, *, source: Shape) -> Bounds:
    """The values that each size may have."""
    return Bounds.of(search_of(recipe), source=source, granularities=recipe.pruning.prune.granularities)


def named_candidates(recipe: Recipe, *, config: PretrainedConfig) -> list[Candidate]:
    """Those that a recipe names.

    Raises:
        ShearingError: one that the source cannot become by the recipe's granularities, or two of one shape.
    """
    found: dict[Shape, Candidate] = {}
    target = _target(recipe, config=config)
    for name, wanted in search_of(recipe).candidates.items():
        field = f"search.candidates.{name}"
        try:
            shape = target_of(Pruning(wanted, recipe.pruning.prune), config=config)
        except ShearingError as error:
            raise ShearingError(
                f"{field} ({error.field})", value=error.value, allowed=error.allowed, mend=error.mend
            ) from None
        assert shape is not None, "candidates have sizes by name"
        if shape in found:
            raise ShearingError(
                field,
                value=shape.sizes(),
                allowed=f"another shape than {found[shape].name}, which is the same",
                mend="remove one of the two",
            )
        found[shape] = Candidate(name=name, shape=shape, is_target=shape == target)
    return list(found.values())


def candidates_at(
    recipe: Recipe, budget: Budget, *, config: PretrainedConfig, times: LayerTimes | None
) -> list[Candidate]:
    """A cover of the shapes at a budget, the recipe's own target first if it is one of them.

    Args:
        recipe: says what shapes there may be, and how many the first round takes.
        budget: to spend.
        config: of the source model.
        times: of layers, where the budget is a latency.

    Raises:
        ShearingError: no shape spends the budget; those that come nearest are named.
    """
    search, source = search_of(recipe), Shape.of(config)

    def cost(shape: Shape) -> float:
        return cost_of(shape, budget, search=search, times=times)

    found = shapes_at(
        budget.amount,
        cost=cost,
        bounds=bounds_of(recipe, source=source),
        source=source,
        tolerance=search.tolerance,
        accepts=lambda shape: export_error(shape, source=config) is None,
    )
    if not found.fitting:
        raise _nothing_fits(budget, found, search=search)
    target = _target(recipe, config=config)
    count = search.parsed_rounds[0].candidates
    keeps = target is not None and (1 - search.tolerance) * budget.amount <= cost(target) <= budget.amount
    rivals = [shape for shape in found.fitting if shape != target]
    shapes = cover(rivals, count=count - keeps, source=source) if count > keeps else []
    own = [target] if keeps and target is not None else []
    return [Candidate(name=name_of(shape), shape=shape, is_target=shape == target) for shape in [*own, *shapes]]


def cost_of(shape: Shape, budget: Budget, *, search: SearchRecipe, times: LayerTimes | None) -> float:
    """What a shape takes of a budget.

    Args:
        shape: of a model.
        budget: says of which kind.
        search: says how a model is used.
        times: of layers, where the budget is a latency.
    """
    if budget.kind == "parameters":
        return shape.num_parameters()
    if budget.kind == "memory":
        size = DTYPES[search.dtype].itemsize
        return memory_of(shape, batch_size=search.batch_size, context=search.context, bytes_per_value=size)
    assert times is not None
    found = times.of(shape)
    return found.prompt if search.latency_of == "prompt" else found.next_token


def shapes_to_time(recipe: Recipe, *, config: PretrainedConfig) -> list[Shape]:
    """The grid of layers whose times others are interpolated from: the least and the most heads, and what is between.

    Raises:
        ShearingError: no width within the bounds that a config can hold.
    """
    source = Shape.of(config)
    bounds = bounds_of(recipe, source=source)
    found = []
    for H, K in dict.fromkeys((bounds.heads[0], bounds.heads[-1])) if bounds.heads else ():
        of_heads = dataclasses.replace(source, num_attention_heads=H, num_key_value_heads=K)
        widths = [
            width
            for width in bounds.widths
            if export_error(dataclasses.replace(of_heads, hidden_size=width), source=config) is None
        ]
        for d, m in product(_ends(widths, count=_TIMED_WIDTHS), _ends(bounds.mlps, count=_TIMED_MLPS)):
            found.append(dataclasses.replace(of_heads, hidden_size=d, intermediate_size=m))
    if not found:
        raise _nothing_within()
    return found


def name_of(shape: Shape) -> str:
    """A name made of the sizes: layers x width, MLP, heads on KV groups."""
    return (
        f"{shape.num_hidden_layers}x{shape.hidden_size}-mlp{shape.intermediate_size}"
        f"-h{shape.num_attention_heads}kv{shape.num_key_value_heads}"
    )


def _target(recipe: Recipe, *, config: PretrainedConfig) -> Shape | None:
    """The recipe's own; None where it is a number of parameters."""
    wanted = recipe.pruning.target
    if wanted.parameters is not None:
        return None
    with named(COMPONENT_NAMES):
        return resolve_target(wanted, source=config)


def _nothing_fits(budget: Budget, found: AtBudget, *, search: SearchRecipe) -> ShearingError:
    if not found.below and not found.above:
        return _nothing_within()
    fastest = " (the fastest is the first)" if budget.kind == "latency" and not found.below else ""
    nearest = [f"{budget.words(cost)}: {name_of(shape)}" for cost, shape in (*found.below, *found.above)]
    low, high = budget.words((1 - search.tolerance) * budget.amount), budget.words(budget.amount)
    costs = [cost for cost, _ in (*found.below, *found.above)]
    best = min(costs, key=lambda cost: abs(cost - budget.amount))
    return ShearingError(
        budget.key,
        value=budget.words(budget.amount),
        allowed=f"a budget that some shape spends, from {low} to {high}; nearest{fastest}: {'; '.join(nearest)}",
        mend=f"set {budget.key} to {budget.words(best)} or a little more, raise search.tolerance, or widen "
        "search.layers, search.hidden, search.mlp or search.heads",
    )


def _nothing_within() -> ShearingError:
    return ShearingError(
        "search.hidden",
        value="no shape at all",
        allowed="bounds that leave a size of each kind which an ordinary config can hold with a number of heads",
        mend="widen search.hidden, search.mlp or search.heads, or lower search.multiple_of",
    )


def _ends(values: Sequence[int], *, count: int) -> list[int]:
    """So many values, evenly, with the first and the last."""
    places = [round(index * (len(values) - 1) / max(1, count - 1)) for index in range(count)]
    return list(dict.fromkeys(values[place] for place in places)) if values else []
