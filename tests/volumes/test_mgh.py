"""MGH and MGZ give what nibabel and MONAI read."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.data import NibabelReader

from grids import affines, noise, shapes
from ptq3d.errors import FileError, GeometryError
from ptq3d.volumes.files import load_grid, load_image, load_labels

fresh = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.filterwarnings("ignore:unclosed file")  # which nibabel leaves to the garbage collector
@fresh
@given(
    shape=shapes(1, 7),
    affine=affines(sheared=True),
    dtype=st.sampled_from(["u1", "i2", "u2", "i4", "f4"]),
    name=st.sampled_from(["a.mgh", "a.mgz", "A.MGZ"]),
)
def test_any_file_is_what_nibabel_and_monai_read(
    tmp_path: Path, shape: tuple[int, int, int], affine: np.ndarray, dtype: str, name: str
) -> None:
    values = np.abs(noise(shape) * 60).astype(dtype)
    nibabel.save(nibabel.MGHImage(values, affine), tmp_path / name)
    reference, volume = nibabel.load(tmp_path / name), load_image(tmp_path / name)
    np.testing.assert_array_equal(volume.data[0], values.astype(np.float32))
    np.testing.assert_array_equal(volume.affine, reference.affine)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
    reader = NibabelReader()
    array, meta = reader.get_data(reader.read(tmp_path / name))
    np.testing.assert_array_equal(volume.data[0], np.asarray(array, np.float32))
    np.testing.assert_array_equal(volume.affine, meta["affine"])
    found, where = load_grid(tmp_path / name)
    assert found == volume.shape
    np.testing.assert_array_equal(where, volume.affine)
    if dtype != "f4":
        np.testing.assert_array_equal(load_labels(tmp_path / name).data[0], values)


def test_what_follows_the_voxels_is_no_voxel(tmp_path: Path) -> None:
    """FreeSurfer writes scan parameters, transforms and command lines there."""
    data = noise((3, 4, 5))
    nibabel.save(nibabel.MGHImage(data, np.eye(4)), tmp_path / "a.mgh")
    content = (tmp_path / "a.mgh").read_bytes()
    (tmp_path / "b.mgz").write_bytes(gzip.compress(content + b"mri_convert a b" * 100))
    np.testing.assert_array_equal(load_image(tmp_path / "b.mgz").data[0], data)


@pytest.mark.parametrize("flag", [b"\0\0", b"\xff\xff"])
def test_without_a_place_it_is_refused(tmp_path: Path, flag: bytes) -> None:
    nibabel.save(nibabel.MGHImage(noise((3, 4, 5)), np.eye(4)), tmp_path / "a.mgh")
    content = bytearray((tmp_path / "a.mgh").read_bytes())
    content[28:30] = flag  # goodRASFlag
    (tmp_path / "a.mgh").write_bytes(content)
    with pytest.raises(GeometryError, match="does not say where the patient lies"):
        load_image(tmp_path / "a.mgh")


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    nibabel.save(nibabel.MGHImage(noise((9, 9, 9)), np.eye(4)), tmp_path / "a.mgz")
    content = bytearray((tmp_path / "a.mgz").read_bytes())
    content[-6] ^= 1  # its checksum
    (tmp_path / "a.mgz").write_bytes(content)
    with pytest.raises(FileError, match="damaged"):
        load_image(tmp_path / "a.mgz")
