"""Abdominal CT phantoms: thirteen organs in Hounsfield units, drawn from ellipsoids and tubes in millimetres.

An atlas (one body, in RAS+ millimetres) is varied per case: every organ is moved, scaled and given the contrast of the
phase; the whole body is scaled and bent by a smooth random field; the scanner adds blur, noise, spacing, orientation.
A phantom shows that a pipeline works from file to file. It says nothing about patients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.datasets.btcv import BTCV_ORGANS
from ptq3d.errors import FileError, OptionError
from ptq3d.volumes.nifti import write_nifti

Point: TypeAlias = tuple[float, ...]  # three numbers in mm
Box: TypeAlias = tuple[slice, slice, slice]
Array: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Phantom:
    """One case as a scanner would store it.

    Attributes:
        image: (X, Y, Z) int16, HU.
        labels: (X, Y, Z) uint8, indices into `BTCV_ORGANS`.
        affine: (4, 4) float64, voxel to RAS+ world in mm.
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class _Ellipsoid:
    centre: Point  # mm
    radii: Point  # mm


@dataclass(frozen=True)
class _Tube:
    points: tuple[Point, ...]  # mm, joined by straight pieces
    radii: tuple[float, ...]  # mm, one for each point


@dataclass(frozen=True)
class _Organ:
    parts: tuple[_Ellipsoid | _Tube, ...]
    arterial: float  # HU in the arterial phase
    venous: float  # HU in the portal venous phase
    core: tuple[float, float] | None = None  # share of the radius, and HU added inside it (medulla, stomach content)


# +x is the patient's right, +y the front, +z the head. The origin lies between liver and spleen.
_ATLAS: Mapping[str, _Organ] = {
    "liver": _Organ((_Ellipsoid((62, 4, 28), (50, 62, 62)), _Ellipsoid((18, 36, 42), (56, 30, 32))), 85, 115),
    "stomach": _Organ(
        (
            _Ellipsoid((-58, 14, 50), (32, 32, 36)),
            _Tube(((-62, 28, 25), (-45, 46, -8), (-14, 50, -24), (12, 46, -20)), (25, 22, 17, 13)),
        ),
        arterial=80,
        venous=85,
        core=(0.75, -62),
    ),
    "spleen": _Organ((_Ellipsoid((-90, -32, 34), (23, 36, 44)),), 150, 130),
    "pancreas": _Organ(
        (_Tube(((28, 14, -36), (22, 20, -12), (-8, 22, 4), (-42, 4, 10), (-66, -12, 22)), (15, 13, 11, 11, 10)),),
        105,
        85,
    ),
    "right kidney": _Organ((_Ellipsoid((64, -50, -34), (25, 22, 45)),), 195, 180, core=(0.55, -60)),
    "left kidney": _Organ((_Ellipsoid((-62, -50, -22), (25, 22, 46)),), 195, 180, core=(0.55, -60)),
    "gallbladder": _Organ((_Tube(((44, 30, -12), (54, 50, -34)), (11, 16)),), 12, 12),
    "portal and splenic veins": _Organ(
        (_Tube(((-70, -20, 26), (-38, -8, 8), (4, 6, 0), (26, 4, 14), (46, 2, 30)), (7, 7.5, 9, 9, 8.5)),), 105, 170
    ),
    "inferior vena cava": _Organ(
        (_Tube(((20, -22, -110), (20, -22, -20), (24, -14, 40), (22, -6, 80)), (12, 12, 12, 12)),), 70, 140
    ),
    "aorta": _Organ((_Tube(((-8, -24, -110), (-9, -22, 0), (-14, -28, 120)), (10, 10.5, 11.5)),), 310, 165),
    "esophagus": _Organ((_Tube(((-4, -6, 120), (-12, 0, 76), (-38, 12, 56)), (9.5, 9.5, 10)),), 50, 55),
    "right adrenal gland": _Organ(
        (
            _Tube(((33, -34, 36), (38, -40, 18), (36, -46, 4)), (7, 8, 7.5)),
            _Tube(((38, -40, 18), (48, -46, 8)), (7.5, 6.5)),
        ),
        arterial=60,
        venous=50,
    ),
    "left adrenal gland": _Organ(
        (
            _Tube(((-32, -30, 36), (-37, -36, 18), (-35, -44, 6)), (7, 8, 7.5)),
            _Tube(((-37, -36, 18), (-47, -40, 8)), (7.5, 6.5)),
        ),
        arterial=60,
        venous=50,
    ),
}
_BEFORE_LUNGS = ("liver", "stomach", "spleen")  # they end at the diaphragm; the rest lies in front of or below it
_BODY = (134.0, 92.0)  # half axes of the skin in mm
_VIEW = (300.0, 214.0, 212.0)  # field of view in mm
_KNOTS_MM = 55.0  # distance of the control points of the smooth deformation
_ORIENTATIONS = ("RAS", "LPS", "LAS", "LPI", "RPI", "LIA", "PSR", "SPL")


def write_phantoms(
    folder: Path, *, train: int, test: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> None:
    """Phantoms as a folder in BTCV layout, ready for `ptq3d train --data_path FOLDER/train/images`.

    `FOLDER/{train,test}/{images,labels}/{img,label}NNNN.nii.gz`: int16 HU and uint8 classes of `BTCV_ORGANS`. Numbers
    run on from train to test, so no name stands in both. The same seed writes the same bytes.

    Args:
        folder: made where it is missing; files of the same names are replaced.
        train: number of cases under `train`, at least 0.
        test: number of cases under `test`, at least 0.
        seed: every number of every case follows from it; at least 0.
        progress: called with (cases done, cases wanted) after each case.

    Raises:
        OptionError: a negative number, or no cases at all.
        FileError: the folder cannot be made or written.
    """
    if min(train, test, seed) < 0 or train + test == 0:
        raise OptionError(f"phantoms need train + test >= 1 and a seed >= 0, got train={train}, test={test}, {seed=}.")
    for index in range(train + test):
        part = Path(folder) / ("train" if index < train else "test")
        phantom = make_phantom(seed, index)
        _save(part / "images" / f"img{index + 1:04d}.nii.gz", phantom.image, phantom.affine)
        _save(part / "labels" / f"label{index + 1:04d}.nii.gz", phantom.labels, phantom.affine)
        if progress is not None:
            progress(index + 1, train + test)


def make_phantom(seed: int, index: int = 0) -> Phantom:
    """One phantom: case `index` of the set that `seed` stands for.

    Args:
        seed: seed of the set, at least 0.
        index: number of the case in its set, at least 0.

    Returns:
        A body of about 270 x 185 x 210 mm with all thirteen organs, in one of eight stored orientations.
    """
    rng = np.random.default_rng([seed, index])
    axes = _grid(rng)
    points = _bend(axes, rng)
    image, labels = _paint(points, rng)
    stored = _scan(image, rng)
    return _orient(stored, labels, _affine(axes, rng), str(rng.choice(_ORIENTATIONS)))


def _grid(rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Voxel centres along each world axis in mm: the field of view of one scan."""
    in_plane, slices = rng.uniform(1.5, 2.0), rng.uniform(2.3, 3.2)
    steps, shift = (in_plane, in_plane, slices), rng.uniform(-4, 4, size=3)
    return [
        (np.arange(int(size / step)) + 0.5) * step - size / 2 + move
        for size, step, move in zip(_VIEW, steps, shift, strict=True)
    ]


def _bend(axes: list[NDArray[np.float64]], rng: np.random.Generator) -> Array:
    """Atlas point of every voxel, (3, X, Y, Z) in mm: the body scaled and bent by a cubic B-spline field."""
    bases = [_spline_basis(axis) for axis in axes]
    knots = [basis.shape[1] for basis in bases]
    field: Array = rng.normal(0, 8.0, size=(3, *knots)).astype(np.float32)  # mm
    for basis in bases:  # each pass contracts the first space axis and appends the dense one
        field = np.tensordot(field, basis, axes=(1, 1))
    scales = rng.uniform(0.93, 1.05, size=3)
    for axis, (values, scale) in enumerate(zip(axes, scales, strict=True)):
        field[axis] += (values / scale).reshape([-1 if other == axis else 1 for other in range(3)])
    return field


def _spline_basis(axis: NDArray[np.float64]) -> Array:
    """(voxels, knots): the weights of uniform cubic B-splines along one axis."""
    position = (axis - axis[0]) / _KNOTS_MM + 1.0
    knots = np.arange(int(position[-1]) + 3)
    distance = np.abs(position[:, None] - knots)
    near = 2 / 3 - distance**2 + distance**3 / 2
    return np.asarray(np.where(distance < 1, near, np.maximum(2 - distance, 0) ** 3 / 6), np.float32)


def _paint(points: Array, rng: np.random.Generator) -> tuple[Array, NDArray[np.uint8]]:
    """Crisp HU and labels on the grid of `points`, later tissue over earlier."""
    phase = rng.uniform(0.25, 1.0)  # 0 arterial, 1 portal venous
    image = np.full(points.shape[1:], -1000, np.float32)
    labels = np.zeros(points.shape[1:], np.uint8)
    cavity = _paint_wall(points, image, rng)
    _paint_bowel(points, image, rng)
    for name in _BEFORE_LUNGS:
        _paint_organ(name, points, (image, labels), phase, rng)
    lungs = cavity & _above_diaphragm(points)
    image[lungs], labels[lungs] = rng.uniform(-870, -790), 0
    _paint_spine(points, image)
    for name in _ATLAS:
        if name not in _BEFORE_LUNGS:
            _paint_organ(name, points, (image, labels), phase, rng)
    image[(labels > 0) & ~cavity] = 55
    labels[~cavity] = 0
    return image, labels


def _paint_wall(points: Array, image: Array, rng: np.random.Generator) -> Mask:
    """Fat, muscle and ribs; returns the cavity inside them."""
    fat, muscle = rng.uniform(7, 18), rng.uniform(8, 11)
    skin, outer, inner = (_oval(points, margin) for margin in (0.0, fat, fat + muscle))
    x, y, z = points
    ribs = (np.sin((z + 0.45 * y) * np.float32(2 * np.pi / 27)) > 0.45) & (z > -45) & (np.abs(x) > 28)
    image[skin] = rng.uniform(-112, -95)
    image[outer] = rng.uniform(48, 62)
    image[outer & ~_oval(points, fat + 6) & ribs] = rng.uniform(330, 480)
    image[inner] = rng.uniform(-112, -98)
    return inner


def _oval(points: Array, margin: float) -> Mask:
    """Inside the skin and at least about `margin` mm from it."""
    x, y = np.abs(points[0]) / np.float32(_BODY[0] - margin), np.abs(points[1]) / np.float32(_BODY[1] - margin)
    return np.asarray(x * x * np.sqrt(x) + y * y * np.sqrt(y) < 1)


def _above_diaphragm(points: Array) -> Mask:
    x, y, z = points
    side = np.where(x > 0, x - 62, x + 62) / 78
    dome = np.where(x > 0, np.float32(90), np.float32(84)) - 48 * (side**2 + (y / 95) ** 2)
    return np.asarray((z > dome) & (np.abs(x) > 20))


def _paint_spine(points: Array, image: Array) -> None:
    x, y, z = points
    column = (x / 21) ** 2 + ((y + 52) / 18) ** 2 < 1
    bone = np.sin(z * np.float32(2 * np.pi / 34)) > -0.75
    image[((np.abs(x) - 30) / 20) ** 2 + ((y + 66) / 16) ** 2 < 1] = 55
    image[(np.abs(x) < 7) & (np.abs(y + 78) < 16) & bone] = 320
    image[column & bone], image[column & ~bone] = 230, 85
    image[(x / 9) ** 2 + ((y + 73) / 7) ** 2 < 1] = 30


def _paint_bowel(points: Array, image: Array, rng: np.random.Generator) -> None:
    """Loops without a label in the lower belly: soft wall, some with gas."""
    for _ in range(int(rng.integers(6, 10))):
        centre = rng.uniform((-85, 0, -105), (85, 55, -58))
        loop = _Ellipsoid(tuple(centre), tuple(rng.uniform(11, 20, size=3)))
        box = _box(points, (loop,))
        level = _level(points[(slice(None), *box)], (loop,))
        image[box][level < 1] = rng.uniform(35, 60)
        image[box][level < 0.5] = rng.choice([-750.0, 20.0, 45.0])


def _paint_organ(
    name: str, points: Array, canvas: tuple[Array, NDArray[np.uint8]], phase: float, rng: np.random.Generator
) -> None:
    """Draw one organ, varied, into (image, labels)."""
    organ, (image, labels) = _ATLAS[name], canvas
    parts = _vary(organ.parts, rng)
    value = (1 - phase) * organ.arterial + phase * organ.venous + rng.normal(0, 5)
    box = _box(points, parts)
    level = _level(points[(slice(None), *box)], parts)
    image[box][level < 1] = value
    labels[box][level < 1] = BTCV_ORGANS.index(name)
    if organ.core is not None:
        share, difference = organ.core
        image[box][level < share**2] = value + difference + rng.normal(0, 5)


def _vary(parts: tuple[_Ellipsoid | _Tube, ...], rng: np.random.Generator) -> tuple[_Ellipsoid | _Tube, ...]:
    """The organ moved as a whole, every part thicker or thinner."""
    move = rng.normal(0, 2.5, size=3).clip(-5, 5)
    varied: list[_Ellipsoid | _Tube] = []
    for part in parts:
        if isinstance(part, _Ellipsoid):
            radii = np.multiply(part.radii, rng.uniform(0.9, 1.1, size=3))
            varied.append(_Ellipsoid(tuple(part.centre + move), tuple(radii)))
        else:
            points = tuple(tuple(point + move) for point in part.points)
            varied.append(_Tube(points, tuple(np.multiply(part.radii, rng.uniform(0.92, 1.12)))))
    return tuple(varied)


def _box(points: Array, parts: Iterable[_Ellipsoid | _Tube]) -> Box:
    """Voxels that can lie in `parts`: organs fill a few percent of the grid, the rest need not be computed."""
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for part in parts:
        centres = np.array([part.centre] if isinstance(part, _Ellipsoid) else part.points)
        reach = np.array(part.radii) if isinstance(part, _Ellipsoid) else np.full(3, max(part.radii))
        low, high = np.minimum(low, centres.min(0) - reach), np.maximum(high, centres.max(0) + reach)
    slices = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hit = (points[axis].max(others) >= low[axis]) & (points[axis].min(others) <= high[axis])
        found = np.flatnonzero(hit)
        slices.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0))
    return slices[0], slices[1], slices[2]


def _level(points: Array, parts: Iterable[_Ellipsoid | _Tube]) -> Array:
    """Squared distance from the middle of the nearest part, 1 on its surface."""
    level = np.full(points.shape[1:], np.inf, np.float32)
    for part in parts:
        measure = _ellipsoid_level(points, part) if isinstance(part, _Ellipsoid) else _tube_level(points, part)
        np.minimum(level, measure, out=level)
    return level


def _ellipsoid_level(points: Array, part: _Ellipsoid) -> Array:
    level = np.zeros(points.shape[1:], np.float32)
    for values, centre, radius in zip(points, part.centre, part.radii, strict=True):
        level += ((values - np.float32(centre)) / np.float32(radius)) ** 2
    return level


def _tube_level(points: Array, part: _Tube) -> Array:
    level = np.full(points.shape[1:], np.inf, np.float32)
    for start, end, first, last in zip(part.points, part.points[1:], part.radii, part.radii[1:], strict=False):
        origin, along = np.array(start, np.float32), np.subtract(end, start).astype(np.float32)
        offset = points - origin[:, None, None, None]
        share = np.clip(np.tensordot(along / (along @ along), offset, axes=1), 0, 1)
        offset -= along[:, None, None, None] * share
        radius = np.float32(first) + np.float32(last - first) * share
        np.minimum(level, np.einsum("cxyz,cxyz->xyz", offset, offset) / radius**2, out=level)
    return level


def _scan(image: Array, rng: np.random.Generator) -> NDArray[np.int16]:
    """What the scanner makes of crisp HU: blur, then noise with the same correlation."""
    weight = rng.uniform(0.10, 0.18)
    noise = _blur(rng.standard_normal(image.shape, dtype=np.float32), 0.12)
    noise *= np.float32(rng.uniform(8, 16)) / noise.std()
    stored: NDArray[np.int16] = np.rint(np.clip(_blur(image, weight) + noise, -1024, 3071)).astype(np.int16)
    return stored


def _blur(image: Array, weight: float) -> Array:
    """Kernel (weight, 1 - 2 weight, weight) along each axis, the border repeated."""
    for axis in range(3):
        padded = np.pad(image, [(1, 1) if other == axis else (0, 0) for other in range(3)], mode="edge")
        before, after = (np.take(padded, range(start, start + image.shape[axis]), axis) for start in (0, 2))
        image = image * np.float32(1 - 2 * weight) + (before + after) * np.float32(weight)
    return image


def _affine(axes: list[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Voxel to world of the RAS grid; the table stood anywhere, so the world origin is not the body's."""
    affine = np.diag([float(axis[1] - axis[0]) for axis in axes] + [1.0])
    affine[:3, 3] = [float(axis[0]) for axis in axes] + rng.uniform((-60, -60, -400), (60, 60, 400))
    return affine


def _orient(image: NDArray[np.int16], labels: NDArray[np.uint8], affine: NDArray[np.float64], axcodes: str) -> Phantom:
    """The RAS arrays stored along `axcodes`, with the affine that keeps every voxel where it is in the world."""
    from nibabel import orientations as orient

    turn = orient.ornt_transform(orient.axcodes2ornt("RAS"), orient.axcodes2ornt(axcodes))
    turned = affine @ orient.inv_ornt_aff(turn, image.shape)
    stored, classes = (np.ascontiguousarray(orient.apply_orientation(array, turn)) for array in (image, labels))
    return Phantom(stored, classes, turned)


def _save(path: Path, array: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64]) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_nifti(temporary, array, affine)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error}). Name a folder you may write to.") from error
