"""What a folder holds: cases, what their labels mean, and what was left out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq3d.datasets.cases import Case
from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import FileError

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training", "tr"),
    "val": ("val", "validation", "valid", "va"),
    "test": ("test", "testing", "ts"),
    "": ("",),
}
"""Splits in their order, each with what data sets call it."""

LONGEST_NAME = 200  # bytes; 255 is the limit of file systems, and a name gets an ending and a scratch name


@dataclass(frozen=True)
class Ignored:
    """A file or folder that is no part of any case.

    Attributes:
        path: of the file or folder.
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
        cases: at least one, by split, then in the order of their names (`arranged`).
        label_map: from the values of its label files to classes; None where the data set does not name them.
        channels: names of the channels, where the data set names them.
        ignored: what was left out, with the reason.
        choices: the same data set with each of its named sets of segmentations, where it has any. Of a single set the
            cases have the labels already; of several they have none until one is chosen.

    Raises:
        FileError: no cases, two of one name, or a name that no file can have.
    """

    layout: str
    root: Path
    cases: tuple[Case, ...]
    label_map: LabelMap | None = None
    channels: tuple[str, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    choices: Mapping[str, Dataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cases:
            raise FileError(f"{self.root}: laid out as {self.layout}, but there is no case in it; check the path.")
        seen: dict[str, Case] = {}
        for case in self.cases:
            _require_name(case, self.root)
            twin = seen.setdefault(case.name, case)
            if twin is not case:
                raise FileError(
                    f"{self.root}: several images have the case name ['{case.name}'], {twin.where} and {case.where}; "
                    "rename one of them, for label maps are written under the names of their cases."
                )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that its cases name, in their order."""
        return tuple(dict.fromkeys(case.split for case in self.cases if case.split))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "layout": self.layout,
            "root": str(self.root),
            "cases": [
                {
                    "name": case.name,
                    "split": case.split,
                    "images": [str(source) for source in case.images],
                    "labels": [str(path) for path in case.label_files],
                }
                for case in self.cases
            ],
            "classes": None if self.label_map is None else list(self.label_map.names),
            "channels": list(self.channels),
            "ignored": [{"path": str(one.path), "reason": one.reason} for one in self.ignored],
        }


def arranged(cases: Iterable[Case]) -> tuple[Case, ...]:
    """Cases by split, then in the order of their names."""
    order = list(SPLITS)
    return tuple(sorted(cases, key=lambda case: (order.index(case.split), case.name)))


def split_named(text: str, *, where: Path) -> str:
    """The split that a data set means: "training" is "train".

    Args:
        text: in upper or lower case; empty for none.
        where: the file it stands in, for the message.

    Raises:
        FileError: a split of no known name.
    """
    split = known_split(text)
    if split is None:
        raise FileError(f"{where}: wanted a split such as 'train', 'val' or 'test', got {text!r:.100}; rename it.")
    return split


def known_split(text: str) -> str | None:
    """As `split_named`, None for a text that is no split."""
    wanted = text.strip().lower()
    return next((split for split, names in SPLITS.items() if wanted in names), None)


def _require_name(case: Case, root: Path) -> None:
    """A name that stays a file name when an ending is added, on every system."""
    name = case.name
    odd = any(letter in "/\\" or unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
    if odd or not name.strip() or name in (".", "..") or len(name.encode(errors="replace")) > LONGEST_NAME:
        raise FileError(
            f"{root}: the case of {case.where!a:.300} is named {name!a:.100}, which cannot be the name of a "
            f"file (no separators, no control characters, at most {LONGEST_NAME} bytes); rename it."
        )
