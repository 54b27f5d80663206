"""Volume files that are broken in every way the tests know, and what is said of them."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

VALUES = np.random.default_rng(0).normal(size=(6, 7, 8)).astype(np.float32)
Change = Callable[[bytes], bytes]


def nifti(data: np.ndarray, path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(data, np.diag([2.0, 2, 2, 1]), dtype=data.dtype), path)


def mgh(data: np.ndarray, path: Path) -> None:
    nibabel.save(nibabel.MGHImage(data, np.diag([2.0, 2, 2, 1])), path)


def itk(data: np.ndarray, path: Path) -> None:
    compressed = path.name.startswith("z")
    image = data if isinstance(data, sitk.Image) else sitk.GetImageFromArray(data.T, isVector=False)
    sitk.WriteImage(image, str(path), useCompression=compressed)


WRITERS: dict[str, Callable[[np.ndarray, Path], None]] = {
    "a.nii": nifti,
    "a.nii.gz": nifti,
    "a.mgh": mgh,
    "a.mgz": mgh,
    "a.nrrd": itk,
    "z.nrrd": itk,
    "a.nhdr": itk,
    "a.mha": itk,
    "z.mha": itk,
    "a.mhd": itk,
}
NAMES = list(WRITERS)
GZIPPED = ("a.nii.gz", "a.mgz")
TEXT = ("a.nrrd", "z.nrrd", "a.nhdr", "a.mha", "z.mha", "a.mhd")


def made(folder: Path, name: str, data: object = VALUES) -> Path:
    WRITERS[name](data, folder / name)
    return folder / name


def changed(path: Path, change: Change) -> Path:
    """Another content, within the compressed one where the whole file is."""
    content = path.read_bytes()
    whole = path.name in GZIPPED
    content = change(gzip.decompress(content) if whole else content)
    path.write_bytes(gzip.compress(content) if whole else content)
    return path


def put(place: int, data: bytes) -> Change:
    return lambda content: content[:place] + data + content[place + len(data) :]


def swap(pattern: str, new: str) -> Change:
    def change(content: bytes) -> bytes:
        result, number = re.subn(pattern.encode(), new.encode(), content, count=1, flags=re.MULTILINE)
        assert number == 1
        return result

    return change


def numbers(dtype: str, *values: float) -> bytes:
    return np.array(values, dtype).tobytes()


def sizes(*values: int) -> dict[str, Change]:
    """Other header dimensions, for each name."""
    text = " ".join(map(str, values))
    clipped = np.clip(values, -32768, 32767)
    return {
        **dict.fromkeys(("a.nii", "a.nii.gz"), put(42, numbers("<i2", *clipped))),
        **dict.fromkeys(("a.mgh", "a.mgz"), put(4, numbers(">i4", *values))),
        **dict.fromkeys(("a.nrrd", "z.nrrd", "a.nhdr"), swap("^sizes: .*$", f"sizes: {text}")),
        **dict.fromkeys(("a.mha", "z.mha", "a.mhd"), swap("^DimSize = .*$", f"DimSize = {text}")),
    }


def spacing(*values: float) -> dict[str, Change]:
    text = " ".join(map(str, values))
    x, y, z = values
    return {
        **dict.fromkeys(("a.nii", "a.nii.gz"), put(80, numbers("<f4", *values))),
        **dict.fromkeys(("a.mgh", "a.mgz"), put(30, numbers(">f4", *values))),
        **dict.fromkeys(
            ("a.nrrd", "z.nrrd", "a.nhdr"),
            swap("^space directions: .*$", f"space directions: ({x},0,0) (0,{y},0) (0,0,{z})"),
        ),
        **dict.fromkeys(("a.mha", "z.mha", "a.mhd"), swap("^ElementSpacing = .*$", f"ElementSpacing = {text}")),
    }


def with_value(value: float) -> np.ndarray:
    data = VALUES.copy()
    data[1, 2, 3] = value
    return data


def colours(path: Path) -> object:
    if path.name[2:5] == "nii":
        return np.zeros((6, 7, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    return sitk.GetImageFromArray(np.zeros((8, 7, 6, 3), np.uint8), isVector=True)


def complex_(path: Path) -> object:
    data = VALUES.astype(np.complex64)
    return data if path.name[2:5] == "nii" else sitk.GetImageFromArray(data.T)


def rank(dimensions: int) -> np.ndarray:
    return VALUES[..., 0] if dimensions == 2 else np.stack([VALUES, VALUES], axis=-1)


def links(folder: Path, name: str) -> Path:
    (folder / f"b{name}").symlink_to(folder / name)
    (folder / name).symlink_to(folder / f"b{name}")
    return folder / name


def kind_of(make: Callable[[Path], object]) -> Callable[[Path, str], Path]:
    return lambda folder, name: made(folder, name, make(folder / name))


def header_of(changes: dict[str, Change]) -> Callable[[Path, str], Path]:
    return lambda folder, name: changed(made(folder, name), changes[name])


def content_of(change: Change) -> Callable[[Path, str], Path]:
    """The file itself, not what is compressed in it."""

    def make(folder: Path, name: str) -> Path:
        path = made(folder, name)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def voxels_of(path: Path) -> Path:
    """The file that holds the voxels."""
    return next((place for place in path.parent.iterdir() if "raw" in place.suffixes[0]), path)


def voxel_file(change: Change) -> Callable[[Path, str], Path]:
    def make(folder: Path, name: str) -> Path:
        path = made(folder, name)
        data = voxels_of(path)
        data.write_bytes(change(data.read_bytes()))
        return path

    return make


def without_voxels(folder: Path, name: str) -> Path:
    path = made(folder, name)
    voxels_of(path).unlink()
    return path


def as_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def expanding(folder: Path, name: str) -> Path:
    return changed(made(folder, name), lambda content: content + bytes(80 << 20))


def garbage(content: bytes) -> bytes:
    return content + b"garbage" * 999


def broken_checksum(content: bytes) -> bytes:
    place = len(content) - (2 if content[:2] != b"\x1f\x8b" and content[:4] != b"NRRD" else 6)
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def pointing(way: str) -> dict[str, Change]:
    return {"a.nhdr": swap("^data file: .*$", f"data file: {way}"), "a.mhd": swap("a.raw", way)}


HUGE = "truncated: its header promises|there is no memory|too large"
BAD: dict[str, tuple[list[str], Callable[[Path, str], Path], str]] = {
    "missing": (NAMES, lambda folder, name: folder / name, "no such file"),
    "folder": (NAMES, as_folder, "a folder, though its name"),
    "link to itself": (NAMES, links, "symbolic links"),
    "name too long": (NAMES, lambda folder, name: folder / ("x" * 300 + name), "too long"),
    "NUL in its name": (NAMES, lambda folder, name: folder / f"a\0{name}", "null"),
    "empty": (NAMES, content_of(lambda content: b""), "empty"),
    "wrong magic": (NAMES, content_of(lambda content: b"hello" * 200), "no readable|as its name says"),
    "half a header": (NAMES, content_of(lambda content: content[:60]), "truncated|no readable|damaged|wanted"),
    "truncated": (NAMES, voxel_file(lambda content: content[: len(content) * 2 // 3]), "truncated"),
    "wrong checksum": ([*GZIPPED, "z.nrrd", "z.mha"], content_of(broken_checksum), "damaged"),
    "garbage behind gzip": ([*GZIPPED, "z.nrrd", "z.mha"], content_of(garbage), "damaged"),
    "garbage behind": (
        ["a.nii", "a.nrrd", "a.mha", "a.mhd"],
        voxel_file(garbage),
        "more voxels than the shape",
    ),
    "garbage within gzip": (["a.nii.gz"], header_of({"a.nii.gz": garbage}), "more voxels than the shape"),
    "expands without end": ([*GZIPPED], expanding, "more voxels than the shape"),
    "huge dimensions": (NAMES, header_of(sizes(30000, 30000, 30000)), HUGE),
    "dimensions beyond 64 bits": (["a.mgh", "a.mgz"], header_of(sizes(2**31 - 1, 2**31 - 1, 2**31 - 1)), HUGE),
    "more dimensions than fit": (list(TEXT), header_of(sizes(10**9, 10**9, 10**9)), HUGE),
    "one plane too many": (NAMES, header_of(sizes(6, 7, 9)), "truncated"),
    "negative dimension": (NAMES, header_of(sizes(6, -7, 8)), "wanted|negative|no readable"),
    "dimension of zero": (NAMES, header_of(sizes(6, 0, 8)), "wanted|no readable|damaged"),
    "spacing of zero": (NAMES, header_of(spacing(0.0, 2.0, 2.0)), "spacing|singular|damaged"),
    "negative spacing": (
        [name for name in NAMES if "nrrd" not in name and "nhdr" not in name],  # a NRRD has directions alone
        header_of(spacing(2.0, -2.0, 2.0)),
        "zero, negative or broken spacing",
    ),
    "spacing NaN": (NAMES, header_of(spacing(float("nan"), 2.0, 2.0)), "spacing|damaged|finite"),
    "NaN": (NAMES, kind_of(lambda path: with_value(np.nan)), "1 of 336 voxels are NaN"),
    "infinite": (NAMES, kind_of(lambda path: with_value(-np.inf)), "1 of 336 voxels are NaN"),
    "beyond float32": (
        ["a.nii", "a.nii.gz", *TEXT],
        kind_of(lambda path: with_value(0).astype(np.float64) + np.eye(7, 8) * 1e300),
        "42 of 336 voxels are NaN",
    ),
    "complex": (["a.nii", "a.nii.gz", *TEXT], kind_of(complex_), "one real number|one 3D volume"),
    "colours": (["a.nii", "a.nii.gz", *TEXT], kind_of(colours), "one real number|one 3D volume"),
    "2D": (["a.nii", "a.nii.gz", *TEXT], kind_of(lambda path: rank(2)), "one 3D volume"),
    "4D": (NAMES, kind_of(lambda path: rank(4)), "one 3D volume"),
    "unknown version": (
        ["a.mgh", "a.mgz"],
        header_of(dict.fromkeys((*GZIPPED, "a.mgh"), put(0, b"\0\0\0\7"))),
        "no readable",
    ),
    "unknown type": (
        ["a.mgh", "a.mgz"],
        header_of(dict.fromkeys((*GZIPPED, "a.mgh"), put(20, b"\0\0\0\7"))),
        "no readable",
    ),
    "unknown space": (
        ["a.nrrd", "a.nhdr"],
        header_of(dict.fromkeys(("a.nrrd", "a.nhdr"), swap("left-posterior-superior", "scanner-xyz"))),
        "where the patient lies",
    ),
    "unknown encoding": (
        ["a.nrrd", "a.nhdr"],
        header_of(dict.fromkeys(("a.nrrd", "a.nhdr"), swap("encoding: raw", "encoding: bzip2"))),
        "encoding raw or gzip",
    ),
    "voxels as text": (["a.mha"], header_of({"a.mha": swap("BinaryData = True", "BinaryData = False")}), "binary"),
    "a field twice": (["a.mha"], header_of({"a.mha": swap("^NDims = 3", "NDims = 3\nNDims = 3")}), "twice"),
    "voxels missing": (["a.nhdr", "a.mhd"], without_voxels, "is missing"),
    "voxels in a folder above": (["a.nhdr", "a.mhd"], header_of(pointing("../a.raw")), "outside its folder"),
    "voxels at a root": (["a.nhdr", "a.mhd"], header_of(pointing("/a.raw")), "outside its folder"),
    "voxels in many files": (["a.nhdr", "a.mhd"], header_of(pointing("LIST")), "several files"),
}
