"""DICOM in, DICOM SEG out: the same labels at the same places as by the NIfTI route, as highdicom and SimpleITK read them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import gdcm
import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from onnx import numpy_helper

from dicoms import ORIENTATIONS, TO_LPS, read_by_itk, recompress, stored_values, write_by_itk
from networks import Builder
from ptq3d.cli import main
from ptq3d.datasets.layouts import open_dataset
from ptq3d.deployment import deploy
from ptq3d.errors import OptionError
from ptq3d.exporting import export
from ptq3d.options import DeployOptions, ExportOptions
from ptq3d.volumes.dicom import only_series
from ptq3d.volumes.files import load_image, load_labels

CLASSES = 13
PREPARED = 'spacing = [6.0, 6.5, 7.0]\n[[intensity]]\nrule = "window"\nlow = -175.0\nhigh = 250.0\n'
ACQUISITIONS = {
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]),  # columns: what slices, rows and columns run along
    "oblique": np.array([[0.9363, -0.2751, 0.2184], [0.2896, 0.9564, -0.0370], [-0.1987, 0.0978, 0.9752]]),
}
SYNTAXES = {
    "uncompressed": None,
    "RLE": gdcm.TransferSyntax.RLELossless,
    "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
    "JPEG-LS": gdcm.TransferSyntax.JPEGLSLossless,
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Labels follow the intensity, so that a voxel out of place is another label; and its preprocessing."""
    root = tmp_path_factory.mktemp("network")
    (root / "prepared.toml").write_text(PREPARED)
    levels = np.linspace(0, 1, CLASSES)
    b = Builder()
    b.weights += [
        numpy_helper.from_array(values.astype(np.float32), name)
        for name, values in (
            ("mean", np.full((1, 1, 3, 3, 3), 1 / 27)),
            ("slopes", 2 * levels[:, None, None, None, None]),  # the largest 2 c x - c^2 is that of the nearest c
            ("offsets", -(levels**2)),
        )
    ]
    b.add("Conv", b.add("Relu", b.add("Conv", "image", "mean", pads=[1] * 6)), "slopes", "offsets")
    return b.save(root / "net.onnx", "logits", CLASSES, (16, 16, 16)), str(root / "prepared.toml")


def acquired(shared: Path, acquisition: str) -> tuple[np.ndarray, np.ndarray]:
    """The real CT as a scanner would have acquired it: (X, Y, Z) int16 HU and affine -> RAS+ mm."""
    image = sitk.ReadImage(str(shared / "data/abdomen_ct/images/ct.nii.gz"))
    turn = np.linalg.qr(ACQUISITIONS[acquisition])[0]
    turn *= np.sign(np.diag(turn.T @ ACQUISITIONS[acquisition]))
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()]))
    shape, spacing = np.array((61, 53, 43)), np.array((4.0, 4.5, 5.0))
    grid = sitk.Image(shape.tolist(), sitk.sitkInt16)
    grid.SetSpacing(spacing.tolist())
    grid.SetDirection(turn.ravel().tolist())
    grid.SetOrigin((centre - turn @ (spacing * (shape - 1) / 2)).tolist())
    moved = sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, -1024, sitk.sitkInt16)
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = grid.GetOrigin()
    return np.ascontiguousarray(sitk.GetArrayFromImage(moved).T), TO_LPS @ affine


def written(folder: Path, voxels: np.ndarray, affine: np.ndarray, syntax: int | None) -> tuple[Path, Path]:
    """The same voxels as a DICOM series by SimpleITK, and as NIfTI by nibabel on the grid that SimpleITK reads."""
    write_by_itk(folder / "ct", voxels, affine)
    if syntax is not None:
        recompress(folder / "ct", syntax)
    read, grid = read_by_itk(folder / "ct")
    np.testing.assert_array_equal(read, voxels)
    nibabel.save(nibabel.Nifti1Image(voxels, grid), folder / "ct.nii.gz")
    return folder / "ct", folder / "ct.nii.gz"


def labels_of_seg(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A label map of the frames of a SEG as highdicom reads them, each put where its position says."""
    found = np.zeros(shape, np.uint8)
    segmentation = highdicom.seg.segread(path)
    frames = np.atleast_3d(segmentation.pixel_array.reshape(-1, shape[1], shape[0]))
    for frame, group in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        label = int(segmentation.get_segment_description(number).SegmentDescription.split()[1].rstrip(":"))
        position = TO_LPS[:3, :3] @ np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        x, y, z = np.linalg.solve(affine, [*position, 1])[:3]
        np.testing.assert_allclose((x, y, z), (0, 0, round(z)), atol=1e-3)
        found[:, :, round(z)][frame.T > 0] = label
    return found


def run(network: tuple[Path, str], data: Path, output: Path, **more: str) -> Path:
    net, prepared = network
    given = DeployOptions(model=net, data=data, output=output, preprocessing=prepared, quiet=True, **more)  # type: ignore[arg-type]
    (result,) = deploy(given)
    assert result.error is None
    return result.labels


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_the_dicom_route_gives_the_labels_of_the_nifti_route(
    tmp_path: Path, shared: Path, network: tuple[Path, str], acquisition: str, syntax: str
) -> None:
    series, nifti = written(tmp_path, *acquired(shared, acquisition), SYNTAXES[syntax])
    truth = load_labels(run(network, nifti, tmp_path / "by-nifti"))
    assert len(np.unique(truth.data)) >= CLASSES - 1
    path = run(network, series, tmp_path / "by-dicom", output_type="dicom_seg")
    assert path.name == "ct_seg.dcm"
    np.testing.assert_array_equal(labels_of_seg(path, truth.shape, truth.affine), truth.data[0])
    header = pydicom.dcmread(path)
    source = pydicom.dcmread(next(series.iterdir()))
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert header[keyword].value == source[keyword].value
    assert "ptq3d" in header.SegmentSequence[0].SegmentAlgorithmName


@pytest.mark.parametrize("output_type", ["nifti", "nrrd"])
def test_a_series_is_also_segmented_into_volume_files(
    tmp_path: Path, network: tuple[Path, str], output_type: str
) -> None:
    write_by_itk(tmp_path / "ct", stored_values((20, 18, 17)), ORIENTATIONS["coronal"])
    path = run(network, tmp_path / "ct", tmp_path / "out", output_type=output_type)
    _, grid = read_by_itk(tmp_path / "ct")
    image = sitk.ReadImage(str(path))
    corner = np.array(image.TransformContinuousIndexToPhysicalPoint((19.0, 17.0, 16.0))) * (-1, -1, 1)
    np.testing.assert_allclose(corner, grid[:3, :3] @ (19, 17, 16) + grid[:3, 3], atol=1e-3)


def test_contours_and_zips_and_several_series(tmp_path: Path, network: tuple[Path, str]) -> None:
    """A study as a PACS exports it: patient / study / series, zipped; one series of it is chosen."""
    for name, high in (("plain", 20), ("contrast", 16)):
        folder = tmp_path / "export" / "patient" / "study" / name
        write_by_itk(folder, stored_values((20, 18, high)), ORIENTATIONS["axial"])
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            header.SeriesDescription, header.SeriesNumber = name, high
            header.save_as(path)
    archive = Path(shutil.make_archive(str(tmp_path / "study"), "zip", tmp_path / "export"))
    for place in (archive, tmp_path / "export"):
        path = run(network, place, tmp_path / "out", series="contrast", output_type="dicom_rtstruct")
        contours = pydicom.dcmread(path)
        assert contours.Modality == "RTSTRUCT"
        assert len(contours.StructureSetROISequence)
        referenced = contours.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
        assert referenced.RTReferencedSeriesSequence[0].SeriesInstanceUID == only_series(place, "contrast").uid


def test_the_choice_of_a_series_is_asked_for(
    tmp_path: Path, network: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_by_itk(tmp_path / "study" / name, stored_values((20, 18, 17)), ORIENTATIONS["axial"])
    net, prepared = network
    given = ["deploy", "--model", str(net), "--preprocessing", prepared, "--data", str(tmp_path / "study/a")]
    write_by_itk(tmp_path / "study/a/more", stored_values((20, 18, 12)), ORIENTATIONS["axial"])
    assert main([*given, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "choose with --series" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dicom_objects_of_a_nifti_are_refused_before_anything_is_segmented(
    tmp_path: Path, network: tuple[Path, str]
) -> None:
    nibabel.save(nibabel.Nifti1Image(stored_values((20, 18, 17)), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(OptionError, match="refers to the slices of a DICOM series"):
        run(network, tmp_path / "a.nii", tmp_path / "out", output_type="dicom_seg")
    assert not (tmp_path / "out").exists()


def test_a_tilted_gantry_is_straightened_for_the_network_and_kept_in_the_result(
    tmp_path: Path, network: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    affine = ORIENTATIONS["axial"].copy()
    affine[1, 2] += 0.4 * affine[2, 2]
    write_by_itk(tmp_path / "ct", stored_values((20, 18, 17)), affine)
    with caplog.at_level(logging.WARNING, "ptq3d"):
        path = run(network, tmp_path / "ct", tmp_path / "out")
    assert "gantry is tilted by 21.80 degrees" in caplog.text
    np.testing.assert_allclose(load_labels(path).affine, load_image(only_series(tmp_path / "ct")).affine, atol=1e-4)


def test_results_do_not_go_among_the_slices(tmp_path: Path, network: tuple[Path, str]) -> None:
    write_by_itk(tmp_path / "ct", stored_values((20, 18, 17)), ORIENTATIONS["axial"])
    before = sorted((tmp_path / "ct").iterdir())
    for output in (tmp_path / "ct", tmp_path / "ct" / "labels"):
        with pytest.raises(OptionError, match="lies among the slices"):
            run(network, tmp_path / "ct", output)
    assert sorted((tmp_path / "ct").iterdir()) == before


def exported(root: Path) -> Path:
    """A study with a folder for each series, a report, and an index that is broken."""
    for number, (name, high) in enumerate((("native", 20), ("portal venous", 16)), 2):
        folder = root / f"SER{number:04d}"
        write_by_itk(folder, stored_values((20, 18, high)), ORIENTATIONS["axial"])
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            header.SeriesDescription, header.SeriesNumber = name, number
            header.save_as(path)
    (root / "SER0999").mkdir()
    report = pydicom.dcmread(next((root / "SER0002").iterdir()))
    report.SOPClassUID, report.Modality = "1.2.840.10008.5.1.4.1.1.88.33", "SR"
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    report.save_as(root / "SER0999" / "1.dcm")
    (root / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + b"\xff" * 40)
    return root


@pytest.mark.parametrize("index", [True, False])
def test_a_study_with_a_folder_for_each_series_is_one_place(
    tmp_path: Path, network: tuple[Path, str], capsys: pytest.CaptureFixture[str], index: bool
) -> None:
    root = exported(tmp_path / "study")
    if not index:
        (root / "DICOMDIR").unlink()
    assert main(["data", "show", str(root)]) == 0  # what there is to choose from
    shown = capsys.readouterr().out
    assert "2 CT native" in shown
    assert "3 CT portal venous" in shown
    net, prepared = network
    given = [
        "deploy",
        "--model",
        str(net),
        "--preprocessing",
        prepared,
        "--data",
        str(root),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(given) == 2
    assert "choose with --series among: 2 CT native" in capsys.readouterr().err
    for series, name in (("portal", "study_3"), ("2", "study_2")):
        assert main([*given, "--series", series, "--report", str(tmp_path / "r.json")]) == 0
        (case,) = json.loads((tmp_path / "r.json").read_text())["cases"]
        assert Path(case["labels"]).name == f"{name}.nii.gz"
        assert f"(series {name[-1]} CT" in case["image"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["study_2.nii.gz", "study_3.nii.gz"]
    assert f"1 label map in {tmp_path / 'out'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["labels.nii.gz", "notes.txt"])
def test_the_output_is_a_folder(tmp_path: Path, network: tuple[Path, str], name: str) -> None:
    (tmp_path / "notes.txt").touch()
    nibabel.save(nibabel.Nifti1Image(stored_values((20, 18, 17)), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(OptionError, match="wanted a folder"):
        run(network, tmp_path / "a.nii", tmp_path / name)
    assert not (tmp_path / "labels.nii.gz").exists()


def test_another_preparation_than_the_networks_own_is_warned_of(
    tmp_path: Path, network: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    net, prepared = network
    nibabel.save(nibabel.Nifti1Image(stored_values((20, 18, 17)), np.eye(4)), tmp_path / "a.nii")
    (tmp_path / "other.toml").write_text(PREPARED.replace("6.0", "5.0"))
    own = export(ExportOptions(onnx_path=net, preprocessing=prepared, output=tmp_path / "own.onnx")).path
    for path, warned in ((prepared, False), (str(tmp_path / "other.toml"), True)):
        caplog.clear()
        run((own, path), tmp_path / "a.nii", tmp_path / "out")
        assert ("replaces what" in caplog.text) == warned


def test_zips_of_one_study_and_patients_of_one_study_number_stay_apart(tmp_path: Path) -> None:
    """A zip is never looked into through its folder, and anonymisers give one StudyInstanceUID to all."""
    for name in ("p1", "p2"):
        folder = write_by_itk(tmp_path / "folders" / name, stored_values((7, 6, 5)), ORIENTATIONS["axial"])
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            header.PatientID = name
            header.save_as(path)
        (tmp_path / "zips").mkdir(exist_ok=True)
        shutil.make_archive(str(tmp_path / "zips" / name), "zip", folder)
    (tmp_path / "zips" / "broken.zip").write_bytes(b"PK\3\4 and nothing more")
    assert [case.name for case in open_dataset(tmp_path / "folders").cases] == ["p1", "p2"]
    found = open_dataset(tmp_path / "zips")  # the broken one fails when it is read
    assert [case.name for case in found.cases] == ["broken", "p1", "p2"]
    assert [isinstance(case.images[0], Path) for case in found.cases] == [True, False, False]


def test_a_report_may_lie_in_the_folder_that_the_verb_makes(tmp_path: Path, network: tuple[Path, str]) -> None:
    made = tmp_path / "engine"
    assert main(["build", "--onnx", str(network[0]), "--output", str(made), "--report", str(made / "report.json")]) == 0
    assert (made / "report.json").is_file()
