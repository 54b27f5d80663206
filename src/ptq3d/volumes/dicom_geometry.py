"""Where the slices of a series lie, from their headers alone, and whether they make one volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, GeometryError, clipped, numbered
from ptq3d.volumes.volume import SAME_GRID_VOXELS, Affine, Grid, valid_affine

if TYPE_CHECKING:
    from ptq3d.volumes.dicom_files import Header

TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts towards left and posterior
SAME_COSINE = 1e-4
ROUNDED_COSINE = 1e-3  # headers give as few as three digits
SAME_SPACING = 1e-4  # relative
SAME_PLACE_MM = 1e-3
WHOLE_GAP = 0.25  # a gap this close to a multiple of the step is a missing slice, else the spacing is uneven
NAMED_GAPS = 3

KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "SeriesNumber",
    "SeriesDescription",
    "AcquisitionNumber",
    "InstanceNumber",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "TriggerTime",
    "AcquisitionTime",
    "ContentTime",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "BitsAllocated",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
"""What is read of each file to find series and to place their slices."""

TELLING = (
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "AcquisitionNumber",
    "TriggerTime",
    "AcquisitionTime",
    "ContentTime",
    "InstanceNumber",
    "SOPInstanceUID",
)
"""By what slices at one place usually differ."""

GROUPS = {
    "ImagePositionPatient": ("PlanePositionSequence", 3),
    "ImageOrientationPatient": ("PlaneOrientationSequence", 6),
    "PixelSpacing": ("PixelMeasuresSequence", 2),
    "RescaleSlope": ("PixelValueTransformationSequence", 1),
    "RescaleIntercept": ("PixelValueTransformationSequence", 1),
}
"""The functional group that holds an attribute in a multi-frame file, and how many numbers it has."""


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice: a file, or a frame of a multi-frame file.

    Attributes:
        header: the attributes of its file.
        where: how an error names the file.
        member: the file, relative to the series' place.
        frame: its number in the file, from 0.
        position: (3,) mm, left-posterior-superior, of the centre of its first pixel.
        orientation: (2, 3) the directions of growing column and of growing row.
        spacing: (2,) mm between columns and between rows.
        slope: stored value -> HU (or the modality's unit).
        intercept: likewise.
    """

    header: Header
    where: str
    member: str
    frame: int
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: NDArray[np.float64]
    slope: float
    intercept: float

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return int(self.header.Columns), int(self.header.Rows)

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3,) the direction across the slice."""
        return np.cross(self.orientation[0], self.orientation[1])


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of a volume in order, and the affine of their voxels.

    Attributes:
        slices: at least 2, sorted along their normal.
        affine: (4, 4) voxel (column, row, slice) -> RAS+ mm.
        tilt_degrees: the angle between the slices' normal and the line through their first voxels.
    """

    slices: tuple[Slice, ...]
    affine: Affine
    tilt_degrees: float

    @property
    def grid(self) -> Grid:
        """Shape (X, Y, Z) = columns, rows, slices; and the affine."""
        return (*self.slices[0].size, len(self.slices)), self.affine


def slices_of(header: Header, where: str, member: str) -> list[Slice]:
    """The slices of one file.

    Raises:
        FileError: no grey image, without a size, position, orientation or pixel spacing, or with one that is no number.
        GeometryError: a pixel spacing that is not above zero, directions that are not at right angles.
    """
    _require_grey(header, where)
    count = int(_numbers(header.get("NumberOfFrames") or 1, 1, f"{where}: NumberOfFrames")[0])
    if "PerFrameFunctionalGroupsSequence" in header:
        groups = len(header.PerFrameFunctionalGroupsSequence)
        if groups != count:
            raise FileError(f"{where} is broken: {count} frames but places of {groups}; copy it again.")
    elif count != 1:
        raise FileError(
            f"{where} has {count} frames but does not say where each lies (no functional groups); "
            "export it as single slices or as an enhanced multi-frame image."
        )
    return [_slice(header, where, member, frame) for frame in range(count)]


def _require_grey(header: Header, where: str) -> None:
    colours = header.get("PhotometricInterpretation", "MONOCHROME2")
    samples = header.get("SamplesPerPixel", 1)
    if samples != 1 or not str(colours).startswith("MONOCHROME"):
        raise FileError(
            f"{where} is a colour image ({clipped(samples)} samples, {clipped(colours)}); wanted grey values."
        )
    if header.get("ModalityLUTSequence"):
        raise FileError(f"{where} maps its values by a table (Modality LUT); export it with a rescale slope instead.")
    for keyword in ("Rows", "Columns"):
        value = header.get(keyword)
        if not isinstance(value, int) or value < 1:
            raise FileError(
                f"{where} has {keyword} {clipped(value)}, wanted at least 1; it is truncated or broken, copy it again."
            )


def _slice(header: Header, where: str, member: str, frame: int) -> Slice:
    orientation = _of_frame(header, frame, "ImageOrientationPatient", where).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=2 * ROUNDED_COSINE):
        raise GeometryError(
            f"{where}: ImageOrientationPatient {orientation.ravel().tolist()} is not two directions at right angles; "
            "mend the header."
        )
    rows, columns = _of_frame(header, frame, "PixelSpacing", where)
    if not (rows > 0 and columns > 0):
        raise GeometryError(f"{where}: PixelSpacing must be above zero, got {[rows, columns]} mm; mend the header.")
    slope = _of_frame(header, frame, "RescaleSlope", where, default=1.0)[0]
    intercept = _of_frame(header, frame, "RescaleIntercept", where, default=0.0)[0]
    if slope == 0:
        raise FileError(f"{where}: RescaleSlope is 0, so all values are the same; mend the header.")
    position = _of_frame(header, frame, "ImagePositionPatient", where)
    spacing = np.array([columns, rows])
    return Slice(header, where, member, frame, position, _orthonormal(orientation), spacing, slope, intercept)


def _orthonormal(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Directions whose digits were rounded, at right angles and of length 1 again (as ITK mends them)."""
    normal = np.cross(orientation[0], orientation[1])
    row = np.cross(orientation[1], normal)
    row, normal = row / np.linalg.norm(row), normal / np.linalg.norm(normal)
    return np.array([row, np.cross(normal, row)])


def _of_frame(
    header: Header, frame: int, keyword: str, where: str, default: float | None = None
) -> NDArray[np.float64]:
    """The numbers of an attribute: of the file, or of the frame's functional groups."""
    value = _find(header, frame, keyword)
    if value is None or (not isinstance(value, (int, float)) and len(value) == 0):
        if default is not None:
            return np.array([default])
        raise FileError(
            f"{where} has no {keyword}, so nobody knows where it lies; export the series with its geometry."
        )
    return _numbers(value, GROUPS[keyword][1], f"{where}: {keyword}")


def _find(header: Header, frame: int, keyword: str) -> Any:
    if "PerFrameFunctionalGroupsSequence" not in header:
        return header.get(keyword)
    places = [header.PerFrameFunctionalGroupsSequence[frame], *header.get("SharedFunctionalGroupsSequence", [])[:1]]
    items = [item for place in places for item in place.get(GROUPS[keyword][0], [])[:1]]
    return next((item.get(keyword) for item in items if item.get(keyword) is not None), None)


def _numbers(value: Any, count: int, what: str) -> NDArray[np.float64]:
    try:
        numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (ValueError, TypeError) as error:
        raise FileError(f"{what} is {clipped(value)}, wanted {count} numbers; mend the header.") from error
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise FileError(f"{what} is {clipped(numbers.tolist())}, wanted {count} finite numbers; mend the header.")
    return numbers


def stacked(slices: Sequence[Slice], where: str) -> Stack:
    """The slices of a series as one volume.

    A gantry tilt is kept: the affine is then sheared, and exact.

    Args:
        slices: in any order.
        where: names the series in errors.

    Raises:
        GeometryError: fewer than 2; of several sizes, directions, spacings or frames of reference; two at one place;
            missing; unevenly spaced.
    """
    if len(slices) < 2:
        raise GeometryError(
            f"{where} has {len(slices)} slice, wanted at least 2; name the folder with the whole series."
        )
    _require_alike(slices, where)
    normal = slices[0].normal
    ordered = sorted(slices, key=lambda place: float(place.position @ normal))
    positions = np.array([place.position for place in ordered])
    _require_even(ordered, positions @ normal, where)
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    spacing = ordered[0].spacing
    strays = np.linalg.norm(positions - positions[0] - np.outer(np.arange(len(ordered)), step), axis=1)
    if strays.max() > SAME_GRID_VOXELS * min(*spacing, np.linalg.norm(step)):
        raise GeometryError(
            f"{where}: the slices do not lie on one line, {ordered[int(strays.argmax())].where} is {strays.max():.3g} mm "
            "beside it; export the series again, or resample it."
        )
    affine = np.eye(4)
    affine[:3, :2] = (ordered[0].orientation * spacing[:, None]).T
    affine[:3, 2], affine[:3, 3] = step, positions[0]
    tilt = math.degrees(math.acos(min(1.0, float(step @ normal) / float(np.linalg.norm(step)))))
    return Stack(tuple(ordered), valid_affine(TO_RAS @ affine), tilt)


def _require_alike(slices: Sequence[Slice], where: str) -> None:
    """One size, direction, pixel spacing and frame of reference."""
    first = slices[0]
    for other in slices[1:]:
        differs = {
            "sizes": (first.size, other.size) if first.size != other.size else None,
            "orientations": _unless_close(first.orientation, other.orientation, SAME_COSINE),
            "pixel spacings": _unless_close(first.spacing, other.spacing, SAME_SPACING * float(first.spacing.min())),
            "frames of reference": _unless_equal(first, other, "FrameOfReferenceUID"),
        }
        for what, pair in differs.items():
            if pair is not None:
                raise GeometryError(
                    f"{where} mixes {what}: {clipped(pair[0])} in {first.where} but {clipped(pair[1])} in {other.where}; "
                    "keep the slices of one acquisition."
                )


def _unless_close(one: NDArray[np.float64], other: NDArray[np.float64], tolerance: float) -> tuple[Any, Any] | None:
    return None if np.allclose(one, other, rtol=0, atol=tolerance) else (one.tolist(), other.tolist())


def _unless_equal(one: Slice, other: Slice, keyword: str) -> tuple[Any, Any] | None:
    pair = (one.header.get(keyword), other.header.get(keyword))
    return None if pair[0] == pair[1] else pair


def _require_even(ordered: Sequence[Slice], places: NDArray[np.float64], where: str) -> None:
    """Neither two slices at one place, nor a missing one, nor gaps of several sizes."""
    gaps = np.diff(places)
    twins = np.flatnonzero(gaps < SAME_PLACE_MM)
    if twins.size:
        first, second = ordered[twins[0]], ordered[twins[0] + 1]
        raise GeometryError(
            f"{where} has {numbered(twins.size, 'duplicate slice')}, such as {first.where} and {second.where} at "
            f"{places[twins[0]]:.4g} mm ({_difference(first, second)}): several echoes, phases or acquisitions? "
            "Keep one slice for each place."
        )
    step = float(np.median(gaps))
    even = places[0] + (places[-1] - places[0]) / gaps.size * np.arange(places.size)
    if np.abs(places - even).max() <= SAME_GRID_VOXELS * step:
        return
    times = np.rint(gaps / step)
    wide = np.flatnonzero(times > 1)
    if wide.size and (np.abs(gaps / step - times) < WHOLE_GAP).all():
        holes = ", ".join(f"{places[i]:.4g} and {places[i + 1]:.4g} mm" for i in wide[:NAMED_GAPS])
        raise GeometryError(
            f"{where} misses about {int((times[wide] - 1).sum())} of its slices (one each {step:.4g} mm): between {holes}"
            f"{' and more' if wide.size > NAMED_GAPS else ''}; copy the series again."
        )
    odd = int(np.abs(gaps - step).argmax())
    raise GeometryError(
        f"{where} is unevenly spaced: {gaps[odd]:.4g} mm between {ordered[odd].where} and {ordered[odd + 1].where}, "
        f"{step:.4g} mm between most; resample it to even slices first."
    )


def _difference(one: Slice, other: Slice) -> str:
    """What tells two slices at one place apart."""
    for keyword in TELLING:
        pair = _unless_equal(one, other, keyword)
        if pair is not None:
            return f"{keyword} {pair[0]} and {pair[1]}"
    return "copies of one image" if one.member != other.member else f"frames {one.frame} and {other.frame} of one file"
