"""Labels as a DICOM SEG that viewers lay over the series it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, UnavailableError, line_of
from ptq3d.version import __version__
from ptq3d.volumes.anatomy import coded, plain_text
from ptq3d.volumes.dicom_files import quiet
from ptq3d.volumes.dicom_geometry import Slice, Stack
from ptq3d.volumes.dicom_writing import (
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
    from highdicom import AlgorithmIdentificationSequence, PlanePositionSequence
    from highdicom.seg import Segmentation, SegmentDescription

    from ptq3d.volumes.dicom_files import Header

LONGEST_LABEL = 64  # characters of a SegmentLabel


def write_seg(path: Path, labels: Volume, series: Series, names: Sequence[str], *, algorithm: str) -> None:
    """Write labels as a BINARY DICOM SEG; the file appears whole or not at all.

    Each class that occurs is a segment, numbered from 1, with its name, SNOMED code, side and colour; its
    SegmentDescription is "class <index>: <name>", so that the label map can be made again. Each frame names the slice it
    was made from. Where no class occurs, all classes are segments and each has one empty frame, of the first slice:
    they were looked for and not found. Identifiers of patient and study are copied from the series, as DICOM demands.

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
        UnavailableError: highdicom is not installed.
    """
    path = Path(path)
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"DICOM SEG needs highdicom ({error}): pip install 'ptq3d[dicom]'.") from error
    with quiet():
        stack = source_stack(series, labels, str(path))
        found = classes_in(labels.data[0], names, str(path))
        headers, order = _sources(stack, series)
        planes = _numbered(labels.data[0], found).T[order] if found else _nothing(stack)
        segments = _segments(found or list(range(1, len(names))), names, algorithm)
        places = None if found else _place(stack.slices[0])
        dataset = _segmentation(headers, planes, segments, places, str(path))
        with written_whole(path, ".dcm") as partial:
            dataset.save_as(partial)


def _sources(stack: Stack, series: Series) -> tuple[list[Header], list[int]]:
    """The files that the labels refer to, and the order in which their frames take planes."""
    members = {part.member: part.header for part in stack.slices}
    first = stack.slices[0].header
    if "PerFrameFunctionalGroupsSequence" not in first:
        for header in members.values():  # equal but for rounding, and highdicom wants every digit
            header.ImageOrientationPatient = first.ImageOrientationPatient
        return list(members.values()), list(range(len(stack.slices)))
    if len(members) > 1:
        raise FileError(
            f"{series} lies in {len(members)} multi-frame files, and a DICOM SEG refers to one; "
            "write the labels as NIfTI, or as RTSTRUCT."
        )
    return [first], np.argsort([part.frame for part in stack.slices]).tolist()


def _numbered(voxels: NDArray[Any], found: list[int]) -> NDArray[Any]:
    """Labels -> segment numbers, which DICOM wants without gaps."""
    numbers = np.zeros(found[-1] + 1, np.uint8 if len(found) < 256 else np.uint16)
    numbers[found] = np.arange(1, len(found) + 1)
    segments: NDArray[Any] = numbers[voxels]
    return segments


def _nothing(stack: Stack) -> NDArray[np.uint8]:
    """One empty plane."""
    columns, rows = stack.slices[0].size
    return np.zeros((1, rows, columns), np.uint8)


def _place(part: Slice) -> list[PlanePositionSequence]:
    from highdicom import PlanePositionSequence

    return [PlanePositionSequence("PATIENT", part.position.tolist())]


def _algorithm(name: str) -> AlgorithmIdentificationSequence:
    import highdicom
    from pydicom.sr.codedict import codes

    return highdicom.AlgorithmIdentificationSequence(
        name=plain_text(name, LONGEST_LABEL), version=__version__, family=codes.DCM.ArtificialIntelligence
    )


def _segments(found: list[int], names: Sequence[str], algorithm: str) -> list[SegmentDescription]:
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription

    segments = []
    identification = _algorithm(algorithm)
    for number, index in enumerate(found, start=1):
        known = coded(names[index])
        segment = SegmentDescription(
            segment_number=number,
            segment_label=plain_text(names[index], LONGEST_LABEL),
            segmented_property_category=known.category,
            segmented_property_type=known.type,
            algorithm_type="AUTOMATIC",
            algorithm_identification=identification,
            display_color=CIELabColor.from_rgb(*known.colour),
        )
        segment.SegmentDescription = f"class {index}: {plain_text(names[index], 1000)}"
        if known.modifiers:
            kind = segment.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(code) for code in known.modifiers]
        segments.append(segment)
    return segments


def _concept(code: Any) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept.from_code(code)


def _segmentation(
    headers: list[Header],
    planes: NDArray[Any],
    segments: list[SegmentDescription],
    places: list[PlanePositionSequence] | None,
    what: str,
) -> Segmentation:
    from highdicom.seg import Segmentation
    from pydicom.uid import generate_uid

    made_by = segments[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName
    try:
        return Segmentation(
            source_images=headers,
            pixel_array=planes,
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=generate_uid(prefix=None),
            series_number=result_number(headers[0]),
            sop_instance_uid=generate_uid(prefix=None),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=__version__,
            device_serial_number=__version__,
            content_label="SEGMENTATION",
            content_description=made_by,
            series_description=made_by,
            specific_character_set=UTF8,
            plane_positions=places,
            omit_empty_frames=places is None,
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise FileError(
            f"{what} cannot be made from this series ({type(error).__name__}: {line_of(error)}); "
            "mend the headers of its slices, or write the labels as NIfTI."
        ) from error
