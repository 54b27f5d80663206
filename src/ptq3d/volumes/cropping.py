"""Boxes of a volume: found, cut out, and surrounded with background on the way back."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.volumes.volume import Volume

Box: TypeAlias = tuple[slice, slice, slice]


def box_of(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest box that holds every True voxel, None where there is none.

    Args:
        mask: (X, Y, Z).
    """
    ends = []
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(found):
            return None
        ends.append(slice(int(found[0]), int(found[-1]) + 1))
    return ends[0], ends[1], ends[2]


def crop(volume: Volume, box: Box | None) -> Volume:
    """The voxels of a box where they lie in the world, a view; all of them for None."""
    if box is None:
        return volume
    return Volume(volume.data[(slice(None), *box)], _shifted(volume, [part.start for part in box]))


def crop_to_nonzero(volume: Volume) -> Volume:
    """The box of all voxels that are not 0 in some channel; the volume itself where all of them are 0.

    Source: nnU-Net crop_to_nonzero: holes, which it fills, do not change the box.
    """
    return crop(volume, box_of((volume.data != 0).any(axis=0)))


def surround(volume: Volume) -> Volume:
    """The volume in a shell of 0, one voxel thick, so that whatever looks for its nearest voxel outside finds 0."""
    data: NDArray[Any] = np.pad(volume.data, [(0, 0), (1, 1), (1, 1), (1, 1)])
    return Volume(data, _shifted(volume, [-1, -1, -1]))


def _shifted(volume: Volume, first: list[int]) -> NDArray[np.float64]:
    """The affine of a grid whose first voxel is this one of `volume`."""
    shift = np.eye(4)
    shift[:3, 3] = first
    shifted: NDArray[np.float64] = volume.affine @ shift
    return shifted
