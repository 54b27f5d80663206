"""Zip archives, unpacked nowhere but into the folder that they are meant for."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from ptq3d.archives import LARGEST_BYTES, danger_of
from ptq3d.errors import FileError


def unpack(path: Path, folder: Path) -> None:
    """Unpack a zip archive into an existing folder.

    Args:
        path: the archive.
        folder: where its members go, and nowhere else.

    Raises:
        FileError: missing, truncated or no zip archive; or a member that would land outside of `folder`, is a link, or is
            encrypted: nothing is unpacked then.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such archive. Name an existing file.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive.infolist(), path)
            archive.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise FileError(f"{path}: not a readable zip archive ({error}). It may be truncated; copy it again.") from error


def _check(members: list[zipfile.ZipInfo], path: Path) -> None:
    for member in members:
        reason = danger_of(member)
        if reason is not None:
            raise FileError(
                f"{path}: refused, its member '{member.filename}' {reason}. Nothing was unpacked. "
                "Get the archive from where it was made, or unpack what you trust by hand and name the folder."
            )
    if sum(member.file_size for member in members) > LARGEST_BYTES:
        raise FileError(f"{path}: refused, it unpacks to more than {LARGEST_BYTES >> 30} GiB. Name an unpacked folder.")
