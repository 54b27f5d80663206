"""One function opens what people have; what cannot be opened gives one clear sentence."""

from __future__ import annotations

import os
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from placing import dumped, touch, volume
from test_case_list import NAMES

from ptq3d.datasets.cases import Case, read_labels
from ptq3d.datasets.dataset import SPLITS, Dataset, arranged, split_named
from ptq3d.datasets.dataset_json import inside
from ptq3d.datasets.layouts import LAYOUTS, open_dataset
from ptq3d.errors import FileError, InputError, LabelError


def test_labels_of_another_folder_go_before_what_the_layout_says(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "a_0000.nii", "a_0001.nii")
    labels = touch(tmp_path / "other", "a.nii", "b.nii")
    found = open_dataset(images, labels)
    assert found.layout == "folder"
    assert found.cases == (Case("a", (images / "a_0000.nii", images / "a_0001.nii"), labels / "a.nii"),)
    assert [(item.path, item.reason) for item in found.ignored] == [(labels / "b.nii", "no image has its name")]
    single = open_dataset(images / "a_0000.nii", labels / "b.nii")
    assert single.cases == (Case("a", (images / "a_0000.nii",), labels / "b.nii"),)


def test_a_single_volume_and_a_folder_of_them(tmp_path: Path) -> None:
    root = touch(tmp_path, "b.nii", "a.nii.gz")
    assert [case.name for case in open_dataset(root).cases] == ["a", "b"]
    assert open_dataset(root / "b.nii").cases == (Case("b", (root / "b.nii",)),)


def test_a_set_of_segmentations_that_is_not_there_is_named(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.nii", "a_seg.nii", "a_mask.nii")
    assert open_dataset(root, Path("seg")).cases[0].labels == root / "a_seg.nii"
    with pytest.raises(FileError, match=r"^x: no such file or folder of labels; .* segmentations mask, seg"):
        open_dataset(root, Path("x"))
    with pytest.raises(FileError, match="no such file or folder of labels; check the path"):
        open_dataset(touch(tmp_path / "b", "a.nii"), Path("seg"))


def test_the_strictest_layout_comes_first() -> None:
    order = list(LAYOUTS)
    assert order[-1] == "folder"
    for strict, lax in [
        ("BTCV", "Medical Segmentation Decathlon"),
        ("nnU-Net raw", "Medical Segmentation Decathlon"),
        ("Medical Segmentation Decathlon", "folders of images and labels"),
        ("whole brain", "folders of images and labels"),
        ("BIDS", "folder"),
        ("DICOM", "folder"),
    ]:
        assert order.index(strict) < order.index(lax)


def circle(path: Path) -> None:
    path.symlink_to(path)


def unlistable(path: Path) -> None:
    path.mkdir()
    path.chmod(0)


@pytest.mark.parametrize(
    "make",
    [lambda path: None, circle, lambda path: path.mkdir(), lambda path: touch(path, "notes.txt"), unlistable],
    ids=["missing", "circle", "empty", "no volume", "unlistable"],
)
def test_a_place_without_a_data_set_is_named(tmp_path: Path, make: object) -> None:
    place = tmp_path / "datä set"
    assert callable(make)
    make(place)
    with pytest.raises(FileError) as caught:
        open_dataset(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "a/" * 3000])
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="no such file or folder"):
        open_dataset(tmp_path / name)
    with pytest.raises(FileError, match="no such file or folder of labels"):
        open_dataset(touch(tmp_path, "a.nii"), tmp_path / name)


@pytest.mark.parametrize(
    "name", ["images", "labels", "sub-01", "s0000", "imagesTr", "train", "Training", "derivatives"]
)
def test_folders_in_a_circle_end(tmp_path: Path, name: str) -> None:
    root = touch(tmp_path, "a.nii")
    (root / name).symlink_to(root)
    (root / "loop").symlink_to(root / "loop")
    assert [case.name for case in open_dataset(root).cases] == ["a"]


@pytest.mark.parametrize("name", ["images", "labels", "sub-01", "s0000/segmentations", "imagesTr", "train", "RawData"])
def test_a_subfolder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = touch(tmp_path, "s0000/ct.nii.gz", "images/a.nii", "labels/a.nii")
    (root / name).mkdir(exist_ok=True, parents=True)
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path) == root / name:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(FileError, match="cannot be listed \\(Permission denied\\)") as caught:
        open_dataset(root)
    assert str(root / name) in str(caught.value)


def test_names_of_every_alphabet(tmp_path: Path) -> None:
    names = ["Übung", "患者一", "мозг", "a b", "x" * 190, "नमस्ते", "e\u0301"]
    found = open_dataset(
        touch(tmp_path, *(f"images/{name}.nii.gz" for name in names), *(f"labels/{name}.nii.gz" for name in names))
    )
    assert {case.name for case in found.cases} == set(names)
    assert all(case.label_files[0].name == Path(case.where).name for case in found.cases)


@pytest.mark.parametrize("name", ["x" * 240, "a\nb", "a\\b", b"\xff".decode(errors="surrogateescape")])
def test_names_that_no_output_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="cannot be the name of a file") as caught:
        open_dataset(touch(tmp_path, f"{name}.nii"))
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=300), inner=NAMES)
def test_a_case_name_never_leaves_its_folder(name: str, inner: str) -> None:
    root = Path("/data")
    try:
        Dataset("folder", root, (Case(name, (root / "a.nii",)),))
    except FileError:
        assert name not in string.ascii_letters or not name
    else:
        written = Path(os.path.normpath(f"/out/{name}.nii.gz"))
        assert written.parent == Path("/out")
        assert "\0" not in name
    Dataset("folder", root, (Case(inner, (root / "a.nii",)),))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(st.sampled_from(["..", ".", "a", "b", "", "/"]), max_size=8), start=st.sampled_from(["", "/", "./"])
)
def test_a_listed_path_stays_inside(tmp_path: Path, parts: list[str], start: str) -> None:
    text = start + "/".join(parts)
    try:
        path = inside(tmp_path, text, where=tmp_path / "dataset.json")
    except FileError:
        depth = lowest = 0
        for part in text.split("/"):
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            lowest = min(lowest, depth)
        assert lowest < 0 or text.startswith("/") or not text
    else:
        assert Path(os.path.normpath(path)).is_relative_to(tmp_path)


def test_splits_and_order() -> None:
    where = Path("x.csv")
    assert [split_named(text, where=where) for text in ("Train", "VALIDATION", " test ", "", "tr")] == [
        "train",
        "val",
        "test",
        "",
        "train",
    ]
    with pytest.raises(FileError, match=r"x\.csv.*'fold 1'"):
        split_named("fold 1", where=where)
    mixed = [
        Case(name, (Path(f"{name}.nii"),), split=split) for name, split in zip("dcba", reversed(SPLITS), strict=True)
    ]
    assert [(case.name, case.split) for case in arranged(mixed)] == [
        ("a", "train"),
        ("b", "val"),
        ("c", "test"),
        ("d", ""),
    ]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.recursive(
        st.none() | st.integers(-2, 3) | st.sampled_from(["imagesTr/a.nii", "", "background", "0", ".nii", "\0"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["training", "test", "labels", "modality", "channel_names", "file_ending", "dataset"])
                | st.sampled_from(["image", "label", "name", "split", "images", "0", "1", "a"]),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_is_a_data_set_or_a_sentence(tmp_path: Path, content: object) -> None:
    root = touch(tmp_path, "imagesTr/a.nii", "labelsTr/a.nii", "imagesTr/b_0000.nii", "labelsTr/b.nii")
    for place in (dumped(root / "dataset.json", content).parent, dumped(root / "list.json", content)):
        found: Dataset | None = None
        message = f"{root}"
        try:
            found = open_dataset(place)
        except InputError as error:
            message = str(error)
        assert str(root) in message
        assert "\n" not in message
        assert all(Path(case.where).is_file() for case in (found.cases if found else ()))


def test_a_label_that_is_no_label_map_is_no_hindrance(tmp_path: Path) -> None:
    volume(tmp_path / "images/a.nii", np.zeros(8, np.int16))
    volume(tmp_path / "labels/a.nii", np.full(8, 0.5, np.float32))
    assert open_dataset(tmp_path).layout == "folders of images and labels"
    with pytest.raises(LabelError, match="not whole numbers"):
        read_labels(open_dataset(tmp_path).cases[0])
