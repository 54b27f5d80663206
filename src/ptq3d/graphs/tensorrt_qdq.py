"""TensorRT's rules about QuantizeLinear and DequantizeLinear themselves.

`onnx-tensorrt` below is the repository of its ONNX parser, read at its tag for 10.1; `NvInfer.h` its header.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.graphs.layers import WEIGHT_AXIS, shape_of
from ptq3d.graphs.node_rules import Setting, is_stored, maker, number, on, operand, rank_of, type_of
from ptq3d.graphs.passes import QDQ
from ptq3d.graphs.tensorrt_operators import FLOATS

RETARGET = "retarget it with `ptq3d quantize --onnx FILE --retarget tensorrt`"
KEEP = "leave it in floating point with --keep"
# the smallest numbers that a step may be: below, FP32 and BF16 are zero in the arithmetic of a GPU
SMALLEST = {ir.DataType.FLOAT: 2.0**-126, ir.DataType.BFLOAT16: 2.0**-126, ir.DataType.FLOAT16: 2.0**-24}


def _array(value: ir.Value | None) -> npt.NDArray[np.float64] | None:
    """A constant's values; None for what is none."""
    tensor = None if value is None else value.const_value
    return None if tensor is None else np.asarray(tensor.numpy()).astype(np.float64)


def steps_of(node: ir.Node) -> int:
    """How many steps a QuantizeLinear or DequantizeLinear has."""
    return math.prod(shape_of(operand(node, 1)))


@on(*QDQ)
def integer_type(node: ir.Node, _: Setting) -> str | None:
    """Q makes int8, and DQ reads int8: uint8 is refused, or taken as int8 (10.16, with a warning).

    A DQ is not told again what its Q is told, nor for a bias.

    Source: developer guide, "Explicit Quantization"; onnx-tensorrt onnxOpImporters.cpp, QuantDequantLinearHelper.
    """
    quantizes = node.op_type == "QuantizeLinear"
    producer = maker(operand(node, 0))
    if not quantizes and (_is_bias(node) or (producer is not None and producer.op_type == "QuantizeLinear")):
        return None
    kind = type_of(operand(node, 2 if quantizes else 0))
    if kind is None or kind == ir.DataType.INT8:
        return None
    return (
        f"it {'makes' if quantizes else 'reads'} {kind.name}, TensorRT quantizes to INT8 with zero-point 0: {RETARGET}."
    )


@on(*QDQ)
def zero_point(node: ir.Node, _: Setting) -> str | None:
    """Zero-points are int8 zeros of the file, one for each step; a Q without one makes uint8 in ONNX and int8 in TensorRT.

    Source: NvInfer.h, IQuantizeLayer; onnx-tensorrt onnxOpImporters.cpp, QuantDequantLinearHelper.
    """
    value = operand(node, 2)
    if value is None:
        if node.op_type == "DequantizeLinear" or number(node, "output_dtype"):
            return None
        return f"it has no zero-point, which means uint8 to ONNX and int8 to TensorRT: {RETARGET}."
    found = _array(value)
    if found is None:
        return f"its zero-point '{value.name}' is no constant of the file: {RETARGET}."
    if type_of(value) == ir.DataType.INT8 and found.any():
        return f"it has the zero-point {int(found[found != 0].flat[0])}, TensorRT knows 0 only: {RETARGET}."
    if found.size != steps_of(node):
        return f"it has {found.size} zero-points for {steps_of(node)} steps, TensorRT wants as many: {RETARGET}."
    return None


@on(*QDQ)
def constant_scale(node: ir.Node, _: Setting) -> str | None:
    """Scales are constants of the file.

    Source: NvInfer.h of 10.3, IQuantizeLayer and IDequantizeLayer.
    """
    value = operand(node, 1)
    if is_stored(value):
        return None
    return (
        f"its scale '{None if value is None else value.name}' is no constant of the file: quantize with static ranges."
    )


@on(*QDQ)
def scale_value(node: ir.Node, _: Setting) -> str | None:
    """Every scale is a finite number above 0 that does not vanish in its type.

    Source: onnx-tensorrt onnxOpImporters.cpp, QuantDequantLinearHelper.
    """
    steps, kind = _array(operand(node, 1)), type_of(operand(node, 1))
    smallest = SMALLEST.get(kind, 0.0) if kind is not None else 0.0
    wrong = [] if steps is None else steps[~(np.isfinite(steps) & (steps > 0) & (steps >= smallest))].tolist()
    if not wrong:
        return None
    return f"it has the scale {wrong[0]:g}, finite ones from {smallest:g} on are wanted: calibrate anew, or {KEEP}."


@on(*QDQ)
def scale_type(node: ir.Node, setting: Setting) -> str | None:
    """The scale is of the type that Q reads and DQ gives; from TensorRT 11 on Q takes an FP32 one always.

    Source: NvInfer.h of 10.3 and 11.1, IQuantizeLayer; onnx-tensorrt onnxOpImporters.cpp, QuantDequantLinearHelper.
    """
    kind = type_of(operand(node, 1))
    other = type_of(operand(node, 0) if node.op_type == "QuantizeLinear" else node.outputs[0])
    if kind is None or other is None or (kind == other and kind in FLOATS):
        return None
    if (
        node.op_type == "QuantizeLinear"
        and kind == ir.DataType.FLOAT
        and setting.version >= (11, 0)
        and other in FLOATS
    ):
        return None
    does = "reads" if node.op_type == "QuantizeLinear" else "gives"
    return f"it {does} {other.name} with a scale of {kind.name}: TensorRT wants one floating-point type for both."


@on(*QDQ)
def written_axis(node: ir.Node, _: Setting) -> str | None:
    """Where there is a scale for each channel, the axis is written: without it 10.3 takes 0 and later versions 1.

    Source: onnx-tensorrt onnxOpImporters.cpp, QuantDequantLinearHelper, for 10.1 and 10.16.
    """
    if steps_of(node) == 1 or "axis" in node.attributes:
        return None
    return f"it has {steps_of(node)} steps and no axis, whose default differs from version to version: {RETARGET}."


@on(*QDQ)
def channel_scales(node: ir.Node, _: Setting) -> str | None:
    """Only weights have a scale for each channel, no activation.

    Source: developer guide, "Quantization Granularities"; NvInfer.h, IDequantizeLayer.
    """
    value, producer = operand(node, 0), maker(operand(node, 0))
    if producer is not None and producer.op_type == "QuantizeLinear":
        value = operand(producer, 0)
    if steps_of(node) == 1 or is_stored(value):
        return None
    return f"it has {steps_of(node)} steps for an activation, TensorRT takes one: {RETARGET}."


@on(*QDQ)
def block_scales(node: ir.Node, _: Setting) -> str | None:
    """INT8 has no scales for blocks, and what is like one: as many axes as the data.

    Source: NvInfer.h of 11.1, IQuantizeLayer.
    """
    if not number(node, "block_size") and (rank_of(operand(node, 1)) or 0) < 2:
        return None
    return f"it has scales for blocks, which TensorRT has not for INT8: {RETARGET}."


@on(*QDQ)
def output_type(node: ir.Node, _: Setting) -> str | None:
    """`output_dtype` is left out of DQ, whose scale says it, and is int8 on Q where it is written at all.

    Source: onnx-tensorrt onnxOpImporters.cpp, QuantDequantLinearHelper.
    """
    wanted = number(node, "output_dtype")
    if not wanted or (node.op_type == "QuantizeLinear" and wanted == ir.DataType.INT8):
        return None
    return f"it has output_dtype {ir.DataType(wanted).name}, which TensorRT does not take there: {RETARGET}."


@on(*QDQ)
def scalar_data(node: ir.Node, _: Setting) -> str | None:
    """What is quantized has axes.

    Source: NvInfer.h, IQuantizeLayer and IDequantizeLayer.
    """
    if rank_of(operand(node, 0)) != 0:
        return None
    return "it quantizes a scalar, TensorRT wants at least one axis: leave the scalar in floating point."


@on("QuantizeLinear")
def unpaired_quantize(node: ir.Node, _: Setting) -> str | None:
    """Integers go to DQ or out of the graph, nowhere else.

    Source: developer guide, "Explicit Quantization"; onnx-tensorrt docs/operators.md, the note on quantized types.
    """
    output = node.outputs[0]
    others = [reader for reader, _ in output.uses() if reader.op_type != "DequantizeLinear"]
    if others:
        return f"{others[0].op_type} '{others[0].name}' reads its integers, in TensorRT only DequantizeLinear does: {RETARGET}."
    if output.uses() or output.is_graph_output():
        return None
    return f"nobody dequantizes its integers: {RETARGET}."


def _is_bias(node: ir.Node) -> bool:
    """Whether a DQ gives biases only."""
    uses = list(node.outputs[0].uses())
    return bool(uses) and all(index == 2 and reader.op_type in WEIGHT_AXIS for reader, index in uses)
