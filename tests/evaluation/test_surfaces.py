"""Surface metrics are MONAI's and those of plain geometry; empty classes are what the docstring says."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from ptq3d.errors import GeometryError, LabelError, OptionError, ShapeError, UnavailableError
from ptq3d.evaluation.surfaces import (
    HD_SHARE,
    hd95_per_class,
    right_angled_spacing,
    surface_dice_per_class,
    surface_distances,
)

SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.8, 1.0, 2.5, 5.0])] * 3)
SEEDS = st.integers(0, 2**32 - 1)


def blobs(seed: int, shape: tuple[int, int, int] = (14, 12, 13), classes: int = 4) -> np.ndarray:
    """Smooth regions of every class, cut off by the border too."""
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    return np.argmax([gaussian_filter(one, 1.5) for one in noise], 0).astype(np.uint8)


def hot(labels: np.ndarray, index: int) -> torch.Tensor:
    """One class, away from the border: MONAI leaves surfaces open there where it is not asked to crop."""
    return torch.from_numpy(np.pad(labels == index, 2))[None, None]


def monai_surface_dice(maps: tuple[np.ndarray, np.ndarray], index: int, spacing: tuple, tolerance: float) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        return compute_surface_dice(
            *(hot(labels, index) for labels in maps), class_thresholds=[tolerance], include_background=True,
            spacing=spacing, use_subvoxels=True,
        ).item()  # fmt: skip


def corners(mask: np.ndarray, spacing: tuple) -> np.ndarray:
    """(P, 3) mm: corners of voxels where inside and outside meet, found one by one."""
    padded = np.pad(mask, 1)
    found = [
        corner
        for corner in np.ndindex(*(size - 1 for size in padded.shape))
        if 0 < padded[tuple(slice(at, at + 2) for at in corner)].sum() < 8
    ]
    return np.array(found) * spacing


@settings(max_examples=25, deadline=None)
@given(SEEDS, SEEDS, SPACINGS, st.sampled_from([0.0, 0.8, 1.0, 2.0]))
def test_surface_dice_is_monais(first: int, second: int, spacing: tuple, tolerance: float) -> None:
    maps = blobs(first), blobs(second)
    ours = surface_dice_per_class(*maps, 4, spacing=spacing, tolerance_mm=tolerance)
    theirs = [monai_surface_dice(maps, index, spacing, tolerance) for index in (1, 2, 3)]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SEEDS, SPACINGS)
def test_distances_are_those_of_all_pairs_of_points(first: int, second: int, spacing: tuple) -> None:
    maps = blobs(first, (8, 7, 9)), blobs(second, (8, 7, 9))
    for index, found in enumerate(surface_distances(*maps, 4, spacing=spacing), 1):
        pairs = cdist(*(corners(labels == index, spacing) for labels in maps))
        np.testing.assert_allclose(found.predicted_mm, pairs.min(1), rtol=1e-5)
        np.testing.assert_allclose(found.true_mm, pairs.min(0), rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(SEEDS, SEEDS, SPACINGS)
def test_95_percent_of_the_area_lies_within_hd95(first: int, second: int, spacing: tuple) -> None:
    for found in surface_distances(blobs(first), blobs(second), 4, spacing=spacing):
        sides = ((found.predicted_mm, found.predicted_mm2), (found.true_mm, found.true_mm2))
        within = [areas[distances <= found.hd95()].sum() / areas.sum() for distances, areas in sides]
        closer = [areas[distances < found.hd95()].sum() / areas.sum() for distances, areas in sides]
        assert min(within) >= HD_SHARE - 1e-9
        assert min(closer) < HD_SHARE + 1e-9


@settings(max_examples=25, deadline=None)
@given(SEEDS, SEEDS, SPACINGS)
def test_hd95_lies_near_monais_and_below_simpleitks_maximum(first: int, second: int, spacing: tuple) -> None:
    maps = blobs(first, (20, 22, 18)), blobs(second, (20, 22, 18))
    ours = hd95_per_class(*maps, 4, spacing=spacing)
    voxel = float(np.linalg.norm(spacing))
    for index, value in enumerate(ours, 1):
        measure = sitk.HausdorffDistanceImageFilter()
        images = [sitk.GetImageFromArray((labels == index).astype(np.uint8)) for labels in maps]
        for image in images:
            image.SetSpacing(spacing[::-1])
        measure.Execute(*images)
        assert value <= measure.GetHausdorffDistance() + voxel
    cubes = hd95_per_class(*maps, 4, spacing=(1, 1, 1))
    for index, value in enumerate(cubes, 1):
        pair = [hot(labels, index) for labels in maps]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
            theirs = compute_hausdorff_distance(*pair, include_background=True, percentile=95).item()
        assert value == pytest.approx(theirs, abs=np.sqrt(3))


@settings(max_examples=20, deadline=None)
@given(SPACINGS, st.integers(0, 2), st.integers(1, 4))
def test_a_moved_plate_is_as_far_as_it_moved(spacing: tuple, axis: int, steps: int) -> None:
    """Its faces move by the whole way, its rim slides along itself."""
    truth = np.zeros((40, 40, 40), np.uint8)
    plate: list[slice] = [slice(None)] * 3
    plate[axis] = slice(10, 20)
    truth[tuple(plate)] = 1
    cube = (spacing[axis],) * 3
    moved = np.roll(truth, steps, axis)
    assert hd95_per_class(moved, truth, 2, spacing=cube) == pytest.approx([steps * spacing[axis]])
    assert hd95_per_class(truth, truth, 2, spacing=cube) == [0]
    near = surface_dice_per_class(moved, truth, 2, spacing=cube, tolerance_mm=steps * spacing[axis])
    assert near == pytest.approx([1])
    face, rim = 40 * 40, 4 * 40 * 10
    far = surface_dice_per_class(moved, truth, 2, spacing=cube, tolerance_mm=0.99 * spacing[axis])
    assert far == pytest.approx([rim * (1 - steps / 10) / (2 * face + rim)], abs=0.05)


def test_area_counts_and_not_the_number_of_border_voxels() -> None:
    """A column of long voxels: its sides are most of its area, its ends most of its border voxels."""
    truth = np.zeros((50, 50, 12), np.uint8)
    truth[5:45, 5:45, 2:10] = 1
    longer = truth.copy()
    longer[5:45, 5:45, 10] = 1
    area = 2 * 40 * 40 + 4 * 40 * 90
    found = next(surface_distances(longer, truth, 2, spacing=(1.0, 1.0, 10.0)))
    moved = found.predicted_mm2[found.predicted_mm > 5].sum() / found.predicted_mm2.sum()
    assert found.predicted_mm2.sum() == pytest.approx(area, rel=0.03)
    assert moved == pytest.approx((40 * 40 + 4 * 40 * 5) / area, abs=0.03)
    end, border = 40 * 40, 2 * 40 * 40 + 7 * 156
    assert moved < 0.4 * end / border  # what counting border voxels would call moved


def test_empty_classes_are_what_the_docstring_says() -> None:
    truth, prediction = np.zeros((2, 6, 6, 6), np.uint8)
    truth[2:4, 2:4, 2:4] = 1
    prediction[2:4, 2:4, 2:4] = 2
    dice = surface_dice_per_class(prediction, truth, 4, spacing=(1, 2, 3), tolerance_mm=100.0)
    np.testing.assert_array_equal(dice, [0, 0, np.nan])
    np.testing.assert_array_equal(hd95_per_class(prediction, truth, 4, spacing=(1, 2, 3)), [np.inf, np.inf, np.nan])


@settings(max_examples=20, deadline=None)
@given(SEEDS, SEEDS, SPACINGS, st.permutations(range(3)))
def test_order_of_axes_maps_and_dtype_do_not_matter(first: int, second: int, spacing: tuple, axes: list[int]) -> None:
    maps = blobs(first), blobs(second)
    turned = [np.asfortranarray(np.transpose(labels, axes)[::-1].astype(np.int64)) for labels in maps]
    other = tuple(spacing[axis] for axis in axes)
    np.testing.assert_allclose(
        hd95_per_class(*maps, 4, spacing=spacing), hd95_per_class(*turned[::-1], 4, spacing=other), rtol=1e-5
    )
    np.testing.assert_allclose(
        surface_dice_per_class(*maps, 4, spacing=spacing, tolerance_mm=1.0),
        surface_dice_per_class(*turned[::-1], 4, spacing=other, tolerance_mm=1.0),
        atol=1e-5,
    )


def test_surfaces_do_not_depend_on_the_pieces_in_which_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = blobs(0), blobs(1)
    whole = list(surface_distances(*maps, 4, spacing=(1, 2, 3)))
    for chunk in (1, 500, 900):
        monkeypatch.setattr("ptq3d.evaluation.surfaces.CHUNK", chunk)
        for one, other in zip(whole, surface_distances(*maps, 4, spacing=(1, 2, 3)), strict=True):
            for name in ("predicted_mm", "predicted_mm2", "true_mm", "true_mm2"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_every_integer_does(dtype: type) -> None:
    maps = blobs(0), blobs(1)
    expected = hd95_per_class(*maps, 4, spacing=(1, 1, 1))
    np.testing.assert_array_equal(
        hd95_per_class(maps[0].astype(dtype), maps[1].astype(dtype), 4, spacing=(1, 1, 1)), expected
    )


def test_maps_tolerances_and_grids_that_cannot_be_measured_are_refused() -> None:
    ones = np.ones((3, 3, 3), np.uint8)
    with pytest.raises(ShapeError):
        hd95_per_class(ones, ones[:2], 2, spacing=(1, 1, 1))
    with pytest.raises(LabelError):
        hd95_per_class(ones, ones * 2, 2, spacing=(1, 1, 1))
    for tolerance in (-1.0, np.nan, np.inf):
        with pytest.raises(OptionError, match="tolerance"):
            surface_dice_per_class(ones, ones, 2, spacing=(1, 1, 1), tolerance_mm=tolerance)


@settings(deadline=None)
@given(st.tuples(*[st.floats(-3, 3)] * 3), SPACINGS, st.sampled_from([1, -1]))
def test_oblique_and_mirrored_grids_keep_their_spacing(angles: tuple, spacing: tuple, hand: int) -> None:
    turned = np.eye(4)
    rotation = np.reshape(sitk.Euler3DTransform((0, 0, 0), *angles).GetMatrix(), (3, 3))
    turned[:3, :3] = rotation @ np.diag(spacing) * hand
    assert right_angled_spacing(turned, where="a") == pytest.approx(spacing)


def test_sheared_grids_are_refused() -> None:
    sheared = np.diag([1.0, 1.0, 5.0, 1.0])
    sheared[1, 2] = 5 * np.tan(np.radians(10))
    with pytest.raises(GeometryError, match=r"case 7: .* sheared by 10\.0 degrees.*--tolerance None"):
        right_angled_spacing(sheared, where="case 7")
    sheared[1, 2] = 5 * 1e-4  # rounding of a header
    assert right_angled_spacing(sheared, where="case 7") == pytest.approx((1, 1, 5))


def test_without_monai_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    with pytest.raises(UnavailableError, match=r"pip install 'ptq3d\[metrics\]'"):
        hd95_per_class(blobs(0), blobs(1), 4, spacing=(1, 1, 1))


def test_all_classes_of_a_real_brain_that_moved_by_a_voxel(shared: Path) -> None:
    path = sorted((shared / "data/whole_brain/test/labels").glob("*.nii.gz"))[0]
    truth = np.asarray(nib.load(path).dataobj).astype(np.uint8)
    values = np.unique(truth)
    moved = np.zeros_like(truth)
    moved[1:] = truth[:-1]
    spacing = right_angled_spacing(nib.load(path).affine, where=path.name)
    found = list(surface_distances(moved, truth, int(values[-1]) + 1, spacing=spacing))
    hd95 = np.array([found[value - 1].hd95() for value in values[1:]])
    assert len(hd95) > 130
    assert (hd95 <= spacing[0] * 1.001).all()
    assert (hd95[np.bincount(truth.ravel())[values[1:]] > 1000] > 0).all()  # a thin line along X lies on itself
    within = np.array([found[value - 1].surface_dice(1.001 * spacing[0]) for value in values[1:]])
    np.testing.assert_array_equal(within, 1)
    assert np.isnan([found[value - 1].hd95() for value in set(range(1, values[-1])) - set(values.tolist())]).all()
