"""Folders of images beside folders of labels, for one split or several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ptq3d.datasets.contents import Contents, contents, is_folder
from ptq3d.datasets.dataset import SPLITS, Dataset, arranged
from ptq3d.datasets.folders import paired

LAYOUT = "folders of images and labels"
IMAGES, LABELS = ("images", "img"), ("labels", "label")


@dataclass(frozen=True)
class Part:
    """The folders of one split.

    Attributes:
        split: see `SPLITS`.
        images: a folder of volumes.
        labels: a folder of label maps, None where there is none.
    """

    split: str
    images: Path
    labels: Path | None


def find(root: Path) -> Dataset | None:
    """`images` and `labels`; or both in `train`, `val`, `test`; or `imagesTr`, `labelsTr`, `imagesTs`, ...

    Names may be in upper or lower case; see `SPLITS`, `IMAGES` and `LABELS` for what is understood. A split without
    labels has cases without labels.

    Args:
        root: a folder; its other subfolders are not searched.

    Returns:
        None for another layout.

    Raises:
        FileError, LabelError: see `folders.find_cases`; two cases of one name, also in different splits.
    """
    found = parts(root)
    return of_parts(LAYOUT, root, found) if found else None


def of_parts(layout: str, root: Path, found: list[Part]) -> Dataset:
    """The data set in these folders.

    Raises:
        FileError, LabelError: see `find`.
    """
    pieces = [paired(part.images, part.labels, split=part.split) for part in found]
    used = {folder for part in found for folder in (part.images, part.labels)}
    # a label folder that is used and its splits' folders are parts of the layout; all else is not
    known = [path for path in contents(root).folders if any(folder and folder.is_relative_to(path) for folder in used)]
    ignored = (*contents(root).unused(known), *(ignored for piece in pieces for ignored in piece.ignored))
    return Dataset(layout, root, arranged(case for piece in pieces for case in piece.cases), ignored=ignored)


def parts(root: Path) -> list[Part]:
    """The folders of images, with their labels, that lie in a folder; empty where there are none.

    Raises:
        FileError: a folder cannot be listed.
    """
    if not is_folder(root):
        return []
    place = contents(root)
    return [*_in_splits(place)] or [*_by_ending(place)] or [*_pair(place, "")]


def _in_splits(place: Contents) -> Iterator[Part]:
    for split, names in SPLITS.items():
        folder = place.folder(*names)
        if folder is not None:
            yield from _pair(contents(folder), split)


def _by_ending(place: Contents) -> Iterator[Part]:
    for split, endings in SPLITS.items():
        images = place.folder(*(f"images{ending}" for ending in endings if ending))
        if images is not None and contents(images).volumes:
            yield Part(split, images, _filled(place.folder(*(f"labels{ending}" for ending in endings))))


def _pair(place: Contents, split: str) -> Iterator[Part]:
    images = place.folder(*IMAGES)
    if images is not None and contents(images).volumes:
        yield Part(split, images, _filled(place.folder(*LABELS)))


def _filled(folder: Path | None) -> Path | None:
    return folder if folder is not None and contents(folder).volumes else None


def with_splits(found: Dataset, splits: dict[Path, str]) -> Dataset:
    """A data set whose images have the splits that a list gives them; others keep theirs.

    Args:
        found: any data set of volume files.
        splits: first image -> split.
    """
    cases = (replace(case, split=splits.get(Path(case.where), case.split)) for case in found.cases)
    return replace(found, cases=arranged(cases))
