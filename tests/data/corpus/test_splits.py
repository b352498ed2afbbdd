from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from shearing.data.corpus.domain_folder import Place, decide_places
from shearing.data.corpus.splits import Documents, Earlier, HeldoutSize, choose_heldout, split_keys
from shearing.errors import ShearingError

HALF = 1 << 63
contents = st.lists(st.integers(0, 30), min_size=2, max_size=60)
sizes = st.one_of(
    st.integers(1, 99).map(lambda percent: HeldoutSize(share=Fraction(percent, 100))),
    st.integers(1, 50).map(lambda tokens: HeldoutSize(tokens=tokens)),
)


def documents(numbers: list[int], *, clusters: dict[int, int] | None = None) -> Documents:
    """Documents of these contents; a content's length is a function of it."""
    hashes = np.array([(n * 0x9E3779B97F4A7C15) % 2**64 for n in numbers], dtype=np.uint64)
    tokens = np.array([1 + n % 7 for n in numbers], dtype=np.int64)
    found = None if clusters is None else np.array([clusters.get(n, -1) for n in numbers], dtype=np.int64)
    return Documents(hashes=hashes, tokens=tokens, clusters=found)


def sides(domains: dict[str, list[int]], **settings: object) -> dict[str, dict[bool, set[int]]]:
    """Contents on each side of each domain; True: held out."""
    clusters = settings.pop("clusters", None)
    chosen = choose_heldout({k: documents(v, clusters=clusters) for k, v in domains.items()}, **settings)  # type: ignore[arg-type]
    found: dict[str, dict[bool, set[int]]] = {}
    for name, numbers in domains.items():
        assert len(chosen[name]) == len(numbers)
        found[name] = {
            side: {n for n, s in zip(numbers, chosen[name], strict=True) if s == side} for side in (True, False)
        }
    return found


@given(domains=st.dictionaries(st.sampled_from("abc"), contents, min_size=1), size=sizes, seed=st.integers(0, 2**70))
def test_no_content_is_on_both_sides_of_anything(domains: dict[str, list[int]], size: HeldoutSize, seed: int) -> None:
    try:
        found = sides(domains, size=size, seed=seed)
    except ShearingError:
        assume(False)
    heldout = set().union(*(each[True] for each in found.values()))
    train = set().union(*(each[False] for each in found.values()))
    assert not heldout & train
    for each in found.values():
        assert each[True]
        assert each[False]


@given(numbers=contents, size=sizes, seed=st.integers(0, 9))
def test_as_few_contents_as_reach_the_size(numbers: list[int], size: HeldoutSize, seed: int) -> None:
    assume(len(set(numbers)) > 1)
    each = documents(numbers)
    total = int(each.tokens.sum())
    target = size.tokens if size.tokens is not None else total * size.share  # type: ignore[operator]
    if size.tokens is not None and size.tokens >= total:
        with pytest.raises(ShearingError, match="less than domain d has"):
            choose_heldout({"d": each}, size=size, seed=seed)
        return
    heldout = choose_heldout({"d": each}, size=size, seed=seed)["d"]
    keys = split_keys(each.hashes, seed=seed)
    largest = keys[heldout].max()
    assert (keys[~heldout] > largest).all()
    # Reached, unless that would leave nothing to train on; and without the last content not reached.
    assert each.tokens[heldout].sum() >= target or len(set(keys[~heldout])) == 1
    assert each.tokens[heldout & (keys != largest)].sum() < target


@given(numbers=contents, more=contents, seed=st.integers(0, 9))
def test_the_order_of_documents_does_not_matter(numbers: list[int], more: list[int], seed: int) -> None:
    assume(len(set(numbers)) > 1 and len(set(more)) > 1)
    size = HeldoutSize.parse("20%")
    try:
        found = sides({"a": numbers, "b": more}, size=size, seed=seed)
    except ShearingError:
        assume(False)
    assert sides({"b": more[::-1], "a": numbers[::-1]}, size=size, seed=seed) == found


@given(first=contents, second=contents, seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_earlier_domains_stand(first: list[int], second: list[int], seeds: tuple[int, int]) -> None:
    assume(len(set(first)) > 1)
    size = HeldoutSize.parse("20%")
    earlier = sides({"a": first}, size=size, seed=seeds[0])["a"]
    known = Earlier(*(documents(sorted(earlier[side])).hashes for side in (False, True)))
    if set(second) <= earlier[True] or set(second) <= earlier[False] or len(set(second)) == 1:
        with pytest.raises(ShearingError, match="domain b"):
            sides({"b": second}, size=size, seed=seeds[1], earlier=known)
        return
    later = sides({"b": second}, size=size, seed=seeds[1], earlier=known)["b"]
    assert not (later[True] | earlier[True]) & (later[False] | earlier[False])


@given(
    domains=st.fixed_dictionaries({"a": contents, "b": contents}),
    clusters=st.dictionaries(st.integers(0, 30), st.integers(0, 4)),
    seed=st.integers(0, 9),
)
def test_clusters_stay_together(domains: dict[str, list[int]], clusters: dict[int, int], seed: int) -> None:
    try:
        found = sides(domains, size=HeldoutSize.parse("20%"), seed=seed, clusters=clusters)
    except ShearingError:
        assume(False)
    for cluster in set(clusters.values()):
        members = {n for n, c in clusters.items() if c == cluster} & {n for each in domains.values() for n in each}
        on = {side for each in found.values() for side in (True, False) if each[side] & members}
        assert len(on) <= 1


def test_another_seed_holds_out_others() -> None:
    chosen = [
        choose_heldout({"d": documents(list(range(200)))}, size=HeldoutSize.parse("20%"), seed=s)["d"] for s in (0, 1)
    ]
    assert not np.array_equal(*chosen)
    keys = split_keys(np.arange(10_000, dtype=np.uint64), seed=0)
    assert len(np.unique(keys)) == 10_000
    assert 0.45 < (keys < HALF).mean() < 0.55


def test_removed_documents_have_no_side() -> None:
    each = {"a": documents([1, 2, 2, 3, 3, 4, 5], clusters={3: 0, 4: 0}), "b": documents([4, 6, 7], clusters={4: 0})}
    places = decide_places(
        each, size=HeldoutSize.parse("20%"), seed=0, remove_duplicates=True, remove_near_duplicates=True
    )
    gone = [Place.NEAR_DUPLICATE] * 2
    assert places["a"][4:6].tolist() == gone
    assert places["a"][2] == Place.DUPLICATE
    assert places["b"][0] == Place.NEAR_DUPLICATE
    assert (places["b"][1:] <= Place.HELDOUT).all()


@pytest.mark.parametrize(
    ("text", "written"),
    [("5%", "5%"), ("0.5 %", "0.5%"), ("2M tokens", "2000000 tokens"), ("1_000 tokens", "1000 tokens")],
)
def test_sizes(text: str, written: str) -> None:
    assert str(HeldoutSize.parse(text)) == written
    assert HeldoutSize.parse(written) == HeldoutSize.parse(text)


@pytest.mark.parametrize("text", ["0%", "100%", "5", "0 tokens", "2M", "1.5 tokens", "-5%", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a share of the tokens"):
        HeldoutSize.parse(text)
