"""The weighted layers of a graph: what multiplies, how much, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

# operator -> output-channel axis of its constant weight (input 1)
WEIGHT_AXIS: Mapping[str, int] = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}


@dataclass(frozen=True)
class Layer:
    """One node that multiplies and accumulates.

    Args:
        name: the node's name.
        op: its ONNX operator.
        inputs: names of its activation inputs (one, or two for a product of activations).
        weight: name of the FP32 or INT8 tensor of its weights, None for a product of activations.
        output: name of its output tensor.
        macs: multiply-accumulates for one run of the graph.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    weight: str | None
    output: str
    macs: int


def layers(model: ir.Model) -> list[Layer]:
    """Every Conv, ConvTranspose, Gemm and MatMul of a simplified graph, in its order.

    Args:
        model: after `simplify`, so that shapes and names are known; FP32 or Q/DQ.
    """
    return [_layer(node) for node in model.graph if node.op_type in WEIGHT_AXIS]


def weight_value(node: ir.Node) -> ir.Value | None:
    """The stored weights of a node (behind their Q/DQ, if any), None where input 1 is an activation."""
    value = node.inputs[1]
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return None
        value = producer.inputs[0]
    return value


def weight_axis(node: ir.Node) -> int:
    """The output-channel axis of a node's weights; Gemm's depends on transB."""
    if node.op_type == "Gemm" and _flag(node, "transB"):
        return 0
    if node.op_type == "MatMul":
        weight = weight_value(node)
        return (len(weight.shape) if weight is not None and weight.shape is not None else 2) - 1
    return WEIGHT_AXIS[node.op_type]


def groups(node: ir.Node) -> int:
    """The number of groups of a convolution, 1 for other nodes."""
    attribute = node.attributes.get("group")
    return attribute.as_int() if attribute is not None else 1


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and attribute.as_int() != 0


def _layer(node: ir.Node) -> Layer:
    weight = weight_value(node)
    activations = node.inputs[:1] if weight is not None else node.inputs[:2]
    names = tuple(str(value.name) for value in activations if value is not None)
    return Layer(
        str(node.name),
        node.op_type,
        names,
        weight.name if weight is not None else None,
        str(node.outputs[0].name),
        _macs(node),
    )


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of a tensor; a free dimension counts as 1."""
    if value is None or value.shape is None:
        return ()
    return tuple(dim if isinstance(dim, int) else 1 for dim in value.shape)


def _macs(node: ir.Node) -> int:
    """Outputs x weights per output (Conv, Gemm, MatMul); inputs x weights per input (ConvTranspose)."""
    output, first, second = shape_of(node.outputs[0]), shape_of(node.inputs[0]), shape_of(node.inputs[1])
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    depth = first[-2] if node.op_type == "Gemm" and _flag(node, "transA") else first[-1]
    return math.prod(output) * depth


def parameter_count(model: ir.Model) -> int:
    """The number of stored weights of every kind."""
    return sum(int(np.prod(shape_of(value))) for value in model.graph.initializers.values())
