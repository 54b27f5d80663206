"""Labels as a DICOM RTSTRUCT: closed contours on the slices of the series they were made from."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, UnavailableError, line_of
from ptq3d.version import __version__
from ptq3d.volumes.anatomy import coded, plain_text
from ptq3d.volumes.dicom_files import quiet, require_pydicom
from ptq3d.volumes.dicom_geometry import Slice, Stack
from ptq3d.volumes.dicom_writing import (
    COPIED,
    MANUFACTURER,
    UTF8,
    classes_in,
    result_number,
    source_stack,
)
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import Volume
from ptq3d.volumes.whole import written_whole

if TYPE_CHECKING:
    from pydicom import Dataset

Contour: TypeAlias = NDArray[np.float64]
"""(n, 2) column and row of the corners of a closed line; the last is joined to the first."""

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # the retired class that the reference to a study still names
EDGE = 0.5  # of a mask of 0 and 1: halfway between the centres of pixels
LONGEST_NAME = 64
LONGEST_LABEL = 16
DIGITS = 3  # behind the point: a thousandth of a mm


def write_rtstruct(path: Path, labels: Volume, series: Series, names: Sequence[str], *, algorithm: str) -> None:
    """Write labels as an RTSTRUCT; the file appears whole or not at all.

    Each class that occurs is a region of interest of type ORGAN, numbered as the class is, with its name and colour. Its
    contours run halfway between pixels inside and outside, one for each connected part of each slice. A hole is cut
    out by the keyhole technique of the standard: the contour runs to the hole, around it and back along the same line,
    so that every way of filling polygons leaves it out. Where no class occurs, all are regions without contours.

    Args:
        path: the file; its folder is made if missing, an older file is replaced.
        labels: (1, X, Y, Z) unsigned integers on the grid of `series` (as `read_series` gives it).
        series: what was segmented.
        names: of all classes, background first.
        algorithm: what made the labels, in 64 characters.

    Raises:
        FileError: the series cannot be read or referred to, or the file not be written.
        GeometryError: the labels lie elsewhere.
        LabelError: a value without a name.
        ShapeError: not one channel of unsigned integers.
        UnavailableError: pydicom or contourpy is not installed.

    Source: DICOM PS3.3 C.8.8.6 (ROI Contour), C.8.8.6.3 (keyhole).
    """
    path = Path(path)
    require_pydicom()
    try:
        import contourpy  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"RTSTRUCT needs contourpy ({error}): pip install 'ptq3d[dicom]'.") from error
    with quiet():
        stack = source_stack(series, labels, str(path))
        found = classes_in(labels.data[0], names, str(path))
        try:
            dataset = _structure_set(stack, algorithm)
            _add_regions(dataset, found or list(range(1, len(names))), names, algorithm)
            _add_contours(dataset, labels.data[0], stack)
        except (ValueError, TypeError, AttributeError) as error:
            raise FileError(
                f"{path} cannot be made from {series} ({type(error).__name__}: {line_of(error)}); mend its headers."
            ) from error
        with written_whole(path, ".dcm") as partial:
            dataset.save_as(partial, enforce_file_format=True)


def contours_of(mask: NDArray[np.bool_]) -> list[Contour]:
    """The outlines of a mask, one for each connected part, with its holes cut out by keyholes.

    Args:
        mask: (rows, columns).

    Returns:
        Corners halfway between pixels; the centre of a pixel lies inside exactly if the pixel does.
    """
    from contourpy import FillType, contour_generator

    padded = np.pad(mask, 1).astype(np.float64)
    generator = contour_generator(z=padded, name="serial", fill_type=FillType.OuterOffset)
    parts, offsets = generator.filled(EDGE, 2 * EDGE + 1)
    outlines = []
    for points, starts in zip(parts, offsets, strict=True):
        lines = [_corners(points[a : b - 1] - 1) for a, b in itertools.pairwise(starts.tolist())]
        outline = lines[0]
        for hole in lines[1:]:
            outline = _with_hole(outline, hole)
        outlines.append(outline)
    return outlines


def _corners(points: Contour) -> Contour:
    """A closed line without the points on its straight pieces."""
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns: NDArray[np.bool_] = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return np.compress(turns, points, axis=0)


def _with_hole(outline: Contour, hole: Contour) -> Contour:
    """The outline led to a near corner of a hole, around the hole, and back the same way.

    Corners lie halfway between pixels of one column, or of one row. A line from one kind to the other meets no centre
    of a pixel: counted in halves, its steps are odd along both axes, and a centre is even along both.
    """
    distances = ((outline[:, None] - hole) ** 2).sum(axis=2)
    distances[(outline[:, None, 0] % 1 == hole[:, 0] % 1)] = np.inf
    at, start = np.unravel_index(int(distances.argmin()), distances.shape)
    around = np.roll(hole, -int(start), axis=0)
    return np.concatenate([outline[: at + 1], around, around[:1], outline[at:]])


def _structure_set(stack: Stack, algorithm: str) -> Dataset:
    """Everything but the regions."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian, generate_uid

    source, now, dataset = stack.slices[0].header, datetime.datetime.now(), Dataset()
    dataset.SpecificCharacterSet = UTF8
    for keyword in (*COPIED, "StudyInstanceUID", "FrameOfReferenceUID"):
        setattr(dataset, keyword, source.get(keyword))
    dataset.PositionReferenceIndicator = source.get("PositionReferenceIndicator", "")
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTSTRUCT, generate_uid(prefix=None)
    dataset.SeriesInstanceUID, dataset.SeriesNumber = generate_uid(prefix=None), result_number(source)
    dataset.Modality, dataset.InstanceNumber, dataset.OperatorsName = "RTSTRUCT", 1, ""
    dataset.Manufacturer = dataset.ManufacturerModelName = MANUFACTURER
    dataset.SoftwareVersions = __version__
    dataset.SeriesDescription = plain_text(algorithm, LONGEST_NAME)
    dataset.StructureSetLabel = plain_text(algorithm, LONGEST_LABEL)
    for what in ("StructureSet", "InstanceCreation", "Series"):
        setattr(dataset, f"{what}Date", now.strftime("%Y%m%d"))
        setattr(dataset, f"{what}Time", now.strftime("%H%M%S"))
    dataset.ReferencedFrameOfReferenceSequence = [_references(stack)]
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian  # an explicit VR leaves a contour only 64 KiB
    dataset.file_meta.MediaStorageSOPClassUID = RTSTRUCT
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _references(stack: Stack) -> Dataset:
    """The frame of reference, its study, its series and all slices."""
    source = stack.slices[0].header
    series = _item(
        SeriesInstanceUID=source.SeriesInstanceUID, ContourImageSequence=[_image(part) for part in stack.slices]
    )
    study = _item(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=source.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return _item(FrameOfReferenceUID=source.FrameOfReferenceUID, RTReferencedStudySequence=[study])


def _image(part: Slice) -> Dataset:
    item = _item(ReferencedSOPClassUID=part.header.SOPClassUID, ReferencedSOPInstanceUID=part.header.SOPInstanceUID)
    if "PerFrameFunctionalGroupsSequence" in part.header:
        item.ReferencedFrameNumber = part.frame + 1
    return item


def _item(**attributes: Any) -> Dataset:
    from pydicom import Dataset

    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


def _add_regions(dataset: Dataset, found: list[int], names: Sequence[str], algorithm: str) -> None:
    """A region for each class, still without contours."""
    dataset.StructureSetROISequence = [
        _item(
            ROINumber=index,
            ReferencedFrameOfReferenceUID=dataset.FrameOfReferenceUID,
            ROIName=plain_text(names[index], LONGEST_NAME),
            ROIGenerationAlgorithm="AUTOMATIC",
            ROIGenerationDescription=plain_text(algorithm, LONGEST_NAME),
        )
        for index in found
    ]
    dataset.ROIContourSequence = [
        _item(ReferencedROINumber=index, ROIDisplayColor=list(coded(names[index]).colour)) for index in found
    ]
    dataset.RTROIObservationsSequence = [
        _item(ObservationNumber=index, ReferencedROINumber=index, RTROIInterpretedType="ORGAN", ROIInterpreter="")
        for index in found
    ]


def _add_contours(dataset: Dataset, voxels: NDArray[Any], stack: Stack) -> None:
    regions = {int(item.ReferencedROINumber): item for item in dataset.ROIContourSequence}
    contours: dict[int, list[Dataset]] = {}
    for depth, part in enumerate(stack.slices):
        for index, outline in _outlines(voxels[:, :, depth].T):
            items = contours.setdefault(index, [])
            items.append(_contour(outline, part, len(items) + 1))
    for index, items in contours.items():
        regions[index].ContourSequence = items


def _outlines(plane: NDArray[Any]) -> Iterator[tuple[int, Contour]]:
    """All contours of a slice (rows, columns) with their classes."""
    from scipy.ndimage import find_objects

    for index, box in enumerate(find_objects(plane), start=1):
        if box is not None:
            rows, columns = box
            for outline in contours_of(plane[box] == index):
                yield index, outline + np.array([columns.start, rows.start])


def _contour(outline: Contour, part: Slice, number: int) -> Dataset:
    from pydicom.charset import default_encoding
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    points = part.position + (outline * part.spacing) @ part.orientation
    item = _item(
        ContourImageSequence=[_image(part)],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
        ContourNumber=number,
    )
    numbers = "\\".join(f"{value:.{DIGITS}f}" for value in points.ravel().tolist()).encode()
    numbers += b" " * (len(numbers) % 2)
    # written as they are: pydicom's objects for millions of numbers took 15 s and 1.5 GiB for 60 classes
    item[Tag("ContourData")] = RawDataElement(Tag("ContourData"), "DS", len(numbers), numbers, 0, True, True)
    item.set_original_encoding(True, True, default_encoding)
    return item
