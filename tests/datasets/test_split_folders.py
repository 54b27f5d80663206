"""Folders of images and labels, alone or in splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from placing import left_out, told, touch

from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import FileError, LabelError

LAYOUT = "folders of images and labels"


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "val", "test"), ["train", "val", "test"]),
        (("Training", "Validation", "Testing"), ["train", "val", "test"]),
        (("train",), ["train"]),
        (("TEST",), ["test"]),
    ],
)
@pytest.mark.parametrize("kinds", [("images", "labels"), ("img", "label"), ("Images", "Labels")])
def test_splits_and_their_names(
    tmp_path: Path, names: tuple[str, ...], splits: list[str], kinds: tuple[str, str]
) -> None:
    for name in names:
        touch(tmp_path, *(f"{name}/{kind}/case-{name}.nii.gz" for kind in kinds))
    found = open_dataset(tmp_path)
    assert found.layout == LAYOUT
    assert list(found.splits) == splits
    assert told(found) == [
        (f"case-{name}", split, f"{name}/{kinds[0]}/case-{name}.nii.gz", f"{name}/{kinds[1]}/case-{name}.nii.gz")
        for name, split in zip(names, splits, strict=True)
    ]


def test_the_endings_of_the_decathlon_without_its_list(tmp_path: Path) -> None:
    files = ("imagesTr/b.nii", "labelsTr/b.nii", "imagesVal/c.nii", "labelsVal/c.nii", "imagesTs/a.nii")
    assert [row[:2] for row in told(open_dataset(touch(tmp_path, *files)))] == [
        ("b", "train"),
        ("c", "val"),
        ("a", "test"),
    ]


def test_no_splits_and_no_labels(tmp_path: Path) -> None:
    found = open_dataset(touch(tmp_path / "a", "images/x.nii", "labels/x.nii", "LICENSE", "other/x.nii"))
    assert told(found) == [("x", "", "images/x.nii", "labels/x.nii")]
    assert left_out(found) == {"LICENSE": "no volume by its ending", "other": "a folder that is no part of the layout"}
    assert told(open_dataset(touch(tmp_path / "b", "images/x.nii", "labels/notes.txt")))[0][3] == ""


def test_the_real_abdomens(shared: Path) -> None:
    for name in ("abdomen_ct", "abdomen_mr"):
        found = open_dataset(shared / "data" / name)
        assert (found.layout, found.label_map) == (LAYOUT, None)
        assert told(found) == [(name[-2:], "", f"images/{name[-2:]}.nii.gz", f"labels/{name[-2:]}.nii.gz")]


def test_labels_without_images_are_ignored_and_images_without_labels_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, "images/a.nii", "labels/a.nii", "labels/b.nii", "images/notes.txt")
    assert left_out(open_dataset(root)) == {"b.nii": "no image has its name", "notes.txt": "no volume by its ending"}
    touch(root, "images/c.nii")
    with pytest.raises(LabelError, match=r"c\.nii has no labels"):
        open_dataset(root)


def test_one_name_in_two_splits_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/images/a.nii", "test/images/a.nii")
    with pytest.raises(FileError, match=r"case name \['a'\], .*train/images/a\.nii and .*test/images/a\.nii"):
        open_dataset(root)
