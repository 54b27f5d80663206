"""Nothing is ever mirrored or moved: for any grid and any kind of file, what lies at a place in the patient stays there.

Checked in millimetres, by SimpleITK, which shares no code with us.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grids import affines, orientations, shapes, spacings, world
from ptq3d.volumes.files import FORMATS, load_grid, load_image, load_labels, save_labels
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.volume import Volume

WRITABLE = [suffix for suffix, kind in FORMATS.items() if kind.write is not None]
READ_BY_ITK = [suffix for suffix in WRITABLE if suffix not in (".mgz", ".mgh")]  # SimpleITK 2.5 reads no MGH
MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
SHAPES = shapes(6, 16)


def saved(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    write = FORMATS[path.name[path.name.index(".") :]].write
    assert write is not None
    write(path, voxels, affine)
    return path


def reach(affine: np.ndarray) -> float:
    """Half the diagonal of a voxel in mm."""
    return float(np.linalg.norm(np.abs(affine[:3, :3]).sum(axis=1))) / 2


def two_sides(places: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels 1 and 2 on either side of a plane through the middle, and the distance from it in mm."""
    flat = places.reshape(3, -1)
    distance = (normal / np.linalg.norm(normal)) @ (flat - flat.mean(axis=1, keepdims=True))
    distance = distance.reshape(places.shape[1:])
    return np.where(distance > 0, 2, 1).astype(np.uint8), distance


@pytest.mark.parametrize("suffix", WRITABLE)
@MANY
@given(
    shape=SHAPES,
    affine=affines(),
    axcodes=orientations() | st.none(),
    spacing=spacings() | st.none(),
    resampling=st.sampled_from(["linear", "nnunet"]),
    normal=st.tuples(*[st.floats(0.2, 1)] * 3, st.sampled_from([-1, 1])),
)
def test_labels_come_back_to_where_they_were(
    tmp_path: Path, suffix: str, shape: tuple[int, int, int], affine: np.ndarray,
    axcodes: str | None, spacing: tuple[float, float, float] | None, resampling: str, normal: tuple[float, ...],
) -> None:  # fmt: skip
    """file -> preprocessing -> restore -> file is the identity on labels away from their boundary."""
    direction = np.array(normal[:3]) * (1, normal[3], 1)
    labels, distance = two_sides(world(shape, affine), direction)
    save_labels(tmp_path / f"a{suffix}", Volume(labels[None], affine))
    preprocessing = Preprocessing(axcodes, spacing, resampling=resampling)  # type: ignore[arg-type]
    loaded = load_labels(tmp_path / f"a{suffix}")
    seen = preprocessing.apply_labels(loaded)
    save_labels(tmp_path / f"b{suffix}", preprocessing.restore_labels(seen.data[0], loaded.grid))
    back = load_labels(tmp_path / f"b{suffix}")
    np.testing.assert_allclose(back.affine, loaded.affine, atol=1e-4)
    np.testing.assert_allclose(back.affine, affine, atol=1e-3)
    clear = np.abs(distance) > reach(affine) + reach(seen.affine)
    np.testing.assert_array_equal(back.data[0][clear], labels[clear])


@pytest.mark.parametrize("suffix", WRITABLE)
@MANY
@given(
    shape=SHAPES,
    affine=affines(),
    axcodes=orientations() | st.none(),
    spacing=spacings() | st.none(),
    direction=st.tuples(*[st.floats(-1, 1)] * 3),
)
def test_every_voxel_the_network_sees_lies_where_it_was(
    tmp_path: Path, suffix: str, shape: tuple[int, int, int], affine: np.ndarray,
    axcodes: str | None, spacing: tuple[float, float, float] | None, direction: tuple[float, float, float],
) -> None:  # fmt: skip
    """An image whose value is a coordinate in mm still says the coordinate of each voxel after file and preprocessing."""
    image = np.tensordot(direction, world(shape, affine), 1).astype(np.float32)
    seen = Preprocessing(axcodes, spacing).apply(load_image(saved(tmp_path / f"a{suffix}", image, affine)))
    places = world(seen.shape, seen.affine)
    inside = np.linalg.solve(affine[:3, :3], places.reshape(3, -1) - affine[:3, 3:]).reshape(places.shape)
    within = ((inside >= -1e-3) & (inside <= np.array(shape)[:, None, None, None] - 1 + 1e-3)).all(axis=0)
    assert within.any()
    np.testing.assert_allclose(seen.data[0][within], np.tensordot(direction, places, 1)[within], atol=5e-3)


@pytest.mark.parametrize("suffix", READ_BY_ITK)
@MANY
@given(
    shape=SHAPES,
    affine=affines(),
    axcodes=orientations(),
    spacing=spacings(),
    place=st.tuples(*[st.floats(0.25, 0.75)] * 3),
)
def test_a_marked_place_is_found_where_it_is(
    tmp_path: Path, suffix: str, shape: tuple[int, int, int], affine: np.ndarray,
    axcodes: str, spacing: tuple[float, float, float], place: tuple[float, float, float],
) -> None:  # fmt: skip
    """What a network marks around a place in mm lies around it in the written file, as SimpleITK reads it."""
    landmark = affine[:3, :3] @ (np.array(place) * (np.array(shape) - 1)) + affine[:3, 3]
    loaded = load_image(saved(tmp_path / f"image{suffix}", np.zeros(shape, np.float32), affine))
    preprocessing = Preprocessing(axcodes, spacing)
    seen_shape, seen_affine = preprocessing.grid(loaded.grid)
    distance = np.linalg.norm(world(seen_shape, seen_affine) - landmark[:, None, None, None], axis=0)
    radius = 2 * reach(affine) + reach(
        seen_affine
    )  # enough that the nearest voxel of the file takes its label from within
    save_labels(
        tmp_path / f"b{suffix}", preprocessing.restore_labels((distance <= radius).astype(np.uint8), loaded.grid)
    )
    itk = sitk.ReadImage(str(tmp_path / f"b{suffix}"))
    marked = np.argwhere(sitk.GetArrayFromImage(itk).T)
    assert len(marked)
    places = np.array([itk.TransformContinuousIndexToPhysicalPoint(voxel.astype(float).tolist()) for voxel in marked])
    error = np.linalg.norm(places * (-1, -1, 1) - landmark, axis=1)
    # half a voxel seen, and half a voxel of the file, by which MONAI's grid may end before the file's where it is oblique
    assert error.max() <= radius + reach(seen_affine) + reach(affine)


@pytest.mark.parametrize("suffix", READ_BY_ITK)
@MANY
@given(shape=shapes(2, 7), affine=affines())
def test_every_voxel_lies_where_simpleitk_says(
    tmp_path: Path, suffix: str, shape: tuple[int, int, int], affine: np.ndarray
) -> None:
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = saved(tmp_path / f"a{suffix}", voxels, affine)
    loaded, itk = load_image(path), sitk.ReadImage(str(path))
    np.testing.assert_array_equal(loaded.data[0], sitk.GetArrayFromImage(itk).T)
    for voxel in (np.zeros(3), np.array(shape) - 1.0, np.array(shape) / 3):
        theirs = np.array(itk.TransformContinuousIndexToPhysicalPoint(voxel.tolist())) * (-1, -1, 1)
        np.testing.assert_allclose(loaded.affine[:3, :3] @ voxel + loaded.affine[:3, 3], theirs, atol=2e-3)
    np.testing.assert_allclose(loaded.spacing, itk.GetSpacing(), rtol=1e-5)
    assert load_grid(path)[0] == loaded.shape
    np.testing.assert_array_equal(load_grid(path)[1], loaded.affine)


@MANY
@given(
    shape=SHAPES,
    affine=affines(sheared=True),
    axcodes=orientations() | st.none(),
    spacing=spacings() | st.none(),
    resampling=st.sampled_from(["linear", "nnunet"]),
)
def test_a_network_never_sees_a_sheared_patient(
    shape: tuple[int, int, int], affine: np.ndarray,
    axcodes: str | None, spacing: tuple[float, float, float] | None, resampling: str,
) -> None:  # fmt: skip
    """A tilted gantry: straightened by any preprocessing, and every voxel still says its coordinate in mm."""
    preprocessing = Preprocessing(axcodes, spacing, resampling=resampling)  # type: ignore[arg-type]
    direction = (0.3, -0.8, 0.5)
    image = np.tensordot(direction, world(shape, affine), 1).astype(np.float32)
    seen = preprocessing.apply(Volume(image[None], affine))
    axes = seen.affine[:3, :3] / np.linalg.norm(seen.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1.1e-3)
    assert preprocessing.grid((shape, affine))[0] == seen.shape
    if resampling == "linear":  # a spline bends where the volume ends
        places = world(seen.shape, seen.affine)
        inside = np.linalg.solve(affine[:3, :3], places.reshape(3, -1) - affine[:3, 3:]).reshape(places.shape)
        within = ((inside >= 0) & (inside <= np.array(shape)[:, None, None, None] - 1)).all(axis=0)
        np.testing.assert_allclose(seen.data[0][within], np.tensordot(direction, places, 1)[within], atol=5e-3)
