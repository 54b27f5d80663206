"""Laws of the integer arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ptq3d.int8 import LIMITS, Scale, dequantize, quantize, rescale, scale_of_range, scale_of_weight

finite = st.floats(-1e6, 1e6, width=32)


@given(st.lists(finite, min_size=1, max_size=50), st.booleans())
def test_quantize_then_dequantize_errs_by_at_most_half_a_step(values: list[float], symmetric: bool) -> None:
    x = np.asarray(values, np.float32)
    scale = scale_of_range(float(x.min()), float(x.max()), symmetric=symmetric)
    back = dequantize(quantize(x, scale), scale)
    # the zero-point is an integer, so the ends of an asymmetric range may lie half a step further out
    slack = 0.5 if symmetric else 1.0
    assert np.abs(back - x).max() <= slack * float(scale.step) * (1 + 1e-4)


@given(finite, finite, st.booleans())
def test_zero_is_always_exact(low: float, high: float, symmetric: bool) -> None:
    scale = scale_of_range(min(low, high), max(low, high), symmetric=symmetric)
    zero = quantize(np.zeros(1, np.float32), scale)
    assert zero[0] == scale.zero_point
    assert dequantize(zero, scale)[0] == 0


@given(finite, finite, st.booleans(), arrays.arrays(np.float32, 20, elements=st.floats(-2e6, 2e6, width=32)))
def test_values_beyond_the_range_saturate_and_order_is_kept(
    low: float, high: float, symmetric: bool, x: np.ndarray
) -> None:
    scale = scale_of_range(min(low, high), max(low, high), symmetric=symmetric)
    q = quantize(np.sort(x), scale).astype(int)
    assert (np.diff(q) >= 0).all()
    assert q.min() >= LIMITS[scale.dtype][0]
    assert q.max() <= LIMITS[scale.dtype][1]


def test_ties_round_to_even_as_onnx_says() -> None:
    scale = Scale(np.float32(1), np.int32(0), "int8")
    np.testing.assert_array_equal(
        quantize(np.asarray([0.5, 1.5, 2.5, -0.5, -1.5], np.float32), scale), [0, 2, 2, 0, -2]
    )


@given(arrays.arrays(np.float32, (4, 3, 2), elements=st.floats(-10, 10, width=32)), st.integers(0, 2))
def test_each_channel_of_a_weight_reaches_its_own_limit(weight: np.ndarray, axis: int) -> None:
    scale = scale_of_weight(weight, axis)
    q = np.moveaxis(quantize(weight, scale), axis, 0)
    for integers, values in zip(q, np.moveaxis(weight, axis, 0), strict=True):
        assert np.abs(integers).max() == (127 if np.abs(values).max() > 1e-36 else 0)


@pytest.mark.parametrize("axis", [1, -1])
def test_rescale_is_multiply_then_add_per_channel(axis: int) -> None:
    total = (
        np.arange(24, dtype=np.int32).reshape(1, 4, 3, 2)
        if axis == 1
        else np.arange(24, dtype=np.int32).reshape(3, 2, 4)
    )
    multiplier, bias = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32), np.asarray([1, 2, 3, 4], np.float32)
    shape = (1, 4, 1, 1) if axis == 1 else (4,)
    wanted = total.astype(np.float32) * multiplier.reshape(shape) + bias.reshape(shape)
    np.testing.assert_array_equal(rescale(total, multiplier, bias, axis), wanted)
    np.testing.assert_array_equal(
        rescale(total, multiplier, None, axis), total.astype(np.float32) * multiplier.reshape(shape)
    )
