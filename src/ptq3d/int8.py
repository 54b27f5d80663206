"""THE integer arithmetic of ptq3d. Every kernel of ours equals these functions bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
LIMITS = {"int8": (-127, 127), "uint8": (0, 255)}
LEAST_HALF = np.float32(2.0**-20)


@dataclass(frozen=True, eq=False)
class Scale:
    """How real values become 8-bit integers: q = clip(round_half_even(x / step) + zero_point).

    Args:
        step: () or (K,) float32, the real value of one integer step.
        zero_point: () or (K,) int32, the integer that stands for 0.
        dtype: "int8" (-127..127, so that the negative of a value is a value) or "uint8" (0..255).
        axis: the channel axis where `step` is (K,), otherwise None.

    Source: ONNX QuantizeLinear-21; Jacob et al. 2018, eq. 1.
    """

    step: Floats
    zero_point: npt.NDArray[np.int32]
    dtype: str
    axis: int | None = None

    def broadcast(self, rank: int) -> tuple[Floats, npt.NDArray[np.int32]]:
        """`step` and `zero_point`, shaped so that they broadcast over a tensor of that rank."""
        if self.axis is None:
            return self.step, self.zero_point
        shape = [1] * rank
        shape[self.axis] = -1
        return self.step.reshape(shape), self.zero_point.reshape(shape)

    def in_type(self, dtype: str) -> Scale:
        """The scale with the least steps of a floating-point type that are no smaller, so that nothing more saturates.

        In fp16 a step is at least 2^-20, the least one that rounding moves by no more than 1/16 of itself.

        Args:
            dtype: "fp32" (the scale itself), "fp16" or "bf16".
        """
        return self if dtype == "fp32" else replace(self, step=_rounded_up(self.step, dtype))

    def equals(self, other: Scale) -> bool:
        """Whether both map every real value to the same integer."""
        same_kind = self.dtype == other.dtype and self.axis == other.axis
        return same_kind and np.array_equal(self.step, other.step) and np.array_equal(self.zero_point, other.zero_point)


def scale_of_range(low: float, high: float, *, symmetric: bool) -> Scale:
    """The scale that covers low..high with 8 bits and represents 0 exactly.

    step = max(|low|, |high|) / 127 where symmetric, else (high - low) / 255 with low <= 0 <= high.

    Args:
        low: smallest real value to represent.
        high: largest real value to represent.
        symmetric: int8 with zero-point 0; otherwise uint8 with a zero-point.

    Source: Jacob et al. 2018, section 3; Krishnamoorthi 2018, section 2.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        step = max(-low, high) / 127
        return Scale(_step(step), np.asarray(0, np.int32), "int8")
    step = (high - low) / 255
    zero_point = int(np.clip(np.rint(-low / step), 0, 255)) if step > 0 else 0
    return Scale(_step(step), np.asarray(zero_point, np.int32), "uint8")


def scale_of_weight(weight: Floats, axis: int) -> Scale:
    """Symmetric INT8 scale of each output channel: step = max |w| / 127.

    Args:
        weight: float32, any rank.
        axis: its output-channel axis.

    Source: Krishnamoorthi 2018, section 3.1.1.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    step = _step(np.abs(weight).max(axis=others) / 127)
    return Scale(step, np.zeros(step.shape, np.int32), "int8", axis)


def _step(value: float | Floats) -> Floats:
    """A usable float32 step: a range of nothing but zeros gets the step 1, which maps it to 0."""
    step = np.asarray(value, np.float32)
    return np.where(step > np.finfo(np.float32).tiny, step, np.float32(1)).astype(np.float32)


def _rounded_up(step: Floats, dtype: str) -> Floats:
    """The least numbers of fp16 or bf16 that are no smaller than positive `step`, as float32; infinity beyond fp16."""
    if dtype == "bf16":  # the upper half of a float32
        bits = np.ascontiguousarray(step, np.float32).view(np.uint32).astype(np.uint64)
        upper: Floats = ((bits + 0xFFFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return upper.reshape(step.shape)
    wanted = np.maximum(step, LEAST_HALF)
    with np.errstate(over="ignore"):
        nearest = wanted.astype(np.float16)
        above = np.nextafter(nearest, np.float16(np.inf))
    return np.where(nearest.astype(np.float32) < wanted, above, nearest).astype(np.float32)


def quantize(values: Floats, scale: Scale) -> Integers:
    """Real values as integers: q = clip(round_half_even(x / step) + zero_point).

    Args:
        values: float32, any shape.
        scale: its `axis` counts in `values`.

    Returns:
        int8 or uint8, the shape of `values`.

    Source: ONNX QuantizeLinear-21 (float32 division, round half to even, saturation).
    """
    step, zero_point = scale.broadcast(values.ndim)
    low, high = LIMITS[scale.dtype]
    with np.errstate(over="ignore"):  # infinity saturates as any large value does
        levels: Integers = np.clip(np.rint(values / step) + zero_point, low, high).astype(scale.dtype)
    return levels


def dequantize(integers: Integers, scale: Scale) -> Floats:
    """Integers as real values: x = (q - zero_point) * step.

    Args:
        integers: int8 or uint8, any shape.
        scale: its `axis` counts in `integers`.

    Returns:
        float32, the shape of `integers`.

    Source: ONNX DequantizeLinear-21.
    """
    step, zero_point = scale.broadcast(integers.ndim)
    return ((integers.astype(np.int32) - zero_point) * step).astype(np.float32)


def rescale(total: npt.NDArray[np.int32], multiplier: Floats, bias: Floats | None, axis: int = 1) -> Floats:
    """INT32 sums of an integer layer as real values: y = float32(total) * multiplier + bias, each step rounded to float32.

    Args:
        total: int32, any shape; sums of (q - zero_point) x INT8 weight.
        multiplier: (K,) or () float32, input step x weight step of each output channel.
        bias: (K,) float32 or None.
        axis: the channel axis of `total`.

    Returns:
        float32, the shape of `total`.

    Source: Jacob et al. 2018, eq. 4, with the multiplier kept in float32 as oneDNN and TensorRT do.
    """
    shape = [1] * total.ndim
    shape[axis] = -1
    real = total.astype(np.float32) * multiplier.reshape(shape)
    return real if bias is None else real + bias.reshape(shape)
