"""DICOM folders and zips that are broken in every way the tests know, and what is said of them."""

from __future__ import annotations

import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from dicoms import ORIENTATIONS, PACKED, edit, recompress, stored_values, write_series
from ptq3d.errors import FileError, GeometryError, InputError

AXIAL = ORIENTATIONS["axial"]


def series(folder: Path, change: Callable[[Dataset, int], object] | None = None, depth: int = 6) -> Path:
    return write_series(folder, stored_values((7, 6, depth)), AXIAL, change=change)


def spoilt(**attributes: object) -> Callable[[Path], object]:
    """A series whose third slice has other attributes; None takes one away."""

    def change(header: Dataset, index: int) -> None:
        if index == 2:
            for keyword, value in attributes.items():
                if value is None:
                    delattr(header, keyword)
                else:
                    setattr(header, keyword, value)

    return lambda folder: series(folder, change)


def moved(*places: float) -> Callable[[Path], object]:
    """A series with slices at these places in mm."""

    def change(header: Dataset, index: int) -> None:
        header.ImagePositionPatient[2] = places[index]

    return lambda folder: series(folder, change, len(places))


def all_with(**attributes: object) -> Callable[[Path], object]:
    def change(header: Dataset, index: int) -> None:
        for keyword, value in attributes.items():
            setattr(header, keyword, value)

    return lambda folder: series(folder, change)


def cut(keep: Callable[[int], int]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = series(folder) / "IM0003"
        path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])

    return make


def sideways(header: Dataset, index: int) -> None:
    """Each slice 4 mm beside the one before but the last, which is in line with the first."""
    header.ImagePositionPatient[0] = 90 + 4 * (index % 5)


def mixed_orientations(folder: Path) -> None:
    series(folder)
    turned = pydicom.dcmread(folder / "IM0002")
    turned.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    turned.save_as(folder / "IM0002")


def two_places(folder: Path, **attributes: object) -> None:
    series(folder / "a")
    series(folder / "b", lambda header, index: [setattr(header, key, value) for key, value in attributes.items()])


def echoes(folder: Path) -> None:
    def change(header: Dataset, index: int) -> None:
        header.EchoNumbers = 1 + index % 2
        header.ImagePositionPatient[2] = 3 * (index // 2)

    series(folder, change)


def zipped(place: Path, name: Callable[[str], str] = str) -> Path:
    series(place.with_suffix(".folder"))
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(place.with_suffix(".folder").iterdir()):
            archive.writestr(zipfile.ZipInfo(name(path.name)), path.read_bytes())
    shutil.rmtree(place.with_suffix(".folder"))
    return place


def encrypted(place: Path) -> None:
    content = bytearray(zipped(place).read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + flags] |= 1
            start = content.find(signature, start + 4)
    place.write_bytes(content)


def bomb(place: Path) -> None:
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(1 << 20))
    content = bytearray(place.read_bytes())
    start = content.find(b"PK\x01\x02")
    content[start + 24 : start + 28] = struct.pack("<I", (1 << 31) - 1)  # what it says it unpacks to
    place.write_bytes(content)


def loop(folder: Path) -> None:
    folder.mkdir()
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")


def huge(folder: Path) -> None:
    series(folder)
    edit(folder, lambda header, index: [setattr(header, key, 65535) for key in ("Rows", "Columns")])


def huge_compressed(folder: Path) -> None:
    write_series(folder, stored_values((72, 65, 3)), AXIAL)
    recompress(folder, PACKED["JPEG-LS"])
    edit(folder, lambda header, index: [setattr(header, key, 65535) for key in ("Rows", "Columns")])


def broken_header(folder: Path) -> None:
    """A marker of the JPEG stream is no marker: libjpeg would warn, and GDCM end the process."""
    write_series(folder, stored_values((72, 65, 3)), AXIAL)
    recompress(folder, PACKED["JPEG lossless SV1"])
    path = folder / "IM0001"
    path.write_bytes(path.read_bytes().replace(b"\xff\xc4", b"\x01\xc4", 1))


def broken_stream(folder: Path) -> None:
    write_series(folder, stored_values((72, 65, 3)), AXIAL)
    recompress(folder, PACKED["JPEG-LS"])
    path = folder / "IM0001"
    content = path.read_bytes()
    start = content.index(b"\xff\xd8\xff")
    path.write_bytes(content[: start + 60] + bytes(len(content) - start - 60))


def other_syntax(uid: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        series(folder)
        path = folder / "IM0004"
        content, old = path.read_bytes(), b"1.2.840.10008.1.2.1\0"
        meta, found = content.index(old), uid.encode().ljust(20, b"\0")
        assert len(found) == len(old)
        path.write_bytes(content[:meta] + found + content[meta + len(old) :])

    return make


def directory_alone(folder: Path) -> None:
    folder.mkdir()
    series(folder / "x")
    header = pydicom.dcmread(folder / "x" / "IM0000")
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    shutil.rmtree(folder / "x")
    header.save_as(folder / "DICOMDIR")


def cine(folder: Path) -> None:
    series(folder, lambda header, index: setattr(header, "NumberOfFrames", 3))


def beside(header: Dataset, index: int) -> None:
    header.ImagePositionPatient[0] = 90 + 4 * (index == 3)


BROKEN: dict[str, tuple[str, Callable[[Path], object], type[InputError], str]] = {
    "missing place": ("a", lambda place: None, FileError, "no such file or folder"),
    "empty folder": ("a", lambda place: place.mkdir(), FileError, "no DICOM images"),
    "text": ("a.dcm", lambda place: place.write_text("hello"), FileError, "no DICOM images"),
    "empty file": ("a.dcm", lambda place: place.touch(), FileError, "no DICOM images"),
    "magic alone": ("a.dcm", lambda place: place.write_bytes(bytes(128) + b"DICM"), FileError, "SOPClassUID"),
    "noise behind the magic": (
        "a.dcm",
        lambda place: place.write_bytes(bytes(128) + b"DICM" + random.Random(0).randbytes(4000)),
        FileError,
        "a.dcm",
    ),
    "only a DICOMDIR": ("a", directory_alone, FileError, "a DICOMDIR, whose images are elsewhere"),
    "one slice": ("a", lambda place: series(place, depth=1), GeometryError, "at least 2"),
    "cut in the header": ("a", cut(lambda size: 300), FileError, "truncated"),
    "cut before the size": ("a", cut(lambda size: 760), FileError, "truncated"),
    "cut in the pixels": ("a", cut(lambda size: size - 8), FileError, "truncated"),
    "cut before the pixels": ("a", cut(lambda size: size - 7 * 6 * 2 - 12), FileError, "truncated|broken"),
    "missing slice": ("a", moved(0, 3, 6, 12, 15, 18), GeometryError, r"misses about 1 .* between 6 and 12 mm"),
    "missing slices": ("a", moved(0, 3, 12, 15, 21, 24), GeometryError, r"misses about 3 .* 3 and 12 mm, 15 and 21 mm"),
    "uneven": ("a", moved(0, 3, 6, 10.4, 13.4, 16.4), GeometryError, r"unevenly spaced: 4.4 mm between .*, 3 mm"),
    "duplicate slice": ("a", moved(0, 3, 6, 6, 9, 12), GeometryError, "1 duplicate slice, .*InstanceNumber 3 and 4"),
    "echoes": ("a", echoes, GeometryError, "3 duplicate slices.*EchoNumbers 1 and 2"),
    "beside the line": ("a", lambda place: series(place, beside), GeometryError, "4 mm beside it"),
    "two patients": ("a", lambda place: two_places(place, PatientID="P2"), FileError, "2 patients .*'P1', 'P2'"),
    "two series": (
        "a",
        lambda place: two_places(place, SeriesNumber=8),
        FileError,
        "--series among: 3 CT .*6 slices.*; 8 CT ",
    ),
    "mixed sizes": ("a", spoilt(Rows=3, Columns=14), GeometryError, "mixes sizes"),
    "mixed orientations": ("a", mixed_orientations, GeometryError, "mixes orientations"),
    "mixed spacings": ("a", spoilt(PixelSpacing=[0.8, 0.9]), GeometryError, "mixes pixel spacings"),
    "mixed frames of reference": ("a", spoilt(FrameOfReferenceUID="1.2.3"), GeometryError, "mixes frames of reference"),
    "no position": ("a", spoilt(ImagePositionPatient=None), FileError, "no ImagePositionPatient"),
    "no orientation": ("a", spoilt(ImageOrientationPatient=None), FileError, "no ImageOrientationPatient"),
    "no spacing": ("a", spoilt(PixelSpacing=None), FileError, "no PixelSpacing"),
    "empty position": ("a", spoilt(ImagePositionPatient=[]), FileError, "no ImagePositionPatient"),
    "half a position": ("a", spoilt(ImagePositionPatient=[1, 2]), FileError, "wanted 3 finite numbers"),
    "zero spacing": ("a", spoilt(PixelSpacing=[0, 0.7]), GeometryError, "above zero"),
    "negative spacing": ("a", spoilt(PixelSpacing=[0.8, -0.7]), GeometryError, "above zero"),
    "skew directions": ("a", spoilt(ImageOrientationPatient=[1, 0, 0, 0.5, 0.8, 0]), GeometryError, "right angles"),
    "zero slope": ("a", spoilt(RescaleSlope=0), FileError, "RescaleSlope is 0"),
    "table of values": ("a", spoilt(ModalityLUTSequence=[Dataset()]), FileError, "Modality LUT"),
    "colour": (
        "a",
        all_with(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0),
        FileError,
        "colour",
    ),
    "palette": ("a", all_with(PhotometricInterpretation="PALETTE COLOR"), FileError, "colour image"),
    "no pixels": ("a", spoilt(PixelData=None), FileError, "truncated|broken"),
    "odd bits": ("a", spoilt(BitsAllocated=12), FileError, "IM0"),
    "no bits": ("a", spoilt(BitsAllocated=None), FileError, "BitsAllocated None"),
    "huge": ("a", huge, FileError, "65535 rows of 65535 pixels"),
    "huge and compressed": ("a", huge_compressed, FileError, "exhaust the memory"),
    "broken stream": ("a", broken_stream, FileError, "IM0001 cannot be read"),
    "broken JPEG header": ("a", broken_header, FileError, "IM0001 cannot be read.*broken header at byte 15"),
    "frames without places": ("a", cine, FileError, "3 frames but does not say where"),
    "unknown transfer syntax": ("a", other_syntax("1.2.840.10008.9.9.9"), FileError, "1.2.840.10008.9.9.9"),
    "two transfer syntaxes": ("a", other_syntax(r"1.2.840.1\1.2.84"), FileError, "IM0004 stores its pixels as"),
    "video": ("a", other_syntax("1.2.840.10008.1.2.5."[:19]), FileError, "IM0004"),
    "no archive": ("a.zip", lambda place: place.write_bytes(b"PK" + bytes(500)), FileError, "zip archive"),
    "cut archive": (
        "a.zip",
        lambda place: place.write_bytes(zipped(place).read_bytes()[:-400]),
        FileError,
        "zip archive",
    ),
    "archive with ..": ("a.zip", lambda place: zipped(place, lambda name: f"../{name}"), FileError, "outside"),
    "archive with a root": ("a.zip", lambda place: zipped(place, lambda name: f"/tmp/{name}"), FileError, "outside"),
    "archive with a drive": ("a.zip", lambda place: zipped(place, lambda name: f"C:\\{name}"), FileError, "outside"),
    "encrypted archive": ("a.zip", encrypted, FileError, "encrypted"),
    "archive bomb": ("a.zip", bomb, FileError, "unpack to 2147483647"),
    "loop of links": ("a", loop, FileError, "cannot be read"),
    "no ASCII": ("Bäuche, 腹部", lambda place: series(place, depth=1), GeometryError, "at least 2"),
}
