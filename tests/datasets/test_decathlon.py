"""The Decathlon's tasks are what their dataset.json lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from placing import dumped, left_out, told, touch, volume

from ptq3d.datasets.cases import read_grid, read_image
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import FileError, LabelError

HEART: dict[str, Any] = {
    "name": "LeftAtrium",
    "description": "Left atrium segmentation",
    "reference": "King\u2019s College London",
    "licence": "CC-BY-SA 4.0",
    "relase": "1.0 04/05/2018",
    "tensorImageSize": "3D",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "left atrium"},
    "numTraining": 2,
    "numTest": 1,
    "training": [
        {"image": "./imagesTr/la_007.nii.gz", "label": "./labelsTr/la_007.nii.gz"},
        {"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"},
    ],
    "test": ["./imagesTs/la_002.nii.gz"],
}
FILES = (
    "imagesTr/la_003.nii.gz",
    "imagesTr/la_007.nii.gz",
    "labelsTr/la_003.nii.gz",
    "labelsTr/la_007.nii.gz",
    "imagesTs/la_002.nii.gz",
)


def heart(root: Path, **changes: object) -> Path:
    touch(root, *FILES, "imagesTr/._la_003.nii.gz", "._dataset.json")
    dumped(root / "dataset.json", {**HEART, **changes})
    return root


def test_a_task_as_downloaded(tmp_path: Path) -> None:
    found = open_dataset(heart(tmp_path / "Task02_Heart"))
    assert found.layout == "Medical Segmentation Decathlon"
    assert told(found) == [
        ("la_003", "train", "imagesTr/la_003.nii.gz", "labelsTr/la_003.nii.gz"),
        ("la_007", "train", "imagesTr/la_007.nii.gz", "labelsTr/la_007.nii.gz"),
        ("la_002", "test", "imagesTs/la_002.nii.gz", ""),
    ]
    assert found.channels == ("MRI",)
    assert found.label_map is not None
    assert found.label_map.names == ("background", "left atrium")
    assert left_out(found) == {"._la_003.nii.gz": "a hidden file"}


def test_what_is_not_listed_is_ignored(tmp_path: Path) -> None:
    root = touch(heart(tmp_path), "imagesTr/la_099.nii.gz", "extra/la_1.nii.gz", "readme.txt")
    assert left_out(open_dataset(root)) == {
        "la_099.nii.gz": "not listed in dataset.json",
        "extra": "a folder that is no part of the layout",
        "readme.txt": "no volume by its ending",
        "._la_003.nii.gz": "a hidden file",
    }


def test_values_with_gaps_become_classes_in_order(tmp_path: Path) -> None:
    found = open_dataset(heart(tmp_path, labels={"2": "tumour", "1": "liver", "7": "vessel"}))
    assert found.label_map is not None
    assert found.label_map.names == ("background", "liver", "tumour", "vessel")
    assert found.label_map.values == {0: 0, 1: 1, 2: 2, 7: 3}


@pytest.mark.parametrize("labels", [None, {}, ["liver"], {"liver": 1.5}])
def test_classes_without_names_stay_so_and_it_is_said(tmp_path: Path, labels: object) -> None:
    found = open_dataset(heart(tmp_path, labels=labels))
    assert found.label_map is None
    assert "names no classes" in left_out(found)["dataset.json"]


def test_several_modalities_in_one_file_are_channels(tmp_path: Path) -> None:
    root = heart(tmp_path, modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"})
    stored = np.random.default_rng(0).normal(size=(5, 6, 7, 4)).astype(np.float32)
    volume(root / FILES[0], stored)
    found = open_dataset(root)
    assert found.channels == ("FLAIR", "T1w", "t1gd", "T2w")
    np.testing.assert_array_equal(read_image(found.cases[0]).data, np.moveaxis(stored, -1, 0))
    assert read_grid(found.cases[0])[0] == (5, 6, 7)
    assert found.cases[0].channels == 4


@pytest.mark.parametrize("shape", [(4, 4, 4, 3), (4, 4, 4), (4, 4, 4, 4, 2)])
def test_another_number_of_modalities_is_refused_when_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    root = heart(tmp_path, modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"})
    volume(root / FILES[0], np.zeros(shape, np.float32))
    for read in (read_image, read_grid):
        with pytest.raises(FileError, match=r"la_003\.nii\.gz: wanted 4 3D volumes, got shape \("):
            read(open_dataset(root).cases[0])


def entry(image: object, label: object = "labelsTr/la_003.nii.gz") -> dict[str, object]:
    return {"training": [{"image": image, "label": label}]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (entry("../../etc/passwd"), FileError, "leads out of"),
        (entry("imagesTr/../../x.nii.gz"), FileError, "leads out of"),
        (entry("/etc/passwd"), FileError, "leads out of"),
        (entry("imagesTr/la_003.nii.gz", "../labels.nii.gz"), FileError, "leads out of"),
        (entry("imagesTr/la_004.nii.gz"), FileError, "lists 'imagesTr/la_004"),
        (entry("imagesTr/la_003.nii.gz", "labelsTr/la_004.nii.gz"), FileError, "lists 'labelsTr/la_004"),
        (entry("imagesTr/" + "x" * 5000), FileError, "no such file"),
        (entry("imagesTr/\0.nii.gz"), FileError, "no such file"),
        (entry("imagesTr/\ud800.nii.gz"), FileError, "no such file"),
        (entry(7), FileError, "path of a file, got 7"),
        (entry("imagesTr/la_003.nii.gz", 7), FileError, "path of a file, got 7"),
        (entry("imagesTr/la_003.nii.gz", "labelsTr"), FileError, "no such file"),
        (entry([]), FileError, "has no image"),
        (entry([None]), FileError, "path of a file, got None"),
        ({"training": {"a": 1}}, FileError, '"training" as a list'),
        ({"training": [["a.nii.gz"]]}, FileError, "wanted an image"),
        ({"training": [{"label": "labelsTr/la_003.nii.gz"}]}, FileError, "has no image"),
        ({"training": [], "test": []}, FileError, "no case"),
        ({"training": [*HEART["training"], HEART["training"][0]]}, FileError, r"case name \['la_007'\]"),
        ({"training": [{**HEART["training"][0], "name": "../../la"}]}, FileError, "cannot be the name of a file"),
        ({"training": [{**HEART["training"][0], "name": ["a"]}]}, FileError, "wanted a name as text"),
        ({"labels": {"0": "background", "70000": "liver"}}, LabelError, "70000"),
        ({"labels": {"0": "background", "00": "liver"}}, LabelError, "given twice"),
        ({"labels": {"background": 0, "liver": -1}}, LabelError, "-1"),
    ],
)
def test_a_bad_list_gives_one_sentence_that_names_it(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_dataset(heart(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"training": [}', b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"[1]", b"7"],
)
def test_json_that_is_broken_or_of_another_shape_is_named(tmp_path: Path, content: bytes) -> None:
    heart(tmp_path)
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(FileError, match=r"dataset\.json"):
        open_dataset(tmp_path)


def test_json_of_others_does_not_matter(tmp_path: Path) -> None:
    root = heart(tmp_path)
    (root / "dataset.json").write_text(json.dumps({"licence": "none"}), encoding="utf-8")
    assert open_dataset(root).layout == "folders of images and labels"


def test_links_inside_a_data_set_may_lead_elsewhere(tmp_path: Path) -> None:
    root, elsewhere = heart(tmp_path / "task"), tmp_path / "elsewhere"
    (root / "imagesTr").rename(elsewhere)
    (root / "imagesTr").symlink_to(elsewhere)
    assert len(open_dataset(root).cases) == 3
