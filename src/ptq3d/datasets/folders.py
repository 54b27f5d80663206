"""Folders of images and labels as a list of cases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.errors import FileError, LabelError


def find_cases(images: Path, labels: Path | None = None, *, required_labels: bool = False) -> list[Case]:
    """The cases of a folder, or of a single file, in the order of their names.

    An image belongs to the label file of the same name; failing that, of the same name without "_0000"; failing that,
    with the same numbers in its name (BTCV's img0001 and label0001). One image belongs to one label FILE in any case.

    Args:
        images: a volume file, or a folder of them (its subfolders are not searched).
        labels: likewise, None for cases without labels.
        required_labels: refuse to go on without labels.

    Returns:
        At least one case.

    Raises:
        FileError: a file or folder is missing, a folder holds no volume, or two images have the same name.
        LabelError: labels are required but not given, an image has none, or several files claim to be them.
    """
    if labels is None and required_labels:
        raise LabelError(f"the images in {images} need labels; name their file or folder with --label-path.")
    found = _volumes(Path(images), "images")
    names = [case_name(path) for path in found]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise FileError(f"{images}: several images have the case name {repeated}; rename or move one of them.")
    if labels is None:
        return [Case(name, (path,)) for name, path in zip(names, found, strict=True)]
    partners = _partners(found, _volumes(Path(labels), "labels"), Path(labels))
    return [Case(name, (path,), label) for name, path, label in zip(names, found, partners, strict=True)]


def case_name(path: Path) -> str:
    """A file name without the ending of its kind ("a.nii.gz" is "a") and without nnU-Net's channel "_0000"."""
    return _stem(path).removesuffix("_0000")


def _volumes(place: Path, what: str) -> list[Path]:
    """The volume file, or the volume files of a folder, by name."""
    from ptq3d.volumes.files import FORMATS, is_volume

    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileError(f"{place}: no such file or folder of {what}; check the path.")
    found = sorted(path for path in place.iterdir() if is_volume(path))
    if not found:
        raise FileError(f"{place}: no {what} in this folder (wanted files ending in {', '.join(FORMATS)}).")
    return found


def _partners(images: list[Path], labels: list[Path], place: Path) -> list[Path]:
    """The label file of each image."""
    if len(images) == 1 and labels == [place]:
        return labels
    shelves: list[dict[object, list[Path]]] = [{} for _ in _KEYS]
    for key, shelf in zip(_KEYS, shelves, strict=True):
        for label in labels:
            shelf.setdefault(key(label), []).append(label)
    partners = [_partner(image, shelves, place) for image in images]
    owners = dict(zip(partners, images, strict=True))
    for image, partner in zip(images, partners, strict=True):
        if owners[partner] != image:
            both = [image.name, owners[partner].name]
            raise LabelError(f"{partner} would be the labels of {both}; give each image labels of the same name.")
    return partners


def _partner(image: Path, shelves: list[dict[object, list[Path]]], place: Path) -> Path:
    for key, shelf in zip(_KEYS, shelves, strict=True):
        matches = shelf.get(key(image), []) if key(image) else []
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise LabelError(
                f"{image} has several label files: {[match.name for match in matches]}; keep one, or use equal names."
            )
    raise LabelError(
        f"{image} has no labels in {place}; add a label file of the same name or number, or leave the image out."
    )


def _stem(path: Path) -> str:
    from ptq3d.volumes.files import volume_suffix

    suffix = volume_suffix(path.name)
    return path.stem if suffix is None else path.name[: -len(suffix)]


def _numbers(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", case_name(path)))


_KEYS: tuple[Callable[[Path], object], ...] = (_stem, case_name, _numbers)
"""What image and label have in common, the strictest first."""
