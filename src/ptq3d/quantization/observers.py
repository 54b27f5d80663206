"""Streaming statistics of activations, and the ranges drawn from them.

One object watches a tensor: exact minimum and maximum, and counts of its values by the upper 18 bits of their float32
pattern (sign, exponent, nine bits of mantissa). Those bins need no range known beforehand, so the counts are exact
whatever the order and splitting of the values, and their memory is bounded: 2 MiB per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptq3d.errors import CalibrationError
from ptq3d.int8 import LIMITS, Scale, scale_of_range

DROPPED_BITS = 14
BINS = 1 << (32 - DROPPED_BITS)
CHUNK = 1 << 21  # values binned at a time: keeps the temporary index array within the cache
CANDIDATES = 64

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """The real interval low..high (low <= high) that 8 bits must cover, in the tensor's own unit."""

    low: float
    high: float


class Statistics:
    """What was seen of one tensor.

    Args:
        name: the tensor's, for messages.
        histogram: also count values; `max` ranges need only the extremes.
    """

    def __init__(self, name: str, *, histogram: bool = True) -> None:
        self.name = name
        self.low, self.high = np.inf, -np.inf
        self.number = self.non_finite = 0
        self.counts = np.zeros(BINS, np.int64) if histogram else None

    def see(self, values: npt.NDArray[np.float32]) -> None:
        """Take in more values, of any shape, in any order and any number of pieces."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        low, high = float(flat.min(initial=np.inf)), float(flat.max(initial=-np.inf))
        if not np.isfinite([low, high]).all() and flat.size:
            finite = np.isfinite(flat)
            self.non_finite += int(flat.size - finite.sum())
            flat = flat[finite]
            low, high = float(flat.min(initial=np.inf)), float(flat.max(initial=-np.inf))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.number += flat.size
        if self.counts is not None:
            for start in range(0, flat.size, CHUNK):
                bins = flat[start : start + CHUNK].view(np.uint32) >> DROPPED_BITS
                self.counts += np.bincount(bins, minlength=BINS)

    def see_extremes(self, low: float, high: float) -> None:
        """Take in only the smallest and largest of more values."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def require_finite(self) -> None:
        """Raise where no range can be drawn.

        Raises:
            CalibrationError: nothing was seen, or NaN or infinite values were.
        """
        if self.number and not self.non_finite:
            return
        raise CalibrationError(
            f"tensor '{self.name}' has no finite range: {self.number + self.non_finite} values seen, "
            f"{self.non_finite} of them NaN or inf. The FP32 network itself overflows there: check the intensity rule, "
            f"or leave the layer in floating point with --keep '{self.name}'."
        )

    def bins(self) -> tuple[Doubles, npt.NDArray[np.int64]]:
        """(centre, count) of every bin that was hit, in ascending order of the centre."""
        if self.counts is None:
            raise CalibrationError(f"tensor '{self.name}' was observed without a histogram.")
        hit = np.flatnonzero(self.counts)
        pattern = (hit.astype(np.uint32) << DROPPED_BITS) | np.uint32(1 << (DROPPED_BITS - 1))
        centres = pattern.view(np.float32).astype(np.float64)
        centres[np.abs(centres) < np.finfo(np.float32).tiny] = 0.0
        centres = np.clip(centres, self.low, self.high)
        order = np.argsort(centres, kind="stable")
        return centres[order], self.counts[hit][order]


def max_range(statistics: Statistics, *, symmetric: bool) -> Range:
    """Everything that was seen: minimum to maximum."""
    statistics.require_finite()
    return Range(statistics.low, statistics.high)


def percentile_range(statistics: Statistics, *, symmetric: bool, percentile: float = 99.99) -> Range:
    """The interval that leaves out (100 - percentile) / 2 percent of the values on each side.

    Source: McKinstry et al. 2018; the percentile calibrator of NVIDIA pytorch-quantization.
    """
    statistics.require_finite()
    centres, counts = statistics.bins()
    share = np.cumsum(counts) / counts.sum()
    tail = (100 - percentile) / 200
    low, high = centres[np.minimum(np.searchsorted(share, [tail, 1 - tail]), len(centres) - 1)]
    return Range(float(low), float(high))


def mse_range(statistics: Statistics, *, symmetric: bool) -> Range:
    """The interval with the least mean squared quantization error, by search over scaled copies of the full one.

    Source: Banner et al. 2019; Nagel et al. 2021 (A White Paper on Neural Network Quantization), section 3.1.
    """
    return _best_range(statistics, symmetric, _squared_error)


def entropy_range(statistics: Statistics, *, symmetric: bool) -> Range:
    """The interval whose quantized distribution loses least information (Kullback-Leibler divergence, in nats).

    Source: Migacz 2017, 8-bit inference with TensorRT.
    """
    return _best_range(statistics, symmetric, _divergence)


Loss = Callable[[Doubles, npt.NDArray[np.int64], Scale], float]


def _best_range(statistics: Statistics, symmetric: bool, loss: Loss) -> Range:
    statistics.require_finite()
    centres, counts = statistics.bins()
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)

    def scaled(lower: float, upper: float) -> tuple[float, float]:
        return loss(
            centres, counts, scale_of_range(low * lower, high * upper, symmetric=symmetric)
        ), lower * 1e3 + upper

    shares = np.geomspace(0.02, 1.0, CANDIDATES)
    both = min(shares, key=lambda share: scaled(share, share))
    if symmetric or low == 0 or high == 0:
        return Range(low * both, high * both)
    lower = min(shares, key=lambda share: scaled(share, both))
    upper = min(shares, key=lambda share: scaled(lower, share))
    return Range(low * lower, high * upper)


def _squared_error(centres: Doubles, counts: npt.NDArray[np.int64], scale: Scale) -> float:
    """Sum of squared errors; inside the range the error is uniform in a step (step^2 / 12), outside it is the distance."""
    step, (lowest, highest) = float(scale.step), _levels(scale)
    outside = np.maximum(np.maximum(centres - (highest + 0.5) * step, (lowest - 0.5) * step - centres), 0)
    rounding = np.where(centres == 0, 0.0, step * step / 12)
    errors = np.where(outside > 0, (outside + step / 2) ** 2, rounding)
    return float(counts @ errors)


def _divergence(centres: Doubles, counts: npt.NDArray[np.int64], scale: Scale) -> float:
    """KL divergence of the quantized from the real distribution; clipped values are real mass of the outermost bins.

    Exact zeros are left out: they are represented exactly, and behind a ReLU they would drown the rest.
    """
    lowest, highest = _levels(scale)
    level = np.rint(centres / float(scale.step))
    inside = np.flatnonzero((level >= lowest) & (level <= highest) & (centres != 0))
    if not inside.size:
        return float("inf")
    first, last = inside[0], inside[-1]
    real = counts.astype(np.float64)
    real[first] += real[:first][centres[:first] != 0].sum()
    real[last] += real[last + 1 :][centres[last + 1 :] != 0].sum()
    index = (level[inside] - level[first]).astype(np.int64)
    width = np.abs(centres[inside]) * 2.0**-9
    mass = np.bincount(index, weights=counts[inside]) / np.maximum(np.bincount(index, weights=width), 1e-300)
    p, q = real[inside], mass[index] * width
    p, q = p / p.sum(), q / counts[centres != 0].sum()
    return float((p * np.log(p / q)).sum())


def _levels(scale: Scale) -> tuple[int, int]:
    """Lowest and highest integer of a scale, counted from its zero-point."""
    lowest, highest = LIMITS[scale.dtype]
    return lowest - int(scale.zero_point), highest - int(scale.zero_point)


RANGE_METHODS: Mapping[str, Callable[..., Range]] = {
    "max": max_range,
    "percentile": percentile_range,
    "mse": mse_range,
    "entropy": entropy_range,
}
