"""FreeSurfer's MGH, plain (.mgh) and compressed (.mgz): headers through nibabel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, GeometryError, line_of
from ptq3d.volumes.streams import Layout, read_start
from ptq3d.volumes.volume import Affine

GOOD_RAS_FLAG = slice(28, 30)
FOOTER_BYTES = 64 << 20  # transforms, colour tables and command lines may follow the voxels


def mgh_header(path: Path) -> tuple[Layout, Affine]:
    """Where the voxels of an MGH file lie, and their affine.

    Raises:
        FileError: nibabel cannot read the header.
        GeometryError: its goodRASFlag says that it knows no place (nibabel would take a coronal grid of 1 mm without a word), or a
            spacing of zero or below.
    """
    from nibabel.freesurfer.mghformat import DATA_OFFSET, MGHError, MGHHeader
    from nibabel.spatialimages import HeaderDataError

    gzipped = path.suffix.lower() == ".mgz"
    start = read_start(path, DATA_OFFSET, gzipped=gzipped)
    if len(start) < DATA_OFFSET:
        raise FileError(f"{path} is truncated: it ends within its header; copy it again.")
    try:
        header = MGHHeader(start)
        layout = Layout(
            tuple(map(int, header.get_data_shape())),
            header.get_data_dtype(),
            path,
            int(header.get_data_offset()),
            "gzip" if gzipped else "raw",
            tail=FOOTER_BYTES,
        )
    except (HeaderDataError, MGHError, KeyError, ValueError) as error:
        raise FileError(f"{path} is no readable MGH file ({line_of(error)}); copy it again.") from error
    flag = int.from_bytes(start[GOOD_RAS_FLAG], "big", signed=True)  # as it is on disk: nibabel mends it
    if flag != 1:
        raise GeometryError(
            f"{path}: its header does not say where the patient lies (goodRASFlag {flag}); convert the original again."
        )
    spacing = header["delta"]
    if not (spacing > 0).all():
        raise GeometryError(
            f"{path}: zero, negative or broken spacing {spacing.tolist()} mm in its header; mend the header."
        )
    with np.errstate(all="ignore"):  # numbers beyond float32 become infinite, and are refused as such
        return layout, header.get_affine()


def write_mgh(path: Path, voxels: NDArray[Any], affine: Affine) -> None:
    """MGH in the smallest type it has for the voxels.

    Args:
        path: .mgh or .mgz; written in place, so give a temporary name and rename it.
        voxels: (X, Y, Z) uint8 or uint16.
        affine: (4, 4) voxel -> RAS+ mm, stored as float32.

    Raises:
        OSError: the file cannot be written.
    """
    import nibabel

    nibabel.save(nibabel.MGHImage(voxels, affine), path)
