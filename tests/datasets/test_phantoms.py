"""Phantoms are anatomically consistent in the world, whatever orientation and spacing they are stored with."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from ptq3d.datasets.btcv import BTCV_ORGANS
from ptq3d.datasets.phantoms import Phantom, make_phantom, write_phantoms
from ptq3d.errors import FileError, OptionError

CASES = range(6)
SMALLEST_ML = {"right adrenal gland": 4, "left adrenal gland": 4, "esophagus": 8, "gallbladder": 10}


@cache
def phantom(index: int) -> Phantom:
    return make_phantom(11, index)


def organ(name: str) -> int:
    return BTCV_ORGANS.index(name)


def centre(case: Phantom, name: str) -> np.ndarray:
    """Centre of an organ in the world: RAS+ mm."""
    voxels = np.argwhere(case.labels == organ(name)).mean(0)
    return nibabel.affines.apply_affine(case.affine, voxels)


@pytest.mark.parametrize("index", CASES)
def test_every_organ_is_there_in_one_piece(index: int) -> None:
    case = phantom(index)
    voxel_ml = abs(np.linalg.det(case.affine[:3, :3])) / 1000
    for number, name in enumerate(BTCV_ORGANS[1:], 1):
        pieces, _ = ndimage.label(case.labels == number, np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.sum() * voxel_ml > SMALLEST_ML.get(name, 20), name
        assert sizes.max() > 0.9 * sizes.sum(), name
    assert case.labels.max() == len(BTCV_ORGANS) - 1


@pytest.mark.parametrize("index", CASES)
def test_anatomy_is_the_same_in_the_world(index: int) -> None:
    case = phantom(index)
    right = ("liver", "right kidney", "gallbladder", "right adrenal gland", "inferior vena cava")
    left = ("spleen", "left kidney", "stomach", "left adrenal gland", "aorta")
    for on_the_right, on_the_left in zip(right, left, strict=True):
        assert centre(case, on_the_right)[0] > centre(case, on_the_left)[0] + 15, (on_the_right, on_the_left)
    assert centre(case, "gallbladder")[1] > centre(case, "right kidney")[1] + 40
    assert centre(case, "esophagus")[2] > centre(case, "pancreas")[2] + 40
    for side in ("right", "left"):
        assert centre(case, f"{side} adrenal gland")[2] > centre(case, f"{side} kidney")[2] + 10


@pytest.mark.parametrize("index", CASES)
def test_tissues_have_their_hounsfield_units(index: int) -> None:
    case = phantom(index)

    def typical(name: str) -> float:
        return float(np.median(case.image[case.labels == organ(name)]))

    corners = case.image[:: case.image.shape[0] - 1, :: case.image.shape[1] - 1, :: case.image.shape[2] - 1]
    assert np.median(corners) == pytest.approx(-1000, abs=40)
    assert typical("gallbladder") == pytest.approx(12, abs=25)
    assert 60 < typical("liver") < 135
    assert 130 < typical("aorta") < 330
    assert typical("right kidney") > typical("liver") + 30
    assert case.image.dtype == np.int16
    assert case.image.min() >= -1024


def test_cases_differ_in_anatomy_grid_and_contrast() -> None:
    cases = [phantom(index) for index in CASES]
    assert len({case.image.shape for case in cases}) == len(cases)
    assert len({nibabel.aff2axcodes(case.affine) for case in cases}) >= 3
    volumes = [(case.labels == organ("liver")).sum() * abs(np.linalg.det(case.affine[:3, :3])) for case in cases]
    assert np.std(volumes) > 0.05 * np.mean(volumes)
    aorta = [np.median(case.image[case.labels == organ("aorta")]) for case in cases]
    assert np.ptp(aorta) > 15


@pytest.mark.parametrize("index", CASES)
def test_grids_are_those_of_a_scanner(index: int) -> None:
    case = phantom(index)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(case.image, case.affine))
    x, y, z = canonical.header.get_zooms()
    assert x == pytest.approx(y, abs=1e-5)
    assert 1.5 <= x <= 2.0
    assert 2.3 <= z <= 3.2
    assert max(canonical.shape) <= 200
    assert 60 <= canonical.shape[2] <= 100


def test_a_seed_is_a_set() -> None:
    first, again, other, next_case = make_phantom(1), make_phantom(1), make_phantom(2), make_phantom(1, 1)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.affine, again.affine)
    assert not np.array_equal(first.affine, other.affine)
    assert not np.array_equal(first.affine, next_case.affine)


def test_a_folder_in_btcv_layout(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_phantoms(tmp_path, train=1, test=1, seed=5, progress=lambda done, wanted: seen.append((done, wanted)))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "test/images/img0002.nii.gz",
        "test/labels/label0002.nii.gz",
        "train/images/img0001.nii.gz",
        "train/labels/label0001.nii.gz",
    ]
    assert seen == [(1, 2), (2, 2)]
    image, labels = (nibabel.load(tmp_path / name) for name in files[:2])
    expected = make_phantom(5, 1)
    assert np.array_equal(image.dataobj, expected.image)
    assert np.array_equal(labels.dataobj, expected.labels)
    assert (image.get_data_dtype(), labels.get_data_dtype()) == (np.int16, np.uint8)
    for file in (image, labels):
        np.testing.assert_allclose(file.affine, expected.affine, atol=1e-4)
        np.testing.assert_allclose(file.get_qform(), expected.affine, atol=1e-3)
        assert file.header.get_xyzt_units()[0] == "mm"


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_phantoms(tmp_path / name, train=1, test=0)
    for path in ("images/img0001.nii.gz", "labels/label0001.nii.gz"):
        assert (tmp_path / "a/train" / path).read_bytes() == (tmp_path / "b/train" / path).read_bytes()


@pytest.mark.parametrize(("train", "test", "seed"), [(0, 0, 0), (-1, 2, 0), (3, -1, 0), (1, 1, -5)])
def test_no_phantoms_at_all_are_refused(train: int, test: int, seed: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"train={train}, test={test}, seed={seed}"):
        write_phantoms(tmp_path / "out", train=train, test=test, seed=seed)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file"):
        write_phantoms(tmp_path / "file", train=1, test=0)
