"""Laws of channel scales: exact in floating point, and worth having where channels span different ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from networks import NETWORKS, Builder, windows
from ptq3d.engines import get_backend
from ptq3d.engines.base import EngineOptions
from ptq3d.errors import CalibrationError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import equalization, planning, qdq
from ptq3d.quantization.calibration import collect_extremes, collect_ranges
from ptq3d.quantization.targets import TARGETS

IMAGES = [window[None] for window in windows(3)]


def outputs(model: ir.Model, path: Path) -> np.ndarray:
    save_graph(model, path)
    backend = get_backend("onnxruntime" if get_backend("onnxruntime").unavailable() is None else "openvino")
    backend.build(path, path.with_suffix(".engine"))
    with backend.open(path.with_suffix(".engine"), EngineOptions()) as engine:
        return engine(np.concatenate(IMAGES))


def equalized(path: Path, strength: float = equalization.STRENGTH) -> tuple[ir.Model, tuple[str, ...]]:
    model = simplify(load_graph(path))
    placement = planning.place(model, TARGETS["openvino"])
    names = equalization.equalizable(model, placement)
    extremes = collect_extremes(model, names, IMAGES)
    return equalization.equalize(model, placement, extremes, strength=strength), names


def quantized(model: ir.Model) -> ir.Model:
    placement = planning.place(model, TARGETS["openvino"])
    tensors = [name for group in placement.tensors for name in group]
    ranges = collect_ranges(model, tensors, IMAGES, method="max", symmetric=False)
    return qdq.write(model, planning.plan(model, placement, ranges, TARGETS["openvino"]))


def uneven(path: Path, activation: str = "Relu") -> Path:
    """Two convolutions; the channels between them span from 0.03 to 30."""
    b = Builder(5)
    spans = np.geomspace(0.03, 30, 8)
    hidden = b.conv(b.add(activation, b.conv("image", 1, 8)), 8, 4)
    for index, factors in ((0, spans[:, None]), (1, spans[:, None]), (2, 1 / spans[None, :, None])):
        tensor = b.weights[index]
        values = (
            numpy_helper.to_array(tensor).reshape(*tensor.dims[:2], -1)
            if index == 2
            else numpy_helper.to_array(tensor).reshape(8, -1)
        )
        tensor.raw_data = (values * factors).astype(np.float32).tobytes()
    b.conv(b.add("Relu", hidden), 4, 3, kernel=1)
    return b.save(path, "logits", 3)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_floating_point_outputs_stay_the_same(network: str, strength: float, tmp_path: Path) -> None:
    path = NETWORKS[network](tmp_path / "n.onnx")
    before = outputs(simplify(load_graph(path)), tmp_path / "before.onnx")
    model, _ = equalized(path, strength)
    after = outputs(model, tmp_path / "after.onnx")
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("network", ["unet", "meshnet", "resized"])
def test_it_changes_weights(network: str, tmp_path: Path) -> None:
    path = NETWORKS[network](tmp_path / "n.onnx")
    model, names = equalized(path)
    assert names
    plain = simplify(load_graph(path))
    changed = [
        node.name
        for node, old in zip(
            (n for n in model.graph if n.op_type == "Conv"),
            (n for n in plain.graph if n.op_type == "Conv"),
            strict=True,
        )
        if not np.array_equal(node.inputs[1].const_value.numpy(), old.inputs[1].const_value.numpy())
    ]
    assert changed


def test_homogeneous_functions_cost_nothing_others_one_multiplication(tmp_path: Path) -> None:
    def operators(path: Path) -> list[str]:
        return [node.op_type for node in equalized(path)[0].graph]

    assert "Mul" not in operators(uneven(tmp_path / "relu.onnx"))
    assert operators(uneven(tmp_path / "elu.onnx", "Elu")).count("Mul") == 1


def test_a_tensor_that_something_else_reads_is_left_alone(tmp_path: Path) -> None:
    path = NETWORKS["resized"](tmp_path / "n.onnx")
    model = simplify(load_graph(path))
    pooled = next(str(node.outputs[0].name) for node in model.graph if node.op_type == "MaxPool")
    assert pooled not in equalization.equalizable(model, planning.place(model, TARGETS["openvino"]))


@pytest.mark.parametrize("activation", ["Relu", "Elu"])
def test_int8_errs_less_where_channels_span_different_ranges(activation: str, tmp_path: Path) -> None:
    path = uneven(tmp_path / "n.onnx", activation)
    exact = outputs(simplify(load_graph(path)), tmp_path / "exact.onnx")

    def error(model: ir.Model, name: str) -> float:
        return float(np.square(outputs(quantized(model), tmp_path / name) - exact).mean())

    plain = error(simplify(load_graph(path)), "plain.onnx")
    assert error(equalized(path)[0], "equalized.onnx") < 0.5 * plain


def test_channels_that_are_always_zero_keep_the_scale_one(tmp_path: Path) -> None:
    path = uneven(tmp_path / "n.onnx")
    model = simplify(load_graph(path))
    placement = planning.place(model, TARGETS["openvino"])
    dead = {
        name: equalization.Extremes(np.zeros(8, np.float32), np.zeros(8, np.float32))
        for name in equalization.equalizable(model, placement)
        if name.startswith("relu_1")
    }
    before = outputs(simplify(load_graph(path)), tmp_path / "before.onnx")
    after = outputs(equalization.equalize(model, placement, dead), tmp_path / "after.onnx")
    assert np.array_equal(before, after)


def test_an_overflowing_network_is_refused_by_tensor(tmp_path: Path) -> None:
    b = Builder(6)
    x = b.add("Exp", b.add("Mul", b.conv("image", 1, 4), b.weight(1, spread=1e30)))
    b.conv(x, 4, 3, kernel=1)
    model = simplify(load_graph(b.save(tmp_path / "n.onnx", "logits", 3)))
    names = equalization.equalizable(model, planning.place(model, TARGETS["openvino"]))
    with pytest.raises(CalibrationError, match=r"exp_2_out.*NaN or infinite"):
        collect_extremes(model, names, IMAGES)
