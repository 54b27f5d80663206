"""Grids and values on them are MONAI's, nibabel's and scipy's."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from nibabel.processing import resample_from_to

from grids import affines, noise, orientations, shapes, spacings, world
from ptq3d.errors import GeometryError, OptionError, ShapeError
from ptq3d.volumes.resample import oriented_grid, reorient, resample_onto, resample_slabs, respace, spaced_grid
from ptq3d.volumes.volume import Volume

MONAI_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def meta(volume: Volume) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(volume.data)), affine=torch.from_numpy(volume.affine))


def respaced_by_monai(volume: Volume, spacing: tuple[float, float, float], mode: str) -> MetaTensor:
    return Spacing(spacing, mode=mode)(meta(volume))


def tie(volume: Volume, grid: tuple[tuple[int, int, int], np.ndarray]) -> np.ndarray:
    """(X, Y, Z): voxels whose place is halfway between two voxels of the source, where rounding noise decides."""
    places = np.linalg.solve(
        volume.affine[:3, :3], (world(*grid) - volume.affine[:3, 3, None, None, None]).reshape(3, -1)
    )
    return (np.abs(places - np.floor(places) - 0.5) < 1e-4).any(axis=0).reshape(grid[0])


@settings(deadline=None)
@given(shapes(), affines(), orientations())
def test_reorient_is_monais(shape: tuple[int, int, int], affine: np.ndarray, axcodes: str) -> None:
    volume = Volume(noise((2, *shape)), affine)
    ours, theirs = reorient(volume, axcodes), Orientation(axcodes, labels=MONAI_LABELS)(meta(volume))
    np.testing.assert_array_equal(ours.data, theirs.numpy())
    np.testing.assert_allclose(ours.affine, theirs.affine.numpy(), atol=1e-9)
    assert ours.orientation == axcodes
    back = reorient(ours, volume.orientation)
    np.testing.assert_array_equal(back.data, volume.data)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(shapes(), affines(), spacings())
def test_linear_respace_is_monais(
    shape: tuple[int, int, int], affine: np.ndarray, spacing: tuple[float, float, float]
) -> None:
    volume = Volume(noise((2, *shape)), affine)
    ours, theirs = respace(volume, spacing, mode="linear"), respaced_by_monai(volume, spacing, "bilinear")
    assert ours.shape == tuple(theirs.shape[1:])
    np.testing.assert_allclose(ours.affine, theirs.affine.numpy(), atol=1e-9)
    np.testing.assert_allclose(ours.data, theirs.numpy(), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(shapes(2), affines(sheared=True), spacings())
def test_linear_respace_of_sheared_grids_is_monais(
    shape: tuple[int, int, int], affine: np.ndarray, spacing: tuple[float, float, float]
) -> None:
    data = (
        np.random.default_rng(0).uniform(size=(1, *shape)).astype(np.float32)
    )  # 0..1: nearly parallel axes err by range
    volume = Volume(data, affine)
    ours, theirs = respace(volume, spacing, mode="linear"), respaced_by_monai(volume, spacing, "bilinear")
    assert ours.shape == tuple(theirs.shape[1:])
    np.testing.assert_allclose(ours.affine, theirs.affine.numpy(), atol=1e-9)
    np.testing.assert_allclose(ours.data, theirs.numpy(), atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(shapes(), affines(), spacings())
def test_nearest_respace_is_monais_but_for_ties(
    shape: tuple[int, int, int], affine: np.ndarray, spacing: tuple[float, float, float]
) -> None:
    labels = np.random.default_rng(0).integers(0, 14, (1, *shape)).astype(np.uint8)
    volume = Volume(labels, affine)
    ours = respace(volume, spacing, mode="nearest")
    theirs = respaced_by_monai(Volume(labels.astype(np.float32), affine), spacing, "nearest").numpy()
    assert ours.data.dtype == np.uint8
    clear = ~tie(volume, ours.grid)
    np.testing.assert_array_equal(ours.data[0][clear], theirs[0][clear])


def test_nearest_gives_every_voxel_an_equal_share() -> None:
    volume = Volume(np.arange(6, dtype=np.uint8).reshape(1, 6, 1, 1), np.diag([3.0, 1.0, 1.0, 1.0]))
    finer = respace(volume, (1.5, 1.0, 1.0), mode="nearest")
    assert finer.data.ravel().tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@settings(max_examples=60, deadline=None)
@given(shapes(2), affines(), st.tuples(*[st.sampled_from([0.5, 0.25, 1.0, 1.5])] * 3))
def test_ties_do_not_depend_on_how_the_patient_lies(
    shape: tuple[int, int, int], affine: np.ndarray, factors: tuple[float, float, float]
) -> None:
    labels = np.arange(np.prod(shape), dtype=np.uint16).reshape(1, *shape)
    straight = Volume(labels, np.eye(4))
    lying = affine.copy()
    lying[:3, :3] /= np.linalg.norm(affine[:3, :3], axis=0)
    finer = np.diag([*factors, 1.0])
    target = tuple(int((size - 1) / factor) + 1 for size, factor in zip(shape, factors, strict=True))
    expected = resample_onto(straight, target, finer, mode="nearest").data
    np.testing.assert_array_equal(
        resample_onto(Volume(labels, lying), target, lying @ finer, mode="nearest").data, expected
    )


def test_axes_that_are_nearly_parallel_err_by_their_tilt() -> None:
    """A ramp along X read on axes that lean by 2 * 2.5e-5 voxels over the grid: the error is half of that at both ends."""
    shape = (40, 41, 42)
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None], shape)[None]
    lean = np.eye(4)
    lean[0, 1] = 2.5e-5 / 20
    lean[0, 3] = 0.25
    moved = resample_onto(Volume(ramp.copy(), np.eye(4)), (39, 41, 42), lean, mode="linear")
    exact = world((39, 41, 42), lean)[0]
    assert np.abs(moved.data[0] - exact).max() < 3e-5


@settings(max_examples=60, deadline=None)
@given(shapes(2), affines(), shapes(), affines())
def test_any_grid_onto_any_other_is_nibabels(
    shape: tuple[int, int, int], affine: np.ndarray, target: tuple[int, int, int], goal: np.ndarray
) -> None:
    goal[:3, 3] = affine[:3, 3]  # so that they meet
    volume = Volume(noise((1, *shape)), affine)
    ours = resample_onto(volume, target, goal, mode="linear")
    theirs = resample_from_to(nibabel.Nifti1Image(volume.data[0], affine), (target, goal), order=1, mode="nearest")
    np.testing.assert_allclose(ours.data[0], theirs.get_fdata(), atol=2e-4)
    np.testing.assert_array_equal(ours.affine, goal)
    nearest = resample_onto(volume, target, goal, mode="nearest")
    clear = ~tie(volume, (target, goal))
    theirs = resample_from_to(nibabel.Nifti1Image(volume.data[0], affine), (target, goal), order=0, mode="nearest")
    np.testing.assert_array_equal(nearest.data[0][clear], theirs.get_fdata()[clear].astype(np.float32))


@settings(max_examples=50, deadline=None)
@given(shapes(2, 20), affines(), orientations(), spacings())
def test_one_resampling_is_reorient_then_respace(
    shape: tuple[int, int, int], affine: np.ndarray, axcodes: str, spacing: tuple[float, float, float]
) -> None:
    volume = Volume(noise((3, *shape)), affine)
    steps = respace(reorient(volume, axcodes), spacing, mode="linear")
    grid = spaced_grid(oriented_grid(volume.grid, axcodes), spacing)
    at_once = resample_onto(volume, *grid, mode="linear")
    np.testing.assert_allclose(at_once.data, steps.data, atol=1e-4)


@settings(deadline=None)
@given(shapes(1, 12), affines(), orientations())
def test_flips_and_permutations_keep_every_bit(shape: tuple[int, int, int], affine: np.ndarray, axcodes: str) -> None:
    volume = Volume(noise((1, *shape)), affine)
    expected = reorient(volume, axcodes)
    for mode in ("linear", "nearest"):
        np.testing.assert_array_equal(resample_onto(volume, *expected.grid, mode=mode).data, expected.data)


@settings(deadline=None)
@given(shapes(2, 12), affines(), shapes(0, 1))
def test_memory_order_does_not_matter(
    shape: tuple[int, int, int], affine: np.ndarray, flips: tuple[int, int, int]
) -> None:
    data = noise((2, *shape))
    strided = np.asfortranarray(data)[:, ::1, ::1, ::1]
    step = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    mirrored = np.ascontiguousarray(data[:, *step])[:, *step]
    results = [
        respace(Volume(source, affine), (1.3, 2.1, 0.9), mode="linear").data for source in (data, strided, mirrored)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)
    np.testing.assert_allclose(results[0], results[2], atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(shapes(2, 20), affines(), shapes(2, 20), affines())
def test_slabs_cover_the_result_once(
    shape: tuple[int, int, int], affine: np.ndarray, target: tuple[int, int, int], goal: np.ndarray
) -> None:
    volume = Volume(noise((2, *shape)), affine)
    seen = np.zeros((2, *target), int)
    for index, piece in resample_slabs(volume, target, goal, mode="linear"):
        assert piece.shape == seen[index].shape
        seen[index] += 1
    assert (seen == 1).all()


def test_its_own_grid_gives_the_volume_itself() -> None:
    volume = Volume(noise((1, 4, 5, 6)), np.diag([1.5, 1.5, 2.0, 1.0]))
    assert respace(volume, (1.5, 1.5, 2.0005), mode="linear") is volume


@pytest.mark.parametrize("axcodes", ["RAX", "RRS", "RA", "RASL", ""])
def test_an_orientation_names_each_direction_once(axcodes: str) -> None:
    with pytest.raises(OptionError, match="orientation"):
        reorient(Volume(noise((1, 2, 2, 2)), np.eye(4)), axcodes)


@pytest.mark.parametrize("spacing", [(0.0, 1, 1), (-1, 1, 1), (1, 1), (np.nan, 1, 1), ("a", "b", "c"), 1.0])
def test_a_spacing_is_three_numbers_above_zero(spacing: object) -> None:
    with pytest.raises(OptionError, match="spacing"):
        respace(Volume(noise((1, 2, 2, 2)), np.eye(4)), spacing, mode="linear")


def test_a_header_in_micrometres_is_refused_before_memory_is_taken() -> None:
    volume = Volume(noise((1, 20, 20, 20)), np.diag([800.0, 800.0, 3000.0, 1.0]))
    with pytest.raises(GeometryError, match="micrometres"):
        respace(volume, (1.5, 1.5, 2.0), mode="linear")


def test_labels_are_never_interpolated() -> None:
    with pytest.raises(ShapeError, match="float32"):
        respace(Volume(np.zeros((1, 4, 4, 4), np.uint8), np.eye(4)), (2.0, 2.0, 2.0), mode="linear")
