"""Dice is MONAI's and SimpleITK's; absent classes do not count."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric
from monai.networks import one_hot

from ptq3d.errors import LabelError, ShapeError
from ptq3d.evaluation.metrics import dice_per_class, fidelity, mean_dice, volumes_ml

CLASSES = 5
MAPS = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, CLASSES, (2, 6, 7, 8)).astype(np.uint8)
)


@settings(max_examples=40, deadline=None)
@given(MAPS)
def test_dice_is_monais_and_simpleitks(maps: np.ndarray) -> None:
    maps[0][maps[0] == 3] = 0  # one class in the truth alone
    maps[maps == 4] = 1  # one class in neither
    ours = dice_per_class(maps[0], maps[1], CLASSES)
    hot = [one_hot(torch.from_numpy(labels.astype(np.int64))[None, None], CLASSES) for labels in maps]
    theirs = DiceMetric(include_background=False, ignore_empty=True, reduction="none")(*hot)[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert ours[2] == 0
    assert np.isnan(ours[3])
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(sitk.GetImageFromArray(maps[0]), sitk.GetImageFromArray(maps[1]))
    for index in (1, 2):
        assert ours[index - 1] == pytest.approx(overlap.GetDiceCoefficient(index))


@settings(deadline=None)
@given(MAPS)
def test_dice_is_symmetric_and_one_on_itself(maps: np.ndarray) -> None:
    np.testing.assert_array_equal(dice_per_class(maps[0], maps[1], CLASSES), dice_per_class(maps[1], maps[0], CLASSES))
    np.testing.assert_array_equal(dice_per_class(maps[0], maps[0], CLASSES), np.ones(CLASSES - 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.uint64])
def test_dtype_memory_order_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    maps = np.random.default_rng(0).integers(0, CLASSES, (2, 6, 7, 8))
    expected = dice_per_class(maps[0], maps[1], CLASSES)
    monkeypatch.setattr("ptq3d.evaluation.metrics.CHUNK", 11)
    other = dice_per_class(np.asfortranarray(maps[0].astype(dtype)), maps[1].astype(np.uint8), CLASSES)
    np.testing.assert_array_equal(other, expected)


def test_the_mean_leaves_absent_classes_out() -> None:
    assert mean_dice(np.array([0.5, np.nan, 1.0, 0.0])) == 0.5
    assert np.isnan(mean_dice(np.array([np.nan, np.nan])))
    assert np.isnan(mean_dice(np.array([])))


def test_fidelity_counts_classes_that_are_large_in_the_reference() -> None:
    reference = np.zeros((30, 30, 30), np.uint8)
    reference[:10, :10, :10] = 1  # 1000 voxels
    reference[20:29, :10, :10] = 2  # 900
    labels = reference.copy()
    labels[:1, :10, :10] = 0
    labels[20:29] = 3
    assert fidelity(labels, reference, 4) == pytest.approx(2 * 900 / 1900)
    assert fidelity(labels, reference, 4, min_voxels=900) == pytest.approx(900 / 1900)
    assert np.isnan(fidelity(labels, reference, 4, min_voxels=1001))
    assert fidelity(reference, reference, 4) == 1


def test_fidelity_of_all_present_classes_is_mean_dice() -> None:
    maps = np.random.default_rng(0).integers(0, CLASSES, (2, 9, 9, 9)).astype(np.uint8)
    assert fidelity(maps[0], maps[1], CLASSES, min_voxels=1) == pytest.approx(mean_dice(dice_per_class(*maps, CLASSES)))


@settings(max_examples=20, deadline=None)
@given(MAPS, st.tuples(*[st.floats(0.3, 6)] * 3), st.floats(-1, 1))
def test_volumes_are_simpleitks_also_where_axes_are_sheared(
    maps: np.ndarray, spacing: tuple[float, float, float], shear: float
) -> None:
    affine = np.diag([*spacing, 1])
    affine[0, 1] = shear  # moves layers along themselves, and so changes no volume
    image = sitk.GetImageFromArray(np.transpose(maps[0]))
    image.SetSpacing(spacing)
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(image)
    expected = [shapes.GetPhysicalSize(index) / 1000 if shapes.HasLabel(index) else 0 for index in range(1, CLASSES)]
    assert volumes_ml(maps[0], CLASSES, affine=affine) == pytest.approx(expected)


def test_maps_that_cannot_be_compared_are_refused() -> None:
    ones = np.ones((2, 2, 2), np.uint8)
    with pytest.raises(ShapeError):
        dice_per_class(ones, ones[:1], 2)
    with pytest.raises(ShapeError):
        dice_per_class(ones, ones.astype(np.float32), 2)
    with pytest.raises(LabelError, match=r"outside the 2 classes 0\.\.1"):
        dice_per_class(ones, ones * 2, 2)
    with pytest.raises(LabelError):
        fidelity(-ones.astype(np.int64), ones, 2)
