"""A ConvTranspose as a convolution and a shuffle: the same integers, bit for bit, from the same weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from networks import NETWORKS, Builder, windows
from ptq3d.engines import reference
from ptq3d.engines.base import EngineOptions
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import layers, shape_of
from ptq3d.graphs.passes import simplify
from ptq3d.graphs.pixel_shuffle import shuffle_pixels
from ptq3d.graphs.split_head import head_layer_of, split_head
from ptq3d.quantization import planning, qdq
from ptq3d.quantization.targets import TARGETS
from quantizing import graph, planned

SIZE = (3, 2, 4)
Floats = np.ndarray


def upwards(kernel: tuple[int, ...], channels: tuple[int, int], batch: int, *, bias: bool, coded: bool) -> ir.Model:
    """Image -> Q/DQ -> ConvTranspose with INT8 weights -> Q/DQ where `coded`; batch windows at a time."""
    random, (source, made) = np.random.default_rng(math.prod(kernel)), channels
    weights = random.integers(-127, 128, (source, made, *kernel)).astype(np.int8)
    constants = {
        "step": np.float32(0.011),
        "zero": np.int8(0),
        "w/q": weights,
        "w/step": random.uniform(0.5, 1, made).astype(np.float32) / 100,
        "b": random.normal(size=made).astype(np.float32),
        "y/step": np.float32(0.05),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "step", "zero"], ["q"], name="Q"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["dq"], name="DQ"),
        helper.make_node("DequantizeLinear", ["w/q", "w/step"], ["w/dq"], name="w/DQ", axis=1),
        helper.make_node("ConvTranspose", ["dq", "w/dq", *(["b"] if bias else [])], ["y"], name="up", strides=kernel),
    ]
    if coded:
        nodes += [
            helper.make_node("QuantizeLinear", ["y", "y/step", "zero"], ["y/q"], name="y/Q"),
            helper.make_node("DequantizeLinear", ["y/q", "y/step", "zero"], ["y/dq"], name="y/DQ"),
        ]
    size = [n * k for n, k in zip(SIZE, kernel, strict=True)]
    output = helper.make_tensor_value_info("y/dq" if coded else "y", TensorProto.FLOAT, [batch, made, *size])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, source, *SIZE])
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    made_graph = helper.make_graph(nodes, "up", [image], [output], stored)
    proto = helper.make_model(made_graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return simplify(ir.from_proto(proto))


def answer(path: Path, x: Floats) -> Floats:
    folder = path.with_suffix(".engine")
    reference.build(path, folder)
    with reference.open(folder, EngineOptions()) as engine, np.errstate(all="raise"):
        return engine(x)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kernel=st.tuples(*[st.integers(1, 3)] * 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    coded=st.booleans(),
)
def test_the_same_integers_for_any_patch(
    kernel: tuple[int, ...], channels: tuple[int, int], batch: int, bias: bool, coded: bool, tmp_path: Path
) -> None:
    model = upwards(kernel, channels, batch, bias=bias, coded=coded)
    save_graph(model, tmp_path / "a.onnx")
    before = layers(model)
    assert shuffle_pixels(model) == ("up",)
    save_graph(model, tmp_path / "b.onnx")
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    after = layers(model)
    assert [(layer.name, layer.op, layer.macs) for layer in after] == [("up", "Conv", before[0].macs)]
    assert shape_of(model.graph.outputs[0])[0] == batch
    x = np.random.default_rng(0).normal(size=(2, channels[0], *SIZE)).astype(np.float32)
    np.testing.assert_array_equal(answer(tmp_path / "b.onnx", x), answer(tmp_path / "a.onnx", x))


def test_what_moves_is_bytes_where_the_output_is_quantized() -> None:
    model = upwards((2, 2, 2), (4, 3), 1, bias=True, coded=True)
    shuffle_pixels(model)
    (conv,) = [node for node in model.graph if node.op_type == "Conv"]
    behind = [node.op_type for node in model.graph][list(model.graph).index(conv) :]
    assert behind == ["Conv", "QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Reshape"]
    (transpose,) = [node for node in model.graph if node.op_type == "Transpose"]
    assert len(shape_of(transpose.inputs[0])) == 8  # the most that TensorRT has
    stored = {name: value.const_value for name, value in model.graph.initializers.items() if "patches" in name}
    assert {name for name, tensor in stored.items() if tensor is not None and tensor.dtype == ir.DataType.INT8} == {
        "w/patches/q"
    }
    assert {name: value.shape for name, value in stored.items() if value is not None} == {
        "w/patches/q": (24, 4, 1, 1, 1),
        "w/patches/step": (24,),
        "b/patches": (24,),
    }
    assert qdq.integer_layers(model) == {"up"}


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [1, 2, 2]},
        {"strides": [2, 2, 2], "pads": [0, 0, 1, 0, 0, 1]},
        {"strides": [2, 2, 2], "output_padding": [0, 1, 0]},
        {"strides": [2, 2, 2], "dilations": [1, 1, 2]},
        {"strides": [2, 2, 2], "group": 2},
    ],
    ids=lambda attributes: list(attributes)[-1],
)
def test_patches_that_overlap_are_cut_or_grouped_are_left_alone(attributes: dict[str, object], tmp_path: Path) -> None:
    b = Builder(3)
    x = b.conv("image", 1, 4)
    b.add("ConvTranspose", x, b.weight(4, 2, 2, 2, 2), **attributes)
    b.nodes[-1].output[0] = "logits"
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *SIZE])
    proto = helper.make_model(helper.make_graph(b.nodes, "up", [image], [output], b.weights), ir_version=10)
    model = simplify(ir.from_proto(proto))
    before = [node.op_type for node in model.graph]
    assert shuffle_pixels(model) == ()
    assert [node.op_type for node in model.graph] == before


def tied(path: Path) -> Path:
    """Two transposed convolutions of one weight, of which the second is read by two."""
    b = Builder(5)
    x, weight = b.add("Relu", b.conv("image", 1, 6, stride=2)), b.weight(6, 6, 2, 2, 2)
    first = b.add("ConvTranspose", x, weight, b.weight(6), strides=[2, 2, 2])
    second = b.add("ConvTranspose", b.add("Relu", b.conv(x, 6, 6)), weight, strides=[2, 2, 2])
    joined = b.add("Concat", first, b.add("LeakyRelu", second), second, axis=1)
    b.conv(joined, 18, 3)
    return b.save(path, "logits", 3)


PATHS = {**NETWORKS, "tied": tied}


@pytest.mark.parametrize("network", PATHS)
def test_networks_for_tensorrt_compute_what_they_would_without(network: str, tmp_path: Path) -> None:
    """FP32 to float rounding, Q/DQ bit for bit: the convolution sums the same integers."""
    fp32 = graph(PATHS[network](tmp_path / "n.onnx"))
    plan = planned(fp32, "tensorrt", images=[window[None] for window in windows(2)])
    plain = planning.Plan(plan.layers, plan.activations, plan.weights, "foreign", plan.readers)
    found = {"plain": qdq.write(fp32.clone(), plain), "shuffled": qdq.write(fp32.clone(), plan)}
    found |= {"fp32": fp32.clone(), "fp32 shuffled": fp32.clone()}
    up = [node.name for node in fp32.graph if node.op_type == "ConvTranspose"]
    assert list(shuffle_pixels(found["fp32 shuffled"])) == up
    for name, model in found.items():
        save_graph(model, tmp_path / f"{name}.onnx")
        onnx.checker.check_model(str(tmp_path / f"{name}.onnx"), full_check=True)
    answers = {name: answer(tmp_path / f"{name}.onnx", windows(2, seed=5)) for name in found}
    np.testing.assert_array_equal(answers["shuffled"], answers["plain"])
    error = np.abs(answers["fp32 shuffled"] - answers["fp32"]).max()
    assert error <= 1e-5 * np.abs(answers["fp32"]).max()
    assert not any(node.op_type == "ConvTranspose" for node in found["shuffled"].graph)
    macs = [[(layer.name, layer.macs) for layer in layers(model)] for model in found.values()]
    assert macs.count(macs[0]) == 4
    again = simplify(load_graph(tmp_path / "shuffled.onnx"))
    assert qdq.integer_layers(again) == set(plan.layers)
    assert {layer.name for layer in qdq.planned_layers(again) if layer.precision == "int8"} == set(plan.layers)


@pytest.mark.parametrize("coded", [False, True])
def test_a_head_behind_a_shuffle_is_still_a_head(coded: bool, tmp_path: Path) -> None:
    b = Builder(6)
    x = b.add("Relu", b.conv("image", 1, 8, stride=2))
    x = b.add("ConvTranspose", x, b.weight(8, 4, 2, 2, 2), b.weight(4), strides=[2, 2, 2])
    if not coded:
        x = b.add("Relu", x)
    b.conv(x, 4, 9, kernel=1)
    fp32 = graph(b.save(tmp_path / "n.onnx", "logits", 9))
    head = head_layer_of(fp32)
    assert head is not None
    model = qdq.write(fp32, planned(fp32, "tensorrt", keep=() if coded else (head,)))
    assert head_layer_of(model) == head
    split = split_head(model)
    assert split.head is not None
    save_graph(model, tmp_path / "whole.onnx")
    save_graph(split.body, tmp_path / "body.onnx")
    x = windows(1, seed=2)
    features = answer(tmp_path / "body.onnx", x).astype(np.float64)
    logits = np.einsum("kf,nfxyz->nkxyz", split.head.matrix(), features) + split.head.bias[:, None, None, None]
    np.testing.assert_allclose(logits, answer(tmp_path / "whole.onnx", x), atol=1e-5 * np.abs(logits).max(), rtol=0)


def test_only_tensorrt_asks_for_it() -> None:
    assert [name for name, target in TARGETS.items() if target.shuffles] == ["tensorrt"]
