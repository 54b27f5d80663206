"""Zip archives, unpacked nowhere but into the folder that they are meant for."""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

from ptq3d.errors import FileError

LARGEST_BYTES = 1 << 36  # 64 GiB: more is no network


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
        reason = _reason(member)
        if reason is not None:
            raise FileError(
                f"{path}: refused, its member '{member.filename}' {reason}. Nothing was unpacked. "
                "Get the archive from where it was made, or unpack what you trust by hand and name the folder."
            )
    if sum(member.file_size for member in members) > LARGEST_BYTES:
        raise FileError(f"{path}: refused, it unpacks to more than {LARGEST_BYTES >> 30} GiB. Name an unpacked folder.")


def _reason(member: zipfile.ZipInfo) -> str | None:
    """Why a member must not be unpacked; None where it may."""
    name = member.filename
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or ".." in re.split(r"[/\\]", name):
        return "would land outside of the folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    return "is encrypted" if member.flag_bits & 1 else None
