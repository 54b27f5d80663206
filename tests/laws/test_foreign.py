"""Files that others quantized mean the same on every engine."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from onnx import numpy_helper

from networks import Builder, windows
from ptq3d.engines import load_backend
from ptq3d.engines.base import EngineOptions
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify, unsigned_activations

Floats = np.ndarray


def run(engine: str, onnx: Path, folder: Path, x: Floats) -> Floats:
    backend = load_backend(engine)
    backend.build(onnx, folder)
    with backend.open(folder, EngineOptions()) as opened:
        return opened(x)


def concatenated(path: Path) -> Path:
    """int8 Q/DQ with zero-points behind a concat: what OpenVINO misreads when it is given the file as it is."""
    b = Builder(6)

    def constant(values: object, kind: type) -> str:
        b.weights.append(numpy_helper.from_array(np.asarray(values, kind), f"c{len(b.weights)}"))
        return f"c{len(b.weights) - 1}"

    def both(x: str, step: float) -> str:
        pair = constant(step, np.float32), constant(0, np.int8)
        return b.add("DequantizeLinear", b.add("QuantizeLinear", x, *pair), *pair)

    def layer(x: str, source: int, channels: int) -> str:
        integers = constant(b.random.integers(-127, 128, (channels, source, 3, 3, 3)), np.int8)
        steps = constant(np.full(channels, 1 / 127 / np.sqrt(9 * source)), np.float32)
        return b.add("Conv", x, b.add("DequantizeLinear", integers, steps, axis=0), b.weight(channels), pads=[1] * 6)

    x = both("image", 1 / 127)
    left = both(b.add("LeakyRelu", layer(x, 1, 8), alpha=0.1), 0.01)
    joined = b.add("Concat", left, b.add("LeakyRelu", layer(x, 1, 6), alpha=0.1), axis=1)
    return b.save(path, layer(both(joined, 0.012), 14, 3), 3)


def test_int8_behind_a_concat_is_read_as_it_is_meant(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx, x = concatenated(tmp_path / "n.onnx"), windows(2, seed=9)
    wanted = run("onnxruntime", onnx, tmp_path / "ort", x)
    for engine in ("openvino", "reference", "torch"):
        found = run(engine, onnx, tmp_path / engine, x)
        assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.01 * wanted.std()


def test_unsigned_activations_have_the_same_real_values(tmp_path: Path) -> None:
    onnx, x = concatenated(tmp_path / "n.onnx"), windows(1, seed=9)
    model = simplify(load_graph(onnx))
    assert unsigned_activations(model) == 3
    save_graph(model, tmp_path / "u.onnx")
    for engine in ("reference", "torch"):
        wanted = run(engine, onnx, tmp_path / f"{engine}-int8", x)
        np.testing.assert_array_equal(run(engine, tmp_path / "u.onnx", tmp_path / f"{engine}-uint8", x), wanted)


def abdomen(shared: Path) -> Floats:
    """The real CT as the OBELISK network reads it: (1, 1, 144, 144, 144) HU, axes to L, A, I."""
    image = nib.as_closest_canonical(nib.load(shared / "data/abdomen_ct/images/ct.nii.gz"))
    cropped = np.asarray(image.dataobj, np.float32)[6:116, 12:92, 50:112][::-1, :, ::-1].copy()
    resized = torch.nn.functional.interpolate(torch.from_numpy(cropped)[None, None], (144,) * 3, mode="trilinear")
    return np.asarray(resized.numpy(), np.float32)


def fidelity(found: Floats, wanted: Floats) -> float:
    """Mean Dice over the classes of at least 1000 voxels."""
    classes = [k for k in range(1, 9) if (wanted == k).sum() >= 1000]
    overlaps = [2 * ((found == k) & (wanted == k)).sum() / ((found == k).sum() + (wanted == k).sum()) for k in classes]
    return float(np.mean(overlaps))


def test_a_real_modelopt_file_keeps_its_answer_on_openvino(shared: Path, tmp_path: Path) -> None:
    """.49 if OpenVINO's reader is given the file as it is. The torch and reference engines agree to .993 themselves."""
    pytest.importorskip("onnxruntime")
    onnx = shared / "weights/obelisk_unet/fold2.modelopt-int8.onnx"
    x = abdomen(shared)
    wanted = run("onnxruntime", onnx, tmp_path / "ort", x).argmax(1)
    found = run("openvino", onnx, tmp_path / "openvino", x).argmax(1)
    assert fidelity(found, wanted) > 0.985
