"""What --data names is found, told in a line, and its labels are used only where they mean the network's classes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq3d.data import described, find_data, fitting, judged_by, with_labels, without_labels
from ptq3d.datasets.btcv import BTCV_ORGANS
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.whole_brain import WHOLE_BRAIN_NAMES
from ptq3d.errors import LabelError, OptionError
from ptq3d.manifest import Manifest
from ptq3d.options import TrainOptions
from ptq3d.pipeline import train

WINDOW = (8, 8, 8)


def written(path: Path, spacing: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.diag([spacing, 1, 1, 1])), path)


@pytest.fixture
def btcv(tmp_path: Path) -> Path:
    """The seed's layout: two cases to train on, one to test."""
    for index, split in enumerate(("train", "train", "test"), 1):
        written(tmp_path / split / "images" / f"img{index:04d}.nii.gz", spacing=index)
        written(tmp_path / split / "labels" / f"label{index:04d}.nii.gz", spacing=index)
    (tmp_path / "notes.txt").touch()
    return tmp_path


def test_a_data_set_is_told_in_one_line(btcv: Path) -> None:
    line = described(find_data(btcv))
    assert "\n" not in line
    for part in (
        "BTCV",
        "3 cases (2 train, 1 test)",
        "labels of 14 classes",
        "1-3 x 1 x 1 mm",
        "1 file ignored",
        "notes.txt",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("split", "usual", "names"),
    [
        (None, (), ["img0001", "img0002", "img0003"]),
        (None, ("train",), ["img0001", "img0002"]),
        (None, ("val", "test"), ["img0003"]),
        ("train", ("test",), ["img0001", "img0002"]),
        ("all", ("test",), ["img0001", "img0002", "img0003"]),
    ],
)
def test_the_split_asked_for_goes_before_the_usual_one(
    btcv: Path, split: str | None, usual: tuple[str, ...], names: list[str]
) -> None:
    assert [case.name for case in find_data(btcv, split=split, usual=usual).cases] == names


def test_a_split_that_is_not_there_is_refused_with_those_that_are(btcv: Path) -> None:
    with pytest.raises(OptionError, match="no split 'val': train, test"):
        find_data(btcv, split="val")
    with pytest.raises(OptionError, match="no split 'val', but train, test"):
        find_data(btcv, usual=("val",))
    with pytest.raises(OptionError, match="it names none"):
        find_data(btcv / "train" / "images", split="val")


def test_what_is_used_is_said(btcv: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ptq3d")
    find_data(btcv, usual=("train",))
    assert "using its 2 cases of split 'train'" in caplog.text


def test_labels_can_be_asked_for_and_left_out(btcv: Path) -> None:
    found = find_data(btcv)
    assert with_labels(found, None) is found
    bare = without_labels(found)
    assert all(case.labels is None for case in bare.cases)
    with pytest.raises(LabelError, match="no label map beside it; name their file or folder with --labels"):
        with_labels(bare, None)


def test_labels_of_the_networks_classes_are_used(btcv: Path) -> None:
    cases, label_map = judged_by(find_data(btcv), Manifest(BTCV_ORGANS, WINDOW), labels=None, label_map=None)
    assert all(case.labels is not None for case in cases)
    assert label_map.names == BTCV_ORGANS


def test_labels_of_other_classes_are_left_out_and_it_is_said(btcv: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ptq3d")
    cases, _ = judged_by(find_data(btcv), Manifest(("background", "tumour"), WINDOW), labels=None, label_map=None)
    assert all(case.labels is None for case in cases)
    assert "are of 14 classes (the network has 2)" in caplog.text


def test_labels_that_the_user_names_are_used_as_they_are(btcv: Path) -> None:
    labels = btcv / "test" / "labels"
    found = find_data(btcv / "test" / "images", labels)
    cases, label_map = judged_by(found, Manifest(("background", "tumour"), WINDOW), labels=labels, label_map=None)
    assert cases[0].labels == labels / "label0003.nii.gz"
    assert label_map == LabelMap.identity(("background", "tumour"))


def test_a_label_map_of_another_number_of_classes_is_refused(btcv: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"labels": {"0": "background", "1": "liver"}}')
    with pytest.raises(LabelError, match="names 2 classes, the network gives 14"):
        judged_by(find_data(btcv), Manifest(BTCV_ORGANS, WINDOW), labels=None, label_map=tmp_path / "map.json")


NAMES = ("background", "Left Lung", "right-lung", "heart")


@given(st.permutations(range(1, 4)).map(lambda order: [0, *order]), st.sampled_from([None, 0]))
def test_classes_are_matched_by_name_in_any_order(order: list[int], others: int | None) -> None:
    own = LabelMap(NAMES, {10 * index: index for index in range(4)}, others)
    wanted = tuple(NAMES[index].upper().replace(" ", "_") for index in order)
    found = fitting(own, wanted)
    assert found is not None
    assert found.names == wanted
    for value, index in own.values.items():
        assert wanted[found.values[value]] == NAMES[index].upper().replace(" ", "_")
    assert found.others == (None if others is None else order.index(others))


@pytest.mark.parametrize("names", [("background", "class 1", "class 2", "class 3"), ("0", "1", "2", "3")])
def test_classes_without_names_are_taken_in_their_order(names: tuple[str, ...]) -> None:
    own = LabelMap(NAMES, {10 * index: index for index in range(4)}, 0)
    found = fitting(own, names)
    assert found is not None
    assert dict(found.values) == dict(own.values)


def bundled(name: str) -> str:
    """As the bundle of MONAI's whole-brain network writes the name of a gyrus."""
    side, *words = name.split()
    if "gyrus" not in words:
        return name.title()
    return f"{side.title()}-{''.join(word[0] for word in words).upper()}--{'-'.join(words).removesuffix('-medial-segment')}"


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        (BTCV_ORGANS, tuple("_".join(reversed(name.split())) if "kidney" in name else name for name in BTCV_ORGANS)),
        (("background", "liver"), ("bg", "Liver")),
        (WHOLE_BRAIN_NAMES, tuple(map(bundled, WHOLE_BRAIN_NAMES))),
    ],
)
def test_spellings_are_the_same_classes(own: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    found = fitting(LabelMap.identity(own), wanted)
    assert found is not None
    assert dict(found.values) == {index: index for index in range(len(own))}
    assert found.names == wanted


def of_ten(*names: str) -> tuple[str, ...]:
    """A list long enough for spellings, which begins with these."""
    return ("background", *names, *(f"organ {letter}" for letter in "abcdefghij"[len(names) :]))


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        (("background", "liver", "tumor"), ("background", "liver vessel", "kidney tumor")),
        (("background", "cancer"), ("background", "colon cancer primaries")),
        (of_ten("right kidney"), of_ten("pancreas")),
        (of_ten("right lung"), of_ten("left lung")),
        (of_ten("left rib 12"), of_ten("left rib 13")),
        (of_ten("liver", "liver tumor"), of_ten("liver tumor", "liver vessel")),
    ],
)
def test_other_organs_are_no_spellings(own: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    assert fitting(LabelMap.identity(own), wanted) is None


def test_spellings_are_told(btcv: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = tuple("IVC inferior vena cava" if "vena" in name else name for name in BTCV_ORGANS)
    with caplog.at_level(logging.WARNING, "ptq3d"):
        cases, _ = judged_by(find_data(btcv), Manifest(names, WINDOW), labels=None, label_map=None)
    assert cases[0].labels is not None
    assert "inferior vena cava = IVC inferior vena cava" in caplog.text


def test_a_network_of_one_class_fits_nothing_of_others() -> None:
    assert fitting(LabelMap.identity(("background",)), ("background",)) is not None
    assert fitting(LabelMap.identity(NAMES), ("background",)) is None


def test_sides_that_are_swapped_are_never_spellings() -> None:
    swapped = {"right kidney": "left kidney", "left kidney": "right kidney"}
    wanted = tuple(swapped.get(name, name) for name in BTCV_ORGANS)
    found = fitting(LabelMap.identity(BTCV_ORGANS), wanted)
    assert found is not None
    assert {BTCV_ORGANS[value]: wanted[index] for value, index in found.values.items()} == {n: n for n in BTCV_ORGANS}
    renamed = tuple({"right kidney": "kidney B"}.get(name, swapped.get(name, name)) for name in BTCV_ORGANS)
    assert fitting(LabelMap.identity(BTCV_ORGANS), renamed) is None


def test_known_classes_are_never_taken_by_their_numbers(btcv: Path) -> None:
    """Labels that the user names, of classes that are known and are not the network's."""
    found = find_data(btcv)
    with pytest.raises(LabelError, match=r"are of other classes than the network's: .*; say what they are"):
        judged_by(
            found, Manifest(tuple(f"organ {letter}" for letter in "abcdefghijklmn"), WINDOW),
            labels=btcv, label_map=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    "names", [NAMES[:3], (*NAMES[:3], "liver"), ("background", "heart", "heart", "heart"), (*NAMES, "liver")]
)
def test_other_classes_do_not_fit(names: tuple[str, ...]) -> None:
    assert fitting(LabelMap.identity(NAMES), names) is None


def test_nothing_is_trained_on_the_test_split_unasked(btcv: Path) -> None:
    shutil.rmtree(btcv / "train")
    with pytest.raises(OptionError, match=r"no split 'train', but test; name the folder of the images you mean"):
        train(TrainOptions(data=btcv, output_dir=btcv / "run"))
    assert not (btcv / "run").exists()


def test_one_image_finds_its_labels_by_number_in_a_folder(btcv: Path) -> None:
    found = find_data(btcv / "train" / "images" / "img0002.nii.gz", btcv / "train" / "labels")
    assert found.cases[0].labels == btcv / "train" / "labels" / "label0002.nii.gz"


def test_labels_of_a_split_go_with_the_cases_of_that_split(tmp_path: Path) -> None:
    """nnU-Net raw with test images, and the labels of the training images named."""
    for name in ("imagesTr/a_0000", "imagesTr/b_0000", "imagesTs/t_0000", "labelsTr/a", "labelsTr/b"):
        written(tmp_path / f"{name}.nii.gz")
    table = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    found = find_data(tmp_path, tmp_path / "labelsTr", split="train")
    assert [case.label_files[0].name for case in found.cases] == ["a.nii.gz", "b.nii.gz"]
    assert found.label_map is not None  # the set's own labels keep their names
    with pytest.raises(LabelError, match=r"t_0000\.nii\.gz has no label map in"):
        find_data(tmp_path, tmp_path / "labelsTr", split="test")
