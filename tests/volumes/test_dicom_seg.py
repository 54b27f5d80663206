"""A DICOM SEG lies where its labels lie, as highdicom and SimpleITK read it, and names the slices it was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from dicoms import ORIENTATIONS, PACKED, TO_LPS, edit, of_itk, recompress, stored_values, write_by_itk, write_series
from grids import affines
from ptq3d.errors import FileError, GeometryError, LabelError, ShapeError
from ptq3d.volumes.dicom import find_series, only_series, read_series, series_grid
from ptq3d.volumes.dicom_seg import write_seg
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import Volume

NAMES = ["background", "spleen", "right kidney", "left kidney", "liver", "portal and splenic veins"]


def labels_on(series: Series, seed: int = 0) -> Volume:
    """Boxes of some classes; class 2 does not occur."""
    shape, affine = series_grid(series)
    rng = np.random.default_rng(seed)
    data = np.zeros(shape, np.uint8)
    for label in (1, 3, 4, 5):
        low = [int(rng.integers(0, size)) for size in shape]
        high = [int(rng.integers(start + 1, size + 1)) for start, size in zip(low, shape, strict=True)]
        data[tuple(slice(*pair) for pair in zip(low, high, strict=True))] = label
    return Volume(data[None], affine)


def read_back(path: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Class index -> (X, Y, Z) mask and affine, as highdicom reads it."""
    segmentation = highdicom.seg.segread(path)
    found = {}
    for number in segmentation.segment_numbers:
        index = int(segmentation.get_segment_description(number).SegmentDescription.split()[1].rstrip(":"))
        volume = segmentation.get_volume(
            segment_numbers=[number], combine_segments=True, allow_missing_positions=True, relabel=True
        )
        affine = TO_LPS @ volume.affine[:, [2, 1, 0, 3]]
        found[index] = (np.asarray(volume.array).transpose(2, 1, 0) > 0, affine)
    return found


def same_places(mask: np.ndarray, affine: np.ndarray, other: np.ndarray, other_affine: np.ndarray) -> None:
    """Dice 1.0: the same voxels in the world, to a thousandth of a mm."""
    wanted = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    found = np.argwhere(other) @ other_affine[:3, :3].T + other_affine[:3, 3]
    assert len(wanted) == len(found)
    indices = np.linalg.solve(affine, np.column_stack([found, np.ones(len(found))]).T)[:3].T
    whole = np.rint(indices).astype(int)
    np.testing.assert_allclose(indices, whole, atol=1e-3)
    assert mask[tuple(whole.T)].all()


def check(path: Path, labels: Volume, series: Series) -> None:
    found = read_back(path)
    assert set(found) == set(np.unique(labels.data)) - {0}
    for index, (mask, affine) in found.items():
        same_places(labels.data[0] == index, labels.affine, mask, affine)
    sources = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, files_of(series))}
    dataset = pydicom.dcmread(path)
    for group in dataset.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        position = group.PlanePositionSequence[0].ImagePositionPatient
        header = sources[source.ReferencedSOPInstanceUID]
        if "PerFrameFunctionalGroupsSequence" in header:
            header = header.PerFrameFunctionalGroupsSequence[source.ReferencedFrameNumber - 1].PlanePositionSequence[0]
        assert header.ImagePositionPatient == position


def files_of(series: Series) -> list[Path]:
    return [series.place / name for name in series.members]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_seg_overlaps_its_own_labels(tmp_path: Path, orientation: str) -> None:
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS[orientation])
    series = only_series(tmp_path / "ct")
    labels = labels_on(series)
    write_seg(tmp_path / "out" / "a.dcm", labels, series, NAMES, algorithm="ptq3d")
    check(tmp_path / "out" / "a.dcm", labels, series)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.dcm"]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(affine=affines())
def test_on_any_grid(tmp_path: Path, affine: np.ndarray) -> None:
    folder = tmp_path / generate_uid()
    write_series(folder, stored_values((6, 5, 4)), affine)
    series = only_series(folder)
    labels = labels_on(series)
    write_seg(tmp_path / "a.dcm", labels, series, NAMES, algorithm="ptq3d")
    check(tmp_path / "a.dcm", labels, series)


def test_itk_sees_the_mask_in_the_same_place(tmp_path: Path) -> None:
    write_by_itk(tmp_path / "ct", stored_values((16, 11, 9)), ORIENTATIONS["oblique"])
    series = only_series(tmp_path / "ct")
    shape, affine = series_grid(series)
    data = np.zeros((1, *shape), np.uint8)
    data[0, 3:9, 2:5, 1:8] = 4  # 16 columns: GDCM unpacks whole bytes of bits
    write_seg(tmp_path / "a.dcm", Volume(data, affine), series, NAMES, algorithm="ptq3d")
    mask, mask_affine = of_itk(sitk.ReadImage(str(tmp_path / "a.dcm")))
    same_places(data[0] > 0, affine, mask > 0, mask_affine)


def test_a_tilted_gantry(tmp_path: Path) -> None:
    affine = ORIENTATIONS["axial"].copy()
    affine[1, 2] = 0.4
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), affine)
    series = only_series(tmp_path / "ct")
    labels = labels_on(series)
    write_seg(tmp_path / "a.dcm", labels, series, NAMES, algorithm="ptq3d")
    dataset = highdicom.seg.segread(tmp_path / "a.dcm")
    frames = dataset.pixel_array.transpose(0, 2, 1)
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        plane = affine.copy()
        plane[:3, 3] = TO_LPS[:3, :3] @ np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        label = (1, 3, 4, 5)[number - 1]
        depth = round((plane[2, 3] - labels.affine[2, 3]) / labels.affine[2, 2])
        np.testing.assert_array_equal(frame, labels.data[0, :, :, depth] == label)
        same_places(frame[:, :, None], plane, labels.data[0] * (np.arange(9) == depth) == label, labels.affine)


def test_segments_are_named_coded_and_coloured(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["axial"])
    series = only_series(tmp_path / "ct")
    write_seg(tmp_path / "a.dcm", labels_on(series), series, NAMES, algorithm="ptq3d INT8")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    segments = dataset.SegmentSequence
    assert [segment.SegmentNumber for segment in segments] == [1, 2, 3, 4]
    assert [segment.SegmentLabel for segment in segments] == [NAMES[index] for index in (1, 3, 4, 5)]
    assert segments[1].SegmentDescription == "class 3: left kidney"
    kidney = segments[1].SegmentedPropertyTypeCodeSequence[0]
    assert (kidney.CodeValue, kidney.CodingSchemeDesignator) == (codes.SCT.Kidney.value, "SCT")
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == codes.SCT.Left.value
    assert segments[3].SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99PTQ3D"
    assert len({tuple(segment.RecommendedDisplayCIELabValue) for segment in segments}) == 4
    assert all(segment.SegmentAlgorithmType == "AUTOMATIC" for segment in segments)
    assert segments[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "ptq3d INT8"
    assert dataset.SeriesDescription == "ptq3d INT8"


def test_what_viewers_need_is_there(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["axial"])
    series = only_series(tmp_path / "ct")
    write_seg(tmp_path / "a.dcm", labels_on(series), series, NAMES, algorithm="ptq3d")
    source, dataset = pydicom.dcmread(files_of(series)[0]), pydicom.dcmread(tmp_path / "a.dcm")
    for keyword in ("FrameOfReferenceUID", "StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "Rows"):
        assert dataset[keyword].value == source[keyword].value
    assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    assert (dataset.Modality, dataset.SegmentationType, dataset.BitsAllocated) == ("SEG", "BINARY", 1)
    assert dataset.SeriesInstanceUID not in (source.SeriesInstanceUID, dataset.SOPInstanceUID)
    assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    shared = dataset.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == source.ImageOrientationPatient
    assert float(shared.PixelMeasuresSequence[0].SpacingBetweenSlices) == 2.5
    assert [one.uid for one in find_series(tmp_path)] == [series.uid]


def test_where_nothing_was_found_all_classes_are_said_to_be_looked_for(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["coronal"])
    series = only_series(tmp_path / "ct")
    shape, affine = series_grid(series)
    write_seg(tmp_path / "a.dcm", Volume(np.zeros((1, *shape), np.uint8), affine), series, NAMES, algorithm="ptq3d")
    dataset = highdicom.seg.segread(tmp_path / "a.dcm")
    assert [segment.SegmentLabel for segment in dataset.SegmentSequence] == NAMES[1:]
    assert dataset.NumberOfFrames == 5
    assert not dataset.pixel_array.any()


@pytest.mark.parametrize("empty", [False, True])
def test_a_multi_frame_source(tmp_path: Path, empty: bool) -> None:
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["oblique"])
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "ct").iterdir())]
    whole = highdicom.legacy.LegacyConvertedEnhancedCTImage(slices, generate_uid(), 9, generate_uid(), 1)
    whole.save_as(tmp_path / "whole.dcm")
    series = only_series(tmp_path / "whole.dcm")
    labels = labels_on(series)
    if empty:
        labels = Volume(np.zeros_like(labels.data), labels.affine)
    write_seg(tmp_path / "a.dcm", labels, series, NAMES, algorithm="ptq3d")
    if empty:
        assert not highdicom.seg.segread(tmp_path / "a.dcm").pixel_array.any()
    else:
        check(tmp_path / "a.dcm", labels, series)


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", stored_values((20, 20, 3)), ORIENTATIONS["axial"])
    series = only_series(tmp_path / "ct")
    shape, affine = series_grid(series)
    labels = Volume(np.arange(1200, dtype=np.uint16).reshape((1, *shape)) // 4 * 3, affine)
    write_seg(tmp_path / "a.dcm", labels, series, [f"part {index}" for index in range(1000)], algorithm="ptq3d")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert len(dataset.SegmentSequence) == 299
    assert dataset.SegmentSequence[-1].SegmentDescription == "class 897: part 897"
    assert highdicom.seg.segread(tmp_path / "a.dcm").pixel_array.sum() == np.count_nonzero(labels.data)


@pytest.mark.parametrize("charset", [None, "ISO_IR 100", "ISO_IR 192"])
def test_names_of_any_script(tmp_path: Path, charset: str | None) -> None:
    patient = "Doe^Jane" if charset is None else "Müller^Jörg" if charset == "ISO_IR 100" else "山田^太郎"

    def change(header: Dataset, index: int) -> None:
        if charset is not None:
            header.SpecificCharacterSet = charset
        header.PatientName = patient

    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["axial"], change=change)
    series = only_series(tmp_path / "ct")
    names = ["background", "肝臓", "x", "a\\b" * 40, "Größe\n2", "ö" * 3000]
    write_seg(tmp_path / "a.dcm", labels_on(series), series, names, algorithm="größer " * 20)
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    assert str(dataset.PatientName) == patient
    assert [segment.SegmentLabel for segment in dataset.SegmentSequence] == [
        "肝臓",
        "a b" * 21 + "a",
        "Größe 2",
        "ö" * 64,
    ]


def test_what_anonymizers_take_away_is_not_needed(tmp_path: Path) -> None:
    gone = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime")

    def change(header: Dataset, index: int) -> None:
        for keyword in (*gone, "AccessionNumber", "ReferringPhysicianName", "SeriesNumber", "SliceThickness"):
            delattr(header, keyword)

    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["axial"], change=change)
    series = only_series(tmp_path / "ct")
    labels = labels_on(series)
    write_seg(tmp_path / "a.dcm", labels, series, NAMES, algorithm="ptq3d")
    check(tmp_path / "a.dcm", labels, series)


def test_digits_that_differ_between_slices(tmp_path: Path) -> None:
    def change(header: Dataset, index: int) -> None:
        header.ImageOrientationPatient[1] = 1e-6 * index

    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["axial"], change=change)
    series = only_series(tmp_path / "ct")
    labels = labels_on(series)
    write_seg(tmp_path / "a.dcm", labels, series, NAMES, algorithm="ptq3d")
    check(tmp_path / "a.dcm", labels, series)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["axial"])
    series = only_series(tmp_path / "ct")
    labels = labels_on(series)
    moved = labels.affine.copy()
    moved[0, 3] += 1
    broken = [
        (Volume(labels.data, moved), NAMES, GeometryError, "do not lie on the slices"),
        (Volume(labels.data[:, :, :, :-1], labels.affine), NAMES, GeometryError, "do not lie on the slices"),
        (labels, NAMES[:5], LabelError, "label 5 has no name"),
        (Volume(labels.data.astype(np.float32), labels.affine), NAMES, ShapeError, "unsigned integers"),
    ]
    for volume, names, error, message in broken:
        with pytest.raises(error, match=message) as caught:
            write_seg(tmp_path / "out.dcm", volume, series, names, algorithm="ptq3d")
        assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be written"):
        write_seg(tmp_path / "file" / "out.dcm", labels, series, NAMES, algorithm="ptq3d")
    edit(tmp_path / "ct", lambda header, index: delattr(header, "FrameOfReferenceUID"))
    with pytest.raises(FileError, match="no FrameOfReferenceUID"):
        write_seg(tmp_path / "out.dcm", labels, series, NAMES, algorithm="ptq3d")
    assert {path.name for path in tmp_path.iterdir()} == {"ct", "file"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path / "ct", stored_values((12, 11, 9)), ORIENTATIONS["axial"])
    series = only_series(tmp_path / "ct")
    (tmp_path / "a.dcm").write_text("old")

    def full_disk(dataset: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(highdicom.seg.Segmentation, "save_as", full_disk)
    with pytest.raises(FileError, match="No space left"):
        write_seg(tmp_path / "a.dcm", labels_on(series), series, NAMES, algorithm="ptq3d")
    assert (tmp_path / "a.dcm").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"ct", "a.dcm"}


def test_without_highdicom_it_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["highdicom"] = None
import numpy as np
from pathlib import Path
from ptq3d.errors import UnavailableError
from ptq3d.volumes.dicom_seg import write_seg
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import Volume
try:
    labels = Volume(np.ones((1, 2, 2, 2), np.uint8), np.eye(4))
    write_seg(Path("a.dcm"), labels, Series(Path("."), "1", ()), ["a", "b"], algorithm="x")
except UnavailableError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'ptq3d[dicom]'" in done.stdout


@pytest.mark.parametrize("packed", [False, True])
def test_real_ct_in_coronal_slices(tmp_path: Path, shared: Path, packed: bool) -> None:
    """The labels of a real CT, turned with it to coronal slices: each class where the NIfTI file has it."""
    folder = shared / "data" / "abdomen_ct"
    image = nibabel.load(folder / "images" / "ct.nii.gz")
    wanted = np.asarray(nibabel.load(folder / "labels" / "ct.nii.gz").dataobj).astype(np.uint8)
    names = json.loads((folder / "class_map_total_v2.json").read_text())["total"]
    turn = np.array([[-1, 0, 0, image.shape[0] - 1], [0, 0, 1, 0], [0, -1, 0, image.shape[2] - 1], [0, 0, 0, 1.0]])
    write_by_itk(
        tmp_path / "ct",
        np.asarray(image.dataobj).astype(np.int16)[::-1, :, ::-1].swapaxes(1, 2),
        image.affine @ turn,
    )
    if packed:
        recompress(tmp_path / "ct", PACKED["JPEG lossless SV1"])
    series = only_series(tmp_path / "ct")
    voxels, affine = read_series(series)
    corners = np.linalg.solve(image.affine, affine)
    np.testing.assert_allclose(corners[:3, :3] @ corners[:3, :3].T, np.eye(3), atol=1e-4)
    indices = np.rint(corners[:3, :3] @ np.indices(voxels.shape).reshape(3, -1) + corners[:3, 3:]).astype(int)
    data = wanted[tuple(indices)].reshape(voxels.shape)
    write_seg(
        tmp_path / "seg.dcm",
        Volume(data[None], affine),
        series,
        ["background", *names.values()],
        algorithm="TotalSegmentator",
    )
    found = read_back(tmp_path / "seg.dcm")
    assert set(found) == set(np.unique(wanted)) - {0}
    for index, (mask, mask_affine) in found.items():
        same_places(wanted == index, image.affine, mask, mask_affine)
