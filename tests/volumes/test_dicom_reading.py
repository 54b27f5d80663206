"""A series reads as SimpleITK reads it, voxel for voxel and place for place, however it is stored."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zipfile
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

from dicoms import (
    ORIENTATIONS,
    PACKED,
    as_read,
    edit,
    read_by_itk,
    recompress,
    stored_values,
    write_by_itk,
    write_series,
)
from grids import affines
from ptq3d.volumes.dicom import find_series, only_series, read_series, series_grid
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import grid_distance

NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


def agree(place: Path, data: np.ndarray, affine: np.ndarray) -> None:
    """Our reading of the one series there is this, and so is its grid."""
    series = only_series(place)
    voxels, read_affine = read_series(series)
    assert voxels.dtype == np.float32
    np.testing.assert_array_equal(voxels, data.astype(np.float32))
    np.testing.assert_allclose(read_affine, affine, atol=1e-4)
    shape, grid_affine = series_grid(series)
    assert shape == voxels.shape
    np.testing.assert_array_equal(grid_affine, read_affine)


def agree_with_itk(folder: Path) -> None:
    data, affine = read_by_itk(folder)
    agree(folder, data, affine)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_what_itk_writes_is_read_as_itk_reads_it(tmp_path: Path, orientation: str, dtype: type) -> None:
    stored, affine = stored_values(dtype=dtype), ORIENTATIONS[orientation]
    write_by_itk(tmp_path, stored, affine)
    agree_with_itk(tmp_path)
    agree(tmp_path, *as_read(stored, affine))


@pytest.mark.parametrize("rescale", [(1, -1024), (0.5, 10), (0.01831501831, -1e-3)])
def test_what_itk_writes_with_a_rescale_is_read_as_itk_reads_it(tmp_path: Path, rescale: tuple[float, float]) -> None:
    write_by_itk(tmp_path, stored_values(dtype=np.uint16), ORIENTATIONS["oblique"], rescale)
    agree_with_itk(tmp_path)


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32])
def test_uncompressed_series(tmp_path: Path, syntax: pydicom.uid.UID, dtype: type) -> None:
    stored, affine = stored_values(dtype=dtype), ORIENTATIONS["coronal"]
    write_series(tmp_path, stored, affine, syntax=syntax)
    agree(tmp_path, *as_read(stored.astype(np.float64) - 1024, affine))
    if syntax != ExplicitVRBigEndian:  # GDCM reads its signed values otherwise
        agree_with_itk(tmp_path)


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8])
def test_compressed_series(tmp_path: Path, packing: str, dtype: type) -> None:
    stored, affine = stored_values((72, 65, 3), dtype), ORIENTATIONS["sagittal"]  # GDCM packs no smaller ones
    write_series(tmp_path, stored, affine)
    recompress(tmp_path, PACKED[packing])
    agree(tmp_path, *as_read(stored.astype(np.float64) - 1024, affine))
    agree_with_itk(tmp_path)


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_compressed_series_of_twelve_bits(tmp_path: Path, packing: str, dtype: type) -> None:
    """As most scanners store: 12 of 16 bits, signed or not."""
    stored = np.clip(stored_values((72, 65, 3), dtype), -2048 if dtype == np.int16 else 0, 2047)
    write_series(tmp_path, stored, ORIENTATIONS["axial"], change=twelve_bits)
    recompress(tmp_path, PACKED[packing])
    agree(tmp_path, *as_read(stored.astype(np.float64) - 1024, ORIENTATIONS["axial"]))
    agree_with_itk(tmp_path)


def twelve_bits(header: Dataset, index: int) -> None:
    header.BitsStored, header.HighBit = 12, 11


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    affine=affines(),
    shape=st.tuples(*[st.integers(2, 6)] * 3),
    rescale=st.tuples(st.floats(1e-3, 50).map(lambda value: float(f"{value:.6g}")), st.integers(-2000, 2000)),
    modality=st.sampled_from(["CT", "MR"]),
)
def test_any_grid_and_rescale(
    tmp_path: Path,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    rescale: tuple[float, float],
    modality: str,
) -> None:
    folder = tmp_path / "series"
    shutil.rmtree(folder, ignore_errors=True)
    stored = stored_values(shape, np.uint16)
    write_series(folder, stored, affine, rescale=rescale, modality=modality)
    agree(folder, *as_read(stored * rescale[0] + rescale[1], affine))
    agree_with_itk(folder)


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    stored, affine = stored_values(dtype=np.uint16), ORIENTATIONS["axial"]

    def change(header: Dataset, index: int) -> None:
        header.RescaleSlope, header.RescaleIntercept = 0.5 + index, -3 * index

    write_series(tmp_path, stored, affine, change=change)
    depth = np.arange(stored.shape[2])
    agree(tmp_path, *as_read(stored * (0.5 + depth) - 3 * depth, affine))
    agree_with_itk(tmp_path)


def test_values_without_a_rescale_are_as_stored(tmp_path: Path) -> None:
    stored, affine = stored_values(dtype=np.uint16), ORIENTATIONS["coronal"]
    write_series(tmp_path, stored, affine, rescale=None, modality="MR")
    agree(tmp_path, *as_read(stored, affine))


def test_bits_beyond_those_stored_do_not_count(tmp_path: Path) -> None:
    """Twelve of sixteen bits, with an overlay's bits above them: as old scanners stored."""
    stored, affine = stored_values(dtype=np.uint16), ORIENTATIONS["axial"]
    write_series(tmp_path, stored | 0x4000, affine, change=twelve_bits)
    agree(tmp_path, *as_read(stored - 1024.0, affine))


@pytest.mark.parametrize("degrees", [5.0, -22.5])
def test_a_tilted_gantry_is_read_exactly_and_told(
    tmp_path: Path, degrees: float, caplog: pytest.LogCaptureFixture
) -> None:
    affine = ORIENTATIONS["axial"].copy()
    affine[1, 2] = affine[2, 2] * np.tan(np.radians(degrees))
    stored = stored_values()
    write_series(tmp_path, stored, affine)
    with caplog.at_level(logging.WARNING, "ptq3d"):
        agree(tmp_path, *as_read(stored - 1024.0, affine))
    assert [record.message for record in caplog.records] == [
        f"{only_series(tmp_path)}: the gantry is tilted by {abs(degrees):.2f} degrees; read as a sheared grid."
    ]


def test_positions_rounded_to_a_tenth_are_even(tmp_path: Path) -> None:
    """0.625 mm steps written as 0.6 and 0.7: each slice within a tenth of a voxel of its even place."""
    affine = ORIENTATIONS["axial"].copy()
    affine[2, 2] = 0.625

    def change(header: Dataset, index: int) -> None:
        header.ImagePositionPatient[2] = round(float(header.ImagePositionPatient[2]), 1)

    stored = stored_values((4, 5, 33))
    write_series(tmp_path, stored, affine, change=change)
    assert grid_distance(as_read(stored, affine)[1], series_grid(only_series(tmp_path))[1], stored.shape) < 0.1


def test_a_landmark_stays_where_it_is(tmp_path: Path) -> None:
    for orientation, affine in ORIENTATIONS.items():
        stored = np.zeros((7, 6, 5), np.int16)
        stored[5, 1, 3] = 2000
        write_series(tmp_path / orientation, stored, affine)
        voxels, read = read_series(only_series(tmp_path / orientation))
        place = read @ [*np.argwhere(voxels == voxels.max())[0], 1]
        np.testing.assert_allclose(place, affine @ [5, 1, 3, 1], atol=1e-4)


def test_an_enhanced_multi_frame_image(tmp_path: Path) -> None:
    stored, affine = stored_values(), ORIENTATIONS["oblique"]
    write_series(tmp_path / "single", stored, affine)
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "single").iterdir())]
    whole = highdicom.legacy.LegacyConvertedEnhancedCTImage(slices, generate_uid(), 9, generate_uid(), 1)
    whole.save_as(tmp_path / "whole.dcm")
    for place in (tmp_path / "whole.dcm", tmp_path):
        series = only_series(place, whole.SeriesInstanceUID)
        voxels, read_affine = read_series(series)
        data, wanted = as_read(stored - 1024.0, affine)
        np.testing.assert_array_equal(voxels, data)
        np.testing.assert_allclose(read_affine, wanted, atol=1e-4)
    assert [len(series.members) for series in find_series(tmp_path)] == [5, 1]


def test_a_zip_reads_as_its_folder(tmp_path: Path) -> None:
    stored, affine = stored_values(), ORIENTATIONS["coronal"]
    write_series(tmp_path / "folder" / "study" / "3", stored, affine)
    shutil.make_archive(str(tmp_path / "export"), "zip", tmp_path / "folder")
    agree(tmp_path / "export.zip", *as_read(stored - 1024.0, affine))
    before = set(tmp_path.rglob("*"))
    read_series(only_series(tmp_path / "export.zip"))
    assert set(tmp_path.rglob("*")) == before


def test_files_without_a_preamble(tmp_path: Path) -> None:
    stored, affine = stored_values(), ORIENTATIONS["axial"]
    write_series(tmp_path, stored, affine, syntax=ImplicitVRLittleEndian)
    for path in tmp_path.iterdir():
        header = pydicom.dcmread(path)
        del header.file_meta
        header.preamble = None
        header.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    agree(tmp_path, *as_read(stored - 1024.0, affine))


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    stored, affine = stored_values(), ORIENTATIONS["axial"]
    write_series(tmp_path / "images", stored, affine)
    (tmp_path / "notes.txt").write_text("a text")
    (tmp_path / "empty").touch()
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    report = pydicom.dcmread(next((tmp_path / "images").iterdir()))
    for name, kind in {"SR": "1.2.840.10008.5.1.4.1.1.88.11", "DICOMDIR": "1.2.840.10008.1.3.10"}.items():
        report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = kind
        report.SeriesInstanceUID = generate_uid()
        report.save_as(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    agree(tmp_path, *as_read(stored - 1024.0, affine))


@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_file_of_which_nothing_is_left_is_told(tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture) -> None:
    """The last slice: no gap would show that it is missing."""
    stored, affine = stored_values(), ORIENTATIONS["axial"]
    write_series(tmp_path, stored, affine)
    last = tmp_path / only_series(tmp_path).members[-1]
    last.write_bytes(last.read_bytes()[:left])
    with caplog.at_level(logging.WARNING, "ptq3d"):
        only_series(tmp_path)
    assert [record.message for record in caplog.records] == [
        f"{last} is empty (1 such files): if it is a slice, copy it again."
    ]


def test_links_lead_to_each_file_once(tmp_path: Path) -> None:
    stored, affine = stored_values(), ORIENTATIONS["axial"]
    write_series(tmp_path / "a" / "series", stored, affine)
    (tmp_path / "a" / "series" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a" / "series")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "there").symlink_to(tmp_path / "a")
    agree(tmp_path / "b", *as_read(stored - 1024.0, affine))
    agree(tmp_path / "a", *as_read(stored - 1024.0, affine))


def test_series_are_listed_and_chosen(tmp_path: Path) -> None:
    def named(number: int, text: str) -> object:
        def change(header: Dataset, index: int) -> None:
            header.SeriesNumber, header.SeriesDescription = number, text

        return change

    for number, text in ((12, "Thorax lung"), (3, "Abdomen portal"), (1, "Scout")):
        depth = 1 if text == "Scout" else 5
        write_series(
            tmp_path / str(number), stored_values((7, 6, depth)), ORIENTATIONS["axial"], change=named(number, text)
        )
    scout, portal, lung = find_series(tmp_path)
    assert portal.description == "3 CT Abdomen portal"
    for wanted in ("3", "PORTAL", portal.uid, portal.uid[-9:]):
        assert only_series(tmp_path, wanted) == portal
    assert only_series(tmp_path, "12") == lung
    assert len(scout.members) == 1
    assert [int(pydicom.dcmread(tmp_path / name).InstanceNumber) for name in portal.members] == [1, 2, 3, 4, 5]


def test_real_ct_in_coronal_slices(tmp_path: Path, shared: Path) -> None:
    """The volume turned so that its slices are coronal, written by ITK, read by us: each voxel where it was."""
    image = nibabel.load(shared / "data" / "abdomen_ct" / "images" / "ct.nii.gz")
    turn = np.array([[-1, 0, 0, image.shape[0] - 1], [0, 0, 1, 0], [0, -1, 0, image.shape[2] - 1], [0, 0, 0, 1.0]])
    stored = np.asarray(image.dataobj).astype(np.int16)[::-1, :, ::-1].swapaxes(1, 2)
    write_by_itk(tmp_path, stored, image.affine @ turn)
    agree(tmp_path, *as_read(stored, image.affine @ turn))
    agree_with_itk(tmp_path)


@pytest.mark.parametrize("name", ["IM0000", "IM0003"])
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans()
)
def test_any_change_of_a_file_is_read_or_refused(
    tmp_path: Path, name: str, changes: list[tuple[int, int]], cut: bool
) -> None:
    from ptq3d.errors import InputError

    folder = tmp_path / "series"
    if not folder.exists():
        write_series(folder, stored_values((7, 6, 4)), ORIENTATIONS["axial"])
        shutil.copy(folder / name, tmp_path / "whole")
    content = bytearray((tmp_path / "whole").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (folder / name).write_bytes(content[: changes[0][0] % len(content)] if cut else content)
    with contextlib.suppress(InputError):
        for series in find_series(folder):
            read_series(series)


def test_a_zip_member_is_held_against_its_checksum(tmp_path: Path) -> None:
    from ptq3d.errors import FileError

    write_series(tmp_path / "folder", stored_values(), ORIENTATIONS["axial"])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in (tmp_path / "folder").iterdir():
            archive.write(path, path.name)
    series = only_series(tmp_path / "a.zip")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    pixels = stored_values()[:, :, 2].T.tobytes()
    content[bytes(content).index(pixels) + 5] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(FileError, match="CRC"):
        read_series(series)


def test_a_series_is_told_by_its_place(tmp_path: Path) -> None:
    write_series(tmp_path, stored_values(), ORIENTATIONS["axial"])
    edit(tmp_path, lambda header, index: setattr(header, "SeriesDescription", "a\nb  c"))
    series = only_series(tmp_path)
    assert str(series) == f"{tmp_path} (series 3 CT a b c)"
    assert isinstance(series, Series)
