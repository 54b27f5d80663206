"""Voxels out of a stream of bytes: decoded piece by piece, so that the array is all that stands in memory."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, line_of

Encoding: TypeAlias = Literal["raw", "gzip", "zlib"]

PIECE_BYTES = 4 << 20  # fits the caches of most machines, and any number of voxels fills it evenly
ENCODED_BYTES = 1 << 20
DEFLATE_RATIO = 1040  # deflate makes at most 1032 bytes of one
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Layout:
    """Where the voxels of a file lie, and what their bytes mean.

    Attributes:
        shape: of the array, the first axis fastest.
        dtype: of the stored voxels, with its byte order.
        data: the file that holds them.
        offset: decoded bytes before the first voxel.
        encoding: of the voxels in `data`.
        start: bytes of `data` before the encoding begins.
        slope: voxel = stored * slope + intercept, computed as nibabel does, in float64.
        intercept: see `slope`.
        tail: decoded bytes that may follow the last voxel; None: fewer than one plane of voxels, which is no lost slice.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data: Path
    offset: int = 0
    encoding: Encoding = "raw"
    start: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    tail: int | None = None

    @property
    def bytes_promised(self) -> int:
        """What must be decoded to reach the end of the last voxel."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    @property
    def scaled_dtype(self) -> np.dtype[Any]:
        """Of the voxels after slope and intercept, in the machine's byte order."""
        return self.scaled(np.zeros(1, self.dtype)).dtype.newbyteorder("=")

    def scaled(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The values of stored voxels."""
        from nibabel.volumeutils import apply_read_scaling

        result: NDArray[Any] = apply_read_scaling(stored, self.slope, self.intercept)
        return result


def read_start(path: Path, number: int, *, gzipped: bool) -> bytes:
    """The first bytes of a file that is compressed by gzip, or is not, as its name says.

    Raises:
        FileError: empty, unreadable, or compressed where its name says that it is not, or the other way round.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(2)
            if not magic:
                raise FileError(f"{path} is truncated: it is empty; copy it again.")
            if (magic == GZIP_MAGIC) != gzipped:
                raise FileError(
                    f"{path} is not compressed by gzip, as its name says, or it is truncated; rename it or copy it again."
                    if gzipped
                    else f"{path} is compressed by gzip, but its name does not say so; rename it to end in .gz or .mgz."
                )
            file.seek(0)
            return gzip.GzipFile(fileobj=file).read(number) if gzipped else file.read(number)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def read_voxels(path: Path, layout: Layout, dtype: type[np.float32] | None = None) -> NDArray[Any]:
    """The voxels of a file, with no copy beside the result.

    Memory is touched only as voxels arrive, so a header that promises too much costs nothing. The stream is read to its end,
    where its checksum is.

    Args:
        path: named in errors.
        layout: what the header says.
        dtype: of the result; None: of the scaled voxels.

    Returns:
        `layout.shape`, first axis fastest in memory.

    Raises:
        FileError: unreadable, truncated, of a wrong checksum, or of more planes than the header says.
    """
    where = path if layout.data == path else f"{path} (voxels in {layout.data.name})"
    try:
        _require_room(where, layout)
        voxels = _empty(where, layout, dtype)
        with layout.data.open("rb") as file, np.errstate(over="ignore", invalid="ignore"):
            file.seek(layout.start)
            _fill(voxels, where, layout, _pieces(file, layout.encoding))
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(where, error) from error
    return voxels.reshape(layout.shape, order="F")


def _empty(where: object, layout: Layout, dtype: type[np.float32] | None) -> NDArray[Any]:
    try:
        return np.empty(math.prod(layout.shape), dtype or layout.scaled_dtype)
    except (MemoryError, ValueError) as error:  # NumPy says ValueError where a size does not fit 64 bits
        raise FileError(
            f"{where}: there is no memory for an array of {layout.shape} voxels; is its header damaged?"
        ) from error


def _unreadable(where: object, error: Exception) -> FileError:
    reason = f"{type(error).__name__}: {line_of(error)}"
    return FileError(f"{where} cannot be read to its end: it is truncated or damaged ({reason}); copy it again.")


def _require_room(where: object, layout: Layout) -> None:
    """Refuse a header that promises more than its file can hold, before memory is asked for."""
    size = max(layout.data.stat().st_size - layout.start, 0)
    most = size if layout.encoding == "raw" else size * DEFLATE_RATIO
    if layout.bytes_promised > most:
        raise FileError(
            f"{where} is truncated: its header promises {layout.bytes_promised} bytes for shape {layout.shape}, "
            f"got {'' if layout.encoding == 'raw' else 'at most '}{most}; copy it again."
        )


def _fill(voxels: NDArray[Any], where: object, layout: Layout, pieces: Iterable[bytes]) -> None:
    """Decode all pieces; what follows the last voxel is only counted."""
    done, item = 0, layout.dtype.itemsize
    tail, allowed = 0, layout.tail if layout.tail is not None else math.prod(layout.shape[:2]) * item - 1
    for piece in _whole_items(pieces, layout.offset, item):
        stored = np.frombuffer(piece, layout.dtype, count=min(len(piece) // item, voxels.size - done))
        voxels[done : done + stored.size] = layout.scaled(stored)
        done += stored.size
        tail += len(piece) - stored.nbytes
        if tail > allowed:
            raise FileError(
                f"{where} holds more voxels than the shape {layout.shape} of its header; copy it again or mend its header."
            )
    if done < voxels.size:
        raise FileError(f"{where} is truncated: its header promises {voxels.size} voxels, got {done}; copy it again.")


def _whole_items(pieces: Iterable[bytes], skip: int, item: int) -> Iterator[memoryview]:
    """The bytes behind the first `skip`, cut between voxels; the last piece is what is left over."""
    rest = b""
    for piece in pieces:
        if skip >= len(piece):
            skip -= len(piece)
            continue
        view = memoryview(rest + piece if rest else piece)[skip:]
        whole = len(view) - len(view) % item
        rest, skip = bytes(view[whole:]), 0
        yield view[:whole]
    yield memoryview(rest)


def _pieces(file: BinaryIO, encoding: Encoding) -> Iterator[bytes]:
    """What a file holds from here to its end, decoded."""
    if encoding != "raw":
        yield from _inflated(file)
        return
    while piece := file.read(PIECE_BYTES):
        yield piece


def _inflated(file: BinaryIO) -> Iterator[bytes]:
    """The streams of gzip or zlib that follow each other to the end of a file; zlib checks their sums.

    Python's gzip module gives the same, but reads 8 KB at a time, which took a third longer.
    """
    encoded = file.read(ENCODED_BYTES)
    while encoded:
        decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
        while not decoder.eof:
            if not encoded:
                raise EOFError("compressed data ended before its end marker was reached")
            yield decoder.decompress(encoded, PIECE_BYTES)
            encoded = decoder.unconsumed_tail or file.read(ENCODED_BYTES)
        encoded = _padded(decoder.unused_data + encoded, file)


def _padded(encoded: bytes, file: BinaryIO) -> bytes:
    """What follows zeros, as tapes and block devices leave them."""
    while not (rest := encoded.lstrip(b"\0")):
        if not (encoded := file.read(ENCODED_BYTES)):
            return b""
    return rest
