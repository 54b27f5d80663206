"""A Plan into a graph as QuantizeLinear / DequantizeLinear; `read` (in reading.py) takes it back out of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.errors import GraphError
from ptq3d.graphs.constants import add_constant, constant_of
from ptq3d.graphs.layers import layers, shape_of
from ptq3d.graphs.passes import infer_shapes, insert_behind, is_quantized, write_kernel_shapes
from ptq3d.graphs.pixel_shuffle import shuffle_pixels
from ptq3d.int8 import Scale
from ptq3d.quantization.planning import Plan, reads_int8
from ptq3d.quantization.reading import integer_layers as integer_layers
from ptq3d.quantization.reading import integers_of
from ptq3d.quantization.reading import read as read
from ptq3d.quantization.targets import TARGETS


def write(model: ir.Model, plan: Plan) -> ir.Model:
    """`model` with the plan's Q/DQ, in place; its weights are stored as INT8.

    An activation is quantized once, behind its producer; the layers of the plan, the concats and moves in front of them,
    and the plan's other readers read the dequantized tensor, everything else goes on reading the FP32 one. For a target that
    shuffles, a ConvTranspose becomes a convolution last of all: the plan that is read back has the convolution's names and axes.

    Args:
        model: the simplified FP32 graph that was planned.
        plan: scales for its tensors.

    Raises:
        GraphError: the graph is quantized already.
    """
    if is_quantized(model):
        raise GraphError("the graph holds Q/DQ nodes already. Quantize the FP32 file, or deploy this one as it is.")
    for name in plan.activations:
        _quantize_activation(model, name, plan)
    if plan.target in TARGETS and TARGETS[plan.target].channel_steps:
        for node in list(model.graph):
            _fold_channel_scales(model, node)
    done: set[str] = set()
    for node in list(model.graph):
        if node.name in plan.layers:
            _quantize_weight(model, node, plan, done)
    common.TopologicalSortPass()(model)
    infer_shapes(model)
    if plan.target in TARGETS and TARGETS[plan.target].shuffles:
        shuffle_pixels(model)
    if plan.target == "tensorrt":
        write_kernel_shapes(model)
    return model


def _quantize_activation(model: ir.Model, name: str, plan: Plan) -> None:
    value, scale = _value(model, name), plan.activations[name]
    chosen, others = set(plan.layers), plan.readers.get(name, frozenset())
    readers = [
        (node, index)
        for node, index in value.uses()
        if (node.name, index) in others or reads_int8(node, index, chosen, plan.activations)
    ]
    constants = _constants(model, name, scale, explicit=plan.target == "onnxruntime")
    axis = {} if scale.axis is None else {"axis": scale.axis}
    quantized = ir.node("QuantizeLinear", [value, *constants], axis, name=f"{name}/Q")
    dequantized = ir.node("DequantizeLinear", [quantized.outputs[0], *constants], axis, name=f"{name}/DQ")
    quantized.outputs[0].name, dequantized.outputs[0].name = f"{name}/q", f"{name}/dq"
    insert_behind(model, value, [quantized, dequantized])
    for node, index in readers:
        node.replace_input_with(index, dequantized.outputs[0])


def _fold_channel_scales(model: ir.Model, quantize: ir.Node) -> None:
    """x * s quantized with one step is x quantized with a step for each channel: the multiplication goes away."""
    product = quantize.inputs[0].producer() if quantize.op_type == "QuantizeLinear" and quantize.inputs[0] else None
    if product is None or product.op_type != "Mul" or len(list(product.outputs[0].uses())) > 1:
        return
    factors = product.inputs[1]
    if factors is None or factors.const_value is None or product.outputs[0].is_graph_output():
        return
    values = constant_of(factors)
    shape = shape_of(product.outputs[0])
    per_channel = len(shape) > 2 and values.shape == (1, shape[1], *[1] * (len(shape) - 2)) and values.size > 1
    if not per_channel or shape_of(product.inputs[0]) != shape or not (values > 0).all():
        return
    step, zero_point = quantize.inputs[1], quantize.inputs[2] if len(quantize.inputs) > 2 else None
    steps = add_constant(model, f"{quantize.name}/channel_steps", constant_of(step) / values.reshape(-1))
    inputs = [product.inputs[0], steps]
    if zero_point is not None and zero_point.const_value is not None:
        repeated = np.broadcast_to(zero_point.const_value.numpy(), (values.size,))
        inputs.append(add_constant(model, f"{quantize.name}/channel_zero_points", repeated))
    folded = ir.node("QuantizeLinear", inputs, {"axis": 1}, name=f"{quantize.name}/channels")
    folded.outputs[0].name = f"{quantize.outputs[0].name}/channels"
    model.graph.insert_before(quantize, folded)
    for node, index in list(quantize.outputs[0].uses()):
        node.replace_input_with(index, folded.outputs[0])
    model.graph.remove([quantize, product], safe=True)
    if not list(factors.uses()):
        del model.graph.initializers[str(factors.name)]


def _quantize_weight(model: ir.Model, node: ir.Node, plan: Plan, done: set[str]) -> None:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or weight.name is None:
        return
    name, scale = weight.name, plan.weights[weight.name]
    if name in done:
        return
    done.add(name)
    integers = integers_of(weight.const_value.numpy(), scale)
    stored = add_constant(model, f"{name}/q", integers)
    step = add_constant(model, f"{name}/step", scale.step)
    axis = scale.axis if scale.axis is not None else 0
    dequantized = ir.node("DequantizeLinear", [stored, step], {"axis": axis}, name=f"{name}/DQ")
    dequantized.outputs[0].name = f"{name}/dq"
    model.graph.insert_before(node, dequantized)
    for reader, index in list(weight.uses()):
        if reader.name in plan.layers:
            reader.replace_input_with(index, dequantized.outputs[0])
    if not list(weight.uses()):
        del model.graph.initializers[name]


def _constants(model: ir.Model, name: str, scale: Scale, *, explicit: bool) -> list[ir.Value]:
    """Step and zero-point; ONNX's default (uint8, zero-point 0) needs none, and a runtime one subtraction less.

    ONNX Runtime takes a Relu into the convolution only where it sees the zero-point.
    """
    step = add_constant(model, f"{name}/step", scale.step)
    if not explicit and scale.dtype == "uint8" and not scale.zero_point.any():
        return [step]
    return [step, add_constant(model, f"{name}/zero_point", scale.zero_point.astype(scale.dtype))]


def _value(model: ir.Model, name: str) -> ir.Value:
    for value in model.graph.inputs:
        if value.name == name:
            return value
    for node in model.graph:
        for value in node.outputs:
            if value.name == name:
                return value
    raise GraphError(f"the graph has no tensor '{name}'; the plan belongs to another graph.")


@dataclass(frozen=True)
class PlannedLayer:
    """One multiplying layer as a file holds it.

    Args:
        name: of the node.
        op: ONNX operator.
        macs: multiply-accumulates of one window.
        precision: "int8" where both inputs are dequantized integers, otherwise "float".
    """

    name: str
    op: str
    macs: int
    precision: str


def planned_layers(model: ir.Model) -> tuple[PlannedLayer, ...]:
    """Every multiplying layer of a simplified graph with the precision that its Q/DQ ask for."""
    integer = integer_layers(model)
    return tuple(
        PlannedLayer(layer.name, layer.op, layer.macs, "int8" if layer.name in integer else "float")
        for layer in layers(model)
    )
