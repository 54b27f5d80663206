"""`ptq3d compare` with true labels: scores, surfaces and the statement against the first engine."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from networks import NETWORKS, windows
from ptq3d.cli import main
from ptq3d.compare import folder_names
from ptq3d.evaluation.comparison import Comparison, Row
from ptq3d.evaluation.metrics import dice_per_class, mean_dice
from ptq3d.evaluation.scores import Score
from ptq3d.evaluation.statistics import Interval, LatencySummary, non_inferiority
from ptq3d.evaluation.surfaces import hd95_per_class, surface_dice_per_class
from ptq3d.tables import compare_table

AFFINE = np.array([[-2.0, 0, 0, 7], [0, 2.0, 0, -3], [0, 0, 3.0, 11], [0, 0, 0, 1]])
RULES = 'spacing = [2.0, 2.0, 3.0]\n[[intensity]]\nrule = "window"\nlow = 0.0\nhigh = 1.0\n'
CASES = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network of 4 classes, 3 images and their labels."""
    NETWORKS["meshnet"](tmp_path / "net.onnx")
    (tmp_path / "rules.toml").write_text(RULES)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for name, image in zip(CASES, windows(3, seed=5, shape=(13, 15, 11)), strict=True):
        labels = np.digitize(image, [0.3, 0.5, 0.7]).astype(np.uint8)
        for kind, data in (("images", image), ("labels", labels)):
            nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / kind / f"{name}.nii.gz")
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return ["compare", str(folder / "net.onnx"), f"{folder / 'net.onnx'}@torch", "--data", str(folder / "images"),
            "--preprocessing", str(folder / "rules.toml"), "--repetitions", "1", "--output", str(folder / "out"), *more]  # fmt: skip


def test_scores_of_every_engine_case_and_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--labels", str(folder / "labels"), "--margin", "0.02", "--tolerance", "2.5",
                          "--csv", str(folder / "s.csv"), "--report", str(folder / "r.json"))) == 0  # fmt: skip
    names = [str(folder / "net.onnx"), f"{folder / 'net.onnx'}@torch"]
    rows = list(csv.DictReader((folder / "s.csv").read_text().splitlines()))
    assert [(row["source"], row["case"]) for row in rows] == [
        (name, case) for name in names for case in CASES for _ in range(3)
    ]
    means = []
    for index, place in enumerate(sorted((folder / "out").iterdir())):
        for case in CASES:
            found, truth = (
                np.asarray(nib.load(path / f"{case}.nii.gz").dataobj) for path in (place, folder / "labels")
            )
            own = [row for row in rows if (row["source"], row["case"]) == (names[index], case)]
            for column, expected in {
                "dice": dice_per_class(found, truth, 4),
                "surface_dice": surface_dice_per_class(found, truth, 4, spacing=(2, 2, 3), tolerance_mm=2.5),
                "hd95_mm": hd95_per_class(found, truth, 4, spacing=(2, 2, 3)),
                "volume_ml": np.bincount(found.ravel(), minlength=4)[1:] * 0.012,
                "true_volume_ml": np.bincount(truth.ravel(), minlength=4)[1:] * 0.012,
            }.items():
                np.testing.assert_allclose([float(row[column] or "nan") for row in own], expected)
            means.append(mean_dice(dice_per_class(found, truth, 4)))
    report = json.loads((folder / "r.json").read_text())
    first, second = report["rows"]
    assert first["non_inferiority"] is None
    assert second["non_inferiority"]["non_inferior"] is True
    assert second["non_inferiority"]["mean"] == pytest.approx(second["dice_change"]["mean"])
    assert [first["mean_dice"], second["mean_dice"]] == pytest.approx([np.mean(means[:3]), np.mean(means[3:])])
    assert first["all_classes"]["dice"]["mean"] == pytest.approx(first["mean_dice"])
    shown = capsys.readouterr().out
    assert f"{names[1]} is not inferior to {names[0]}: mean Dice changes by" in shown
    assert "within 2.5 mm, HD95" in shown
    for sentence in report["sentences"]:
        assert sentence in shown


@pytest.mark.parametrize("asked", [("--margin", "0.01"), ("--tolerance", "1"), ("--csv", "s.csv")])
def test_scores_need_labels(folder: Path, capsys: pytest.CaptureFixture[str], asked: tuple[str, str]) -> None:
    assert main(arguments(folder, *asked)) == 2
    assert f"{asked[0]} is about true labels of the network" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "asked", [("--margin", "0"), ("--tolerance", "-1"), ("--repetitions", "0"), ("--threads", "-1")]
)
def test_what_has_no_meaning_is_refused_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], asked: tuple[str, str]
) -> None:
    assert main(arguments(folder, "--labels", str(folder / "labels"), *asked)) == 2
    assert asked[0][2:] in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_surfaces_on_sheared_grids_are_refused_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheared = AFFINE.copy()
    sheared[0, 1] = 1.0
    for kind in ("images", "labels"):
        path = folder / kind / "c.nii.gz"
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), sheared), path)
    assert main(arguments(folder, "--labels", str(folder / "labels"), "--tolerance", "1")) == 2
    assert "c.nii.gz: the axes of the grid are sheared" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_case_without_any_class_leaves_the_report_valid() -> None:
    nan = float("nan")
    scores = tuple(Score(case, "x", dice, nan, nan, 1.0, 1.0) for case, dice in (("a", 0.5), ("b", nan)))
    claim = non_inferiority([0.5], [0.5], margin=0.1)
    row = Row("n", "torch", "fp32", 1, LatencySummary(1, 1, 1, 1), (1.0,), 1, 0.0, (), scores, (1.0,), np.ones((2, 1)),
              Interval(0, 0, 0), claim)  # fmt: skip
    assert row.mean_dice == 0.5
    found = Comparison((row,), ("x",), ("a", "b"), (1, 1, 1), {"tolerance_mm": None})
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["rows"][0]["dice_per_class"] == {"x": 0.5}
    assert report["sentences"] == [claim.statement("n", "n")]


@pytest.mark.parametrize(
    ("each", "mean", "worst"), [((0.9, float("nan"), 0.7), 0.8, 0.7), ((float("nan"),), None, None)]
)
def test_cases_without_a_class_large_enough_do_not_count_for_fidelity(
    each: tuple[float, ...], mean: float | None, worst: float | None
) -> None:
    kept = np.asarray(each)[:, None]
    row = Row("n", "torch", "fp32", 1, LatencySummary(1, 1, 1, 1), (1.0,), 1, 0.0, (), (), each, kept, None, None)
    found = Comparison((row,), ("x",), tuple("abc"[: len(each)]), (1, 1, 1), {"tolerance_mm": None})
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][0]
    assert told["fidelity"] == pytest.approx(mean)
    assert told["fidelity_worst_case"] == worst
    cells = [list(column.cells) for column in compare_table(found).columns]
    assert ["-" if mean is None else f"{mean:.4f}"] in cells


def test_engines_of_one_file_name_have_folders_of_their_own() -> None:
    names = folder_names(["fp32/net.onnx", "int8/net.onnx", "int8/net.onnx@openvino:bf16", "other/net.onnx"])
    assert names == ["1-net.onnx", "2-net.onnx", "net.onnx_openvino_bf16", "4-net.onnx"]


@given(st.lists(st.text("ab-/.1", min_size=1, max_size=6), min_size=1, max_size=6))
def test_folders_of_engines_are_apart_and_within_the_output(models: list[str]) -> None:
    names = folder_names(models)
    assert len(set(names)) == len(models)
    assert all(name and name.strip(".") and "/" not in name for name in names)


def test_providers_that_no_engine_would_use_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--providers", "cuda")) == 2
    assert "--providers cuda are ONNX Runtime's" in capsys.readouterr().err
