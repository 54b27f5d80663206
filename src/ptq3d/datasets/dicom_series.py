"""DICOM: a folder or zip of slices is a case, and so is each of several such folders in one."""

from __future__ import annotations

import os
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.datasets.contents import Contents, contents, is_file, is_folder, looks_like_dicom
from ptq3d.datasets.dataset import Dataset, Ignored, arranged
from ptq3d.errors import FileError, NoSeriesError
from ptq3d.volumes.dicom_files import INDEX
from ptq3d.volumes.source import Source

LAYOUT = "DICOM"
ALL = "all"
DEEPEST = 8  # folders within one another: deeper is no export


def find(root: Path, series: str | None = None) -> Dataset | None:
    """The series of a place, or of each subfolder and zip in it, as cases.

    Args:
        root: a folder with DICOM files (or a DICOMDIR) directly in it, a .zip or .dcm file; or a folder of zips and of
            folders that hold DICOM at any depth, such as patient / study / series: each of them is a place, unless all are
            of one study.
        series: which one of several in one place, as `ptq3d.volumes.dicom.only_series` takes it; "all" for each of
            them. The cases of a place with several series are named with their SeriesNumber, or else in their order.

    Returns:
        None where no such place holds DICOM, or there are other volumes beside them. Of several places, one without images
        (or without the series that is asked for) is ignored.

    Raises:
        FileError: `root` is the one place, and cannot be read or holds several series; or no place has a series.
        UnavailableError: see `ptq3d.volumes.dicom`.
    """
    places, ignored = _places(root)
    if not places:
        return None
    if len(places) == 1 or _of_one_study(places):
        place = places[0] if len(places) == 1 else root
        return Dataset(LAYOUT, root, arranged(_cases(place, series)), ignored=ignored)
    cases, empty = _of_places(places, series)
    return Dataset(LAYOUT, root, arranged(cases), ignored=(*ignored, *empty))


def source_of(path: Path) -> Source:
    """A file as it is; of a folder, zip or DICOM file its only series.

    Raises:
        FileError, UnavailableError: see `ptq3d.volumes.dicom`.
    """
    if not is_folder(path) and not _is_dicom_file(path):
        return path
    from ptq3d.volumes.dicom import only_series

    return only_series(path, None)


def _places(root: Path) -> tuple[list[Path], tuple[Ignored, ...]]:
    """What holds one case each, and what lies beside it."""
    if is_file(root):
        return ([root] if _is_dicom_file(root) else []), ()
    found = contents(root) if is_folder(root) else Contents()
    if found.volumes:
        return [], ()
    slices = [path for path in found.others if looks_like_dicom(path)]
    index = [path for path in found.others if path.name.upper() == INDEX]
    if slices or index:
        return [root], found.unused([*slices, *index, *(found.folders if index else ())])
    places = [folder for folder in found.folders if _holds_dicom(folder)]
    places += [path for path in found.others if path.suffix.lower() == ".zip"]
    left = tuple(
        Ignored(item.path, "no DICOM file in it") if item.path in found.folders else item
        for item in found.unused(places)
    )
    return sorted(places), left


def _holds_dicom(folder: Path, above: frozenset[str] = frozenset()) -> bool:
    """Whether there is a DICOM file in a folder or below it; exports have patient / study / series."""
    place = os.path.realpath(folder)
    if place in above or len(above) == DEEPEST:
        return False
    found = contents(folder)
    within = above | {place}
    return any(map(looks_like_dicom, found.others)) or any(_holds_dicom(inner, within) for inner in found.folders)


def _is_dicom_file(path: Path) -> bool:
    return path.suffix.lower() == ".zip" or looks_like_dicom(path)


def _of_one_study(places: list[Path]) -> bool:
    """Whether several folders are the series of one study of one patient, which is one place then."""
    from ptq3d.volumes.dicom import study_of

    if not all(map(is_folder, places)):
        return False
    studies = {study_of(place) for place in places}
    return len(places) > 1 and len(studies) == 1 and ("", "") not in studies


def _of_places(places: list[Path], series: str | None) -> tuple[list[Case], list[Ignored]]:
    """The cases of several places. One that cannot be read, or holds several series, fails when its case is read."""
    cases: list[Case] = []
    empty: list[Ignored] = []
    for place in places:
        try:
            cases += _cases(place, series, always=series == ALL)
        except NoSeriesError as error:
            if place == places[-1] and not cases:
                raise NoSeriesError(str(error)) from error
            reason = "no DICOM images in it" if series in (None, ALL) else f"no series '{series}' in it"
            empty.append(Ignored(place, reason))
        except FileError:
            cases.append(Case(_name(place), (place,)))
    return cases, empty


def _name(place: Path) -> str:
    return place.name if is_folder(place) else place.stem


def _cases(place: Path, series: str | None, *, always: bool = False) -> list[Case]:
    """The series of a place; where it has several, or always, they are named with their numbers."""
    from ptq3d.volumes.dicom import find_series, only_series

    name, found = _name(place), find_series(place)
    chosen = found if series == ALL else (only_series(place, series),)
    if len(found) == 1 and not always:
        return [Case(name, chosen)]
    numbers = [one.number for one in found]
    apart = len(set(numbers)) == len(numbers) and all(number.isdigit() for number in numbers)
    return [Case(f"{name}_{one.number if apart else found.index(one) + 1}", (one,)) for one in chosen]
