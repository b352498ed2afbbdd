"""What a race will run, checked before anything is run: its rows, what they cost, how long they will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from shearing.errors import ShearingError, named
from shearing.models.shape import Shape
from shearing.runs.context import RunContext
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.hardware import teacher_flops_per_token
from shearing.runs.planning.preflight import preflight
from shearing.runs.race.checks import (
    collected,
    mistakes,
    refuse,
    require_masks_that_move,
    short_budgets,
    unfit,
)
from shearing.runs.race.choosing import evidence_of, target_of
from shearing.runs.race.flops import FlopCount, Flops, steps_within
from shearing.runs.race.methods import START, Contender, contender_of
from shearing.runs.race.recipes import recipe_of
from shearing.runs.race.records import RaceFolder
from shearing.runs.race.rows import RaceSettings, Row, Steps
from shearing.runs.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One length of a race.

    Attributes:
        tokens: that were asked for.
        steps: whole ones in them.
        flops: common budget of the table at equal FLOPs; None where there is none.
        steps_within: of each contender at that budget; None where choosing alone takes more.
    """

    tokens: int
    steps: int
    flops: float | None
    steps_within: Mapping[Contender, int | None]


@dataclass(frozen=True, kw_only=True)
class RacePlan:
    """What a race will run.

    Attributes:
        budgets: in order.
        contenders: in order.
        own_forms: those that are evaluated with sizes by layer of their own.
        rows: every row once, in the order in which they run: those that share a cut model follow each other.
        recipes: of each row.
        flops: of each row.
        choosing: FLOPs of each metric that a contender's units are chosen by.
        steps: how tokens and steps go together.
        source, target: shapes.
    """

    budgets: Sequence[Budget]
    contenders: Sequence[Contender]
    own_forms: Sequence[Contender]
    rows: Sequence[Row]
    recipes: Mapping[Row, Recipe]
    flops: Mapping[Row, Flops]
    choosing: Mapping[Contender, Mapping[str, float]]
    steps: Steps
    source: Shape
    target: Shape

    def left(self, rows: Sequence[Row], *, folder: RaceFolder) -> float:
        """FLOPs that rows will take: what they share, scores and a refit for several lengths, counts once."""
        total, shared = 0.0, set[tuple[str, int]]()
        for row in rows:
            flops = self.flops[row]
            total += flops.masked + flops.training
            for metric, choosing in self.choosing[row.contender].items():
                if (metric, row.seed) not in shared and not folder.scores(metric, seed=row.seed).is_file():
                    total += choosing
                shared.add((metric, row.seed))
            # Masks that are learned are refitted in the run that learns them.
            if flops.masked or (row.cut_name, row.seed) not in shared:
                total += flops.refit
            shared.add((row.cut_name, row.seed))
        return total


@named(COMPONENT_NAMES)
def plan(settings: RaceSettings, *, make_context: Callable[[Recipe], RunContext]) -> RacePlan:
    """The rows of a race, once everything that can be checked has been.

    Args:
        settings: what is asked for.
        make_context: of a row's recipe.

    Raises:
        ShearingError: all that was found, together.
    """
    refuse(list(mistakes(settings)))
    steps = Steps.of(settings.recipe)
    lengths = {tokens: steps.of_tokens(tokens) for tokens in settings.tokens}
    refuse(list(short_budgets(lengths, steps=steps)))
    asked = [
        Row(contender=contender, seed=seed, steps=length)
        for contender in settings.contenders
        for seed in settings.seeds
        for length in lengths.values()
    ]
    recipes = _recipes(settings, rows=asked, steps=steps)
    context = make_context(recipes[asked[0]])
    preflight(context, stages=("prune", "compact", "pretrain"))
    source, target = Shape.of(context.config), target_of(context)
    of_contenders = {row.contender: recipe for row, recipe in recipes.items()}
    refuse(
        [
            error
            for contender, recipe in of_contenders.items()
            for error in unfit(contender, recipe=recipe, source=source, target=target)
        ]
    )
    length = settings.recipe.data.sequence_length
    count = FlopCount(
        source=source,
        target=target,
        sequence_length=length,
        evidence=evidence_of(context),
        steps=steps,
        recipes={**of_contenders, **{own: of_contenders[replace(own, own_sizes=False)] for own in settings.own_forms}},
        teacher_per_token=teacher_flops_per_token(
            context.teacher_shape, distill=settings.recipe.distill, sequence_length=length
        ),
    )
    budgets = [
        _budget(settings, tokens=tokens, steps=many, count=count, common=_common_flops(settings, count, steps=many))
        for tokens, many in lengths.items()
    ]
    own_forms = [Row(contender=own, seed=seed, steps=0) for seed in settings.seeds for own in settings.own_forms]
    rows = [*_rows(settings, budgets=budgets), *own_forms]
    recipes |= _recipes(settings, rows=[row for row in rows if row not in recipes], steps=steps)
    return RacePlan(
        budgets=budgets,
        contenders=settings.contenders,
        own_forms=settings.own_forms,
        rows=rows,
        recipes={row: recipes[row] for row in rows},
        flops={row: count.of(row.contender, steps=row.steps) for row in rows},
        choosing={contender: count.choosing(contender) for contender in count.recipes},
        steps=steps,
        source=source,
        target=target,
    )


def _recipes(settings: RaceSettings, *, rows: Sequence[Row], steps: Steps) -> dict[Row, Recipe]:
    folder, found, recipes = RaceFolder(path=settings.output), list[ShearingError](), dict[Row, Recipe]()

    def add(row: Row) -> None:
        recipes[row] = recipe_of(settings.recipe, row=row, steps=steps, run_dir=folder.run(row))
        require_masks_that_move(row, recipe=recipes[row])

    for row in rows:
        found += collected(partial(add, row))
    refuse(found)
    return recipes


def _common_flops(settings: RaceSettings, count: FlopCount, *, steps: int) -> float | None:
    """The common budget at equal FLOPs: what was asked for, or what `start` takes, raced or not; None without one."""
    if "flops" not in settings.equal:
        return None
    if settings.flops is not None:
        return settings.flops
    start = contender_of(START, refitted=settings.refit != "without", rest_by=settings.rest_by)
    row = Row(contender=start, seed=settings.seeds[0], steps=steps)
    recipe = recipe_of(settings.recipe, row=row, steps=count.steps, run_dir=settings.output)
    return replace(count, recipes={start: recipe}).of(start, steps=steps).total


def _budget(settings: RaceSettings, *, tokens: int, steps: int, count: FlopCount, common: float | None) -> Budget:
    within: dict[Contender, int | None] = {}
    if common is not None:
        for contender in settings.contenders:
            within[contender] = steps_within(common, cost=partial(_total_flops, count, contender), least=2)
    return Budget(tokens=tokens, steps=steps, flops=common, steps_within=within)


def _total_flops(count: FlopCount, contender: Contender, steps: int) -> float:
    return count.of(contender, steps=steps).total


def _rows(settings: RaceSettings, *, budgets: Sequence[Budget]) -> Iterator[Row]:
    for seed in settings.seeds:
        for contender in settings.contenders:
            lengths = {budget.steps for budget in budgets} if "tokens" in settings.equal else set()
            lengths |= {number for budget in budgets if (number := budget.steps_within.get(contender)) is not None}
            for number in sorted(lengths):
                yield Row(contender=contender, seed=seed, steps=number)
