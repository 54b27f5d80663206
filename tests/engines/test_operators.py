"""Operators against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ptq3d.engines.operators import resize

runtime = pytest.importorskip("onnxruntime")


def resized_by_onnx_runtime(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * count) for name, count in (("x", 5), ("y", 5))
    ]
    scale = helper.make_tensor_value_info("scales", TensorProto.FLOAT, [5])
    graph = helper.make_graph([node], "resize", [values[0], scale], [values[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(None, {"x": x, "scales": scales})[0]
    return answer


@given(st.integers(1, 96), st.integers(2, 200))
@example(5, 9)  # 5 x 1.8, which is less than 9 in float64
def test_a_factor_that_was_made_of_sizes_gives_them_back_as_in_onnx_runtime(size: int, wanted: int) -> None:
    scales = np.array([1, 1, wanted / size, 1, 1], np.float32)
    x = np.random.default_rng(0).normal(size=(1, 1, size, 1, 1)).astype(np.float32)
    theirs = resized_by_onnx_runtime(x, scales)
    ours = resize({"mode": "linear"}, torch.from_numpy(x), None, tuple(scales.tolist()))
    assert tuple(ours.shape) == theirs.shape
    if theirs.shape[2] == wanted:  # else the factor is not that of the sizes, and PyTorch maps coordinates by the sizes
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)
