"""The arithmetic that all kernels share: `ptq3d.int8` in Triton, bit for bit, and the activations.

Kernels are compiled with `EXACT`, so that a multiplication and an addition are rounded one after the other, as everywhere else.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import triton
import triton.language as tl

from ptq3d.engines.triton.steps import Activation

EXACT = {"enable_fp_fusion": False}
# numbers that differ from layer to layer: a kernel is not compiled anew for one that is 1 or a multiple of 16
ZEROS = ("rounded_zero", "other_zero", "out_zero", "x_zero")
# Triton's interpreter rounds between the product and the sum of an fma
FUSED = tl.constexpr(not triton.knobs.runtime.interpret)
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
STEEP = 9  # leaky_relu of a slope that is not in 0..1


def kind_of(activation: Activation) -> int:
    """The number by which kernels know an activation."""
    steep = activation.kind == "leaky_relu" and not 0 <= activation.low <= 1
    return STEEP if steep else KINDS[activation.kind]


@triton.jit
def activate(v, kind: tl.constexpr, low, high):
    """Float32 values behind an activation; `kind` of `KINDS`."""
    if kind == 1:
        v = tl.maximum(v, 0.0)
    elif kind == 2:
        v = tl.maximum(v, v * low)
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
    elif kind == 9:
        v = tl.where(v >= 0.0, v, v * low)
    return v


@cache
def one_remainder(step: float) -> bool:
    """Whether `levels` needs one exact remainder only, to round every v as the correctly rounded quotient v / step is.

    With one, the quotient is that of a v / step moved by at most 2^-46 of itself. So it is rounded to another integer only where
    v / step is that close to a midpoint beside a half-integer; whether any float32 v is, is tried for all of them.
    """
    exact = float(np.float32(step))
    if not 2.0**-90 < exact < 2.0**90:
        return False
    half = np.arange(256, dtype=np.float32) + np.float32(0.5)
    beside = np.stack([np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(999))])
    product = exact * (half + beside.astype(np.float64)) / 2  # of 24 and 25 bits, so nothing is rounded
    nearest = product.astype(np.float32)
    around = np.stack([np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(np.inf))])
    return not bool(np.any(np.abs(around - product) <= product / 2**45))


@triton.jit
def levels(v, step, positive: tl.constexpr = False, once: tl.constexpr = False, zero=0):
    """Float32 values as the int32 numbers clip(round_half_even(v / step) + zero, -128, 127).

    Adding 1.5 * 2^23 leaves no bit for a fraction, the addition rounds half to even, and the last bits of the sum are the integer;
    limits are applied to v, so that infinity saturates, too. The quotient is the correctly
    rounded one: on a GPU as its division makes it, by exact remainders (Markstein 1990), with the reciprocal made once.

    Args:
        v: float32.
        step: float32, one number.
        positive: v is never below 0.
        once: `one_remainder` holds for the step.
        zero: the stored integer that stands for 0, -128 to 127.
    """
    v = tl.minimum(v, (127.4 - zero) * step)
    if not positive:
        v = tl.maximum(v, (-128.4 - zero) * step)
    if FUSED:
        inverse = tl.div_rn(1.0, step)
        quotient = v * inverse
        quotient = tl.fma(tl.fma(-step, quotient, v), inverse, quotient)
        if not once:
            quotient = tl.fma(tl.fma(-step, quotient, v), inverse, quotient)
    else:
        quotient = tl.div_rn(v, step)
    return (quotient + 12582912.0).to(tl.int32, bitcast=True) - (0x4B400000 - zero)


@triton.jit
def finish(
    v, other, rounded_step, other_step, out_step,
    kind: tl.constexpr, low, high,
    rounds: tl.constexpr, adds: tl.constexpr, last: tl.constexpr, last_low, last_high,
    integers: tl.constexpr, once: tl.constexpr = False,
    rounded_zero=0, other_zero=0, out_zero=0,
):  # fmt: skip
    """The epilogue of a step (`steps.Epilogue`) on float32 values: float32, or int32 where `integers`.

    Args:
        other: what is added where `adds`: (int8 - `other_zero`) times `other_step`, or floats where `other_step` is 1.
        once: `one_remainder` holds for the steps that it rounds to.
        rounded_zero, other_zero, out_zero: the stored integers that stand for 0.
    """
    v = activate(v, kind, low, high)
    if rounds:
        v = (levels(v, rounded_step, kind == 1, once, rounded_zero) - rounded_zero).to(tl.float32) * rounded_step
    if adds:
        v = v + (other.to(tl.float32) - other_zero) * other_step
    v = activate(v, last, last_low, last_high)
    if integers:
        positive: tl.constexpr = (last == 1) or (kind == 1 and last == 0 and not rounds and not adds)
        v = levels(v, out_step, positive, once, out_zero)
    return v
