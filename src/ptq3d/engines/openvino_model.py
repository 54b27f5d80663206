"""What is done to a network so that OpenVINO keeps it small and runs it fast; none of it changes an answer by more than rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from ptq3d.errors import EngineError
from ptq3d.graphs.constants import LEAST_BYTES, add_constant
from ptq3d.graphs.layers import shape_of
from ptq3d.graphs.passes import infer_shapes, insert_behind

MOVERS = ("Concat", "Gather", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Slice", "Transpose")


def tables_as_inputs(model: ir.Model) -> dict[str, NDArray[np.generic]]:
    """Make an input of every constant that is gathered by constants, so that no conversion can fold it; they are returned."""
    tables = {}
    for node in model.graph:
        fixed = [value for value in node.inputs if value is not None and value.const_value is not None]
        if node.op_type == "Gather" and len(fixed) == len(node.inputs) and fixed[0].name not in tables:
            table = fixed[0]
            tables[str(table.name)] = table.const_value.numpy()  # type: ignore[union-attr]
            model.graph.initializers.pop(str(table.name))
            table.const_value = None
            model.graph.inputs.append(table)
    return tables


def inputs_as_constants(model: Any, tables: Mapping[str, NDArray[np.generic]]) -> None:
    """The reverse, in OpenVINO's model."""
    from openvino import opset13 as ops

    for name, table in tables.items():
        parameter = model.input(name).get_node()
        fixed = ops.constant(table)
        for reader in parameter.output(0).get_target_inputs():
            reader.replace_source_output(fixed.output(0))
        model.remove_parameter(parameter)


def halve_constants(model: Any) -> None:
    """Large float32 constants as float16 where that is exact, as it is after quantization."""
    from openvino import opset13 as ops

    for constant in model.get_ordered_ops():
        if constant.get_type_name() != "Constant" or constant.get_element_type().to_string() != "f32":
            continue
        if constant.get_byte_size() < LEAST_BYTES:
            continue
        with np.errstate(over="ignore"):
            half = constant.data.astype(np.float16)
        if np.array_equal(half.astype(np.float32), constant.data):
            full = ops.convert(ops.constant(half), "f32")
            for reader in constant.output(0).get_target_inputs():
                reader.replace_source_output(full.output(0))


def one_at_a_time(model: Any) -> Any:
    """The model with a free batch made one, in place: without a size it cannot be laid out."""
    shape = model.input(0).get_partial_shape()
    if shape.is_dynamic:
        model.reshape([size.get_length() if size.is_static else 1 for size in shape])
    return model


def channels_last(model: Any) -> Any:
    """The model with channels as the last axis of its output, as OpenVINO's own kernels have them.

    Saves the turning of every answer.
    """
    from openvino import Layout, preprocess

    changed = preprocess.PrePostProcessor(model)
    changed.output(0).model().set_layout(Layout("NCDHW"))
    changed.output(0).tensor().set_layout(Layout("NDHWC"))
    return changed.build()


def sum_apart(model: Any) -> Any:
    """The model with a last sum that its convolution does not take in, in place.

    The plugin turns an answer for nothing, but not behind a convolution that adds a residual branch: there it moves every value
    twice. max(x + y, a x + a y) is the leaky ReLU of x + y, and reads each branch twice, which no
    convolution can take in.
    """
    from openvino import opset13 as ops

    node = model.outputs[0].get_node().input_value(0).get_node()
    while node.get_type_name() == "Multiply" and _is_constant(node.input_value(1)):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "PRelu" or node.input_value(0).get_node().get_type_name() != "Add":
        return model
    slope, added = node.input_value(1).get_node(), node.input_value(0).get_node().input_values()
    if not _is_constant(slope.output(0)) or not ((slope.data >= 0) & (slope.data <= 1)).all() or slope.data.size != 1:
        return model
    if any(_is_constant(value) for value in added) or not any(_is_convolution(value) for value in added):
        return model
    first, second = (ops.multiply(value, np.float32(slope.data.item())) for value in added)
    rectified = ops.maximum(ops.add(*added), ops.add(first, second))
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(rectified.output(0))
    model.validate_nodes_and_infer_types()
    return model


def _is_constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def _is_convolution(value: Any) -> bool:
    """Whether a convolution makes it, with its scale, bias and quantization."""
    node = value.get_node()
    if node.get_type_name() in ("Multiply", "Add", "Subtract", "FakeQuantize"):
        fed = [source for source in node.input_values() if not _is_folded(source)]
        return len(fed) == 1 and _is_convolution(fed[0])
    return bool(node.get_type_name() == "Convolution")


def _is_folded(value: Any) -> bool:
    """Whether it is a constant, perhaps converted or reshaped."""
    node = value.get_node()
    return _is_constant(value) or (
        node.get_type_name() in ("Convert", "Reshape", "Unsqueeze") and all(map(_is_folded, node.input_values()))
    )


def readable(model: ir.Model) -> None:
    """Write what OpenVINO 2026.4 computes wrongly in another way, in place; the answers are those of ONNX.

    A Gather of channels between two convolutions: OpenVINO reorders their weights instead, and takes the order for its inverse,
    also in FP32. It gathers rightly along an axis of a flat tensor.

    Raises:
        EngineError: a padded mean of integers, for which no other way was found.
    """
    for node in list(model.graph):
        if node.op_type == "Gather" and _picks_channels(node):
            _gather_flat(model, node)
        if node.op_type == "AveragePool" and _averages_integers(node):
            raise EngineError(
                f"OpenVINO computes the padded AveragePool '{node.name}' of integers wrongly. Write the file for it: "
                "ptq3d quantize --onnx FILE --retarget openvino."
            )
    common.TopologicalSortPass()(model)
    infer_shapes(model)


def _picks_channels(node: ir.Node) -> bool:
    axis, indices = node.attributes.get("axis"), node.inputs[1]
    constant = indices is not None and indices.const_value is not None and len(shape_of(indices)) == 1
    return constant and axis is not None and axis.as_int() == 1 and len(shape_of(node.inputs[0])) > 3


def _gather_flat(model: ir.Model, node: ir.Node) -> None:
    flat, back = (
        add_constant(model, f"{node.name}/{name}", np.asarray(shape, np.int64))
        for name, shape in (("flat", (*shape_of(node.inputs[0])[:2], -1)), ("back", shape_of(node.outputs[0])))
    )
    before = ir.node("Reshape", [node.inputs[0], flat], name=f"{node.name}/Flat")
    chosen = ir.node("Gather", [before.outputs[0], node.inputs[1]], {"axis": 1}, name=f"{node.name}/Flat/Gather")
    after = ir.node("Reshape", [chosen.outputs[0], back], name=f"{node.name}/Back")
    _replace(model, node, [before, chosen, after])


def _averages_integers(node: ir.Node) -> bool:
    """Whether a padded mean reads dequantized integers, straight or through operators that move them."""
    pads, value = node.attributes.get("pads"), node.inputs[0]
    while value is not None and (maker := value.producer()) is not None and maker.op_type in MOVERS:
        value = maker.inputs[0]
    maker = None if value is None else value.producer()
    return pads is not None and any(pads.as_ints()) and maker is not None and maker.op_type == "DequantizeLinear"


def _replace(model: ir.Model, node: ir.Node, nodes: list[ir.Node]) -> None:
    for one in nodes:
        one.outputs[0].name = f"{one.name}_out"
    insert_behind(model, node.outputs[0], nodes)
    last = nodes[-1].outputs[0]
    for reader, index in list(node.outputs[0].uses()):
        reader.replace_input_with(index, last)
    model.graph.remove(node, safe=True)
