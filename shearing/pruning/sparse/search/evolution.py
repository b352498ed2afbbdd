"""The evolutionary search: candidates are varied, screened on little text, and the best on all of it survive.

After every generation the whole state is on disk, so that a search that was killed ends as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shearing.files.durable import read_json, write_json
from shearing.pruning.sparse.search.fitness import Fitness
from shearing.pruning.sparse.search.genome import Genome, Space
from shearing.pruning.sparse.search.population import first_population


@dataclass(frozen=True)
class SearchSettings:
    """How long and how widely is searched.

    Attributes:
        population: candidates that survive a generation.
        offspring: new ones in a generation.
        generations: rounds of variation and selection.
        crossover: share of the offspring that has two parents.
        more_swaps: chance of one more paired swap, after each.
        survivors: share that is kept from one stage of text to the next.
    """

    population: int = 24
    offspring: int = 24
    generations: int = 20
    crossover: float = 0.3
    more_swaps: float = 0.5
    survivors: float = 0.25


@dataclass
class State:
    """A search between two generations.

    Attributes:
        generation: how many are done; -1 before the first population.
        population: candidates and where they come from, best first.
        history: of each generation how good its candidates are, and what that has cost.
        seconds: spent so far.
        passes, tokens: forward passes, and tokens read by them.
    """

    generation: int
    population: list[tuple[Genome, str]]
    history: list[dict[str, Any]]
    seconds: float
    passes: int
    tokens: int


class Search:
    """One search.

    Args:
        space: all candidates.
        sensitivity: of each unit.
        starts: candidates by name that are measured on all text from the beginning.
        settings: see there.
        seed: of every draw.
        path: file of the state.
    """

    def __init__(
        self,
        space: Space,
        *,
        sensitivity: Sequence[float],
        starts: Mapping[str, Genome],
        settings: SearchSettings,
        seed: int,
        path: Path,
    ) -> None:
        self._space, self._sensitivity, self._settings, self._path = space, sensitivity, settings, path
        self._starts = {**starts, "uniform": space.uniform()}
        self._random = np.random.default_rng(seed)
        self.state = State(-1, [], [], 0.0, 0, 0)
        self.known: dict[Genome, tuple[int, float]] = {}
        if path.is_file():
            self._restore(read_json(path))

    @property
    def starts(self) -> dict[str, Genome]:
        """Candidates by name, uniform among them."""
        return dict(self._starts)

    def run(self, fitness: Fitness, *, advance: Callable[[dict[str, Any]], None] = lambda _: None) -> Genome:
        """Search until the generations are done; the best candidate on all text.

        It is never worse there than any of the starts, and what is best never gets worse from one generation to the
        next.

        Args:
            fitness: of candidates, by stage.
            advance: called with the record of every generation.
        """
        while self.state.generation < self._settings.generations:
            started, passes, tokens = time.monotonic(), fitness.passes, fitness.tokens
            if self.state.generation < 0:
                found = first_population(
                    self._space,
                    sensitivity=self._sensitivity,
                    starts=self._starts,
                    size=self._settings.population + self._settings.offspring,
                    random=self._random,
                )
                always = list(dict.fromkeys(self._starts.values()))
                others = {genome: origin for genome, origin in found.items() if genome not in always}
                parents = {genome: found[genome] for genome in always}
            else:
                parents = dict(self.state.population)
                others = self._offspring(fitness)
            candidates = parents | {genome: others[genome] for genome in self._screen(list(others), fitness=fitness)}
            last = fitness.num_stages - 1
            ranked = sorted(candidates, key=lambda genome: fitness(genome, last))
            self.state.population = [(genome, candidates[genome]) for genome in ranked[: self._settings.population]]
            self.state.generation += 1
            self.state.seconds += time.monotonic() - started
            self.state.passes += fitness.passes - passes
            self.state.tokens += fitness.tokens - tokens
            self.state.history.append(self._record(fitness))
            self.known = fitness.known
            self._save()
            advance(self.state.history[-1])
        return self.state.population[0][0]

    def _offspring(self, fitness: Fitness) -> dict[Genome, str]:
        """New candidates with the origin of their first parent; fewer where variation finds no more."""
        population = self.state.population
        seen = set(fitness.known)
        children: dict[Genome, str] = {}
        for _ in range(20 * self._settings.offspring):
            if len(children) >= self._settings.offspring:
                break
            one, other = (min(self._random.integers(len(population), size=2)) for _ in range(2))
            genome, origin = population[one]
            if self._random.random() < self._settings.crossover:
                genome = self._space.crossover(genome, population[other][0], random=self._random)
            else:
                genome = self._space.mutate(genome, more=self._settings.more_swaps, random=self._random)
            if genome not in seen:
                children.setdefault(genome, origin)
        return children

    def _screen(self, candidates: list[Genome], *, fitness: Fitness) -> list[Genome]:
        """Those that are worth all text: after every stage but the last the best share of those left."""
        for stage in range(fitness.num_stages - 1):
            keep = max(1, round(self._settings.survivors * len(candidates)))
            candidates = sorted(candidates, key=lambda genome: fitness(genome, stage))[:keep]
        return candidates

    def _record(self, fitness: Fitness) -> dict[str, Any]:
        last = fitness.num_stages - 1
        losses = [fitness(genome, last) for genome, _ in self.state.population]
        return {
            "generation": self.state.generation,
            "best": losses[0],
            "mean": sum(losses) / len(losses),
            "origin": self.state.population[0][1],
            **{name: fitness(genome, last) for name, genome in self._starts.items()},
            "passes": self.state.passes,
            "tokens": self.state.tokens,
            "seconds": round(self.state.seconds, 3),
        }

    def _save(self) -> None:
        state = asdict(self.state)
        known = [[list(genome), rows, total] for genome, (rows, total) in self.known.items()]
        write_json(self._path, {"state": state, "known": known, "random": self._random.bit_generator.state})

    def _restore(self, saved: Mapping[str, Any]) -> None:
        state = dict(saved["state"])
        state["population"] = [(tuple(genome), origin) for genome, origin in state["population"]]
        self.state = State(**state)
        self.known = {tuple(genome): (rows, total) for genome, rows, total in saved["known"]}
        self._random.bit_generator.state = saved["random"]
