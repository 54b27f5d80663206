"""The DICOM files of a folder, a zip archive or a single file: told from others, opened, and their headers read."""

from __future__ import annotations

import logging
import os
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

from ptq3d.archives import LARGEST_BYTES, danger_of
from ptq3d.errors import FileError, UnavailableError, clipped, line_of

if TYPE_CHECKING:
    from pydicom import Dataset

    Header: TypeAlias = Dataset
    """All attributes of one file but its pixels."""

SMALL_BYTES = 1 << 30
LARGEST_RATIO = 100  # of all members to the archive: CT compresses to a half or third, air to a thousandth
PREAMBLE = 132  # bytes, with the magic at its end
INDEX = "DICOMDIR"  # in the format of an image, but a table of contents
MAGIC = b"DICM"
FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")  # what a file without preamble starts with: file meta, or identification
DIRECTORY = "1.2.840.10008.1.3.10"  # the SOP class of a DICOMDIR

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What files, archives and pydicom raise where bytes are broken, beside two errors of pydicom's own."""


class Files:
    """The files of a folder, zip archive or single file, by their paths relative to it; open until `close`.

    A zip archive is read where it is, and never unpacked to a path that it names.

    Args:
        place: the folder, the .zip file, or the one file (whose only name is "").

    Raises:
        FileError: no such place; or an archive that is broken, encrypted, names paths outside of it, or unpacks to far
            more than its size.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._archive: zipfile.ZipFile | None = None
        if not place.exists():
            raise FileError(f"{place}: no such file or folder; name a folder, .zip or file of DICOM images.")
        if place.is_file() and is_zip(place):
            self._archive = _open_archive(place)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the archive back."""
        if self._archive is not None:
            self._archive.close()

    def names(self) -> list[str]:
        """All files, in the order of their names; those of subfolders too, each once however many links lead to it.

        Raises:
            FileError: a subfolder cannot be read.
        """
        if self._archive is not None:
            return sorted(member.filename for member in self._archive.infolist() if not member.filename.endswith("/"))
        return _files_below(self.place) if self.place.is_dir() else [""]

    def open(self, name: str) -> IO[bytes]:
        """A file from its start; use it within `reading`."""
        return _Bounded((self.place / name).open("rb", 0)) if self._archive is None else self._archive.open(name)

    def open_whole(self, name: str) -> IO[bytes]:
        """As `open`, but a member of an archive is unpacked into memory and held against its checksum."""
        return self.open(name) if self._archive is None else BytesIO(self._archive.read(name))

    def size(self, name: str) -> int:
        """Bytes of a file; use it within `reading`."""
        return (self.place / name).stat().st_size if self._archive is None else self._archive.getinfo(name).file_size

    def called(self, name: str) -> str:
        """How an error names a file."""
        return str(self.place / name) if self._archive is None else f"{self.place}: member '{clipped(name)}'"


class _Bounded(BufferedReader):
    """A file of which no more can be asked for than it holds: a length in a broken header would fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, max(left, 0)))


def is_zip(place: Path) -> bool:
    """Whether a file's name says that it is a zip archive."""
    return place.suffix.lower() == ".zip"


def starts_like_dicom(start: bytes) -> bool:
    """Whether a file with these first 132 bytes is DICOM, with its preamble or (as old exports are) without it."""
    return start[PREAMBLE - 4 : PREAMBLE] == MAGIC or start[:2] in FIRST_GROUPS


class _Silence:
    """Warnings and log levels are the process's: the first thread that comes silences them, the last gives them back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._undo = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", UserWarning)
                warnings.simplefilter("ignore", DeprecationWarning)  # of the bindings of its decoders
                for logger in map(logging.getLogger, ("pydicom", "highdicom")):
                    self._undo.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


SILENCE = _Silence()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what pydicom and highdicom say about headers of other makers' devices from users, who cannot mend them."""
    with SILENCE:
        yield


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what pydicom and its decoders raise on a broken file into one sentence that names it; quietly.

    Raises:
        FileError: the file is missing, truncated or broken.
    """
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        with quiet():
            yield
    except (*UNREADABLE, BytesLengthException, InvalidDicomError) as error:
        raise FileError(
            f"{where} cannot be read, is broken or truncated ({type(error).__name__}: {line_of(error)}); copy it again."
        ) from error


def require_pydicom() -> None:
    """Refuse to go on without pydicom.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"DICOM needs pydicom ({error}): pip install 'ptq3d[dicom]'.") from error


def read_header(files: Files, name: str, keywords: tuple[str, ...] | None = None) -> Header | None:
    """The attributes of a DICOM file without its pixels; None where the file is not DICOM.

    Args:
        files: where it lies.
        name: which of `files.names()`.
        keywords: read only these attributes, None for all.

    Raises:
        FileError: it cannot be read, or starts as DICOM does but is broken.
    """
    import pydicom

    with reading(files.called(name)), files.open(name) as file:
        if not starts_like_dicom(file.read(PREAMBLE)):
            return None
        file.seek(0)
        wanted = None if keywords is None else list(keywords)
        return pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=wanted)


def _files_below(folder: Path) -> list[str]:
    """Every file once, but for hidden folders; through links too: a link to a folder above would otherwise never end."""
    found: dict[str, str] = {}
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise FileError(f"{folder} cannot be searched ({error}); make it readable, or name a folder below it.")

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(Path(place, name) for name in names):
            if path.is_symlink() or path.is_file():  # a pipe would be waited for; a broken link is refused
                found.setdefault(os.path.realpath(path), str(path.relative_to(folder)))
    return sorted(found.values())


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except (*UNREADABLE, zipfile.LargeZipFile) as error:
        raise FileError(f"{path}: not a readable zip archive ({line_of(error)}); copy it again.") from error
    try:
        _require_harmless(archive.infolist(), path)
    except FileError:
        archive.close()
        raise
    return archive


def _require_harmless(members: list[zipfile.ZipInfo], path: Path) -> None:
    for member in members:
        danger = danger_of(member)
        if danger is not None:
            raise FileError(
                f"{path}: refused, its member '{clipped(member.filename)}' {danger}; unpack what you trust and name the folder."
            )
    total = sum(member.file_size for member in members)
    if total > LARGEST_BYTES or total > max(SMALL_BYTES, LARGEST_RATIO * path.stat().st_size):
        raise FileError(
            f"{path}: refused, its {path.stat().st_size} bytes unpack to {total}; unpack what you trust and name the folder."
        )
