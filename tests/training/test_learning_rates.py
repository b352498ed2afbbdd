"""Every rate of every schedule against formulas written from the papers, and what schedules promise of each other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import StageRecipe

SCHEDULES = ("cosine", "wsd", "linear", "constant")


def rates_of(schedule: str, *, before: int = 0, after: int = 0, **keys: Any) -> LearningRates:
    section = {"duration": 40, "batch_size": 1, "learning_rate": 3e-4, "warmup": 4, "decay": 10, "schedule": schedule}
    stage = StageRecipe.model_validate(section | keys)
    return LearningRates.of(stage, tokens_per_step=1, before=before, after=after)


def listed(rates: LearningRates, *, steps: int) -> list[float]:
    return [rates.at(step) for step in range(steps)]


def published(schedule: str, t: int, *, T: int, W: int, D: int, peak: float, final: float) -> float:
    """One rate, from the papers: SGDR's cosine, MiniCPM's three phases, linear decay to zero moved up to the end."""
    low = final * peak
    if t < W:
        return peak * (t + 1) / W
    if schedule == "cosine":
        return low + 0.5 * (peak - low) * (1 + math.cos((t - W) / (T - W) * math.pi))
    if schedule == "linear":
        return peak - (peak - low) * (t - W) / (T - W)
    if schedule == "wsd" and t > T - D:
        return low + (peak - low) * (1 - (t - (T - D)) / D)
    return peak


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "decay", "final"), [(4, 10, 0.1), (0, 36, 0.0), (1, 1, 0.5), (40, 0, 0.1)])
def test_rates_are_those_of_the_papers(schedule: str, warmup: int, decay: int, final: float) -> None:
    rates = rates_of(schedule, warmup=warmup, decay=decay, final_learning_rate=final)
    expected = [published(schedule, t, T=40, W=warmup, D=decay, peak=3e-4, final=final) for t in range(max(40, warmup))]
    assert listed(rates, steps=40) == pytest.approx(expected, rel=1e-12)
    if warmup < 40 and schedule != "constant" and (decay or schedule != "wsd"):
        assert rates.at(40) == pytest.approx(3e-4 * final)


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(2, 300),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_rates_never_jump(schedule: str, total: int, warmup: float, decay: float, final: float) -> None:
    """From one step to the next by no more than the steepest of the pieces."""
    W = int(warmup * total)
    D = int(decay * (total - W))
    rates = rates_of(schedule, duration=total, warmup=W, decay=D, final_learning_rate=final, learning_rate=1.0)
    found = listed(rates, steps=total)
    steepest = max(1 / max(W, 1) if W else 0, (1 - final) / max(D, 1), math.pi / 2 * (1 - final) / max(total - W, 1))
    assert all(abs(after - before) <= steepest + 1e-12 for before, after in itertools.pairwise(found))
    assert max(found) <= 1.0
    assert total == W or found[W] == 1.0


@given(
    schedule=st.sampled_from(SCHEDULES),
    first=st.integers(1, 60),
    second=st.integers(1, 60),
    share=st.sampled_from(["0%", "5%", "33%"]),
)
def test_one_schedule_across_a_cut_is_that_of_a_straight_run(
    schedule: str, first: int, second: int, share: str
) -> None:
    keys: dict[str, Any] = {"warmup": share, "decay": "20%"}
    straight = listed(rates_of(schedule, duration=first + second, **keys), steps=first + second)
    before = rates_of(schedule, duration=first, after=second, **keys)
    after = rates_of(schedule, duration=second, before=first, **keys)
    assert listed(before, steps=first) + listed(after, steps=second) == straight


def test_wsd_is_the_same_until_its_decay_whatever_its_length_and_end() -> None:
    short = rates_of("wsd", duration=30, decay=5, final_learning_rate=0.0)
    long = rates_of("wsd", duration=90, decay="40 steps", final_learning_rate=0.3)
    assert short.stable_steps == 25
    assert listed(short, steps=26) == listed(long, steps=26) == listed(rates_of("constant"), steps=26)
    assert short.at(26) < long.at(26)


def test_what_is_stable_is_counted_in_steps_of_the_stage() -> None:
    assert rates_of("wsd", duration=30, decay=10, before=10).stable_steps == 20
    assert rates_of("wsd", duration=30, decay="100%", warmup=0).stable_steps is None
    assert rates_of("cosine").stable_steps is None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_heights_are_rates_without_an_end(schedule: str) -> None:
    """What follows the learning rate follows it to nothing."""
    keys: dict[str, Any] = {"duration": 30, "warmup": 6, "decay": "10 steps", "before": 4}
    rates = rates_of(schedule, final_learning_rate=0.0, learning_rate=1.0, **keys)
    raised = rates_of(schedule, final_learning_rate=0.4, learning_rate=2e-3, **keys)
    heights = [raised.height_at(step) for step in range(30)]
    assert heights == pytest.approx(listed(rates, steps=30))
    assert heights[:2] == pytest.approx([5 / 6, 1.0])
