from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from shearing.data.corpus.corpus import Corpus
from shearing.data.mixture.prefetcher import Prefetcher
from shearing.data.mixture.sampler import UNITS, Batch, Mixture, permuted
from shearing.errors import ShearingError

DOMAINS = {"books": 30, "code": 43, "legal": 12}
SEQUENCE_LENGTH = 16
MakeCorpus = Callable[[dict[str, int]], Corpus]

weights = st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=3)
log = st.lists(st.tuples(st.integers(1, 40), weights), max_size=4)


@pytest.fixture(scope="module")
def corpus(make_corpus: MakeCorpus) -> Corpus:
    return make_corpus(DOMAINS)


def named(values: list[float]) -> dict[str, float]:
    return dict(zip(DOMAINS, values, strict=True))


def mixture(corpus: Corpus, values: list[float], *, seed: int = 0) -> Mixture:
    return Mixture(corpus, seed=seed, sequence_length=SEQUENCE_LENGTH, weights=named(values))


def announce(dealt: Mixture, changes: list[tuple[int, list[float]]]) -> None:
    first_sample = 0
    for gap, values in changes:
        first_sample += gap
        dealt.update_weights(named(values), first_sample=first_sample)


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.domain_ids, other.domain_ids)


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permutations_are_bijections(size: int, key: int) -> None:
    images = permuted(np.arange(size), sizes=np.full(size, size), keys=np.full(size, key, dtype=np.uint64))
    assert sorted(images.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**40, 2**40 + 1, 10**15 + 37])
def test_permutations_of_huge_domains_stay_inside_and_apart(size: int) -> None:
    positions = np.concatenate([np.arange(500), size - 1 - np.arange(500)])
    images = permuted(positions, sizes=np.full(1000, size), keys=np.full(1000, 7, dtype=np.uint64))
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < size


def test_permutations_never_change_between_versions() -> None:
    images = permuted(np.arange(8), sizes=np.full(8, 1000), keys=np.full(8, 42, dtype=np.uint64))
    assert images.tolist() == [177, 655, 660, 570, 667, 624, 939, 141]


def test_permutations_look_random() -> None:
    size = 1000
    together = [
        permuted(np.arange(size), sizes=np.full(size, size), keys=np.full(size, key, dtype=np.uint64))
        for key in range(50)
    ]
    correlations = [np.corrcoef(np.arange(size), images)[0, 1] for images in together]
    assert abs(np.mean(correlations)) < 0.02
    assert max(map(abs, correlations)) < 0.15
    first = [images[0] for images in together]
    assert len(set(first)) > 40


@settings(max_examples=60, deadline=None)
@given(start=weights, changes=log, cuts=st.lists(st.integers(0, 120), max_size=6), seed=st.integers(0, 3))
def test_any_slicing_in_any_order_is_one_sequence(
    corpus: Corpus, start: list[float], changes: list[tuple[int, list[float]]], cuts: list[int], seed: int
) -> None:
    whole = mixture(corpus, start, seed=seed)
    announce(whole, changes)
    everything = whole.batch(first_sample=0, num_sequences=120)
    sliced = mixture(corpus, start, seed=seed)
    announce(sliced, changes)
    edges = sorted({0, 120, *cuts})
    for first, end in reversed(list(itertools.pairwise(edges))):
        batch = sliced.batch(first_sample=first, num_sequences=end - first)
        assert batch.first_sample == first
        assert torch.equal(batch.tokens, everything.tokens[first:end])
        assert torch.equal(batch.domain_ids, everything.domain_ids[first:end])


@settings(max_examples=60, deadline=None)
@given(start=weights, changes=log, stop=st.integers(1, 119), later=weights)
def test_resuming_anywhere_goes_on_as_if_never_stopped(
    corpus: Corpus, start: list[float], changes: list[tuple[int, list[float]]], stop: int, later: list[float]
) -> None:
    unbroken = mixture(corpus, start)
    announce(unbroken, changes)
    unbroken.batch(first_sample=0, num_sequences=stop)
    state = json.loads(json.dumps(unbroken.state_dict()))
    resumed = mixture(corpus, [1.0, 1.0, 1.0])
    resumed.load_state_dict(state)
    assert resumed.next_sample == stop
    assert resumed.samples_per_domain() == unbroken.samples_per_domain()
    assert resumed.weights == unbroken.weights
    for each in (unbroken, resumed):
        each.update_weights(named(later), first_sample=200)
    assert_same(
        resumed.batch(first_sample=stop, num_sequences=250), unbroken.batch(first_sample=stop, num_sequences=250)
    )
    with pytest.raises(ValueError, match="where the run was resumed"):
        resumed.batch(first_sample=stop - 1, num_sequences=1)


@settings(max_examples=60, deadline=None)
@given(values=weights, samples=st.integers(1, 2000))
def test_quotas_are_within_one_of_exact(corpus: Corpus, values: list[float], samples: int) -> None:
    dealt = mixture(corpus, values).samples_per_domain(next_sample=samples)
    for name, weight in named(values).items():
        assert abs(dealt[name] - samples * weight / sum(values)) < 1


@settings(max_examples=30, deadline=None)
@given(segments=st.lists(weights, min_size=1, max_size=20), length=st.integers(1, 60))
def test_quotas_stay_near_exact_when_weights_change(corpus: Corpus, segments: list[list[float]], length: int) -> None:
    dealt = mixture(corpus, segments[0])
    announce(dealt, [(length, values) for values in segments[1:]])
    due = np.zeros(3)
    for i, values in enumerate(segments):
        due += length * np.array(values) / sum(values)
        counts = dealt.samples_per_domain(next_sample=(i + 1) * length)
        # Future weights are unknown, so one whole sample cannot be promised; ln(3) + 1 more than covers greedy dealing.
        assert np.abs(np.array([counts[name] for name in DOMAINS]) - due).max() < 2.1


def test_a_rare_domain_is_dealt_although_weights_change_often(corpus: Corpus) -> None:
    dealt = mixture(corpus, [0.6, 0.399, 0.001])
    for first_sample in range(50, 20_000, 50):
        shift = 0.05 if first_sample % 100 else -0.05
        dealt.update_weights(named([0.6 + shift, 0.399 - shift, 0.001]), first_sample=first_sample)
    assert dealt.samples_per_domain(next_sample=20_000)["legal"] in (19, 20, 21)


def test_a_domain_of_weight_zero_is_not_dealt_and_a_tiny_one_is_not_lost(corpus: Corpus) -> None:
    none = mixture(corpus, [0.5, 0.5, 0.0])
    assert none.samples_per_domain(next_sample=1000) == {"books": 500, "code": 500, "legal": 0}
    tiny = mixture(corpus, [0.5, 0.5, 1e-300])
    assert tiny.state_dict()["log"][0][1][2] == 1e-300
    assert sum(tiny._log[0].units) == UNITS
    assert tiny._log[0].units[2] == 1


def test_each_pass_walks_all_rows_once_in_another_order(corpus: Corpus) -> None:
    rows = corpus.train_rows("legal", sequence_length=SEQUENCE_LENGTH)
    dealt = mixture(corpus, [0.0, 0.0, 1.0])
    tokens = dealt.batch(first_sample=0, num_sequences=3 * rows).tokens.tolist()
    expected = sorted(corpus.row("legal", i, sequence_length=SEQUENCE_LENGTH).tolist() for i in range(rows))
    passes = [tokens[i * rows : (i + 1) * rows] for i in range(3)]
    assert all(sorted(walk) == expected for walk in passes)
    assert passes[0] != passes[1] != passes[2]
    assert dealt.passes() == {"books": 0.0, "code": 0.0, "legal": 3.0}


def test_ids_name_the_domain_and_seeds_the_order(corpus: Corpus) -> None:
    batch = mixture(corpus, [1.0, 2.0, 1.0]).batch(first_sample=0, num_sequences=40)
    assert batch.tokens.shape == (40, SEQUENCE_LENGTH + 1)
    assert batch.tokens.dtype == batch.domain_ids.dtype == torch.int64
    for tokens, domain in zip(batch.tokens, batch.domain_ids, strict=True):
        assert set((tokens[tokens > 0] // 100).tolist()) == {int(domain)}
    for tokens, domain, row in zip(batch.tokens, batch.domain_ids, batch.rows.tolist(), strict=True):
        read = corpus.row(corpus.domains[int(domain)], row, sequence_length=SEQUENCE_LENGTH)
        assert torch.equal(tokens, torch.from_numpy(read))
    other = mixture(corpus, [1.0, 2.0, 1.0], seed=1).batch(first_sample=0, num_sequences=40)
    assert torch.equal(other.domain_ids, batch.domain_ids)
    assert not torch.equal(other.tokens, batch.tokens)


def test_weights_cannot_rewrite_the_past(corpus: Corpus) -> None:
    dealt = mixture(corpus, [1.0, 1.0, 1.0])
    dealt.batch(first_sample=0, num_sequences=10)
    with pytest.raises(ValueError, match="were dealt"):
        dealt.update_weights(named([1.0, 1.0, 1.0]), first_sample=9)
    dealt.update_weights(named([1.0, 0.0, 0.0]), first_sample=20)
    dealt.update_weights(named([0.0, 1.0, 0.0]), first_sample=20)
    assert set(dealt.batch(first_sample=20, num_sequences=30).domain_ids.tolist()) == {1}
    dealt.update_weights(named([1.0, 0.0, 0.0]), first_sample=90)
    dealt.update_weights(named([0.0, 0.0, 1.0]), first_sample=60)
    assert set(dealt.batch(first_sample=60, num_sequences=60).domain_ids.tolist()) == {2}
    for bad in ({"books": 1.0}, named([1.0, -1.0, 1.0]), named([0.0, 0.0, 0.0]), named([1.0, float("nan"), 1.0])):
        with pytest.raises(ValueError, match="weights"):
            dealt.update_weights(bad, first_sample=100)


def test_a_look_ahead_is_forgotten_when_weights_change(corpus: Corpus) -> None:
    looked, fresh = mixture(corpus, [1.0, 1.0, 1.0]), mixture(corpus, [1.0, 1.0, 1.0])
    looked.samples_per_domain(next_sample=50_000)
    looked._stretch_at(40_000)
    for each in (looked, fresh):
        each.update_weights(named([1.0, 5.0, 1.0]), first_sample=100)
    assert looked.state_dict(next_sample=45_000) == fresh.state_dict(next_sample=45_000)


def test_state_is_small_and_refuses_another_run(corpus: Corpus, make_corpus: MakeCorpus) -> None:
    dealt = mixture(corpus, [1.0, 2.0, 3.0])
    for step in range(1, 65):
        dealt.update_weights(named([1.0 / step, 0.7, 0.3]), first_sample=50 * step)
    state = dealt.state_dict(next_sample=3200)
    assert len(json.dumps(state)) < 10_000
    for other, field in (
        (Mixture(corpus, seed=1, sequence_length=SEQUENCE_LENGTH, weights=named([1, 1, 1])), "seed"),
        (Mixture(corpus, seed=0, sequence_length=8, weights=named([1, 1, 1])), "sequence length"),
        (mixture(make_corpus({**DOMAINS, "code": 44}), [1, 1, 1]), "corpus"),
    ):
        with pytest.raises(ShearingError, match=f"mixture state: {field}"):
            other.load_state_dict(state)
    with pytest.raises(ShearingError, match="version"):
        dealt.load_state_dict({**state, "version": 0})


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_sequence(corpus: Corpus, world_size: int) -> None:
    whole = mixture(corpus, [3.0, 2.0, 1.0])
    prefetchers = [
        Prefetcher(mixture(corpus, [3.0, 2.0, 1.0]), sequences_per_step=8, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in range(12):
        expected = whole.batch(first_sample=8 * step, num_sequences=8)
        slices = [each.next() for each in prefetchers]
        assert torch.equal(torch.cat([each.tokens for each in slices]), expected.tokens)
        if step == 5:
            changes = {each.update_weights(named([1.0, 1.0, 8.0])) for each in prefetchers}
            [first_sample] = changes
            whole.update_weights(named([1.0, 1.0, 8.0]), first_sample=first_sample)
    states = [each.state_dict() for each in prefetchers]
    assert all(state == whole.state_dict(next_sample=96) for state in states)
    for each in prefetchers:
        each.close()


def run_steps(prefetcher: Prefetcher, *, first: int, last: int, pause: float = 0.0) -> list[list[int]]:
    """Take steps, changing the weights after every third, as training would; returns the tokens of each step."""
    seen = []
    for step in range(first, last):
        seen.append(prefetcher.next().tokens.flatten().tolist())
        if step % 3 == 2:
            prefetcher.update_weights(named([1.0, 1.0 + step, 2.0]))
        time.sleep(pause)
    return seen


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 7, 12])
def test_prefetched_run_is_the_same_killed_or_not_fast_or_slow(corpus: Corpus, stop: int) -> None:
    with Prefetcher(mixture(corpus, [1.0, 1.0, 1.0]), sequences_per_step=4) as prefetcher:
        unbroken = run_steps(prefetcher, first=0, last=20, pause=0.002)
    with Prefetcher(mixture(corpus, [1.0, 1.0, 1.0]), sequences_per_step=4) as prefetcher:
        before = run_steps(prefetcher, first=0, last=stop)
        time.sleep(0.01)  # let it deal ahead of what was taken
        state = json.loads(json.dumps(prefetcher.state_dict()))
        assert prefetcher.samples_per_domain() == dict(zip(DOMAINS, state["dealt"], strict=True))
        assert prefetcher.next_sample == state["next_sample"] == 4 * stop
    resumed = mixture(corpus, [5.0, 1.0, 1.0])
    resumed.load_state_dict(state)
    with Prefetcher(resumed, sequences_per_step=4) as prefetcher:
        after = run_steps(prefetcher, first=stop, last=20)
        assert prefetcher.wait_seconds >= 0
        assert prefetcher.weights == named([1.0, 18.0, 2.0])
    assert before + after == unbroken


def test_weights_are_known_while_rows_are_read(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt, read, go_on = mixture(corpus, [1.0, 1.0, 1.0]), threading.Event(), threading.Event()
    batch = dealt.batch

    def slow(*, first_sample: int, num_sequences: int) -> Batch:
        if first_sample >= 12:
            read.set()
            assert go_on.wait(60)
        return batch(first_sample=first_sample, num_sequences=num_sequences)

    monkeypatch.setattr(dealt, "batch", slow)
    uniform, other = [1.0, 1.0, 1.0], [2.0, 1.0, 1.0]
    with Prefetcher(dealt, sequences_per_step=4) as prefetcher:
        prefetcher.next()
        assert prefetcher.update_weights(named(other)) == 12  # two steps are dealt ahead
        assert (prefetcher.weights, prefetcher.weights_taken) == (named(other), named(uniform))
        prefetcher.next()
        assert read.wait(60)  # the thread has the mixture until it goes on
        assert (prefetcher.weights, prefetcher.weights_taken) == (named(other), named(uniform))
        prefetcher.next()
        assert prefetcher.weights_taken == named(uniform)
        go_on.set()
        assert prefetcher.next().first_sample == 12
        assert prefetcher.weights_taken == named(other)


def test_an_error_while_dealing_reaches_the_caller(make_corpus: MakeCorpus) -> None:
    small = make_corpus({"books": 20, "code": 20, "legal": 20})
    dealt = Mixture(small, seed=0, sequence_length=SEQUENCE_LENGTH, weights=named([1.0, 1.0, 1.0]))
    for domain in DOMAINS:
        (small.path / domain / "train.bin").unlink()
    with Prefetcher(dealt, sequences_per_step=4) as prefetcher, pytest.raises(FileNotFoundError):
        prefetcher.next()


def test_a_closed_prefetcher_deals_no_more(corpus: Corpus) -> None:
    closed = Prefetcher(mixture(corpus, [1.0, 1.0, 1.0]), sequences_per_step=4)
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.next()


def test_prefetcher_arguments(corpus: Corpus) -> None:
    for arguments in ({"world_size": 3}, {"rank": 1}, {"depth": 0}):
        with pytest.raises(ValueError, match="rank"):
            Prefetcher(mixture(corpus, [1.0, 1.0, 1.0]), sequences_per_step=4, **arguments)
