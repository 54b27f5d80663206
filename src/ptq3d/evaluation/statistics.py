"""What a few cases or a few timings allow to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptq3d.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

DRAWN_AT_ONCE = 1 << 20  # values


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
class MedianInterval:
    """A median and the interval that holds it with the confidence asked for; infinite values are allowed.

    Attributes:
        median: of the sample.
        low: lower end.
        high: upper end.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class NonInferiority:
    """What paired cases say of a candidate that must not be worse than its reference; see `non_inferiority`.

    Attributes:
        mean: of candidate - reference over cases.
        low: lower end of its two-sided interval.
        high: upper end.
        worst: change of the case that loses most.
        margin: the largest loss that does not matter.
        n: cases.
        confidence: of the two-sided interval.
        more_is_better: False for distances and errors.
    """

    mean: float
    low: float
    high: float
    worst: float
    margin: float
    n: int
    confidence: float
    more_is_better: bool = True

    @property
    def non_inferior(self) -> bool:
        """Whether the interval's end on the worse side lies within the margin."""
        return self.low > -self.margin if self.more_is_better else self.high < self.margin

    def statement(self, reference: str = "FP32", candidate: str = "INT8", metric: str = "mean Dice") -> str:
        """The finding as a sentence.

        Args:
            reference: its name.
            candidate: its name.
            metric: what was compared, with its unit.
        """
        claim = f"{candidate} is not inferior to {reference}"
        cases = "1 case, which allows no interval" if self.n == 1 else f"{self.n} cases"
        return (
            f"{claim if self.non_inferior else f'Not shown that {claim}'}: {metric} changes by {self.mean:+.4f} "
            f"[{100 * self.confidence:g} % {self.low:+.4f}, {self.high:+.4f}] over {cases}, margin {self.margin:g}; "
            f"the worst case changes by {self.worst:+.4f}."
        )

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """JSON-able; the ends of an interval that one case does not allow are None."""
        low, high = (end if np.isfinite(end) else None for end in (self.low, self.high))
        return {**asdict(self), "low": low, "high": high, "non_inferior": self.non_inferior}


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
    _require_share(confidence, samples)
    first, second = _finite(a, "values of the first"), _finite(b, "values of the second")
    if first.shape != second.shape:
        raise ShapeError(f"paired values must be of the same cases, got {first.size} and {second.size}.")
    changes = second - first
    means = np.concatenate([drawn.mean(axis=1) for drawn in _draws(changes, samples, seed)])
    low, high = np.quantile(means, ((1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0)).tolist()
    return Interval(float(changes.mean()), low, high)


def median_bootstrap(
    values: ArrayLike, *, confidence: float = 0.95, samples: int = 10000, seed: int = 0
) -> MedianInterval:
    """Median over cases, with its percentile bootstrap interval.

    Args:
        values: (cases,) one value for each case; infinite where a case has none that is right (a missed class has no HD95).
        confidence: share of the interval, above 0 and below 1.
        samples: how often the cases are drawn.
        seed: equal seeds give equal intervals.

    Returns:
        The interval, infinite where half of the (drawn) cases are.

    Raises:
        ShapeError: no cases, or NaN among them.
        OptionError: a confidence outside (0, 1), or no samples.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    _require_share(confidence, samples)
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not found.size or np.isnan(found).any():
        raise ShapeError(f"values must be one row of numbers, at least one, got {found.tolist()}.")
    ends = ((1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0)
    medians = np.concatenate([np.median(drawn, axis=1) for drawn in _draws(found, samples, seed)])
    low, high = np.quantile(medians, ends, method="inverted_cdf").tolist()  # the others would subtract infinities
    return MedianInterval(float(np.median(found)), low, high)


def non_inferiority(
    reference: ArrayLike,
    candidate: ArrayLike,
    *,
    margin: float,
    confidence: float = 0.95,
    more_is_better: bool = True,
) -> NonInferiority:
    """Whether a candidate is at most a margin worse than its reference, in the mean over the same cases.

    Shown if the end of the two-sided interval of mean(candidate - reference) on the worse side lies within the margin; with
    confidence 0.95 that is a one-sided test at 2.5 %. The interval is the wider of two at each end: Student's t, because the
    percentile bootstrap of few cases is too narrow (simulated at the margin with normal changes, it claims wrongly in 13 % of
    trials of 3 cases, 8 % of 5, 5 % of 10; t in 2.5 %), and the percentile bootstrap of `paired_bootstrap`, so that no claim
    contradicts the interval printed beside it.

    What no interval mends: where few cases are far worse than the rest, a sample may hold none of them. With one case in ten
    that is ten standard deviations worse, claims at the margin are wrong in 28 % of trials of 10 cases and 6 % of 50.

    Args:
        reference: (cases,) one value for each case, for example mean Dice in FP32.
        candidate: (cases,) the same cases in the same order, for example in INT8.
        margin: the largest loss that does not matter, above 0, in the unit of the values; chosen before looking at them.
        confidence: share of the two-sided interval, above 0 and below 1.
        more_is_better: False for distances and errors.

    Returns:
        The interval and what follows; of a single case the interval is infinite and nothing is shown. Order does not matter.

    Raises:
        ShapeError: no cases, values that are not finite, or of different length.
        OptionError: a margin or confidence without meaning.

    Source: Piaggio et al. 2012, CONSORT extension for noninferiority trials, doi:10.1001/jama.2012.87802 (margin and interval);
    Efron and Tibshirani 1993, sections 12.5 and 13.3 (t and percentile intervals).
    """
    require_margin(margin)
    changes = _changes(reference, candidate)
    drawn = paired_bootstrap(np.zeros(changes.size), changes, confidence=confidence)
    low, high = _t_interval(changes, confidence)
    return NonInferiority(
        mean=float(changes.mean()),
        low=min(low, drawn.low),
        high=max(high, drawn.high),
        worst=float(changes[0] if more_is_better else changes[-1]),
        margin=margin,
        n=changes.size,
        confidence=confidence,
        more_is_better=more_is_better,
    )


def require_margin(margin: float) -> None:
    """Refuse a margin within which nothing can be shown.

    Raises:
        OptionError: not above 0, or not finite.
    """
    if not 0.0 < margin < np.inf:
        raise OptionError(
            f"the margin of non-inferiority must be above 0, got {margin}; give --margin 0.01, for example."
        )


def _draws(values: np.ndarray, samples: int, seed: int) -> Iterator[np.ndarray]:
    """(some, cases) draws with replacement, `samples` of them in all, a few at a time: of 1000 cases they fill 80 MB."""
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // values.size)
    for first in range(0, samples, at_once):
        yield values[generator.integers(values.size, size=(min(at_once, samples - first), values.size))]


def _changes(first: ArrayLike, second: ArrayLike) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(cases,) second - first, sorted."""
    before, after = _finite(first, "values of the first"), _finite(second, "values of the second")
    if before.shape != after.shape:
        raise ShapeError(f"paired values must be of the same cases, got {before.size} and {after.size}.")
    return np.sort(after - before)


def _t_interval(values: np.ndarray[tuple[int], np.dtype[np.float64]], confidence: float) -> tuple[float, float]:
    """Student's interval of the mean; infinite for one value."""
    from scipy.special import stdtrit

    if values.size < 2:
        return -np.inf, np.inf
    reach = stdtrit(values.size - 1, (1.0 + confidence) / 2.0) * values.std(ddof=1) / np.sqrt(values.size)
    return float(values.mean() - reach), float(values.mean() + reach)


def _require_share(confidence: float, samples: int) -> None:
    if not 0.0 < confidence < 1.0 or samples < 1:
        raise OptionError(f"wanted a confidence between 0 and 1 and at least one sample, got {confidence}, {samples}.")


def _finite(values: ArrayLike, what: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(n,) float64, at least one, all finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ShapeError(f"{what} must be one row of finite numbers, at least one, got {array.tolist()}.")
    return array
