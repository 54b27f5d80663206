"""Damage to good Q/DQ graphs, each of which breaks one rule of TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.layers import shape_of

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
    attribute("ConvTranspose", output_padding=[1, 2, 1])(model)
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
    ("channel axis", "overlapping", another_axis("ConvTranspose", 0)),
    ("channel axis", "attention", another_axis("MatMul", 0)),
    ("block scales", "unet", in_blocks),
    ("output type", "unet", attribute("QuantizeLinear", output_dtype=ir.DataType.UINT8.value)),
    ("output type", "unet", attribute("DequantizeLinear", output_dtype=ir.DataType.FLOAT.value)),
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
    ("automatic padding", "overlapping", attribute("ConvTranspose", auto_pad="VALID", pads=[0] * 6)),
    ("output padding", "overlapping", padded_behind),
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
