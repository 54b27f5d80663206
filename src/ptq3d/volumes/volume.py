"""The volume: voxels and the affine that places them in the patient."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import GeometryError, ShapeError
from ptq3d.volumes.source import Source

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Shape: TypeAlias = tuple[int, int, int]
Affine: TypeAlias = NDArray[np.float64]
Grid: TypeAlias = tuple[Shape, Affine]
"""Shape (X, Y, Z) and affine (4, 4): where the voxels of a volume lie."""

SMALLEST_SPACING_MM = 1e-6
FARTHEST_MM = 1e9  # beyond it a header is broken, and products of its numbers overflow
SMALLEST_SINE = 1e-6  # of the angle between axes: below it they span no volume
SAME_GRID_VOXELS = 0.1  # headers round spacings to a few digits; half a voxel would already move labels


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels with channels, and where they lie.

    Attributes:
        data: (C, X, Y, Z); images float32 in the file's unit (CT: HU), labels an unsigned integer. Any memory order.
        affine: (4, 4) float64, voxel indices -> RAS+ world in mm.

    Raises:
        ShapeError: `data` is not 4D, has an empty axis, or is neither float32 nor an unsigned integer.
        GeometryError: `affine` is not an invertible (4, 4) affine with spacings above zero.
    """

    data: NDArray[Any]
    affine: Affine

    def __post_init__(self) -> None:
        require_array(self.data)
        object.__setattr__(self, "affine", valid_affine(self.affine))

    @property
    def shape(self) -> Shape:
        """(X, Y, Z) in voxels."""
        x, y, z = self.data.shape[1:]
        return x, y, z

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along X, Y, Z in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def orientation(self) -> str:
        """The direction each axis points to, such as "RAS" or "LPS"; for an oblique grid the closest one."""
        return axcodes_of(self.affine)

    @property
    def grid(self) -> Grid:
        """Shape and affine, without the voxels."""
        return self.shape, self.affine


def axcodes_of(affine: Affine) -> str:
    """The direction each axis points to, such as "RAS" or "LPS"; for an oblique grid the closest one."""
    import nibabel

    return "".join(nibabel.orientations.aff2axcodes(affine))


def require_array(data: NDArray[Any]) -> None:
    """Refuse an array that cannot be the voxels of a `Volume`.

    Raises:
        ShapeError: not (C, X, Y, Z), an axis of length 0, or of another dtype than float32 or an unsigned integer.
    """
    if data.ndim != 4 or 0 in data.shape:
        raise ShapeError(
            f"a volume needs an array (channels, X, Y, Z) without empty axes, got shape {data.shape}; "
            "add a channel axis with data[None] where it is missing."
        )
    if data.dtype != np.float32 and data.dtype.kind != "u":
        raise ShapeError(
            f"a volume holds float32 (images) or unsigned integers (labels), got {data.dtype}; convert it with astype."
        )


def valid_affine(affine: ArrayLike) -> Affine:
    """A float64 copy of an affine that can place voxels.

    Args:
        affine: (4, 4), voxel -> world in mm.

    Raises:
        GeometryError: of another shape, not finite or beyond 1e9 mm, last row not 0 0 0 1, a spacing of zero, or axes in one plane.
    """
    matrix = np.array(affine, dtype=np.float64)
    if (
        matrix.shape != (4, 4)
        or not (np.abs(matrix) < FARTHEST_MM).all()
        or not np.array_equal(matrix[3], (0, 0, 0, 1))
    ):
        raise GeometryError(
            f"the affine must be 4x4, finite, with last row 0 0 0 1, got {matrix.tolist()}; mend the file's header."
        )
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    if (spacing < SMALLEST_SPACING_MM).any():
        raise GeometryError(
            f"the spacing must be above zero along X, Y and Z, got {spacing.tolist()} mm; mend the file's header."
        )
    if abs(np.linalg.det(matrix[:3, :3] / spacing)) < SMALLEST_SINE:
        raise GeometryError(
            f"the affine is singular: its axes lie in one plane, {matrix[:3, :3].tolist()}; mend the file's header."
        )
    return matrix


def voxel_map(source: Affine, target: Affine) -> Affine:
    """(4, 4) float64: the voxel coordinates in `source` of a voxel of `target`, source^-1 @ target."""
    return np.linalg.solve(source, target).astype(np.float64)


def grid_distance(first: Affine, second: Affine, shape: Shape) -> float:
    """The largest distance, in voxels of `first`, between the places that two affines give to the corners of a grid.

    Args:
        first: (4, 4) float64.
        second: (4, 4) float64.
        shape: (X, Y, Z) of the grid.
    """
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in shape))]).T
    moved = voxel_map(first, second) @ corners
    return float(np.abs(moved - corners).max())


def require_same_grid(image: Grid, label: Grid, *, image_path: Source, label_path: Source) -> None:
    """Refuse an image and labels whose voxels do not lie in the same places.

    Args:
        image: of the image as loaded.
        label: of its labels as loaded.
        image_path: named in the error.
        label_path: named in the error.

    Raises:
        GeometryError: the shapes differ, or a corner lies more than a tenth of a voxel from its twin.
    """
    if image[0] != label[0]:
        raise GeometryError(
            f"{label_path} has {label[0]} voxels but its image {image_path} has {image[0]}; "
            "resample the labels onto the image, or pair the right files."
        )
    distance = grid_distance(image[1], label[1], image[0])
    if distance > SAME_GRID_VOXELS:
        raise GeometryError(
            f"{label_path} lies up to {distance:.3g} voxels beside its image {image_path} (their affines differ); "
            "resample the labels onto the image, or pair the right files."
        )
