"""Label files become classes, and a value that is none is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.datasets.label_map import LabelMap
from ptq3d.errors import FileError, LabelError, ShapeError
from ptq3d.volumes.files import load_labels

NAMES = ("background", "liver", "spleen")


@settings(deadline=None)
@given(
    values=st.dictionaries(st.integers(0, 300), st.integers(0, 299), min_size=1),
    picks=st.lists(st.integers(0, 1000), min_size=1, max_size=60),
    others=st.none() | st.just(0),
    wide=st.booleans(),
)
def test_every_voxel_gets_the_class_of_its_value(
    values: dict[int, int], picks: list[int], others: int | None, wide: bool
) -> None:
    names = tuple(str(index) for index in range(300 if wide else 1 + max(values.values())))
    known = sorted(values)
    labels = np.array([known[pick % len(known)] if others is None else pick for pick in picks], np.uint16)
    classes = LabelMap(names, values, others).apply(labels.reshape(1, -1, 1, 1))
    assert classes.dtype == (np.uint8 if len(names) <= 256 else np.uint16)
    assert classes.ravel().tolist() == [values.get(int(label), others) for label in labels]
    assert classes.shape == (1, len(picks), 1, 1)


def test_identity_keeps_classes_and_refuses_others() -> None:
    label_map = LabelMap.identity(NAMES)
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    np.testing.assert_array_equal(label_map.apply(labels), labels)
    labels[0, 0], labels[1, 1] = 7, 3
    with pytest.raises(LabelError, match=r"case\.nii\.gz holds values .* 3 classes: 3, 7; .*--label-map"):
        label_map.apply(labels, where=Path("case.nii.gz"))


def test_pieces_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq3d.datasets.label_map.CHUNK", 7)
    labels = np.asfortranarray(np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8))
    np.testing.assert_array_equal(LabelMap.identity(NAMES).apply(labels), labels)
    labels[0, 0, 0], labels[4, 5, 6] = 9, 8
    with pytest.raises(LabelError, match="classes: 8, 9;"):
        LabelMap.identity(NAMES).apply(labels)


def test_only_the_first_values_are_named() -> None:
    with pytest.raises(LabelError, match=r"3, 4, 5, 6, 7, 8, 9, 10, 11, 12, \.\.\.;"):
        LabelMap.identity(NAMES).apply(np.arange(60, dtype=np.uint8))


def test_signed_or_float_labels_are_refused() -> None:
    for dtype in (np.int16, np.float32):
        with pytest.raises(ShapeError, match="unsigned"):
            LabelMap.identity(NAMES).apply(np.zeros((2, 2), dtype))


def test_the_map_of_the_real_network(shared: Path) -> None:
    label_map = LabelMap.load(shared / "weights/meshnet/labels.json")
    assert len(label_map.names) == 18
    labels = load_labels(shared / "data/whole_brain/test/labels/1013.nii.gz").data
    classes = label_map.apply(labels)
    assert sorted(np.unique(classes).tolist()) == list(range(18))
    np.testing.assert_array_equal(classes == label_map.names.index("Hippocampus"), (labels == 47) | (labels == 48))
    cortex = label_map.names.index("Cerebral Cortex")
    np.testing.assert_array_equal(classes == cortex, (labels >= 100) & (labels <= 207))


def loaded(path: Path, table: object) -> LabelMap:
    path.write_text(json.dumps(table))
    return LabelMap.load(path)


def test_a_file_without_ids_is_the_identity(tmp_path: Path) -> None:
    table = {"labels": {str(index): name for index, name in enumerate(NAMES)}}
    assert loaded(tmp_path / "l.json", table) == LabelMap.identity(NAMES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, 'wanted "labels"'),
        ({"labels": {}}, 'wanted "labels"'),
        ({"labels": {"0": "background", "2": "liver"}}, "without gaps"),
        ({"labels": ["background", "liver"]}, 'wanted "labels"'),
        ({"labels": {"0": "a", "1": "b"}, "x_ids": {"c": [1]}}, "names of the classes"),
        ({"labels": {"0": "a", "1": "b"}, "x_ids": [1]}, "names of the classes"),
        ({"labels": {"0": "a", "1": "b"}, "x_ids": {"a": [1], "b": [1]}}, "two classes"),
        ({"labels": {"0": "a", "1": "b"}, "x_ids": {"b": ["one"]}}, "whole number"),
        ({"labels": {"0": "a", "1": "b"}, "x_ids": {"b": [-1]}}, "whole number"),
        ({"labels": {"0": "a", "1": "b"}, "x_ids": {}, "y_ids": {}}, "several tables"),
        ([1], "must hold a table"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path: Path, table: object, message: str) -> None:
    with pytest.raises(LabelError, match=message) as caught:
        loaded(tmp_path / "l.json", table)
    assert "l.json" in str(caught.value)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        LabelMap.load(tmp_path / "l.json")
    for text in ("", "{", "[" * 100_000, "9" * 5000):
        (tmp_path / "l.json").write_text(text)
        with pytest.raises(FileError, match="mend it") as caught:
            LabelMap.load(tmp_path / "l.json")
        assert "\n" not in str(caught.value)


def test_the_mark_at_the_start_of_a_file_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text('{"labels": {"0": "background", "1": "liver"}}', encoding="utf-8-sig")
    assert LabelMap.load(tmp_path / "l.json").names == ("background", "liver")


def test_classes_without_names_are_refused() -> None:
    with pytest.raises(LabelError):
        LabelMap(("background",), {1: 1})
    with pytest.raises(LabelError):
        LabelMap((), {})
