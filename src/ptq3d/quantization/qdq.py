"""A Plan into a graph as QuantizeLinear / DequantizeLinear; `read` (in reading.py) takes it back out of one."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.errors import GraphError
from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.layers import layers
from ptq3d.graphs.passes import infer_shapes, insert_behind, is_quantized
from ptq3d.int8 import Scale
from ptq3d.quantization.planning import Plan, reads_int8
from ptq3d.quantization.reading import integer_layers as integer_layers
from ptq3d.quantization.reading import integers_of
from ptq3d.quantization.reading import read as read


def write(model: ir.Model, plan: Plan) -> ir.Model:
    """`model` with the plan's Q/DQ, in place; its weights are stored as INT8.

    An activation is quantized once, behind its producer; the layers of the plan, the concats and moves in front of them,
    and the plan's other readers read the dequantized tensor, everything else goes on reading the FP32 one.

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
    done: set[str] = set()
    for node in list(model.graph):
        if node.name in plan.layers:
            _quantize_weight(model, node, plan, done)
    common.TopologicalSortPass()(model)
    infer_shapes(model)
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
