"""A score for each case and class; over cases nothing that was missed disappears."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.errors import GeometryError, LabelError, OptionError
from ptq3d.evaluation.metrics import dice_per_class, mean_dice
from ptq3d.evaluation.scores import (
    ALL,
    COLUMNS,
    Score,
    case_means,
    csv_text,
    paired_means,
    score_case,
    summarize,
    summarize_all,
)
from ptq3d.evaluation.statistics import paired_bootstrap
from ptq3d.evaluation.surfaces import hd95_per_class, surface_dice_per_class
from ptq3d.volumes.volume import Volume

NAMES = ("background", "liver", "spleen", "kidney, left", "absent")
SPACING = (1.0, 2.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])


def maps(seed: int) -> tuple[np.ndarray, Volume]:
    """Classes 0..3 at random; 4 is in neither."""
    found = np.random.default_rng(seed).integers(0, 4, (2, 6, 7, 8)).astype(np.uint8)
    return found[0], Volume(found[1:], AFFINE)


def scored(seed: int, case: str | None = None, tolerance: float | None = 1.0) -> tuple[Score, ...]:
    prediction, truth = maps(seed)
    return score_case(case or f"case {seed}", prediction, truth, names=NAMES, tolerance_mm=tolerance)


def row(case: str, label: str, dice: float, hd95: float = 1.0, sizes: tuple[float, float] = (1.0, 1.0)) -> Score:
    return Score(case, label, dice, dice, hd95, *sizes)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_scores_are_the_metrics_of_each_class(seed: int) -> None:
    prediction, truth = maps(seed)
    found = scored(seed)
    assert [one.label for one in found] == list(NAMES[1:])
    for name, expected in {
        "dice": dice_per_class(prediction, truth.data[0], 5),
        "surface_dice": surface_dice_per_class(prediction, truth.data[0], 5, spacing=SPACING, tolerance_mm=1.0),
        "hd95_mm": hd95_per_class(prediction, truth.data[0], 5, spacing=SPACING),
        "volume_ml": np.bincount(prediction.ravel(), minlength=5)[1:] * 0.006,
        "true_volume_ml": np.bincount(truth.data.ravel(), minlength=5)[1:] * 0.006,
    }.items():
        np.testing.assert_allclose([getattr(one, name) for one in found], expected)


def test_without_a_tolerance_no_surface_is_measured_and_a_sheared_grid_will_do() -> None:
    prediction, truth = maps(0)
    sheared = AFFINE.copy()
    sheared[0, 2] = 1.0
    tilted = Volume(truth.data, sheared)
    found = score_case("a", prediction, tilted, names=NAMES, tolerance_mm=None)
    assert all(math.isnan(one.surface_dice) and math.isnan(one.hd95_mm) for one in found)
    assert [one.dice for one in found[:3]] == [one.dice for one in scored(0)[:3]]
    assert summarize(found)[0].hd95_mm is None
    assert summarize(found)[0].surface_dice is None
    with pytest.raises(GeometryError, match="sheared"):
        score_case("a", prediction, tilted, names=NAMES, tolerance_mm=1.0)


def test_labels_and_tolerances_without_meaning_are_refused() -> None:
    prediction, truth = maps(0)
    with pytest.raises(LabelError):
        score_case("a", prediction, truth, names=NAMES[:3], tolerance_mm=None)
    with pytest.raises(OptionError):
        score_case("a", prediction, truth, names=NAMES, tolerance_mm=-1.0)


def test_a_class_over_cases_is_the_mean_with_the_bootstraps_interval() -> None:
    scores = [one for seed in range(6) for one in scored(seed)]
    classes, whole = summarize(scores), summarize_all(scores)
    assert [one.label for one in classes] == list(NAMES[1:])
    for summary in classes[:3]:
        values = [one.dice for one in scores if one.label == summary.label]
        assert summary.dice == paired_bootstrap(np.zeros(6), values)
        assert summary.cases == 6
        assert summary.hd95_mm is not None
        assert summary.hd95_mm.median == np.median([one.hd95_mm for one in scores if one.label == summary.label])
    assert classes[3].cases == 0
    assert classes[3].dice is None
    assert whole.label == ALL
    assert whole.dice is not None
    expected = np.mean([mean_dice(np.array([one.dice for one in scored(seed)])) for seed in range(6)])
    assert whole.dice.mean == pytest.approx(expected)
    assert whole.true_volume_ml == pytest.approx(
        np.mean([np.count_nonzero(maps(seed)[1].data) for seed in range(6)]) * 0.006
    )


def test_what_is_in_neither_does_not_count_and_what_was_missed_does() -> None:
    nan, inf = float("nan"), float("inf")
    scores = [
        row("a", "liver", 0.9),
        row("b", "liver", 0.0, inf, (0.0, 5.0)),
        row("c", "liver", 0.7, 3.0),
        row("d", "liver", nan, nan, (0.0, 0.0)),
        row("a", "spleen", 0.0, inf, (2.0, 0.0)),
    ]
    liver, spleen, whole = *summarize(scores), summarize_all(scores)
    assert (liver.cases, liver.one_sided) == (3, 1)
    assert liver.dice is not None
    assert liver.dice.mean == pytest.approx(1.6 / 3)
    assert liver.hd95_mm is not None
    assert (liver.hd95_mm.median, liver.hd95_mm.high) == (3.0, inf)
    assert liver.true_volume_ml == pytest.approx(7 / 3)
    assert (spleen.cases, spleen.one_sided, spleen.hd95_mm and spleen.hd95_mm.median) == (1, 1, inf)
    assert (whole.cases, whole.one_sided) == (3, 2)
    report = json.dumps([one.to_dict() for one in (liver, spleen, whole)], allow_nan=False)
    assert json.loads(report)[1]["hd95_mm"] == {"median": None, "low": None, "high": None}
    means = case_means(scores)
    assert means["a"] == pytest.approx(0.45)
    assert math.isnan(means["d"])


def test_a_missing_row_is_a_class_in_neither() -> None:
    rows = [one for seed in range(4) for one in scored(seed)]
    present = [one for one in rows if not math.isnan(one.dice)]
    assert summarize_all(present) == summarize_all(rows)
    assert summarize(present) == summarize(rows)[:3]


def test_cases_are_paired_by_name_and_a_false_alarm_keeps_its_case() -> None:
    nan = float("nan")
    reference = [row("a", "x", 0.8), row("b", "x", nan), row("c", "x", nan)]
    candidate = [row("c", "x", nan), row("b", "x", 0.0), row("a", "x", 0.7)]
    cases, first, second = paired_means(reference, candidate)
    assert cases == ("a", "b")
    np.testing.assert_array_equal(first, [0.8, 1.0])
    np.testing.assert_array_equal(second, [0.7, 0.0])
    with pytest.raises(OptionError, match=r"\['c'\]"):
        paired_means(reference, candidate[1:])
    assert paired_means(reference[2:], candidate[:1])[0] == ()


def test_the_csv_reads_back_with_units_in_its_header() -> None:
    first = [*scored(0), row("b, c", "spleen", 0.0, float("inf"))]
    second = [replace(one, dice=0.5) for one in first]
    text = csv_text({"fp32.onnx": first, 'int8 "x".onnx': second})
    table = list(csv.DictReader(io.StringIO(text, newline="")))
    assert tuple(table[0]) == COLUMNS
    assert [line["source"] for line in table] == ["fp32.onnx"] * 5 + ['int8 "x".onnx'] * 5
    for line, score in zip(table, [*first, *second], strict=True):
        assert (line["case"], line["class"]) == (score.case, score.label)
        for column in COLUMNS[3:]:
            value, cell = getattr(score, column), line[column]
            assert cell == "" if math.isnan(value) else float(cell) == value
