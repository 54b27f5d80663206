"""Intervals are scipy's, and cover the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.errors import OptionError, ShapeError
from ptq3d.evaluation import statistics
from ptq3d.evaluation.statistics import (
    Interval,
    LatencySummary,
    MedianInterval,
    NonInferiority,
    median_bootstrap,
    non_inferiority,
    paired_bootstrap,
)

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


CASES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12)


def claims(n: int, trials: int, true_change: float, spread: float = 0.02) -> float:
    """How often non-inferiority within 0.01 is claimed of candidates that truly change by this."""
    generator = np.random.default_rng(n)
    found = 0
    for _ in range(trials):
        hard = generator.uniform(0, 1, n)
        found += non_inferiority(hard, hard + generator.normal(true_change, spread, n), margin=0.01).non_inferior
    return found / trials


@pytest.mark.parametrize("n", [2, 3, 5, 15])
def test_at_the_margin_the_claim_is_wrong_as_seldom_as_promised(n: int) -> None:
    trials = 800
    assert claims(n, trials, -0.01) <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / trials)


def test_what_hardly_changes_is_shown_to_be_non_inferior() -> None:
    assert claims(15, 100, 0.0, spread=0.003) == 1
    assert claims(15, 100, -0.02, spread=0.003) == 0


@settings(deadline=None, max_examples=50)
@given(CASES, st.randoms(use_true_random=False), st.floats(1e-3, 1))
def test_the_order_of_cases_does_not_matter(cases: list[tuple[float, float]], order: object, margin: float) -> None:
    mixed = list(cases)
    order.shuffle(mixed)  # type: ignore[attr-defined]
    assert non_inferiority(*zip(*cases, strict=True), margin=margin) == non_inferiority(
        *zip(*mixed, strict=True), margin=margin
    )


@settings(deadline=None, max_examples=50)
@given(CASES, st.floats(-2, 2), st.floats(0.01, 1))
def test_a_gain_of_all_cases_moves_the_interval_by_it(
    cases: list[tuple[float, float]], gain: float, margin: float
) -> None:
    reference, candidate = map(np.array, zip(*cases, strict=True))
    before = non_inferiority(reference, candidate, margin=margin)
    after = non_inferiority(reference, candidate + gain, margin=margin)
    for name in ("mean", "low", "high", "worst"):
        assert getattr(after, name) == pytest.approx(getattr(before, name) + gain, abs=1e-9)
    both = non_inferiority(reference + gain, candidate + gain, margin=margin)
    assert both.low == pytest.approx(before.low, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(CASES, st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_what_a_margin_allows_a_wider_one_allows_too(
    cases: list[tuple[float, float]], margin: float, more: float
) -> None:
    narrow = non_inferiority(*zip(*cases, strict=True), margin=margin)
    wide = non_inferiority(*zip(*cases, strict=True), margin=margin + more)
    assert (narrow.low, narrow.high) == (wide.low, wide.high)
    assert narrow.non_inferior <= wide.non_inferior


@settings(deadline=None, max_examples=50)
@given(CASES)
def test_less_is_better_is_more_is_better_of_the_negative(cases: list[tuple[float, float]]) -> None:
    reference, candidate = map(np.array, zip(*cases, strict=True))
    distances = non_inferiority(reference, candidate, margin=0.1, more_is_better=False)
    scores = non_inferiority(-reference, -candidate, margin=0.1)
    assert distances.non_inferior == scores.non_inferior
    assert distances.high == pytest.approx(-scores.low, abs=2e-2)  # the draws of the bootstrap are other ones
    assert distances.worst == -scores.worst


@pytest.mark.parametrize(("n", "sign"), [(5, 1), (5, -1), (100, 1), (100, -1)])
def test_the_interval_is_students_and_the_bootstraps_together(n: int, sign: int) -> None:
    """Of few cases Student's is the wider one; of many skewed ones the bootstrap reaches farther on the long side."""
    changes = sign * np.random.default_rng(5).exponential(0.004, n) ** 2
    found = non_inferiority(np.full(n, 0.7), 0.7 + changes, margin=0.01)
    student = scipy.stats.ttest_1samp(changes, 0).confidence_interval()
    drawn = paired_bootstrap(np.zeros(n), np.sort(changes))
    assert found.low == pytest.approx(min(student.low, drawn.low), abs=1e-9)
    assert found.high == pytest.approx(max(student.high, drawn.high), abs=1e-9)
    farther = drawn.high > student.high if sign > 0 else drawn.low < student.low
    assert farther == (n == 100)


def test_one_case_shows_nothing() -> None:
    found = non_inferiority([0.8], [0.9], margin=0.5)
    assert not found.non_inferior
    assert found.to_dict()["low"] is None
    assert found.statement().startswith("Not shown that INT8 is not inferior to FP32: ")
    assert "1 case, which allows no interval" in found.statement()


def test_statements_read_as_sentences() -> None:
    shown = NonInferiority(-0.0004, -0.0011, 0.0003, -0.0021, 0.01, 15, 0.95)
    assert shown.statement() == (
        "INT8 is not inferior to FP32: mean Dice changes by -0.0004 [95 % -0.0011, +0.0003] over 15 cases, margin 0.01; "
        "the worst case changes by -0.0021."
    )
    assert shown.to_dict()["non_inferior"] is True
    farther = NonInferiority(0.2, 0.1, 0.6, 0.9, 0.5, 4, 0.9, more_is_better=False)
    assert farther.statement("a", "b", "HD95 in mm").startswith(
        "Not shown that b is not inferior to a: HD95 in mm changes"
    )


@pytest.mark.parametrize("margin", [0.0, -0.01, np.nan, np.inf])
def test_margins_without_meaning_are_refused(margin: float) -> None:
    with pytest.raises(OptionError, match="margin"):
        non_inferiority([0.5, 0.6], [0.5, 0.6], margin=margin)


def test_cases_that_do_not_pair_show_nothing() -> None:
    with pytest.raises(ShapeError, match="same cases"):
        non_inferiority([0.5, 0.6], [0.5], margin=0.1)
    with pytest.raises(ShapeError, match="finite"):
        non_inferiority([0.5, np.nan], [0.5, 0.6], margin=0.1)


def test_the_median_interval_is_scipys() -> None:
    values = np.random.default_rng(2).exponential(2, 21)
    ours = median_bootstrap(values)
    theirs = scipy.stats.bootstrap(
        (values,),
        np.median,
        n_resamples=10000,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert ours.median == np.median(values)
    assert ours.low == pytest.approx(theirs.low, rel=0.1)
    assert ours.high == pytest.approx(theirs.high, rel=0.1)


def test_infinite_cases_lift_the_median_and_do_not_vanish() -> None:
    found = median_bootstrap([1, 2, 3, np.inf, np.inf])
    assert found.median == 3
    assert found.high == np.inf
    assert median_bootstrap([1.0, np.inf, np.inf]).median == np.inf
    assert median_bootstrap([2.0]) == MedianInterval(2, 2, 2)


@pytest.mark.parametrize("values", [[], [1, np.nan], [[1, 2]]])
def test_a_median_of_nothing_is_refused(values: list[float]) -> None:
    with pytest.raises(ShapeError):
        median_bootstrap(values)


@pytest.mark.parametrize("at_once", [1, 7, 50, 1 << 20])
def test_draws_in_pieces_are_the_same_draws(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    values = np.random.default_rng(3).normal(size=7)
    whole = paired_bootstrap(np.zeros(7), values, samples=500), median_bootstrap(values, samples=500)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", at_once)
    assert (paired_bootstrap(np.zeros(7), values, samples=500), median_bootstrap(values, samples=500)) == whole
