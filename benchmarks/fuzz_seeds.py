"""Sound files of every format, for `fuzz.py` to damage."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
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


def packed(syntax: str) -> Callable[[Path], None]:
    """The same series, compressed by GDCM in one of its transfer syntaxes."""

    def write(folder: Path) -> None:
        import gdcm

        dicom(folder)
        for path in folder.iterdir():
            reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
            reader.SetFileName(str(path))
            reader.Read()
            change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
            change.SetInput(reader.GetImage())
            change.Change()
            writer.SetFileName(str(path))
            writer.SetFile(reader.GetFile())
            writer.SetImage(change.GetOutput())
            writer.Write()

    return write


def jpeg2000(folder: Path) -> None:
    """The same series as JPEG 2000 by pillow: GDCM dies of images this small."""
    from io import BytesIO

    import pydicom
    from PIL import Image
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    dicom(folder)
    for path in folder.iterdir():
        slice_, stream = pydicom.dcmread(path), BytesIO()
        Image.fromarray(slice_.pixel_array.astype("u2")).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
        slice_.PixelRepresentation = 0
        slice_.PixelData = encapsulate([stream.getvalue()])
        slice_["PixelData"].is_undefined_length = True
        slice_.file_meta.TransferSyntaxUID = JPEG2000Lossless
        slice_.save_as(path)


def listed(name: str, content: object, *volumes: str) -> Callable[[Path], None]:
    """A data set of one list and small volumes beside it."""

    def write(folder: Path) -> None:
        import nibabel

        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        for volume in volumes:
            (folder / volume).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(VOXELS.astype("u1"), AFFINE), folder / volume)

    return write


PAIR = ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
DECATHLON = {
    "name": "Heart",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "left atrium"},
    "training": [{"image": "./imagesTr/a_0000.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    "test": [],
}
NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
CASES_CSV = "name,image,label,split\none,imagesTr/a_0000.nii.gz,labelsTr/a.nii.gz,train\n"
CASES_JSON = [{"name": "one", "image": PAIR[0], "label": PAIR[1], "split": "train"}]
META_CSV = "image_id;age;gender;institute;study_type;split\ns0001;60;m;A;ct;train\n"
DSEG_TSV = "index\tname\n0\tbackground\n1\tliver\n"
TOTAL = ("s0001/ct.nii.gz", "s0001/segmentations/liver.nii.gz", "s0001/segmentations/spleen.nii.gz")
BIDS = ("sub-1/anat/sub-1_T1w.nii.gz", "derivatives/manual/sub-1/anat/sub-1_dseg.nii.gz")


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
    "DICOM folder": (dicom, "", "volume"),
    "DICOM zip": (zipped, "a.zip", "volume"),
    "DICOM RLE": (packed("RLELossless"), "", "volume"),
    "DICOM JPEG 2000": (jpeg2000, "", "volume"),
    "DICOM JPEG-LS": (packed("JPEGLSLossless"), "", "volume"),
    "DICOM JPEG lossless": (packed("JPEGLosslessProcess14_1"), "", "volume"),
    "Decathlon": (listed("dataset.json", DECATHLON, *PAIR), "", "dataset"),
    "nnU-Net raw": (listed("dataset.json", NNUNET, *PAIR), "", "dataset"),
    "list, CSV": (listed("cases.csv", CASES_CSV, *PAIR), "cases.csv", "dataset"),
    "list, JSON": (listed("cases.json", CASES_JSON, *PAIR), "cases.json", "dataset"),
    "TotalSegmentator": (listed("meta.csv", META_CSV, *TOTAL), "", "dataset"),
    "BIDS": (listed("derivatives/manual/dseg.tsv", DSEG_TSV, *BIDS), "", "dataset"),
}
"""What is damaged. Open: files written into a folder, which of them is read ("" the folder), and how (`READERS`)."""


def made(format_: str) -> Seed:
    """The sound files of a format."""
    write, entry, reader = SEEDS[format_]
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        paths = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        return Seed({str(path.relative_to(scratch)): path.read_bytes() for path in paths}, entry, reader)
