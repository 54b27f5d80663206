"""A Plan into a graph as QuantizeLinear / DequantizeLinear, and back out of one."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.errors import GraphError
from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.layers import WEIGHT_AXIS, layers, weight_value
from ptq3d.graphs.passes import infer_shapes, is_quantized
from ptq3d.int8 import Scale, quantize
from ptq3d.quantization.planning import Plan
from ptq3d.quantization.targets import MOVES


def write(model: ir.Model, plan: Plan) -> ir.Model:
    """`model` with the plan's Q/DQ, in place; its weights are stored as INT8.

    An activation is quantized once, behind its producer; the layers of the plan, and the concats and moves in front of
    them, read the dequantized tensor, everything else goes on reading the FP32 one.

    Args:
        model: the simplified FP32 graph that was planned.
        plan: scales for its tensors.

    Raises:
        GraphError: the graph is quantized already.
    """
    if is_quantized(model):
        raise GraphError("the graph holds Q/DQ nodes already. Quantize the FP32 file, or deploy this one as it is.")
    for name, scale in plan.activations.items():
        _quantize_activation(model, name, scale, set(plan.layers))
    done: set[str] = set()
    for node in list(model.graph):
        if node.name in plan.layers:
            _quantize_weight(model, node, plan, done)
    common.TopologicalSortPass()(model)
    infer_shapes(model)
    return model


def _quantize_activation(model: ir.Model, name: str, scale: Scale, chosen: set[str]) -> None:
    value = _value(model, name)
    readers = [(node, index) for node, index in value.uses() if _reads_int8(node, index, chosen)]
    constants = _constants(model, name, scale)
    quantized = ir.node("QuantizeLinear", [value, *constants], name=f"{name}/Q")
    dequantized = ir.node("DequantizeLinear", [quantized.outputs[0], *constants], name=f"{name}/DQ")
    quantized.outputs[0].name, dequantized.outputs[0].name = f"{name}/q", f"{name}/dq"
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [quantized, dequantized])
    else:
        model.graph.insert_after(producer, [quantized, dequantized])
    for node, index in readers:
        node.replace_input_with(index, dequantized.outputs[0])


def _reads_int8(node: ir.Node, index: int, chosen: set[str]) -> bool:
    """Whether this use leads to an INT8 layer: directly, or through concats and moves."""
    if node.name in chosen:
        return index == 0 or (index == 1 and weight_value(node) is None)
    if node.op_type == "Concat" or (node.op_type in MOVES and index == 0):
        return any(_reads_int8(reader, place, chosen) for reader, place in node.outputs[0].uses())
    return False


def _quantize_weight(model: ir.Model, node: ir.Node, plan: Plan, done: set[str]) -> None:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or weight.name is None:
        return
    name, scale = weight.name, plan.weights[weight.name]
    if name in done:
        return
    done.add(name)
    integers = quantize(weight.const_value.numpy(), scale)
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


def _constants(model: ir.Model, name: str, scale: Scale) -> list[ir.Value]:
    """Step and zero-point; ONNX's default (uint8, zero-point 0) needs none, and a runtime one subtraction less."""
    step = add_constant(model, f"{name}/step", scale.step)
    if scale.dtype == "uint8" and not scale.zero_point.any():
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


def integer_layers(model: ir.Model) -> frozenset[str]:
    """Names of the multiplying nodes of a Q/DQ graph whose inputs are both dequantized integers."""
    return frozenset(
        str(node.name)
        for node in model.graph
        if node.op_type in WEIGHT_AXIS and all(_is_dequantized(value) for value in node.inputs[:2])
    )


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    if producer is None:
        return False
    if producer.op_type == "Concat":
        return all(_is_dequantized(piece) for piece in producer.inputs)
    if producer.op_type in MOVES:
        return _is_dequantized(producer.inputs[0])
    return producer.op_type == "DequantizeLinear"
