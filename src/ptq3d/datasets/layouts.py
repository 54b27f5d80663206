"""The layouts of data sets, and what a path holds by the first of them that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ptq3d.datasets import (
    bids,
    btcv,
    case_list,
    decathlon,
    dicom_series,
    folders,
    nnunet_raw,
    split_folders,
    totalsegmentator,
    whole_brain,
)
from ptq3d.datasets.contents import Contents, contents, is_file, is_folder
from ptq3d.datasets.dataset import Dataset
from ptq3d.errors import FileError, OptionError

LAYOUTS: dict[str, Callable[[Path], Dataset | None]] = {
    case_list.LAYOUT: case_list.find,
    nnunet_raw.LAYOUT: nnunet_raw.find,
    btcv.LAYOUT: btcv.find,
    decathlon.LAYOUT: decathlon.find,
    "TotalSegmentator": totalsegmentator.find,
    bids.LAYOUT: bids.find,
    whole_brain.LAYOUT: whole_brain.find,
    split_folders.LAYOUT: split_folders.find,
    dicom_series.LAYOUT: dicom_series.find,
    folders.LAYOUT: folders.find,
}
"""Layouts, the strictest first; each gives None for what is not its own. Open: a new one is one file and one row."""


def open_dataset(data: Path, labels: Path | None = None, *, series: str | None = None) -> Dataset:
    """What a folder, file or list holds.

    Args:
        data: a data set as distributed, a folder of volumes, a volume, a list of cases, or DICOM.
        labels: a file or folder of label maps, which are given to the images of a plain folder or DICOM by their
            names; or the name of one of the data set's own sets of segmentations, such as "seg-vert".
        series: of DICOM, which series (see `dicom_series.find`).

    Raises:
        FileError: nothing there, nothing of a known layout, or a data set that is not as its own lists say.
        LabelError: an image without labels, or with those of another.
        OptionError: `series` for what is no DICOM, or `labels` for a list.
    """
    data = Path(data)
    if labels is not None and (is_file(Path(labels)) or is_folder(Path(labels))):
        return _with_labels(data, Path(labels), series)
    found = _recognised(data, series)
    return found if labels is None else _chosen(found, str(labels))


def _recognised(data: Path, series: str | None) -> Dataset:
    if series is not None:
        dicom = dicom_series.find(data, series)
        if dicom is None:
            raise OptionError(f"{data} holds no DICOM series to choose {series!r} from; leave the series out.")
        return dicom
    found = (find(data) for find in LAYOUTS.values())
    return next(dataset for dataset in found if dataset is not None)  # the last one always finds or raises


def _chosen(found: Dataset, name: str) -> Dataset:
    """The data set with one of its sets of segmentations."""
    if name in found.choices:
        return found.choices[name]
    offers = f"this data set ({found.layout}) has the segmentations {', '.join(found.choices)}"
    raise FileError(f"{name}: no such file or folder of labels; {offers if found.choices else 'check the path'}.")


def _with_labels(data: Path, labels: Path, series: str | None) -> Dataset:
    """Images of a folder, data set or DICOM, and labels of another folder."""
    if case_list.find(data) is not None:
        raise OptionError(f"{data}: a list of cases names its labels itself, in 'label'; leave {labels} out.")
    dicom = dicom_series.find(data, series)
    if dicom is None and series is not None:
        return _recognised(data, series)
    found = dicom or _recognised(data, None)
    if found.layout in (folders.LAYOUT, folders.ONE_FILE):
        return folders.paired(data, labels)
    place = Contents((labels,)) if is_file(labels) else contents(labels)
    own = (
        found.label_map if labels.resolve().is_relative_to(data.resolve()) else None
    )  # of others nobody knows the values
    return replace(found, cases=tuple(folders.named(found.cases, place.volumes)), label_map=own)
