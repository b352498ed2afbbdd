"""msp: mixed sparsity pruning (arXiv 2503.11164), reconstructed: levels found by an evolutionary search.

Known of the paper: sensitivity is the trace of the Fisher information matrix, the first population comes from it,
operators keep the sparsity, any pruner can be used. How it does each of these is not known to us; ours is described in
docs/mixed-sparsity.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.allocation.allocator import Allocation, Allocator, Request, patterns_of
from shearing.pruning.sparse.allocation.sensitivity import Labels, fisher_trace
from shearing.pruning.sparse.search.database import build_database, require_room
from shearing.pruning.sparse.search.evolution import Search, SearchSettings
from shearing.pruning.sparse.search.fitness import Fitness, FitnessKind, Training
from shearing.pruning.sparse.search.genome import Genome, Space

LEVELS = "levels"
"""Folder of the database inside that of the run; nobody reads it once levels are chosen."""

STAGES = (1 / 8, 1 / 2, 1)
"""Share of the text that each stage reads."""


@dataclass(frozen=True)
class Msp:
    """The search.

    Attributes:
        text: sequences that candidates are compared on; none of them is calibration text.
        settings: of the search.
        kind: what is compared.
        seed: of the search, and of sampled labels.
        labels: see `fisher_trace`.
        training: of candidates before they are compared.
        starts: rules whose allocations join the first population, by name.
    """

    text: Calibration
    settings: SearchSettings = field(default_factory=SearchSettings)
    kind: FitnessKind = "loss"
    seed: int = 0
    labels: Labels = "true"
    training: Training = field(default_factory=Training)
    starts: Mapping[str, Allocator] = field(default_factory=dict)

    def allocate(self, request: Request) -> Allocation:
        """See `Allocator`; interrupted, the same call continues behind the last generation."""
        assert request.calibration is not None
        folder = request.compute.folder
        require_room(request, folder=folder / LEVELS)
        units, levels = request.units, list(request.levels)
        space = Space(units, levels, request.budget)
        traces = fisher_trace(
            request.source,
            matrices=request.matrices,
            calibration=request.calibration,
            compute=request.compute,
            labels=self.labels,
            seed=self.seed,
            console=request.console,
        )
        # A large matrix is not more sensitive for being large; decoder layers have one size.
        per = {unit.name: unit.size if request.unit == "matrix" else 1 for unit in units}
        scores = {unit.name: sum(traces[matrix.name] for matrix in unit.matrices) / per[unit.name] for unit in units}
        starts: dict[str, Genome] = {}
        for name, rule in self.starts.items():
            patterns = rule.allocate(request).patterns
            starts[name] = tuple(levels.index(patterns[unit.matrices[0].name]) for unit in units)
        database = build_database(request, folder=folder / LEVELS)
        search = Search(
            space,
            sensitivity=list(scores.values()),
            starts=starts,
            settings=self.settings,
            seed=self.seed,
            path=folder / "search.json",
        )
        rows = self.text.tokens.shape[0]
        fitness = Fitness(
            request,
            database=database,
            text=self.text,
            stages=sorted({max(1, round(share * rows)) for share in STAGES}),
            kind=self.kind,
            known=search.known,
            training=self.training,
        )
        winner = self._run(search, fitness=fitness, request=request)
        state, last = search.state, search.state.history[-1]
        return Allocation(
            patterns_of(units, choice=winner, levels=levels),
            {
                "scores": scores,
                "fitness_kind": self.kind,
                "fitness": {"msp": last["best"], **{name: last[name] for name in search.starts}},
                "fitness_fingerprint": self.text.fingerprint,
                "winner_descends_from": state.population[0][1],
                "history": state.history,
                "forward_passes": state.passes,
                "tokens": state.tokens,
                "seconds": round(state.seconds, 3),
                "settings": {**asdict(self.settings), "training": asdict(self.training)},
            },
        )

    def _run(self, search: Search, *, fitness: Fitness, request: Request) -> Genome:
        """The search under a bar that says how far the best is from uniform; off a terminal, a line a generation."""
        console = request.console
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            total, done = self.settings.generations + 1, search.state.generation + 1
            task = progress.add_task("search", total=total, completed=done)

            def advance(record: dict[str, Any]) -> None:
                said = (
                    f"generation {record['generation']}/{self.settings.generations}: best {record['best']:.4f}, "
                    f"uniform {record['uniform']:.4f}"
                )
                progress.update(task, advance=1, description=said)
                if not console.is_terminal:
                    console.print(said, soft_wrap=True, highlight=False)

            return search.run(fitness, advance=advance)
