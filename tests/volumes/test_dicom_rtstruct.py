"""Contours of an RTSTRUCT, filled by others, are the labels they were made of, holes included."""

from __future__ import annotations

from pathlib import Path

import highdicom
import matplotlib.path
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom.uid import generate_uid
from scipy.ndimage import gaussian_filter
from skimage.draw import polygon2mask

from dicoms import ORIENTATIONS, TO_LPS, stored_values, write_by_itk, write_series
from grids import affines, noise
from ptq3d.errors import FileError, GeometryError, LabelError
from ptq3d.volumes.dicom import find_series, only_series, series_grid
from ptq3d.volumes.rtstruct import contours_of, write_rtstruct
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import Volume

NAMES = ["background", "liver", "left kidney", "lesion"]


def blobs(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Smooth labels 0..3 in which parts have holes."""
    field = gaussian_filter(noise(shape, seed), 1.5)
    edges = np.quantile(field, [0.4, 0.7, 0.9])
    return np.digitize(field, edges).astype(np.uint8)


def filled(path: Path, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """(X, Y, Z) labels: each contour filled by skimage, what it leaves out between parts by the even-odd rule."""
    dataset = pydicom.dcmread(path)
    labels = np.zeros(shape, np.uint8)
    for region in dataset.ROIContourSequence:
        for contour in region.get("ContourSequence", []):
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            indices = np.linalg.solve(TO_LPS @ affine, np.column_stack([points, np.ones(len(points))]).T)[:3].T
            depth = np.rint(indices[:, 2]).astype(int)
            np.testing.assert_allclose(indices[:, 2], depth, atol=2e-3)
            labels[polygon2mask(shape[:2], indices[:, :2]), depth[0]] = region.ReferencedROINumber
    return labels


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def series_in(folder: Path, orientation: str = "axial", shape: tuple[int, int, int] = (40, 32, 5)) -> Series:
    write_series(folder, stored_values(shape), ORIENTATIONS[orientation])
    return only_series(folder)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_filled_contours_are_the_labels(tmp_path: Path, orientation: str) -> None:
    series = series_in(tmp_path / "ct", orientation)
    shape, affine = series_grid(series)
    data = blobs(shape)
    write_rtstruct(tmp_path / "rt.dcm", Volume(data[None], affine), series, NAMES, algorithm="ptq3d")
    found = filled(tmp_path / "rt.dcm", shape, affine)
    for index in (1, 2, 3):
        assert dice(found == index, data == index) == 1


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(affine=affines(sheared=False), seed=st.integers(0, 99))
def test_on_any_grid(tmp_path: Path, affine: np.ndarray, seed: int) -> None:
    folder = tmp_path / generate_uid()
    write_by_itk(folder, stored_values((14, 13, 3)), affine)
    series = only_series(folder)
    shape, grid = series_grid(series)
    data = blobs(shape, seed)
    write_rtstruct(tmp_path / "rt.dcm", Volume(data[None], grid), series, NAMES, algorithm="ptq3d")
    np.testing.assert_array_equal(filled(tmp_path / "rt.dcm", shape, grid), data)


@settings(max_examples=300, deadline=None)
@given(mask=arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_any_mask_is_inside_its_contours_alone(mask: np.ndarray) -> None:
    """Even single pixels, corners that touch and parts within holes; filled by matplotlib (nonzero) and skimage (even-odd)."""
    centres = np.argwhere(np.ones_like(mask))[:, ::-1]
    nonzero, even = np.zeros(mask.size, int), np.zeros(mask.shape, int)
    for outline in contours_of(mask):
        closed = np.concatenate([outline, outline[:1]])
        nonzero += matplotlib.path.Path(closed).contains_points(centres)
        even += polygon2mask(mask.shape, outline[:, ::-1])
    np.testing.assert_array_equal(nonzero.reshape(mask.shape), mask)
    np.testing.assert_array_equal(even, mask)


def test_a_ring_is_one_contour_with_a_keyhole() -> None:
    mask = np.ones((9, 9), bool)
    mask[3:6, 3:6] = False
    (outline,) = contours_of(mask)
    x, y = outline.T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert area == pytest.approx(9 * 9 - 0.5 - (3 * 3 - 0.5), abs=0.01)


def test_regions_are_named_coloured_and_refer_to_their_slices(tmp_path: Path) -> None:
    series = series_in(tmp_path / "ct")
    shape, affine = series_grid(series)
    data = np.zeros((1, *shape), np.uint8)
    data[0, 3:20, 4:9, 1:3] = 2
    write_rtstruct(tmp_path / "rt.dcm", Volume(data, affine), series, NAMES, algorithm="ptq3d INT8")
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    source = pydicom.dcmread(series.place / series.members[0])
    for keyword in ("FrameOfReferenceUID", "StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate"):
        assert dataset[keyword].value == source[keyword].value
    (region,), (roi,), (seen,) = (
        dataset.ROIContourSequence,
        dataset.StructureSetROISequence,
        dataset.RTROIObservationsSequence,
    )
    assert (roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID) == (
        2,
        "left kidney",
        source.FrameOfReferenceUID,
    )
    assert (seen.RTROIInterpretedType, seen.ReferencedROINumber) == ("ORGAN", 2)
    assert len(region.ROIDisplayColor) == 3
    uids = [pydicom.dcmread(series.place / name).SOPInstanceUID for name in series.members]
    assert [contour.ContourImageSequence[0].ReferencedSOPInstanceUID for contour in region.ContourSequence] == uids[1:3]
    told = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert told.SeriesInstanceUID == series.uid
    assert [image.ReferencedSOPInstanceUID for image in told.ContourImageSequence] == uids
    assert [contour.NumberOfContourPoints for contour in region.ContourSequence] == [8, 8]
    assert [one.uid for one in find_series(tmp_path)] == [series.uid]


def test_a_multi_frame_source(tmp_path: Path) -> None:
    series_in(tmp_path / "ct", "oblique")
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "ct").iterdir())]
    whole = highdicom.legacy.LegacyConvertedEnhancedCTImage(slices, generate_uid(), 9, generate_uid(), 1)
    whole.save_as(tmp_path / "whole.dcm")
    series = only_series(tmp_path / "whole.dcm")
    shape, affine = series_grid(series)
    data = blobs(shape)
    write_rtstruct(tmp_path / "rt.dcm", Volume(data[None], affine), series, NAMES, algorithm="ptq3d")
    np.testing.assert_array_equal(filled(tmp_path / "rt.dcm", shape, affine), data)
    for contour in pydicom.dcmread(tmp_path / "rt.dcm").ROIContourSequence[0].ContourSequence:
        frame = contour.ContourImageSequence[0].ReferencedFrameNumber - 1
        position = whole.PerFrameFunctionalGroupsSequence[frame].PlanePositionSequence[0].ImagePositionPatient
        normal = np.cross(*np.reshape(slices[0].ImageOrientationPatient, (2, 3)).astype(float))
        assert abs((np.array(contour.ContourData[:3], float) - np.array(position, float)) @ normal) < 2e-3


def test_where_nothing_was_found_all_regions_are_empty(tmp_path: Path) -> None:
    series = series_in(tmp_path / "ct")
    shape, affine = series_grid(series)
    write_rtstruct(tmp_path / "rt.dcm", Volume(np.zeros((1, *shape), np.uint8), affine), series, NAMES, algorithm="a")
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    assert [roi.ROIName for roi in dataset.StructureSetROISequence] == NAMES[1:]
    assert not any("ContourSequence" in region for region in dataset.ROIContourSequence)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    series = series_in(tmp_path / "ct")
    shape, affine = series_grid(series)
    labels = Volume(blobs(shape)[None], affine)
    with pytest.raises(LabelError, match="label 3 has no name"):
        write_rtstruct(tmp_path / "rt.dcm", labels, series, NAMES[:3], algorithm="ptq3d")
    with pytest.raises(GeometryError, match="do not lie on the slices"):
        write_rtstruct(tmp_path / "rt.dcm", Volume(labels.data, np.eye(4)), series, NAMES, algorithm="ptq3d")
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be written"):
        write_rtstruct(tmp_path / "file" / "rt.dcm", labels, series, NAMES, algorithm="ptq3d")
    assert {path.name for path in tmp_path.iterdir()} == {"ct", "file"}
