from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from shearing.data.corpus.domain_folder import Place, decide_places
from shearing.data.corpus.format import HELD_OUT, SPLITS
from shearing.data.corpus.splits import Documents, Earlier, Sides, SplitSize, SplitSizes, choose_splits, split_keys
from shearing.errors import ShearingError

HALF = 1 << 63
contents = st.lists(st.integers(0, 30), min_size=3, max_size=60)
sizes = st.one_of(
    st.tuples(*[st.integers(1, 49).map(lambda percent: SplitSize(share=Fraction(percent, 100)))] * 2),
    st.tuples(*[st.integers(1, 50).map(lambda tokens: SplitSize(tokens=tokens))] * 2),
).map(lambda both: SplitSizes(*both))


@pytest.mark.parametrize("text", ["5%", "0.5%", "10%", "0.00005%", "12.3456789%", "33.3%", "5 tokens"])
def test_a_size_is_read_as_it_is_written(text: str) -> None:
    assert str(SplitSize.parse(text)) == text


def tenths(validation: int = 1, test: int = 1) -> SplitSizes:
    return SplitSizes(*(SplitSize(share=Fraction(each, 10)) for each in (validation, test)))


def documents(numbers: list[int], *, clusters: dict[int, int] | None = None) -> Documents:
    """Documents of these contents; a content's length is a function of it."""
    hashes = np.array([(n * 0x9E3779B97F4A7C15) % 2**64 for n in numbers], dtype=np.uint64)
    tokens = np.array([1 + n % 7 for n in numbers], dtype=np.int64)
    found = None if clusters is None else np.array([clusters.get(n, -1) for n in numbers], dtype=np.int64)
    return Documents(hashes=hashes, tokens=tokens, clusters=found)


def sides(domains: dict[str, list[int]], **settings: object) -> dict[str, dict[str, set[int]]]:
    """Contents in each split of each domain."""
    clusters = settings.pop("clusters", None)
    chosen = choose_splits({k: documents(v, clusters=clusters) for k, v in domains.items()}, **settings)  # type: ignore[arg-type]
    found: dict[str, dict[str, set[int]]] = {}
    for name, numbers in domains.items():
        assert len(chosen[name]) == len(numbers)
        found[name] = {
            split: {n for n, side in zip(numbers, chosen[name], strict=True) if side == place}
            for place, split in enumerate(SPLITS)
        }
    return found


def of_all(found: dict[str, dict[str, set[int]]]) -> list[set[int]]:
    """Contents in each split, domains taken together."""
    return [set().union(*(each[split] for each in found.values())) for split in SPLITS]


@given(domains=st.dictionaries(st.sampled_from("abc"), contents, min_size=1), sizes=sizes, seed=st.integers(0, 2**70))
def test_no_content_is_in_two_splits_of_anything(domains: dict[str, list[int]], sizes: SplitSizes, seed: int) -> None:
    try:
        found = sides(domains, sizes=sizes, seed=seed)
    except ShearingError:
        assume(False)
    every = of_all(found)
    assert sum(map(len, every)) == len(set.union(*every))
    assert all(each[split] for each in found.values() for split in SPLITS)


@given(numbers=contents, sizes=sizes, seed=st.integers(0, 9))
def test_as_few_contents_as_reach_the_sizes(numbers: list[int], sizes: SplitSizes, seed: int) -> None:
    assume(len(set(numbers)) > 2)
    each = documents(numbers)
    total = int(each.tokens.sum())
    targets = [size.tokens or total * size.share for size in (sizes.validation, sizes.test)]  # type: ignore[operator]
    if sizes.test.tokens is not None and sum(targets) >= total:
        with pytest.raises(ShearingError, match="less together than domain d has"):
            choose_splits({"d": each}, sizes=sizes, seed=seed)
        return
    keys = split_keys(each.hashes, seed=seed)
    largest = max(int(each.tokens[keys == key].sum()) for key in keys)
    assume(4 * largest <= total or largest <= 2 * min(targets))  # those that are not are passed over
    side = choose_splits({"d": each}, sizes=sizes, seed=seed)["d"]
    # By their keys: validation, test, training.
    assert keys[side == 1].max() < keys[side == 2].min()
    assert keys[side == 2].max() < keys[side == 0].min()
    for place, target in zip((1, 2), targets, strict=True):
        chosen = side == place
        # Reached, unless that would leave nothing to what comes after; and without the last content not reached.
        behind = len(set(keys[keys > keys[chosen].max()]))
        assert each.tokens[chosen].sum() >= target or behind == 3 - place
        assert each.tokens[chosen & (keys != keys[chosen].max())].sum() < target


@given(
    lengths=st.lists(st.integers(1, 30), min_size=3, max_size=30),
    long=st.lists(st.integers(1_000, 30_000), max_size=3),
    percent=st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_long_documents_stay_in_training(lengths: list[int], long: list[int], percent: int, seed: int) -> None:
    tokens = np.array([*lengths, *long], dtype=np.int64)
    each = Documents(hashes=documents(list(range(len(tokens)))).hashes, tokens=tokens)
    size, total = SplitSize(share=Fraction(percent, 100)), int(tokens.sum())
    side = choose_splits({"d": each}, sizes=SplitSizes(size, size), seed=seed)["d"]
    assert set(side) == {0, 1, 2}
    far = np.flatnonzero((4 * tokens > total) & (tokens > 2 * size.of(total)))
    if len(tokens) - len(far) > 1:
        assert not side[far].any()
        for place in (1, 2):
            assert tokens[side == place].sum() < size.of(total) + max(2 * size.of(total), total / 4)


def test_one_long_document_is_passed_over() -> None:
    tokens = np.array([26] * 12 + [28_065], dtype=np.int64)
    each = Documents(hashes=documents(list(range(13))).hashes, tokens=tokens)
    sizes = SplitSizes(*[SplitSize.parse("5%")] * 2)
    for seed in range(20):
        side = choose_splits({"d": each}, sizes=sizes, seed=seed)["d"]
        assert side[12] == 0
        assert set(side) == {0, 1, 2}


@given(numbers=contents, seed=st.integers(0, 9), share=st.integers(1, 5))
def test_validation_is_the_same_whatever_the_test_takes(numbers: list[int], seed: int, share: int) -> None:
    assume(len(set(numbers)) > 2)
    one, other = (sides({"d": numbers}, sizes=tenths(2, test), seed=seed)["d"] for test in (1, share))
    assert one["validation"] == other["validation"]


@given(numbers=contents, more=contents, seed=st.integers(0, 9))
def test_the_order_of_documents_does_not_matter(numbers: list[int], more: list[int], seed: int) -> None:
    assume(len(set(numbers)) > 2 and len(set(more)) > 2)
    try:
        found = sides({"a": numbers, "b": more}, sizes=tenths(), seed=seed)
    except ShearingError:
        assume(False)
    assert sides({"b": more[::-1], "a": numbers[::-1]}, sizes=tenths(), seed=seed) == found


@given(first=contents, second=contents, seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_earlier_domains_stand(first: list[int], second: list[int], seeds: tuple[int, int]) -> None:
    assume(len(set(first)) > 2)
    earlier = sides({"a": first}, sizes=tenths(), seed=seeds[0])["a"]
    known = Earlier(**{split: documents(sorted(earlier[split])).hashes for split in SPLITS})
    new = set(second).difference(*earlier.values())
    missing = sum(not set(second) & earlier[split] for split in SPLITS)
    if len(new) < missing:
        with pytest.raises(ShearingError, match="domain b"):
            sides({"b": second}, sizes=tenths(), seed=seeds[1], earlier=known)
        return
    later = sides({"b": second}, sizes=tenths(), seed=seeds[1], earlier=known)["b"]
    every = of_all({"a": earlier, "b": later})
    assert sum(map(len, every)) == len(set.union(*every))


@given(
    domains=st.fixed_dictionaries({"a": contents, "b": contents, "c": contents}),
    together=st.integers(1, 3),
    lost=st.sampled_from("abc"),
    sizes=sizes,
    seed=st.integers(0, 9),
    long=st.integers(1, 100),
)
def test_a_domain_made_again_beside_the_others_is_what_it_was(
    domains: dict[str, list[int]], together: int, lost: str, sizes: SplitSizes, seed: int, long: int
) -> None:
    """Whichever of them were made in one preparation, the rest in a later one."""
    every = {name: documents(numbers) for name, numbers in domains.items()}
    for each in every.values():
        each.tokens[each.hashes % 5 == 0] *= long

    def beside(names: Iterable[str]) -> Earlier:
        found = {
            split: [every[name].hashes[chosen[name] == place] for name in names] for place, split in enumerate(SPLITS)
        }
        return Earlier(**{split: np.concatenate([np.empty(0, np.uint64), *each]) for split, each in found.items()})

    chosen: dict[str, Sides] = {}
    try:
        for names in ("abc"[:together], "abc"[together:]):
            chosen |= choose_splits(
                {name: every[name] for name in names}, sizes=sizes, seed=seed, earlier=beside(chosen)
            )
    except ShearingError:
        assume(False)
    others = beside([name for name in domains if name != lost])
    again = choose_splits({lost: every[lost]}, sizes=sizes, seed=seed, earlier=others)
    assert np.array_equal(again[lost], chosen[lost])


@given(
    domains=st.fixed_dictionaries({"a": contents, "b": contents}),
    clusters=st.dictionaries(st.integers(0, 30), st.integers(0, 4)),
    seed=st.integers(0, 9),
)
def test_clusters_stay_together(domains: dict[str, list[int]], clusters: dict[int, int], seed: int) -> None:
    try:
        found = sides(domains, sizes=tenths(), seed=seed, clusters=clusters)
    except ShearingError:
        assume(False)
    for cluster in set(clusters.values()):
        members = {n for n, c in clusters.items() if c == cluster} & {n for each in domains.values() for n in each}
        on = {split for each in found.values() for split in SPLITS if each[split] & members}
        assert len(on) <= 1


def test_another_seed_holds_out_others() -> None:
    chosen = [choose_splits({"d": documents(list(range(200)))}, sizes=tenths(), seed=s)["d"] for s in (0, 1)]
    assert not np.array_equal(*chosen)
    keys = split_keys(np.arange(10_000, dtype=np.uint64), seed=0)
    assert len(np.unique(keys)) == 10_000
    assert 0.45 < (keys < HALF).mean() < 0.55


def test_removed_documents_have_no_side() -> None:
    each = {
        "a": documents([1, 2, 2, 3, 3, 4, 5], clusters={3: 0, 4: 0}),
        "b": documents([4, 6, 7, 8], clusters={4: 0}),
    }
    places = decide_places(each, sizes=tenths(), seed=0, remove_duplicates=True, remove_near_duplicates=True)
    gone = [Place.NEAR_DUPLICATE] * 2
    assert places["a"][4:6].tolist() == gone
    assert places["a"][2] == Place.DUPLICATE
    assert places["b"][0] == Place.NEAR_DUPLICATE
    assert sorted(places["b"][1:]) == [Place.TRAIN, Place.VALIDATION, Place.TEST]
    assert [Place[split.upper()] for split in SPLITS] == [0, 1, 2]


def test_sizes_in_a_manifest() -> None:
    assert tenths(2, 1).to_json() == dict(zip(HELD_OUT, ("20%", "10%"), strict=True))
    with pytest.raises(ValueError, match="below 100%"):
        tenths(5, 5)


@pytest.mark.parametrize("other", [[2, 3], [1, 2]])
def test_why_a_domain_is_too_small(other: list[int]) -> None:
    earlier = Earlier(*(documents(numbers).hashes for numbers in ([1], [2], [3])))
    reason = "too few different documents" if 1 not in other else "in other parts of domains prepared earlier"
    with pytest.raises(ShearingError, match=reason):
        sides({"b": [n + 10 * (1 not in other) for n in other]}, sizes=tenths(), seed=0, earlier=earlier)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("5%", "5%"),
        ("0.5 %", "0.5%"),
        ("2M tokens", "2000000 tokens"),
        ("1_000 tokens", "1000 tokens"),
        ("1,000 tokens", "1000 tokens"),
    ],
)
def test_sizes(text: str, written: str) -> None:
    assert str(SplitSize.parse(text)) == written
    assert SplitSize.parse(written) == SplitSize.parse(text)


@pytest.mark.parametrize("text", ["0%", "100%", "5", "0 tokens", "2M", "1.5 tokens", "-5%", "", "0,4B tokens"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a share of the tokens"):
        SplitSize.parse(text)
