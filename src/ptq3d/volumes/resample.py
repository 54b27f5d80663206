"""Volumes on other grids: linear or nearest, one axis at a time where the axes of both grids are parallel.

Grids follow MONAI's `Orientationd` and `Spacingd` (diagonal False, align_corners False, padding border) to the letter.
Passes run in the memory order of the source, a few planes at a time: nothing but source and result is held.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import GeometryError, OptionError, ShapeError
from ptq3d.volumes.volume import Affine, Grid, Shape, Volume, voxel_map

Mode: TypeAlias = Literal["linear", "nearest"]
Index: TypeAlias = tuple[slice, slice, slice, slice]
Slab: TypeAlias = tuple[Index, NDArray[Any]]
"""Where a piece belongs in (C, X, Y, Z), and the piece."""

SAME_MM = 1e-3  # MONAI's AFFINE_TOL: spacings and affines this close count as equal
SAME_CORNER = 1e-8  # the tolerance of np.allclose that decides in MONAI which corner stays in place
SNAP_VOXELS = 1e-6  # coordinates are snapped so that rounding noise neither blurs a voxel nor breaks a tie
PARALLEL_VOXELS = 3e-5  # float32 headers tilt oblique axes by about this; it errs by < 1e-4 of the value range
SLAB_PLANES = 8  # enough that Python's loop costs nothing, few enough that the passes stay near the cache
RIGHT_ANGLES = 1e-3  # cosine; 0.06 degrees, less than any gantry is tilted on purpose
LARGEST_VOXELS = 2**31  # 8 GB of float32: nobody means that, the header's unit is wrong


def oriented_grid(grid: Grid, axcodes: str) -> Grid:
    """The grid after flipping and permuting axes; equal to MONAI's `Orientationd(axcodes)`.

    Args:
        grid: shape and affine before.
        axcodes: one of L/R, one of P/A and one of I/S in the wanted order, such as "RAS" or "LIA".

    Raises:
        OptionError: `axcodes` does not name each of the three directions once.
    """
    import nibabel

    shape, affine = grid
    change = _orientation_change(affine, axcodes)
    order = np.argsort(change[:, 0])
    x, y, z = (shape[axis] for axis in order)
    return (x, y, z), affine @ nibabel.orientations.inv_ornt_aff(change, shape)


def reorient(volume: Volume, axcodes: str) -> Volume:
    """Flip and permute axes; every voxel keeps its value and its place in the world.

    Args:
        volume: any dtype.
        axcodes: see `oriented_grid`.

    Returns:
        A view of the same voxels on `oriented_grid(volume.grid, axcodes)`.

    Raises:
        OptionError: see `oriented_grid`.

    Source: MONAI Orientationd; nibabel.orientations.
    """
    change = _orientation_change(volume.affine, axcodes)
    flips = tuple(slice(None, None, int(direction)) for direction in change[:, 1])
    data = volume.data[(slice(None), *flips)].transpose(0, *(1 + np.argsort(change[:, 0])))
    return Volume(data, oriented_grid(volume.grid, axcodes)[1])


def valid_axcodes(axcodes: str) -> str:
    """`axcodes` in capitals.

    Raises:
        OptionError: it does not name each of the three directions once.
    """
    pairs = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
    capitals = axcodes.upper()
    if sorted(pairs.get(letter, -1) for letter in capitals) != [0, 1, 2]:
        raise OptionError(
            f"an orientation is one of L/R, one of P/A and one of I/S in any order, like RAS or LIA; got {axcodes!r}."
        )
    return capitals


def permuted_grid(grid: Grid, axes: tuple[int, int, int]) -> Grid:
    """The grid whose axes are those of `grid` in another order; (2, 1, 0) reverses them."""
    shape, affine = grid
    columns = affine.copy()
    columns[:3, :3] = affine[:3, list(axes)]
    return (shape[axes[0]], shape[axes[1]], shape[axes[2]]), columns


def valid_axes(axes: tuple[int, int, int]) -> tuple[int, int, int]:
    """`axes` as a tuple.

    Raises:
        OptionError: not 0, 1 and 2 in any order.
    """
    if len(axes) != 3 or any(type(axis) is not int for axis in axes) or sorted(axes) != [0, 1, 2]:
        raise OptionError(f"'axes' holds 0, 1 and 2 in the order the network sees them, like [2, 1, 0]; got {axes}.")
    first, second, third = axes
    return first, second, third


def _orientation_change(affine: Affine, axcodes: str) -> NDArray[np.float64]:
    from nibabel import orientations

    wanted = orientations.axcodes2ornt(tuple(valid_axcodes(axcodes)))
    change: NDArray[np.float64] = orientations.ornt_transform(orientations.io_orientation(affine), wanted)
    return change


def spaced_grid(grid: Grid, spacing: tuple[float, float, float]) -> Grid:
    """The grid with other voxel sizes along the same axes; equal to MONAI's `Spacingd(spacing)`.

    Shear is removed from the axes. A spacing within 1e-3 mm of the present one is left as it is. The first voxel keeps
    its place; on a sheared grid, where no corner stays in front of all others, the two grids share their centre.

    Args:
        grid: shape and affine before.
        spacing: mm along X, Y, Z.

    Raises:
        OptionError: `spacing` is not three finite numbers above zero.
        GeometryError: the result would have more than 2^31 voxels.

    Source: MONAI 1.6 Spacing, zoom_affine, compute_shape_offset.
    """
    shape, affine = grid
    linear = affine[:3, :3]
    present = np.sqrt((linear * linear).sum(axis=0))
    sizes = valid_spacing(spacing)
    sizes = np.where(np.abs(present - sizes) <= SAME_MM, present, sizes)
    triangle = np.linalg.cholesky(linear.T @ linear).T
    wanted = np.eye(4)
    wanted[:3, :3] = linear @ np.linalg.inv(triangle) @ np.diag(sizes)
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*((0.0, size - 1.0) for size in shape))]).T
    reached = (voxel_map(wanted, affine) @ corners)[:3]
    counts = np.round(np.ptp(reached, axis=1) + 1.0)
    if not counts.prod() <= LARGEST_VOXELS:
        raise GeometryError(
            f"{shape} voxels of {present.round(6).tolist()} mm would become {counts.tolist()} voxels of {spacing} mm; "
            "mend the spacing in the file's header (is it in micrometres or metres?), or choose a coarser one."
        )
    x, y, z = (int(count) for count in counts)
    wanted[:3, 3] = _first_voxel(affine, wanted, corners=corners, reached=reached, shapes=(shape, (x, y, z)))
    steps = voxel_map(affine, wanted)
    if (x, y, z) == shape and (_same(affine, wanted) or _same(steps, np.eye(4))):
        return grid
    return (x, y, z), wanted


def straight_grid(grid: Grid) -> Grid:
    """The grid of a sheared volume (a tilted gantry) with axes at right angles, in voxels of the same size.

    Axes that stand within a thousandth of right angles, as headers round them, are left as they are.
    """
    axes = grid[1][:3, :3]
    sizes = np.linalg.norm(axes, axis=0)
    cosines = (axes / sizes).T @ (axes / sizes) - np.eye(3)
    if np.abs(cosines).max() <= RIGHT_ANGLES:
        return grid
    x, y, z = sizes.tolist()
    return spaced_grid(grid, (x, y, z))


def _first_voxel(
    affine: Affine, wanted: Affine, *, corners: NDArray[Any], reached: NDArray[Any], shapes: tuple[Shape, Shape]
) -> NDArray[np.float64]:
    """World coordinates of voxel (0, 0, 0) of the new grid."""
    for corner, place in zip(corners.T, reached.T, strict=True):
        if np.abs((reached - place[:, None]).min(axis=1)).max() <= SAME_CORNER:
            kept: NDArray[np.float64] = (affine @ corner)[:3]
            return kept
    before, after = (np.array(shape) / 2.0 for shape in shapes)
    centred: NDArray[np.float64] = affine[:3, :3] @ before + affine[:3, 3] - wanted[:3, :3] @ after
    return centred


def _same(first: Affine, second: Affine) -> bool:
    return np.allclose(first, second, atol=SAME_MM)


def valid_spacing(spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """(3,) float64 mm.

    Raises:
        OptionError: not three finite numbers above zero.
    """
    try:
        sizes = np.asarray(spacing, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptionError(f"a spacing is three numbers of mm above zero, got {spacing}.") from error
    if sizes.shape != (3,) or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise OptionError(f"a spacing is three numbers of mm above zero, got {spacing}.")
    return sizes


def respace(volume: Volume, spacing: tuple[float, float, float], *, mode: Mode) -> Volume:
    """Resample to other voxel sizes along the same axes.

    Args:
        volume: float32 for "linear", any dtype for "nearest".
        spacing: mm along X, Y, Z.
        mode: "linear" (images) or "nearest" (labels; a tie goes to the upper neighbour).

    Returns:
        On `spaced_grid(volume.grid, spacing)`; `volume` itself where that is its own grid.

    Raises:
        OptionError: see `spaced_grid`.
        ShapeError: "linear" on another dtype than float32.

    Source: MONAI Spacingd(mode="bilinear" | "nearest", padding_mode="border"): equal within rounding of float32 for
        "linear", equal but for ties for "nearest".
    """
    return resample_onto(volume, *spaced_grid(volume.grid, spacing), mode=mode)


def resample_onto(volume: Volume, shape: Shape, affine: Affine, *, mode: Mode) -> Volume:
    """Resample onto any grid; outside the volume its nearest voxel counts.

    Args:
        volume: float32 for "linear", any dtype for "nearest".
        shape: (X, Y, Z) of the result.
        affine: (4, 4) of the result, voxel -> RAS+ mm.
        mode: see `respace`.

    Returns:
        On the grid asked for, in C order; `volume` itself where that is its own grid.

    Raises:
        ShapeError: "linear" on another dtype than float32.
    """
    if volume.shape == tuple(shape) and np.array_equal(volume.affine, affine):
        return volume
    result = np.empty((volume.data.shape[0], *shape), volume.data.dtype)
    for index, piece in resample_slabs(volume, shape, affine, mode=mode):
        result[index] = piece
    return Volume(result, affine)


def resample_slabs(volume: Volume, shape: Shape, affine: Affine, *, mode: Mode) -> Iterator[Slab]:
    """The result of `resample_onto` in pieces, so that a caller can reduce many channels without holding them all.

    Args:
        volume: see `resample_onto`.
        shape: see `resample_onto`.
        affine: see `resample_onto`.
        mode: see `resample_onto`.

    Yields:
        Index into (C, X, Y, Z) of the result, and the (C, x, y, z) piece that belongs there; they cover it once.

    Raises:
        ShapeError: see `resample_onto`.
    """
    if mode == "linear" and volume.data.dtype != np.float32:
        raise ShapeError(f"linear resampling needs float32 voxels, got {volume.data.dtype}; use mode 'nearest'.")
    to_source = voxel_map(volume.affine, affine)
    axes = parallel_axes(to_source, shape, sizes=volume.shape, mode=mode)
    return _oblique_slabs(volume, shape, to_source, mode) if axes is None else _parallel_slabs(volume.data, axes)


@dataclass(frozen=True)
class Axis:
    """One axis of the result: the axis of the source it runs along, and the neighbours of each of its voxels.

    Args:
        source: 0..2.
        lower: (n,) index along the source axis.
        upper: (n,) the next index; `lower` itself at the border and where `weight` is None.
        weight: (n,) float32 of the upper neighbour; None where every voxel has a single neighbour.
        whole: every voxel is the source's voxel of the same index.
        inside: (n,) whether the voxel's centre lies in the source, half a voxel around its outer ones included.
    """

    source: int
    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    weight: NDArray[np.float32] | None
    whole: bool
    inside: NDArray[np.bool_]

    def sample(self, data: NDArray[Any], axis: int, part: slice = slice(None)) -> NDArray[Any]:
        """`data` along `axis` at the coordinates in `part` of this axis."""
        if self.whole:
            return data[(slice(None),) * axis + (part,)]
        lower, upper = self.lower[part], self.upper[part]
        first = int(lower.min())
        reach = data[(slice(None),) * axis + (slice(first, int(upper.max()) + 1),)]  # take copies a strided array whole
        result: NDArray[Any] = reach.take(lower - first, axis=axis)
        if self.weight is not None:
            rise: NDArray[Any] = reach.take(upper - first, axis=axis)
            rise -= result
            rise *= self.weight[part].reshape(-1, *(1,) * (data.ndim - 1 - axis))
            result += rise
        return result


def parallel_axes(to_source: Affine, shape: Shape, *, sizes: Shape, mode: Mode) -> list[Axis] | None:
    """The three axes of the result, or None where one of them runs along none of the source's (sheared grids).

    Args:
        to_source: (4, 4), voxel of the result -> voxel of the source.
        shape: (X, Y, Z) of the result.
        sizes: (X, Y, Z) of the source.
        mode: "linear" or "nearest".
    """
    linear, offset = to_source[:3, :3], to_source[:3, 3]
    sources = np.abs(linear).argmax(axis=0)
    if sorted(sources.tolist()) != [0, 1, 2]:
        return None
    tilt = linear.copy()
    tilt[sources, [0, 1, 2]] = 0.0
    middle = (np.array(shape) - 1) / 2
    if (np.abs(tilt) @ middle).max() > PARALLEL_VOXELS:
        return None
    offset = offset + tilt @ middle
    return [
        _axis(source, linear[source, axis] * np.arange(shape[axis]) + offset[source], sizes[source], mode)
        for axis, source in enumerate(sources.tolist())
    ]


def _axis(source: int, places: NDArray[np.float64], size: int, mode: Mode) -> Axis:
    inside = (places >= -0.5) & (places <= size - 0.5)
    places = snapped(places, size)
    lower = _nearest(places, size) if mode == "nearest" else np.floor(places).astype(np.intp)
    weight = (places - lower).astype(np.float32)
    exact = mode == "nearest" or not weight.any()
    return Axis(
        source=source,
        lower=lower,
        upper=lower if exact else np.minimum(lower + 1, size - 1),
        weight=None if exact else weight,
        whole=exact and np.array_equal(lower, np.arange(size)),
        inside=inside,
    )


def snapped(places: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Coordinates inside the volume, those within rounding noise of a whole number made whole."""
    whole = np.round(places)
    return np.clip(np.where(np.abs(places - whole) <= SNAP_VOXELS, whole, places), 0.0, size - 1.0)


def _nearest(places: NDArray[np.float64], size: int) -> NDArray[np.intp]:
    """The nearest voxel; of two at the same distance the upper one, so that every voxel gets an equal share."""
    return np.minimum(np.floor(places + 0.5 + SNAP_VOXELS).astype(np.intp), size - 1)


def _parallel_slabs(data: NDArray[Any], axes: list[Axis]) -> Iterator[Slab]:
    """One axis after the other, slowest axis of the source's memory first."""
    data = data.transpose(0, *(1 + axis.source for axis in axes))
    order = sorted(range(3), key=lambda axis: -abs(data.strides[1 + axis]))
    back = (0, *(1 + order.index(axis) for axis in range(3)))
    data = data.transpose(0, *(1 + axis for axis in order))
    slow, middle, fast = (axes[axis] for axis in order)
    for start in range(0, len(slow.lower), SLAB_PLANES):
        part = slice(start, min(start + SLAB_PLANES, len(slow.lower)))
        piece = fast.sample(middle.sample(slow.sample(data, 1, part), 2), 3)
        x, y, z = (part if axis == order[0] else slice(None) for axis in range(3))
        yield (slice(None), x, y, z), piece.transpose(back)


def _oblique_slabs(volume: Volume, shape: Shape, to_source: Affine, mode: Mode) -> Iterator[Slab]:
    """Plane by plane from the eight (or the one) nearest voxels of every voxel."""
    y, z = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    everything = slice(None)
    for x in range(shape[0]):
        voxels = np.stack([np.full(y.shape, x), y, z, np.ones(y.shape)])
        places = np.tensordot(to_source[:3], voxels, axes=1)
        inside = [snapped(place, size) for place, size in zip(places, volume.shape, strict=True)]
        piece = _gather_nearest(volume.data, inside) if mode == "nearest" else _gather_linear(volume.data, inside)
        yield (everything, slice(x, x + 1), everything, everything), piece[:, None]


def _gather_nearest(data: NDArray[Any], places: list[NDArray[np.float64]]) -> NDArray[Any]:
    x, y, z = (_nearest(place, size) for place, size in zip(places, data.shape[1:], strict=True))
    gathered: NDArray[Any] = data[:, x, y, z]
    return gathered


def _gather_linear(data: NDArray[Any], places: list[NDArray[np.float64]]) -> NDArray[np.float32]:
    result = np.zeros((data.shape[0], *places[0].shape), np.float64)
    lower = [np.floor(place).astype(np.intp) for place in places]
    for steps in itertools.product((0, 1), repeat=3):
        weight = np.ones(places[0].shape)
        for place, low, step in zip(places, lower, steps, strict=True):
            weight *= place - low if step else 1.0 - (place - low)
        x, y, z = (
            np.minimum(low + step, size - 1) for low, step, size in zip(lower, steps, data.shape[1:], strict=True)
        )
        result += weight * data[:, x, y, z]
    return result.astype(np.float32)
