"""The pixels of a stack of DICOM slices, decoded one frame at a time into one array."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, clipped
from ptq3d.volumes.dicom_files import Files, quiet, reading
from ptq3d.volumes.dicom_geometry import Slice, Stack

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

    from ptq3d.volumes.dicom_files import Header

Frames: TypeAlias = Iterator[NDArray[Any]]

JPEG = ("1.2.840.10008.1.2.4.5", "1.2.840.10008.1.2.4.70")  # baseline, extended and lossless
START_OF_IMAGE, START_OF_SCAN, JFIF = 0xFFD8, 0xFFDA, 0xFFE0
START_OF_FRAME = (0xFFC0, 0xFFC1, 0xFFC2, 0xFFC3)
SEGMENTS = {*START_OF_FRAME, START_OF_SCAN, 0xFFC4, 0xFFCC, 0xFFDB, 0xFFDD, *range(0xFFE0, 0xFFF0), 0xFFFE}
"""What may stand between: tables, restart interval, application data, comment."""
PLUGINS = {
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS, lossless and near
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pillow",  # JPEG 2000, lossless and not
    "1.2.840.10008.1.2.4.91": "pillow",
}
"""Decoders that refuse broken streams where GDCM, which pydicom asks first, may end the process."""
LARGEST_COMPRESSION = 4096  # of a series' frames to its files: air alone compresses to about a thousandth


@quiet()
def require_decoders(stack: Stack) -> None:
    """Refuse files in a transfer syntax that nothing installed decodes.

    Raises:
        FileError: names the file, the syntax and what is missing.
    """
    from pydicom.pixels import get_decoder

    for syntax, part in {transfer_syntax(part.header): part for part in stack.slices}.items():
        try:
            decoder = get_decoder(syntax)
            if decoder.is_available:
                continue
            needs = f" (it needs {', or '.join(decoder.missing_dependencies)})"
        except NotImplementedError:
            needs = ""
        raise FileError(
            f"{part.where} stores its pixels as '{clipped(syntax.name)}', which nothing here decodes{needs}; "
            "pip install 'ptq3d[dicom]', or export the series uncompressed."
        )


def transfer_syntax(header: Header) -> UID:
    """How a file is stored: as it says, or as its bytes were found to be where it has no file meta information."""
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    told = header.file_meta.get("TransferSyntaxUID")
    if told:
        return UID(str(told))  # broken headers hold several
    implicit, little = header.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def require_room(files: Files, stack: Stack) -> None:
    """Refuse files that cannot hold the pixels they promise, before memory is taken for them.

    Raises:
        FileError: uncompressed pixels that take more bytes than the file has, or compression beyond reason.
    """
    promised = stored = 0
    for member, parts in _by_member(stack).items():
        header, where = parts[0][1].header, parts[0][1].where
        columns, rows = parts[0][1].size
        with reading(where):
            bits, size = header.get("BitsAllocated"), files.size(member)
        if not isinstance(bits, int) or bits < 1:
            raise FileError(
                f"{where} has BitsAllocated {clipped(bits)}, wanted 8, 16 or 32; it is broken, copy it again."
            )
        wanted = columns * rows * len(parts) * bits // 8
        promised, stored = promised + wanted, stored + size
        syntax = transfer_syntax(header)
        if size < wanted and not (syntax.is_encapsulated or syntax.is_deflated):
            raise FileError(
                f"{where} is truncated or broken: it promises {rows} rows of {columns} pixels in {len(parts)} frames, "
                f"{wanted} bytes, but has {size}; copy it again."
            )
    if promised > LARGEST_COMPRESSION * stored:
        raise FileError(
            f"{stack.slices[0].where} and its series promise {promised} bytes of pixels in files of {stored}: broken, "
            "or made to exhaust the memory; copy them again."
        )


def _by_member(stack: Stack) -> dict[str, list[tuple[int, Slice]]]:
    """The slices of each file in the order of its frames, each with its place in the volume."""
    members: dict[str, list[tuple[int, Slice]]] = {}
    for index, part in enumerate(stack.slices):
        members.setdefault(part.member, []).append((index, part))
    return {member: sorted(parts, key=lambda pair: pair[1].frame) for member, parts in members.items()}


def voxels(files: Files, stack: Stack) -> NDArray[np.float32]:
    """The values of all slices, stored * slope + intercept in float64, rounded once.

    Args:
        files: where they lie.
        stack: the slices in order.

    Returns:
        (Z, Y, X) float32.

    Raises:
        FileError: pixels that are missing, truncated or cannot be decoded.
    """
    (x, y, z), _ = stack.grid
    result = np.empty((z, y, x), np.float32)
    for member, parts in _by_member(stack).items():
        where = parts[0][1].where
        with reading(where), files.open_whole(member) as file:
            frames = _frames(file, parts[0][1].header)
            for (index, part), frame in zip(parts, frames, strict=True):
                result[index] = frame * part.slope + part.intercept
    return result


def _frames(file: IO[bytes], header: Header) -> Frames:
    """The stored values of a file, (rows, columns) a frame, one frame in memory at a time."""
    import pydicom
    from pydicom.pixels import iter_pixels

    syntax = transfer_syntax(header)
    if not (syntax.is_encapsulated or syntax.is_deflated):
        return cast(Frames, iter_pixels(file, raw=True, transfer_syntax_uid=syntax))
    dataset = pydicom.dcmread(file, force=True)
    if syntax.startswith(JPEG):
        _require_jpeg_headers(dataset)
    plugin = PLUGINS.get(syntax, "")
    return cast(Frames, iter_pixels(dataset, raw=True, decoding_plugin=plugin))


def _require_jpeg_headers(dataset: Dataset) -> None:
    """GDCM ends the whole process where libjpeg so much as warns of a header: look at all of them first."""
    from pydicom.encaps import generate_frames

    count = int(dataset.get("NumberOfFrames") or 1)
    for frame in generate_frames(dataset.PixelData, number_of_frames=count):
        bits, *size = _jpeg_size(frame)
        if size != [dataset.Rows, dataset.Columns, 1] or not 2 <= bits <= dataset.BitsAllocated:
            raise ValueError(f"its JPEG stream has rows, columns and colours {size} of {bits} bits")


def _jpeg_size(stream: bytes) -> tuple[int, int, int, int]:
    """Bits, rows, columns and colours of a JPEG stream whose header is whole up to its first scan.

    Raises:
        ValueError: it is not.
        struct.error: it ends before.
    """
    size = (0, 0, 0, 0)
    place = 2
    marker = struct.unpack_from(">H", stream)[0]
    if marker != START_OF_IMAGE:
        raise ValueError("its JPEG stream has no start")
    while marker != START_OF_SCAN:
        marker, length = struct.unpack_from(">HH", stream, place)
        odd_jfif = marker == JFIF and stream[place + 4 : place + 8] == b"JFIF" and stream[place + 9] != 1
        if marker not in SEGMENTS or length < 2 or odd_jfif:
            raise ValueError(f"its JPEG stream has a broken header at byte {place}")
        if marker in START_OF_FRAME:
            size = struct.unpack_from(">BHHB", stream, place + 4)
        place += 2 + length
    return size
