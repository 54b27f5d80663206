"""NIfTI-1 and NIfTI-2 in one file, .nii and .nii.gz: headers through nibabel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, GeometryError, line_of
from ptq3d.volumes.streams import Layout, read_start
from ptq3d.volumes.volume import Affine

HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348


def nifti_header(path: Path) -> tuple[Layout, Affine]:
    """Where the voxels of a NIfTI file lie, scaled by slope and intercept, on the grid nibabel gives it.

    The affine is the sform where its code is above 0, or else the qform, or else spacings around the centre. A slope of 0 or NaN
    means no scaling.

    Raises:
        FileError: nibabel cannot read the header, or the voxels are not real numbers.
        GeometryError: a voxel size of zero, which nibabel would quietly take for 1 mm, or below zero.
    """
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    gzipped = path.name.lower().endswith(".gz")
    start = read_start(path, HEADER_BYTES, gzipped=gzipped)
    kind = _kind(path, start)
    start = start[: kind.template_dtype.itemsize]
    try:
        _require_sound(path, kind(start, check=False))
        header = kind(start)
        slope, intercept = header.get_slope_inter()
        layout = Layout(
            tuple(map(int, header.get_data_shape())),
            header.get_data_dtype(),
            path,
            int(header.get_data_offset()),
            "gzip" if gzipped else "raw",
            slope=1.0 if slope is None else slope,
            intercept=0.0 if intercept is None else intercept,
        )
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity in a matrix are refused as such
            return layout, header.get_best_affine()
    except (HeaderDataError, WrapStructError, OverflowError, ValueError) as error:
        raise FileError(f"{path} is no readable NIfTI file ({line_of(error)}); copy it again.") from error


def _kind(path: Path, start: bytes) -> Any:
    """The nibabel class of a header that starts like this."""
    import nibabel

    kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    kind = next((kind for kind in kinds if kind.may_contain_header(start)), None)
    if kind is None:
        raise FileError(
            f"{path} is no readable NIfTI file, or it is truncated: no NIfTI header in its first {len(start)} bytes."
        )
    if len(start) < kind.template_dtype.itemsize:
        raise FileError(f"{path} is truncated: it ends within its header; copy it again.")
    return kind


def _require_sound(path: Path, header: Any) -> None:
    """Look at the header as it is on disk: nibabel mends a zero to 1, and a minus sign to none, while loading."""
    if header["magic"].item() == header.pair_magic:
        raise FileError(f"{path} is the header of a pair .hdr and .img; save both as one .nii or .nii.gz file.")
    rank = min(3, int(header["dim"][0]))
    sizes = header["pixdim"][1 : 1 + rank]
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise GeometryError(
            f"{path}: zero, negative or broken spacing {sizes.tolist()} mm in its header; mend the header."
        )


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
