"""BTCV is known by the names of its files, in the three ways it lies on disks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from placing import dumped, left_out, told, touch, volume

from ptq3d.datasets.btcv import BTCV_ORGANS
from ptq3d.datasets.cases import read_grid, true_classes
from ptq3d.datasets.layouts import open_dataset
from ptq3d.datasets.phantoms import write_phantoms
from ptq3d.errors import FileError, LabelError

SYNAPSE = (
    "Training/img/img0001.nii.gz",
    "Training/img/img0002.nii.gz",
    "Training/label/label0001.nii.gz",
    "Training/label/label0002.nii.gz",
    "Testing/img/img0061.nii.gz",
)
MONAI = (
    "imagesTr/img0001.nii.gz",
    "imagesTr/img0002.nii.gz",
    "labelsTr/label0001.nii.gz",
    "labelsTr/label0002.nii.gz",
    "imagesTs/img0061.nii.gz",
)
SEED = (
    "train/images/img0001.nii.gz",
    "train/images/img0002.nii.gz",
    "train/labels/label0001.nii.gz",
    "train/labels/label0002.nii.gz",
    "test/images/img0061.nii.gz",
)
DATALIST = {
    "description": "btcv yucheng",
    "labels": {
        "0": "background", "1": "spleen", "2": "rkid", "3": "lkid", "4": "gall", "5": "eso", "6": "liver", "7": "sto",
        "8": "aorta", "9": "IVC", "10": "veins", "11": "pancreas", "12": "rad", "13": "lad",
    },
    "licence": "yt",
    "modality": {"0": "CT"},
    "name": "btcv",
    "numTest": 20,
    "numTraining": 80,
    "reference": "Vanderbilt University",
    "release": "1.0 06/08/2015",
    "tensorImageSize": "3D",
    "test": ["imagesTs/img0061.nii.gz"],
    "training": [{"image": "imagesTr/img0002.nii.gz", "label": "labelsTr/label0002.nii.gz"}],
    "validation": [{"image": "imagesTr/img0001.nii.gz", "label": "labelsTr/label0001.nii.gz"}],
}  # fmt: skip


@pytest.mark.parametrize("files", [SYNAPSE, MONAI, SEED])
def test_each_arrangement_is_recognised(tmp_path: Path, files: tuple[str, ...]) -> None:
    found = open_dataset(touch(tmp_path, *files))
    images = {Path(name).name[:7]: name for name in files if "/img" in name and "/img0" in name}
    assert found.layout == "BTCV"
    assert found.splits == ("train", "test")
    assert told(found) == [
        ("img0001", "train", images["img0001"], files[files.index(images["img0002"]) + 1]),
        ("img0002", "train", images["img0002"], files[files.index(images["img0002"]) + 2]),
        ("img0061", "test", images["img0061"], ""),
    ]
    assert found.label_map is not None
    assert found.label_map.names == BTCV_ORGANS
    assert found.label_map.values == {value: value for value in range(14)}


@pytest.mark.parametrize("root", ["Abdomen/RawData", "Abdomen", "."])
def test_the_download_is_found_from_each_of_its_folders(tmp_path: Path, root: str) -> None:
    raw = touch(tmp_path / "Abdomen/RawData", *SYNAPSE, "averaged-training-images/DET0000101_avg.nii.gz", "notes.txt")
    found = open_dataset(tmp_path / root)
    assert (found.layout, found.root, len(found.cases)) == ("BTCV", raw, 3)
    assert left_out(found) == {
        "averaged-training-images": "a folder that is no part of the layout",
        "notes.txt": "no volume by its ending",
    }


@pytest.mark.parametrize("name", ["dataset.json", "dataset_0.json"])
def test_the_splits_of_a_list_hold(tmp_path: Path, name: str) -> None:
    dumped(touch(tmp_path, *MONAI) / name, DATALIST)
    found = open_dataset(tmp_path)
    assert found.layout == "BTCV"
    assert [(case.name, case.split) for case in found.cases] == [
        ("img0002", "train"),
        ("img0001", "val"),
        ("img0061", "test"),
    ]
    assert found.label_map is not None
    assert found.label_map.names == BTCV_ORGANS
    assert left_out(found) == {}


def test_near_misses_fall_to_other_layouts(tmp_path: Path) -> None:
    digits = touch(tmp_path / "a", "images/img001.nii.gz", "labels/label001.nii.gz")
    assert open_dataset(digits).layout == "folders of images and labels"
    stranger = touch(tmp_path / "b", *MONAI, "imagesTr/case0003.nii.gz", "labelsTr/case0003.nii.gz")
    assert open_dataset(stranger).layout == "folders of images and labels"
    other = touch(tmp_path / "c", *MONAI)
    dumped(other / "dataset.json", {**DATALIST, "labels": {"0": "background", "1": "liver"}})
    found = open_dataset(other)
    assert found.layout == "Medical Segmentation Decathlon"
    assert found.label_map is not None
    assert found.label_map.names == ("background", "liver")


def test_a_broken_list_and_missing_labels_are_named(tmp_path: Path) -> None:
    (touch(tmp_path, *MONAI) / "dataset.json").write_text("{", encoding="utf-8")
    with pytest.raises(FileError, match=r"dataset\.json is no readable JSON"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "labelsTr/label0002.nii.gz").unlink()
    with pytest.raises(LabelError, match=r"img0002\.nii\.gz has no labels"):
        open_dataset(tmp_path)


def test_values_are_the_classes(tmp_path: Path) -> None:
    values = np.arange(14, dtype=np.uint8)
    volume(tmp_path / "images/img0001.nii.gz", np.zeros(14, np.int16))
    volume(tmp_path / "labels/label0001.nii.gz", values)
    found = open_dataset(tmp_path)
    assert found.label_map is not None
    classes = true_classes(found.cases[0], read_grid(found.cases[0]), found.label_map)
    assert classes is not None
    np.testing.assert_array_equal(classes.ravel(), values)


def test_phantoms_are_laid_out_as_btcv(tmp_path: Path) -> None:
    write_phantoms(tmp_path, train=1, test=1)
    found = open_dataset(tmp_path)
    assert (found.layout, found.splits, len(found.cases)) == ("BTCV", ("train", "test"), 2)
