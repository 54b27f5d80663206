"""TensorRT's rules: kept by every graph that is written for it, and told one by one where a graph breaks them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from broken_graphs import (
    PLANTED,
    Damage,
    appended,
    attribute,
    dynamic_input,
    node_of,
    replaced,
    stored,
    too_large,
    with_opset,
)
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


def overlapping(path: Path) -> ir.Model:
    """A transposed convolution whose patches overlap, padded at its end as far as it is cut there."""
    b = Builder(7)
    x = b.add("Relu", b.conv("image", 1, 6, stride=2))
    pads, more = [1] * 6, [1] * 3
    x = b.add(
        "ConvTranspose", x, b.weight(6, 5, 3, 3, 3), b.weight(5), strides=[2, 2, 2], pads=pads, output_padding=more
    )
    b.conv(x, 5, 3, kernel=1)
    return simplify(load_graph(b.save(path, "logits", 3)))


def good(network: str) -> ir.Model:
    """A small network as it is written for TensorRT, with observed scales."""
    if network == "overlapping":
        with TemporaryDirectory() as folder:
            return quantized(overlapping(Path(folder) / "n.onnx"))
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


def int8_said_twice(model: ir.Model) -> None:
    attribute("QuantizeLinear", output_dtype=ir.DataType.INT8.value)(model)


def int8_said_by_the_attribute(model: ir.Model) -> None:
    attribute("QuantizeLinear", output_dtype=ir.DataType.INT8.value)(model)
    node_of(model, "QuantizeLinear").resize_inputs(2)


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
        int8_said_twice,
        int8_said_by_the_attribute,
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


def test_a_kept_factor_is_advice() -> None:
    model = good("unet")
    node = node_of(model, "Conv", 1)
    replaced(model, node, 1, np.ones(shape_of(node.inputs[1]), np.float32))
    assert violations(model) == ()
    assert [(one.rule, one.node) for one in advice(model)] == [("float weights", node.name)]


@pytest.mark.parametrize(("more", "told"), [(0, False), (1, False), (2, True)])
def test_output_padding_beyond_the_pads_is_advice(more: int, told: bool) -> None:
    model = good("overlapping")
    name = attribute("ConvTranspose", output_padding=[1, 1, more])(model)
    assert violations(model) == ()
    assert [(one.rule, one.node) for one in advice(model)] == [("output padding", name)] * told
