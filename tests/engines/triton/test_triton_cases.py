"""Whole cases on the Triton engine, from the command line: built for a batch, deployed, compared, and the reference engine's labels."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from quantized import small

from networks import windows
from ptq3d.cli import main
from ptq3d.engines import triton
from ptq3d.engines.triton.lowering import lower
from ptq3d.graphs.files import load_graph
from ptq3d.manifest import embedded

RULES = 'spacing = [2.0, 2.0, 2.0]\n[[intensity]]\nrule = "window"\nlow = 0.0\nhigh = 1.0\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rules.toml").write_text(RULES)
    (tmp_path / "images").mkdir()
    image = nib.Nifti1Image(windows(1, seed=5, shape=(12, 14, 11))[0], np.diag([2.0, 2.0, 2.0, 1.0]))
    nib.save(image, tmp_path / "images" / "a.nii.gz")
    return tmp_path


def segmented(folder: Path, model: Path, *more: str) -> np.ndarray:
    output = folder / "-".join(["labels", model.suffix, *more[1::2]])
    assert main(["deploy", "--model", str(model), "--data", str(folder / "images"), "--output", str(output),
                 "--preprocessing", str(folder / "rules.toml"), *more]) == 0  # fmt: skip
    (path,) = output.rglob("*.nii.gz")
    return np.asarray(nib.load(path).dataobj)


def test_an_artefact_of_a_batch_segments_as_the_reference_does(folder: Path) -> None:
    built = folder / "built"
    assert main(["build", "--onnx-path", str(small("unet")), "--engine", "triton", "--batch", "2",
                 "--output", str(built)]) == 0  # fmt: skip
    assert json.loads((built / "triton.json").read_text()) == {"batch": 2}
    found = segmented(folder, built)
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(found, segmented(folder, small("unet"), "--engine", "reference"))


def test_compare_reports_what_ran(folder: Path) -> None:
    int8, fp32 = small("meshnet"), small("meshnet").with_name("fp32.onnx")
    assert main(["compare", f"{int8}@reference", f"{int8}@triton", f"{fp32}@triton", "--data", str(folder / "images"),
                 "--preprocessing", str(folder / "rules.toml"), "--repetitions", "1", "--output", str(folder / "out"),
                 "--report", str(folder / "r.json")]) == 0  # fmt: skip
    reference, ours, floats = json.loads((folder / "r.json").read_text())["rows"]
    assert (ours["engine"], ours["precision"], ours["int8_mac_share"]) == (
        "triton",
        "int8",
        reference["int8_mac_share"],
    )
    assert ours["fidelity"] > 0.99
    assert (floats["precision"], floats["int8_mac_share"]) == ("fp16", 0.0)


def test_a_network_is_quantized_for_it_where_it_cannot_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda: "no GPU")
    fp32, output = small("meshnet").with_name("fp32.onnx"), folder / "int8.onnx"
    assert main(["quantize", "--onnx-path", str(fp32), "--calibration-data", str(folder / "images"), "--windows", "2",
                 "--target", "triton", "--preprocessing", str(folder / "rules.toml"), "--output", str(output)]) == 0  # fmt: skip
    monkeypatch.undo()
    manifest = embedded(load_graph(output), where=output)
    assert manifest is not None
    recipe, layers = manifest.quantization, lower(output, 1).layers
    assert recipe["high_precision_dtype"] == "fp16"
    assert recipe["float_layers"]  # mended: the network is small and one layer costs little
    assert set(recipe["float_layers"].values()) == {"too sensitive for 8 bits"}
    assert {layer.name for layer in layers if layer.precision == "fp16"} == set(recipe["float_layers"])
    assert {layer.name for layer in layers if layer.precision == "int8"} == set(recipe["int8_layers"])
    found, wanted = (segmented(folder, output, "--engine", engine) for engine in ("triton", "reference"))
    assert (found == wanted).mean() > 0.995
