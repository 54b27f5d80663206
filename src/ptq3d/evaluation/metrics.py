"""How well two label maps agree."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import LabelError, ShapeError
from ptq3d.volumes.volume import Affine

MIN_VOXELS = 1000  # a class of a few voxels says nothing of fidelity
CHUNK = 1 << 22  # counting widens labels to 8 bytes; in pieces that stays small
MM3_IN_ML = 1000.0


def dice_per_class(prediction: NDArray[Any], truth: NDArray[Any], classes: int) -> NDArray[np.float64]:
    """Dice of each foreground class.

    dice_k = 2 |P_k and T_k| / (|P_k| + |T_k|)

    Args:
        prediction: any shape, unsigned integers 0..classes - 1.
        truth: likewise, the same shape.
        classes: K, background included.

    Returns:
        (K - 1,) float64 for classes 1..K - 1; NaN for a class in neither, 0 for a class in only one of them.

    Raises:
        ShapeError: the shapes differ, or the dtypes are not integers.
        LabelError: values outside 0..classes - 1.
    """
    both, predicted, true = _counts(prediction, truth, classes)
    total = (predicted + true)[1:]
    dice = np.full(classes - 1, np.nan)
    present = total > 0
    dice[present] = 2.0 * both[1:][present] / total[present]
    return dice


def mean_dice(dice: NDArray[np.float64]) -> float:
    """Mean of `dice_per_class` over the classes that are in at least one of the two maps; NaN where none is.

    Args:
        dice: (K - 1,) float64 with NaN for absent classes.
    """
    present = dice[~np.isnan(dice)]
    return float(present.mean()) if present.size else float("nan")


def fidelity(labels: NDArray[Any], reference: NDArray[Any], classes: int, *, min_voxels: int = MIN_VOXELS) -> float:
    """How closely INT8 labels follow the labels of the same network in FP32; 1 - fidelity is the disagreement.

    Mean Dice over the foreground classes that fill at least `min_voxels` voxels of `reference`.

    Args:
        labels: any shape, integers 0..classes - 1.
        reference: the FP32 labels, the same shape.
        classes: K, background included.
        min_voxels: smaller classes do not count.

    Returns:
        0..1, NaN where no class is large enough.

    Raises:
        ShapeError: see `dice_per_class`.
        LabelError: see `dice_per_class`.
    """
    kept = fidelity_per_class(labels, reference, classes, min_voxels=min_voxels)
    return mean_dice(kept)


def fidelity_per_class(
    labels: NDArray[Any], reference: NDArray[Any], classes: int, *, min_voxels: int = MIN_VOXELS
) -> NDArray[np.float64]:
    """Dice of each foreground class against the FP32 labels; see `fidelity`.

    Returns:
        (K - 1,) float64 for classes 1..K - 1; NaN for a class of fewer than `min_voxels` voxels in `reference`.

    Raises:
        ShapeError: see `dice_per_class`.
        LabelError: see `dice_per_class`.
    """
    both, found, expected = _counts(labels, reference, classes)
    kept = np.full(classes - 1, np.nan)
    large = np.flatnonzero(expected[1:] >= min_voxels)
    kept[large] = 2.0 * both[1:][large] / (found + expected)[1:][large]
    return kept


def volumes_ml(labels: NDArray[Any], classes: int, *, affine: Affine) -> NDArray[np.float64]:
    """Volume of each foreground class.

    Args:
        labels: any shape, integers 0..classes - 1.
        classes: K, background included.
        affine: (4, 4) voxel -> world in mm; oblique and sheared grids are right too.

    Returns:
        (K - 1,) float64 in ml for classes 1..K - 1.

    Raises:
        ShapeError: see `dice_per_class`.
        LabelError: see `dice_per_class`.
    """
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / MM3_IN_ML
    return np.asarray(_counts(labels, labels, classes)[1, 1:] * voxel_ml, np.float64)


def require_labels(first: NDArray[Any], second: NDArray[Any], classes: int) -> None:
    """Refuse two arrays that are no label maps of one grid.

    Args:
        first: label map.
        second: label map.
        classes: K, background included.

    Raises:
        ShapeError: the shapes differ, or the dtypes are not integers.
        LabelError: values outside 0..classes - 1.
    """
    if first.shape != second.shape or first.dtype.kind not in "ui" or second.dtype.kind not in "ui":
        raise ShapeError(
            f"label maps to compare must be integers of one shape, got {first.shape} {first.dtype} "
            f"and {second.shape} {second.dtype}."
        )
    _require_classes(first, classes)
    _require_classes(second, classes)


def _counts(first: NDArray[Any], second: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """(3, K) int64: voxels of each class in both maps, in the first, in the second."""
    require_labels(first, second, classes)
    ones, others = np.ravel(first), np.ravel(second)
    counts = np.zeros((3, classes), np.int64)
    for start in range(0, ones.size, CHUNK):
        one, other = ones[start : start + CHUNK], others[start : start + CHUNK]
        for row, values in zip(counts, (one[one == other], one, other), strict=True):
            row += np.bincount(values.astype(np.intp), minlength=classes)
    return counts


def _require_classes(labels: NDArray[Any], classes: int) -> None:
    low, high = labels.min(initial=0), labels.max(initial=0)
    if low < 0 or high >= classes:
        raise LabelError(f"labels {low}..{high} lie outside the {classes} classes 0..{classes - 1}; check --label-map.")
