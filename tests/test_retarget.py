"""`ptq3d quantize --retarget`: a Q/DQ file of one runtime for another, without calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from networks import NETWORKS, windows
from ptq3d.cli import main
from ptq3d.engines import reference
from ptq3d.engines.base import EngineOptions
from ptq3d.graphs.files import load_graph
from ptq3d.manifest import embedded
from ptq3d.volumes.source import sha256


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(FP32 network, calibration windows, its tensorrt Q/DQ file)."""
    onnx, data, foreign = NETWORKS["unet"](tmp_path / "n.onnx"), tmp_path / "c.npy", tmp_path / "foreign.onnx"
    np.save(data, windows(2))
    assert main(["quantize", "--onnx", str(onnx), "--calibration", str(data), "--target", "tensorrt",
                 "--high-precision-dtype", "fp32", "--second-terms", "0", "--output", str(foreign), "--quiet"]) == 0  # fmt: skip
    return onnx, data, foreign


def answer(path: Path, folder: Path) -> np.ndarray:
    reference.build(path, folder)
    with reference.open(folder, EngineOptions()) as engine:
        return engine(windows(1, seed=4))


def test_a_file_is_written_for_another_runtime(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, _, foreign = files
    report = tmp_path / "r.json"
    assert main(["quantize", "--onnx", str(foreign), "--retarget", "openvino", "--report", str(report)]) == 0
    written = tmp_path / "foreign_openvino.onnx"
    manifest = embedded(load_graph(written), where=written)
    assert manifest is not None
    assert manifest.quantization["target"] == "openvino"
    assert manifest.quantization["retargeted_from"] == {foreign.name: sha256(foreign)}
    assert json.loads(report.read_text())["rescaled_tensors"] == []
    np.testing.assert_array_equal(answer(written, tmp_path / "a"), answer(foreign, tmp_path / "b"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--calibration", "c.npy"], "give one of them"),
        (["--target", "tensorrt"], "two runtimes"),
        (["--keep", "nothing*"], "matches no weighted layer"),
    ],
)
def test_what_has_no_meaning_with_it_is_said(
    more: list[str], said: str, files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["quantize", "--onnx", str(files[2]), "--retarget", "openvino", *more]) == 2
    assert said in capsys.readouterr().err


def test_an_fp32_file_needs_calibration(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["quantize", "--onnx", str(files[0]), "--retarget", "openvino"]) == 2
    assert "holds no Q/DQ to retarget" in capsys.readouterr().err
    assert main(["quantize", "--onnx", str(files[0])]) == 2
    assert "--calibration-data is missing" in capsys.readouterr().err
    assert main(["quantize", "--onnx", str(files[2]), "--calibration", str(files[1])]) == 2
    assert "--retarget" in capsys.readouterr().err
