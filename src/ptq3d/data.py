"""The data of a verb: what --data, --labels, --split and --series name, what was found there, and which classes its labels are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ptq3d.datasets.cases import Case, read_grid
from ptq3d.datasets.dataset import Dataset, Ignored
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import InputError, LabelError, OptionError
from ptq3d.manifest import Manifest
from ptq3d.volumes.resample import oriented_grid

log = logging.getLogger("ptq3d")
SEEN_HEADERS = 20  # of a large set: enough to tell its spacing, and a DICOM series has hundreds of headers
SHOWN_FILES = 3


def find_data(
    data: Path,
    labels: Path | None = None,
    *,
    split: str | None = None,
    usual: Sequence[str] = (),
    series: str | None = None,
) -> Dataset:
    """The cases that a verb works on; what was found is logged.

    Args:
        data: a volume, a DICOM series, a folder laid out as one of `LAYOUTS`, or a list of cases.
        labels: a label map or a folder of them; or the name of one of the data set's own segmentations.
        split: of the data set; "all" for every case.
        usual: the split that is taken where none is asked for: the first of these that the data set has.
        series: which series of DICOM files.

    Raises:
        FileError, LabelError: see `open_dataset`.
        OptionError: the data set has no such split.
    """
    found = open_dataset(data, labels, series=series)
    log.info("%s", described(found))
    chosen = split or next((one for one in usual if one in found.splits), "all")
    if chosen == "all":
        return found
    cases = tuple(case for case in found.cases if case.split == chosen)
    if not cases:
        raise OptionError(
            f"{data} has no split '{chosen}': {', '.join(found.splits) or 'it names none'}. Choose one of them, or --split all."
        )
    if len(cases) < len(found.cases):
        log.info("using its %d cases of split '%s'", len(cases), chosen)
    return replace(found, cases=cases)


def with_labels(found: Dataset, wanted: Path | None) -> Dataset:
    """The data set where every case has labels.

    Args:
        found: to train on.
        wanted: what the user named as labels.

    Raises:
        LabelError: a case has none.
    """
    for case in found.cases:
        if case.labels is None:
            given = f"in {wanted}" if wanted is not None else "beside it; name their file or folder with --labels"
            raise LabelError(f"{case.where} has no label map {given}.")
    return found


def without_labels(found: Dataset) -> Dataset:
    """The data set as if nobody had labelled it."""
    return replace(found, cases=tuple(case.unlabelled() for case in found.cases))


def judged_by(
    found: Dataset, manifest: Manifest, *, labels: Path | None, label_map: Path | None
) -> tuple[list[Case], LabelMap]:
    """Cases with the labels that a network can be judged by, and the map from their values to its classes.

    Labels that the user names are used. Those that merely lie in the data set are used where they are of the network's
    classes, and left out, with a line that says so, where they are not.

    Args:
        found: the data.
        manifest: of the network.
        labels: what the user named as labels.
        label_map: the file that the user named.

    Raises:
        FileError, LabelError: the file is none, or has another number of classes than the network.
    """
    if label_map is not None:
        return list(found.cases), truth_map(label_map, manifest)
    own = None if found.label_map is None else fitting(found.label_map, manifest.labels)
    if own is not None or labels is not None:
        return list(found.cases), own or LabelMap.identity(manifest.labels)
    if any(case.labels is not None for case in found.cases):
        own_names = "name no classes" if found.label_map is None else f"are of {len(found.label_map.names)} other classes"
        log.info(
            "the labels of %s %s (the network has %d), so there is no Dice; say what they are with --label-map",
            found.root, own_names, manifest.classes,
        )  # fmt: skip
    return list(without_labels(found).cases), LabelMap.identity(manifest.labels)


def truth_map(path: Path, manifest: Manifest) -> LabelMap:
    """From the values of label files to the classes of a network, as a file says.

    Raises:
        FileError: no readable file.
        LabelError: the map has another number of classes than the network.
    """
    label_map = LabelMap.load(path)
    if len(label_map.names) != manifest.classes:
        raise LabelError(
            f"{path} names {len(label_map.names)} classes, the network gives {manifest.classes}. Give the map of this network."
        )
    return label_map


def fitting(label_map: LabelMap, names: Sequence[str]) -> LabelMap | None:
    """The label map of a data set in the order of a network's classes; None where these are other classes.

    Args:
        label_map: of the data set.
        names: of the network's classes. Names that are only numbers ("class 3", "3") are taken in their order.
    """
    own, wanted = [_plain(name) for name in label_map.names], [_plain(name) for name in names]
    if len(own) != len(wanted):
        return None
    if all(name.removeprefix("class ").isdigit() for name in wanted[1:]):
        return replace(label_map, names=tuple(names))
    if len(set(own)) != len(own) or sorted(own) != sorted(wanted):
        return None
    place = [wanted.index(name) for name in own]
    others = None if label_map.others is None else place[label_map.others]
    return LabelMap(tuple(names), {value: place[index] for value, index in label_map.values.items()}, others)


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def described(found: Dataset) -> str:
    """One line: layout, cases, classes, channels, spacing, and what was left out."""
    parts = [f"{found.layout} ({found.root}): {numbered(len(found.cases), 'case')}"]
    if found.splits:
        counts = Counter(case.split or "without split" for case in found.cases)
        parts[0] += f" ({', '.join(f'{number} {split}' for split, number in counts.items())})"
    parts.append(_labelled(found))
    if (channels := found.cases[0].channels) > 1:
        parts.append(f"{channels} channels" + (f" ({', '.join(found.channels)})" if found.channels else ""))
    parts += [f"spacing {spacing}" for spacing in _spacings(found.cases)]
    if found.ignored:
        parts.append(f"{numbered(len(found.ignored), 'file')} ignored ({'; '.join(_reasons(found.ignored))})")
    return ", ".join(parts)


def _reasons(ignored: Sequence[Ignored]) -> Iterator[str]:
    """What was left out, by the reason."""
    by_reason: dict[str, list[str]] = {}
    for one in ignored:
        by_reason.setdefault(one.reason, []).append(one.path.name)
    for reason, names in by_reason.items():
        more = len(names) - SHOWN_FILES
        yield f"{reason}: {', '.join(names[:SHOWN_FILES])}{f' and {more} more' if more > 0 else ''}"


def _labelled(found: Dataset) -> str:
    number = sum(case.labels is not None for case in found.cases)
    if not number:
        return "no labels"
    of = "" if found.label_map is None else f" of {len(found.label_map.names)} classes"
    return f"labels{of}" if number == len(found.cases) else f"labels{of} for {number} of them"


def numbered(number: int, thing: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _spacings(cases: Sequence[Case]) -> Iterator[str]:
    """The range of spacings along right-left, anterior-posterior, superior-inferior; nothing where no header can be read."""
    seen = []
    for case in cases[:: max(1, len(cases) // SEEN_HEADERS)]:
        with suppress(InputError):  # the verb that reads the case will say what is wrong with it
            affine = oriented_grid(read_grid(case), "RAS")[1]
            seen.append(np.linalg.norm(affine[:3, :3], axis=0))
    if seen:
        ends = zip(np.min(seen, axis=0), np.max(seen, axis=0), strict=True)
        yield (
            " x ".join(f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g}-{high:.3g}" for low, high in ends)
            + " mm"
        )
