"""A case knows its files, its channels and its labels, whatever they are made of."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dicoms import ORIENTATIONS, stored_values, write_series
from ptq3d.datasets.cases import Case, Mask, read_image, read_labels
from ptq3d.errors import FileError, GeometryError
from ptq3d.volumes.dicom import only_series

SHAPE = (4, 5, 6)


def written(path: Path, voxels: np.ndarray, shift: float = 0.0) -> Path:
    affine = np.eye(4)
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def test_channels_are_stacked_in_their_order(tmp_path: Path) -> None:
    case = Case("a", tuple(written(tmp_path / f"{number}.nii", noise(number)) for number in range(3)))
    np.testing.assert_array_equal(read_image(case).data, [noise(0), noise(1), noise(2)])


def test_channels_of_another_grid_are_refused_by_name(tmp_path: Path) -> None:
    case = Case("a", (written(tmp_path / "0.nii", noise(0)), written(tmp_path / "1.nii", noise(1), shift=2.0)))
    with pytest.raises(GeometryError, match=r"1\.nii lies up to 2 voxels beside its image .*0\.nii"):
        read_image(case)


def test_masks_are_merged_and_must_share_a_grid(tmp_path: Path) -> None:
    first, second = np.zeros((2, *SHAPE), np.uint8)
    first[1:3], second[2:4] = 1, 255
    masks = (Mask(written(tmp_path / "a.nii", first), 7), Mask(written(tmp_path / "b.nii", second), 300))
    merged = read_labels(Case("a", (), masks))
    assert merged is not None
    np.testing.assert_array_equal(merged.data[0, :, 0, 0], [0, 7, 300, 300])
    apart = (*masks, Mask(written(tmp_path / "c.nii", second, shift=1.0), 3))
    with pytest.raises(GeometryError, match=r"c\.nii lies up to 1 voxels beside"):
        read_labels(Case("a", (), apart))


def test_the_digest_of_one_file_is_its_own_and_of_several_depends_on_their_order(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{number}.nii", noise(number)) for number in range(2)]
    alone = [Case("a", (path,)).digest for path in paths]
    assert alone == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    both, turned = Case("a", tuple(paths)).digest, Case("a", tuple(reversed(paths))).digest
    assert len({*alone, both, turned}) == 4
    assert both == Case("b", tuple(paths)).digest


def test_the_digest_of_a_series_is_of_its_bytes_wherever_they_lie(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", stored_values((6, 5, 4)), ORIENTATIONS["axial"])
    archive = Path(shutil.make_archive(str(tmp_path / "ct"), "zip", folder))
    found = Case("a", (only_series(folder),)).digest
    assert Case("a", (only_series(archive),)).digest == found
    path = sorted(folder.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert Case("a", (only_series(folder),)).digest != found


def test_the_digest_of_a_broken_archive_is_one_sentence(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", stored_values((6, 5, 4)), ORIENTATIONS["axial"])
    archive = Path(shutil.make_archive(str(tmp_path / "ct"), "zip", folder))
    case = Case("a", (only_series(archive),))
    content = bytearray(archive.read_bytes())
    content[200:260] = bytes(60)
    archive.write_bytes(content)
    with pytest.raises(FileError, match=r"ct\.zip: member .* cannot be read"):
        _ = case.digest
