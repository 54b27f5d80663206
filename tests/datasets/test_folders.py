"""Cases are found in the layouts people have, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from placing import left_out

from ptq3d.datasets.cases import Case
from ptq3d.datasets.folders import find, find_cases
from ptq3d.datasets.pairing import case_name
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


def test_numbers_are_channels_where_every_case_has_the_same(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", *(f"{name}_000{number}.nii.gz" for name in "ab" for number in (0, 1)))
    wanted = [Case(name, (images / f"{name}_0000.nii.gz", images / f"{name}_0001.nii.gz")) for name in "ab"]
    assert find_cases(images) == wanted
    labels = folder(tmp_path / "labels", "a.nii.gz", "b.nii.gz")
    assert [case.labels for case in find_cases(images, labels)] == [labels / "a.nii.gz", labels / "b.nii.gz"]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("a_0000", "b_0000"), ["a", "b"]),
        (("a_0000", "a_0001", "b_0000"), ["a", "a_0001", "b"]),
        (("a_0000", "a_0001", "other"), ["a", "a_0001", "other"]),
        (("a_0001", "a_0002"), ["a_0001", "a_0002"]),
        (("a_0000", "a_0002"), ["a", "a_0002"]),
        (("a_000", "a_001"), ["a_000", "a_001"]),
        (tuple(f"a_{number:04}" for number in range(11)), ["a", *(f"a_{number:04}" for number in range(1, 11))]),
        (tuple(f"a_{number:04}" for number in range(10)), ["a"]),
    ],
)
def test_other_numbers_are_cases(tmp_path: Path, files: tuple[str, ...], names: list[str]) -> None:
    images = folder(tmp_path / "images", *(f"{name}.nii.gz" for name in files))
    assert [case.name for case in find_cases(images)] == names


def test_numbers_are_cases_where_their_labels_have_them_too(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", "a_0000.nii.gz", "a_0001.nii.gz")
    labels = folder(tmp_path / "labels", "a_0000.nii.gz", "a_0001.nii.gz")
    assert [case.label_files for case in find_cases(images, labels)] == [
        (labels / "a_0000.nii.gz",),
        (labels / "a_0001.nii.gz",),
    ]


@pytest.mark.parametrize("ending", ["_seg", "_dseg", "_label", "_labels", "_mask", "_msk", "_glm"])
def test_labels_lie_beside_their_images(tmp_path: Path, ending: str) -> None:
    place = folder(
        tmp_path / "data", "a.nii.gz", f"a{ending}.nii.gz", "b_0000.nii.gz", f"b{ending}.nii", f"c{ending}.nii"
    )
    found = find(place)
    assert [(case.name, case.labels) for case in found.cases] == [
        ("a", place / f"a{ending}.nii.gz"),
        ("b", place / f"b{ending}.nii"),
        (f"c{ending}", None),
    ]
    with pytest.raises(LabelError, match="need labels"):
        find_cases(place, required_labels=True)
    (place / f"c{ending}.nii").unlink()
    assert len(find_cases(place, required_labels=True)) == 2


def test_several_kinds_of_labels_beside_are_offered_by_name(tmp_path: Path) -> None:
    place = folder(tmp_path / "data", "a.nii", "a_seg.nii", "a_mask.nii", "a_seg_seg.nii")
    found = find(place)
    assert [(case.name, case.labels) for case in found.cases] == [("a", None)]
    assert {name: one.cases[0].labels for name, one in found.choices.items()} == {
        "mask": place / "a_mask.nii",
        "seg": place / "a_seg.nii",
    }
    assert "one of several segmentations (mask, seg)" in left_out(found)["a_seg.nii"]
    assert left_out(found.choices["seg"]) == {
        "a_mask.nii": "of the segmentations 'mask'",
        "a_seg_seg.nii": "no image has its name",
    }


def test_labels_beside_are_no_images_of_labels_elsewhere(tmp_path: Path) -> None:
    images = folder(tmp_path / "data", "a.nii", "a_seg.nii")
    labels = folder(tmp_path / "labels", "a.nii")
    assert find_cases(images, labels) == [Case("a", (images / "a.nii",), labels / "a.nii")]


def test_two_files_of_labels_beside_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="labels of the same image"):
        find(folder(tmp_path / "data", "a.nii", "a_seg.nii", "a_seg.nii.gz"))


def test_what_is_no_volume_is_ignored_with_the_reason(tmp_path: Path) -> None:
    place = folder(tmp_path / "data", "a.nii", "readme.txt", ".hidden.nii", ".DS_Store", "b.dcm")
    (place / "folder").mkdir()
    (place / "lost.nii").symlink_to(place / "nowhere.nii")
    (place / "loop.nii").symlink_to(place / "loop.nii")
    (place / "here").symlink_to(place)
    found = find(place)
    assert [case.name for case in found.cases] == ["a"]
    assert left_out(found) == {
        "readme.txt": "no volume by its ending",
        ".hidden.nii": "a hidden file",
        "b.dcm": "a DICOM file beside what is no DICOM; put its series into a folder of its own",
        "folder": "a folder that is no part of the layout",
        "here": "a folder that is no part of the layout",
        "lost.nii": "no file, or a link that leads nowhere",
        "loop.nii": "no file, or a link that leads nowhere",
    }
