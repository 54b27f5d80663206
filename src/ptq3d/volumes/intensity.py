"""Intensity rules: grey values to what a network reads, one function a rule and one row in `INTENSITY_RULES`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import IntensityError, OptionError, ShapeError

Voxels: TypeAlias = NDArray[np.float32]
Rule: TypeAlias = dict[str, Any]
"""{"rule": a name of `INTENSITY_RULES`, its numbers by name, and "channel" where it is for one channel only}."""

NOT_NUMBERS = ("rule", "channel")


def window(data: Voxels, low: float, high: float) -> Voxels:
    """clip((x - low) / (high - low), 0, 1).

    Args:
        data: float32, any shape; left as it is.
        low: value that becomes 0, in the unit of `data`.
        high: value that becomes 1.

    Raises:
        OptionError: `low` is not below `high`.

    Source: MONAI ScaleIntensityRanged(low, high, 0, 1, clip=True).
    """
    _require_below(low, high, "window")
    result = data - np.float32(low)
    result /= np.float32(high - low)
    return np.clip(result, 0.0, 1.0, out=result)


def quantiles(data: Voxels, lower: float, upper: float) -> Voxels:
    """`window` between two quantiles of all voxels.

    Args:
        data: float32, any shape.
        lower: share of the voxels below 0, in 0..1.
        upper: share of the voxels below 1, in 0..1.

    Raises:
        OptionError: not 0 <= lower < upper <= 1.
        IntensityError: both quantiles have the same value.

    Source: MONAI ScaleIntensityRangePercentilesd(100 lower, 100 upper, 0, 1, clip=True).
    """
    if not 0.0 <= lower < upper <= 1.0:
        raise OptionError(f"intensity rule 'quantiles' needs 0 <= lower < upper <= 1, got {lower} and {upper}.")
    low, high = (float(value) for value in np.quantile(data, (lower, upper)))
    if low == high:
        raise IntensityError(
            f"the {lower} and {upper} quantiles of the image are both {low}: it is constant or nearly so; "
            "leave it out, or choose another intensity rule."
        )
    return window(data, low, high)


def z_score(data: Voxels, nonzero: bool = False) -> Voxels:
    """(x - mean) / standard deviation; a constant image becomes 0.

    Args:
        data: float32, any shape.
        nonzero: take mean and deviation from the voxels that are not 0, and leave the others 0.

    Source: MONAI NormalizeIntensityd(nonzero=...).
    """
    chosen = data[data != 0] if nonzero else data
    if chosen.size == 0:
        return data.copy()
    mean, deviation = chosen.mean(dtype=np.float64), chosen.std(dtype=np.float64)
    result = data - np.float32(mean)
    result /= np.float32(deviation or 1.0)
    if nonzero:
        result[data == 0] = 0.0
    return result


def clip(data: Voxels, low: float, high: float) -> Voxels:
    """min(max(x, low), high), in the unit of `data`.

    Raises:
        OptionError: `low` is not below `high`.
    """
    _require_below(low, high, "clip")
    return np.clip(data, np.float32(low), np.float32(high))


def full_range(data: Voxels) -> Voxels:
    """(x - min) / (max - min) over all voxels.

    Raises:
        IntensityError: a constant image.

    Source: MONAI ScaleIntensityd(0, 1).
    """
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise IntensityError(f"the image is constant ({low}), so it has no range to scale to 0..1; leave it out.")
    return window(data, low, high)


def standardize(data: Voxels, mean: float, deviation: float) -> Voxels:
    """(x - mean) / deviation, both known beforehand, in the unit of `data`.

    Raises:
        OptionError: `deviation` is not above zero.

    Source: nnU-Net CTNormalization, whose numbers are those of the foreground of its training images.
    """
    if not deviation > 0:
        raise OptionError(f"intensity rule 'standardize' needs a deviation above zero, got {deviation}.")
    result = data - np.float32(mean)
    result /= np.float32(deviation)
    return result


def masked_z_score(data: Voxels, *, inside: NDArray[np.bool_]) -> Voxels:
    """(x - mean) / standard deviation of each channel over the voxels of a mask; the others keep their value.

    Args:
        data: (C, X, Y, Z) float32.
        inside: (X, Y, Z), given by `apply_rules`.

    Source: nnU-Net ZScoreNormalization(use_mask_for_norm=True).
    """
    result = data.copy()
    for channel in result:
        channel[inside] = z_score(channel[inside])
    return result


def foreground(data: NDArray[Any]) -> NDArray[np.bool_]:
    """(X, Y, Z) where any channel of (C, X, Y, Z) is not 0, and the holes that such voxels enclose.

    Source: nnU-Net create_nonzero_mask.
    """
    from scipy.ndimage import binary_fill_holes

    filled: NDArray[np.bool_] = binary_fill_holes((data != 0).any(axis=0))
    return filled


def _require_below(low: float, high: float, rule: str) -> None:
    if not low < high:
        raise OptionError(f"intensity rule '{rule}' needs low below high, got {low} and {high}.")


INTENSITY_RULES: dict[str, Callable[..., Voxels]] = {
    "window": window,
    "quantiles": quantiles,
    "z_score": z_score,
    "masked_z_score": masked_z_score,
    "standardize": standardize,
    "clip": clip,
    "range": full_range,
}
"""Intensity rules by name. Open: a new rule is a function (data, **numbers) -> data and one row.

One with a keyword-only `inside` is given the `foreground` of the image as it was before the first rule.
"""


def apply_rules(data: Voxels, rules: Sequence[Rule]) -> Voxels:
    """The image after all rules, in their order.

    Args:
        data: (C, X, Y, Z) float32; left as it is.
        rules: see `Rule`.

    Raises:
        IntensityError: a rule cannot be applied to this image.
        ShapeError: a rule is for a channel that the image does not have.
    """
    inside = foreground(data) if any(_takes_mask(rule["rule"]) for rule in rules) else None
    if any("channel" in rule for rule in rules):
        data = data.copy()
    for rule in rules:
        data = _applied(data, rule, inside)
    return data


def _applied(data: Voxels, rule: Rule, inside: NDArray[np.bool_] | None) -> Voxels:
    function, numbers = INTENSITY_RULES[rule["rule"]], _numbers(rule)
    if _takes_mask(rule["rule"]):
        numbers["inside"] = inside
    if "channel" not in rule:
        return function(data, **numbers)
    channel = rule["channel"]
    if channel >= len(data):
        raise ShapeError(
            f"intensity rule '{rule['rule']}' is for channel {channel}, the image has {len(data)}; "
            "give the images that the network was trained on, all channels of a case."
        )
    data[channel : channel + 1] = function(data[channel : channel + 1], **numbers)
    return data


def _numbers(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rule.items() if key not in NOT_NUMBERS}


def _parameters(name: str) -> list[inspect.Parameter]:
    _, *numbers = inspect.signature(INTENSITY_RULES[name]).parameters.values()
    return numbers


def _takes_mask(name: str) -> bool:
    return any(number.kind is number.KEYWORD_ONLY for number in _parameters(name))


def valid_rule(rule: Mapping[str, Any]) -> Rule:
    """A copy of a rule that `INTENSITY_RULES` knows and whose numbers fit it.

    Args:
        rule: {"rule": name, its numbers by name, and "channel" where it is for one channel only}.

    Raises:
        OptionError: no table, an unknown rule, or a number that is unknown, missing or not finite.
    """
    name = rule.get("rule") if isinstance(rule, Mapping) else rule
    if not isinstance(rule, Mapping) or not isinstance(name, str) or name not in INTENSITY_RULES:
        raise OptionError(f"unknown intensity rule {name!r}; the valid ones are {sorted(INTENSITY_RULES)}.")
    wanted = [number for number in _parameters(name) if number.kind is not number.KEYWORD_ONLY]
    numbers = _numbers(rule)
    missing = [number.name for number in wanted if number.default is number.empty and number.name not in numbers]
    if missing or set(numbers) - {number.name for number in wanted}:
        raise OptionError(
            f"intensity rule '{name}' takes {[number.name for number in wanted]}, got {sorted(numbers)}; "
            f"missing: {missing}."
        )
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise OptionError(f"intensity rule '{name}': '{key}' must be a finite number, got {value!r}.")
    channel = rule.get("channel", 0)
    if type(channel) is not int or channel < 0:
        raise OptionError(f"intensity rule '{name}': 'channel' counts from 0, got {channel!r}.")
    return dict(rule)
