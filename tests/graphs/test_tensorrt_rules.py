"""TensorRT's rules: kept by every graph that is written for it, and told one by one where a graph breaks them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.small import NAMES, SMALL
from networks import NETWORKS, Builder
from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.export import export_network
from ptq3d.graphs.files import load_graph
from ptq3d.graphs.layers import shape_of
from ptq3d.graphs.passes import simplify, write_kernel_shapes
from ptq3d.graphs.tensorrt_rules import ADVICE, RULES, advice, violations
from ptq3d.int8 import Scale
from ptq3d.models import build_network
from ptq3d.quantization import planning, qdq, retargeting
from ptq3d.quantization.targets import TARGETS
from quantizing import example, planned

ONE = Scale(np.float32(0.05), np.asarray(0, np.int32), "int8")  # for where only the form of a graph counts
REAL = [
    "obelisk_unet/fold1.onnx",
    "obelisk_unet/fold2.onnx",
    "meshnet/model18cls/model.onnx",
    "meshnet/subcortical/model.onnx",
]


def quantized(model: ir.Model, *, keep: tuple[str, ...] = ()) -> ir.Model:
    """A copy of an FP32 graph with TensorRT's Q/DQ, of scales that come from nowhere."""
    target = TARGETS["tensorrt"]
    placement = planning.place(model, target, keep=keep)
    scales = {name: ONE for group in placement.tensors for name in group}
    return written(model, planning.plan(model, placement, {}, target, given=scales))


def copied(model: ir.Model) -> ir.Model:
    """A copy that shares nothing; `clone` shares the opsets."""
    return ir.from_proto(ir.to_proto(model))


def written(model: ir.Model, plan: planning.Plan) -> ir.Model:
    copy = qdq.write(copied(model), plan)
    write_kernel_shapes(copy)
    return copy


def good(network: str) -> ir.Model:
    """A small network as it is written for TensorRT, with observed scales."""
    model, seen = example(network, "tensorrt")
    return written(model, planned(model, "tensorrt", seen=seen))


def small_network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(name, **SMALL[name]).eval()


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
@pytest.mark.parametrize("name", NAMES)
def test_every_network_of_the_zoo_keeps_the_rules(name: str) -> None:
    model = export_network(small_network(name), channels=1, window=SMALL[name]["window"]).model
    assert violations(model) == ()
    int8 = quantized(model)
    assert sum(node.op_type == "QuantizeLinear" for node in int8.graph) > 5
    assert violations(int8) == ()
    assert advice(int8) == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_small_network_keeps_the_rules(name: str) -> None:
    model, _ = example(name, "tensorrt")
    assert violations(model) == ()
    assert violations(good(name)) == ()
    assert advice(good(name)) == ()


@pytest.mark.parametrize("name", REAL)
def test_pretrained_networks_keep_the_rules(name: str, shared: Path) -> None:
    model = simplify(load_graph(shared / "weights" / name))
    assert violations(model) == ()
    assert violations(quantized(model)) == ()


def test_a_file_of_nvidias_own_quantizer_keeps_the_rules(shared: Path) -> None:
    model = simplify(load_graph(shared / "weights/obelisk_unet/fold2.modelopt-int8.onnx"))
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph) > 20
    assert violations(model) == ()
    assert advice(model) == ()


@pytest.mark.parametrize("name", ["unet", "meshnet", "resized"])
@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_what_other_targets_want_is_told_and_retargeting_mends_it(name: str, target: str) -> None:
    model, _ = example(name)
    other = written(model, planned(model, target))
    assert {one.rule for one in violations(other)} & {"integer type", "zero-point"}
    assert all("--retarget tensorrt" in one.said for one in violations(other))
    found, plan = qdq.read(other)
    assert violations(written(found, retargeting.retarget(found, plan, TARGETS["tensorrt"]).plan)) == ()


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_kept_in_floating_point_break_no_rule(name: str, part: int) -> None:
    model, _ = example(name)
    layers = [str(node.name) for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "MatMul")]
    assert violations(quantized(model, keep=tuple(layers[part::2]))) == ()


# graphs that are damaged


Damage = Callable[[ir.Model], str]  # it gives the name of the node that is to be found


def node_of(model: ir.Model, operator: str, position: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == operator][position]


def replaced(model: ir.Model, node: ir.Node, index: int, array: np.ndarray) -> str:
    """Give one node another constant."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, add_constant(model, f"{node.name}/{index}/planted", array))
    return str(node.name)


def computed(model: ir.Model, node: ir.Node, index: int) -> str:
    """Let the graph compute what was one node's constant."""
    old = node.inputs[index]
    assert old is not None
    identity = ir.node("Identity", [old], name="planted/Identity")
    identity.outputs[0].name, identity.outputs[0].shape, identity.outputs[0].type = "planted/out", old.shape, old.type
    model.graph.insert_before(node, identity)
    node.replace_input_with(index, identity.outputs[0])
    return str(node.name)


def attribute(operator: str, position: int = 0, **given: Any) -> Damage:
    """Damage that gives a node attributes, or takes those away that are None."""

    def damage(model: ir.Model) -> str:
        node = node_of(model, operator, position)
        for name, value in given.items():
            node.attributes.pop(name, None)
            if value is not None:
                node.attributes.add(ir.convenience.convert_attribute(name, value))
        return str(node.name)

    return damage


def appended(
    operator: str, *inputs: np.ndarray | None, outputs: int = 1, shape: tuple[int, ...] = (), **given: Any
) -> Damage:
    """Damage by another node that reads the image; its last output is one of the graph."""

    def damage(model: ir.Model) -> str:
        more = [None if one is None else add_constant(model, f"planted/{i}", one) for i, one in enumerate(inputs)]
        node = ir.node(operator, [model.graph.inputs[0], *more], given, num_outputs=outputs, name="planted")
        for index, output in enumerate(node.outputs):
            output.name, output.type = f"planted/out{index}", ir.TensorType(ir.DataType.FLOAT)
            output.shape = ir.Shape(shape) if shape else model.graph.inputs[0].shape
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[-1])
        return "planted"

    return damage


def with_opset(opset: int, damage: Damage) -> Damage:
    def both(model: ir.Model) -> str:
        model.opset_imports[""] = opset
        return damage(model)

    return both


def dynamic_input(operator: str, index: int, values: list[int], **given: Any) -> Damage:
    """Damage by another node one of whose inputs the graph computes."""
    constants = [None] * (index - 1) + [np.asarray(values, np.int64)]
    if operator == "Pad":
        constants[0] = np.asarray([1, 1], np.int64)

    def damage(model: ir.Model) -> str:
        name = appended(operator, *constants, **given)(model)
        return computed(model, node_of(model, operator, -1), index) and name

    return damage


def type_of_input(operator: str, index: int, kind: ir.DataType) -> Damage:
    def damage(model: ir.Model) -> str:
        node = node_of(model, operator)
        value = node.inputs[index]
        assert value is not None
        value.dtype = kind
        return str(node.name)

    return damage


def unsigned(model: ir.Model) -> str:
    node = node_of(model, "QuantizeLinear")
    for one in (node, *(reader for reader, _ in node.outputs[0].uses())):
        replaced(model, one, 2, np.asarray(0, np.uint8))
    node.outputs[0].dtype = ir.DataType.UINT8
    return str(node.name)


def stored(model: ir.Model) -> ir.Node:
    """The DequantizeLinear of a weight."""
    return next(node for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].const_value)


def unsigned_weights(model: ir.Model) -> str:
    node = stored(model)
    return replaced(model, node, 0, np.zeros(shape_of(node.inputs[0]), np.uint8))


def no_zero_point(model: ir.Model) -> str:
    node = node_of(model, "QuantizeLinear", 1)
    node.resize_inputs(2)
    return str(node.name)


def zero_point_from_outside(model: ir.Model) -> str:
    node = node_of(model, "QuantizeLinear")
    value = ir.Value(name="zero", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT8))
    model.graph.inputs.append(value)
    node.replace_input_with(2, value)
    return str(node.name)


def constant(operator: str, index: int, array: np.ndarray) -> Damage:
    return lambda model: replaced(model, node_of(model, operator), index, array)


def float16_behind(model: ir.Model) -> str:
    """The rest of a layer stays FP32 where its activation is dequantized to FP16."""
    node = node_of(model, "DequantizeLinear")
    replaced(model, node, 1, np.asarray(0.1, np.float16))
    node.outputs[0].dtype = ir.DataType.FLOAT16
    return str(node.outputs[0].uses()[0].node.name)


def no_axis(model: ir.Model) -> str:
    del stored(model).attributes["axis"]
    return str(stored(model).name)


def channel_steps(model: ir.Model) -> str:
    """As ptq3d writes them for OpenVINO."""
    node = node_of(model, "QuantizeLinear", 1)
    channels = shape_of(node.inputs[0])[1]
    replaced(model, node, 1, np.full(channels, 0.1, np.float32))
    node.attributes.add(ir.AttrInt64("axis", 1))
    return replaced(model, node, 2, np.zeros(channels, np.int8))


def another_axis(operator: str, axis: int) -> Damage:
    def damage(model: ir.Model) -> str:
        node = next(
            one for one in model.graph if one.op_type == operator and not one.inputs[1].producer().inputs[0].producer()
        )
        dequantize = node.inputs[1].producer()
        assert dequantize is not None
        dequantize.attributes.add(ir.AttrInt64("axis", axis))
        return str(node.name)

    return damage


def in_blocks(model: ir.Model) -> str:
    stored(model).attributes.add(ir.AttrInt64("block_size", 16))
    return str(stored(model).name)


def scalar(model: ir.Model) -> str:
    node = node_of(model, "QuantizeLinear", 1)
    node.inputs[0].shape = ir.Shape([])
    return str(node.name)


def read_as_integers(model: ir.Model) -> str:
    node = node_of(model, "QuantizeLinear")
    reader = ir.node("Identity", node.outputs, name="planted")
    model.graph.append(reader)
    model.graph.outputs.append(reader.outputs[0])
    return str(node.name)


def dequantized_by_nobody(model: ir.Model) -> str:
    node = node_of(model, "QuantizeLinear")
    other = ir.node("QuantizeLinear", node.inputs, name="planted")
    model.graph.insert_after(node, other)
    return "planted"


def bias_of_int32(model: ir.Model) -> str:
    node = node_of(model, "Conv")
    integers = add_constant(model, "planted/q", np.zeros(shape_of(node.inputs[2]), np.int32))
    dequantize = ir.node(
        "DequantizeLinear", [integers, add_constant(model, "planted/step", np.float32([0.1])[0])], name="planted"
    )
    dequantize.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])
    return str(node.name)


def only_weights(model: ir.Model) -> str:
    node = node_of(model, "Conv", 1)
    node.replace_input_with(0, node.inputs[0].producer().inputs[0].producer().inputs[0])
    return str(node.name)


def another_domain(model: ir.Model) -> str:
    node = node_of(model, "LeakyRelu")
    node.domain = "com.microsoft"
    return str(node.name)


def another_operator(model: ir.Model) -> str:
    node = node_of(model, "LeakyRelu")
    node.op_type = "MaxUnpool"
    return str(node.name)


def normalized_in_bf16(model: ir.Model) -> str:
    for index in range(3):
        type_of_input("InstanceNormalization", index, ir.DataType.BFLOAT16)(model)
    return str(node_of(model, "InstanceNormalization").name)


def no_layer_scale(model: ir.Model) -> str:
    node = node_of(model, "LayerNormalization")
    node.replace_input_with(1, None)
    return str(node.name)


def padded_behind(model: ir.Model) -> str:
    attribute("ConvTranspose", output_padding=[1, 1, 1])(model)
    return computed(model, node_of(model, "ConvTranspose"), 2)


def prelu(model: ir.Model) -> str:
    node = node_of(model, "LeakyRelu")
    node.op_type = "PRelu"
    return replaced(model, node, 1, np.full(8, 0.1, np.float32))


def newest_opset(model: ir.Model) -> str:
    model.opset_imports[""] = 25
    return "graph"


def too_large(model: ir.Model) -> str:
    node = node_of(model, "Gelu")
    node.outputs[0].shape = ir.Shape([1, 2048, 1024, 1024])
    return str(node.name)


def free_window(model: ir.Model) -> str:
    model.graph.inputs[0].shape = ir.Shape([1, 1, "x", 12, 10])
    return "image"


PLANTED: list[tuple[str, str, Damage]] = [
    ("integer type", "unet", unsigned),
    ("integer type", "unet", unsigned_weights),
    ("zero-point", "unet", no_zero_point),
    ("zero-point", "unet", constant("QuantizeLinear", 2, np.asarray(3, np.int8))),
    ("zero-point", "unet", constant("QuantizeLinear", 2, np.zeros(2, np.int8))),
    ("zero-point", "unet", zero_point_from_outside),
    ("constant scale", "unet", lambda model: computed(model, node_of(model, "QuantizeLinear"), 1)),
    ("scale value", "unet", constant("QuantizeLinear", 1, np.asarray(0, np.float32))),
    ("scale value", "unet", constant("QuantizeLinear", 1, np.asarray(-0.1, np.float32))),
    ("scale value", "unet", constant("QuantizeLinear", 1, np.asarray(np.inf, np.float32))),
    ("scale type", "unet", constant("QuantizeLinear", 1, np.asarray(0.1, np.float16))),
    ("scale type", "unet", constant("DequantizeLinear", 1, np.asarray(0.1, np.float16))),
    ("written axis", "unet", no_axis),
    ("channel scales", "unet", channel_steps),
    ("channel axis", "unet", another_axis("Conv", 1)),
    ("channel axis", "unet", another_axis("ConvTranspose", 0)),
    ("channel axis", "attention", another_axis("MatMul", 0)),
    ("block scales", "unet", in_blocks),
    ("output type", "unet", attribute("QuantizeLinear", output_dtype=3)),
    ("output type", "unet", attribute("DequantizeLinear", output_dtype=1)),
    ("scalar data", "unet", scalar),
    ("unpaired quantize", "unet", read_as_integers),
    ("unpaired quantize", "unet", dequantized_by_nobody),
    ("quantized bias", "unet", bias_of_int32),
    ("half-quantized layer", "unet", only_weights),
    ("kernel shape", "unet", attribute("Conv", kernel_shape=None)),
    ("operator", "unet", another_domain),
    ("operator", "unet", another_operator),
    ("operand type", "unet", type_of_input("LeakyRelu", 0, ir.DataType.INT32)),
    ("operand type", "resized", normalized_in_bf16),
    ("cast", "unet", appended("Cast", to=ir.DataType.INT8.value)),
    ("mixed types", "unet", float16_behind),
    ("mixed types", "resized", type_of_input("Mul", 1, ir.DataType.FLOAT16)),
    ("mixed types", "resized", type_of_input("InstanceNormalization", 1, ir.DataType.FLOAT16)),
    ("constant input", "unet", dynamic_input("ReduceMean", 1, [2], keepdims=1)),
    ("constant input", "unet", dynamic_input("Pad", 3, [2])),
    ("pooling", "resized", attribute("MaxPool", dilations=[1, 2, 1])),
    ("pooling", "resized", appended("MaxPool", outputs=2, kernel_shape=[1, 1, 1])),
    ("resize", "resized", attribute("Resize", mode="cubic")),
    ("resize", "resized", attribute("Resize", antialias=1)),
    ("resize", "resized", attribute("Resize", keep_aspect_ratio_policy="not_larger")),
    ("resize", "resized", attribute("Resize", coordinate_transformation_mode="tf_crop_and_resize")),
    ("depth to space", "unet", appended("SpaceToDepth", blocksize=2)),
    ("automatic padding", "unet", attribute("Conv", auto_pad="SAME_UPPER")),
    ("automatic padding", "unet", attribute("Conv", auto_pad="VALID")),
    ("automatic padding", "unet", attribute("ConvTranspose", auto_pad="SAME_LOWER", output_padding=[1, 0, 0])),
    ("output padding", "unet", padded_behind),
    ("slope", "unet", prelu),
    ("normalization", "attention", no_layer_scale),
    ("normalization", "attention", appended("LayerNormalization", np.ones(10, np.float32), None, outputs=2)),
    (
        "group normalization",
        "unet",
        with_opset(21, appended("GroupNormalization", *[np.ones(1, np.float32)] * 2, num_groups=1)),
    ),
    ("pad", "unet", appended("Pad", np.zeros(10, np.int64), mode="mirror")),
    ("pad", "unet", appended("Pad", np.zeros(10, np.int64), np.zeros(2, np.float32))),
    ("power", "unet", appended("Pow", np.asarray(2, np.int64))),
    ("gemm", "unet", appended("Gemm", np.ones((10, 10), np.float32))),
    ("double", "unet", appended("Cast", to=ir.DataType.DOUBLE.value)),
    ("opset", "unet", newest_opset),
    ("axes", "unet", appended("Reshape", np.asarray([1] * 6 + [8, 12, 10]), shape=(1,) * 6 + (8, 12, 10))),
    ("elements", "attention", too_large),
    ("dynamic shape", "unet", free_window),
]
GROUPED = {"channel axis", "INT8 groups"}  # planted by `grouped`, below


@pytest.mark.parametrize(("rule", "network", "damage"), PLANTED)
def test_a_planted_violation_is_told_with_its_node(rule: str, network: str, damage: Damage) -> None:
    model = good(network)
    name = damage(model)
    if rule == "double":
        node_of(model, "Cast").outputs[0].dtype = ir.DataType.DOUBLE
    found = violations(model)
    assert [(one.rule, one.node) for one in found] == [(rule, name)]
    assert found[0].said.endswith(".")
    assert "\n" not in str(found[0])
    assert name in str(found[0])


def test_every_rule_has_a_planted_violation_and_a_source() -> None:
    assert {rule for rule, *_ in PLANTED} | GROUPED == set(RULES)
    assert all("Source: " in str(rule.__doc__) for rule in (*RULES.values(), *ADVICE.values()))


@pytest.mark.parametrize(
    ("rule", "network", "damage", "version"),
    [
        ("kernel shape", "unet", attribute("Conv", kernel_shape=None), (10, 4)),
        ("constant input", "unet", dynamic_input("Pad", 3, [2]), (10, 4)),
        ("power", "unet", appended("Pow", np.asarray(2, np.int64)), (10, 8)),
        (
            "group normalization",
            "unet",
            PLANTED[[rule for rule, *_ in PLANTED].index("group normalization")][2],
            (10, 9),
        ),
        ("elements", "attention", too_large, (10, 10)),
    ],
)
def test_a_newer_tensorrt_takes_more(rule: str, network: str, damage: Damage, version: tuple[int, int]) -> None:
    model = good(network)
    damage(model)
    before = (version[0], version[1] - 1)
    assert [one.rule for one in violations(model, before)] == [rule]
    assert violations(model, version) == ()
    assert violations(model, (11, 1)) == ()


@given(st.floats(width=32))
def test_scales_are_finite_positive_and_no_subnormals(step: float) -> None:
    model = good("meshnet")
    replaced(model, node_of(model, "QuantizeLinear"), 1, np.asarray(step, np.float32))
    assert (violations(model) == ()) == (np.isfinite(step) and step >= np.finfo(np.float32).tiny)


def grouped(path: Path, operator: str, channels: int, groups: int) -> ir.Model:
    """One INT8 layer of several groups, its weights with one scale."""
    b = Builder(5)
    name = "weights"
    shape = (channels, channels // groups, 1, 1, 1)
    b.weights += [
        numpy_helper.from_array(np.ones(shape, np.int8), name),
        numpy_helper.from_array(np.float32([0.1])[0], "step"),
        numpy_helper.from_array(np.asarray(0, np.int8), "zero"),
    ]
    x = b.conv("image", 1, channels, kernel=1)
    pair = b.add("DequantizeLinear", b.add("QuantizeLinear", x, "step", "zero"), "step", "zero")
    y = b.add(operator, pair, b.add("DequantizeLinear", name, "step"), group=groups)
    b.conv(y, channels, 3, kernel=1)
    model = simplify(load_graph(b.save(path, "logits", 3)))
    write_kernel_shapes(model)
    return model


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (8, 1), (6, 1), (12, 3), (6, 2), (6, 6), (16, 8)])
def test_int8_groups_are_multiples_of_four(operator: str, channels: int, groups: int, tmp_path: Path) -> None:
    model = grouped(tmp_path / "g.onnx", operator, channels, groups)
    wanted = (
        []
        if groups == 1 or channels // groups % 4 == 0
        else [("INT8 groups", node_of(model, operator, -1 if operator == "ConvTranspose" else 1).name)]
    )
    assert [(one.rule, one.node) for one in violations(model)] == wanted


def test_a_grouped_transposed_convolution_has_one_scale(tmp_path: Path) -> None:
    model = grouped(tmp_path / "g.onnx", "ConvTranspose", 8, 2)
    node = node_of(model, "ConvTranspose")
    replaced(model, node.inputs[1].producer(), 1, np.full(4, 0.1, np.float32))
    node.inputs[1].producer().attributes.add(ir.AttrInt64("axis", 1))
    assert [(one.rule, one.node) for one in violations(model)] == [("channel axis", node.name)]


# graphs that look unusual, and are not


def free_batch(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["n", 1, 8, 12, 10])


def other_names(model: ir.Model) -> None:
    for position, node in enumerate(model.graph):
        node.name = f"node {position}"
        for output in node.outputs:
            output.name = f"tensor {position}"


def other_scales(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            replaced(model, node, 1, np.asarray(3, np.float32))


def scale_of_one_element(model: ir.Model) -> None:
    node = node_of(model, "QuantizeLinear")
    replaced(model, node, 1, np.float32([0.1]))
    replaced(model, node, 2, np.zeros(1, np.int8))


def integers_as_output(model: ir.Model) -> None:
    model.graph.outputs.append(node_of(model, "QuantizeLinear", 1).outputs[0])


def default_attributes(model: ir.Model) -> None:
    attribute("QuantizeLinear", output_dtype=0, block_size=0, saturate=1)(model)
    attribute("Conv", 1, auto_pad="NOTSET", group=1)(model)


def valid_without_pads(model: ir.Model) -> None:
    attribute("Conv", -1, auto_pad="VALID", pads=[0] * 6)(model)


def quantized_weights_of_floats(model: ir.Model) -> None:
    """As ModelOpt and PyTorch write them: Q and DQ of a floating-point constant."""
    node = stored(model)
    scale, integers = node.inputs[1], node.inputs[0]
    weight = add_constant(model, "floats", np.ones(shape_of(integers), np.float32))
    zero = add_constant(model, "zeros", np.zeros(shape_of(scale), np.int8))
    quantize = ir.node(
        "QuantizeLinear", [weight, scale, zero], {"axis": node.attributes["axis"].as_int()}, name="planted"
    )
    quantize.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    model.graph.insert_before(node, quantize)
    node.replace_input_with(0, quantize.outputs[0])


@pytest.mark.parametrize(
    "change",
    [
        free_batch,
        other_names,
        other_scales,
        scale_of_one_element,
        integers_as_output,
        default_attributes,
        valid_without_pads,
        quantized_weights_of_floats,
        with_opset(22, lambda model: ""),
    ],
)
def test_what_tensorrt_does_not_mind_is_not_told(change: Callable[[ir.Model], object]) -> None:
    model = good("unet")
    change(model)
    assert violations(model) == ()


@pytest.mark.parametrize(("kind", "opset"), [(TensorProto.FLOAT16, 20), (TensorProto.BFLOAT16, 22)])
def test_a_rest_in_a_lower_type_between_casts_keeps_the_rules(kind: int, opset: int, tmp_path: Path) -> None:
    """Q/DQ of that type, a normalization in FP32 between Casts, and up-sampling by a shuffle of eight axes."""
    b = Builder(6)

    def low(values: np.ndarray, name: str) -> str:
        tensor = helper.make_tensor(name, kind, values.shape, values.astype(np.float32).ravel())
        b.weights.append(tensor)
        return name

    b.weights += [
        numpy_helper.from_array(np.ones((32, 4, 1, 1, 1), np.int8), "weights"),
        numpy_helper.from_array(np.asarray(0, np.int8), "zero"),
        *(
            numpy_helper.from_array(np.asarray(v, np.int64), k)
            for k, v in (("wide", [1, 4, 2, 2, 2, 4, 6, 5]), ("grid", [1, 4, 8, 12, 10]))
        ),
    ]
    step, steps = low(np.asarray(0.1), "step"), low(np.full(32, 0.1), "steps")
    x = b.add("Cast", "image", to=kind)
    x = b.add("Conv", x, low(np.ones((4, 1, 2, 2, 2)), "first"), low(np.ones(4), "bias"), strides=[2, 2, 2])
    x = b.add("InstanceNormalization", b.add("Cast", x, to=TensorProto.FLOAT), b.weight(4), b.weight(4))
    x = b.add("LeakyRelu", b.add("Cast", x, to=kind), alpha=0.1)
    pair = b.add("DequantizeLinear", b.add("QuantizeLinear", x, step, "zero"), step, "zero")
    x = b.add("Conv", pair, b.add("DequantizeLinear", "weights", steps, axis=0))
    x = b.add("Transpose", b.add("Reshape", x, "wide"), perm=[0, 1, 5, 2, 6, 3, 7, 4])
    x = b.add("Reshape", x, "grid")
    b.add("Cast", x, to=TensorProto.FLOAT)
    model = simplify(load_graph(b.save(tmp_path / "low.onnx", "logits", 4, opset=opset)))
    assert [one.rule for one in violations(model)] == ["kernel shape"]
    write_kernel_shapes(model)
    assert violations(model) == ()
    quantize = node_of(model, "QuantizeLinear")
    quantize.replace_input_with(0, node_of(model, "InstanceNormalization").outputs[0])
    assert [(one.rule, one.node) for one in violations(model)] == [("scale type", quantize.name)]


def test_written_kernel_shapes_are_those_of_the_weights() -> None:
    model = copied(example("unet", "tensorrt")[0])
    write_kernel_shapes(model)
    for node in model.graph:
        if node.op_type in ("Conv", "ConvTranspose"):
            assert tuple(node.attributes["kernel_shape"].as_ints()) == shape_of(node.inputs[1])[2:]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


# advice


def test_a_residual_branch_in_floating_point_is_advice() -> None:
    model = good("resized")
    node = node_of(model, "Add")
    branch = next(index for index, value in enumerate(node.inputs) if value.producer().op_type == "MaxPool")
    relu = ir.node("Relu", [node.inputs[branch]], name="planted")
    model.graph.insert_before(node, relu)
    node.replace_input_with(branch, relu.outputs[0])
    assert violations(model) == ()
    assert [(one.rule, one.node) for one in advice(model)] == [("residual branch", node.name)]


def test_a_kept_factor_and_output_padding_behind_are_advice() -> None:
    model = good("unet")
    node = node_of(model, "Conv", 1)
    replaced(model, node, 1, np.ones(shape_of(node.inputs[1]), np.float32))
    attribute("ConvTranspose", output_padding=[1, 0, 0])(model)
    assert violations(model) == ()
    names = [("float weights", node.name), ("output padding", node_of(model, "ConvTranspose").name)]
    assert [(one.rule, one.node) for one in advice(model)] == names
