"""What lies directly in a folder, told by names alone, with one look at the folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ptq3d.datasets.dataset import Ignored
from ptq3d.errors import FileError
from ptq3d.volumes.dicom_files import INDEX, starts_like_dicom
from ptq3d.volumes.files import volume_suffix

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


@dataclass(frozen=True)
class Contents:
    """The entries of a folder in the order of their names.

    Attributes:
        volumes: visible files whose names say that `load_image` reads them.
        others: other visible files.
        folders: visible folders, or links to folders.
        broken: links that lead nowhere, or in a circle, and macOS's "._" droppings.
    """

    volumes: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    broken: tuple[Ignored, ...] = ()

    def folder(self, *names: str) -> Path | None:
        """The folder of one of these names, in upper or lower case."""
        wanted = {name.lower() for name in names}
        return next((folder for folder in self.folders if folder.name.lower() in wanted), None)

    def unused(self, used: Iterable[Path] = ()) -> tuple[Ignored, ...]:
        """What a layout has no use for, with the reasons.

        Args:
            used: volumes, other files and folders that it does use.
        """
        known = set(used)
        left = [Ignored(path, _reason(path)) for path in (*self.volumes, *self.others) if path not in known]
        folders = [
            Ignored(path, "a folder that is no part of the layout") for path in self.folders if path not in known
        ]
        return (*left, *folders, *self.broken)


def contents(folder: Path) -> Contents:
    """What lies directly in a folder.

    Raises:
        FileError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise FileError(f"{folder}: this folder cannot be listed ({error.strerror}); check path and rights.") from error
    volumes: list[Path] = []
    others: list[Path] = []
    folders: list[Path] = []
    broken: list[Ignored] = []
    for entry in found:
        path = folder / entry.name
        if entry.name.startswith("."):
            if volume_suffix(entry.name) is not None:
                broken.append(Ignored(path, "a hidden file"))
        elif _is_folder(entry):
            folders.append(path)
        elif not _leads_to_a_file(entry):
            broken.append(Ignored(path, "no file, or a link that leads nowhere"))
        else:
            (others if volume_suffix(entry.name) is None else volumes).append(path)
    return Contents(tuple(volumes), tuple(others), tuple(folders), tuple(broken))


def is_file(path: Path) -> bool:
    """Whether there is a file; False too where the system cannot tell."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder; False too where the system cannot tell."""
    try:
        return path.is_dir()
    except OSError:
        return False


def looks_like_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its ending or, where it has none but numbers, by its first bytes."""
    suffix = path.suffix.lower()
    if path.name.upper() == INDEX:
        return False
    if suffix in DICOM_SUFFIXES:
        return True
    if suffix and not suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return starts_like_dicom(file.read(132))
    except OSError:
        return False


def stem(path: Path) -> str:
    """A file name without the ending of its kind: "a.nii.gz" is "a"."""
    suffix = volume_suffix(path.name)
    return path.stem if suffix is None else path.name[: -len(suffix)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _leads_to_a_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _reason(path: Path) -> str:
    if volume_suffix(path.name) is not None:
        return "a volume that is no part of the layout"
    if looks_like_dicom(path):
        return "a DICOM file beside what is no DICOM; put its series into a folder of its own"
    return "no volume by its ending"
