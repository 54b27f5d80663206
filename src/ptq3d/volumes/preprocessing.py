"""What happens to an image before the network sees it, and to label maps on their way back."""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, IntensityError, OptionError, ShapeError
from ptq3d.volumes.resample import oriented_grid, resample_onto, spaced_grid, valid_axcodes, valid_spacing
from ptq3d.volumes.volume import Grid, Volume

Voxels: TypeAlias = NDArray[np.float32]
Rule: TypeAlias = dict[str, Any]
"""{"rule": a name of `INTENSITY_RULES`, and its numbers by name}."""


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


def _require_below(low: float, high: float, rule: str) -> None:
    if not low < high:
        raise OptionError(f"intensity rule '{rule}' needs low below high, got {low} and {high}.")


INTENSITY_RULES: dict[str, Callable[..., Voxels]] = {
    "window": window,
    "quantiles": quantiles,
    "z_score": z_score,
    "standardize": standardize,
    "clip": clip,
    "range": full_range,
}
"""Intensity rules by name. Open: a new rule is a function (data, **numbers) -> data and one row."""


@dataclass(frozen=True)
class Preprocessing:
    """The one description of preprocessing that training, calibration and deployment share.

    Attributes:
        orientation: axis directions such as "RAS"; None leaves the axes as stored.
        spacing: mm along the axes of `orientation`; None leaves the voxel size as stored.
        intensity: rules in their order, each {"rule": a name of `INTENSITY_RULES`, and its numbers}.
        intensity_first: apply the rules to the stored voxels (nnU-Net) and not to the resampled ones (MONAI).
        outside: value around volumes smaller than a window, in preprocessed units.

    Raises:
        OptionError: an orientation, spacing, rule or number that has no meaning.
    """

    orientation: str | None = "RAS"
    spacing: tuple[float, float, float] | None = None
    intensity: tuple[Rule, ...] = ()
    intensity_first: bool = False
    outside: float = 0.0

    def __post_init__(self) -> None:
        if self.orientation is not None:
            object.__setattr__(self, "orientation", valid_axcodes(self.orientation))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(valid_spacing(self.spacing).tolist()))
        object.__setattr__(self, "intensity", tuple(valid_rule(rule) for rule in self.intensity))
        if not math.isfinite(self.outside):
            raise OptionError(f"'outside' must be a finite number, got {self.outside}.")

    def grid(self, grid: Grid) -> Grid:
        """The preprocessed grid of a volume that lies on `grid`."""
        if self.orientation is not None:
            grid = oriented_grid(grid, self.orientation)
        return grid if self.spacing is None else spaced_grid(grid, self.spacing)

    def apply(self, volume: Volume) -> Volume:
        """The image as the network sees it.

        Args:
            volume: (C, X, Y, Z) float32 in the file's unit.

        Returns:
            (C, X, Y, Z) float32 in C order on `grid(volume.grid)`, resampled linearly.

        Raises:
            IntensityError: a rule cannot be applied to this image.
            ShapeError: `volume` is not float32.

        Source: equal to MONAI Orientationd, Spacingd(mode="bilinear") and its intensity transforms within 1e-4.
        """
        if volume.data.dtype != np.float32:
            raise ShapeError(f"an image to preprocess must be float32, got {volume.data.dtype}.")
        if self.intensity_first:
            volume = Volume(self._intensities(volume.data), volume.affine)
        volume = resample_onto(volume, *self.grid(volume.grid), mode="linear")
        data = volume.data if self.intensity_first else self._intensities(volume.data)
        return Volume(np.ascontiguousarray(data), volume.affine)

    def apply_labels(self, labels: Volume) -> Volume:
        """Labels on the grid of `apply`, from the nearest voxel.

        Args:
            labels: (C, X, Y, Z) unsigned integers on the grid of their image.

        Returns:
            The same dtype in C order.
        """
        moved = resample_onto(labels, *self.grid(labels.grid), mode="nearest")
        return Volume(np.ascontiguousarray(moved.data), moved.affine)

    def restore_labels(self, labels: NDArray[Any], original: Grid) -> Volume:
        """Labels from the preprocessed grid back on the grid of the file, from the nearest voxel.

        Args:
            labels: (X, Y, Z) unsigned integers on `grid(original)`.
            original: the grid of the volume as loaded.

        Returns:
            (1, X, Y, Z) in the dtype of `labels`; shape and affine are those of `original`.

        Raises:
            ShapeError: `labels` do not have the shape of the preprocessed grid.
        """
        shape, affine = self.grid(original)
        if labels.shape != shape:
            raise ShapeError(f"labels to restore must lie on the preprocessed grid {shape}, got {labels.shape}.")
        moved = resample_onto(Volume(labels[None], affine), *original, mode="nearest")
        return Volume(np.ascontiguousarray(moved.data), original[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or TOML; `from_dict` gives the same object back."""
        return {
            "orientation": self.orientation,
            "spacing": None if self.spacing is None else list(self.spacing),
            "intensity": [dict(rule) for rule in self.intensity],
            "intensity_first": self.intensity_first,
            "outside": self.outside,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From plain values, as `to_dict` gives them or a person writes them; keys left out keep their default.

        Args:
            values: the attributes by name; "none" for None, which TOML lacks.

        Raises:
            OptionError: an unknown key, a value of the wrong type, or one without meaning.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise OptionError(f"unknown preprocessing keys {unknown}; the valid ones are {sorted(known)}.")
        given: dict[str, Any] = {key: None if value == "none" else value for key, value in values.items()}
        for key, value in given.items():
            if not isinstance(value, _TYPES[key]):
                example = _EXAMPLE.to_dict()[key]
                raise OptionError(f"preprocessing key '{key}' cannot be {value!r}; wanted, for example, {example!r}.")
        if "intensity" in given:
            given["intensity"] = tuple(given["intensity"])
        return cls(**given)

    @classmethod
    def load(cls, path: Path) -> Preprocessing:
        """From a TOML or JSON file with the keys of `from_dict`.

        Raises:
            FileError: missing, of another kind, or not parsable.
            OptionError: see `from_dict`.
        """
        path = Path(path)
        try:
            return cls.from_dict(_parse(path))
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from error

    def _intensities(self, data: Voxels) -> Voxels:
        for rule in self.intensity:
            numbers = {key: value for key, value in rule.items() if key != "rule"}
            data = INTENSITY_RULES[rule["rule"]](data, **numbers)
        return data


def valid_rule(rule: Mapping[str, Any]) -> Rule:
    """A copy of a rule that `INTENSITY_RULES` knows and whose numbers fit it.

    Args:
        rule: {"rule": name, and its numbers by name}.

    Raises:
        OptionError: no table, an unknown rule, or a number that is unknown, missing or not finite.
    """
    name = rule.get("rule") if isinstance(rule, Mapping) else rule
    if not isinstance(rule, Mapping) or not isinstance(name, str) or name not in INTENSITY_RULES:
        raise OptionError(f"unknown intensity rule {name!r}; the valid ones are {sorted(INTENSITY_RULES)}.")
    _, *wanted = inspect.signature(INTENSITY_RULES[name]).parameters.values()
    numbers = {key: value for key, value in rule.items() if key != "rule"}
    missing = [number.name for number in wanted if number.default is number.empty and number.name not in numbers]
    if missing or set(numbers) - {number.name for number in wanted}:
        raise OptionError(
            f"intensity rule '{name}' takes {[number.name for number in wanted]}, got {sorted(numbers)}; "
            f"missing: {missing}."
        )
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise OptionError(f"intensity rule '{name}': '{key}' must be a finite number, got {value!r}.")
    return dict(rule)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise FileError(f"{path} is no readable TOML or JSON file: {error}.") from error
    if not isinstance(values, dict):
        raise FileError(f"{path} must hold a table of preprocessing keys, got {type(values).__name__}.")
    return values


_EXAMPLE = Preprocessing("RAS", (1.5, 1.5, 2.0), ({"rule": "window", "low": -175.0, "high": 250.0},))

_TYPES: dict[str, tuple[type, ...]] = {
    "orientation": (str, NoneType),
    "spacing": (list, tuple, NoneType),
    "intensity": (list, tuple),
    "intensity_first": (bool,),
    "outside": (int, float),
}

PRESETS: dict[str, Preprocessing] = {"btcv": _EXAMPLE}
"""Preprocessing by data set: "btcv" is RAS, 1.5 x 1.5 x 2.0 mm, -175..250 HU to 0..1."""
