"""A list says what it says: cases written into one come back from it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from placing import dumped, told, touch

from ptq3d.datasets.cases import Case
from ptq3d.datasets.dataset import SPLITS, arranged
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import FileError, OptionError

FILES = ("a.nii.gz", "b/ä b.nii.gz", "c,d;e.nii.gz", "l1.nii.gz", "l/2.nii.gz")
NAMES = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="/\\"), min_size=1, max_size=40
).filter(lambda name: name.strip() and name not in (".", ".."))


@st.composite
def cases(draw: st.DrawFn, root: Path) -> list[Case]:
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    channels = draw(st.integers(1, 3))
    images = st.lists(st.sampled_from(FILES[:3]), min_size=channels, max_size=channels)
    return [
        Case(
            name,
            tuple(root / path for path in draw(images)),
            draw(st.sampled_from([None, *(root / path for path in FILES[3:])])),
            draw(st.sampled_from(list(SPLITS))),
        )
        for name in names
    ]


def rows(found: list[Case], root: Path, absolute: bool) -> list[dict[str, Any]]:
    def path(file: object) -> str:
        return str(file) if absolute else str(Path(str(file)).relative_to(root))

    return [
        {
            **{f"image_{index}": path(image) for index, image in enumerate(case.images)},
            "label": path(case.labels) if case.labels else "",
            "name": case.name,
            "split": case.split,
        }
        for case in found
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    data=st.data(),
    absolute=st.booleans(),
    upper=st.booleans(),
    delimiter=st.sampled_from(",;\t"),
    mark=st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_cases_come_back_from_csv(
    tmp_path: Path, data: st.DataObject, absolute: bool, upper: bool, delimiter: str, mark: str
) -> None:
    wanted = data.draw(cases(touch(tmp_path, *FILES)))
    table = rows(wanted, tmp_path, absolute)
    place = tmp_path / "list.csv"
    with place.open("w", encoding=mark, newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), delimiter=delimiter)
        file.write(delimiter.join(name.upper() if upper else name for name in table[0]) + "\r\n")
        writer.writerows(table)
    assert open_dataset(place).cases == arranged(wanted)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), absolute=st.booleans())
def test_cases_come_back_from_json(tmp_path: Path, data: st.DataObject, absolute: bool) -> None:
    wanted = data.draw(cases(touch(tmp_path, *FILES)))
    table = rows(wanted, tmp_path, absolute)
    assert open_dataset(dumped(tmp_path / "list.json", table)).cases == arranged(wanted)
    for row in table:
        row["image"] = [row.pop(f"image_{index}") for index in range(len(wanted[0].images))]
    assert open_dataset(dumped(tmp_path / "list.json", table)).cases == arranged(wanted)


def test_a_list_as_monai_writes_it(tmp_path: Path) -> None:
    root = touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "labels/b.nii.gz", "images/c.nii.gz")
    table = {
        "labels": {"0": "background", "1": "spleen"},
        "modality": {"0": "CT"},
        "training": [{"image": "images/b.nii.gz", "label": "labels/b.nii.gz", "fold": 0}],
        "validation": [{"image": ["images/c.nii.gz"]}],
        "test": ["./images/a.nii.gz"],
    }
    found = open_dataset(dumped(root / "datalist.json", table))
    assert found.layout == "list of cases"
    assert [(case.name, case.split, case.labels is None) for case in found.cases] == [
        ("b", "train", False),
        ("c", "val", True),
        ("a", "test", True),
    ]
    assert found.label_map is not None
    assert found.label_map.names == ("background", "spleen")
    assert found.channels == ("CT",)


def test_a_column_of_images_is_enough(tmp_path: Path) -> None:
    root = touch(tmp_path / "lists", "../a.nii.gz", "b_0000.nii")
    (root / "list.csv").write_text("Image\n../a.nii.gz\n\nb_0000.nii\n", encoding="utf-8")
    found = open_dataset(root / "list.csv")
    assert [(case.name, case.images) for case in found.cases] == [
        ("a", (root / "../a.nii.gz",)),
        ("b", (root / "b_0000.nii",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a column 'image' .* got no row"),
        ("image\n", "got no row"),
        ("a.nii.gz\n", "got no row"),
        ("file,label\na.nii.gz,\n", r"a column 'image' .* got \['file', 'label'\]"),
        ("image,labels\na.nii.gz,b.nii\n", "as 'label', got 'labels'"),
        ("image,image\na.nii.gz,a.nii.gz\n", "each column once"),
        ("image,label\na.nii.gz,,x\n", "row 2 has 3 cells"),
        ("image\nz.nii.gz\n", "lists 'z.nii.gz'"),
        ("image,label\na.nii.gz,z.nii.gz\n", "lists 'z.nii.gz'"),
        ("image,label\na.nii.gz,b\n", "no such file"),
        ("image_0,image_2\na.nii.gz,a.nii.gz\n", "without gaps"),
        ("image,label\n,l1.nii.gz\n", "has no image"),
        ("image,split\na.nii.gz,holdout\n", "'holdout'"),
        ("image,name\na.nii.gz,../../a\n", "cannot be the name of a file"),
        ("image,name\na.nii.gz,a\\b\n", "cannot be the name of a file"),
        ("image,name\na.nii.gz,..\n", "cannot be the name of a file"),
        ('image,name\na.nii.gz,"a\nb"\n', "cannot be the name of a file"),
        ("image,name\na.nii.gz," + "é" * 101 + "\n", "at most 200 bytes"),
        ("image,name\na.nii.gz,x\nb/ä b.nii.gz,x\n", r"case name \['x'\]"),
        ("image\n" + "a" * 140_000 + "\n", "no readable table"),
    ],
)
def test_a_bad_table_is_one_sentence_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    place = touch(tmp_path, *FILES) / "list.csv"
    place.write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=message) as caught:
        open_dataset(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"images": []}, [], [1], [[]], 5, "a", None, {"training": 5}, [{"image": 5}]])
def test_bad_json_is_one_sentence_that_names_it(tmp_path: Path, content: object) -> None:
    place = dumped(touch(tmp_path, *FILES) / "list.json", content)
    with pytest.raises(FileError) as caught:
        open_dataset(place)
    assert str(place) in str(caught.value)
    assert json.loads(place.read_text(encoding="utf-8")) == content


def test_bytes_that_are_no_text_and_labels_beside_a_list(tmp_path: Path) -> None:
    place = touch(tmp_path, *FILES) / "list.csv"
    place.write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(FileError, match="no readable table"):
        open_dataset(place)
    place.write_text("image\na.nii.gz\n", encoding="utf-8")
    with pytest.raises(OptionError, match="names its labels itself"):
        open_dataset(place, tmp_path / "l")
    assert told(open_dataset(tmp_path)) == [
        ("a", "", "a.nii.gz", ""),
        ("c,d;e", "", "c,d;e.nii.gz", ""),
        ("l1", "", "l1.nii.gz", ""),
    ]
