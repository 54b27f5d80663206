"""How far apart the surfaces of two label maps lie, in mm.

A surface is what marching cubes would draw: points between voxels, each with the area it stands for. Measuring on those and not on
the centres of border voxels matters where voxels are not cubes: there each border voxel would count the same, though one that
looks along a long edge stands for less area than one that looks along a short edge. So HD95 here differs from MONAI's
`HausdorffDistanceMetric`, which counts border voxels, by up to about a voxel.

A class in neither map is not counted: both metrics are NaN. A class in only one of them has surface Dice 0, and its HD95 is
infinite: no distance is right, and a number in its place (challenges take the image's diagonal, or 374 mm) would make a mean depend on the
field of view. `ptq3d.evaluation.scores` says how summaries show it.

Source: Nikolov et al. 2021, doi:10.2196/26151 (surface Dice, areas); Podobnik and Vrtovec 2024, arXiv:2410.02630 (how much
implementations differ, and why). Surface points, areas and nearest distances are MONAI's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import GeometryError, OptionError, UnavailableError
from ptq3d.evaluation.metrics import require_labels
from ptq3d.volumes.volume import Affine

Lengths = tuple[float, float, float]
HD_SHARE = 0.95  # of the surface that lies within the distance
CHUNK = 1 << 22  # voxels whose surface is looked for at a time: MONAI takes about 100 bytes for each
LARGEST_COSINE = 0.01  # between axes: distances are then wrong by 1 % at most


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """From each point of one surface to the nearest of the other, and the area that each point stands for.

    Attributes:
        predicted_mm: (P,) float32, from the prediction's surface to the truth's; infinite where the truth has none.
        predicted_mm2: (P,) float64.
        true_mm: (T,) float32, from the truth's surface to the prediction's; infinite where the prediction has none.
        true_mm2: (T,) float64.
    """

    predicted_mm: NDArray[np.float32]
    predicted_mm2: NDArray[np.float64]
    true_mm: NDArray[np.float32]
    true_mm2: NDArray[np.float64]

    def surface_dice(self, tolerance_mm: float) -> float:
        """The share of both surfaces that lies within a tolerance of the other one.

        Args:
            tolerance_mm: 0 or more; a point at this distance counts as within.

        Returns:
            0..1; NaN where there is no surface, 0 where there is only one.
        """
        near = self.predicted_mm2[self.predicted_mm <= tolerance_mm].sum()
        near += self.true_mm2[self.true_mm <= tolerance_mm].sum()
        whole = self.predicted_mm2.sum() + self.true_mm2.sum()
        return float(near / whole) if whole else float("nan")

    def hd95(self) -> float:
        """The distance within which 95 % of the area of each surface lies from the other, the larger of the two, in mm.

        Returns:
            mm; NaN where there is no surface, infinite where there is only one.
        """
        if not self.predicted_mm.size and not self.true_mm.size:
            return float("nan")
        if not self.predicted_mm.size or not self.true_mm.size:
            return float("inf")
        return max(_reach(self.predicted_mm, self.predicted_mm2), _reach(self.true_mm, self.true_mm2))


def surface_dice_per_class(
    prediction: NDArray[Any], truth: NDArray[Any], classes: int, *, spacing: Lengths, tolerance_mm: float
) -> NDArray[np.float64]:
    """Surface Dice of each foreground class: the share of both surfaces within a tolerance of the other.

    Args:
        prediction: (X, Y, Z) unsigned integers 0..classes - 1.
        truth: likewise.
        classes: K, background included.
        spacing: of the voxels along X, Y, Z in mm.
        tolerance_mm: 0 or more.

    Returns:
        (K - 1,) float64 for classes 1..K - 1; NaN for a class in neither, 0 for a class in only one of them.
        Equal to MONAI's `compute_surface_dice` with `use_subvoxels=True`.

    Raises:
        ShapeError, LabelError: see `dice_per_class`.
        OptionError: a tolerance below 0.
        UnavailableError: MONAI is not installed.
    """
    require_surfaces(tolerance_mm)
    found = surface_distances(prediction, truth, classes, spacing=spacing)
    return np.array([distances.surface_dice(tolerance_mm) for distances in found])


def hd95_per_class(
    prediction: NDArray[Any], truth: NDArray[Any], classes: int, *, spacing: Lengths
) -> NDArray[np.float64]:
    """The 95 % Hausdorff distance of each foreground class, weighted by area; see `SurfaceDistances.hd95`.

    Args:
        prediction: (X, Y, Z) unsigned integers 0..classes - 1.
        truth: likewise.
        classes: K, background included.
        spacing: of the voxels along X, Y, Z in mm.

    Returns:
        (K - 1,) float64 in mm for classes 1..K - 1; NaN for a class in neither, infinite for a class in only one of them.

    Raises:
        ShapeError, LabelError: see `dice_per_class`.
        UnavailableError: MONAI is not installed.
    """
    return np.array([distances.hd95() for distances in surface_distances(prediction, truth, classes, spacing=spacing)])


def surface_distances(
    prediction: NDArray[Any], truth: NDArray[Any], classes: int, *, spacing: Lengths
) -> Iterator[SurfaceDistances]:
    """The distances of each foreground class in turn, 1..classes - 1, without points where a class has no voxels.

    Args:
        prediction: (X, Y, Z) unsigned integers 0..classes - 1.
        truth: likewise.
        classes: K, background included.
        spacing: of the voxels along X, Y, Z in mm.

    Raises:
        ShapeError, LabelError: see `dice_per_class`.
        UnavailableError: MONAI is not installed.
    """
    from scipy.ndimage import find_objects

    require_labels(prediction, truth, classes)
    boxes = (find_objects(labels, max_label=classes - 1) for labels in (prediction, truth))
    for index, both in enumerate(zip(*boxes, strict=True), 1):
        box = _joint(*both)
        yield _NOWHERE if box is None else _distances(prediction[box] == index, truth[box] == index, spacing)


def right_angled_spacing(affine: Affine, *, where: str) -> Lengths:
    """The spacing of a grid whose axes stand at right angles, oblique in the patient or not.

    Args:
        affine: (4, 4) voxel -> world in mm.
        where: the case or file, named in the error.

    Returns:
        mm along X, Y, Z.

    Raises:
        GeometryError: the axes are sheared (a tilted gantry, for example), so that distances cannot be taken along them.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if cosine > LARGEST_COSINE:
        raise GeometryError(
            f"{where}: the axes of the grid are sheared by {np.degrees(np.arcsin(min(cosine, 1.0))):.1f} degrees, so surfaces cannot "
            "be measured on it; resample the label maps onto axes at right angles, or leave surfaces out with --tolerance None."
        )
    x, y, z = spacing.tolist()
    return x, y, z


def require_surfaces(tolerance_mm: float) -> None:
    """Refuse a tolerance that no distance can be held against, and a machine that cannot measure any.

    Raises:
        OptionError: below 0, NaN or infinite.
        UnavailableError: MONAI is not installed.
    """
    if not 0 <= tolerance_mm < np.inf:
        raise OptionError(f"the tolerance of surfaces must be 0 mm or more, got {tolerance_mm}; give --tolerance 1.0.")
    _monai()


def _monai() -> Any:
    """MONAI's functions on surfaces."""
    try:
        from monai.metrics import utils
    except ImportError as error:
        raise UnavailableError(
            "surface Dice and HD95 need MONAI: pip install 'ptq3d[metrics]', or leave them out with --tolerance None."
        ) from error
    return utils


def _reach(distances: NDArray[np.float32], areas: NDArray[np.float64]) -> float:
    """The smallest distance within which at least 95 % of an area lies."""
    order = np.argsort(distances, kind="stable")
    within = np.cumsum(areas[order])
    return float(distances[order][np.searchsorted(within, HD_SHARE * within[-1])])


def _joint(first: tuple[slice, ...] | None, second: tuple[slice, ...] | None) -> tuple[slice, ...] | None:
    """The box around two boxes."""
    if first is None or second is None:
        return first or second
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))


def _distances(predicted: NDArray[np.bool_], true: NDArray[np.bool_], spacing: Lengths) -> SurfaceDistances:
    (points, areas), (others, other_areas) = _surfaces(predicted, true, spacing)
    return SurfaceDistances(_nearest(points, others, spacing), areas, _nearest(others, points, spacing), other_areas)


def _surfaces(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], spacing: Lengths
) -> list[tuple[NDArray[np.bool_], NDArray[np.float64]]]:
    """Of both masks: the corners of voxels (X + 1, Y + 1, Z + 1) that the surface passes, and their areas in mm2 in that order."""
    import torch

    # the rim closes surfaces at the border of the box
    masks = [np.pad(mask, 1) for mask in (predicted, true)]
    planes = max(CHUNK // masks[0][0].size, 1)
    parts = []
    for start in range(0, len(masks[0]) - 1, planes):
        slabs = [torch.from_numpy(mask[start : start + planes + 1]) for mask in masks]
        edges = [edge.numpy() for edge in _monai().get_mask_edges(*slabs, crop=False, spacing=spacing)]
        parts.append([(own, area[own].astype(np.float64)) for own, area in zip(edges[:2], edges[2:], strict=True)])
    sides = ([part[side] for part in parts] for side in (0, 1))
    return [(np.concatenate([own for own, _ in side]), np.concatenate([area for _, area in side])) for side in sides]


def _nearest(points: NDArray[np.bool_], others: NDArray[np.bool_], spacing: Lengths) -> NDArray[np.float32]:
    """(P,) mm from each point to the nearest of the others; infinite where there are none."""
    if not points.any() or not others.any():
        return np.full(np.count_nonzero(points), np.inf, np.float32)
    return np.asarray(_monai().get_surface_distance(points, others, spacing=spacing), np.float32)


_NOWHERE = SurfaceDistances(np.zeros(0, np.float32), np.zeros(0), np.zeros(0, np.float32), np.zeros(0))
