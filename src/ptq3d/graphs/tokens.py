"""Transformers' tokens in as many axes as they need.

A tensor of tokens (1, X, Y, Z, F) looks like an image of X channels to a runtime that knows five axes as (N, C, X, Y, Z): OpenVINO
turns it around in memory in front of every normalization and product. As (1, X * Y * Z, F) it is left as it lies. And masks that
are added through an extra first axis keep a runtime from seeing attention as one pattern.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.layers import shape_of

IMAGE_AXES = 5
BY_VALUE = frozenset({"Add", "Mul", "Gelu", "Relu", "Sigmoid", "Tanh", "Elu"})


def shorten_tokens(model: ir.Model) -> None:
    """Let normalizations, products and functions of tokens work on (1, tokens, features), and drop an extra first axis of masks.

    The same values in the same order, so exact.

    Args:
        model: simplified FP32 graph with shapes, changed in place.
    """
    _drop_first_axes(model)
    flat: dict[str, ir.Value] = {}
    for node in _nodes_of_tokens(model):
        for index, value in enumerate(node.inputs):
            if value is not None and value.const_value is None:
                node.replace_input_with(index, _flat(model, value, flat))
        _give_flat(model, node, flat)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)


def _nodes_of_tokens(model: ir.Model) -> list[ir.Node]:
    """Nodes that need only the last axis of five or more, around normalizations and one another; in graph order."""
    able = {node: values for node in model.graph if (values := _values(node)) is not None}
    found = {node for node in able if node.op_type == "LayerNormalization"}
    tokens = {value.name for node in found for value in able[node]}
    while True:
        more = {node for node in able if node not in found and any(value.name in tokens for value in able[node])}
        if not more:
            return [node for node in model.graph if node in found]
        found |= more
        tokens |= {value.name for node in more for value in able[node]}


def _values(node: ir.Node) -> list[ir.Value] | None:
    """The tensors a node works on feature by feature or value by value, all of one shape but for the features; None for others."""
    output = node.outputs[0]
    shape = shape_of(output) if output.shape is not None else ()
    if len(shape) < IMAGE_AXES or len(node.outputs) > 1:
        return None
    moving = [value for value in node.inputs if value is not None and value.const_value is None]
    fixed = [shape_of(value) for value in node.inputs if value is not None and value.const_value is not None]
    same = all(shape_of(value)[:-1] == shape[:-1] for value in moving)
    if node.op_type == "LayerNormalization":
        axis = node.attributes.get("axis")
        fits = axis is None or axis.as_int() in (-1, len(shape) - 1)
    elif node.op_type == "MatMul":
        fits = len(moving) == 1 and len(fixed[0]) == 2 and node.inputs[1] not in moving
    else:
        of_one_shape = all(shape_of(value) == shape for value in moving)
        fits = node.op_type in BY_VALUE and of_one_shape and all(len(one) <= 1 for one in fixed)
    return [*moving, output] if fits and same else None


def _flat(model: ir.Model, value: ir.Value, flat: dict[str, ir.Value]) -> ir.Value:
    """(1, tokens, features) of a tensor."""
    name = str(value.name)
    if name not in flat:
        shape = shape_of(value)
        node = _reshape(model, value, (1, math.prod(shape[:-1]), shape[-1]), f"{name}/tokens")
        producer = value.producer()
        model.graph.insert_before(model.graph[0], node) if producer is None else model.graph.insert_after(
            producer, node
        )
        flat[name] = node.outputs[0]
    return flat[name]


def _give_flat(model: ir.Model, node: ir.Node, flat: dict[str, ir.Value]) -> None:
    """Let a node make (1, tokens, features), and a Reshape the tensor that it made."""
    old = node.outputs[0]
    name, shape = str(old.name), shape_of(old)
    old.name = f"{name}/flat"
    back = _reshape(model, old, shape, name)
    for reader, index in list(old.uses()):
        if reader is not back:
            reader.replace_input_with(index, back.outputs[0])
    for index, output in enumerate(model.graph.outputs):
        if output is old:
            model.graph.outputs[index] = back.outputs[0]
    old.shape = ir.Shape((1, math.prod(shape[:-1]), shape[-1]))
    model.graph.insert_after(node, back)
    flat[name] = old


def _reshape(model: ir.Model, value: ir.Value, shape: tuple[int, ...], name: str) -> ir.Node:
    wanted = add_constant(model, f"{name}/shape", np.asarray(shape, np.int64))
    node = ir.node("Reshape", [value, wanted], name=f"{name}/Reshape")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, ir.Shape(shape)
    return node


def _drop_first_axes(model: ir.Model) -> None:
    """Reshape to (1, *shape), Add a constant, Reshape to `shape`: the same as adding the constant without its first axis."""
    for node in list(model.graph):
        if node.op_type != "Add" or len(list(node.outputs[0].uses())) != 1:
            continue
        left, mask = node.inputs
        before, after = left.producer() if left is not None else None, next(iter(node.outputs[0].uses()))[0]
        if before is None or mask is None or mask.const_value is None or {before.op_type, after.op_type} != {"Reshape"}:
            continue
        shape = shape_of(before.inputs[0])
        if shape_of(left) != (1, *shape) or shape_of(after.outputs[0]) != shape or shape_of(mask)[0] != 1:
            continue
        if len(shape_of(mask)) != len(shape) + 1:
            continue
        short = add_constant(model, f"{mask.name}/short", mask.const_value.numpy()[0])
        node.replace_input_with(0, before.inputs[0])
        node.replace_input_with(1, short)
        node.outputs[0].shape = ir.Shape(shape)
        ir.convenience.replace_all_uses_with(after.outputs[0], node.outputs[0])
