"""Laws of streaming statistics and of the ranges drawn from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.errors import CalibrationError
from ptq3d.int8 import dequantize, quantize, scale_of_range
from ptq3d.quantization.observers import RANGE_METHODS, Statistics


def seen(*pieces: np.ndarray) -> Statistics:
    statistics = Statistics("t")
    for piece in pieces:
        statistics.see(piece)
    return statistics


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 999), max_size=6),
    st.sampled_from(sorted(RANGE_METHODS)),
    st.booleans(),
)
def test_order_and_splitting_do_not_matter(seed: int, cuts: list[int], method: str, symmetric: bool) -> None:
    random = np.random.default_rng(seed)
    values = (random.normal(0, 1, 1000) * 10 ** random.uniform(-3, 3)).astype(np.float32)
    pieces = np.split(random.permutation(values), sorted(cuts))
    whole = RANGE_METHODS[method](seen(values.reshape(10, 100)), symmetric=symmetric)
    parts = RANGE_METHODS[method](seen(*pieces), symmetric=symmetric)
    assert whole == parts


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_lie_within_what_was_seen_and_hold_most_of_it(method: str, symmetric: bool) -> None:
    values = np.random.default_rng(0).normal(1, 2, 100_000).astype(np.float32)
    found = RANGE_METHODS[method](seen(values), symmetric=symmetric)
    assert min(values.min(), 0) <= found.low < found.high <= max(values.max(), 0)
    assert ((values >= found.low) & (values <= found.high)).mean() > (0.9 if not symmetric else 0.5)


def test_max_is_exact() -> None:
    values = np.asarray([-3.25, 0, 7.125], np.float32)
    found = RANGE_METHODS["max"](seen(values), symmetric=False)
    assert (found.low, found.high) == (-3.25, 7.125)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_beats_max_where_there_are_outliers(symmetric: bool) -> None:
    random = np.random.default_rng(1)
    values = np.concatenate([random.normal(0, 1, 200_000), [50.0, -40.0]]).astype(np.float32)

    def error(method: str) -> float:
        found = RANGE_METHODS[method](seen(values), symmetric=symmetric)
        scale = scale_of_range(found.low, found.high, symmetric=symmetric)
        return float(np.mean((dequantize(quantize(values, scale), scale) - values) ** 2))

    assert error("mse") < 0.75 * error("max")
    candidates = [scale_of_range(-40 * s, 50 * s, symmetric=symmetric) for s in np.linspace(0.02, 1, 200)]
    best = min(float(np.mean((dequantize(quantize(values, scale), scale) - values) ** 2)) for scale in candidates)
    assert error("mse") < 1.1 * best


def test_percentile_leaves_out_the_tails() -> None:
    values = np.linspace(-1, 1, 1_000_001, dtype=np.float32)
    found = RANGE_METHODS["percentile"](seen(values), symmetric=False, percentile=90)
    assert found.low == pytest.approx(-0.9, abs=3e-3)
    assert found.high == pytest.approx(0.9, abs=3e-3)


def test_a_constant_zero_tensor_has_a_range() -> None:
    for method in RANGE_METHODS:
        found = RANGE_METHODS[method](seen(np.zeros(100, np.float32)), symmetric=False)
        assert quantize(np.zeros(1, np.float32), scale_of_range(found.low, found.high, symmetric=False))[0] == 0


@pytest.mark.parametrize("bad", [[np.nan], [1.0, np.inf], [-np.inf, 2.0], []])
def test_values_without_a_finite_range_are_refused_by_name(bad: list[float]) -> None:
    with pytest.raises(CalibrationError, match=r"tensor 't' has no finite range.*--keep"):
        RANGE_METHODS["mse"](seen(np.asarray(bad, np.float32)), symmetric=False)


def test_memory_does_not_grow_with_what_was_seen() -> None:
    statistics = Statistics("t")
    before = statistics.counts.nbytes if statistics.counts is not None else 0
    for seed in range(5):
        statistics.see(np.random.default_rng(seed).normal(0, 10.0**seed, 10_000).astype(np.float32))
    assert statistics.counts is not None
    assert statistics.counts.nbytes == before == 2 * 2**20
    assert statistics.counts.sum() == statistics.number == 50_000
