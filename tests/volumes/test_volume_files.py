"""Files give what nibabel and SimpleITK give, and broken ones give one clear sentence."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grids import affines, noise, shapes
from ptq3d.errors import FileError, GeometryError, InputError, IntensityError, LabelError, Ptq3dError, ShapeError
from ptq3d.volumes.files import FORMATS, is_volume, load_grid, load_image, load_labels, save_labels
from ptq3d.volumes.source import Series
from ptq3d.volumes.volume import Volume

RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
AFFINE = np.array([[0, 0, 2.0, -10], [-1.5, 0, 0, 20], [0, 1.0, 0, 5], [0, 0, 0, 1]])


def written(path: Path, data: np.ndarray, affine: np.ndarray | None = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(data, affine, dtype=data.dtype), path)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64, np.int32])
def test_an_image_is_what_nibabel_reads(tmp_path: Path, name: str, dtype: type) -> None:
    path = written(tmp_path / name, (noise((5, 6, 7)) * 50 + 100).astype(dtype))
    volume = load_image(path)
    reference = nibabel.load(path)
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data[0], reference.get_fdata().astype(np.float32))
    np.testing.assert_array_equal(volume.affine, reference.affine)


def test_slope_and_intercept_give_the_unit_of_the_file(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), AFFINE)
    image.header.set_slope_inter(0.5, -1024)
    nibabel.save(image, tmp_path / "a.nii")
    reference = nibabel.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_allclose(load_image(tmp_path / "a.nii").data[0], reference, rtol=1e-6)


def test_sform_goes_before_qform(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(noise((3, 4, 5)), None)
    image.set_qform(np.diag([2.0, 2.0, 2.0, 1.0]), code=1)
    nibabel.save(image, tmp_path / "q.nii")
    assert load_image(tmp_path / "q.nii").spacing == (2.0, 2.0, 2.0)
    image.set_sform(np.diag([3.0, 2.0, 2.0, 1.0]), code=1)
    nibabel.save(image, tmp_path / "s.nii")
    assert load_image(tmp_path / "s.nii").spacing == (3.0, 2.0, 2.0)


def test_a_4d_file_of_one_volume_is_a_volume(tmp_path: Path) -> None:
    data = noise((3, 4, 5))
    np.testing.assert_array_equal(load_image(written(tmp_path / "a.nii", data[..., None])).data[0], data)


def spacing_zero(path: Path) -> None:
    written(path, noise((4, 4, 4)))
    content = bytearray(path.read_bytes())
    content[84:88] = np.float32(0).tobytes()  # pixdim[2]
    path.write_bytes(content)


def sform_singular(path: Path) -> None:
    written(path, np.zeros((4, 4, 4), np.uint8))
    content = bytearray(path.read_bytes())
    content[280:292] = np.array([1, 1, 0], np.float32).tobytes()  # srow_x, then srow_y: two axes along one line
    content[296:308] = np.array([1, 1, 0], np.float32).tobytes()
    content[312:324] = np.array([0, 0, 1], np.float32).tobytes()
    path.write_bytes(content)


def cut(path: Path, bytes_left: int) -> None:
    written(path, noise((16, 16, 16)))
    path.write_bytes(path.read_bytes()[:bytes_left])


def broken_checksum(path: Path) -> None:
    written(path, noise((16, 16, 16)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def with_voxel(path: Path, value: float) -> None:
    data = noise((4, 4, 4)).astype(np.float64)
    data[1, 2, 3] = data[0, 0, 0] = value
    written(path, data)


BROKEN: dict[str, tuple[str, Callable[[Path], object], type[Ptq3dError], str]] = {
    "missing": ("a.nii.gz", lambda path: None, FileError, "no such file"),
    "folder": ("a.nii.gz", lambda path: path.mkdir(), FileError, "a folder"),
    "unknown kind": ("a.xyz", lambda path: path.write_bytes(b"x"), FileError, r"\.nii\.gz, \.nii"),
    "empty": ("a.nii", lambda path: path.write_bytes(b""), FileError, "truncated"),
    "empty gz": ("a.nii.gz", lambda path: path.write_bytes(b""), FileError, "truncated"),
    "no gzip": ("a.nii.gz", lambda path: path.write_bytes(b"hello" * 100), FileError, "truncated"),
    "gzip of garbage": (
        "a.nii.gz",
        lambda path: path.write_bytes(gzip.compress(os.urandom(5000))),
        FileError,
        "no readable NIfTI",
    ),
    "header only": ("a.nii", lambda path: cut(path, 352), FileError, "truncated"),
    "half a header": ("a.nii", lambda path: cut(path, 200), FileError, "truncated"),
    "cut": ("a.nii", lambda path: cut(path, 5000), FileError, "truncated"),
    "cut gz": ("a.nii.gz", lambda path: cut(path, 5000), FileError, "truncated"),
    "cut gz in its header": ("a.nii.gz", lambda path: cut(path, 60), FileError, "truncated"),
    "flipped bits": ("a.nii.gz", broken_checksum, FileError, "truncated"),
    "2D": ("a.nii", lambda path: written(path, noise((8, 8))), FileError, r"one 3D volume, got shape \(8, 8\)"),
    "4D": ("a.nii", lambda path: written(path, noise((8, 8, 8, 3))), FileError, "one 3D volume"),
    "complex": ("a.nii", lambda path: written(path, noise((4, 4, 4)).astype(np.complex64)), FileError, "real number"),
    "colours": ("a.nii", lambda path: written(path, np.zeros((4, 4, 4), RGB)), FileError, "real number"),
    "NaN": ("a.nii", lambda path: with_voxel(path, np.nan), IntensityError, "2 of 64 voxels are NaN"),
    "infinite": ("a.nii", lambda path: with_voxel(path, np.inf), IntensityError, "2 of 64"),
    "too large": ("a.nii", lambda path: with_voxel(path, 1e300), IntensityError, "2 of 64"),
    "zero spacing": ("a.nii", spacing_zero, GeometryError, "zero, negative or broken spacing"),
    "singular": ("a.nii", sform_singular, GeometryError, "singular"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_gives_one_sentence_that_names_it(tmp_path: Path, case: str) -> None:
    name, make, error, message = BROKEN[case]
    make(tmp_path / name)
    with pytest.raises(error, match=message) as caught:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    if error is not IntensityError:
        with pytest.raises(error, match=message):
            load_labels(tmp_path / name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), name=st.sampled_from(["a.nii", "a.nii.gz"]))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, data: st.DataObject, name: str) -> None:
    path = written(tmp_path / name, noise((6, 6, 6)))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FileError):
        load_image(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_changed_byte_in_a_compressed_file_changes_nothing_unseen(tmp_path: Path, data: st.DataObject) -> None:
    """Refused, but where the byte codes the same voxels in another way (lengths of symbols that never come)."""
    path = written(tmp_path / "a.nii.gz", noise((6, 6, 6)))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(10, len(content) - 1))] ^= data.draw(st.integers(1, 255))  # behind gzip's own header
    path.write_bytes(content)
    try:
        volume = load_image(path)
    except FileError:
        return
    np.testing.assert_array_equal(volume.data[0], noise((6, 6, 6)))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_change_of_the_header_is_read_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: list[tuple[int, int]]
) -> None:
    path = written(tmp_path / "a.nii", noise((5, 6, 7)))
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place] = value
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        load_image(path)


@pytest.mark.parametrize(("high", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)])
@pytest.mark.parametrize("stored", [np.float32, np.int32, np.uint16])
def test_labels_come_in_the_smallest_type(tmp_path: Path, high: int, dtype: type, stored: type) -> None:
    data = np.zeros((3, 4, 5), stored)
    data[1, 1, 1] = high
    labels = load_labels(written(tmp_path / "a.nii.gz", data))
    assert labels.data.dtype == dtype
    np.testing.assert_array_equal(labels.data[0], data)


@pytest.mark.parametrize(
    ("value", "message"), [(1.5, "1 of 60 label values"), (-1, "0..65535"), (70000, "0..65535"), (np.nan, "whole")]
)
def test_values_that_are_no_labels_are_refused(tmp_path: Path, value: float, message: str) -> None:
    data = np.zeros((3, 4, 5), np.float32)
    data[0, 0, 0] = value
    with pytest.raises(LabelError, match=message):
        load_labels(written(tmp_path / "a.nii.gz", data))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(affine=affines())
def test_saved_labels_lie_where_they_were(tmp_path: Path, affine: np.ndarray) -> None:
    data = np.random.default_rng(0).integers(0, 14, (1, 4, 5, 6)).astype(np.uint16)
    save_labels(tmp_path / "a.nii.gz", Volume(data, affine))
    back = load_labels(tmp_path / "a.nii.gz")
    assert back.data.dtype == np.uint8
    np.testing.assert_array_equal(back.data, data)
    np.testing.assert_array_equal(back.affine, affine.astype(np.float32))
    header = nibabel.load(tmp_path / "a.nii.gz").header
    assert int(header["sform_code"]) == int(header["qform_code"]) == 1
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-3)
    itk = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    corner = np.diag([-1, -1, 1]) @ itk.TransformIndexToPhysicalPoint((3, 4, 5))  # ITK counts in LPS
    np.testing.assert_allclose(corner, affine[:3, :3] @ (3, 4, 5) + affine[:3, 3], atol=1e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).T, data[0])


def test_the_header_of_saved_labels(tmp_path: Path) -> None:
    save_labels(tmp_path / "new" / "a.nii", Volume(np.ones((1, 2, 2, 2), np.uint8), AFFINE))
    content = (tmp_path / "new" / "a.nii").read_bytes()
    slope, intercept = np.frombuffer(content[112:120], np.float32)
    assert (slope, intercept) == (1, 0)
    assert nibabel.load(tmp_path / "new" / "a.nii").header.get_xyzt_units()[0] == "mm"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.nii"]


def test_a_sheared_grid_is_stored_in_the_sform_alone(tmp_path: Path) -> None:
    sheared = np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    save_labels(tmp_path / "a.nii", Volume(np.ones((1, 2, 2, 2), np.uint8), sheared))
    np.testing.assert_array_equal(load_labels(tmp_path / "a.nii").affine, sheared.astype(np.float32))
    assert int(nibabel.load(tmp_path / "a.nii").header["qform_code"]) == 0


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (np.zeros((1, 2, 2, 2), np.float32), ShapeError),
        (np.zeros((2, 2, 2, 2), np.uint8), ShapeError),
        (np.full((1, 2, 2, 2), 70000, np.uint32), LabelError),
    ],
)
def test_what_is_no_label_map_is_not_saved(tmp_path: Path, data: np.ndarray, error: type[Ptq3dError]) -> None:
    with pytest.raises(error):
        save_labels(tmp_path / "a.nii.gz", Volume(data, AFFINE))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    save_labels(path, Volume(np.ones((1, 2, 2, 2), np.uint8), AFFINE))

    def full_disk(image: object, place: Path) -> None:
        place.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(nibabel, "save", full_disk)
    with pytest.raises(FileError, match="No space left"):
        save_labels(path, Volume(np.zeros((1, 2, 2, 2), np.uint8), AFFINE))
    assert [place.name for place in tmp_path.iterdir()] == ["a.nii.gz"]
    assert load_labels(path).data.all()


def test_volumes_are_known_by_their_name(tmp_path: Path) -> None:
    for name in ("a.nii", "B.NII.GZ", ".hidden.nii.gz", "notes.txt", "c.gz"):
        (tmp_path / name).touch()
    (tmp_path / "folder.nii").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir() if is_volume(path)) == ["B.NII.GZ", "a.nii"]


def test_a_file_in_the_way_of_the_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(FileError, match="cannot be written"):
        save_labels(tmp_path / "out" / "a.nii.gz", Volume(np.ones((1, 2, 2, 2), np.uint8), AFFINE))
    assert (tmp_path / "out").read_text() == "not a folder"


WRITABLE = [suffix for suffix, format_ in FORMATS.items() if format_.write]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    affine=affines(sheared=True),
    shape=shapes(),
    suffix=st.sampled_from(WRITABLE),
    high=st.sampled_from([1, 255, 256, 65535]),
)
def test_labels_come_back_from_every_format(
    tmp_path: Path, affine: np.ndarray, shape: tuple[int, int, int], suffix: str, high: int
) -> None:
    data = np.random.default_rng(0).integers(0, high, (1, *shape), endpoint=True).astype(np.uint16)
    data[0, 0, 0, 0] = high
    path = tmp_path / f"a{suffix}"
    save_labels(path, Volume(data, affine))
    back = load_labels(path)
    assert back.data.dtype == (np.uint8 if high < 256 else np.uint16)
    np.testing.assert_array_equal(back.data, data)
    np.testing.assert_allclose(
        back.affine, affine, rtol=1e-5, atol=1e-4
    )  # float32 in NIfTI; directions and centre in MGH
    np.testing.assert_array_equal(load_grid(path)[1], back.affine)
    assert [place.name for place in tmp_path.iterdir() if place.name.startswith(".")] == []


@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix not in WRITABLE])
def test_formats_of_two_files_are_only_read(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(
        FileError, match=r"only read; save labels as one of \.nii\.gz, \.nii, \.nrrd, \.mha, \.mgz, \.mgh"
    ):
        save_labels(tmp_path / f"a{suffix}", Volume(np.ones((1, 2, 2, 2), np.uint8), AFFINE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", WRITABLE)
@pytest.mark.parametrize("stem", ["Ärzte 日本 плечо", "a.b.c", "x" * 240, "with space", "Q"])
def test_any_name_that_a_file_may_have_works(tmp_path: Path, suffix: str, stem: str) -> None:
    path = tmp_path / (stem + (suffix.upper() if stem == "Q" else suffix))
    save_labels(path, Volume(np.ones((1, 2, 3, 4), np.uint8), AFFINE))
    assert load_labels(path).data.all()
    assert load_image(path).shape == load_grid(path)[0] == (2, 3, 4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", WRITABLE)
def test_a_name_too_long_is_a_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("x" * 300 + suffix)
    with pytest.raises(FileError, match=r"cannot be written.*too long"):
        save_labels(path, Volume(np.ones((1, 2, 3, 4), np.uint8), AFFINE))
    assert not list(tmp_path.iterdir())


def test_labels_are_not_read_from_dicom(tmp_path: Path) -> None:
    for source in (tmp_path, Series(tmp_path, "1.2", ("a.dcm",))):
        with pytest.raises(FileError, match="labels are not read from DICOM"):
            load_labels(source)


def test_a_sheet_of_one_row_of_voxels_is_read_in_slabs(tmp_path: Path) -> None:
    data = noise((1, 1, 3000))
    np.testing.assert_array_equal(load_image(written(tmp_path / "a.nii", data)).data[0], data)
