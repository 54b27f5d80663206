"""The arithmetic that all kernels share: `ptq3d.int8` in Triton, bit for bit, and the activations.

Kernels are compiled with `EXACT`, so that a multiplication and an addition are rounded one after the other, as everywhere else.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False}
# activations by number: a kernel is compiled for one
KINDS = {
    "none": 0,
    "relu": 1,
    "leaky_relu": 2,
    "elu": 3,
    "gelu": 4,
    "gelu_tanh": 5,
    "sigmoid": 6,
    "tanh": 7,
    "clip": 8,
}


@triton.jit
def activate(v, kind: tl.constexpr, low, high):
    """Float32 values behind an activation; `kind` of `KINDS`."""
    if kind == 1:
        v = tl.maximum(v, 0.0)
    elif kind == 2:
        v = tl.where(v >= 0.0, v, v * low)
    elif kind == 3:
        v = tl.where(v > 0.0, v, low * (tl.exp(tl.minimum(v, 0.0)) - 1.0))
    elif kind == 4:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif kind == 5:
        inner = 0.7978845608028654 * (v + 0.044715 * v * v * v)
        v = v * (1.0 / (1.0 + tl.exp(-2.0 * inner)))
    elif kind == 6:
        v = 1.0 / (1.0 + tl.exp(-v))
    elif kind == 7:
        v = 2.0 / (1.0 + tl.exp(-2.0 * v)) - 1.0
    elif kind == 8:
        v = tl.minimum(tl.maximum(v, low), high)
    return v


@triton.jit
def rounded(v, step):
    """Float32 values as the float32 integers clip(round_half_even(v / step), -128, 127).

    Adding 1.5 * 2^23 leaves no bit for a fraction, and the addition rounds half to even; limits are integers, so they come first.
    """
    levels = tl.minimum(tl.maximum(tl.div_rn(v, step), -128.0), 127.0)
    return (levels + 12582912.0) - 12582912.0


@triton.jit
def finish(
    v, other, rounded_step, other_step, out_step,
    kind: tl.constexpr, low, high,
    rounds: tl.constexpr, adds: tl.constexpr, last: tl.constexpr, last_low, last_high,
    integers: tl.constexpr,
):  # fmt: skip
    """The epilogue of a step (`steps.Epilogue`) on float32 values; float32, whole numbers where `integers`.

    Args:
        other: what is added where `adds`: int8 times `other_step`, or floats where `other_step` is 1.
    """
    v = activate(v, kind, low, high)
    if rounds:
        v = rounded(v, rounded_step) * rounded_step
    if adds:
        v = v + other.to(tl.float32) * other_step
    v = activate(v, last, last_low, last_high)
    if integers:
        v = rounded(v, out_step)
    return v
