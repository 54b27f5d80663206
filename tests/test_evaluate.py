"""`ptq3d evaluate`: label maps against true ones, from files to table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ptq3d.cli import main
from ptq3d.errors import GeometryError, LabelError, OptionError, UnavailableError
from ptq3d.evaluation.metrics import dice_per_class
from ptq3d.options import EvaluateOptions
from ptq3d.scoring import evaluate
from ptq3d.volumes.files import save_labels
from ptq3d.volumes.volume import Volume

AFFINE = np.array([[0, -2.0, 0, 5], [1.0, 0, 0, -7], [0, 0, 3.0, 1], [0, 0, 0, 1]])
CASES = ("a", "b", "c", "d")
IDS = np.array([0, 7, 40, 300], np.uint16)


def truth(index: int) -> np.ndarray:
    """Classes 0..3 in boxes whose size depends on the case."""
    labels = np.zeros((14, 13, 12), np.uint8)
    labels[2 : 8 + index, 2:6, 2:10] = 1
    labels[2 : 8 + index, 7:11, 2:6] = 2
    labels[3:6, 8:10, 7:10] = 3
    return labels


def moved(labels: np.ndarray, by: int) -> np.ndarray:
    return np.roll(labels, by, 0)


def write(folder: Path, name: str, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    save_labels(folder / f"{name}.nii.gz", Volume(labels[None], affine))
    return folder / f"{name}.nii.gz"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """truth, ids (the same in other values), same (equal to the truth), and shift (one voxel along X)."""
    for index, case in enumerate(CASES):
        labels = truth(index)
        write(tmp_path / "truth", case, labels)
        write(tmp_path / "ids", case, IDS[labels])
        write(tmp_path / "same", case, labels)
        write(tmp_path / "shift", case, moved(labels, 1))
    names = {"0": "background", "1": "liver", "2": "spleen", "3": "tumour"}
    table = {"labels": names, "file_ids": {name: [int(IDS[int(key)])] for key, name in names.items()}}
    (tmp_path / "map.json").write_text(json.dumps(table))
    return tmp_path


def test_equal_maps_are_perfect_and_shifted_ones_are_not(folders: Path) -> None:
    same = evaluate(EvaluateOptions(predictions=folders / "same", labels=folders / "truth"))
    assert all((one.dice, one.surface_dice, one.hd95_mm) == (1, 1, 0) for one in same.scores)
    assert all(one.volume_ml == one.true_volume_ml > 0 for one in same.scores)
    shift = evaluate(EvaluateOptions(predictions=folders / "shift", labels=folders / "truth", tolerance=0.5))
    assert [one.label for one in shift.summaries] == ["1", "2", "3", "all classes"]
    for index, case in enumerate(CASES):
        expected = dice_per_class(moved(truth(index), 1), truth(index), 4)
        found = [one for one in shift.scores if one.case == case]
        np.testing.assert_allclose([one.dice for one in found], expected)
        assert [one.hd95_mm for one in found] == pytest.approx([1, 1, 1])  # voxels are 1 mm long along X
        assert all(one.surface_dice < 1 for one in found)


def test_the_label_map_is_of_the_truth_alone(folders: Path) -> None:
    named = evaluate(
        EvaluateOptions(predictions=folders / "shift", labels=folders / "ids", label_map=folders / "map.json")
    )
    plain = evaluate(EvaluateOptions(predictions=folders / "shift", labels=folders / "truth"))
    assert [one.label for one in named.summaries] == ["liver", "spleen", "tumour", "all classes"]
    assert [one.dice for one in named.scores] == [one.dice for one in plain.scores]
    assert [one.hd95_mm for one in named.scores] == [one.hd95_mm for one in plain.scores]


def test_the_command_line_prints_a_table_and_writes_csv_and_json(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(folders / "shift"), "--labels", str(folders / "ids"), "--label-map", str(folders / "map.json"),
                 "--reference", str(folders / "same"), "--margin", "0.01", "--tolerance", "2",
                 "--csv", str(folders / "s.csv"), "--report", str(folders / "r.json")]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    for text in (
        "tumour",
        "all classes",
        "surface Dice 2 mm",
        "HD95",
        "Worst of 4 cases: a",
        "Not shown that the prediction",
    ):
        assert text in shown
    rows = list(csv.DictReader((folders / "s.csv").read_text().splitlines()))
    assert [(line["source"], line["case"], line["class"]) for line in rows] == [
        (str(folders / source), case, name)
        for source in ("shift", "same")
        for case in CASES
        for name in ("liver", "spleen", "tumour")
    ]
    report = json.loads((folders / "r.json").read_text())
    assert report["non_inferiority"]["non_inferior"] is False
    assert report["non_inferiority"]["n"] == 4
    assert report["non_inferiority"]["mean"] == pytest.approx(
        np.mean(list(report["mean_dice_per_case"].values())) - 1, abs=1e-9
    )
    assert report["all_classes"]["surface_dice"]["mean"] == 1
    assert len(report["scores"]) == 12


def test_equal_maps_are_not_inferior(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folders / "same"), "--labels", str(folders / "truth"), "--reference", str(folders / "same"),
                 "--margin", "0.001", "--tolerance", "None"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "the prediction is not inferior to the reference: mean Dice changes by +0.0000" in shown
    assert "HD95" not in shown


def test_one_case_shows_nothing_and_still_exits_0(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folders / folder / "a.nii.gz") for folder in ("same", "truth", "same")]
    assert main(["evaluate", files[0], "--labels", files[1], "--reference", files[2], "--margin", "0.1",
                 "--report", str(folders / "r.json")]) == 0  # fmt: skip
    assert "1 case, which allows no interval" in capsys.readouterr().out
    assert json.loads((folders / "r.json").read_text())["non_inferiority"]["low"] is None


def test_a_missed_class_counts_and_an_absent_one_does_not(folders: Path) -> None:
    without = truth(0)
    without[without == 3] = 0
    write(folders / "truth", "a", without)  # the prediction's tumour is a false alarm
    write(folders / "same", "b", without)  # the prediction misses one
    write(folders / "truth", "c", without)
    write(folders / "same", "c", without)
    found = evaluate(EvaluateOptions(predictions=folders / "same", labels=folders / "truth"))
    tumour = next(one for one in found.summaries if one.label == "3")
    assert (tumour.cases, tumour.one_sided) == (3, 2)
    assert tumour.dice is not None
    assert tumour.dice.mean == pytest.approx(1 / 3)
    assert tumour.hd95_mm is not None
    assert tumour.hd95_mm.median == np.inf
    json.dumps(found.to_dict(), allow_nan=False)


def test_cases_without_a_prediction_are_named(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folders / "same/b.nii.gz").unlink()
    evaluate(EvaluateOptions(predictions=folders / "same", labels=folders / "truth", tolerance=None))
    assert "1 true label maps have no prediction and do not count: b.nii.gz" in caplog.text


def test_a_reference_of_other_cases_is_refused(folders: Path) -> None:
    (folders / "shift/b.nii.gz").unlink()
    with pytest.raises(OptionError, match=r"same cases.*b\.nii\.gz"):
        evaluate(
            EvaluateOptions(
                predictions=folders / "shift", labels=folders / "truth", reference=folders / "same", margin=0.1
            )
        )


@pytest.mark.parametrize("given", [{"margin": 0.1}, {"reference": "same"}, {"tolerance": -1.0}])
def test_options_that_need_one_another_are_asked_for(folders: Path, given: dict[str, float | str]) -> None:
    options = {name: folders / value if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(OptionError):
        evaluate(EvaluateOptions(predictions=folders / "shift", labels=folders / "truth", **options))


def test_a_margin_without_meaning_is_refused_before_anything_is_scored(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq3d.scoring.score_case", lambda *given, **named: pytest.fail("scored"))
    options = EvaluateOptions(
        predictions=folders / "same", labels=folders / "truth", reference=folders / "same", margin=-0.1
    )
    with pytest.raises(OptionError, match="margin"):
        evaluate(options)


@pytest.mark.parametrize("fault", ["shape", "flip", "shear", "class", "empty"])
def test_what_cannot_be_scored_is_refused_before_the_first_case_is(
    folders: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("ptq3d.scoring.score_case", lambda *given, **named: pytest.fail("scored"))
    flipped = AFFINE @ np.diag([-1.0, 1, 1, 1])
    label_map, kind, match = None, GeometryError, "d.nii.gz"
    if fault == "shape":
        write(folders / "shift", "d", truth(3)[1:])
    elif fault == "flip":
        write(folders / "shift", "d", truth(3), flipped)
    elif fault == "shear":
        sheared = AFFINE + np.eye(4, k=2) * [0, 0, 1, 0]
        for folder in ("truth", "shift"):
            write(folders / folder, "d", truth(3), sheared)
    elif fault == "class":
        write(folders / "shift", "d", truth(3) * 2)
        label_map, kind = folders / "map.json", LabelError
    else:
        kind, match = LabelError, "nothing but 0"
        for case in CASES:
            for folder in ("truth", "shift"):
                write(folders / folder, case, truth(0) * 0)
    labels = folders / ("ids" if fault == "class" else "truth")
    with pytest.raises(kind, match=match):
        evaluate(EvaluateOptions(predictions=folders / "shift", labels=labels, label_map=label_map))


def test_without_monai_nothing_is_scored_but_dice_can_be(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    with pytest.raises(UnavailableError, match=r"ptq3d\[metrics\].*--tolerance None"):
        evaluate(EvaluateOptions(predictions=folders / "same", labels=folders / "truth"))
    plain = evaluate(EvaluateOptions(predictions=folders / "same", labels=folders / "truth", tolerance=None))
    assert all(one.dice == 1 for one in plain.scores)


def test_a_users_mistake_is_one_line_and_exit_code_2(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folders / "nowhere"), "--labels", str(folders / "truth")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_real_ct_that_moved_by_a_voxel(shared: Path, tmp_path: Path) -> None:
    path = shared / "data/abdomen_ct/labels/ct.nii.gz"
    image = nib.load(path)
    labels = np.asarray(image.dataobj).astype(np.uint8)
    away = np.zeros_like(labels)
    away[:, 1:] = labels[:, :-1]
    prediction = write(tmp_path, "ct", away, image.affine)
    found = evaluate(EvaluateOptions(predictions=prediction, labels=path, tolerance=3.0))
    voxel = np.linalg.det(image.affine[:3, :3])
    for score in found.scores:
        index = int(score.label)
        true, lost = np.count_nonzero(labels == index), np.count_nonzero(labels[:, -1] == index)
        assert score.true_volume_ml == pytest.approx(true * abs(voxel) / 1000)
        assert score.volume_ml == pytest.approx((true - lost) * abs(voxel) / 1000)
        if not lost:
            assert score.hd95_mm <= 3.0 + 1e-3
            assert score.surface_dice == 1
    assert len(found.scores) == 61
