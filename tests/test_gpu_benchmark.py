"""What benchmarks/gpu.py compares is one network twice, and PyTorch's form of it computes what ONNX Runtime does."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from networks import NETWORKS, windows
from ptq3d.int8 import scale_of_weight
from quantizing import graph, outputs, planned

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ONE = windows(1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_networks

    return gpu_networks


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_graphs

    return gpu_graphs


@pytest.mark.parametrize("network", NETWORKS)
def test_pytorch_computes_the_graph(network: str, gpu: ModuleType, tmp_path: Path) -> None:
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    wanted = outputs(model, tmp_path / "simple.onnx", images=[ONE], engine="onnxruntime")
    with torch.inference_mode():
        found = gpu.Network(onnx.load(tmp_path / "simple.onnx"), 1)(torch.from_numpy(ONE)).numpy()
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("network", ["unet", "attention"])
def test_both_graphs_hold_the_same_weights(network: str, writer: ModuleType, gpu: ModuleType, tmp_path: Path) -> None:
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    axes = writer.axes_of(model)
    first = gpu.filled(gpu.stripped(writer.with_steps(ir.to_proto(model), axes), axes))
    weights = {one.name: numpy_helper.to_array(one) for one in first.graph.initializer}
    plan = planned(ir.from_proto(first), "triton")
    assert axes
    for name, axis in axes.items():
        integers = gpu.integers(name, weights[name].shape, axis, 0)
        assert np.abs(integers).max() == 127
        scale = scale_of_weight(weights[name], axis)
        assert scale.equals(plan.weights[name])
        steps = scale.step.reshape([-1 if place == axis else 1 for place in range(integers.ndim)])
        np.testing.assert_allclose(integers * steps, weights[name], rtol=1e-6)


def test_what_is_left_out_comes_back(writer: ModuleType, gpu: ModuleType, tmp_path: Path) -> None:
    model = graph(NETWORKS["unet"](tmp_path / "n.onnx"))
    axes = writer.axes_of(model)
    stepped = writer.with_steps(ir.to_proto(model), axes)
    whole = gpu.filled(gpu.stripped(stepped, axes))
    slim = gpu.stripped(writer.with_steps(onnx.ModelProto.FromString(whole.SerializeToString()), axes, stepped), axes)
    assert not any(one.raw_data for one in slim.graph.initializer if one.name in axes)
    back = gpu.filled(slim)
    assert [one.name for one in back.graph.initializer] == [one.name for one in whole.graph.initializer]
    for one, other in zip(whole.graph.initializer, back.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
