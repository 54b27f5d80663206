"""What is done to a network so that OpenVINO keeps it small and runs it fast; none of it changes an answer by more than rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq3d.graphs.constants import LEAST_BYTES


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
