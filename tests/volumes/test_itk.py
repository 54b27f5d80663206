"""NRRD and MetaImage give what SimpleITK, pynrrd and MONAI read, and more of them is noticed than ITK does."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.data import NrrdReader

from grids import affines, noise, shapes
from ptq3d.errors import FileError, GeometryError, InputError, UnavailableError
from ptq3d.volumes.files import load_grid, load_image, load_labels

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
NAMES = ["a.nrrd", "a.nhdr", "a.mha", "a.mhd", "A.MHA", "Ä b.nrrd"]
fresh = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def written(path: Path, data: np.ndarray, affine: np.ndarray, *, compressed: bool = True) -> Path:
    """Through SimpleITK, under a name that it takes."""
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(data.T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path.with_suffix(path.suffix.lower())), useCompression=compressed)
    return path.with_suffix(path.suffix.lower()).rename(path)


def itk_affine(image: sitk.Image) -> np.ndarray:
    """Voxel -> RAS+ mm, from where SimpleITK puts four voxels."""
    places = [image.TransformIndexToPhysicalPoint(index) for index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    affine = np.eye(4)
    affine[:3, 3] = places[0]
    affine[:3, :3] = (np.array(places[1:]) - places[0]).T
    return LPS_TO_RAS @ affine


@fresh
@given(
    shape=shapes(1, 7),
    affine=affines(sheared=True),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(NAMES),
    compressed=st.booleans(),
)
def test_any_file_is_what_simpleitk_reads(
    tmp_path: Path, shape: tuple[int, int, int], affine: np.ndarray, dtype: str, name: str, compressed: bool
) -> None:
    values = np.abs(noise(shape) * 60).astype(dtype)
    path = written(tmp_path / name, values, affine, compressed=compressed)
    volume = load_image(path)
    np.testing.assert_array_equal(volume.data[0], values.astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine, rtol=1e-6, atol=1e-6)
    if name[-4:].islower():
        image = sitk.ReadImage(str(path))
        np.testing.assert_allclose(volume.affine, itk_affine(image), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(volume.spacing, image.GetSpacing(), rtol=1e-9)
        np.testing.assert_array_equal(volume.data[0], sitk.GetArrayFromImage(image).T.astype(np.float32))
    found, where = load_grid(path)
    assert found == volume.shape
    np.testing.assert_array_equal(where, volume.affine)
    if dtype[0] != "f" and values.min() >= 0:
        np.testing.assert_array_equal(load_labels(path).data[0], values)


@fresh
@given(affine=affines(oblique=False))
def test_orientation_is_simpleitks(tmp_path: Path, affine: np.ndarray) -> None:
    image = sitk.ReadImage(str(written(tmp_path / "a.nrrd", noise((3, 4, 5)), affine)))
    code = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())
    assert load_image(tmp_path / "a.nrrd").orientation == code


@fresh
@given(
    shape=shapes(1, 7),
    affine=affines(sheared=True),
    dtype=st.sampled_from(["i2", "u1", "f4", "f8", ">i2", ">f4"]),
    space=st.sampled_from(
        ["left-posterior-superior", "right-anterior-superior", "LPS", "RAS", "left-anterior-superior"]
    ),
    encoding=st.sampled_from(["raw", "gzip"]),
    detached=st.booleans(),
)
def test_any_nrrd_is_what_pynrrd_and_monai_read(
    tmp_path: Path, shape, affine, dtype, space, encoding, detached
) -> None:
    path = tmp_path / ("a.nhdr" if detached else "a.nrrd")
    signs = (
        {"l": (-1, -1, 1), "r": (1, 1, 1)}[space[0].lower()]
        if "anterior" not in space or space[0] == "r"
        else (-1, 1, 1)
    )
    linear = np.diag(signs) @ affine[:3]
    header = {"space": space, "space directions": linear[:, :3].T, "space origin": linear[:, 3], "encoding": encoding}
    header |= {"endian": "big" if dtype[0] == ">" else "little"}
    nrrd.write(str(path), np.abs(noise(shape) * 60).astype(dtype), header)
    values, found = nrrd.read(str(path))
    volume = load_image(path)
    np.testing.assert_array_equal(volume.data[0], values.astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(found["space directions"], axis=1), rtol=1e-9)
    if space in ("left-posterior-superior", "right-anterior-superior"):  # MONAI knows these two names only
        array, meta = NrrdReader().get_data(NrrdReader().read(path))
        np.testing.assert_array_equal(volume.data[0], array.astype(np.float32))
        np.testing.assert_allclose(volume.affine, meta["affine"], rtol=1e-6, atol=1e-6)


def metaimage(**fields: object) -> bytes:
    """A MetaImage of 2 x 3 x 4 int16 zeros to 23, with other or more fields."""
    known: dict[str, object] = {"ObjectType": "Image", "NDims": 3, "BinaryData": "True", "DimSize": "2 3 4"}
    known |= {"ElementType": "MET_SHORT", **fields, "ElementDataFile": fields.get("ElementDataFile", "LOCAL")}
    known["ElementDataFile"] = known.pop("ElementDataFile")
    lines = "".join(f"{key} = {value}\n" for key, value in known.items() if value is not None)
    return lines.encode() + np.arange(24, dtype="<i2").tobytes()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ElementSpacing": "1 2 3", "Offset": "5 6 7"},
        {"ElementSize": "1 2 3", "Position": "5 6 7"},
        {"ElementSpacing": "1 2 3", "TransformMatrix": "0 1 0 -1 0 0 0 0 1", "Origin": "5 6 7"},
        {"ElementSpacing": "1 2 3", "Orientation": "0 1 0 -1 0 0 0 0 1", "AnatomicalOrientation": "LAI"},
        {"NDims": 4, "DimSize": "2 3 4 1", "ElementSpacing": "1 2 3 1"},
        {"BinaryDataByteOrderMSB": "True"},
        {"ElementByteOrderMSB": "True"},
    ],
)
def test_fields_of_metaimage_mean_what_they_mean_to_itk(tmp_path: Path, fields: dict[str, object]) -> None:
    (tmp_path / "a.mha").write_bytes(metaimage(**fields))
    volume, image = load_image(tmp_path / "a.mha"), sitk.ReadImage(str(tmp_path / "a.mha"))
    image = image[:, :, :, 0] if image.GetDimension() == 4 else image
    np.testing.assert_array_equal(volume.data[0], sitk.GetArrayFromImage(image).T)
    np.testing.assert_allclose(volume.affine, itk_affine(image), atol=1e-12)


def test_voxels_may_lie_behind_other_bytes(tmp_path: Path) -> None:
    content, voxels = metaimage(), np.arange(24, dtype="<i2").tobytes()
    text = content[: -len(voxels)].replace(b"LOCAL", b"a.raw")
    (tmp_path / "a.raw").write_bytes(b"0123456789" + voxels)
    for skip in (10, -1):
        (tmp_path / "a.mhd").write_bytes(b"HeaderSize = %d\n" % skip + text)
        np.testing.assert_array_equal(load_image(tmp_path / "a.mhd").data[0].ravel("F"), np.arange(24))
    head = "NRRD0005\ntype: short\ndimension: 3\nsizes: 2 3 4\nspace: LPS\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
    for skip in (10, -1):
        (tmp_path / "a.nhdr").write_text(head + f"endian: little\nencoding: raw\nbyte skip: {skip}\ndata file: a.raw\n")
        np.testing.assert_array_equal(load_image(tmp_path / "a.nhdr").data[0].ravel("F"), np.arange(24))


@pytest.mark.parametrize("space", ["space: scanner-xyz\n", "space dimension: 3\n", ""])
def test_a_nrrd_without_an_anatomical_space_is_refused(tmp_path: Path, space: str) -> None:
    path = written(tmp_path / "a.nrrd", noise((3, 4, 5)), np.eye(4))
    path.write_bytes(path.read_bytes().replace(b"space: left-posterior-superior\n", space.encode()))
    with pytest.raises(GeometryError, match="does not say where the patient lies"):
        load_image(path)


@fresh
@given(data=st.data(), name=st.sampled_from(["a.nrrd", "a.mha"]))
def test_a_changed_byte_in_compressed_voxels_changes_nothing_unseen(
    tmp_path: Path, data: st.DataObject, name: str
) -> None:
    values = noise((6, 6, 6))
    path = written(tmp_path / name, values, np.eye(4))
    content = bytearray(path.read_bytes())
    start = content.index(b"\x1f\x8b") + 10 if name == "a.nrrd" else content.index(b"LOCAL\n") + 6
    content[data.draw(st.integers(start, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        volume = load_image(path)
    except FileError:
        return
    np.testing.assert_array_equal(volume.data[0], values)


@fresh
@given(data=st.data(), name=st.sampled_from(["a.nrrd", "a.mha"]), compressed=st.booleans())
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, data: st.DataObject, name: str, compressed: bool) -> None:
    path = written(tmp_path / name, noise((6, 6, 6)), np.eye(4), compressed=compressed)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(InputError):
        load_image(path)


@pytest.mark.parametrize(
    "name", ["../x.raw", "/etc/passwd", "..\\x.raw", "C:\\x.raw", "sub/../../x.raw", "LIST", "x%d.raw"]
)
def test_a_header_leads_to_no_other_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "x.raw").write_bytes(np.arange(24, dtype="<i2").tobytes())
    (folder / "a.mhd").write_bytes(metaimage(ElementDataFile=name))
    with pytest.raises(FileError, match=r"outside its folder|several files"):
        load_image(folder / "a.mhd")
    path = written(folder / "a.nhdr", np.zeros((2, 3, 4), "i2"), np.eye(4), compressed=False)
    path.write_bytes(path.read_bytes().replace(b"a.raw", name.encode()))
    with pytest.raises(FileError, match=r"outside its folder|several files"):
        load_image(path)


def test_long_names_and_damaged_fields_do_not_take_the_process_down(tmp_path: Path) -> None:
    """ITK's own reader of NRRD writes its messages into buffers that such names and fields overflow."""
    folder = tmp_path.joinpath(*["d" * 200] * 12)
    folder.mkdir(parents=True)
    path = written(tmp_path / "a.nrrd", noise((3, 4, 5)), np.eye(4)).rename(folder / "a.nrrd")
    content = path.read_bytes()
    assert load_image(path).shape == (3, 4, 5)
    for field in (b"kinds: domain domain domain", b"space origin: (0,0,0)", b"type: float"):
        assert field in content
        for length in (300, 5000):
            path.write_bytes(content.replace(field, field.split(b": ")[0] + b": " + b"9" * length))
            with pytest.raises(InputError):
                load_image(path)


def test_a_field_that_is_none_is_refused(tmp_path: Path) -> None:
    """A damaged name may have been that of the origin, without which the volume lies elsewhere."""
    path = written(tmp_path / "a.nrrd", noise((3, 4, 5)), np.eye(4))
    path.write_bytes(path.read_bytes().replace(b"space origin", b"space orixin"))
    with pytest.raises(FileError, match="no field of NRRD, 'space orixin"):
        load_image(path)


def test_notes_in_a_nrrd_are_no_fields(tmp_path: Path) -> None:
    path = written(tmp_path / "a.nrrd", noise((3, 4, 5)), np.eye(4))
    whole = load_image(path)
    notes = "# sizes: 9 9 9\nSegment0_Name:=über: lung\nsizes:=9 9 9\ncontent: a: b\n"
    path.write_bytes(path.read_bytes().replace(b"type: float\n", b"type: float\n" + notes.encode()))
    np.testing.assert_array_equal(load_image(path).data, whole.data)


def test_without_simpleitk_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.nrrd", noise((3, 4, 5)), np.eye(4))
    monkeypatch.delitem(sys.modules, "SimpleITK")
    real = builtins.__import__

    def missing(name: str, *given: object) -> object:
        if name == "SimpleITK":
            raise ImportError(name)
        return real(name, *given)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnavailableError, match=r"pip install 'ptq3d\[itk\]'"):
        load_image(path)
