"""What becomes of a label map: a volume file, or a DICOM object that refers to the series it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq3d.datasets.cases import Case
from ptq3d.errors import OptionError
from ptq3d.volumes.files import is_dicom, save_labels
from ptq3d.volumes.source import Series, place_of
from ptq3d.volumes.volume import Volume


@dataclass(frozen=True)
class OutputType:
    """One kind of result.

    Attributes:
        suffix: of the file, behind the name of the case.
        write: (path, labels, series, class names, algorithm) for what refers to a DICOM series, None for volume files.
    """

    suffix: str
    write: Callable[[Path, Volume, Series, Sequence[str], str], None] | None = None


def _segmentation(path: Path, labels: Volume, series: Series, names: Sequence[str], algorithm: str) -> None:
    from ptq3d.volumes.dicom_seg import write_seg

    write_seg(path, labels, series, names, algorithm=algorithm)


def _contours(path: Path, labels: Volume, series: Series, names: Sequence[str], algorithm: str) -> None:
    from ptq3d.volumes.rtstruct import write_rtstruct

    write_rtstruct(path, labels, series, names, algorithm=algorithm)


OUTPUT_TYPES: dict[str, OutputType] = {
    "nifti": OutputType(".nii.gz"),
    "nrrd": OutputType(".nrrd"),
    "dicom_seg": OutputType("_seg.dcm", _segmentation),
    "dicom_rtstruct": OutputType("_rtstruct.dcm", _contours),
}
"""Kinds of results. Open: a new one is one row."""


@dataclass(frozen=True)
class Writing:
    """Where and how label maps are written.

    Attributes:
        folder: of all of them.
        output_type: a row of `OUTPUT_TYPES`.
        names: of the classes, background first.
        algorithm: who made the labels, as DICOM objects say it.
    """

    folder: Path
    output_type: str = "nifti"
    names: tuple[str, ...] = ()
    algorithm: str = "ptq3d"

    def path_of(self, case: Case) -> Path:
        """The file of a case."""
        return self.folder / f"{case.name}{OUTPUT_TYPES[self.output_type].suffix}"

    def require_possible(self, case: Case) -> None:
        """Refuse early what could not be written later.

        Raises:
            FileError: the image is not there.
            OptionError: an input would be overwritten, or a DICOM object wanted of an image that is no DICOM series.
        """
        path = self.path_of(case).resolve()
        for source in case.images:
            if isinstance(source, Series) and path.is_relative_to(source.place.resolve()):
                raise OptionError(f"{self.folder} lies among the slices of {source.place}. Choose another --output.")
        for given in (*map(place_of, case.images), *case.label_files):
            if path == given.resolve():
                raise OptionError(f"{given} is an input and would be overwritten. Choose another --output.")
        if OUTPUT_TYPES[self.output_type].write is not None and not is_dicom(case.images[0]):
            raise OptionError(
                f"--output-type {self.output_type} refers to the slices of a DICOM series, but {case.where} is none. "
                "Write nifti or nrrd, or give the series."
            )

    def write(self, case: Case, labels: Volume) -> None:
        """Write the labels of a case, whole or not at all.

        Args:
            case: whose image they lie on.
            labels: (1, X, Y, Z) unsigned integers on the grid of the case's first image.

        Raises:
            FileError: it cannot be written.
        """
        write, source = OUTPUT_TYPES[self.output_type].write, case.images[0]
        if write is None or not isinstance(source, Series):
            save_labels(self.path_of(case), labels)
        else:
            write(self.path_of(case), labels, source, self.names, self.algorithm)
