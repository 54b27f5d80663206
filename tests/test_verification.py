"""`quantize` with validation data: the certificate, the budget, the guard; and `sensitivity`."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from networks import NETWORKS, windows
from ptq3d.cli import main
from ptq3d.graphs.files import load_graph
from ptq3d.graphs.layers import layers
from ptq3d.graphs.passes import simplify
from ptq3d.manifest import embedded
from ptq3d.quantization import second_terms
from ptq3d.quantization.qdq import integer_layers

RULES = '[[intensity]]\nrule = "window"\nlow = 0.0\nhigh = 1.0\n'
VOLUME = (20, 22, 24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """n.onnx, c.npy, rules.toml, and images/ with two volumes."""
    NETWORKS["resized"](tmp_path / "n.onnx")
    np.save(tmp_path / "c.npy", windows(4))
    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "images").mkdir()
    for index, data in enumerate(windows(2, seed=5, shape=(1, *VOLUME))):
        nib.save(nib.Nifti1Image(data[0], np.eye(4)), tmp_path / f"images/case{index}.nii.gz")
    return tmp_path


def quantize(folder: Path, *more: str, verb: str = "quantize") -> int:
    return main([verb, "--onnx", str(folder / "n.onnx"), "--calibration", str(folder / "c.npy"), "--preprocessing",
                 str(folder / "rules.toml"), "--output", str(folder / "q.onnx"), "--report", str(folder / "r.json"), "--quiet",
                 *more])  # fmt: skip


def test_the_certificate_is_in_the_file_and_in_the_report(folder: Path) -> None:
    assert quantize(folder, "--validation-data", str(folder / "images")) == 0
    model = load_graph(folder / "q.onnx")
    manifest = embedded(model, where=folder / "q.onnx")
    assert manifest is not None
    found = manifest.quantization["validation"]
    assert json.loads((folder / "r.json").read_text())["validation"] == found
    assert set(found["cases"]) == {"case0", "case1"}
    assert 0.9 < found["fidelity"]["low"] <= found["fidelity"]["mean"] <= found["fidelity"]["high"] <= 1
    assert found["worst_case"]["fidelity"] <= found["fidelity"]["mean"]
    assert found["fidelity_per_class"]
    assert 0 < found["built_int8_mac_share"] <= 1
    ranges = manifest.quantization["ranges"]
    assert {"image", "image/h"} & set(ranges)
    assert all(low <= 0 <= high for low, high in ranges.values())


def test_second_terms_are_chosen_by_labels_unless_they_are_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORTH", "ENOUGH"):  # else none of so small a network are worth their price
        monkeypatch.setattr(second_terms, name, 0.0)
    report = folder / "r.json"
    assert quantize(folder) == 0
    found = json.loads(report.read_text())
    tried = {float(share): lost for share, lost in found["second_terms_tried"].items()}
    assert set(tried) >= {second_terms.COST, 0.0}
    assert tried[found["second_terms"]] <= 1.25 * tried[second_terms.COST]
    assert bool(found["two_term_layers"] or found["float_layers"]) == (found["second_terms"] > 0)
    for share in ("0", "0.2"):
        assert quantize(folder, "--second-terms", share) == 0
        found = json.loads(report.read_text())
        assert found["second_terms"] == float(share)
        assert "second_terms_tried" not in found


def test_a_budget_is_kept_on_whole_cases_or_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(folder, "--validation-data", str(folder / "images"), "--budget", "0.2") == 0
    (folder / "q.onnx").unlink()
    assert quantize(folder, "--validation-data", str(folder / "images"), "--budget", "1e-7") == 2
    said = capsys.readouterr().err
    assert "no recipe that was tried keeps the budget" in said
    assert "conv" in said
    assert not (folder / "q.onnx").exists()
    report = json.loads((folder / "q.sensitivity.json").read_text())
    assert not report["met_on_windows"]
    assert len(report["sensitivity"]) == len(layers(simplify(load_graph(folder / "n.onnx"))))
    assert report["steps"][0]["why"] == "the plain recipe"


def test_sensitivity_lists_every_layer(folder: Path) -> None:
    picture = folder / "bars.png"
    assert (
        quantize(folder, "--validation-data", str(folder / "images"), "--figure", str(picture), verb="sensitivity") == 0
    )
    found = json.loads((folder / "r.json").read_text())["layers"]
    assert {one["layer"] for one in found} == {layer.name for layer in layers(simplify(load_graph(folder / "n.onnx")))}
    assert [one["disagreement"] for one in found] == sorted((one["disagreement"] for one in found), reverse=True)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "q.onnx").exists()


def test_the_guard_says_what_it_measured(folder: Path) -> None:
    assert quantize(folder, "--guard") == 0
    report = json.loads((folder / "r.json").read_text())
    ratios = report["guard"]["seconds_ratio_in_floating_point"]
    kept = {name for name, ratio in ratios.items() if ratio <= 0.98}
    assert kept <= set(report["float_layers"])
    assert not kept & integer_layers(simplify(load_graph(folder / "q.onnx")))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--budget", "0.01"), "need --validation-data"),
        (("--budget", "2", "--validation-data", "images"), "between 0 and 1"),
    ],
)
def test_a_budget_without_meaning_is_refused(
    more: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / part) if part == "images" else part for part in more]
    assert quantize(folder, *given) == 2
    assert said in capsys.readouterr().err


def test_calibration_cases_prove_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ["--calibration", str(folder / "images"), "--windows", "4", "--validation-data", str(folder / "images")]
    assert (
        main(["quantize", "--onnx", str(folder / "n.onnx"), "--preprocessing", str(folder / "rules.toml"), *same]) == 2
    )
    assert "was calibrated on" in capsys.readouterr().err
