"""Whole brains are known by the values of their labels, and every id of BrainCOLOR means one class."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest
from placing import told, touch, volume

from ptq3d.datasets.cases import read_grid, true_classes
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.layouts import open_dataset
from ptq3d.datasets.whole_brain import BRAINCOLOR, BRAINCOLOR_IDS, WHOLE_BRAIN_NAMES, label_map_of

IDS = np.array([0, *BRAINCOLOR_IDS], np.uint8)
NO_CLASS = {15, 42, 43, 46, 63, 64, 65, 66, 69, 74}
"""What the real label files hold beside the classes: the docstring of the module names them."""


def test_the_table_has_the_published_classes() -> None:
    assert len(WHOLE_BRAIN_NAMES) == len(set(WHOLE_BRAIN_NAMES)) == 133
    assert list(BRAINCOLOR_IDS) == sorted(BRAINCOLOR_IDS)
    published = {1: "3rd ventricle", 7: "brain stem", 14: "right cerebral white matter", 29: "left ventral dc"}
    published |= {30: "cerebellar vermal lobules i-v", 33: "left basal forebrain", 34: "right basal forebrain"}
    published |= {35: "right anterior cingulate gyrus", 87: "right occipital fusiform gyrus"}
    published |= {112: "left planum temporale", 132: "left transverse temporal gyrus"}
    assert {index: WHOLE_BRAIN_NAMES[index] for index in published} == published


def test_every_real_id_is_a_class_or_known_background(shared: Path) -> None:
    data = shared / "data/whole_brain"
    with (data / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        names = {int(row["Label Number"]): row["Label Name"] for row in csv.DictReader(file)}
    for value, name in BRAINCOLOR_IDS.items():
        words = names[value].split()  # "Right ACgG  anterior cingulate gyrus"
        full = [words[0], *words[2:]] if value >= 100 else words
        assert name == " ".join(full).lower()
    seen: set[int] = set()
    for path in sorted(data.glob("*/labels/*.nii.gz")):
        values = set(np.unique(np.asanyarray(nibabel.load(path).dataobj)).tolist())
        assert set(BRAINCOLOR_IDS) <= values
        seen |= values
    assert seen - set(BRAINCOLOR_IDS) - {0} == NO_CLASS


def test_the_real_set_is_recognised(shared: Path) -> None:
    found = open_dataset(shared / "data/whole_brain")
    assert found.layout == "whole brain"
    assert [case.split for case in found.cases] == ["train"] * 10 + ["test"] * 5
    assert found.label_map == BRAINCOLOR
    assert all(case.labels == Path(case.where.replace("/images/", "/labels/")) for case in found.cases)
    case = found.cases[0]
    classes = true_classes(case, read_grid(case), BRAINCOLOR)
    stored = np.asanyarray(nibabel.load(case.label_files[0]).dataobj)
    assert classes is not None
    for value in np.unique(stored):
        wanted = list(BRAINCOLOR_IDS).index(value) + 1 if value in BRAINCOLOR_IDS else 0
        assert (classes[stored == value] == wanted).all(), value


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("1000_3.nii.gz", "1000_3_glm.nii.gz"),
        ("1000.nii.gz", "1000_seg.nii.gz"),
        ("images/1000.nii.gz", "labels/1000.nii.gz"),
        ("train/images/1000.nii.gz", "train/labels/1000.nii.gz"),
        ("imagesTr/1000.nii.gz", "labelsTr/1000.nii.gz"),
    ],
)
@pytest.mark.parametrize("values", [IDS, np.arange(133, dtype=np.uint8)])
def test_labels_beside_or_in_folders(tmp_path: Path, image: str, label: str, values: np.ndarray) -> None:
    volume(tmp_path / image, np.zeros(133, np.int16))
    volume(tmp_path / label, values)
    found = open_dataset(tmp_path)
    assert found.layout == "whole brain"
    assert [row[2:] for row in told(found)] == [(image, label)]
    assert found.label_map is not None
    classes = true_classes(found.cases[0], read_grid(found.cases[0]), found.label_map)
    assert classes is not None
    np.testing.assert_array_equal(classes.ravel(), np.arange(133))


def test_the_first_label_file_that_can_be_read_tells(tmp_path: Path) -> None:
    touch(tmp_path, "images/1000.nii.gz", "labels/1000.nii.gz", "images/1001.nii.gz")  # 1000's labels are empty
    volume(tmp_path / "labels/1001.nii.gz", IDS)
    assert open_dataset(tmp_path).layout == "whole brain"
    touch(tmp_path, "labels/1001.nii.gz").joinpath("labels/1001.nii.gz").write_bytes(b"")
    assert open_dataset(tmp_path).layout == "folders of images and labels"


@pytest.mark.parametrize(
    "values", [np.arange(118), [0, 1, 132], [*IDS, 1001], [*IDS, 208], IDS[:100], [0], [*range(134)]]
)
def test_other_values_are_no_brain(values: list[int]) -> None:
    assert label_map_of(np.asarray(values)) is None


def test_values_beyond_the_protocol_are_kept_apart() -> None:
    assert label_map_of(IDS) == BRAINCOLOR
    assert label_map_of(np.arange(133)) == LabelMap.identity(WHOLE_BRAIN_NAMES)
    assert BRAINCOLOR.others is None
    assert {value for value, index in BRAINCOLOR.values.items() if index == 0} >= NO_CLASS | {0}
