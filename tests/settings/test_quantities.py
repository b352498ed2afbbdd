"""Quantities parse what recipes write and print what parses to the same quantity."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from pydantic import TypeAdapter, ValidationError

from shearing.errors import ShearingError
from shearing.settings.quantities import (
    BatchSize,
    Duration,
    ParameterCount,
    format_count,
    parse_bytes,
    parse_parameter_count,
)

counts = st.integers(min_value=1, max_value=10**15)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("640 steps", Duration(steps=640)),
        ("1 step", Duration(steps=1)),
        (640, Duration(steps=640)),
        ("640", Duration(steps=640)),
        ("0.4B tokens", Duration(tokens=400_000_000)),
        ("0.4 B tokens", Duration(tokens=400_000_000)),
        ("50.3b tokens", Duration(tokens=50_300_000_000)),
        ("1,000 tokens", Duration(tokens=1000)),
        ("12,345,678 tokens", Duration(tokens=12_345_678)),
        ("1,234.5K tokens", Duration(tokens=1_234_500)),
        ("131_072 tokens", Duration(tokens=131_072)),
        ("5e9 tokens", Duration(tokens=5_000_000_000)),
        ("1 token", Duration(tokens=1)),
        ("3k steps", Duration(steps=3000)),
        ("20%", Duration(fraction=0.2)),
        ("2.5 %", Duration(fraction=0.025)),
        ("0%", Duration(fraction=0.0)),
    ],
)
def test_durations_as_recipes_write_them(text: object, duration: Duration) -> None:
    assert Duration.parse(text) == duration


@pytest.mark.parametrize(
    "text", ["", "steps", "-3 steps", -3, "1.5 steps", "0.3 tokens", "101%", "3 epochs", "4 Btokens s", True, None, 0.2]
)
def test_no_durations(text: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the message is checked where users see it, in test_recipe
        Duration.parse(text)


@pytest.mark.parametrize("number", ["0,4B", "1,3B", "1,00", "1,0000", "0,400", "1_000,000", "1000,000", "1,"])
def test_commas_are_between_thousands(number: str) -> None:
    for parse, text in (
        (Duration.parse, f"{number} tokens"),
        (BatchSize.parse, f"{number} tokens"),
        (parse_parameter_count, number),
    ):
        with pytest.raises(ValueError, match=r"decimals after a point, as 0\.4B"):
            parse(text)


@given(st.one_of(counts.map(lambda n: Duration(steps=n)), counts.map(lambda n: Duration(tokens=n))))
def test_durations_round_trip(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration


@given(st.floats(min_value=0, max_value=1))
def test_fractions_round_trip_exactly(fraction: float) -> None:
    assert Duration.parse(str(Duration(fraction=fraction))) == Duration(fraction=fraction)


@given(st.one_of(counts.map(lambda n: BatchSize(sequences=n)), counts.map(lambda n: BatchSize(tokens=n))))
def test_batch_sizes_round_trip(size: BatchSize) -> None:
    assert BatchSize.parse(str(size)) == size


@given(counts)
def test_parameter_counts_round_trip(count: int) -> None:
    assert TypeAdapter(ParameterCount).validate_python(format_count(count)) == count


@given(tokens=counts, tokens_per_step=st.integers(1, 10**7))
def test_tokens_round_up_to_whole_steps(tokens: int, tokens_per_step: int) -> None:
    steps = Duration(tokens=tokens).in_steps(tokens_per_step=tokens_per_step)
    assert (steps - 1) * tokens_per_step < tokens <= steps * tokens_per_step


def test_fractions_are_shares_of_the_stage() -> None:
    assert Duration(fraction=0.2).in_steps(tokens_per_step=1, total_steps=3200) == 640
    with pytest.raises(ValueError, match="how long the stage is"):
        Duration(fraction=0.2).in_steps(tokens_per_step=1)


def test_batch_in_tokens_must_be_whole_sequences() -> None:
    assert BatchSize(tokens=131_072).in_sequences(sequence_length=4096) == 32
    with pytest.raises(ShearingError, match="'8192 tokens' or '12288 tokens'"):
        BatchSize(tokens=10_000).in_sequences(sequence_length=4096)
    with pytest.raises(ShearingError, match="write '4096 tokens'"):
        BatchSize(tokens=100).in_sequences(sequence_length=4096)


@pytest.mark.parametrize(("text", "count"), [("64M", 64 * 10**6), ("1.3B", 13 * 10**8), (5, 5), ("2_000", 2000)])
def test_parameter_counts(text: object, count: int) -> None:
    assert TypeAdapter(ParameterCount).validate_python(text) == count


@pytest.mark.parametrize("text", [0, -1, "64 MB", "many", 1.5, True])
def test_no_parameter_counts(text: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ParameterCount).validate_python(text)


@pytest.mark.parametrize("arguments", [{}, {"steps": 1, "tokens": 1}, {"steps": -1}, {"fraction": 1.5}])
def test_a_duration_has_one_unit(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"a duration|a fraction"):
        Duration(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [("5 GB", 5_000_000_000), ("500MB", 500_000_000), ("1.5 kb", 1_500), ("12000", 12_000), ("7B", 7), ("2 T", None)],
)
def test_sizes_of_files(text: str, count: int | None) -> None:
    if count is None:
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == count
