"""What `ptq3d quantize` makes of graphs that are not as it would like them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from networks import NETWORKS, WINDOW, Builder, windows, with_batch
from ptq3d.cli import main
from ptq3d.graphs.files import load_graph
from ptq3d.graphs.passes import simplify
from ptq3d.quantization.qdq import integer_layers


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "c.npy", windows(3))
    return tmp_path / "c.npy"


def quantize(onnx_path: Path, data: Path, *more: str) -> int:
    return main(["quantize", "--onnx", str(onnx_path), "--calibration", str(data), "--quiet", *more])


def test_dynamic_shapes_are_refused_with_the_way_out_which_works(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = NETWORKS["meshnet"](tmp_path / "n.onnx")
    model = onnx.load(path)
    for axis in (2, 3, 4):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
        model.graph.output[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    onnx.save(model, path)
    assert quantize(path, data) == 2
    assert "--window X Y Z" in capsys.readouterr().err
    assert quantize(path, data, "--window", *map(str, WINDOW)) == 0


def test_weights_beside_the_file_are_read(data: Path, tmp_path: Path) -> None:
    inside = NETWORKS["unet"](tmp_path / "inside.onnx")
    (tmp_path / "apart").mkdir()
    beside = tmp_path / "apart/n.onnx"
    onnx.save(onnx.load(inside), beside, save_as_external_data=True, location="n.bin", size_threshold=0)
    assert (tmp_path / "apart/n.bin").stat().st_size > 1000
    assert quantize(inside, data, "--output", str(tmp_path / "a.onnx")) == 0
    assert quantize(beside, data, "--output", str(tmp_path / "b.onnx")) == 0
    first, second = (simplify(load_graph(tmp_path / name)) for name in ("a.onnx", "b.onnx"))
    for name, value in first.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), second.graph.initializers[name].const_value.numpy())


def test_weights_that_are_missing_beside_the_file_are_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = NETWORKS["unet"](tmp_path / "n.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="n.bin", size_threshold=0)
    (tmp_path / "n.bin").unlink()
    assert quantize(path, data) == 2
    assert "n.onnx" in capsys.readouterr().err


def test_an_old_opset_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = Builder(0)
    b.conv(b.add("Relu", b.conv("image", 1, 4)), 4, 3)
    assert quantize(b.save(tmp_path / "n.onnx", "logits", 3, opset=11), data) == 2
    assert "opset 11 is older than 13" in capsys.readouterr().err


def test_operators_that_nobody_quantizes_stay_in_floating_point(data: Path, tmp_path: Path) -> None:
    b = Builder(0)
    x = b.add("Softplus", b.add("Sin", b.conv("image", 1, 4)))
    b.weights.append(numpy_helper.from_array(np.float32(2), "two"))
    b.conv(b.add("Pow", x, "two"), 4, 3)
    assert quantize(b.save(tmp_path / "n.onnx", "logits", 3), data, "--second-terms", "0") == 0
    model = simplify(load_graph(tmp_path / "n_int8.onnx"))
    assert {"Sin", "Softplus", "Pow"} <= {node.op_type for node in model.graph}
    assert len(integer_layers(model)) == 2


def test_a_network_whose_activations_are_all_zero_is_quantized(data: Path, tmp_path: Path) -> None:
    b = Builder(0)
    zeros = numpy_helper.from_array(np.zeros((4, 1, 3, 3, 3), np.float32), "nothing")
    b.weights.append(zeros)
    x = b.add("Relu", b.add("Conv", "image", "nothing", pads=[1] * 6))
    b.conv(x, 4, 3)
    assert quantize(b.save(tmp_path / "n.onnx", "logits", 3), data) == 0
    model = onnx.load(tmp_path / "n_int8.onnx")
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert floats
    assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in floats)


def test_two_image_inputs_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = [1, 1, *WINDOW]
    nodes = [helper.make_node("Add", ["image", "other"], ["logits"], name="add")]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("image", "other")]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "two", inputs, [output]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "n.onnx")
    assert quantize(tmp_path / "n.onnx", data) == 2
    assert "one image input is wanted" in capsys.readouterr().err


def test_a_file_of_several_windows_at_a_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = with_batch(NETWORKS["unet"](tmp_path / "n.onnx"), 3), tmp_path / "c.npy"
    np.save(data, windows(2))
    assert quantize(path, data) == 2
    assert "takes 3 windows at a time" in capsys.readouterr().err
