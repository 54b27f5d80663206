"""Laws of what is done to a network for OpenVINO: the same answer, whether or not it applies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from networks import NETWORKS, Builder, windows
from ptq3d.engines import load_backend
from ptq3d.engines.base import EngineOptions, int8_mac_share
from ptq3d.engines.openvino_model import sum_apart
from ptq3d.graphs.files import save_graph
from ptq3d.quantization import qdq
from quantizing import graph, planned, run

openvino = pytest.importorskip("openvino")
FP32 = {"INFERENCE_PRECISION_HINT": "f32"}


def residual(path: Path, slope: float, *, scaled: bool = True) -> Path:
    """A residual block at the end, as STU-Net has it: a normalized branch, and the skip through a convolution of its own."""
    b = Builder(6)
    x = b.add("Relu", b.conv("image", 1, 16))
    branch = b.add("InstanceNormalization", b.conv(x, 16, 16), b.weight(16), b.weight(16))
    last = b.add("LeakyRelu", b.add("Add", branch, b.conv(x, 16, 16, kernel=1)), alpha=slope)
    if scaled:
        b.add("Mul", last, b.weight(1, 16, 1, 1, 1))
    return b.save(path, "logits", 16)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("slope", [0.01, 0.5, 1.5])
@pytest.mark.parametrize("int8", [True, False])
def test_a_last_sum_apart_from_its_convolution_gives_the_same_answer(
    slope: float, scaled: bool, int8: bool, tmp_path: Path
) -> None:
    path = residual(tmp_path / "n.onnx", slope, scaled=scaled)
    if int8:
        model = graph(path)
        path = tmp_path / "q.onnx"
        save_graph(qdq.write(model, planned(model)), path)
    x = windows(2, seed=3)
    found = run("openvino", path, x)
    folder = path.with_name(f"{path.name}.openvino")
    plain, apart = (openvino.Core().read_model(folder / "model.xml") for _ in range(2))
    wanted = np.concatenate([openvino.compile_model(plain, "CPU", FP32)([window[None]])[0] for window in x])
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)
    kinds = {node.get_type_name() for node in sum_apart(apart).get_ops()}
    assert ("Maximum" in kinds) == (0 <= slope <= 1)
    with load_backend("openvino").open(folder, EngineOptions()) as engine:
        assert len(engine.layers()) == 3
        assert int8_mac_share(engine.layers()) == (1.0 if int8 else 0.0)


def test_channels_are_gathered_in_their_order(tmp_path: Path) -> None:
    """OpenVINO itself gives another answer for this graph (2026.4)."""
    b = Builder(3)
    b.weights.append(numpy_helper.from_array(np.array([3, 1, 0, 2, 7, 5, 6, 4]), "order"))
    b.conv(b.add("Gather", b.conv("image", 1, 8), "order", axis=1), 8, 3)
    path = b.save(tmp_path / "n.onnx", "logits", 3)
    wanted = run("reference", path, windows(2))
    np.testing.assert_allclose(run("openvino", path, windows(2)), wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)


def test_a_free_batch_is_one(tmp_path: Path) -> None:
    path = NETWORKS["meshnet"](tmp_path / "net.onnx")
    wanted = run("openvino", path, windows(2))
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.save(model, path)
    assert np.array_equal(run("openvino", path, windows(2)), wanted)
