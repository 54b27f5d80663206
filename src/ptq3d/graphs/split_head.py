"""The late head: a graph without its last linear map over channels, and that map.

Blending windows and resampling linearly commute with a linear map over channels. So the few features in front of the map are
blended and resampled, and the map with its many classes runs once a voxel: exact in real numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from ptq3d.graphs.layers import groups, shape_of, weight_axis
from ptq3d.graphs.low_precision import TENSOR, cast
from ptq3d.head import Head

MONOTONE = frozenset(
    {"Softmax", "LogSoftmax", "Sigmoid", "Identity"}
)  # over classes: they leave the argmax where it is
FLOATS = frozenset({ir.DataType.FLOAT, *TENSOR})
TO_LAST, TO_FIRST = [0, 2, 3, 4, 1], [0, 4, 1, 2, 3]


@dataclass(frozen=True, eq=False)
class Split:
    """A graph in two, or why it stays whole.

    Args:
        body: gives (1, F, X, Y, Z) features: float32, or the 8-bit integers that the head reads; where there is no head to take
            off the whole graph, up to its logits.
        head: its scale and zero-point are folded into the map; None where the graph stays whole.
        reason: for the manifest.
    """

    body: ir.Model
    head: Head | None
    reason: str


def split_head(model: ir.Model, *, late: bool = True) -> Split:
    """Take the last linear map over channels off a graph, where its input is narrower than its output.

    The map is a 1x1x1 convolution, or a product with constant weights between two transpositions. A softmax or sigmoid at the end
    is dropped in any case: it does not move the argmax, and logits are what is blended.

    Args:
        model: simplified, FP32 or Q/DQ; not changed.
        late: False leaves the map in the graph.

    Returns:
        The two parts; equal to `model` (without what was dropped) within rounding of float32.
    """
    body = model.clone()
    value = _before_monotone(body.graph.outputs[0])
    _end_at(body, value)
    found = (_of_convolution(value) or _of_product(value)) if late else None
    if found is None:
        return Split(body, None, f"whole: {_why(value) if late else 'asked for'}")
    features, weight, bias = found
    if features.producer() is None:
        return Split(body, None, "whole: the network is nothing but its last layer")
    if weight.shape[1] >= weight.shape[0]:
        why = f"{weight.shape[1]} features are no fewer than the {weight.shape[0]} classes they make"
        return Split(body, None, f"whole: {why}")
    features, weight, bias = _integers(features, weight, bias)
    _end_at(body, features)
    head = Head(weight.astype(np.float32), bias.astype(np.float32))
    return Split(body, head, f"late head: {head.features} features for {head.classes} classes")


def head_layer_of(model: ir.Model) -> str | None:
    """The name of the layer that `split_head` takes off a graph, None where it leaves the graph whole."""
    value = _before_monotone(model.graph.outputs[0])
    if split_head(model).head is None:
        return None
    node = value.producer()
    while node is not None and node.op_type not in ("Conv", "MatMul"):
        node = next(source for one in node.inputs if one is not None and (source := one.producer()) is not None)
    return None if node is None else str(node.name)


def _end_at(model: ir.Model, value: ir.Value) -> None:
    """Make `value` the only output, in FP32 where it is FP16 or BF16; what it does not need goes."""
    if value.dtype in TENSOR:
        full = (node.outputs[0] for node, _ in value.uses() if _is_cast(node) and node.outputs[0].dtype not in TENSOR)
        value = next(full, None) or cast(model, value, ir.DataType.FLOAT, f"{value.name}/fp32")
    if list(model.graph.outputs) != [value]:
        model.graph.outputs[:] = [value]
        common.RemoveUnusedNodesPass()(model)


def _why(value: ir.Value) -> str:
    node = value.producer()
    kind = "nothing" if node is None else node.op_type
    return f"the last layer is {kind}, no linear map over channels with constant weights"


_Map = tuple[ir.Value, NDArray[np.float64], NDArray[np.float64]]
"""What a linear map reads, its weights (K, F) and its bias (K,)."""


def _before_monotone(value: ir.Value) -> ir.Value:
    node = value.producer()
    while node is not None and node.inputs[0] is not None and (_is_monotone(node) or _is_cast(node)):
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_monotone(node: ir.Node) -> bool:
    return node.op_type in MONOTONE and _over_channels(node)


def _is_cast(node: ir.Node) -> bool:
    """Whether a node only gives another floating-point type."""
    return node.op_type == "Cast" and {node.inputs[0].dtype, node.outputs[0].dtype} <= FLOATS  # type: ignore[union-attr]


def _over_channels(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    rank = len(shape_of(node.outputs[0]))
    return not node.op_type.endswith("Softmax") or (-1 if axis is None else axis.as_int()) % rank == 1


def _of_convolution(value: ir.Value) -> _Map | None:
    """A 1x1x1 convolution of constant weights; padding would make more voxels than it reads."""
    node = value.producer()
    if node is None or node.op_type != "Conv" or groups(node) != 1 or node.inputs[0] is None:
        return None
    weight = real_constant(node.inputs[1], weight_axis(node))
    bias = real_constant(node.inputs[2], 0) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    same_voxels = shape_of(node.inputs[0])[2:] == shape_of(value)[2:]
    if weight is None or weight.shape[2:] != (1, 1, 1) or not same_voxels:
        return None
    if bias is None:
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            return None
        bias = np.zeros(len(weight))
    return node.inputs[0], weight[:, :, 0, 0, 0], bias


def _of_product(value: ir.Value) -> _Map | None:
    """Transpose -> MatMul with constant weights (-> Add of a constant) -> Transpose back."""
    back = value.producer()
    if back is None or not _permutes(back, TO_FIRST) or back.inputs[0] is None:
        return None
    node, bias = back.inputs[0].producer(), None
    if node is not None and node.op_type == "Add":
        bias = next((found for one in node.inputs if (found := real_constant(one, 0)) is not None), None)
        sums = [one for one in node.inputs if one is not None and real_constant(one, 0) is None]
        node = sums[0].producer() if len(sums) == 1 else None
        if bias is None or bias.ndim != 1:
            return None
    weight = None if node is None or node.op_type != "MatMul" else real_constant(node.inputs[1], 1)
    forth = None if node is None or node.inputs[0] is None else node.inputs[0].producer()
    if weight is None or weight.ndim != 2 or forth is None or not _permutes(forth, TO_LAST) or forth.inputs[0] is None:
        return None
    return forth.inputs[0], weight.T, np.zeros(weight.shape[1]) if bias is None else bias


def _permutes(node: ir.Node, order: list[int]) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == order


def real_constant(value: ir.Value | None, axis: int) -> NDArray[np.float64] | None:
    """A constant, or a dequantized one, in real numbers; None where it depends on the input.

    Args:
        value: a weight or bias.
        axis: of its scales, where it has one a channel and does not say.
    """
    if value is None:
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy(), np.float64)
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    integers, step = real_constant(node.inputs[0], axis), real_constant(node.inputs[1], axis)
    if integers is None or step is None:
        return None
    zero = real_constant(node.inputs[2], axis) if len(node.inputs) > 2 else np.zeros(())
    given = node.attributes.get("axis")
    shape = [1] * integers.ndim
    if step.size > 1:
        shape[axis if given is None else given.as_int()] = -1
    return None if zero is None else (integers - _along(zero, shape)) * step.reshape(shape if step.size > 1 else ())


def _along(zero: NDArray[np.float64], shape: list[int]) -> NDArray[np.float64]:
    return zero.reshape(shape if zero.size > 1 else ())


def _integers(features: ir.Value, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> _Map:
    """The integers behind dequantized features, a quarter of the bytes; (q - zero) * step goes into the map."""
    node = features.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return features, weight, bias
    integers, step = node.inputs[0], real_constant(node.inputs[1], 0)
    zero = real_constant(node.inputs[2], 0) if len(node.inputs) > 2 else np.zeros(())
    if step is None or zero is None or step.size != 1 or integers.producer() is None:
        return features, weight, bias
    scaled = weight * step.reshape(())
    return integers, scaled, bias - scaled.sum(axis=1) * zero.reshape(())
