"""A graph of one window, made one of any number, gives every window the answer it had alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from networks import NETWORKS, Builder, windows
from ptq3d.errors import GraphError
from ptq3d.graphs.batching import free_batch
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify

onnxruntime = pytest.importorskip("onnxruntime")


def answers(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_every_window_keeps_its_answer(network: str, tmp_path: Path) -> None:
    path = NETWORKS[network](tmp_path / "n.onnx")
    model = simplify(load_graph(path))
    free_batch(model)
    save_graph(model, tmp_path / "free.onnx")
    onnx.checker.check_model(tmp_path / "free.onnx", full_check=True)
    x = windows(3, seed=4)
    alone = np.concatenate([answers(path, one[None]) for one in x])
    np.testing.assert_allclose(answers(tmp_path / "free.onnx", x), alone, atol=1e-5 * np.abs(alone).max(), rtol=0)


@pytest.mark.parametrize(
    ("op", "attributes", "constant"),
    [
        ("Transpose", {"perm": [1, 0, 2, 3, 4]}, None),
        ("Reshape", {}, np.array([8, 1, 12, 10, 1], np.int64)),
        ("Expand", {}, np.array([1, 3, 8, 12, 10], np.int64)),
        ("Gather", {"axis": 0}, np.zeros(1, np.int64)),
        ("ReduceMean", {}, np.array([0, 2], np.int64)),
        ("ReduceMax", {}, np.array([-5], np.int64)),
        ("ReduceL2", {}, np.array([0], np.int64)),
        ("CumSum", {}, np.array(0, np.int64)),
        ("LayerNormalization", {"axis": 0}, np.ones((1, 1, 8, 12, 10), np.float32)),
        ("Softmax", {"axis": 0}, None),
        ("Split", {"num_outputs": 1}, None),
    ],
)
def test_what_moves_the_first_axis_is_named(
    op: str, attributes: dict, constant: np.ndarray | None, tmp_path: Path
) -> None:
    b = Builder(0)
    x = b.conv("image", 1, 1)
    inputs = [x]
    if constant is not None:
        b.weights.append(onnx.numpy_helper.from_array(constant, "c"))
        inputs.append("c")
    moved = b.add(op, *inputs, **attributes)
    if op == "Transpose":
        b.add("Transpose", b.add("Relu", moved), perm=[1, 0, 2, 3, 4])
    graph = helper.make_graph(
        b.nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 12, 10])],
        [helper.make_tensor_value_info(b.nodes[-1].output[0], TensorProto.FLOAT, ["n", "c", "x", "y", "z"])],
        b.weights,
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(GraphError, match=f"{op} '{op.lower()}_1' .*use --batch 1"):
        free_batch(simplify(load_graph(path)))


def test_a_zero_in_a_shape_keeps_the_size_whatever_the_exporter_wrote(tmp_path: Path) -> None:
    """PyTorch's exporter writes allowzero=1, with which ONNX takes a 0 for a size."""
    b = Builder(0)
    b.weights += [
        onnx.numpy_helper.from_array(np.asarray(shape, np.int64), name)
        for name, shape in (("rows", [1, 8, 120]), ("grid", [1, 1, 8, 12, 10]))
    ]
    rows = b.add("Reshape", b.conv("image", 1, 1), "rows", allowzero=1)
    b.add("Reshape", b.add("Relu", rows), "grid", allowzero=1)
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 8, 12, 10])
        for name in ("image", b.nodes[-1].output[0])
    ]
    graph = helper.make_graph(b.nodes, "g", ports[:1], ports[1:], b.weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    model = simplify(load_graph(tmp_path / "g.onnx"))
    free_batch(model)
    save_graph(model, tmp_path / "free.onnx")
    x = windows(3, seed=4)
    alone = np.concatenate([answers(tmp_path / "g.onnx", one[None]) for one in x])
    np.testing.assert_allclose(answers(tmp_path / "free.onnx", x), alone, atol=1e-5 * np.abs(alone).max(), rtol=0)
