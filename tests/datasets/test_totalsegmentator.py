"""Masks of TotalSegmentator's data sets become one map by the official tables."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from placing import left_out, touch, volume

from ptq3d.datasets.cases import Mask, read_grid, read_labels, true_classes
from ptq3d.datasets.layouts import open_dataset
from ptq3d.datasets.totalsegmentator import MR_CLASSES, TABLES, V1_CLASSES, V2_CLASSES
from ptq3d.errors import FileError

META = (
    "\ufeffimage_id;age;gender;institute;study_type;split;manufacturer;scanner_model;kvp;pathology;pathology_location\r\n"
    "s0000;76;m;C;ct pelvis;train;siemens;SOMATOM Definition Edge;100.0;vascular;pelvis\r\n"
    "s0004;63.0;m;H;ct neck-thorax;val;siemens;;120.0;no_pathology;\r\n"
    "s0011;;f;A;ct polytrauma;test;;;;;\r\n"
    "s0999;50;f;A;ct abdomen;train;;;;;\r\n"
)


def subject(root: Path, name: str, classes: tuple[str, ...], image: str = "ct.nii.gz") -> None:
    touch(root / name, image, *(f"segmentations/{mask}.nii.gz" for mask in classes))


def test_the_tables_are_the_official_ones(shared: Path) -> None:
    official = json.loads((shared / "data/abdomen_ct/class_map_total_v2.json").read_text(encoding="utf-8"))
    for table, classes in (("total", V2_CLASSES), ("total_mr", MR_CLASSES)):
        assert official[table] == {str(value): name for value, name in enumerate(classes) if value}


def test_the_tables_have_their_sizes() -> None:
    assert [len(classes) for classes in TABLES.values()] == [118, 105, 51]
    assert all(len(set(classes)) == len(classes) for classes in TABLES.values())
    places = {18: "vertebrae_L5", 34: "vertebrae_T1", 50: "brain", 58: "rib_left_1", 93: "face", 104: "urinary_bladder"}
    assert {value: V1_CLASSES[value] for value in places} == places


def test_version_2_with_its_table_of_splits(tmp_path: Path) -> None:
    for name in ("s0011", "s0000", "s0004"):
        subject(tmp_path, name, V2_CLASSES[1:])
    (tmp_path / "meta.csv").write_text(META, encoding="utf-8", newline="")
    found = open_dataset(tmp_path)
    assert found.layout == "TotalSegmentator V2"
    assert [(case.name, case.split) for case in found.cases] == [
        ("s0000", "train"),
        ("s0004", "val"),
        ("s0011", "test"),
    ]
    assert found.label_map is not None
    assert found.label_map.names == V2_CLASSES
    case = found.cases[0]
    assert case.images == (tmp_path / "s0000/ct.nii.gz",)
    folder = tmp_path / "s0000/segmentations"
    assert case.labels == tuple(Mask(folder / f"{V2_CLASSES[value]}.nii.gz", value) for value in range(1, 118))
    assert found.ignored == ()


@pytest.mark.parametrize(
    ("layout", "classes", "image"),
    [
        ("TotalSegmentator V1", V1_CLASSES[1:], "ct.nii.gz"),
        ("TotalSegmentator V1", ("liver", "face"), "ct.nii.gz"),
        ("TotalSegmentator V2", ("liver", "skull"), "ct.nii.gz"),
        ("TotalSegmentator V2", ("liver", "spleen"), "ct.nii.gz"),
        ("TotalSegmentator MR", ("liver", "spleen"), "mri.nii.gz"),
        ("TotalSegmentator MR", MR_CLASSES[1:], "mri.nii.gz"),
    ],
)
def test_the_version_is_known_by_the_masks(tmp_path: Path, layout: str, classes: tuple[str, ...], image: str) -> None:
    subject(tmp_path, "s0000", classes, image)
    found = open_dataset(tmp_path)
    assert found.layout == layout
    names = TABLES[layout]
    assert [mask.value for mask in found.cases[0].labels or () if isinstance(mask, Mask)] == sorted(
        map(names.index, classes)
    )


def test_masks_are_merged_and_the_later_class_wins(tmp_path: Path) -> None:
    masks = {"spleen": [1, 1, 0, 0], "liver": [0, 1, 1, 0], "skull": [0, 0, 0, 0]}
    volume(tmp_path / "s0000/ct.nii.gz", np.zeros(4, np.int16))
    for name, voxels in masks.items():
        volume(tmp_path / f"s0000/segmentations/{name}.nii.gz", np.array(voxels, np.uint8))
    found = open_dataset(tmp_path)
    labels = read_labels(found.cases[0])
    assert labels is not None
    assert labels.data.ravel().tolist() == [1, 5, 5, 0]
    assert found.label_map is not None
    classes = true_classes(found.cases[0], read_grid(found.cases[0]), found.label_map)
    assert classes is not None
    assert classes.ravel().tolist() == [1, 5, 5, 0]


def test_what_is_no_class_is_ignored_with_the_reason(tmp_path: Path) -> None:
    subject(tmp_path, "s0000", ("liver", "tail", "skull"))
    touch(tmp_path, "s0001/ct.nii.gz", "s0002/notes.txt", "README.md", "s0000/segmentations/._liver.nii.gz")
    found = open_dataset(tmp_path)
    assert [(case.name, case.labels is None) for case in found.cases] == [("s0000", False), ("s0001", True)]
    assert left_out(found) == {
        "tail.nii.gz": "no class of TotalSegmentator V2 has its name",
        "s0002": "a folder that is no part of the layout",
        "README.md": "no volume by its ending",
        "._liver.nii.gz": "a hidden file",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,age,split\r\ns0000,3,train\r\n", "set apart by ';'"),
        ("", "wanted a header with the columns"),
        ("image_id;split\r\ns0000;holdout\r\n", "'holdout'"),
        (b"image_id;split\r\ns0000;\xff\r\n", "no readable table"),
    ],
)
def test_a_broken_table_of_splits_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    subject(tmp_path, "s0000", ("liver",))
    (tmp_path / "meta.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match=message) as caught:
        open_dataset(tmp_path)
    assert str(tmp_path / "meta.csv") in str(caught.value)


def test_images_without_segmentations_are_another_layout(tmp_path: Path) -> None:
    touch(tmp_path, "s0000/ct.nii.gz", "s0001/ct.nii.gz")
    with pytest.raises(FileError, match="no images in this folder"):
        open_dataset(tmp_path)


def test_every_folder_of_masks_is_listed_once_and_no_volume_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        subject(tmp_path, f"s{number:04}", V2_CLASSES[1:])
    listed: Counter[str] = Counter()
    scandir = os.scandir

    def counting(path: Path) -> object:
        listed[str(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    monkeypatch.setattr("ptq3d.datasets.whole_brain.load_labels", None)
    assert len(open_dataset(tmp_path).cases) == 20
    assert {count for path, count in listed.items() if path.endswith("segmentations")} == {1}
