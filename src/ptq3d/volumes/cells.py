"""nnU-Net's resampling: the same box in other voxels, by cubic splines, along a much coarser axis by the nearest plane.

A spline along one axis is linear in the voxels, so it is a matrix, and three matrix products resample a volume.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import GeometryError
from ptq3d.volumes.resample import LARGEST_VOXELS, valid_spacing
from ptq3d.volumes.volume import Grid, Shape, Volume

ANISOTROPIC = 3.0  # an axis more than this many times as coarse as the finest is resampled plane by plane
ROUNDING = 1e-5  # of spacings taken off an oblique affine: 3 mm beside 1 mm must stay 3 times as coarse


def celled_grid(grid: Grid, spacing: tuple[float, float, float]) -> Grid:
    """The box of a grid in voxels of about `spacing`: round(size / spacing) of them, whose outer edges are the old ones.

    Args:
        grid: shape and affine before.
        spacing: mm along X, Y, Z; what is left of the last voxel is shared by all.

    Raises:
        OptionError: `spacing` is not three finite numbers above zero.
        GeometryError: the result would have no voxel along an axis, or more than 2^31.

    Source: nnU-Net compute_new_shape.
    """
    shape, affine = grid
    present, wanted = np.linalg.norm(affine[:3, :3], axis=0), valid_spacing(spacing)
    counts = [round(old / new * size) for old, new, size in zip(present.tolist(), wanted.tolist(), shape, strict=True)]
    if min(counts) < 1 or math.prod(counts) > LARGEST_VOXELS:
        raise GeometryError(
            f"{shape} voxels of {present.round(6).tolist()} mm would become {counts} voxels of {spacing} mm; "
            "mend the spacing in the file's header (is it in micrometres or metres?), or give a larger volume."
        )
    steps = np.array(shape) / np.array(counts)
    change = np.diag([*steps, 1.0])
    change[:3, 3] = (steps - 1) / 2
    x, y, z = counts
    return (x, y, z), affine @ change


def resample_cells(volume: Volume, spacing: tuple[float, float, float]) -> Volume:
    """Resample to other voxel sizes as nnU-Net does.

    Cubic splines along all axes, the result kept within the values of the volume. Where the present or else the wanted
    spacing is anisotropic, the planes across its coarse axis are resampled one by one, each kept within its own values,
    and the nearest plane is taken.

    Args:
        volume: float32.
        spacing: mm along X, Y, Z.

    Returns:
        On `celled_grid(volume.grid, spacing)`; `volume` itself where that has as many voxels.

    Raises:
        OptionError, GeometryError: see `celled_grid`.

    Source: nnU-Net resample_data_or_seg_to_shape(order=3, order_z=0, force_separate_z=None), equal within 1e-5 of the
        value range; its splines are those of scipy.ndimage.zoom(mode="nearest", grid_mode=True).
    """
    shape, affine = celled_grid(volume.grid, spacing)
    if shape == volume.shape:
        return volume
    coarse = coarse_axis(volume.spacing, spacing)
    data = _by_splines(volume.data, shape, [axis for axis in range(3) if axis != coarse])
    if coarse is not None:
        data = data.take(_nearest_planes(volume.shape[coarse], shape[coarse]), axis=1 + coarse)
    return Volume(data, affine)


def coarse_axis(present: tuple[float, float, float], wanted: tuple[float, float, float]) -> int | None:
    """The axis across which planes are resampled one by one, None where all axes are treated alike.

    Args:
        present: spacing in mm, which decides if it is anisotropic.
        wanted: spacing in mm, which decides otherwise.

    Source: nnU-Net determine_do_sep_z_and_axis: two equally coarse axes are no reason.
    """
    for spacing in (present, wanted):
        most = max(spacing)
        if most > ANISOTROPIC * min(spacing) * (1 + ROUNDING):
            coarsest = [axis for axis, size in enumerate(spacing) if size >= most * (1 - ROUNDING)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def _by_splines(data: NDArray[Any], shape: Shape, axes: list[int]) -> NDArray[np.float32]:
    """Along `axes` of (C, X, Y, Z), shrinking ones first; within the extremes of what is resampled together.

    One large product an axis: many small ones, plane by plane, starve on a busy machine.
    """
    together = tuple(1 + axis for axis in axes)
    low, high = data.min(axis=together, keepdims=True), data.max(axis=together, keepdims=True)
    changed = [axis for axis in axes if shape[axis] != data.shape[1 + axis]]
    for axis in sorted(changed, key=lambda axis: shape[axis] / data.shape[1 + axis]):
        weights = _spline_weights(data.shape[1 + axis], shape[axis])
        data = np.moveaxis(np.tensordot(weights, data, (1, 1 + axis)), 0, 1 + axis)
    return np.clip(data, low, high, out=data) if changed else data


def _spline_weights(size: int, wanted: int) -> NDArray[np.float32]:
    """(wanted, size): what each of `size` voxels adds to each of `wanted` ones over the same length."""
    from scipy.ndimage import zoom

    weights: NDArray[np.float64] = zoom(np.eye(size), (wanted / size, 1.0), order=3, mode="nearest", grid_mode=True)
    return weights.astype(np.float32)


def _nearest_planes(size: int, wanted: int) -> NDArray[np.intp]:
    """(wanted,) index of the plane nearest to the middle of each new one; of two the upper."""
    places = size / wanted * (np.arange(wanted) + 0.5) - 0.5
    return np.asarray(np.clip(np.floor(places + 0.5), 0, size - 1), np.intp)
