"""What a few cases or a few timings allow to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptq3d.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it with the confidence asked for.

    Attributes:
        mean: of the sample.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class LatencySummary:
    """Latencies of one thing measured again and again.

    Attributes:
        median: ms.
        p5: 5 % quantile, ms.
        p95: 95 % quantile, ms.
        n: how many.
    """

    median: float
    p5: float
    p95: float
    n: int

    @classmethod
    def of(cls, latencies_ms: ArrayLike) -> LatencySummary:
        """The summary of single latencies, warm-up left out by the caller.

        Args:
            latencies_ms: (n,) ms, n >= 1.

        Raises:
            ShapeError: no latencies, or one that is not finite.
        """
        values = _finite(latencies_ms, "latencies")
        p5, median, p95 = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
        return cls(median, p5, p95, values.size)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, samples: int = 10000, seed: int = 0
) -> Interval:
    """Mean of b - a over cases, with its percentile bootstrap interval.

    Cases are drawn with replacement, a and b of a case together, so that hard cases do not widen the interval.

    Args:
        a: (cases,) one value for each case, for example mean Dice in FP32.
        b: (cases,) the same cases in the same order, for example in INT8.
        confidence: share of the interval, above 0 and below 1.
        samples: how often the cases are drawn.
        seed: equal seeds give equal intervals.

    Returns:
        The interval; of a single case it has no width, and says nothing.

    Raises:
        ShapeError: no cases, values that are not finite, or a and b of different length.
        OptionError: a confidence outside (0, 1), or no samples.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if not 0.0 < confidence < 1.0 or samples < 1:
        raise OptionError(f"wanted a confidence between 0 and 1 and at least one sample, got {confidence}, {samples}.")
    first, second = _finite(a, "values of the first"), _finite(b, "values of the second")
    if first.shape != second.shape:
        raise ShapeError(f"paired values must be of the same cases, got {first.size} and {second.size}.")
    changes = second - first
    drawn = np.random.default_rng(seed).integers(changes.size, size=(samples, changes.size))
    low, high = np.quantile(changes[drawn].mean(axis=1), ((1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0)).tolist()
    return Interval(float(changes.mean()), low, high)


def _finite(values: ArrayLike, what: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(n,) float64, at least one, all finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ShapeError(f"{what} must be one row of finite numbers, at least one, got {array.tolist()}.")
    return array
