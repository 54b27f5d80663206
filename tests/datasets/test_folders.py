"""Cases are found in the layouts people have, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq3d.datasets.cases import Case
from ptq3d.datasets.folders import case_name, find_cases
from ptq3d.errors import FileError, LabelError


def folder(place: Path, *names: str) -> Path:
    place.mkdir(parents=True)
    for name in names:
        (place / name).touch()
    return place


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("img0001.nii.gz", "label0001.nii.gz"),
        ("case_7.nii.gz", "case_7.nii"),
        ("liver_003_0000.nii.gz", "liver_003.nii.gz"),
        ("liver_003_0000.nii.gz", "liver_003_0000.nii.gz"),
        ("1013_3.nii.gz", "1013_3_glm.nii.gz"),
        ("ct.nii.gz", "ct.nii.gz"),
        ("A1.NII.GZ", "seg1.nii.gz"),
    ],
)
def test_an_image_finds_its_labels(tmp_path: Path, image: str, label: str) -> None:
    images = folder(tmp_path / "images", image, "other_99.nii.gz", "readme.txt", ".hidden.nii.gz")
    labels = folder(tmp_path / "labels", label, "other_99.nii.gz", "other_98.nii.gz")
    found = {Path(case.where).name: case for case in find_cases(images, labels)}
    assert len(found) == 2
    assert found[image] == Case(case_name(images / image), (images / image,), labels / label)


def test_cases_come_by_name(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", *(f"img{number:04}.nii.gz" for number in (3, 1, 2)))
    cases = find_cases(images)
    assert [case.name for case in cases] == ["img0001", "img0002", "img0003"]
    assert all(case.labels is None for case in cases)


def test_single_files_belong_together(tmp_path: Path) -> None:
    image = folder(tmp_path / "images", "scan.nii.gz", "scan2.nii.gz") / "scan.nii.gz"
    label = folder(tmp_path / "labels", "segmentation.nii.gz") / "segmentation.nii.gz"
    assert find_cases(image, label) == [Case("scan", (image,), label)]
    assert find_cases(image) == [Case("scan", (image,))]


def test_a_single_image_finds_its_labels_in_a_folder(tmp_path: Path) -> None:
    image = folder(tmp_path / "images", "img0002.nii.gz") / "img0002.nii.gz"
    labels = folder(tmp_path / "labels", "label0001.nii.gz", "label0002.nii.gz")
    assert find_cases(image, labels) == [Case("img0002", (image,), labels / "label0002.nii.gz")]


def test_equal_names_go_before_equal_numbers(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", "a1.nii.gz", "b1.nii.gz")
    labels = folder(tmp_path / "labels", "a1.nii.gz", "b1.nii.gz")
    assert [case.labels for case in find_cases(images, labels)] == [labels / "a1.nii.gz", labels / "b1.nii.gz"]


def test_the_real_layouts(shared: Path) -> None:
    data = shared / "data"
    brains = find_cases(data / "whole_brain/test/images", data / "whole_brain/test/labels", required_labels=True)
    assert [case.name for case in brains] == ["1013", "1014", "1015", "1017", "1036"]
    assert all(case.label_files[0].name == Path(case.where).name for case in brains)
    assert len(find_cases(data / "abdomen_ct/images", data / "abdomen_ct/labels")) == 1


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", "img1.nii.gz")
    empty = folder(tmp_path / "empty", "notes.txt")
    for place, message in ((tmp_path / "nowhere", "no such file or folder"), (empty, "no .* in this folder")):
        with pytest.raises(FileError, match=message) as caught:
            find_cases(place)
        assert str(place) in str(caught.value)
        with pytest.raises(FileError, match=message):
            find_cases(images, place)


def test_an_image_without_labels_is_named(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", "img0001.nii.gz", "img0002.nii.gz")
    labels = folder(tmp_path / "labels", "label0001.nii.gz")
    with pytest.raises(LabelError, match=r"img0002\.nii\.gz has no labels in"):
        find_cases(images, labels)
    with pytest.raises(LabelError, match="need labels"):
        find_cases(images, required_labels=True)


def test_an_image_without_a_number_matches_no_other_label(tmp_path: Path) -> None:
    images, labels = folder(tmp_path / "images", "scan.nii"), folder(tmp_path / "labels", "mask.nii")
    with pytest.raises(LabelError, match="no labels"):
        find_cases(images, labels)


def test_labels_that_could_be_anyones_are_refused(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", "img0001.nii.gz")
    labels = folder(tmp_path / "labels", "label0001.nii.gz", "mask0001.nii.gz")
    with pytest.raises(LabelError, match="several label files"):
        find_cases(images, labels)
    images = folder(tmp_path / "more", "ct0001.nii.gz", "mr0001.nii.gz")
    labels = folder(tmp_path / "fewer", "label0001.nii.gz")
    with pytest.raises(LabelError, match="would be the labels of"):
        find_cases(images, labels)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", "a.nii", "a_0000.nii.gz")
    with pytest.raises(FileError, match=r"case name \['a'\]"):
        find_cases(images)
