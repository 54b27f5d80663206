"""DICOM series: found in a folder, zip archive or file, and read as one volume."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ptq3d.errors import FileError, InputError, NoSeriesError, clipped
from ptq3d.volumes.dicom_files import DIRECTORY, INDEX, PREAMBLE, Files, read_header, reading, require_pydicom
from ptq3d.volumes.dicom_geometry import KEYWORDS, Slice, Stack, slices_of, stacked
from ptq3d.volumes.dicom_pixels import require_decoders, require_room, voxels
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import Affine, Grid

if TYPE_CHECKING:
    from ptq3d.volumes.dicom_files import Header

log = logging.getLogger("ptq3d")

TOLD_TILT_DEGREES = 0.1
EMPTY = "empty"
SHORTEST_END = 6  # of a UID: a number with fewer digits that no series has would end some UID by chance
IMAGE = "Image Storage"  # what the names of all SOP classes of images hold


@dataclass(frozen=True)
class _File:
    name: str
    header: Header


@dataclass(frozen=True)
class _Found:
    """One series of a place, and what it can be chosen by."""

    series: Series
    patient: str
    number: str
    text: str
    slices: int

    @property
    def line(self) -> str:
        return f"{self.series.description} ({self.slices} slices, UID ...{clipped(self.series.uid[-12:])})"


def find_series(place: Path) -> tuple[Series, ...]:
    """All image series in a folder (and its subfolders), a .zip archive or a .dcm file, by patient and number.

    What is not DICOM, and DICOM without an image (DICOMDIR, reports, segmentations, doses), is passed over; localizers
    are series of their own.

    Args:
        place: where to look. Links are followed, each file and folder once; archives are not unpacked.

    Returns:
        At least one series; its members lie in the order of their slices.

    Raises:
        FileError: no such place, no image in it, a file that cannot be read or is broken, a dangerous archive.
        UnavailableError: pydicom is not installed.
    """
    return tuple(found.series for found in _find(Path(place)))


def study_of(place: Path) -> tuple[str, str]:
    """PatientID and StudyInstanceUID of the first DICOM file of a place by its name; empty where none can be read.

    Raises:
        UnavailableError: pydicom is not installed.
    """
    require_pydicom()
    try:
        with Files(Path(place)) as files:
            for name in files.names():
                found = _study(files, name)
                if found is not None:
                    return found
    except FileError:  # said by whoever reads the place
        pass
    return "", ""


def _study(files: Files, name: str) -> tuple[str, str] | None:
    """Of one file; None where it is no DICOM, or broken."""
    if Path(name).name.upper() == INDEX:
        return None
    try:
        header = read_header(files, name, ("PatientID", "StudyInstanceUID"))
        with reading(files.called(name)):
            study = None if header is None else header.get("StudyInstanceUID")
            return None if header is None or not study else (str(header.get("PatientID") or ""), str(study))
    except FileError:
        return None


def only_series(place: Path, wanted: str | None = None) -> Series:
    """The one series of a place, or the one that is asked for.

    Args:
        place: as for `find_series`.
        wanted: its SeriesInstanceUID, its SeriesNumber, the end of its SeriesInstanceUID (6 characters or more), or a
            part of its description (tried in this order); None where there is only one.

    Raises:
        FileError: as `find_series`; or none or several fit, or there are several patients and nothing is asked for: the
            message lists them.
    """
    place = Path(place)
    found = _find(place)
    if wanted is not None:
        fitting = _fitting(found, wanted.strip())
        if not fitting:
            raise NoSeriesError(f"{place} has no series '{wanted}'; choose with --series among: {_listed(found)}.")
    else:
        fitting = found
        patients = sorted({one.patient for one in found})
        if len(patients) > 1:
            raise FileError(
                f"{place} holds {len(patients)} patients ({', '.join(map(repr, patients))}); name a folder of one "
                f"patient, or choose with --series among: {_listed(found)}."
            )
    if len(fitting) > 1:
        raise FileError(f"{place} has {len(fitting)} series; choose with --series among: {_listed(fitting)}.")
    return fitting[0].series


def read_series(series: Series) -> tuple[NDArray[np.float32], Affine]:
    """The voxels of a series in HU (or the modality's unit), and where they lie.

    value = stored * RescaleSlope + RescaleIntercept, each slice with its own; PixelPaddingValue is a value like others.
    A tilted gantry gives a sheared affine, exact, and a warning with its angle.

    Args:
        series: as `find_series` gives it.

    Returns:
        (X, Y, Z) float32 = columns, rows, slices sorted along their normal; (4, 4) float64 voxel -> RAS+ mm. Equal to
        what ITK reads, voxel for voxel; the whole takes one float32 copy of memory and one slice (a member of an
        archive: and its file).

    Raises:
        FileError: a file is broken, truncated, in colour, or compressed in a way that no installed decoder reads.
        GeometryError: its slices do not make one volume: see `dicom_geometry.stacked`.
        UnavailableError: pydicom is not installed.
    """
    with Files(series.place) as files:
        stack = _stack(files, series, KEYWORDS)
        require_decoders(stack)
        require_room(files, stack)
        if stack.tilt_degrees > TOLD_TILT_DEGREES:
            log.warning("%s: the gantry is tilted by %.2f degrees; read as a sheared grid.", series, stack.tilt_degrees)
        return voxels(files, stack).T, stack.affine


def series_grid(series: Series) -> Grid:
    """Shape (X, Y, Z) and affine (4, 4) of a series, from its headers alone.

    Raises:
        FileError: as `read_series`, but for its pixels.
        GeometryError: as `read_series`.
    """
    with Files(series.place) as files:
        return _stack(files, series, KEYWORDS).grid


def series_stack(series: Series) -> Stack:
    """The slices of a series in order, with all their attributes but the pixels: what a result must refer to.

    Raises:
        FileError: as `series_grid`.
        GeometryError: as `series_grid`.
    """
    with Files(series.place) as files:
        return _stack(files, series, None)


def _find(place: Path) -> list[_Found]:
    require_pydicom()
    groups: dict[tuple[str, str], list[_File]] = {}
    passed: dict[str, str] = {}
    with Files(place) as files:
        for name in files.names():
            if Path(name).name.upper() == INDEX:  # its images are elsewhere, and a broken one breaks nothing
                passed[files.called(name)] = "a DICOMDIR, whose images are elsewhere"
                continue
            header = read_header(files, name, KEYWORDS)
            where = files.called(name)
            with reading(where):
                reason = _no_dicom(files, name) if header is None else _passed_over(header, where)
                if header is not None and reason is None:
                    key = (str(header.get("PatientID") or ""), str(header.get("SeriesInstanceUID") or ""))
                    groups.setdefault(key, []).append(_File(name, header))
            if reason is not None:
                passed[where] = reason
    if not groups:
        raise NoSeriesError(
            f"{place} holds no DICOM images ({len(passed)} files{': ' * bool(passed)}{_kinds(passed)}); "
            "name a folder, .zip or file with the images of a series."
        )
    short = [where for where, reason in passed.items() if reason == EMPTY]
    if short:
        log.warning("%s is empty (%d such files): if it is a slice, copy it again.", short[0], len(short))
    found = [_found(place, key, group) for key, group in groups.items()]
    return sorted(found, key=lambda one: (one.patient, one.number.zfill(12), one.series.uid))


def _kinds(passed: dict[str, str]) -> str:
    return ", ".join(sorted(set(passed.values())))


def _no_dicom(files: Files, name: str) -> str:
    """Why a file is not DICOM: a failed copy leaves nothing, or some zeros of its preamble."""
    with files.open(name) as file:
        start = file.read(PREAMBLE)
    return EMPTY if len(start) < PREAMBLE and not any(start) else "no DICOM"


def _passed_over(header: Header, where: str) -> str | None:
    """Why a DICOM file is no image; None where it is one."""
    from pydicom.uid import UID

    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    if kind == DIRECTORY:
        return "a DICOMDIR, whose images are elsewhere"
    if kind is None:
        raise FileError(f"{where} is DICOM without a SOPClassUID: truncated or broken; copy it again, or remove it.")
    uid = UID(str(kind))
    name = clipped(uid.name)
    if IMAGE not in name and not (uid.is_private and header.get("Rows")):
        return f"DICOM of kind '{name}'"
    if not header.get("SeriesInstanceUID") or not header.get("Rows") or not header.get("Columns"):
        raise FileError(f"{where} ends before its image is described: truncated or broken; copy it again.")
    return None


def _found(place: Path, key: tuple[str, str], group: list[_File]) -> _Found:
    patient, uid = key
    ordered = sorted(group, key=_rank)
    header = ordered[0].header
    number, text = (_plain(header, keyword) for keyword in ("SeriesNumber", "SeriesDescription"))
    description = " ".join(part for part in (number, _plain(header, "Modality"), text) if part)
    with reading(str(place)):
        slices = sum(max(1, len(file.header.get("PerFrameFunctionalGroupsSequence") or ())) for file in group)
    series = Series(place, uid, tuple(file.name for file in ordered), description, number)
    return _Found(series, patient, number, text, slices)


def _plain(header: Header, keyword: str) -> str:
    """One line of text, whatever the header holds."""
    try:
        with reading(keyword):
            return " ".join(str(header.get(keyword) or "").split())
    except FileError:
        return ""


def _rank(file: _File) -> tuple[float, float, str]:
    """The order of slices as far as headers tell, without a judgement on them."""
    try:
        with reading(file.name):
            first = slices_of(file.header, file.name, file.name)[0]
            across = float(first.position @ first.normal)
    except InputError:
        across = math.inf
    number = _plain(file.header, "InstanceNumber")
    return across, float(number) if number.lstrip("+-").isdecimal() else math.inf, file.name


def _fitting(found: list[_Found], wanted: str) -> list[_Found]:
    ways: tuple[Callable[[_Found], bool], ...] = (
        lambda one: one.series.uid == wanted,
        lambda one: one.number == wanted,
        lambda one: len(wanted) >= SHORTEST_END and one.series.uid.endswith(wanted),
        lambda one: wanted.lower() in one.text.lower(),
    )
    fits = ([one for one in found if way(one)] for way in ways) if wanted else iter(())
    return next((fit for fit in fits if fit), [])


def _listed(found: list[_Found]) -> str:
    return "; ".join(one.line for one in found)


def _stack(files: Files, series: Series, keywords: tuple[str, ...] | None) -> Stack:
    require_pydicom()
    slices: list[Slice] = []
    for name in series.members:
        where = files.called(name)
        header = read_header(files, name, keywords)
        if header is None:
            raise FileError(f"{where} is no DICOM file any more; find the series again.")
        with reading(where):
            slices += slices_of(header, where, name)
    with reading(str(series)):
        return stacked(slices, str(series))
