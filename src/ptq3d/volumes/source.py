"""Where the voxels of one volume come from: a file, or one series among the slices of a folder or zip."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias


@dataclass(frozen=True)
class Series:
    """One DICOM series.

    Attributes:
        place: a folder, a .zip file, or the one file that holds all slices.
        uid: its SeriesInstanceUID.
        members: its files, as paths relative to `place`, in the order of the slices; ("",) where `place` is the file itself.
        description: what people call it: number, modality, description.
        number: its SeriesNumber, as text; "" where it has none.
    """

    place: Path
    uid: str
    members: tuple[str, ...]
    description: str = ""
    number: str = ""

    def __str__(self) -> str:
        return f"{self.place} (series {self.description or self.uid})"


PIECE_BYTES = 1 << 20

Source: TypeAlias = Path | Series
"""A volume file, or a DICOM series."""


def place_of(source: Source) -> Path:
    """The file or folder that a source lies in."""
    return source.place if isinstance(source, Series) else source


def digest(*sources: Source) -> str:
    """The SHA-256 of the bytes of all files, hexadecimal; of several files, the SHA-256 of their digests in order.

    Raises:
        FileError: a DICOM file or archive cannot be read.
        OSError: another file cannot be read.
    """
    digests = [found for source in sources for found in _digests(source)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _digests(source: Source) -> list[str]:
    if not isinstance(source, Series):
        return [sha256(source)]
    from ptq3d.volumes.dicom_files import Files, reading

    digests = []
    with Files(source.place) as files:
        for name in source.members:
            found = hashlib.sha256()
            with reading(files.called(name)), files.open(name) as file:
                while piece := file.read(PIECE_BYTES):
                    found.update(piece)
            digests.append(found.hexdigest())
    return digests


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
