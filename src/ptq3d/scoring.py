"""Label maps in a folder against true ones: a score for each case and class, and whether they are no worse than others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq3d.datasets.folders import find_cases
from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import LabelError, OptionError, few, numbered
from ptq3d.evaluation.scores import (
    Score,
    Summary,
    case_means,
    csv_text,
    jsonable,
    paired_means,
    score_case,
    summarize,
    summarize_all,
)
from ptq3d.evaluation.statistics import Interval, MedianInterval, NonInferiority, non_inferiority, require_margin
from ptq3d.evaluation.surfaces import require_surfaces, right_angled_spacing
from ptq3d.manifest import write_text
from ptq3d.options import EvaluateOptions
from ptq3d.progress import bar
from ptq3d.volumes.files import is_volume, load_labels
from ptq3d.volumes.source import place_of
from ptq3d.volumes.volume import Volume, require_same_grid

SHOWN = 5  # names in a warning
log = logging.getLogger("ptq3d")


@dataclass(frozen=True)
class Evaluation:
    """What label maps are worth.

    Attributes:
        scores: a row for each case and foreground class.
        summaries: over cases, one a class, the last of all classes.
        tolerance_mm: of surface Dice; None where surfaces were not measured.
        reference: scores of the reference; empty without one.
        non_inferiority: of mean Dice over cases against the reference; None without one.
    """

    scores: tuple[Score, ...]
    summaries: tuple[Summary, ...]
    tolerance_mm: float | None
    reference: tuple[Score, ...]
    non_inferiority: NonInferiority | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Headers of `rows`."""
        surfaces = () if self.tolerance_mm is None else (f"surface Dice {self.tolerance_mm:g} mm", "HD95 mm (median)")
        return ("class", "cases", "in one only", "Dice [95 %]", *surfaces, "ml", "true ml")

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The summaries for people."""
        for one in self.summaries:
            surfaces = (
                ()
                if self.tolerance_mm is None
                else (_shown(one.surface_dice, 4, one.cases), _shown(one.hd95_mm, 2, one.cases))
            )
            volumes = (f"{one.volume_ml:.2f}", f"{one.true_volume_ml:.2f}") if one.cases else ("-", "-")
            yield (one.label, str(one.cases), str(one.one_sided), _shown(one.dice, 4, one.cases), *surfaces, *volumes)

    def sentences(self) -> Iterator[str]:
        """The worst case, and the statement against the reference."""
        means = {case: mean for case, mean in case_means(self.scores).items() if not np.isnan(mean)}
        if means:
            worst = min(means, key=lambda case: means[case])
            yield f"Worst of {numbered(len(means), 'case')}: {worst} with mean Dice {means[worst]:.4f}."
        if self.non_inferiority is not None:
            yield self.non_inferiority.statement("the reference", "the prediction")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data; what is not finite is None."""
        *classes, whole = (summary.to_dict() for summary in self.summaries)
        found = self.non_inferiority
        return {
            "tolerance_mm": self.tolerance_mm,
            "all_classes": whole,
            "classes": classes,
            "mean_dice_per_case": jsonable(case_means(self.scores)),
            "mean_dice_per_case_of_reference": jsonable(case_means(self.reference)),
            "non_inferiority": None if found is None else found.to_dict(),
            "sentences": list(self.sentences()),
            "scores": [jsonable(asdict(score)) for score in self.scores],
        }


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Score label maps; every file is read and checked before the first is scored.

    Raises:
        OptionError: a reference without a margin or a margin without a reference, or a reference of other cases.
        InputError: of the tree in `ptq3d.errors`.
    """
    if (options.reference is None) != (options.margin is None):
        raise OptionError(
            "--reference and --margin belong together: give the label maps to be held against, and what loss is too much."
        )
    if options.margin is not None:
        require_margin(options.margin)
    if options.tolerance is not None:
        require_surfaces(options.tolerance)
    pairs = _pairs(options.predictions, options.labels)
    references = [] if options.reference is None else _same_cases(options.reference, options.labels, pairs)
    _warn_of_missing(options.labels, pairs)
    maps = _maps([*pairs, *references], options.label_map, surfaces=options.tolerance is not None)
    with bar("Score", quiet=options.quiet) as progress:
        scores: list[tuple[Score, ...]] = []
        for pair in (*pairs, *references):
            scores.append(_score(pair, maps, options.tolerance))
            progress(len(scores), len(pairs) + len(references))
    own, others = (tuple(row for case in part for row in case) for part in (scores[: len(pairs)], scores[len(pairs) :]))
    found = None
    if options.margin is not None:
        cases, reference, candidate = paired_means(others, own)
        if not cases:
            raise LabelError(
                f"no label map in {options.labels}, nor one held against it, has any class: nothing can be shown."
            )
        found = non_inferiority(reference, candidate, margin=options.margin)
    if options.csv is not None:
        sources = {str(options.predictions): own, **({str(options.reference): others} if others else {})}
        write_text(options.csv, csv_text(sources))
    return Evaluation(own, (*summarize(own), summarize_all(own)), options.tolerance, others, found)


@dataclass(frozen=True)
class _Pair:
    """A label map and the true one."""

    name: str
    prediction: Path
    truth: Path


@dataclass(frozen=True)
class _Maps:
    """From values in files to classes, for predictions and for truths; both have the same names."""

    prediction: LabelMap
    truth: LabelMap


def _pairs(predictions: Path, labels: Path) -> list[_Pair]:
    cases = find_cases(predictions, labels, required_labels=True)
    several = [case.name for case in cases if len(case.images) > 1]
    if several:
        raise OptionError(
            f"{predictions}: {several[0]}_0000, {several[0]}_0001, ... are channels by their names; wanted one label map a "
            "case, rename them."
        )
    return [_Pair(case.name, place_of(case.images[0]), case.label_files[0]) for case in cases]


def _same_cases(reference: Path, labels: Path, pairs: Sequence[_Pair]) -> list[_Pair]:
    """The reference's label maps under the names of the predictions."""
    found = {pair.truth: pair.prediction for pair in _pairs(reference, labels)}
    wanted = {pair.truth: pair.name for pair in pairs}
    if set(found) != set(wanted):
        lone = sorted(path.name for path in set(found) ^ set(wanted))
        raise OptionError(
            f"{reference} and the predictions must segment the same cases, but only one of them has labels for {few(lone, SHOWN)}; "
            "add what is missing, or take the others away."
        )
    return [_Pair(name, found[truth], truth) for truth, name in wanted.items()]


def _warn_of_missing(labels: Path, pairs: Sequence[_Pair]) -> None:
    """A case that was not segmented is no case that went well."""
    if labels.is_dir():
        missing = sorted(
            {path.name for path in labels.iterdir() if is_volume(path)} - {pair.truth.name for pair in pairs}
        )
        if missing:
            log.warning(
                "%d true label maps have no prediction and do not count: %s.", len(missing), few(missing, SHOWN)
            )


def _maps(pairs: Sequence[_Pair], path: Path | None, *, surfaces: bool) -> _Maps:
    """The label maps of a file, or of the values that are in any of the label maps; all are read and held against them."""
    given = None if path is None else LabelMap.load(path)
    values: set[int] = set()
    for pair in pairs:
        prediction, truth = _read(pair)
        if surfaces:
            right_angled_spacing(truth.affine, where=str(pair.truth))
        if given is None:
            values.update(np.unique(prediction.data).tolist(), np.unique(truth.data).tolist())
        else:
            _classes(pair, (prediction, truth), _Maps(LabelMap.identity(given.names), given))
    if given is not None:
        return _Maps(LabelMap.identity(given.names), given)
    present = sorted(values | {0})
    if len(present) == 1:
        raise LabelError(f"{pairs[0].truth} and all other label maps hold nothing but 0; give label maps with classes.")
    found = LabelMap(tuple(map(str, present)), {value: index for index, value in enumerate(present)})
    return _Maps(found, found)


def _read(pair: _Pair) -> tuple[Volume, Volume]:
    """Prediction and truth, values as in their files."""
    prediction, truth = load_labels(pair.prediction), load_labels(pair.truth)
    require_same_grid(truth.grid, prediction.grid, image_path=pair.truth, label_path=pair.prediction)
    return prediction, truth


def _classes(pair: _Pair, read: tuple[Volume, Volume], maps: _Maps) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) classes of prediction and truth."""
    prediction, truth = read
    return (
        maps.prediction.apply(prediction.data[0], where=pair.prediction),
        maps.truth.apply(truth.data[0], where=pair.truth),
    )


def _score(pair: _Pair, maps: _Maps, tolerance_mm: float | None) -> tuple[Score, ...]:
    read = _read(pair)
    prediction, truth = _classes(pair, read, maps)
    return score_case(
        pair.name, prediction, Volume(truth[None], read[1].affine), names=maps.truth.names, tolerance_mm=tolerance_mm
    )


def _shown(interval: Interval | MedianInterval | None, digits: int, cases: int) -> str:
    if interval is None:
        return "-"
    middle = interval.mean if isinstance(interval, Interval) else interval.median
    if cases < 2:  # an interval of one case would say nothing
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
