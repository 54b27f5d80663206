"""Which label file belongs to which image, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ptq3d.datasets.contents import stem
from ptq3d.errors import LabelError

LABEL_ENDINGS = ("_seg", "_dseg", "_label", "_labels", "_mask", "_msk", "_glm")
"""What the name of a label file adds to the name of its image ("_glm": OASIS's whole-brain labels)."""

MOST_CHANNELS = 10  # of one case in a plain folder; more files with numbers are rather numbered cases


def case_name(path: Path) -> str:
    """A file name without the ending of its kind ("a.nii.gz" is "a") and without nnU-Net's channel "_0000"."""
    return stem(path).removesuffix("_0000")


def partners(images: Sequence[Path], labels: Sequence[Path], place: Path) -> list[Path]:
    """The label file of each image: of the same name, of nearly the same name, or with the same numbers in it.

    Args:
        images: the first channel of each case.
        labels: may be more than the images.
        place: where the labels lie, for messages; a single image goes with it whatever their names.

    Raises:
        LabelError: an image has no labels, several label files, or those of another image.
    """
    if len(images) == 1 and list(labels) == [place]:
        return [place]
    shelves: list[dict[object, list[Path]]] = [{} for _ in _KEYS]
    for key, shelf in zip(_KEYS, shelves, strict=True):
        for label in labels:
            shelf.setdefault(key(label), []).append(label)
    found = [_partner(image, shelves, place) for image in images]
    owners = dict(zip(found, images, strict=True))
    for image, label in zip(images, found, strict=True):
        if owners[label] != image:
            both = [image.name, owners[label].name]
            raise LabelError(f"{label} would be the labels of {both}; give each image labels of the same name.")
    return found


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


def without_label_ending(name: str) -> str:
    """ "a" of "a_seg"; other names as they are."""
    ending = label_ending(name)
    return name if ending is None else name.removesuffix(ending)


def label_ending(name: str) -> str | None:
    """The one of `LABEL_ENDINGS` that a name without its file ending ends in, or None."""
    return next((ending for ending in LABEL_ENDINGS if name.endswith(ending) and name != ending), None)


def channels_of_cases(images: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Files as cases, by nnU-Net's names: "a_0000" and "a_0001" are the channels of one case.

    So it is where every file has such a number and every case the same ones, from 0000 on and at most
    `MOST_CHANNELS`; otherwise each file is a case.
    """
    cases: dict[str, list[Path]] = {}
    for image in sorted(images, key=stem):
        name, _, number = stem(image).rpartition("_")
        if not name or not re.fullmatch(r"\d{4}", number):
            return [(path,) for path in images]
        cases.setdefault(name, []).append(image)
    counts = {tuple(stem(path)[-4:] for path in channels) for channels in cases.values()}
    numbers = next(iter(counts), ())
    wanted = tuple(f"{index:04d}" for index in range(len(numbers)))
    if len(counts) != 1 or numbers != wanted or len(numbers) > MOST_CHANNELS:
        return [(path,) for path in images]
    return [tuple(channels) for channels in cases.values()]


def _bare(path: Path) -> str:
    return without_label_ending(case_name(path))


def _numbers(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", case_name(path)))


_KEYS: tuple[Callable[[Path], object], ...] = (stem, case_name, _bare, _numbers)
"""What image and label have in common, the strictest first."""
