"""NIfTI gives what nibabel gives, in one copy of memory, and believes no header more than its file."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.data import NibabelReader

from grids import affines, noise, shapes
from ptq3d.errors import FileError, GeometryError
from ptq3d.volumes import streams
from ptq3d.volumes.files import load_grid, load_image, load_labels, save_labels
from ptq3d.volumes.volume import Volume

REAL = [
    "abdomen_ct/images/ct.nii.gz",
    "abdomen_mr/images/mr.nii.gz",
    "spine_small/sub-mri_label-6_T2w.nii.gz",
    "whole_brain/test/images/1013.nii.gz",
]
DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
KINDS = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}
SCALES = [(1.0, 0.0), (0.5, -1024.0), (2.0, 0.0), (1.0, 3.0), (0.1, 0.7), (np.nan, 0.0), (0.0, 5.0), (1e15, 0.0)]
fresh = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def stored(path: Path, data: np.ndarray, affine: np.ndarray, *, kind: int = 1, big: bool = False) -> Path:
    """A file whose voxels are the bytes of `data`."""
    header = KINDS[kind].header_class(endianness=">" if big else "<")
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_zooms(
        nibabel.affines.voxel_sizes(affine)
    )  # where they differ from the sform, MONAI takes the sizes from here
    header.set_sform(affine, code=1)
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    voxels = data.astype(data.dtype.newbyteorder(">" if big else "<")).tobytes("F")
    content = header.binaryblock + bytes(header.single_vox_offset - len(header.binaryblock)) + voxels
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def scaled(path: Path, slope: float, intercept: float, *, kind: int, big: bool) -> None:
    """Slope and intercept into the header as it is on disk."""
    content = path.read_bytes()
    content = bytearray(gzip.decompress(content) if path.suffix == ".gz" else content)
    place, dtype = (112, "f4") if kind == 1 else (176, "f8")
    numbers = np.array([slope, intercept], np.dtype(dtype).newbyteorder(">" if big else "<")).tobytes()
    content[place : place + len(numbers)] = numbers
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else bytes(content))


@fresh
@given(
    data=st.data(),
    shape=shapes(1, 7),
    affine=affines(sheared=True),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([1, 2]),
    big=st.booleans(),
    scale=st.sampled_from(SCALES),
    name=st.sampled_from(["a.nii", "a.nii.gz"]),
    piece=st.sampled_from([7, 16, 64, 4 << 20]),
)
def test_any_file_is_what_nibabel_and_monai_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data, shape, affine, dtype, kind, big, scale, name, piece
) -> None:
    monkeypatch.setattr(streams, "PIECE_BYTES", piece)  # voxels fall across pieces
    values = (noise(shape) * 60 + (100 if dtype[0] == "u" else 0)).astype(dtype)
    path = stored(tmp_path / name, values, affine, kind=kind, big=big)
    scaled(path, *scale, kind=kind, big=big)
    reference = nibabel.load(path)
    volume = load_image(path)
    np.testing.assert_array_equal(volume.data[0], np.asanyarray(reference.dataobj).astype(np.float32))
    np.testing.assert_array_equal(volume.affine, reference.affine)
    np.testing.assert_allclose(volume.spacing, nibabel.affines.voxel_sizes(reference.affine))
    assert volume.orientation == "".join(nibabel.aff2axcodes(reference.affine))
    reader = NibabelReader()
    array, meta = reader.get_data(reader.read(path))
    np.testing.assert_allclose(volume.data[0], array, rtol=1e-5, atol=1e-4)  # MONAI scales in float32
    np.testing.assert_array_equal(volume.affine, meta["affine"])
    found, where = load_grid(path)
    assert found == volume.shape
    np.testing.assert_array_equal(where, volume.affine)


def require_simpleitks_grid(path: Path, tolerance_mm: float) -> None:
    """Places, spacing and orientation; ITK keeps directions apart from spacing and makes them orthogonal."""
    volume, image = load_image(path), sitk.ReadImage(str(path))
    for index in ((0, 0, 0), tuple(size - 1 for size in volume.shape)):
        place = np.diag([-1, -1, 1]) @ image.TransformIndexToPhysicalPoint(tuple(map(int, index)))
        np.testing.assert_allclose(volume.affine[:3, :3] @ index + volume.affine[:3, 3], place, atol=tolerance_mm)
    np.testing.assert_allclose(volume.spacing, image.GetSpacing(), rtol=1e-4)
    code = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())
    assert volume.orientation == code


@fresh
@given(affine=affines(oblique=False), shape=shapes(1, 7), name=st.sampled_from(["a.nii", "a.nii.gz"]))
def test_a_grid_is_simpleitks(tmp_path: Path, affine: np.ndarray, shape: tuple[int, int, int], name: str) -> None:
    nibabel.save(nibabel.Nifti1Image(noise(shape), affine), tmp_path / name)
    require_simpleitks_grid(tmp_path / name, 1e-3)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz"])
@pytest.mark.parametrize("file", REAL)
def test_real_files_lie_in_one_place_for_all_readers(shared: Path, tmp_path: Path, file: str, suffix: str) -> None:
    """Also after they were written as another format."""
    path = shared / "data" / file
    volume, reader = load_image(path), NibabelReader()
    require_simpleitks_grid(path, 1e-2)
    array, meta = reader.get_data(reader.read(path))
    np.testing.assert_allclose(volume.data[0], array, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(volume.affine, meta["affine"], atol=1e-6)
    labels = Volume((volume.data > 100).astype(np.uint8), volume.affine)
    save_labels(tmp_path / f"a{suffix}", labels)
    back = load_labels(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(back.data, labels.data)
    np.testing.assert_allclose(back.affine, labels.affine, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("big", [False, True])
def test_labels_of_any_type_are_what_nibabel_reads(tmp_path: Path, dtype: str, big: bool) -> None:
    values = np.random.default_rng(0).integers(0, 100, (4, 5, 6)).astype(dtype)
    path = stored(tmp_path / "a.nii.gz", values, np.eye(4), big=big)
    labels = load_labels(path)
    assert labels.data.dtype == np.uint8
    np.testing.assert_array_equal(labels.data[0], np.asanyarray(nibabel.load(path).dataobj))


@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0), (2, 1), (0, 3)])
@pytest.mark.parametrize("qfac", [1.0, -1.0])
def test_sform_and_qform_are_chosen_as_nibabel_does(tmp_path: Path, codes: tuple[int, int], qfac: float) -> None:
    image = nibabel.Nifti1Image(noise((3, 4, 5)), None)
    image.header.set_zooms((1.5, 2, 3))
    image.set_qform(
        np.array([[0, qfac, 0, 3], [1, 0, 0, 4], [0, 0, 1, 5], [0, 0, 0, 1]]) @ np.diag([2, 3, 4, 1]), codes[1]
    )
    image.set_sform(np.diag([-5, 6, 7, 1.0]), codes[0])
    nibabel.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(load_image(tmp_path / "a.nii").affine, nibabel.load(tmp_path / "a.nii").affine)


def peak_beside(read, path: Path) -> int:
    """Bytes allocated at most while reading, less those of the result."""
    load_image(stored(path.with_name("warm.nii.gz"), noise((3, 3, 3)), np.eye(4)))
    tracemalloc.start()
    try:
        result = read(path).data.nbytes
    except FileError:
        result = 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - result


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", ["i2", "f8"])
def test_memory_holds_the_result_and_a_few_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    monkeypatch.setattr(streams, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(streams, "ENCODED_BYTES", 1 << 16)
    monkeypatch.setattr("ptq3d.volumes.files.PIECE_BYTES", 1 << 16)
    data = np.random.default_rng(0).integers(0, 250, (100, 100, 200)).astype(dtype)
    path = stored(tmp_path / name, data, np.eye(4))
    assert peak_beside(load_image, path) < 10 * (1 << 16)
    path = stored(tmp_path / name, data.astype("u1"), np.eye(4))
    assert peak_beside(load_labels, path) < 10 * (1 << 16)


def with_shape(path: Path, shape: tuple[int, int, int]) -> Path:
    """A header that says something else than its file holds."""
    content = path.read_bytes()
    content = bytearray(gzip.decompress(content) if path.suffix == ".gz" else content)
    content[42:48] = np.array(shape, "<i2").tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else bytes(content))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("shape", [(30000, 30000, 30000), (32767, 32767, 1), (300, 300, 20)])
def test_a_header_that_promises_too_much_costs_no_memory(
    tmp_path: Path, name: str, shape: tuple[int, int, int]
) -> None:
    path = with_shape(stored(tmp_path / name, noise((4, 5, 6)), np.eye(4)), shape)
    with pytest.raises(FileError, match="truncated: its header promises"):
        load_image(path)
    assert peak_beside(load_image, path) < 1 << 20


def test_a_file_that_expands_far_beyond_its_header_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(streams, "ENCODED_BYTES", 1 << 16)
    path = stored(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), "i2"), np.eye(4))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(50 << 20)))
    assert path.stat().st_size < 100_000
    with pytest.raises(FileError, match="more voxels than the shape"):
        load_image(path)
    assert peak_beside(load_image, path) < 1 << 20


def test_less_than_a_plane_may_follow_and_gzip_may_come_in_parts(tmp_path: Path) -> None:
    data = noise((4, 5, 6))
    plain = stored(tmp_path / "a.nii", data, np.eye(4))
    content = plain.read_bytes()
    plain.write_bytes(content + bytes(4 * 5 * 4 - 1))
    np.testing.assert_array_equal(load_image(plain).data[0], data)
    parts = tmp_path / "b.nii.gz"
    parts.write_bytes(gzip.compress(content[:401]) + gzip.compress(content[401:]) + bytes(512))
    np.testing.assert_array_equal(load_image(parts).data[0], data)
    plain.write_bytes(content + bytes(4 * 5 * 4))
    with pytest.raises(FileError, match="more voxels than the shape"):
        load_image(plain)


def test_the_names_say_what_is_compressed(tmp_path: Path) -> None:
    plain = stored(tmp_path / "a.nii", noise((4, 5, 6)), np.eye(4))
    plain.rename(tmp_path / "b.nii.gz")
    with pytest.raises(FileError, match="is not compressed by gzip, as its name says"):
        load_image(tmp_path / "b.nii.gz")
    stored(tmp_path / "a.nii.gz", noise((4, 5, 6)), np.eye(4)).rename(tmp_path / "c.nii")
    with pytest.raises(FileError, match="is compressed by gzip, but its name does not say so"):
        load_image(tmp_path / "c.nii")


def test_pairs_and_negative_voxel_sizes_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.nii", noise((4, 5, 6)), np.eye(4))
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:344] + b"ni1\0" + content[348:])
    with pytest.raises(FileError, match=r"pair \.hdr and \.img"):
        load_image(path)
    path.rename(tmp_path / "a.img")
    with pytest.raises(FileError, match=r"pair \.hdr and \.img"):
        load_image(tmp_path / "a.img")
    content[80:84] = np.float32(-1).tobytes()
    path.write_bytes(content)
    with pytest.raises(GeometryError, match="zero, negative or broken spacing"):
        load_image(path)


def test_a_spacing_beyond_all_numbers_is_refused_without_a_warning(tmp_path: Path) -> None:
    image = nibabel.Nifti2Image(np.zeros((40, 40, 40), np.int16), None)
    image.header["pixdim"][1:4] = 1e308
    image.header["qform_code"] = image.header["sform_code"] = 0
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + bytes(2 * 40**3))
    with pytest.raises(GeometryError, match=r"a\.nii"):
        load_image(path)
