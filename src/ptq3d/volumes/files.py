"""Volumes from and to files: one row in `FORMATS` for each kind of file."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, GeometryError, IntensityError, LabelError, ShapeError
from ptq3d.volumes.volume import Affine, Grid, Volume, valid_affine

if TYPE_CHECKING:
    import nibabel

Voxels: TypeAlias = tuple[NDArray[Any], Affine]
"""An array in the file's own rank and dtype (scaled to the file's unit), and its affine (4, 4) voxel -> RAS+ mm."""

LARGEST_LABEL = int(np.iinfo(np.uint16).max)


@dataclass(frozen=True)
class Format:
    """How files of one kind are read and written.

    Attributes:
        read: path -> array and affine; raises FileError or GeometryError.
        grid: path -> shape and affine from the header alone; raises as `read`.
        write: (path, voxels (X, Y, Z), affine) -> the file; raises OSError.
    """

    read: Callable[[Path], Voxels]
    grid: Callable[[Path], tuple[tuple[int, ...], Affine]]
    write: Callable[[Path, NDArray[Any], Affine], None]


def load_image(path: Path) -> Volume:
    """The image in a file, in the file's unit (CT: HU), on the grid nibabel gives it (sform before qform).

    Args:
        path: a file of one of `FORMATS`; 3D, or 4D with a single volume.

    Returns:
        (1, X, Y, Z) float32.

    Raises:
        FileError: missing, unreadable, truncated, of an unknown kind, or not one 3D volume of real numbers.
        GeometryError: singular affine or zero spacing.
        IntensityError: NaN or infinite voxels.
    """
    data, affine = _read(path)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused below
        voxels = data.astype(np.float32)
    finite = np.isfinite(voxels)
    if not finite.all():
        raise IntensityError(
            f"{path}: {finite.size - np.count_nonzero(finite)} of {finite.size} voxels are NaN, infinite or beyond "
            "float32; replace them (for example with the value of air) and save the file again."
        )
    return _volume(path, voxels, affine)


def load_grid(path: Path) -> Grid:
    """Where the voxels of a file lie, from its header alone.

    Raises:
        FileError: missing, unreadable, of an unknown kind, or not one 3D volume.
        GeometryError: singular affine or zero spacing.
    """
    path = _require_file(path)
    shape, affine = FORMATS[_suffix(path)].grid(path)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or 0 in shape:
        raise FileError(f"{path}: wanted one 3D volume, got shape {shape}; split or stack it into 3D files first.")
    x, y, z = shape
    return (x, y, z), valid_affine(affine)


def load_labels(path: Path) -> Volume:
    """The label map in a file, on the grid nibabel gives it.

    Args:
        path: a file of one of `FORMATS`, whole numbers 0..65535 in any dtype.

    Returns:
        (1, X, Y, Z) uint8, or uint16 where a value is above 255.

    Raises:
        FileError: as `load_image`.
        GeometryError: as `load_image`.
        LabelError: values that are not whole numbers in 0..65535.
    """
    data, affine = _read(path)
    low, high = data.min(), data.max()
    if not (low >= 0 and high <= LARGEST_LABEL):  # NaN fails both
        raise LabelError(f"{path}: labels must be whole numbers in 0..{LARGEST_LABEL}, got values {low}..{high}.")
    labels = data.astype(_smallest_dtype(int(high)))
    if data.dtype.kind == "f":
        broken = np.count_nonzero(data != labels)
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
    partial = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}.") from error
    try:
        FORMATS[suffix].write(partial, labels.data[0].astype(_smallest_dtype(high), copy=False), labels.affine)
        partial.replace(path)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def is_volume(path: Path) -> bool:
    """Whether a path is a visible file whose name says that `load_image` reads it."""
    name = Path(path).name
    return not name.startswith(".") and volume_suffix(name) is not None and Path(path).is_file()


def volume_suffix(name: str) -> str | None:
    """The ending of a file name that stands in `FORMATS` (".nii.gz" of "Scan.NII.GZ"), or None."""
    return next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), None)


def _suffix(path: Path) -> str:
    suffix = volume_suffix(Path(path).name)
    if suffix is None:
        raise FileError(f"{path}: a volume must end in one of {', '.join(FORMATS)}; convert it first.")
    return suffix


def _require_file(path: Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; give a volume file.")
    return path


def _read(path: Path) -> Voxels:
    """The single 3D array of real numbers in a file, and its affine."""
    path = _require_file(path)
    data, affine = FORMATS[_suffix(path)].read(path)
    shape = data.shape
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3 or data.size == 0:
        raise FileError(f"{path}: wanted one 3D volume, got shape {shape}; split or stack it into 3D files first.")
    return data, affine


def _volume(path: Path, voxels: NDArray[Any], affine: Affine) -> Volume:
    try:
        return Volume(voxels[None], affine)
    except GeometryError as error:
        raise GeometryError(f"{path}: {error}") from error


def _smallest_dtype(high: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if high <= np.iinfo(np.uint8).max else np.uint16


def read_nifti(path: Path) -> Voxels:
    """NIfTI-1 and NIfTI-2 through nibabel, intensities scaled by the header's slope and intercept.

    Raises:
        FileError: nibabel cannot read it, it ends before its last voxel, or its checksum is wrong.
        GeometryError: the header gives a voxel size of zero, which nibabel would quietly take for 1 mm.
    """
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)  # to its end, where the checksum is: nibabel stops at the last voxel
        kind = _nifti_kind(content)
        _require_voxel_sizes(path, kind.header_class.from_fileobj(BytesIO(content), check=False))
        image = kind.from_bytes(content)
        _require_voxels(path, image.header, len(content))
        return np.asanyarray(image.dataobj), image.affine
    except (
        ImageFileError,
        HeaderDataError,
        WrapStructError,
        EOFError,
        OSError,
        OverflowError,
        ValueError,
        zlib.error,
    ) as error:
        raise FileError(
            f"{path} is no readable NIfTI file, or it is truncated ({type(error).__name__}: {error}); copy it again."
        ) from error


def _nifti_kind(content: bytes) -> Any:
    """The nibabel class of a file that starts like this."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    kinds = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    kind = next((kind for kind in kinds if kind.header_class.may_contain_header(content)), None)
    if kind is None:
        raise ImageFileError(f"no NIfTI header in its first {len(content[:540])} bytes")
    return kind


def read_nifti_grid(path: Path) -> tuple[tuple[int, ...], Affine]:
    """Shape and affine of NIfTI-1 and NIfTI-2.

    Raises:
        FileError: nibabel cannot read its header.
        GeometryError: a voxel size of zero.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            start = file.read(540)
        _require_voxel_sizes(path, _nifti_kind(start).header_class.from_fileobj(BytesIO(start), check=False))
        image = nibabel.load(path)
        return tuple(map(int, image.shape)), image.affine
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error) as error:
        raise FileError(
            f"{path} is no readable NIfTI file ({type(error).__name__}: {error}); copy it again."
        ) from error


def _require_voxel_sizes(path: Path, header: nibabel.Nifti1Header) -> None:
    """Look at the header as it is on disk: nibabel mends a zero to 1 while loading."""
    rank = min(3, int(header["dim"][0]))
    sizes = header["pixdim"][1 : 1 + rank]
    if not (np.isfinite(sizes) & (sizes != 0)).all():
        raise GeometryError(f"{path}: zero or broken spacing {sizes.tolist()} mm in its header; mend the header.")


def _require_voxels(path: Path, header: nibabel.Nifti1Header, size: int) -> None:
    """Real numbers, and as many as the header promises: nibabel would allocate them before it looks."""
    dtype = header.get_data_dtype()
    if dtype.kind not in "fiu":
        raise FileError(f"{path}: wanted one real number for each voxel, got {dtype}; convert it to grey values.")
    wanted = int(header.get_data_offset()) + math.prod(map(int, header.get_data_shape())) * dtype.itemsize
    if size < wanted:
        raise FileError(f"{path} is truncated: its header promises {wanted} bytes, got {size}; copy it again.")


def write_nifti(path: Path, voxels: NDArray[Any], affine: Affine) -> None:
    """NIfTI-1 in mm with slope 1, intercept 0; sform and qform both say scanner space.

    Args:
        path: .nii or .nii.gz; written in place, so give a temporary name and rename it.
        voxels: (X, Y, Z) in the dtype to store.
        affine: (4, 4) voxel -> RAS+ mm. Sheared axes cannot stand in a qform: its code is then 0 (not to be used).

    Raises:
        OSError: the file cannot be written.
    """
    import nibabel

    image = nibabel.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_qform(affine, code=1)
    if not np.allclose(image.get_qform(), affine, rtol=1e-3, atol=1e-3):
        image.set_qform(affine, code=0)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


FORMATS: dict[str, Format] = {
    ".nii.gz": Format(read_nifti, read_nifti_grid, write_nifti),
    ".nii": Format(read_nifti, read_nifti_grid, write_nifti),
}
"""Kinds of files by the end of their name. Open: a new kind is two functions and one row."""
