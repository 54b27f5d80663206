"""The text headers of NRRD and MetaImage: where voxels lie, and the part that tells their type and place.

SimpleITK reads that part from a header written anew, never the file itself: damaged headers and long paths take its process down,
and it follows the name of a data file to wherever that points.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ptq3d.errors import FileError, GeometryError
from ptq3d.volumes.streams import Encoding

LONGEST = 1 << 20  # bytes of a header
NRRD_LINE = re.compile(
    "(type|dimension|space( dimension| units| origin| directions)?|sizes|spacings|thicknesses|axis ?(mins|maxs)|centers|kinds|"
    "labels|units|min|max|old ?(min|max)|endian|encoding|content|sample ?units|(line|byte) ?skip|data ?file|number|"
    "measurement frame|block ?size): (.*)",
    re.IGNORECASE,
)
SPACES = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "LPS", "RAS", "LAS")
NRRD_FIELDS = ("type", "dimension", "space", "sizes", "space directions", "kinds", "endian", "space origin")
METAIMAGE_FIELDS = (
    *(
        "ObjectType",
        "NDims",
        "BinaryData",
        "BinaryDataByteOrderMSB",
        "ElementByteOrderMSB",
        "TransformMatrix",
        "Rotation",
    ),
    *(
        "Orientation",
        "Offset",
        "Position",
        "Origin",
        "ElementSpacing",
        "ElementSize",
        "DimSize",
        "ElementNumberOfChannels",
    ),
    "ElementType",
)


@dataclass(frozen=True)
class TextHeader:
    """Where voxels lie, and the text that tells their type and place.

    Attributes:
        text: a header of these alone, in ASCII.
        shape: first axis fastest.
        data: the file that holds the voxels.
        start: bytes of `data` before the encoding begins.
        offset: decoded bytes before the first voxel.
        encoding: of the voxels.
        little_endian: their byte order.
        at_end: the voxels are the last bytes of `data`.
    """

    text: str
    shape: tuple[int, ...]
    data: Path
    start: int
    offset: int
    encoding: Encoding
    little_endian: bool
    at_end: bool = False


def nrrd_header(path: Path) -> TextHeader:
    """Of a NRRD file.

    Raises:
        FileError: no NRRD, not one volume, in another encoding than raw or gzip, or its data lie elsewhere.
        GeometryError: its space is none of `SPACES`.
    """
    content = _content(path)
    end = re.search(rb"\n\r?\n", content)
    magic, *lines = _lines(content[: end.start() if end else len(content)])
    if not re.fullmatch("NRRD000[1-6]", magic):
        raise FileError(f"{path} is no readable NRRD file: it begins with {content[:8]!r}; copy it again.")
    fields = _unique(path, [_nrrd_field(path, line) for line in lines if line and not re.match("#|[^:]*:=", line)])
    if fields.get("dimension") != "3":
        _refuse_rank(path, fields.get("sizes", ""))
    _require_space(path, fields.get("space", ""), fields.get("space directions", ""))
    encoding = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}.get(fields.get("encoding", "").lower())
    if encoding is None:
        raise FileError(
            f"{path}: wanted NRRD encoding raw or gzip, got {_shown(fields.get('encoding'))}; save it as gzip."
        )
    skip = _whole(path, "byte skip", fields.get("byte skip", fields.get("byteskip", "0")))
    lines_skipped = fields.get("line skip", fields.get("lineskip", "0"))
    if lines_skipped != "0" or skip < -1 or (skip == -1 and encoding != "raw"):
        raise FileError(f"{path}: its voxels lie behind skipped lines or bytes; save it as one plain NRRD file.")
    name = fields.get("data file", fields.get("datafile"))
    if name is None and end is None:
        raise FileError(f"{path} is truncated: it ends within its header; copy it again.")
    kept = [f"{field}: {_plain(path, field, fields[field])}" for field in NRRD_FIELDS if field in fields]
    return TextHeader(
        "\n".join(["NRRD0005", *kept, "encoding: raw", "", ""]),
        _shape(path, fields.get("sizes", ""), 3),
        path if name is None else _beside(path, name),
        end.end() if end and name is None else 0,
        max(skip, 0),
        "gzip" if encoding == "gzip" else "raw",
        fields.get("endian", "little").lower() == "little",
        at_end=skip == -1,
    )


def metaimage_header(path: Path) -> TextHeader:
    """Of a MetaImage file.

    Raises:
        FileError: no MetaImage, not one volume, or its data lie elsewhere or in several files.
    """
    content = _content(path)
    end = re.search(rb"^ElementDataFile *=[^\n]*(\n|\Z)", content, re.MULTILINE)
    pairs = (re.match(r"(\w+) *=(.*)", line) for line in _lines(content[: end.end() if end else 0]))
    fields = _unique(path, ((pair[1], pair[2].strip()) for pair in pairs if pair))
    if end is None or "NDims" not in fields:
        raise FileError(
            f"{path} is no readable MetaImage file, or it is truncated: no NDims and ElementDataFile; copy it again."
        )
    if fields["NDims"] not in ("3", "4"):
        _refuse_rank(path, fields.get("DimSize", ""))
    if not _true(fields.get("BinaryData", "False")):
        raise FileError(f"{path}: its voxels are written as text; save it as binary data.")
    name, compressed = fields["ElementDataFile"], _true(fields.get("CompressedData", "False"))
    attached, skip = name.upper() == "LOCAL", _whole(path, "HeaderSize", fields.get("HeaderSize", "0"))
    if skip and (attached or compressed or skip < -1):
        raise FileError(f"{path}: a HeaderSize of {skip} has no meaning here; save it as one plain MetaImage file.")
    big = fields.get("ElementByteOrderMSB", fields.get("BinaryDataByteOrderMSB", "False"))
    kept = [f"{field} = {_plain(path, field, fields[field])}" for field in METAIMAGE_FIELDS if field in fields]
    return TextHeader(
        "\n".join([*kept, "ElementDataFile = LOCAL", ""]),
        _shape(path, fields.get("DimSize", ""), int(fields["NDims"])),
        path if attached else _beside(path, name),
        end.end() if attached else max(skip, 0),
        0,
        "zlib" if compressed else "raw",
        not _true(big),
        at_end=skip == -1,
    )


def _content(path: Path) -> bytes:
    """As much of a file as a header may fill."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror}).") from error
    if not content:
        raise FileError(f"{path} is truncated: it is empty; copy it again.")
    return content


def _lines(content: bytes) -> list[str]:
    return [line.rstrip("\r") for line in content.decode("utf-8", "surrogateescape").split("\n")]


def _nrrd_field(path: Path, line: str) -> tuple[str, str]:
    """Name and value; a damaged name may have been that of the origin."""
    if not NRRD_LINE.fullmatch(line):
        raise FileError(f"{path}: its header has a line that is no field of NRRD, {_shown(line)}; copy it again.")
    name, value = line.split(": ", 1)
    return name.lower(), value.strip()


def _unique(path: Path, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The fields of a header; a reader must not choose which of two it believes."""
    fields: dict[str, str] = {}
    for key, value in pairs:
        if key in fields:
            raise FileError(f"{path}: its header says {_shown(key)} twice; mend the header.")
        fields[key] = value
    return fields


def _plain(path: Path, field: str, value: str) -> str:
    """A value that no reader's buffer is too short for."""
    if not re.fullmatch("[ -~]{1,400}", value):
        raise FileError(f"{path}: wanted a short plain text for {field}, got {_shown(value)}; mend the header.")
    return value


def _shown(value: str | None) -> str:
    """A value in a message."""
    return "nothing" if value is None else ascii(value[:40])


def _require_space(path: Path, space: str, directions: str) -> None:
    """ITK takes any other space, or none, for LPS; and vectors of any length."""
    if space.lower() not in map(str.lower, SPACES) or directions.count("(") != 3:
        raise GeometryError(
            f"{path}: its header does not say where the patient lies (space {_shown(space)}, space directions "
            f"{_shown(directions)}); wanted three directions in one of {', '.join(SPACES[:3])}."
        )


def _refuse_rank(path: Path, sizes: str) -> None:
    raise FileError(
        f"{path}: wanted one 3D volume, got sizes {_shown(sizes)}; split or convert it into 3D files of grey values."
    )


def _shape(path: Path, sizes: str, rank: int) -> tuple[int, ...]:
    if not re.fullmatch(rf"[0-9]{{1,10}}( +[0-9]{{1,10}}){{{rank - 1}}}", sizes):
        raise FileError(f"{path}: wanted {rank} sizes above zero, got {_shown(sizes)}; mend the header.")
    return tuple(map(int, sizes.split()))


def _whole(path: Path, field: str, value: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,15}", value):
        raise FileError(f"{path}: wanted a whole number for {field}, got {_shown(value)}; mend the header.")
    return int(value)


def _true(value: str) -> bool:
    return value[:1] in ("T", "t", "1")


def _beside(path: Path, name: str) -> Path:
    """The data file that a header names; links are the user's own, so only what the header says is looked at."""
    if re.match(r"LIST\b", name) or "%" in name or not name:
        raise FileError(f"{path}: its voxels lie in several files ({_shown(name)}); save it as one file.")
    ways = (PurePosixPath(name), PureWindowsPath(name))
    if any(way.is_absolute() or way.drive or way.root or ".." in way.parts for way in ways):
        raise FileError(
            f"{path}: its header points to voxels outside its folder ({_shown(name)}); put both files in one folder."
        )
    data = path.parent / name
    try:
        there = data.is_file()
    except OSError:  # a name too long
        there = False
    if not there:
        raise FileError(f"{path}: the file of its voxels, {_shown(name)}, is missing; put both files in one folder.")
    return data
