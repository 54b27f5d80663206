"""A case: the images of one patient, and the label map or masks that belong to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ptq3d.datasets.label_map import LabelMap
from ptq3d.volumes.files import load_grid, load_image, load_labels
from ptq3d.volumes.source import Source, digest
from ptq3d.volumes.volume import Grid, Volume, require_same_grid


@dataclass(frozen=True)
class Mask:
    """A file whose voxels above 0 are one class.

    Attributes:
        path: a volume file.
        value: of the class in the label map that the masks are merged into.
    """

    path: Path
    value: int


@dataclass(frozen=True)
class Case:
    """One case of a data set.

    Attributes:
        name: unique in its data set; label maps are written under it.
        images: one source a channel.
        labels: a label map, or masks that are merged into one (where two overlap, the later one wins), or None.
        split: "train", "val", "test", or "" where the data set does not say.
        stacked: channels that each of the images holds: more than one for a 4D file.
    """

    name: str
    images: tuple[Source, ...]
    labels: Path | tuple[Mask, ...] | None = None
    split: str = ""
    stacked: int = 1

    @property
    def where(self) -> str:
        """The first image, for messages."""
        return str(self.images[0])

    @property
    def channels(self) -> int:
        """C of all images together."""
        return len(self.images) * self.stacked

    @property
    def label_files(self) -> tuple[Path, ...]:
        """Every file that labels are read from."""
        if self.labels is None:
            return ()
        return (self.labels,) if isinstance(self.labels, Path) else tuple(mask.path for mask in self.labels)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the images' files, read once; of one file, that file's own.

        Raises:
            FileError: a DICOM file cannot be read.
            OSError: another file cannot be read.
        """
        return digest(*self.images)

    def unlabelled(self) -> Case:
        """The same case without labels."""
        return replace(self, labels=None)


def read_image(case: Case) -> Volume:
    """All channels of a case.

    Returns:
        (C, X, Y, Z) float32 on the grid of the first image.

    Raises:
        FileError, GeometryError, IntensityError: see `load_image`.
        GeometryError: channels lie on different grids.
    """
    first = load_image(case.images[0], channels=case.stacked)
    if len(case.images) == 1:
        return first
    data = np.empty((case.channels, *first.shape), np.float32)
    data[: case.stacked] = first.data
    grid = first.grid
    del first  # one channel at a time beside the result
    for number, source in enumerate(case.images[1:], 1):
        other = load_image(source, channels=case.stacked)
        require_same_grid(grid, other.grid, image_path=case.images[0], label_path=source)
        data[number * case.stacked : (number + 1) * case.stacked] = other.data
    return Volume(data, grid[1])


def read_grid(case: Case) -> Grid:
    """Where the voxels of a case lie, from the header of its first image.

    Raises:
        FileError, GeometryError: see `load_grid`.
    """
    return load_grid(case.images[0], channels=case.stacked)


def read_labels(case: Case) -> Volume | None:
    """The label map of a case, values as in the file; masks are merged into one; None without labels.

    Returns:
        (1, X, Y, Z) uint8 or uint16.

    Raises:
        FileError, GeometryError, LabelError: see `load_labels`.
        GeometryError: masks lie on different grids.
    """
    if case.labels is None:
        return None
    if isinstance(case.labels, Path):
        return load_labels(case.labels)
    return _merged(case.labels)


def _merged(masks: tuple[Mask, ...]) -> Volume:
    """One label map of masks that lie on one grid."""
    first, *others = masks
    merged = _painted(None, first, first)
    for mask in others:
        merged = _painted(merged, mask, first)
    return merged


def _painted(onto: Volume | None, mask: Mask, first: Mask) -> Volume:
    """`onto` with the voxels of a mask in its value; the first mask begins a map."""
    found = load_labels(mask.path)
    if onto is None:
        onto = Volume(np.zeros(found.data.shape, np.uint16), found.affine)
    require_same_grid(onto.grid, found.grid, image_path=first.path, label_path=mask.path)
    onto.data[found.data > 0] = mask.value
    return onto


def true_classes(case: Case, grid: Grid, label_map: LabelMap) -> np.ndarray | None:
    """(X, Y, Z) classes of a case's labels, None where it has none.

    Args:
        case: whose labels are read.
        grid: of its image.
        label_map: from the values of label files to classes.

    Raises:
        GeometryError: the label map lies on another grid than the image.
        LabelError: it holds values outside the classes.
    """
    labels = read_labels(case)
    if labels is None:
        return None
    where = case.label_files[0]
    require_same_grid(grid, labels.grid, image_path=case.images[0], label_path=where)
    return label_map.apply(labels.data[0], where=where)
