"""What TensorRT's documents say of ONNX graphs: a graph that breaks a rule is refused by TensorRT, or means something else there.

The rules hold for TensorRT 10.3 to 11 with a strongly typed network, for Q/DQ graphs and FP32 ones, whose floating-point rest may be
FP16 or BF16. Each rule says its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ptq3d.graphs import tensorrt_layers as layers
from ptq3d.graphs import tensorrt_operators as operators
from ptq3d.graphs import tensorrt_qdq as qdq
from ptq3d.graphs.node_rules import Rule, Version

OLDEST: Version = (10, 3)


@dataclass(frozen=True)
class Violation:
    """One place where a graph breaks a rule.

    Args:
        rule: its name in `RULES`.
        node: name of the node, of the tensor where no node makes it, or "graph".
        said: what is wrong, and how to mend it.
    """

    rule: str
    node: str
    said: str

    def __str__(self) -> str:
        return f"{self.node}: {self.said} ({self.rule})"


def violations(model: ir.Model, version: Version = OLDEST) -> tuple[Violation, ...]:
    """Where TensorRT would refuse a graph, or silently compute something else.

    Args:
        model: a simplified graph, Q/DQ or not, so that names, shapes and types are known.
        version: (major, minor) of the TensorRT that it is for; the rules of 10.3 are enough for all up to 11.

    Returns:
        Rule by rule, in the graph's order; empty where TensorRT takes the graph as it is.
    """
    return _broken(RULES, model, version)


def advice(model: ir.Model) -> tuple[Violation, ...]:
    """What TensorRT takes and computes rightly, but slower than it could."""
    return _broken(ADVICE, model, OLDEST)


def _broken(rules: Mapping[str, Rule], model: ir.Model, version: Version) -> tuple[Violation, ...]:
    return tuple(Violation(name, *found) for name, rule in rules.items() for found in rule(model, version))


RULES: Mapping[str, Rule] = {
    "integer type": qdq.integer_type,
    "zero-point": qdq.zero_point,
    "constant scale": qdq.constant_scale,
    "scale value": qdq.scale_value,
    "scale type": qdq.scale_type,
    "written axis": qdq.written_axis,
    "channel scales": qdq.channel_scales,
    "channel axis": layers.channel_axis,
    "block scales": qdq.block_scales,
    "output type": qdq.output_type,
    "scalar data": qdq.scalar_data,
    "unpaired quantize": qdq.unpaired_quantize,
    "quantized bias": layers.quantized_bias,
    "half-quantized layer": layers.half_quantized_layer,
    "INT8 groups": layers.int8_groups,
    "kernel shape": layers.kernel_shape,
    "operator": operators.operator,
    "operand type": operators.operand_type,
    "cast": operators.cast,
    "mixed types": operators.mixed_types,
    "constant input": operators.constant_input,
    "pooling": operators.pooling,
    "resize": operators.resize,
    "depth to space": operators.depth_to_space,
    "automatic padding": operators.automatic_padding,
    "output padding": operators.output_padding,
    "slope": operators.slope,
    "normalization": operators.normalization,
    "group normalization": operators.group_normalization,
    "pad": operators.pad_mode,
    "power": operators.power,
    "gemm": operators.gemm,
    "double": operators.double,
    "opset": operators.opset,
    "axes": operators.axes,
    "elements": operators.elements,
    "dynamic shape": operators.dynamic_shape,
}
ADVICE: Mapping[str, Rule] = {
    "residual branch": layers.residual_branch,
    "float weights": layers.float_weights,
    "output padding": layers.output_padding_behind,
}
