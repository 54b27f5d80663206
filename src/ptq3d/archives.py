"""What makes a member of a zip archive dangerous; asked before anything of it is read or unpacked."""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import PureWindowsPath

LARGEST_BYTES = 1 << 36  # 64 GiB: more is no network and no study


def danger_of(member: zipfile.ZipInfo) -> str | None:
    """Why a member must not be unpacked, as the end of a sentence about it; None where it may."""
    name = member.filename
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or ".." in re.split(r"[/\\]", name):
        return "names a place outside of the archive"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    return "is encrypted" if member.flag_bits & 1 else None
