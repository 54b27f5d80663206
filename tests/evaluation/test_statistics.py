"""Intervals are scipy's, and cover the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.errors import OptionError, ShapeError
from ptq3d.evaluation.statistics import Interval, LatencySummary, paired_bootstrap

VALUES = st.lists(st.floats(-1, 1), min_size=1, max_size=30)


def test_the_interval_is_scipys() -> None:
    generator = np.random.default_rng(3)
    a = generator.uniform(0.6, 0.9, 25)
    b = a + generator.normal(-0.003, 0.004, 25)
    ours = paired_bootstrap(a, b, samples=20000)
    theirs = scipy.stats.bootstrap(
        (b - a,), np.mean, n_resamples=20000, confidence_level=0.95, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.mean == pytest.approx(np.mean(b - a))
    assert ours.low == pytest.approx(theirs.low, abs=1e-4)
    assert ours.high == pytest.approx(theirs.high, abs=1e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        hard = generator.uniform(0, 1, 40)  # cases differ far more than the two networks do
        interval = paired_bootstrap(hard, hard + generator.normal(0.01, 0.02, 40), samples=500, seed=trial)
        hits += interval.low <= 0.01 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


@settings(deadline=None)
@given(VALUES, st.floats(-1, 1))
def test_a_constant_change_has_no_width(values: list[float], change: float) -> None:
    a = np.array(values)
    interval = paired_bootstrap(a, a + change, samples=50)
    assert interval.mean == pytest.approx(change, abs=1e-12)
    assert interval.low == pytest.approx(change, abs=1e-12)
    assert interval.high == pytest.approx(change, abs=1e-12)


@settings(deadline=None)
@given(VALUES, VALUES, st.integers(0, 5))
def test_the_interval_repeats_and_turns_round(first: list[float], second: list[float], seed: int) -> None:
    n = min(len(first), len(second))
    forward = paired_bootstrap(first[:n], second[:n], samples=100, seed=seed)
    assert forward == paired_bootstrap(first[:n], second[:n], samples=100, seed=seed)
    back = paired_bootstrap(second[:n], first[:n], samples=100, seed=seed)
    assert back.low == pytest.approx(-forward.high, abs=1e-9)
    assert back.high == pytest.approx(-forward.low, abs=1e-9)


def test_one_case_has_no_width() -> None:
    assert paired_bootstrap([0.5], [0.75]) == Interval(0.25, 0.25, 0.25)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1, 2], [1]), ([1, np.nan], [1, 2]), ([[1, 2]], [[1, 2]])])
def test_values_that_do_not_pair_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ShapeError):
        paired_bootstrap(a, b)


@pytest.mark.parametrize("options", [{"confidence": 0.0}, {"confidence": 1.0}, {"confidence": 95}, {"samples": 0}])
def test_options_without_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        paired_bootstrap([1, 2], [1, 2], **options)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=50))
def test_latencies_are_summed_up_by_their_quantiles(latencies: list[float]) -> None:
    summary = LatencySummary.of(latencies)
    assert summary.n == len(latencies)
    assert summary.median == pytest.approx(np.median(latencies))
    assert summary.p5 == pytest.approx(np.percentile(latencies, 5))
    assert summary.p95 == pytest.approx(np.percentile(latencies, 95))
    assert summary.p5 <= summary.median <= summary.p95


def test_no_latencies_are_refused() -> None:
    with pytest.raises(ShapeError):
        LatencySummary.of([])
