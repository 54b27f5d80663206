"""nnU-Net's raw folders: channels in order, classes by dataset.json, nothing missing unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from placing import dumped, left_out, told, touch, volume

from ptq3d.datasets.cases import read_image
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import FileError, InputError, LabelError

PROSTATE: dict[str, Any] = {
    "channel_names": {"0": "T2", "1": "ADC"},
    "labels": {"background": 0, "PZ": 1, "TZ": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "overwrite_image_reader_writer": "SimpleITKIO",
}
FILES = (
    "imagesTr/prostate_00_0000.nii.gz",
    "imagesTr/prostate_00_0001.nii.gz",
    "imagesTr/prostate_01_0000.nii.gz",
    "imagesTr/prostate_01_0001.nii.gz",
    "imagesTs/prostate_03_0000.nii.gz",
    "imagesTs/prostate_03_0001.nii.gz",
    "labelsTr/prostate_00.nii.gz",
    "labelsTr/prostate_01.nii.gz",
)


def prostate(root: Path, **changes: object) -> Path:
    touch(root, *FILES)
    dumped(root / "dataset.json", {**PROSTATE, **changes})
    return root


def test_a_data_set_of_version_2(tmp_path: Path) -> None:
    found = open_dataset(prostate(tmp_path / "Dataset005_Prostate"))
    assert found.layout == "nnU-Net raw"
    assert told(found) == [
        ("prostate_00", "train", " ".join(FILES[0:2]), FILES[6]),
        ("prostate_01", "train", " ".join(FILES[2:4]), FILES[7]),
        ("prostate_03", "test", " ".join(FILES[4:6]), ""),
    ]
    assert found.channels == ("T2", "ADC")
    assert found.label_map is not None
    assert found.label_map.names == ("background", "PZ", "TZ")
    assert found.ignored == ()


def test_channels_are_read_in_their_order(tmp_path: Path) -> None:
    root = prostate(tmp_path)
    for number, name in enumerate(FILES[:2]):
        volume(root / name, np.full((3, 4, 5), number, np.int16))
    image = read_image(open_dataset(root).cases[0])
    assert image.data.shape == (2, 3, 4, 5)
    assert [float(channel.max()) for channel in image.data] == [0, 1]


def test_test_labels_and_a_description_of_version_1(tmp_path: Path) -> None:
    root = touch(tmp_path, *FILES, "labelsTs/prostate_03.nii.gz")
    listed = [
        {"image": f"./imagesTr/prostate_0{n}.nii.gz", "label": f"./labelsTr/prostate_0{n}.nii.gz"} for n in (0, 1)
    ]
    table = {
        "name": "PROSTATE",
        "tensorImageSize": "4D",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "numTraining": 2,
        "numTest": 1,
        "training": listed,
        "test": ["./imagesTs/prostate_03.nii.gz"],
    }
    dumped(root / "dataset.json", table)
    found = open_dataset(root)
    assert found.layout == "nnU-Net raw"
    assert told(found)[2] == ("prostate_03", "test", " ".join(FILES[4:6]), "labelsTs/prostate_03.nii.gz")
    assert found.label_map is not None
    assert found.label_map.names == ("background", "PZ", "TZ")
    assert found.channels == ("T2", "ADC")


def test_a_table_of_files(tmp_path: Path) -> None:
    root = touch(tmp_path, "scans/a_t2.nii.gz", "scans/a_adc.nii.gz", "truth/a.nii.gz")
    files = {"images": ["scans/a_t2.nii.gz", "scans/a_adc.nii.gz"], "label": "truth/a.nii.gz"}
    dumped(root / "dataset.json", {**PROSTATE, "dataset": {"a": files}})
    assert told(open_dataset(root)) == [("a", "train", "scans/a_t2.nii.gz scans/a_adc.nii.gz", "truth/a.nii.gz")]
    dumped(root / "dataset.json", {**PROSTATE, "dataset": {"a": {**files, "images": ["../a.nii.gz", "b.nii.gz"]}}})
    with pytest.raises(FileError, match="leads out of"):
        open_dataset(root)


def test_regions_and_ignored_voxels_are_said(tmp_path: Path) -> None:
    regions = open_dataset(prostate(tmp_path / "a", labels={"background": 0, "whole": [1, 2], "core": [2]}))
    assert regions.label_map is None
    assert "'whole', 'core'" in left_out(regions)["dataset.json"]
    ignoring = open_dataset(prostate(tmp_path / "b", labels={"background": 0, "PZ": 1, "ignore": 2}))
    assert ignoring.label_map is not None
    assert ignoring.label_map.names == ("background", "PZ")
    assert "'ignore' (2)" in left_out(ignoring)["dataset.json"]
    with pytest.raises(LabelError, match="none of the 2 classes: 2"):
        ignoring.label_map.apply(np.array([0, 1, 2], np.uint8))


def test_files_of_other_names_are_ignored(tmp_path: Path) -> None:
    root = touch(
        prostate(tmp_path), "imagesTr/scan.nii.gz", "labelsTr/prostate_09.nii.gz", "imagesTr/a_0000.nii", "x/y"
    )
    assert left_out(open_dataset(root)) == {
        "scan.nii.gz": "not named case_0000.nii.gz",
        "a_0000.nii": "not named case_0000.nii.gz",
        "prostate_09.nii.gz": "no image has its name",
        "x": "a folder that is no part of the layout",
    }


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (FILES[1], (), r"prostate_00_0001\.nii\.gz: channel 1 \(ADC\) of this case is missing"),
        (FILES[2], (), r"prostate_01_0000\.nii\.gz: channel 0 \(T2\)"),
        (FILES[4], (), r"prostate_03_0000\.nii\.gz: channel 0"),
        (FILES[6], (), r"prostate_00_0000\.nii\.gz: its labels .*prostate_00\.nii\.gz are missing"),
        (None, ("imagesTr/prostate_00_0002.nii.gz",), r"prostate_00_0002\.nii\.gz: .* names only the channels"),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    tmp_path: Path, remove: str | None, add: tuple[str, ...], message: str
) -> None:
    root = touch(prostate(tmp_path), *add)
    if remove:
        (root / remove).unlink()
    with pytest.raises(InputError, match=message):
        open_dataset(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_ending": ".png"}, "'.png'"),
        ({"file_ending": 3}, "got 3"),
        ({"channel_names": {"0": "T2", "2": "ADC"}}, "without gaps"),
        ({"channel_names": ["T2", "ADC"]}, "without gaps"),
        ({"labels": {"background": 0, "PZ": 0}}, "given twice"),
        ({"dataset": ["a"]}, '"dataset" as'),
        ({"dataset": {"a": {"images": ["imagesTr/prostate_00_0000.nii.gz"]}}}, "one image for each"),
        ({"dataset": {"../a": {"images": list(FILES[:2]), "label": FILES[6]}}}, "cannot be the name of a file"),
    ],
)
def test_a_description_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_dataset(prostate(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)


def test_without_its_description_it_is_two_folders_of_channels(tmp_path: Path) -> None:
    found = open_dataset(touch(tmp_path, *FILES))
    assert found.layout == "folders of images and labels"
    assert [len(case.images) for case in found.cases] == [2, 2, 2]
    assert told(found)[0] == ("prostate_00", "train", " ".join(FILES[0:2]), FILES[6])
