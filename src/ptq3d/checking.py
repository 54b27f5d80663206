"""The check of a whole data set before anything is trained, calibrated or judged on it."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.data import find_data
from ptq3d.datasets import dicom_series
from ptq3d.datasets.cases import Case, read_grid, read_image, read_labels
from ptq3d.datasets.dataset import Dataset
from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import EngineError, FileError, GeometryError, InputError, LabelError, few, numbered
from ptq3d.memory import available_bytes
from ptq3d.options import DataCheckOptions, DataShowOptions
from ptq3d.progress import Progress, bar, silent
from ptq3d.volumes.files import is_dicom
from ptq3d.volumes.resample import oriented_grid
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import Volume, axcodes_of, require_same_grid

log = logging.getLogger("ptq3d")
Severity: TypeAlias = Literal["error", "warning"]
OUTLIER = 3.0  # a spacing this many times the set's median, or less than its part, is likely a wrong header
BYTES_A_VOXEL = 20  # the file, its array, float32, labels, and what is compared


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        case: its name, or several; "" for the whole set.
        severity: an "error" makes the set unfit for use, a "warning" wants a look.
        kind: a short name: unreadable, grid, labels, channels, spacing, duplicate, leak, constant, empty, absent.
        text: what was found, and how to mend it.
    """

    case: str
    severity: Severity
    kind: str
    text: str


@dataclass(frozen=True)
class CaseFacts:
    """What was seen of one case.

    Attributes:
        name: of the case.
        split: of the case.
        shape: (X, Y, Z) voxels as stored; empty where the image could not be read.
        spacing: mm along right-left, anterior-posterior, superior-inferior.
        orientation: of the stored axes, such as "LPS".
        channels: of the image.
        intensity: lowest and highest value.
        values: of the label files' voxels, value -> their number; empty without labels.
        content: SHA-256 of the voxels and their grid, whatever the kind of file.
        problems: of this case alone.
    """

    name: str
    split: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    orientation: str = ""
    channels: int = 0
    intensity: tuple[float, ...] = ()
    values: tuple[tuple[int, int], ...] = ()
    content: str = ""
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A checked data set.

    Attributes:
        dataset: as it was opened.
        cases: what was seen of each, in order.
        problems: of cases and of the set, errors first.
    """

    dataset: Dataset
    cases: tuple[CaseFacts, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> int:
        """How many problems make the set unfit for use."""
        return sum(problem.severity == "error" for problem in self.problems)

    @property
    def unfit(self) -> tuple[str, ...]:
        """Names of the cases that have errors."""
        return tuple(dict.fromkeys(one.case for one in self.problems if one.severity == "error"))

    @property
    def told(self) -> str:
        """The result in one line; the first cases with errors by their names."""
        warnings = len(self.problems) - self.errors
        counts = ((len(self.cases), "case"), (self.errors, "error"), (warnings, "warning"))
        cases, errors, others = (numbered(number, thing) for number, thing in counts)
        where = f" in {few(self.unfit)}" if self.unfit else ""
        return f"{cases} read, {errors}{where}, {others}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        cases = [{**vars(case), "values": dict(case.values), "problems": len(case.problems)} for case in self.cases]
        return {**self.dataset.to_dict(), "cases": cases, "problems": [vars(problem) for problem in self.problems]}


def show(options: DataShowOptions) -> tuple[Dataset, list[tuple[str, ...]]]:
    """What `--data` names, and a row of words for each case: name, split, image, channels, voxels, spacing, axes, labels.

    Where one DICOM series would have to be chosen, all are shown.

    Raises:
        FileError, LabelError: see `find_data`.
    """
    try:
        found = find_data(options.data, options.labels, series=options.series)
    except FileError:
        if options.series is not None or dicom_series.find(options.data, dicom_series.ALL) is None:
            raise
        found = find_data(options.data, series=dicom_series.ALL)  # to choose from
    if options.series is None and any(
        isinstance(one, Path) and is_dicom(one) for case in found.cases for one in case.images
    ):
        found = find_data(options.data, series=dicom_series.ALL)
    return found, [_shown(case) for case in found.cases]


def _shown(case: Case) -> tuple[str, ...]:
    """A case by its headers."""
    files = case.label_files
    labels = "none" if not files else files[0].name if len(files) == 1 else f"{len(files)} masks"
    known = (case.name, case.split, _image(case), str(case.channels))
    try:
        shape, affine = read_grid(case)
    except InputError as error:
        log.warning("%s", error)
        return (*known, "unreadable", "", "", labels)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    sizes = (" x ".join(map(str, shape)), " x ".join(f"{size:.3g}" for size in spacing), axcodes_of(affine))
    return (*known, *sizes, labels)


def _image(case: Case) -> str:
    """What the first image is called."""
    source = case.images[0]
    return source.description or f"UID {source.uid}" if isinstance(source, Series) else source.name


def check(options: DataCheckOptions) -> Checked:
    """The check of what `--data` names.

    Raises:
        FileError, LabelError: nothing to check is there, or the label map is no readable one.
        EngineError: a reading process died.
    """
    found = find_data(options.data, options.labels, series=options.series)
    if options.label_map is not None:
        found = replace(found, label_map=LabelMap.load(options.label_map))
    with bar("Check", quiet=options.quiet) as progress:
        return check_dataset(found, progress=progress)


def check_dataset(dataset: Dataset, *, progress: Progress = silent) -> Checked:
    """Read every case of a data set on all cores, and hold the cases against one another.

    Raises:
        EngineError: a reading process died.
    """
    facts = tuple(_all_facts(dataset, progress))
    found = [problem for case in facts for problem in case.problems]
    found += [*_of_channels(facts), *_of_spacings(facts), *_of_copies(facts), *_of_classes(facts, dataset.label_map)]
    return Checked(dataset, facts, tuple(sorted(found, key=lambda problem: problem.severity)))


def _all_facts(dataset: Dataset, progress: Progress) -> Iterable[CaseFacts]:
    """Of every case, in order; one process a core as far as the memory goes."""
    cases = dataset.cases
    look = partial(case_facts, label_map=dataset.label_map)
    workers = _workers(cases)
    if workers == 1:
        return list(_counted(map(look, cases), len(cases), progress))
    found: dict[int, CaseFacts] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            waiting = {pool.submit(look, case): index for index, case in enumerate(cases)}
            for future in _counted(as_completed(waiting), len(cases), progress):
                found[waiting[future]] = future.result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
        except BrokenProcessPool as error:
            raise EngineError(
                f"a process that read {dataset.root} died, likely for want of memory. Check a part of the set at a time."
            ) from error
    return [found[index] for index in range(len(cases))]


def _counted(things: Iterable[Any], total: int, progress: Progress) -> Iterator[Any]:
    for done, thing in enumerate(things, 1):
        yield thing
        progress(done, total)


def _workers(cases: Sequence[Case]) -> int:
    """Processes that fit the cores and the memory, by the largest header among the cases."""
    largest = 1
    for case in cases[:: max(1, len(cases) // 50)]:
        with suppress(InputError):
            (x, y, z), _ = read_grid(case)
            largest = max(largest, x * y * z * case.channels)
    room = available_bytes() // (largest * BYTES_A_VOXEL)
    return max(1, min(_cores(), len(cases) // 4, room))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def case_facts(case: Case, *, label_map: LabelMap | None = None) -> CaseFacts:
    """Read one case and say what it is; what is wrong with it is in `problems`."""
    try:
        image = read_image(case)
    except (InputError, OSError, MemoryError) as error:
        return CaseFacts(case.name, case.split, problems=(_refused(case, error),))
    problems = list(_of_image(case, image))
    values: tuple[tuple[int, int], ...] = ()
    try:
        values = _label_values(case, image)
        problems += _of_labels(case, values, label_map)
    except (InputError, OSError, MemoryError) as error:
        problems.append(_refused(case, error))
    low, high = float(image.data.min()), float(image.data.max())
    canonical = np.linalg.norm(oriented_grid(image.grid, "RAS")[1][:3, :3], axis=0)
    return CaseFacts(
        name=case.name,
        split=case.split,
        shape=image.shape,
        spacing=tuple(canonical.round(6).tolist()),
        orientation=image.orientation,
        channels=image.data.shape[0],
        intensity=(low, high),
        values=values,
        content=_content(image),
        problems=tuple(problems),
    )


def _refused(case: Case, error: Exception) -> Problem:
    """What a reader refused, by the kind of its error."""
    kind = "grid" if isinstance(error, GeometryError) else "labels" if isinstance(error, LabelError) else "unreadable"
    return Problem(case.name, "error", kind, str(error))


def _content(image: Volume) -> str:
    """SHA-256 of voxels and grid: equal for the same image in other files, whatever their kind and compression."""
    found = hashlib.sha256(repr((image.data.shape, (image.affine.round(3) + 0.0).tolist())).encode())
    for plane in np.moveaxis(image.data, 3, 0):
        found.update(np.ascontiguousarray(plane).data)
    return found.hexdigest()


def _of_image(case: Case, image: Volume) -> Iterator[Problem]:
    for channel, data in enumerate(image.data):
        if data.min() == data.max():
            yield Problem(
                case.name,
                "warning",
                "constant",
                f"all voxels of channel {channel} are {data.flat[0]:g}; is this the image?",
            )


def _label_values(case: Case, image: Volume) -> tuple[tuple[int, int], ...]:
    """Value -> voxels in the label map, after it was found on the image's grid."""
    labels = read_labels(case)
    if labels is None:
        return ()
    require_same_grid(image.grid, labels.grid, image_path=case.images[0], label_path=case.label_files[0])
    counts = _counts(labels.data)
    present = np.flatnonzero(counts)
    return tuple(zip(present.tolist(), counts[present].tolist(), strict=True))


def _counts(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Voxels of each value, plane by plane: counting widens labels to 8 bytes."""
    counts = np.zeros(int(labels.max()) + 1, np.int64)
    for plane in labels[0]:
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    return counts


def _of_labels(case: Case, values: tuple[tuple[int, int], ...], label_map: LabelMap | None) -> Iterator[Problem]:
    if not values:
        return
    if values == ((0, values[0][1]),):
        yield Problem(
            case.name, "warning", "empty", "its label map is background only; is that so, or was it exported empty?"
        )
    if label_map is None or label_map.others is not None:
        return
    unknown = [value for value, _ in values if value not in label_map.values]
    if unknown:
        yield Problem(
            case.name,
            "error",
            "labels",
            f"{case.label_files[0]} holds values {few(unknown, 5)} that belong to none of the {len(label_map.names)} classes; "
            "mend the labels, or say what the values are with --label-map.",
        )


def _of_channels(cases: Sequence[CaseFacts]) -> Iterator[Problem]:
    by_channels = _groups(cases, "channels")
    if len(by_channels) > 1:
        usual = max(by_channels, key=lambda channels: len(by_channels[channels]))
        for channels, few in by_channels.items():
            if channels != usual:
                for case in few:
                    text = f"its image has {channels} channels, most of the set have {usual}; add what is missing."
                    yield Problem(case.name, "error", "channels", text)


def _groups(cases: Sequence[CaseFacts], key: str) -> dict[Any, list[CaseFacts]]:
    """Readable cases by one of their facts."""
    groups: dict[Any, list[CaseFacts]] = defaultdict(list)
    for case in cases:
        if case.content:
            groups[getattr(case, key)].append(case)
    return groups


def _of_spacings(cases: Sequence[CaseFacts]) -> Iterator[Problem]:
    """Spacings far from the set's median: headers in the wrong unit, or lost."""
    readable = [case for case in cases if case.content]
    if len(readable) < 3:
        return
    median = np.median([case.spacing for case in readable], axis=0)
    for case in readable:
        ratio = np.asarray(case.spacing) / median
        if (ratio >= OUTLIER).any() or (ratio <= 1 / OUTLIER).any():
            text = (
                f"its spacing of {_mm(case.spacing)} lies far from the set's median of {_mm(median.tolist())} "
                "(right-left, anterior-posterior, superior-inferior); is its header right?"
            )
            yield Problem(case.name, "warning", "spacing", text)


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in spacing) + " mm"


def _of_copies(cases: Sequence[CaseFacts]) -> Iterator[Problem]:
    """The same image twice: within a split it counts double, in two splits figures on one are not of unseen data."""
    for same in _groups(cases, "content").values():
        if len(same) < 2:
            continue
        named = ", ".join(f"{case.name} ({case.split})" if case.split else case.name for case in same)
        if len({case.split for case in same}) > 1:
            text = f"{named} hold the same image in different splits; keep it in one of them."
            yield Problem(same[0].name, "error", "leak", text)
        else:
            text = f"{named} hold the same image; keep one of them."
            yield Problem(same[0].name, "warning", "duplicate", text)


def _of_classes(cases: Sequence[CaseFacts], label_map: LabelMap | None) -> Iterator[Problem]:
    """Classes that no label file of the set has a voxel of."""
    values = {value for case in cases for value, _ in case.values}
    if label_map is None or not values:
        return
    present = {label_map.values.get(value, label_map.others) for value in values}
    absent = [name for index, name in enumerate(label_map.names) if index and index not in present]
    if absent:
        text = f"{len(absent)} of {len(label_map.names) - 1} classes occur in no label map: {few(absent, 5)}."
        yield Problem("", "warning", "absent", text)
