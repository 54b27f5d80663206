"""What a folder holds: cases, what their labels mean, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.datasets.label_map import LabelMap


@dataclass(frozen=True)
class Ignored:
    """A file that is no part of any case.

    Attributes:
        path: of the file.
        reason: a clause such as "no image has its name".
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Dataset:
    """A data set as found on disk; no voxel was read but where the layout can only be told so.

    Attributes:
        layout: the data set's own name, such as "Medical Segmentation Decathlon".
        root: the folder or list file.
        cases: at least one, by split, then in the order of their names.
        label_map: from the values of its label files to classes; None where the data set does not name them.
        channels: names of the channels, where the data set names them.
        ignored: what was left out, with the reason.
    """

    layout: str
    root: Path
    cases: tuple[Case, ...]
    label_map: LabelMap | None = None
    channels: tuple[str, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that its cases name, in their order."""
        return tuple(dict.fromkeys(case.split for case in self.cases if case.split))
