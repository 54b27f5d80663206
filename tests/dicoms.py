"""DICOM series as scanners, archives and broken exports make them: by ITK, by pydicom, recompressed by GDCM."""

from __future__ import annotations

import locale
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
Change = Callable[[Dataset, int], object]

ORIENTATIONS = {
    "axial": np.array([[-0.7, 0, 0, 90], [0, -0.8, 0, 80], [0, 0, 2.5, -300], [0, 0, 0, 1.0]]),
    "coronal": np.array([[-0.7, 0, 0, 90], [0, 0, -3.0, 80], [0, -0.8, 0, -300], [0, 0, 0, 1.0]]),
    "sagittal": np.array([[0, 0, 3.0, -40], [-0.7, 0, 0, 80], [0, -0.8, 0, 50], [0, 0, 0, 1.0]]),
    "oblique": np.array(
        [
            [-0.6761480784, -0.1385640646, 0.6339745962, 90],
            [0.1811733316, -0.7727406610, 0.4330127019, 80],
            [0.1339745962, 0.3, 2.4, -300],
            [0, 0, 0, 1.0],
        ]
    ),
}
"""(4, 4) voxel (column, row, slice) -> RAS+ mm; the oblique one is made square below."""


PACKED = {
    "RLE": gdcm.TransferSyntax.RLELossless,
    "JPEG lossless": gdcm.TransferSyntax.JPEGLosslessProcess14,
    "JPEG lossless SV1": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "JPEG-LS": gdcm.TransferSyntax.JPEGLSLossless,
    "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
}


def _square(affine: np.ndarray) -> np.ndarray:
    """The nearest grid with axes at right angles."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    u, _, v = np.linalg.svd(affine[:3, :3] / lengths)
    return np.vstack([np.column_stack([u @ v * lengths, affine[:3, 3]]), [0, 0, 0, 1]])


ORIENTATIONS["oblique"] = _square(ORIENTATIONS["oblique"])


def stored_values(shape: tuple[int, int, int] = (7, 6, 5), dtype: type = np.int16, seed: int = 0) -> np.ndarray:
    """(X, Y, Z) integers over most of the range of 12 bits."""
    low, high = (-1024, 3000) if np.issubdtype(dtype, np.signedinteger) else (0, 4000)
    high = min(high, int(np.iinfo(dtype).max))
    return np.random.default_rng(seed).integers(max(low, np.iinfo(dtype).min), high, shape).astype(dtype)


def as_read(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Array and affine with slices in the order of their normal, as every reader of DICOM sorts them."""
    lps = TO_LPS @ affine
    if np.cross(lps[:3, 0], lps[:3, 1]) @ lps[:3, 2] > 0:
        return data, affine
    turned = affine.copy()
    turned[:3, 3] += affine[:3, 2] * (data.shape[2] - 1)
    turned[:3, 2] *= -1
    return data[:, :, ::-1], turned


def ds(values: Sequence[float] | np.ndarray) -> list[str]:
    return [format_number_as_ds(float(value)) for value in values]


def slice_header(affine: np.ndarray, index: int) -> Dataset:
    """Where slice `index` lies."""
    lps, header = TO_LPS @ affine, Dataset()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    header.ImagePositionPatient = ds(lps[:3, 3] + index * lps[:3, 2])
    header.ImageOrientationPatient = ds((lps[:3, :2] / spacing[:2]).T.ravel())
    header.PixelSpacing = ds([spacing[1], spacing[0]])
    header.SliceThickness = "1.0"  # collimation: not the distance of slices
    return header


def write_series(
    folder: Path,
    stored: np.ndarray,
    affine: np.ndarray,
    *,
    syntax: UID = ExplicitVRLittleEndian,
    rescale: tuple[float, float] | None = (1, -1024),
    modality: str = "CT",
    change: Change | None = None,
) -> Path:
    """A series by pydicom, its file names in no order; `change(header, index)` may spoil each slice."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    names = [f"IM{number:04d}" for number in range(stored.shape[2])]
    random.Random(1).shuffle(names)
    for index, name in enumerate(names):
        header = slice_header(affine, index)
        header.update(common(modality, study, series, frame))
        header.InstanceNumber = index + 1
        header.SOPInstanceUID = generate_uid()
        put_pixels(header, stored[:, :, index].T, syntax)
        if rescale is not None:
            header.RescaleSlope, header.RescaleIntercept = ds(rescale)
        if change is not None:
            change(header, index)
        save(header, folder / name, syntax)
    return folder


def common(modality: str, study: str, series: str, frame: str) -> Dataset:
    """What all slices of a series share."""
    header = Dataset()
    header.SOPClassUID = MRImageStorage if modality == "MR" else CTImageStorage
    header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
    header.Modality, header.SeriesNumber, header.SeriesDescription = modality, 3, "Abdomen portal"
    header.PatientID, header.PatientName, header.PatientBirthDate, header.PatientSex = "P1", "Doe^Jane", "19700101", "F"
    header.StudyID, header.AccessionNumber, header.ReferringPhysicianName = "1", "A1", ""
    header.StudyDate = header.SeriesDate = header.AcquisitionDate = header.ContentDate = "20200101"
    header.StudyTime = header.SeriesTime = header.AcquisitionTime = header.ContentTime = "120000"
    header.ImageType, header.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "test"
    return header


def put_pixels(header: Dataset, values: np.ndarray, syntax: UID = ExplicitVRLittleEndian) -> None:
    """(rows, columns) integers."""
    header.Rows, header.Columns = values.shape
    header.BitsAllocated = header.BitsStored = values.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(np.issubdtype(values.dtype, np.signedinteger))
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    header.PixelData = values.astype(values.dtype.newbyteorder(order)).tobytes()
    header["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"


def save(header: Dataset, path: Path, syntax: UID = ExplicitVRLittleEndian) -> None:
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    header.file_meta.MediaStorageSOPClassUID = header.get("SOPClassUID", CTImageStorage)
    header.file_meta.MediaStorageSOPInstanceUID = header.get("SOPInstanceUID", "1.2.3")
    header.save_as(path, enforce_file_format=True)


def write_by_itk(folder: Path, stored: np.ndarray, affine: np.ndarray, rescale: tuple[float, float] = (1, 0)) -> Path:
    """A series by SimpleITK (GDCM), slice by slice; `stored` are the values before the rescale."""
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)
    lps = TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series = generate_uid()
    orientation = "\\".join(ds((lps[:3, :2] / spacing[:2]).T.ravel()))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(stored.shape[2]):
        values = stored[:, :, index].T * float(rescale[0]) + rescale[1]
        image = sitk.GetImageFromArray(np.ascontiguousarray(values, stored.dtype if rescale == (1, 0) else np.float64))
        image.SetSpacing(spacing[:2].tolist())
        tags = {
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0060": "CT",
            "0008|0016": str(CTImageStorage),
            "0008|0018": generate_uid(),
            "0010|0020": "P1",
            "0020|000d": "1.2.826.0.1.3680043.8.498.7",
            "0020|000e": series,
            "0020|0052": "1.2.826.0.1.3680043.8.498.8",
            "0020|0011": "4",
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(ds(lps[:3, 3] + index * lps[:3, 2])),
            "0020|0037": orientation,
            "0028|1053": format_number_as_ds(float(rescale[0])),
            "0028|1052": format_number_as_ds(float(rescale[1])),
            "0028|0100": "16",
            "0028|0101": "16",
            "0028|0102": "15",
            "0028|0103": str(int(stored.dtype.kind == "i")),
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"s{(index * 7) % 101:03d}.dcm"))
        writer.Execute(image)
    locale.setlocale(
        locale.LC_ALL, before
    )  # SimpleITK leaves "C" behind, in which Python decodes other processes as ASCII
    return folder


def recompress(folder: Path, syntax: int) -> None:
    """Every file of a folder in another transfer syntax, by GDCM."""
    for path in folder.iterdir():
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        if not reader.Read():
            raise OSError(path)
        change.SetInput(reader.GetImage())
        if not change.Change():
            raise OSError(path)
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        if not writer.Write():
            raise OSError(path)


def read_by_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) and affine -> RAS+ mm of the only series of a folder, as SimpleITK reads it."""
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    return of_itk(sitk.ReadImage(list(names)))


def of_itk(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, TO_LPS @ affine


def edit(folder: Path, change: Change) -> None:
    """Change files that are written, in the order of their slices."""
    headers = [(pydicom.dcmread(path), path) for path in folder.iterdir()]
    for index, (header, path) in enumerate(sorted(headers, key=lambda pair: int(pair[0].InstanceNumber))):
        change(header, index)
        header.save_as(path)
