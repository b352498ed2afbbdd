"""The sampler against its definition, written as a loop over whole numbers: any weights, processes, resumptions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies as st

from shearing.data.corpus.bos import Bos
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.data.mixture.sampler import UNITS, Mixture, _deal_few, _deal_many, _in_units, permuted

Log = list[tuple[int, list[float]]]


class Numbered:
    """A corpus of rows that say which they are: domain and number."""

    fingerprint = "numbered"
    bos = Bos()
    all_count = True

    def __init__(self, rows: Sequence[int]) -> None:
        self.domains = [f"domain {i}" for i in range(len(rows))]
        self._rows = dict(zip(self.domains, rows, strict=True))

    def train_rows(self, domain: str, *, sequence_length: int) -> int:
        return self._rows[domain]

    def counted(self, chosen: Sequence[tuple[str, int]], *, sequence_length: int) -> None:
        """All do."""

    def rows(self, chosen: Sequence[tuple[str, int]], *, sequence_length: int) -> npt.NDArray[np.int64]:
        return np.array([(self.domains.index(domain), row) for domain, row in chosen], dtype=np.int64)


def mixture(rows: Sequence[int], weights: Sequence[float], *, seed: int = 0) -> Mixture:
    corpus: Any = Numbered(rows)
    return Mixture(corpus, seed=seed, sequence_length=1, weights=dict(zip(corpus.domains, weights, strict=True)))


def named(weights: Sequence[float]) -> dict[str, float]:
    return {f"domain {i}": weight for i, weight in enumerate(weights)}


def defined(log: Log, *, rows: Sequence[int], seed: int) -> Iterator[tuple[int, int]]:
    """Domain and row of each sample, from the definition; `log` is (first sample, weights), from 0 on."""
    deficits, dealt = [0] * len(rows), [0] * len(rows)
    keys = mixture(rows, log[0][1], seed=seed)._key
    for (first, weights), (last, _) in itertools.pairwise([*log, (10**9, [])]):
        units = [int(unit) for unit in _in_units(weights)]
        for _ in range(first, last):
            chosen, soonest = -1, 0.0
            for domain, unit in enumerate(units):
                deficits[domain] += unit
                if deficits[domain] > 0 and unit:
                    due = (UNITS - deficits[domain]) / unit
                    if chosen < 0 or due < soonest:
                        chosen, soonest = domain, due
            if chosen < 0:
                due_of = {domain: (UNITS - deficits[domain]) / unit for domain, unit in enumerate(units) if unit}
                chosen = min(due_of, key=lambda domain: due_of[domain])
            deficits[chosen] -= UNITS
            walk, position = divmod(dealt[chosen], rows[chosen])
            key = np.array([keys(chosen, walk)], dtype=np.uint64)
            row = permuted(np.array([position]), sizes=np.array([rows[chosen]]), keys=key)
            dealt[chosen] += 1
            yield chosen, int(row[0])


weight = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-12, 1.0))


@st.composite
def runs(draw: st.DrawFn, *, most_domains: int = 40) -> tuple[list[int], Log]:
    """Rows of each domain, and a log of weights; zeros, ties and tiny weights included."""
    count = draw(st.integers(1, most_domains))
    rows = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    vectors = st.lists(weight, min_size=count, max_size=count).filter(any)
    changes = draw(st.lists(st.tuples(st.integers(1, 60), vectors), max_size=4))
    firsts = itertools.accumulate(gap for gap, _ in changes)
    return rows, [(0, draw(vectors)), *zip(firsts, (weights for _, weights in changes), strict=True)]


@settings(max_examples=80, deadline=None)
@given(run=runs(), seed=st.integers(0, 3), start=st.integers(0, 200), count=st.integers(1, 80))
def test_any_slice_is_what_the_definition_says(run: tuple[list[int], Log], seed: int, start: int, count: int) -> None:
    rows, log = run
    dealt = mixture(rows, log[0][1], seed=seed)
    for first_sample, weights in log[1:]:
        dealt.update_weights(named(weights), first_sample=first_sample)
    batch = dealt.batch(first_sample=start, num_sequences=count)
    expected = list(itertools.islice(defined(log, rows=rows, seed=seed), start, start + count))
    assert [tuple(row) for row in batch.tokens.tolist()] == expected
    assert batch.domain_ids.tolist() == [domain for domain, _ in expected]


def test_the_sequence_never_changes_between_versions() -> None:
    """Units, keys and permutations, which the definition takes from the code, as well."""
    dealt = mixture([5, 7, 3], [5.0, 3.0, 2.0], seed=4)
    dealt.update_weights(named([1.0, 2.0, 7.0]), first_sample=8)
    batch = dealt.batch(first_sample=0, num_sequences=16)
    assert batch.domain_ids.tolist() == [0, 1, 0, 2, 0, 1, 0, 0, 2, 2, 1, 2, 2, 2, 2, 1]
    assert batch.rows.tolist() == [2, 1, 1, 2, 3, 6, 4, 0, 0, 1, 2, 0, 1, 2, 0, 4]
    assert _in_units([5.0, 3.0, 2.0]).tolist() == [549755813889, 329853488332, 219902325555]
    assert _in_units([0.0, 1e-300, 3.0]).tolist() == [0, 1, UNITS - 1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_many_domains_at_once_are_dealt_as_one_by_one(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 60))
    vectors = st.lists(weight, min_size=count, max_size=count).filter(any)
    deficits = np.zeros(count)
    for _ in range(3):
        units = _in_units(data.draw(vectors))
        size = data.draw(st.integers(1, 150))
        few = _deal_few(deficits, units=units, count=size)
        assert few.tolist() == _deal_many(deficits, units=units, count=size).tolist()
        deficits = deficits + size * units - UNITS * np.bincount(few, minlength=count)
        assert deficits.sum() == 0


@settings(max_examples=40, deadline=None)
@given(
    run=runs(most_domains=6),
    pieces=st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 3)), min_size=1, max_size=4
    ),
    every=st.integers(1, 4),
)
def test_processes_and_resumptions_see_one_sequence(
    run: tuple[list[int], Log], pieces: list[tuple[int, int, int]], every: int
) -> None:
    """Pieces of (steps, processes): each continues from the state of the one before, through JSON."""
    rows, log = run
    vectors = itertools.cycle([weights for _, weights in log])
    depth, per_step = pieces[0][2], 12
    announced: Log = [(0, next(vectors))]
    state, seen, step = None, [], 0
    for steps, processes, _ in pieces:
        mixtures = [mixture(rows, announced[0][1]) for _ in range(processes)]
        if state is not None:
            for each in mixtures:
                each.load_state_dict(json.loads(state))
        ranks = [
            Prefetcher(each, sequences_per_step=per_step, rank=rank, world_size=processes, depth=depth)
            for rank, each in enumerate(mixtures)
        ]
        for _ in range(steps):
            seen += [tuple(row) for rank in ranks for row in rank.next().tokens.tolist()]
            step += 1
            if step % every == 0:
                weights = next(vectors)
                [first_sample] = {rank.update_weights(named(weights)) for rank in ranks}
                announced = [
                    *((first, old) for first, old in announced if first < first_sample),
                    (first_sample, weights),
                ]
        [state] = {json.dumps(rank.state_dict()) for rank in ranks}
        for rank in ranks:
            rank.close()
    assert seen == list(itertools.islice(defined(announced, rows=rows, seed=0), len(seen)))


@settings(max_examples=60, deadline=None)
@given(run=runs(), samples=st.integers(1, 1500))
def test_shares_are_within_one_sample_of_the_quota(run: tuple[list[int], Log], samples: int) -> None:
    rows, [(_, weights), *_] = run
    dealt = mixture(rows, weights).samples_per_domain(next_sample=samples)
    assert sum(dealt.values()) == samples
    for name, each in named(weights).items():
        assert abs(dealt[name] - samples * each / sum(weights)) < 1


@settings(max_examples=60, deadline=None)
@given(run=runs())
def test_a_domain_without_weight_is_never_dealt(run: tuple[list[int], Log]) -> None:
    rows, log = run
    dealt = mixture(rows, log[0][1])
    for first_sample, weights in log[1:]:
        dealt.update_weights(named(weights), first_sample=first_sample)
    end = log[-1][0] + 100
    domain_ids = dealt.batch(first_sample=0, num_sequences=end).domain_ids.tolist()
    for (first, weights), (last, _) in itertools.pairwise([*log, (end, [])]):
        assert all(weights[domain] > 0 for domain in domain_ids[first:last])


@settings(max_examples=60, deadline=None)
@given(run=runs(most_domains=8))
def test_every_pass_is_a_permutation_whatever_the_weights(run: tuple[list[int], Log]) -> None:
    rows, log = run
    dealt = mixture(rows, log[0][1])
    for first_sample, weights in log[1:]:
        dealt.update_weights(named(weights), first_sample=first_sample)
    batch = dealt.batch(first_sample=0, num_sequences=400).tokens.numpy()
    for domain, size in enumerate(rows):
        walked = batch[batch[:, 0] == domain, 1]
        for start in range(0, len(walked), size):
            walk = walked[start : start + size].tolist()
            assert len(set(walk)) == len(walk)
            assert set(walk) <= set(range(size))


def test_a_domain_that_lost_its_weight_while_much_was_owed() -> None:
    # After two samples of four equal domains two are owed half a sample each; nothing is owed to the only one left.
    dealt = mixture([5] * 4, [1.0] * 4)
    dealt.update_weights(named([1.0, 0.0, 0.0, 0.0]), first_sample=2)
    assert dealt.batch(first_sample=0, num_sequences=6).domain_ids.tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("domains", [7, 1000])
def test_state_stays_small_in_a_long_run(domains: int) -> None:
    generator = np.random.default_rng(0)
    dealt = mixture([50] * domains, generator.random(domains).tolist())
    sizes = []
    for step in range(1, 80):
        dealt.update_weights(named(generator.random(domains).tolist()), first_sample=32 * step + 64)
        dealt.batch(first_sample=32 * (step - 1), num_sequences=32)
        sizes.append(len(json.dumps(dealt.state_dict())))
    assert max(sizes) < 100_000
    assert max(sizes[40:]) < 1.1 * max(sizes[:20])
