"""Which places are one DICOM case each; how slices become a series is told elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from placing import dumped, left_out, touch

from ptq3d.data import with_labels
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import FileError, LabelError, NoSeriesError, OptionError
from ptq3d.volumes.source import Series

SLICE = bytes(128) + b"DICM"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two series in every place whose name has "two", otherwise one."""
    module = ModuleType("ptq3d.volumes.dicom")

    def find_series(place: Path) -> tuple[Series, ...]:
        return tuple(Series(place, uid, ("a",)) for uid in (("1.1", "1.2") if "two" in place.name else ("1.1",)))

    def only_series(place: Path, wanted: str | None) -> Series:
        if "none" in place.name:
            raise NoSeriesError(f"{place} holds no DICOM images.")
        found = [series for series in find_series(place) if wanted in (None, series.uid)]
        if not found:
            raise NoSeriesError(f"{place} has no series '{wanted}'.")
        if len(found) != 1:
            raise FileError(f"{place} holds several series; choose one with --series.")
        return found[0]

    def study_of(place: Path) -> tuple[str, str]:
        return "p", "1" if place.parent.name == "study" else place.name

    module.__dict__.update(find_series=find_series, only_series=only_series, study_of=study_of)
    monkeypatch.setitem(sys.modules, "ptq3d.volumes.dicom", module)
    import ptq3d.volumes

    monkeypatch.setattr(ptq3d.volumes, "dicom", module, raising=False)


def slices(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("IM0001", "IM0002"):
        (folder / name).write_bytes(SLICE)
    return folder


@pytest.mark.parametrize("names", [("IM0001",), ("1.dcm",), ("a.IMA",), ("1.2.840.113619.2.5",), ("00000001",)])
def test_a_folder_of_slices_is_one_case(tmp_path: Path, names: tuple[str, ...]) -> None:
    place = slices(tmp_path / "patient", *names)
    touch(place, "notes.txt", "VERSION")
    found = open_dataset(place)
    assert (found.layout, [case.name for case in found.cases]) == ("DICOM", ["patient"])
    assert found.cases[0].images == (Series(place, "1.1", ("a",)),)
    assert set(left_out(found)) == {"notes.txt", "VERSION"}


@pytest.mark.parametrize("name", ["study.zip", "frames.dcm", "frames"])
def test_a_single_file_is_one_case(tmp_path: Path, name: str) -> None:
    place = slices(tmp_path, name) / name
    assert [(case.name, str(case.images[0])) for case in open_dataset(place).cases] == [
        (place.stem, f"{place} (series 1.1)")
    ]


def test_each_subfolder_and_zip_is_a_case(tmp_path: Path) -> None:
    slices(tmp_path / "b")
    slices(tmp_path / "a")
    touch(tmp_path, "c.zip", "empty/notes.txt", "readme.txt", "deep/deeper/notes.txt")
    found = open_dataset(tmp_path)
    assert [case.name for case in found.cases] == ["a", "b", "c"]
    assert left_out(found) == {
        "empty": "no DICOM file in it",
        "deep": "no DICOM file in it",
        "readme.txt": "no volume by its ending",
    }


def test_patients_hold_their_series_at_any_depth(tmp_path: Path) -> None:
    for name in ("p1/study/series", "p2/2020/study/series"):
        slices(tmp_path / name)
    (tmp_path / "p1" / "again").symlink_to(tmp_path / "p1")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "again").symlink_to(tmp_path / "none")
    found = open_dataset(tmp_path)
    assert [case.name for case in found.cases] == ["p1", "p2"]
    assert left_out(found) == {"none": "no DICOM file in it"}


def test_a_place_that_cannot_be_used_does_not_end_the_others(tmp_path: Path) -> None:
    """An archive's folder of segmentations, a zip of code, a patient with two series."""
    for name in ("a", "b two", "none of it"):
        slices(tmp_path / name)
    found = open_dataset(tmp_path)
    assert [(case.name, str(case.images[0])) for case in found.cases] == [
        ("a", f"{tmp_path / 'a'} (series 1.1)"),
        ("b two", str(tmp_path / "b two")),  # told when it is read
    ]
    assert left_out(found) == {"none of it": "no DICOM images in it"}
    chosen = open_dataset(tmp_path, series="1.2")
    assert [str(case.images[0]) for case in chosen.cases] == [f"{tmp_path / 'b two'} (series 1.2)"]
    assert left_out(chosen) == {"a": "no series '1.2' in it", "none of it": "no series '1.2' in it"}
    with pytest.raises(FileError, match=r"has no series '1.9'|no DICOM images"):
        open_dataset(tmp_path, series="1.9")


def test_the_series_of_one_study_are_one_place(tmp_path: Path) -> None:
    """As a PACS exports it: a folder for each series."""
    for name in ("SER1", "SER2", "SR"):
        slices(tmp_path / "study" / name)
    found = open_dataset(tmp_path / "study")
    assert [(case.name, str(case.images[0])) for case in found.cases] == [
        ("study", f"{tmp_path / 'study'} (series 1.1)")
    ]


def test_a_series_of_several_is_named_with_its_number(tmp_path: Path) -> None:
    place = slices(tmp_path / "two")
    chosen = open_dataset(place, series="1.2").cases[0]
    assert chosen in open_dataset(place, series="all").cases  # results of different series never have one name
    assert chosen.name == "two_2"


def test_labels_of_names_with_dots_and_of_every_series(tmp_path: Path) -> None:
    slices(tmp_path / "scans/1.2.3")
    slices(tmp_path / "scans/1.2.4")
    labels = touch(tmp_path / "labels", "1.2.3.nii.gz", "1.2.4.nii.gz")
    found = open_dataset(tmp_path / "scans", labels)
    assert [case.labels for case in found.cases] == [labels / "1.2.3.nii.gz", labels / "1.2.4.nii.gz"]
    both = touch(tmp_path / "both", "two_1.nii.gz", "two_2.nii.gz")
    found = open_dataset(slices(tmp_path / "two"), both, series="all")
    assert [case.labels for case in found.cases] == [both / "two_1.nii.gz", both / "two_2.nii.gz"]


def test_a_folder_with_an_index_is_one_place(tmp_path: Path) -> None:
    slices(tmp_path / "disc", "DICOMDIR")
    slices(tmp_path / "disc/IMAGES")
    found = open_dataset(tmp_path / "disc")
    assert ([case.name for case in found.cases], found.ignored) == (["disc"], ())


def test_a_series_is_chosen_or_each_is_a_case(tmp_path: Path) -> None:
    place = slices(tmp_path / "two")
    with pytest.raises(FileError, match="--series"):
        open_dataset(place)
    assert open_dataset(place, series="1.2").cases[0].images == (Series(place, "1.2", ("a",)),)
    found = open_dataset(place, series="all")
    assert [(case.name, case.images[0].uid) for case in found.cases if isinstance(case.images[0], Series)] == [
        ("two_1", "1.1"),
        ("two_2", "1.2"),
    ]


def test_a_series_of_what_is_no_dicom_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.nii.gz", "labels/a.nii.gz")
    for labels in (None, root / "labels"):
        with pytest.raises(OptionError, match="no DICOM series"):
            open_dataset(root, labels, series="1.2")


def test_labels_of_another_folder(tmp_path: Path) -> None:
    slices(tmp_path / "scans/p1")
    slices(tmp_path / "scans/p2")
    labels = touch(tmp_path / "labels", "p1.nii.gz", "p2_seg.nii.gz")
    found = open_dataset(tmp_path / "scans", labels)
    assert [case.labels for case in found.cases] == [labels / "p1.nii.gz", labels / "p2_seg.nii.gz"]
    chosen = open_dataset(tmp_path / "scans", labels, series="1.1")
    assert [case.labels for case in chosen.cases] == [case.labels for case in found.cases]
    assert open_dataset(tmp_path / "scans/p1", labels / "p2_seg.nii.gz").cases[0].labels == labels / "p2_seg.nii.gz"
    (labels / "p1.nii.gz").unlink()
    with pytest.raises(LabelError, match=r"p1 \(series 1\.1\) has no label map in"):
        with_labels(open_dataset(tmp_path / "scans", labels), labels)


def test_slices_beside_volumes_are_ignored(tmp_path: Path) -> None:
    found = open_dataset(touch(slices(tmp_path, "IM0001", "b.dcm"), "a.nii.gz"))
    assert found.layout == "folder"
    assert [case.name for case in found.cases] == ["a"]
    assert set(left_out(found)) == {"IM0001", "b.dcm"}
    assert all("DICOM" in reason for reason in left_out(found).values())


def test_a_list_may_name_folders_of_slices(tmp_path: Path) -> None:
    place = slices(tmp_path / "p1")
    found = open_dataset(dumped(tmp_path / "list.json", [{"image": "p1"}]))
    assert [(case.name, case.images) for case in found.cases] == [("p1", (Series(place, "1.1", ("a",)),))]
