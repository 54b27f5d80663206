"""Sound files of every format, for `fuzz.py` to damage."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

AFFINE = np.array([[0, 0, 2.0, -10], [-1.5, 0, 0, 20], [0, 1.0, 0, 5], [0, 0, 0, 1]])
VOXELS = np.random.default_rng(0).integers(0, 200, (7, 6, 5))
Files = dict[str, bytes]


@dataclass(frozen=True)
class Seed:
    """Sound files, and what of them is read.

    Attributes:
        files: name -> bytes.
        entry: the file that is read, "" for the folder.
        reader: one of `READERS`.
    """

    files: Files
    entry: str
    reader: str = "volume"


def nifti(name: str, dtype: str = "i2", kind: str = "Nifti1Image") -> Callable[[Path], None]:
    """A NIfTI file with a slope."""

    def write(folder: Path) -> None:
        import nibabel

        image = getattr(nibabel, kind)(VOXELS.astype(dtype), AFFINE)
        image.header.set_slope_inter(2, -100)
        nibabel.save(image, folder / name)

    return write


def mgh(name: str, dtype: str) -> Callable[[Path], None]:
    """An MGH file."""

    def write(folder: Path) -> None:
        import nibabel

        nibabel.save(nibabel.MGHImage(VOXELS.astype(dtype), AFFINE), folder / name)

    return write


def itk(name: str, *, compressed: bool) -> Callable[[Path], None]:
    """A NRRD or MetaImage file."""

    def write(folder: Path) -> None:
        import SimpleITK as sitk  # noqa: N813

        image = sitk.GetImageFromArray(VOXELS.T.astype("i2"))
        image.SetSpacing((1.5, 1.0, 2.0))
        sitk.WriteImage(image, str(folder / name), useCompression=compressed)

    return write


def dicom(folder: Path) -> None:
    """A CT series of four slices."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    series, frame = generate_uid(entropy_srcs=["series"]), generate_uid(entropy_srcs=["frame"])
    for index in range(4):
        slice_ = Dataset()
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[str(index)])
        slice_.StudyInstanceUID = slice_.SeriesInstanceUID = series
        slice_.FrameOfReferenceUID, slice_.Modality, slice_.PatientID = frame, "CT", "1"
        slice_.ImagePositionPatient, slice_.ImageOrientationPatient = [0, 0, 2 * index], [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing, slice_.SliceThickness, slice_.InstanceNumber = [1.5, 1.5], 2, index + 1
        slice_.Rows, slice_.Columns, slice_.SamplesPerPixel = 6, 7, 1
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
        slice_.PhotometricInterpretation, slice_.RescaleSlope, slice_.RescaleIntercept = "MONOCHROME2", 1, -1024
        slice_.PixelData = VOXELS[..., index].T.astype("<i2").tobytes()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_.save_as(folder / f"{index}.dcm", enforce_file_format=True)


def zipped(folder: Path) -> None:
    """The same series in a zip."""
    dicom(folder)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.glob("*.dcm")):
            archive.write(path, path.name)
            path.unlink()


SEEDS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    ".nii": (nifti("a.nii"), "a.nii", "volume"),
    ".nii float64": (nifti("a.nii", "f8"), "a.nii", "volume"),
    ".nii NIfTI-2": (nifti("a.nii", kind="Nifti2Image"), "a.nii", "volume"),
    ".nii.gz": (nifti("a.nii.gz"), "a.nii.gz", "volume"),
    ".mgh": (mgh("a.mgh", "f4"), "a.mgh", "volume"),
    ".mgz": (mgh("a.mgz", "i2"), "a.mgz", "volume"),
    ".nrrd": (itk("a.nrrd", compressed=False), "a.nrrd", "volume"),
    ".nrrd gzip": (itk("a.nrrd", compressed=True), "a.nrrd", "volume"),
    ".nhdr": (itk("a.nhdr", compressed=True), "a.nhdr", "volume"),
    ".mha": (itk("a.mha", compressed=False), "a.mha", "volume"),
    ".mha zlib": (itk("a.mha", compressed=True), "a.mha", "volume"),
    ".mhd": (itk("a.mhd", compressed=False), "a.mhd", "volume"),
}
"""What is damaged. Open: files written into a folder, which of them is read ("" the folder), and how (`READERS`)."""

if find_spec("ptq3d.volumes.dicom") is not None:
    SEEDS["DICOM folder"] = (dicom, "", "volume")
    SEEDS["DICOM zip"] = (zipped, "a.zip", "volume")


def made(format_: str) -> Seed:
    """The sound files of a format."""
    write, entry, reader = SEEDS[format_]
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        return Seed({path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}, entry, reader)
