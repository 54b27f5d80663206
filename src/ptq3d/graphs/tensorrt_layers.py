"""TensorRT's rules about layers whose weights and inputs are quantized.

`onnx-tensorrt` below is the repository of its ONNX parser, read at its tag for 10.1; `NvInfer.h` its header.
"""

from __future__ import annotations

import onnx_ir as ir

from ptq3d.graphs.layers import WEIGHT_AXIS, groups, shape_of, weight_axis
from ptq3d.graphs.node_rules import Setting, is_stored, maker, number, on, operand, rank_of
from ptq3d.graphs.passes import QDQ
from ptq3d.graphs.tensorrt_operators import pads_behind
from ptq3d.graphs.tensorrt_qdq import KEEP, RETARGET, steps_of

INT8_GROUP = 4
# what dequantized values pass unchanged, so that TensorRT moves Q and DQ over it
MOVERS = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
    | {"Slice", "Gather", "Split", "Expand", "DepthToSpace", "SpaceToDepth"}
)


@on(*WEIGHT_AXIS)
def quantized_bias(node: ir.Node, _: Setting) -> str | None:
    """Biases stay in floating point; a DQ of int32 is none of TensorRT's.

    Source: NvInfer.h of 11.1, IDequantizeLayer.
    """
    producer = maker(operand(node, 2))
    if producer is None or producer.op_type not in QDQ:
        return None
    return f"its bias is quantized, TensorRT wants it in floating point: {RETARGET}."


@on(*WEIGHT_AXIS)
def channel_axis(node: ir.Node, _: Setting) -> str | None:
    """Weights have their scales along the output channels: Conv 0, ConvTranspose 1, MatMul last, Gemm as transB has it.

    A grouped ConvTranspose has no such axis.

    Source: NvInfer.h, IConvolutionLayer (KCRS); Model-Optimizer onnx/quantization/qdq_utils.py; TensorRT's
    pytorch-quantization since 10.2 (ConvTranspose).
    """
    producer = maker(operand(node, 1))
    if producer is None or producer.op_type not in QDQ or steps_of(producer) == 1 or "axis" not in producer.attributes:
        return None
    if not _stored_weights(node):
        return None
    rank = rank_of(node.inputs[1]) or 1
    found, wanted = number(producer, "axis") % rank, weight_axis(node) % rank
    if node.op_type == "ConvTranspose" and groups(node) > 1:
        return (
            f"the weights of a grouped ConvTranspose have {steps_of(producer)} steps, TensorRT takes one: {RETARGET}."
        )
    if found == wanted:
        return None
    return f"its weights have their steps along axis {found}, TensorRT's {node.op_type} wants {wanted}: {RETARGET}."


def dequantized(value: ir.Value | None) -> bool:
    """Whether a tensor is dequantized integers, straight or through concats and moves."""
    producer = maker(value)
    if producer is None:
        return False
    if producer.op_type == "Concat":
        return all(dequantized(piece) for piece in producer.inputs)
    if producer.op_type in MOVERS:
        return dequantized(operand(producer, 0))
    return producer.op_type == "DequantizeLinear"


def _runs_in_int8(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in WEIGHT_AXIS and all(map(dequantized, node.inputs[:2]))


def _stored_weights(node: ir.Node) -> bool:
    """Whether a layer multiplies with a constant of the file, quantized or not."""
    value = operand(node, 1)
    while value is not None and not is_stored(value):
        producer = maker(value)
        value = operand(producer, 0) if producer is not None and producer.op_type in (*QDQ, *MOVERS) else None
    return value is not None


@on(*WEIGHT_AXIS)
def half_quantized_layer(node: ir.Node, _: Setting) -> str | None:
    """A layer with quantized weights reads dequantized integers: otherwise it is none of INT8, though the file asks for it.

    The other way round, or of two activations, it is a layer in floating point behind a tensor that others want quantized,
    as --keep makes them: see `advice`.

    Source: developer guide, "Explicit Quantization", placement of Q/DQ: all inputs of weighted operations.
    """
    if not _has_quantized_weights_only(node):
        return None
    return f"only its weights are quantized, so that it runs in floating point: {RETARGET}."


@on("Conv", "ConvTranspose")
def int8_groups(node: ir.Node, _: Setting) -> str | None:
    """An INT8 convolution of several groups has a multiple of four channels in each, on both sides.

    Source: NvInfer.h of 11.1, IConvolutionLayer and IDeconvolutionLayer, setNbGroups.
    """
    count = groups(node)
    sides = (shape_of(operand(node, 0))[1:2] or (0,))[0] // count, (shape_of(node.outputs[0])[1:2] or (0,))[0] // count
    if count == 1 or not _runs_in_int8(node) or not any(side % INT8_GROUP for side in sides):
        return None
    return f"its {count} groups of {sides[0]} to {sides[1]} channels are no multiples of {INT8_GROUP} as INT8 wants: {KEEP} '{node.name}'."


@on("Conv")
def kernel_shape(node: ir.Node, setting: Setting) -> str | None:
    """A Conv whose weights are no constant, but for example dequantized, has its kernel_shape written before TensorRT 10.4.

    Source: Changelog of 10.4; onnx-tensorrt importerUtils.cpp, convMultiInput.
    """
    if setting.version >= (10, 4) or is_stored(operand(node, 1)) or "kernel_shape" in node.attributes:
        return None
    return f"kernel_shape is not written, which TensorRT 10.3 does not infer of quantized weights: {RETARGET}."


@on("Add")
def residual_branch(node: ir.Node, _: Setting) -> str | None:
    """The other branch of an Add behind an INT8 layer is quantized, too, so that the Add runs inside of the layer.

    Source: developer guide, "Explicit Quantization", placement of Q/DQ: residual inputs of skip connections.
    """
    layers = [_runs_in_int8(maker(value)) for value in node.inputs]
    if not any(layers) or any(dequantized(value) or is_stored(value) for value in node.inputs):
        return None
    branch = node.inputs[1 if layers[0] else 0]
    return f"its branch '{None if branch is None else branch.name}' is not quantized, so that the Add runs by itself: {RETARGET}."


@on(*WEIGHT_AXIS)
def float_weights(node: ir.Node, _: Setting) -> str | None:
    """Who reads dequantized integers multiplies them with such.

    Source: developer guide, "Explicit Quantization", placement of Q/DQ: all inputs of weighted operations.
    """
    sides = [dequantized(value) for value in node.inputs[:2]]
    if all(sides) or not any(sides) or _has_quantized_weights_only(node):
        return None
    return "only one of its factors is quantized, so that it dequantizes for nothing and runs in floating point."


def _has_quantized_weights_only(node: ir.Node) -> bool:
    return _stored_weights(node) and dequantized(operand(node, 1)) and not dequantized(operand(node, 0))


@on("ConvTranspose")
def output_padding_behind(node: ir.Node, _: Setting) -> str | None:
    """Output padding is no larger than the pads at the end; what is more comes behind the layer, and its bias then, too.

    Source: onnx-tensorrt onnxOpImporters.cpp, ConvTranspose.
    """
    if not pads_behind(node):
        return None
    return "its output padding is larger than its pads at the end, so that padding and bias run by themselves."
