"""What DICOM SEG and RTSTRUCT have in common: whose image it is, which classes occur, and a file that appears whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, GeometryError, LabelError, ShapeError
from ptq3d.volumes.dicom import series_stack
from ptq3d.volumes.dicom_geometry import TO_RAS, Stack
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import SAME_GRID_VOXELS, Volume, grid_distance

if TYPE_CHECKING:
    from ptq3d.volumes.dicom_files import Header

NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
"""What a result must say of patient and study, empty where the source does not."""
MANUFACTURER = "ptq3d"
UTF8 = "ISO_IR 192"
RESULT_NUMBERS = 1000  # series numbers of results follow their source's by this much


def source_stack(series: Series, labels: Volume, what: str) -> Stack:
    """The slices that a result refers to, once it is sure that the labels lie on them.

    Args:
        series: the source.
        labels: (1, X, Y, Z) unsigned integers.
        what: names the result in errors.

    Raises:
        ShapeError: not one channel of unsigned integers.
        GeometryError: the labels lie elsewhere.
        FileError: the source cannot be read, or lacks the identifiers that a result must name.
    """
    if labels.data.shape[0] != 1 or labels.data.dtype.kind != "u":
        raise ShapeError(
            f"{what}: labels to save must be (1, X, Y, Z) unsigned integers, "
            f"got {labels.data.shape} {labels.data.dtype}."
        )
    stack = series_stack(series)
    shape, affine = stack.grid
    if labels.shape != shape or grid_distance(affine, labels.affine, shape) > SAME_GRID_VOXELS:
        raise GeometryError(
            f"{what}: the labels ({labels.shape} voxels) do not lie on the slices of {series} ({shape} voxels); "
            "resample them onto its grid."
        )
    for part in stack.slices:
        missing = [keyword for keyword in NEEDED if not part.header.get(keyword)]
        if missing:
            raise FileError(
                f"{part.where} has no {missing[0]}, which a DICOM result must name; write the labels as NIfTI instead."
            )
        _complete(part.header, float(affine[:3, 2] @ TO_RAS[:3, :3] @ part.normal))
    return stack


def _complete(header: Header, step_mm: float) -> None:
    for keyword in COPIED:
        if keyword not in header:
            setattr(header, keyword, "")
    if not header.get("SliceThickness"):
        header.SliceThickness = step_mm


def classes_in(voxels: NDArray[Any], names: Sequence[str], what: str) -> list[int]:
    """The classes that occur, without background.

    Args:
        voxels: (X, Y, Z) unsigned integers.
        names: of all classes, background first.
        what: names the result in errors.

    Raises:
        LabelError: a value without a name.
    """
    found = sorted({int(value) for plane in voxels.T for value in np.unique(plane)} - {0})
    if found and found[-1] >= len(names):
        raise LabelError(
            f"{what}: label {found[-1]} has no name, there are {len(names)} classes; give a name for each."
        )
    return found


def result_number(header: Header) -> int:
    """The series number of a result."""
    number = header.get("SeriesNumber")
    return RESULT_NUMBERS + (int(number) if number else 0)
