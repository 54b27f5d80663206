"""Laws of reading a Q/DQ graph: what was written comes back, and what anyone's file computes is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from test_qdq import write

from networks import NETWORKS, Builder, windows
from ptq3d.engines import reference
from ptq3d.engines.base import EngineOptions
from ptq3d.errors import GraphError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import layers
from ptq3d.graphs.passes import is_quantized, simplify
from ptq3d.quantization import planning, qdq
from ptq3d.quantization.retargeting import retarget
from ptq3d.quantization.targets import TARGETS


def answer(path: Path, folder: Path, x: np.ndarray) -> np.ndarray:
    reference.build(path, folder)
    with reference.open(folder, EngineOptions()) as engine:
        return engine(x)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_is_read_back(network: str, target: str, tmp_path: Path) -> None:
    """A shuffled ConvTranspose comes back as the convolution that it is in the file, of the same name."""
    written, _ = write(NETWORKS[network](tmp_path / "n.onnx"), target)
    path = tmp_path / "q.onnx"
    model, plan = qdq.read(simplify(load_graph(path)))
    assert plan.equals(written) or TARGETS[target].shuffles
    assert set(plan.layers) == set(written.layers)
    assert not is_quantized(model)
    save_graph(qdq.write(model, plan), tmp_path / "again.onnx")
    assert qdq.read(simplify(load_graph(tmp_path / "again.onnx")))[1].equals(plan)
    x = windows(1, seed=3)
    np.testing.assert_array_equal(answer(tmp_path / "again.onnx", tmp_path / "a", x), answer(path, tmp_path / "b", x))


@pytest.mark.parametrize("network", NETWORKS)
def test_without_activations_the_fp32_graph_computes_what_the_file_computed(network: str, tmp_path: Path) -> None:
    """The dequantized weights are in it: written with weights alone, both files give the same but for float rounding."""
    path = NETWORKS[network](tmp_path / "n.onnx")
    plan, _ = write(path)
    only_weights = planning.Plan(plan.layers, {}, plan.weights, plan.target)
    save_graph(qdq.write(simplify(load_graph(path)), only_weights), tmp_path / "w.onnx")
    model, found = qdq.read(simplify(load_graph(tmp_path / "w.onnx")))
    assert not found.activations
    save_graph(model, tmp_path / "fp32.onnx")
    x = windows(1, seed=3)
    wanted = answer(tmp_path / "w.onnx", tmp_path / "a", x)
    np.testing.assert_allclose(
        answer(tmp_path / "fp32.onnx", tmp_path / "b", x), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0
    )


class Foreign(Builder):
    """Writes Q/DQ the way other tools do."""

    def constant(self, values: object, kind: type) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, kind), name))
        return name

    def quantize(self, x: str, step: object, zero: object = 0, kind: type = np.int8, **attributes: object) -> str:
        return self.add("QuantizeLinear", x, self.constant(step, np.float32), self.constant(zero, kind), **attributes)

    def dequantize(self, q: str, step: object, zero: object = 0, kind: type = np.int8, **attributes: object) -> str:
        return self.add("DequantizeLinear", q, self.constant(step, np.float32), self.constant(zero, kind), **attributes)

    def both(self, x: str, step: object, zero: object = 0, kind: type = np.int8) -> str:
        return self.dequantize(self.quantize(x, step, zero, kind), step, zero, kind)

    def stored(self, channels: int, source: int, low: int = -127) -> str:
        """INT8 weights with one step for each output channel."""
        integers = self.random.integers(low, 128, (channels, source, 3, 3, 3))
        integers[0, 0, 0, 0, 0] = low
        steps = self.random.uniform(0.5, 1, channels) / 127 / np.sqrt(27 * source)
        return self.dequantize(self.constant(integers, np.int8), steps, np.zeros(channels), axis=0)

    def layer(self, x: str, weight: str, channels: int) -> str:
        return self.add("Conv", x, weight, self.weight(channels), pads=[1] * 6)


def modelopt(b: Foreign) -> str:
    """FP32 weights with Q and DQ, zero-points given, Q/DQ behind a concat whose inputs have their own."""
    weight, steps = b.weight(4, 1, 3, 3, 3), np.full(4, 0.01)
    kept = b.dequantize(b.quantize(weight, steps, np.zeros(4), axis=0), steps, np.zeros(4), axis=0)
    first = b.add("LeakyRelu", b.layer(b.both("image", 0.01), kept, 4), alpha=0.1)
    second = b.both(b.add("LeakyRelu", b.layer(b.both(first, 0.02), b.stored(4, 4), 4), alpha=0.1), 0.03)
    joined = b.both(b.add("Concat", b.both(first, 0.02), second, axis=1), 0.025)
    return b.layer(joined, b.stored(3, 8), 3)


def onnxruntime(b: Foreign) -> str:
    """uint8 with zero-points on every tensor, int32 biases, the output quantized too, scales of shape (1,)."""
    bias = b.dequantize(b.constant([100, -50, 30, 7], np.int32), [1e-4], [0], np.int32)
    x = b.both("image", [0.005], [3], np.uint8)
    conv = b.both(b.add("Conv", x, b.stored(4, 1), bias, pads=[1] * 6), [0.02], [90], np.uint8)
    relu = b.both(b.add("Relu", conv), 0.012, 0, np.uint8)
    added = b.both(b.add("Add", relu, conv), 0.02, 60, np.uint8)
    pooled = b.both(b.add("MaxPool", added, kernel_shape=[3, 3, 3], pads=[1] * 6), 0.02, 60, np.uint8)
    return b.both(b.layer(pooled, b.stored(3, 4), 3), 0.03, 110, np.uint8)


def brevitas(b: Foreign) -> str:
    """QCDQ: a clip of the integers between Q and DQ; narrow weights and 5-bit activations."""

    def clipped(x: str, step: object, low: int, high: int, **attributes: object) -> str:
        zero = np.zeros(np.shape(step))
        q = b.quantize(x, step, zero, **attributes)
        return b.dequantize(
            b.add("Clip", q, b.constant(low, np.int8), b.constant(high, np.int8)), step, zero, **attributes
        )

    weight = clipped(b.weight(4, 1, 3, 3, 3), np.full(4, 0.004), -127, 127, axis=0)
    x = b.add("Relu", b.layer(clipped("image", 0.01, -128, 127), weight, 4))
    return b.layer(clipped(x, 0.03, -16, 15), b.stored(3, 4), 3)


def per_channel(b: Foreign) -> str:
    """Q with a step for each channel, DQ with one: a multiplication per channel in front."""
    x = b.add("Relu", b.layer(b.both("image", 0.01), b.stored(4, 1), 4))
    q = b.quantize(x, [0.005, 0.01, 0.02, 0.04], [0] * 4, np.uint8, axis=1)
    return b.layer(b.dequantize(q, 0.01, 0, np.uint8), b.stored(3, 4, low=-128), 3)


def twice(b: Foreign) -> str:
    """One tensor with two scales, side by side and one behind the other; one pair that two layers read."""
    x = b.add("Relu", b.layer(b.both("image", 0.01), b.stored(4, 1), 4))
    shared = b.both(x, 0.02)
    left, right = b.layer(shared, b.stored(4, 4), 4), b.layer(shared, b.stored(4, 4), 4)
    other = b.layer(b.both(x, 0.025), b.stored(4, 4), 4)
    chained = b.layer(b.both(shared, 0.03), b.stored(4, 4), 4)
    return b.layer(b.both(b.add("Sum", left, right, other, chained), 0.05), b.stored(3, 4), 3)


FOREIGN = {f.__name__: f for f in (modelopt, onnxruntime, brevitas, per_channel, twice)}


def foreign(name: str, path: Path) -> Path:
    b = Foreign(5)
    output = FOREIGN[name](b)
    return b.save(path, output, 3)


@pytest.mark.parametrize("name", FOREIGN)
def test_anyones_file_is_read_and_written_with_its_meaning(name: str, tmp_path: Path) -> None:
    path = foreign(name, tmp_path / f"{name}.onnx")
    x = windows(1, seed=3)
    model, plan = qdq.read(simplify(load_graph(path)))
    assert not is_quantized(model)
    assert len(plan.layers) == len([layer for layer in layers(model) if layer.op == "Conv"])
    save_graph(qdq.write(model, plan), tmp_path / "again.onnx")
    wanted, found = run(path, x), run(tmp_path / "again.onnx", x)
    # a value between two integers may fall to the other side where a step per channel became a multiplication
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 1e-4 * np.ptp(wanted)
    _, again = qdq.read(simplify(load_graph(tmp_path / "again.onnx")))
    assert again.equals(plan) or name == "twice"  # which of the two scales the tensor itself keeps is the file's order
    assert len(again.activations) == len(plan.activations)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": x})[0])


def test_the_tensors_of_a_plan_and_who_else_reads_them(tmp_path: Path) -> None:
    """Everything but the layers reads what it read: Relu and Add the dequantized sum, and the output is quantized too."""
    _, plan = qdq.read(simplify(load_graph(foreign("onnxruntime", tmp_path / "n.onnx"))))
    first, last = plan.layers
    assert {reader.split("_")[0] for reader, _ in plan.readers[f"{first}_out"]} == {"relu", "add"}
    assert plan.readers[f"{last}_out"]
    assert {scale.dtype for scale in plan.activations.values()} == {"uint8"}


def test_what_cannot_be_kept_names_the_node(tmp_path: Path) -> None:
    b = Foreign(1)
    q = b.quantize("image", 0.01, 0, np.uint8)
    pooled = b.add("MaxPool", q, kernel_shape=[3, 3, 3], pads=[1] * 6)
    b.save(tmp_path / "n.onnx", b.layer(b.dequantize(pooled, 0.01, 0, np.uint8), b.stored(3, 1), 3), 3)
    with pytest.raises(GraphError, match=r"MaxPool 'maxpool_1'.*integers|DequantizeLinear 'dequantizelinear_2'"):
        qdq.read(simplify(load_graph(tmp_path / "n.onnx")))
    b = Foreign(1)
    integers = b.constant(np.full((3, 1, 3, 3, 3), 255), np.uint8)
    weight = b.dequantize(integers, np.full(3, 0.01), np.full(3, 5), np.uint8, axis=0)
    b.save(tmp_path / "n.onnx", b.layer(b.both("image", 0.01), weight, 3), 3)
    with pytest.raises(GraphError, match=r"Conv 'conv_3'.*zero-point"):
        qdq.read(simplify(load_graph(tmp_path / "n.onnx")))


def test_steps_along_input_channels_keep_a_layer_in_floating_point(tmp_path: Path) -> None:
    """ONNX Runtime's quantizer writes them for ConvTranspose; no integer sum has such steps, and no engine may pretend."""
    b = Foreign(1)
    x = b.layer(b.both("image", 0.01), b.stored(4, 1), 4)
    integers = b.constant(b.random.integers(-127, 128, (4, 3, 1, 1, 1)), np.int8)
    weight = b.dequantize(integers, [0.001, 0.002, 0.004, 0.008], [0] * 4, axis=0)
    path = b.save(tmp_path / "n.onnx", b.add("ConvTranspose", b.both(x, 0.02), weight), 3)
    x = windows(1, seed=3)
    wanted = run(path, x)
    np.testing.assert_allclose(answer(path, tmp_path / "a", x), wanted, atol=1e-5 * np.ptp(wanted), rtol=0)
    model, plan = qdq.read(simplify(load_graph(path)))
    assert [name.split("_")[0] for name in plan.layers] == ["conv"]
    save_graph(qdq.write(model, plan), tmp_path / "again.onnx")
    np.testing.assert_allclose(run(tmp_path / "again.onnx", x), wanted, atol=1e-5 * np.ptp(wanted), rtol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_written_for_every_target(name: str, target: str, tmp_path: Path) -> None:
    """Its layers stay INT8; where scales can be kept, the answer is kept too, else within the noise of INT8."""
    path = foreign(name, tmp_path / f"{name}.onnx")
    x = windows(1, seed=3)
    model, plan = qdq.read(simplify(load_graph(path)))
    result = retarget(model, plan, TARGETS[target])
    assert result.plan.layers == plan.layers
    save_graph(qdq.write(model, result.plan), tmp_path / "t.onnx")
    assert qdq.integer_layers(simplify(load_graph(tmp_path / "t.onnx"))) == set(plan.layers)
    assert set(result.dropped) == set(plan.activations) - set(result.plan.activations)
    if target != "openvino":
        return
    wanted, found = run(path, x), run(tmp_path / "t.onnx", x)
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.02 * np.ptp(wanted)


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_int8_without_zero_points_is_retargeted_exactly(target: str, tmp_path: Path) -> None:
    """int8 -> uint8 with zero-point 128 has the same step; a tensorrt plan is what its file says."""
    write(NETWORKS["unet"](tmp_path / "n.onnx"), "tensorrt")
    model, plan = qdq.read(simplify(load_graph(tmp_path / "q.onnx")))
    result = retarget(model, plan, TARGETS[target])
    assert not result.rescaled
    assert not result.dropped
    assert {(scale.dtype, int(scale.zero_point)) for scale in result.plan.activations.values()} == (
        {("uint8", 128)} if target == "openvino" else {("int8", 0)}
    )
    assert result.plan.equals(plan) == (target == "tensorrt")
    save_graph(qdq.write(model, result.plan), tmp_path / "t.onnx")
    x = windows(1, seed=3)
    np.testing.assert_array_equal(
        answer(tmp_path / "t.onnx", tmp_path / "a", x), answer(tmp_path / "q.onnx", tmp_path / "b", x)
    )


def test_a_zero_point_that_a_symmetric_target_has_not_keeps_its_range(tmp_path: Path) -> None:
    write(NETWORKS["meshnet"](tmp_path / "n.onnx"), "openvino")  # ELU: zero-points
    model, plan = qdq.read(simplify(load_graph(tmp_path / "q.onnx")))
    result = retarget(model, plan, TARGETS["tensorrt"])
    assert set(result.rescaled) == set(plan.activations)
    for name, scale in result.plan.activations.items():
        old = plan.activations[name]
        ends = [(end - old.zero_point) * old.step for end in (0, 255)]
        assert scale.dtype == "int8"
        assert not scale.zero_point.any()
        np.testing.assert_allclose(127 * scale.step, max(-ends[0], ends[1]), rtol=1e-6)


def test_nothing_to_retarget_is_an_error(tmp_path: Path) -> None:
    model = simplify(load_graph(NETWORKS["unet"](tmp_path / "n.onnx")))
    with pytest.raises(GraphError, match="nothing to retarget"):
        retarget(model, planning.Plan((), {}, {}, "foreign"), TARGETS["openvino"])
