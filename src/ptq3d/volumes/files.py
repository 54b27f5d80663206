"""Volumes from and to files: one row in `FORMATS` for each kind of file, and DICOM series beside them."""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, GeometryError, IntensityError, LabelError, ShapeError
from ptq3d.volumes.itk import metaimage, nrrd, write_itk
from ptq3d.volumes.mgh import mgh_header, write_mgh
from ptq3d.volumes.nifti import nifti_header, write_nifti
from ptq3d.volumes.source import Series, Source
from ptq3d.volumes.streams import PIECE_BYTES, Layout, read_voxels
from ptq3d.volumes.volume import Affine, Grid, Volume, valid_affine
from ptq3d.volumes.whole import written_whole

LARGEST_LABEL = int(np.iinfo(np.uint16).max)


@dataclass(frozen=True)
class Format:
    """How files of one kind are read and written.

    Attributes:
        header: path -> where the voxels lie in the file, and affine; raises FileError or GeometryError.
        write: (path, voxels (X, Y, Z), affine) -> the file, whole in one; raises OSError. None: files of this kind are only read.
    """

    header: Callable[[Path], tuple[Layout, Affine]]
    write: Callable[[Path, NDArray[Any], Affine], None] | None = None


FORMATS: dict[str, Format] = {
    ".nii.gz": Format(nifti_header, write_nifti),
    ".nii": Format(nifti_header, write_nifti),
    ".nrrd": Format(nrrd, write_itk),
    ".nhdr": Format(nrrd),
    ".mha": Format(metaimage, write_itk),
    ".mhd": Format(metaimage),
    ".mgz": Format(mgh_header, write_mgh),
    ".mgh": Format(mgh_header, write_mgh),
}
"""Kinds of files by the end of their name. Open: a new kind is one or two functions and one row."""


def load_image(source: Source, *, channels: int = 1) -> Volume:
    """The image of a file or a DICOM series, in the file's unit (CT: HU), on the grid its header gives it.

    Memory holds the result and a few MB, whatever the stored type and compression.

    Args:
        source: a file of one of `FORMATS`, 3D or 4D; a series; or a folder, .zip or .dcm file of one series.
        channels: volumes that a 4D file must hold.

    Returns:
        (C, X, Y, Z) float32.

    Raises:
        FileError: missing, unreadable, truncated, of an unknown kind, or not as many 3D volumes of real numbers.
        GeometryError: singular affine, zero spacing, or slices that make no grid.
        IntensityError: NaN or infinite voxels.
    """
    found = _resolved(source)
    if isinstance(found, Series):
        from ptq3d.volumes.dicom import read_series

        voxels, affine = read_series(found)
    else:
        voxels, affine = _read(Path(found), np.float32, channels)
    broken = sum(np.count_nonzero(~np.isfinite(slab)) for slab in _slabs(voxels))
    if broken:
        raise IntensityError(
            f"{source}: {broken} of {voxels.size} voxels are NaN, infinite or beyond float32; replace them (for example with "
            "the value of air) and save the file again."
        )
    return _volume(source, voxels, affine)


def load_grid(source: Source, *, channels: int = 1) -> Grid:
    """Where the voxels of a file or a DICOM series lie, from headers alone.

    Args:
        source: see `load_image`.
        channels: see `load_image`.

    Raises:
        FileError: missing, unreadable, of an unknown kind, or not one 3D volume.
        GeometryError: singular affine, zero spacing, or slices that make no grid.
    """
    found = _resolved(source)
    if isinstance(found, Series):
        from ptq3d.volumes.dicom import series_grid

        (x, y, z), affine = series_grid(found)
    else:
        layout, affine = _header(Path(found), channels)
        x, y, z = layout.shape[:3]
    try:
        return (x, y, z), valid_affine(affine)
    except GeometryError as error:
        raise GeometryError(f"{source}: {error}") from error


def load_labels(source: Source) -> Volume:
    """The label map in a file, on the grid its header gives it.

    Args:
        source: a file of one of `FORMATS`, whole numbers 0..65535 in any dtype.

    Returns:
        (1, X, Y, Z) uint8, or uint16 where a value is above 255.

    Raises:
        FileError: as `load_image`; or DICOM, whose segmentations are written but not read.
        GeometryError: as `load_image`.
        LabelError: values that are not whole numbers in 0..65535.
    """
    if isinstance(source, Series) or is_dicom(source):
        raise FileError(f"{source}: labels are not read from DICOM; convert them to one of {', '.join(FORMATS)}.")
    path = Path(source)
    data, affine = _read(path, None, 1)
    low, high = data.min(), data.max()
    if not (low >= 0 and high <= LARGEST_LABEL):  # NaN fails both
        raise LabelError(f"{path}: labels must be whole numbers in 0..{LARGEST_LABEL}, got values {low}..{high}.")
    labels = data.astype(_smallest_dtype(int(high)), copy=False)
    if data.dtype.kind == "f":
        broken = sum(np.count_nonzero(a != b) for a, b in zip(_slabs(data), _slabs(labels), strict=True))
        if broken:
            raise LabelError(
                f"{path}: {broken} of {data.size} label values are not whole numbers (was the label map resampled "
                "with linear interpolation, or is this an image?)."
            )
    return _volume(path, labels, affine)


def save_labels(path: Path, labels: Volume) -> None:
    """Write a label map in the smallest unsigned type that holds it; the file appears whole or not at all.

    Args:
        path: ends in one of `FORMATS`; its folder is made if missing, an older file is replaced.
        labels: (1, X, Y, Z) unsigned integers.

    Raises:
        FileError: an unknown kind of file, or it cannot be written.
        ShapeError: not one channel of unsigned integers.
        LabelError: a value above 65535.
    """
    path = Path(path)
    if labels.data.shape[0] != 1 or labels.data.dtype.kind != "u":
        raise ShapeError(
            f"{path}: labels to save must be (1, X, Y, Z) unsigned integers, "
            f"got {labels.data.shape} {labels.data.dtype}."
        )
    high = int(labels.data.max())
    if high > LARGEST_LABEL:
        raise LabelError(f"{path}: labels above {LARGEST_LABEL} do not fit a label map, got {high}.")
    suffix = _suffix(path)
    write = FORMATS[suffix].write
    if write is None:
        kinds = ", ".join(kind for kind, row in FORMATS.items() if row.write)
        raise FileError(f"{path}: files ending in {suffix} are only read; save labels as one of {kinds}.")
    with written_whole(path, suffix) as partial:
        write(partial, labels.data[0].astype(_smallest_dtype(high), copy=False), labels.affine)


def is_volume(path: Path) -> bool:
    """Whether a path is a visible file whose name says that `load_image` reads it."""
    name = Path(path).name
    return not name.startswith(".") and volume_suffix(name) is not None and Path(path).is_file()


def volume_suffix(name: str) -> str | None:
    """The ending of a file name that stands in `FORMATS` (".nii.gz" of "Scan.NII.GZ"), or None."""
    return next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), None)


def _suffix(path: Path) -> str:
    suffix = volume_suffix(path.name)
    if suffix is None and path.suffix.lower() in (".hdr", ".img"):
        raise FileError(f"{path}: one file of a pair .hdr and .img; save both as one .nii or .nii.gz file.")
    if suffix is None:
        raise FileError(f"{path}: a volume must end in one of {', '.join(FORMATS)}; convert it first.")
    return suffix


def is_dicom(source: Source) -> bool:
    """Whether a source is a series, or may hold one: a .zip or .dcm file, or a folder whose name is not that of a volume.

    Raises:
        FileError: there is nothing.
    """
    if isinstance(source, Series):
        return True
    path = Path(source)
    folder = stat.S_ISDIR(_mode(path))
    return volume_suffix(path.name) is None and (folder or path.suffix.lower() in (".dcm", ".zip"))


def _resolved(source: Source) -> Source:
    """The DICOM series that a source is, or the path of a file of one of `FORMATS`."""
    if isinstance(source, Series) or not is_dicom(source):
        return source
    from ptq3d.volumes.dicom import only_series

    return only_series(Path(source))


def _mode(path: Path) -> int:
    """What kind of thing lies at a path."""
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file; give a volume file.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileError(f"{path}: cannot be found ({reason}); give a volume file.") from error


def _header(path: Path, channels: int) -> tuple[Layout, Affine]:
    """The layout of an array (X, Y, Z) of real numbers, of several channels (X, Y, Z, C), and its affine."""
    mode = _mode(path)
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise FileError(f"{path}: {what}, though its name is that of a volume file; give a file, or rename it.")
    layout, affine = FORMATS[_suffix(path)].header(path)
    shape = (*layout.shape[:3], *(size for size in layout.shape[3:] if size != 1))
    if len(shape) < 3 or shape[3:] != ((channels,) if channels > 1 else ()) or min(shape) < 1:
        wanted = "one 3D volume" if channels == 1 else f"{channels} 3D volumes"
        raise FileError(f"{path}: wanted {wanted}, got shape {layout.shape}; split or stack it into 3D files first.")
    if layout.dtype.kind not in "fiu":
        raise FileError(
            f"{path}: wanted one real number for each voxel, got {layout.dtype}; convert it to grey values."
        )
    return replace(layout, shape=shape), affine


def _read(path: Path, dtype: type[np.float32] | None, channels: int) -> tuple[NDArray[Any], Affine]:
    layout, affine = _header(path, channels)
    return read_voxels(path, layout, dtype), affine


def _slabs(voxels: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Views of a few planes each, so that what is computed of them stays small."""
    planes = max(1, PIECE_BYTES // (math.prod(voxels.shape[:-1]) * voxels.itemsize))
    return (voxels[..., first : first + planes] for first in range(0, voxels.shape[-1], planes))


def _volume(source: Source, voxels: NDArray[Any], affine: Affine) -> Volume:
    try:
        return Volume(voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0), affine)
    except GeometryError as error:
        raise GeometryError(f"{source}: {error}") from error


def _smallest_dtype(high: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if high <= np.iinfo(np.uint8).max else np.uint16
