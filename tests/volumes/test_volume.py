"""Volumes hold what can be placed, and refuse the rest."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings

from grids import affines, noise, shapes
from ptq3d.errors import GeometryError, ShapeError
from ptq3d.volumes.volume import Volume, grid_distance, require_same_grid

IMAGE, LABEL = Path("img0001.nii.gz"), Path("label0001.nii.gz")


@settings(deadline=None)
@given(shapes(), affines())
def test_grid_properties_are_nibabels(shape: tuple[int, int, int], affine: np.ndarray) -> None:
    volume = Volume(noise((2, *shape)), affine)
    assert volume.shape == shape
    np.testing.assert_allclose(volume.spacing, nibabel.affines.voxel_sizes(affine), rtol=1e-12)
    assert volume.orientation == "".join(nibabel.orientations.aff2axcodes(affine))
    np.testing.assert_array_equal(volume.grid[1], affine)


def test_the_affine_is_a_float64_copy() -> None:
    affine = np.eye(4, dtype=np.float32)
    volume = Volume(noise((1, 2, 2, 2)), affine)
    affine[0, 0] = 7
    assert volume.affine.dtype == np.float64
    assert volume.affine[0, 0] == 1


def changed(row: int, column: int, value: float) -> np.ndarray:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[row, column] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (changed(1, 1, 0.0), "spacing must be above zero"),
        (changed(0, 3, np.nan), "finite"),
        (changed(2, 2, np.inf), "finite"),
        (changed(3, 3, 2.0), "last row"),
        (np.eye(3), "4x4"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
    ],
)
def test_an_affine_that_places_nothing_is_refused(affine: np.ndarray, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        Volume(noise((1, 2, 2, 2)), affine)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((2, 2, 2), np.float32),
        np.zeros((1, 1, 2, 2, 2), np.float32),
        np.zeros((1, 2, 0, 2), np.float32),
        np.zeros((1, 2, 2, 2), np.float64),
        np.zeros((1, 2, 2, 2), np.int16),
    ],
)
def test_an_array_that_is_no_volume_is_refused(data: np.ndarray) -> None:
    with pytest.raises(ShapeError):
        Volume(data, np.eye(4))


@settings(deadline=None)
@given(shapes(2), affines())
def test_a_grid_moved_by_some_voxels_is_that_far(shape: tuple[int, int, int], affine: np.ndarray) -> None:
    moved = affine.copy()
    moved[:3, 3] += affine[:3, 1] * 2.5
    assert grid_distance(affine, moved, shape) == pytest.approx(2.5, abs=1e-6)


def test_image_and_labels_must_share_their_grid() -> None:
    image = Volume(noise((1, 10, 10, 10)), np.diag([1.0, 1.0, 2.0, 1.0]))
    rounded = Volume(np.zeros((1, 10, 10, 10), np.uint8), np.diag([1.001, 1.0, 2.0, 1.0]))
    require_same_grid(image.grid, rounded.grid, image_path=IMAGE, label_path=LABEL)
    other = Volume(np.zeros((1, 10, 10, 10), np.uint8), np.diag([1.1, 1.0, 2.0, 1.0]))
    with pytest.raises(GeometryError, match=r"label0001\.nii\.gz lies up to 0\.9 voxels beside its image img0001"):
        require_same_grid(image.grid, other.grid, image_path=IMAGE, label_path=LABEL)
    cropped = Volume(np.zeros((1, 10, 9, 10), np.uint8), image.affine)
    with pytest.raises(GeometryError, match=r"\(10, 9, 10\) voxels but its image"):
        require_same_grid(image.grid, cropped.grid, image_path=IMAGE, label_path=LABEL)
