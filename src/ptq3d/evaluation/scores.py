"""What label maps are worth against the truth: a row for each case and class, and what the cases say together.

A class in neither map is not counted (NaN in every metric). A class in only one of them, missed or made up, has Dice 0, surface Dice 0
and an infinite HD95. So over cases Dice and surface Dice are means, but HD95 is a median, in which an infinite case counts as the
farthest, and their number is given beside it (`one_sided`): no mean of the rest hides them, and no penalty in mm has to be invented.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import OptionError
from ptq3d.evaluation.metrics import dice_per_class, volumes_ml
from ptq3d.evaluation.statistics import Interval, MedianInterval, median_bootstrap, paired_bootstrap
from ptq3d.evaluation.surfaces import require_surfaces, right_angled_spacing, surface_distances
from ptq3d.volumes.volume import Volume

COLUMNS = ("source", "case", "class", "dice", "surface_dice", "hd95_mm", "volume_ml", "true_volume_ml")
ALL = "all classes"


@dataclass(frozen=True)
class Score:
    """One class of one case.

    Attributes:
        case: name.
        label: name of the class.
        dice: 0..1; NaN where the class is in neither map.
        surface_dice: likewise, within the tolerance; NaN where surfaces were not measured, too.
        hd95_mm: mm, infinite where the class is in only one map; NaN likewise.
        volume_ml: of the prediction.
        true_volume_ml: of the truth.
    """

    case: str
    label: str
    dice: float
    surface_dice: float
    hd95_mm: float
    volume_ml: float
    true_volume_ml: float


@dataclass(frozen=True)
class Summary:
    """One class over cases, or all classes (each case counts once, by its mean; its HD95 is the median of its classes).

    Attributes:
        label: name of the class, or `ALL`.
        cases: in which the class is in at least one of the maps.
        one_sided: cases in which it is in only one of them; of all classes, the number of such pairs of case and class.
        dice: mean over cases; None where nothing can be said, as in the next two.
        surface_dice: mean over cases.
        hd95_mm: median over cases, in which `one_sided` cases are infinite.
        volume_ml: mean of the prediction over `cases`; of all classes, of their sums.
        true_volume_ml: of the truth.
    """

    label: str
    cases: int
    one_sided: int
    dice: Interval | None
    surface_dice: Interval | None
    hd95_mm: MedianInterval | None
    volume_ml: float
    true_volume_ml: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is not finite is None."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found


def score_case(
    case: str, prediction: NDArray[Any], truth: Volume, *, names: Sequence[str], tolerance_mm: float | None
) -> tuple[Score, ...]:
    """The scores of each foreground class.

    Args:
        case: name.
        prediction: (X, Y, Z) integers 0..len(names) - 1.
        truth: (1, X, Y, Z) likewise, with the affine of both.
        names: of all classes, background first.
        tolerance_mm: of surface Dice, 0 or more; None leaves surface Dice and HD95 out.

    Returns:
        len(names) - 1 scores.

    Raises:
        ShapeError, LabelError: see `dice_per_class`.
        GeometryError: surfaces are asked for on a sheared grid.
        OptionError: a tolerance below 0.
        UnavailableError: surfaces are asked for without MONAI.
    """
    true, classes = truth.data[0], len(names)
    dice = dice_per_class(prediction, true, classes)
    surfaces = _surfaces(case, prediction, truth, classes=classes, tolerance_mm=tolerance_mm)
    volumes = (volumes_ml(labels, classes, affine=truth.affine) for labels in (prediction, true))
    table = np.stack([dice, *surfaces, *volumes], 1).tolist()
    return tuple(Score(case, name, *row) for name, row in zip(names[1:], table, strict=True))


def summarize(scores: Iterable[Score]) -> tuple[Summary, ...]:
    """One summary a class in the order in which they come.

    Args:
        scores: of all cases; a class may be missing where it is in neither map.

    Returns:
        Intervals hold with 95 %, by drawing cases with replacement; of fewer than about ten cases they are too narrow (see
        `non_inferiority`). A class in no case at all has 0 cases and no intervals.
    """
    return tuple(_summary(label, rows, _one_sided(rows)) for label, rows in _grouped(scores, "label").items())


def summarize_all(scores: Iterable[Score]) -> Summary:
    """One summary of all classes; see `summarize`.

    Args:
        scores: of all cases; a class may be missing where it is in neither map.
    """
    by_case = _grouped(scores, "case")
    one_sided = sum(_one_sided(rows) for rows in by_case.values())
    return _summary(ALL, [_whole(case, rows) for case, rows in by_case.items()], one_sided)


def case_means(scores: Iterable[Score]) -> dict[str, float]:
    """Mean Dice of each case over the classes in at least one of the maps; NaN where there is none.

    Args:
        scores: of all cases.
    """
    return {case: _mean([row.dice for row in rows]) for case, rows in _grouped(scores, "case").items()}


def paired_means(
    reference: Iterable[Score], candidate: Iterable[Score]
) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64]]:
    """Mean Dice of the same cases twice, to be held against each other.

    A case in which neither finds anything where nothing is says nothing and is left out. Where only one of them finds nothing, that
    one is right and counts as 1: else a false alarm would leave its case out.

    Args:
        reference: scores of all cases.
        candidate: likewise.

    Returns:
        Names of the cases (none where no case has any class), (cases,) of the reference, (cases,) of the candidate.

    Raises:
        OptionError: they are of different cases.
    """
    first, second = case_means(reference), case_means(candidate)
    if set(first) != set(second):
        raise OptionError(
            f"only one of the two has the cases {sorted(set(first) ^ set(second))}; compare label maps of the same cases."
        )
    kept = tuple(case for case in first if not (np.isnan(first[case]) and np.isnan(second[case])))
    values = np.array([[one[case] for case in kept] for one in (first, second)], np.float64)
    values[np.isnan(values)] = 1.0
    return kept, values[0], values[1]


def csv_text(scores: Mapping[str, Iterable[Score]]) -> str:
    """A table with one row for each source, case and class; a cell is empty where its value is NaN, and "inf" where it is infinite.

    Args:
        scores: of each source (an engine, a folder of label maps).

    Returns:
        Comma-separated values with a header; lengths in mm, volumes in ml.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for source, rows in scores.items():
        for row in rows:
            values = (row.dice, row.surface_dice, row.hd95_mm, row.volume_ml, row.true_volume_ml)
            writer.writerow([source, row.case, row.label, *("" if np.isnan(value) else value for value in values)])
    return text.getvalue()


def jsonable(value: Any) -> Any:
    """The same table with None for what is not finite, which JSON does not know.

    Args:
        value: a number, or a dict of numbers, texts and dicts.
    """
    if isinstance(value, dict):
        return {key: jsonable(one) for key, one in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _surfaces(
    case: str, prediction: NDArray[Any], truth: Volume, *, classes: int, tolerance_mm: float | None
) -> tuple[list[float], list[float]]:
    """Surface Dice and HD95 of each foreground class; NaN without a tolerance."""
    if tolerance_mm is None:
        return [np.nan] * (classes - 1), [np.nan] * (classes - 1)
    require_surfaces(tolerance_mm)
    spacing = right_angled_spacing(truth.affine, where=case)
    dice, hd95 = [], []
    for distances in surface_distances(prediction, truth.data[0], classes, spacing=spacing):
        dice.append(distances.surface_dice(tolerance_mm))
        hd95.append(distances.hd95())
    return dice, hd95


def _grouped(scores: Iterable[Score], by: Literal["case", "label"]) -> dict[str, list[Score]]:
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(getattr(score, by), []).append(score)
    return groups


def _whole(case: str, rows: Sequence[Score]) -> Score:
    """All classes of a case as one."""
    distances = [row.hd95_mm for row in rows if not np.isnan(row.hd95_mm)]
    return Score(
        case,
        ALL,
        dice=_mean([row.dice for row in rows]),
        surface_dice=_mean([row.surface_dice for row in rows]),
        hd95_mm=float(np.median(distances)) if distances else float("nan"),
        volume_ml=sum(row.volume_ml for row in rows),
        true_volume_ml=sum(row.true_volume_ml for row in rows),
    )


def _summary(label: str, rows: Sequence[Score], one_sided: int) -> Summary:
    present = [row for row in rows if not np.isnan(row.dice)]
    distances = [row.hd95_mm for row in present if not np.isnan(row.hd95_mm)]
    return Summary(
        label=label,
        cases=len(present),
        one_sided=one_sided,
        dice=_interval([row.dice for row in present]),
        surface_dice=_interval([row.surface_dice for row in present if not np.isnan(row.surface_dice)]),
        hd95_mm=median_bootstrap(distances) if distances else None,
        volume_ml=_mean([row.volume_ml for row in present]),
        true_volume_ml=_mean([row.true_volume_ml for row in present]),
    )


def _one_sided(rows: Iterable[Score]) -> int:
    return sum((row.volume_ml > 0) != (row.true_volume_ml > 0) for row in rows)


def _interval(values: Sequence[float]) -> Interval | None:
    return paired_bootstrap(np.zeros(len(values)), values) if values else None


def _mean(values: Sequence[float]) -> float:
    found = [value for value in values if not np.isnan(value)]
    return float(np.mean(found)) if found else float("nan")
