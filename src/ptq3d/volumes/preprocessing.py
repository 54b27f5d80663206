"""What happens to an image before the network sees it, and to label maps on their way back."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, OptionError, ShapeError
from ptq3d.volumes.cells import celled_grid, resample_cells
from ptq3d.volumes.cropping import crop_to_nonzero
from ptq3d.volumes.intensity import Rule, apply_rules, valid_rule
from ptq3d.volumes.resample import (
    oriented_grid,
    permuted_grid,
    resample_onto,
    spaced_grid,
    straight_grid,
    valid_axcodes,
    valid_axes,
    valid_spacing,
)
from ptq3d.volumes.volume import Grid, Volume


@dataclass(frozen=True)
class Preprocessing:
    """The one description of preprocessing that training, calibration and deployment share.

    Attributes:
        orientation: axis directions such as "RAS"; None leaves the axes as stored.
        spacing: mm along the axes the network sees; None leaves the voxel size as stored.
        intensity: rules in their order, each {"rule": a name of `INTENSITY_RULES`, its numbers, and "channel" where it is
            for one channel only}.
        intensity_first: apply the rules to the stored voxels (nnU-Net) and not to the resampled ones (MONAI).
        outside: value around volumes smaller than a window, in preprocessed units.
        axes: the order in which the network sees the axes of `orientation`; (2, 1, 0) reverses them. None keeps it.
        resampling: "linear" onto MONAI's grid, or "nnunet": cubic splines onto the same box (`volumes.cells`).
        crop: "nonzero" cuts off what is 0 in all channels first, so that the grid depends on the image.

    Raises:
        OptionError: an orientation, spacing, rule, number or choice that has no meaning.
    """

    orientation: str | None = "RAS"
    spacing: tuple[float, float, float] | None = None
    intensity: tuple[Rule, ...] = ()
    intensity_first: bool = False
    outside: float = 0.0
    axes: tuple[int, int, int] | None = None
    resampling: Literal["linear", "nnunet"] = "linear"
    crop: Literal["none", "nonzero"] = "none"

    def __post_init__(self) -> None:
        if self.orientation is not None:
            object.__setattr__(self, "orientation", valid_axcodes(self.orientation))
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(valid_spacing(self.spacing).tolist()))
        if self.axes is not None:
            object.__setattr__(self, "axes", valid_axes(self.axes))
        object.__setattr__(self, "intensity", tuple(valid_rule(rule) for rule in self.intensity))
        if not math.isfinite(self.outside):
            raise OptionError(f"'outside' must be a finite number, got {self.outside}.")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise OptionError(f"'{key}' is one of {', '.join(choices)}, got {getattr(self, key)!r}.")

    def grid(self, grid: Grid) -> Grid:
        """The preprocessed grid of a volume that lies on `grid`, where `crop` takes nothing off it."""
        grid = self._turned(grid)
        if self.spacing is None:
            return grid
        return spaced_grid(grid, self.spacing) if self.resampling == "linear" else celled_grid(grid, self.spacing)

    def apply(self, volume: Volume) -> Volume:
        """The image as the network sees it.

        Args:
            volume: (C, X, Y, Z) float32 in the file's unit.

        Returns:
            (C, X, Y, Z) float32 in C order on `grid(volume.grid)`, or on the grid of its crop.

        Raises:
            IntensityError: a rule cannot be applied to this image.
            ShapeError: `volume` is not float32, or lacks a channel that a rule is for.

        Source: equal to MONAI Orientationd, Spacingd(mode="bilinear") and its intensity transforms within 1e-4; with
            `resampling` and `crop` as in nnU-Net to its DefaultPreprocessor within 1e-3 of the value range.
        """
        if volume.data.dtype != np.float32:
            raise ShapeError(f"an image to preprocess must be float32, got {volume.data.dtype}.")
        if self.crop == "nonzero":
            volume = crop_to_nonzero(volume)
        if self.intensity_first:
            volume = Volume(apply_rules(volume.data, self.intensity), volume.affine)
        volume = self._resampled(volume)
        data = volume.data if self.intensity_first else apply_rules(volume.data, self.intensity)
        return Volume(np.ascontiguousarray(data), volume.affine)

    def apply_labels(self, labels: Volume, onto: Grid | None = None) -> Volume:
        """Labels on the grid of `apply`, from the nearest voxel.

        Args:
            labels: (C, X, Y, Z) unsigned integers on the grid of their image.
            onto: the grid of their preprocessed image, needed where `crop` makes it depend on the image.

        Returns:
            The same dtype in C order.

        Raises:
            OptionError: `crop` needs `onto`.
        """
        if onto is None and self.crop != "none":
            raise OptionError(f"labels of images cropped by '{self.crop}' need the grid of the preprocessed image.")
        moved = resample_onto(labels, *(onto or self.grid(labels.grid)), mode="nearest")
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
            "axes": None if self.axes is None else list(self.axes),
            "resampling": self.resampling,
            "crop": self.crop,
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
        given: dict[str, Any] = {
            key: None if value == "none" and key not in _CHOICES else value for key, value in values.items()
        }
        for key, value in given.items():
            if not isinstance(value, _TYPES[key]):
                example = _EXAMPLES[key]
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

    def _turned(self, grid: Grid) -> Grid:
        """The grid with its axes as the network sees them, and where nothing else does it at right angles, in the file's voxel size."""
        if self.orientation is not None:
            grid = oriented_grid(grid, self.orientation)
        if self.axes is not None:
            grid = permuted_grid(grid, self.axes)
        if self.spacing is not None and self.resampling == "linear":
            return grid  # `spaced_grid` straightens it, as MONAI does
        return straight_grid(grid)

    def _resampled(self, volume: Volume) -> Volume:
        if self.resampling == "linear":
            return resample_onto(volume, *self.grid(volume.grid), mode="linear")
        turned = resample_onto(volume, *self._turned(volume.grid), mode="linear")
        return turned if self.spacing is None else resample_cells(turned, self.spacing)


_CHOICES: dict[str, tuple[str, ...]] = {"resampling": ("linear", "nnunet"), "crop": ("none", "nonzero")}


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

_EXAMPLES: dict[str, Any] = {**_EXAMPLE.to_dict(), "axes": [2, 1, 0]}

_TYPES: dict[str, tuple[type, ...]] = {
    "orientation": (str, NoneType),
    "spacing": (list, tuple, NoneType),
    "intensity": (list, tuple),
    "intensity_first": (bool,),
    "outside": (int, float),
    "axes": (list, tuple, NoneType),
    "resampling": (str,),
    "crop": (str,),
}

PRESETS: dict[str, Preprocessing] = {"btcv": _EXAMPLE}
"""Preprocessing by data set: "btcv" is RAS, 1.5 x 1.5 x 2.0 mm, -175..250 HU to 0..1."""
