"""The engine that defines the answer: op by op, and a layer between Q/DQ in integer arithmetic.

Slow and readable. A dequantized tensor stays a pair (integers, scale) until something needs real values: a weighted
layer whose inputs are both such pairs sums integers exactly and rescales once (`ptq3d.int8.rescale`); concat and moves of
pairs with one scale move integers; everything else works on float32. Where the file says FP16 or BF16, a node still computes in
float32, and its real values are rounded to that type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ptq3d import int8
from ptq3d.engines import torch as eager
from ptq3d.engines.base import BuildSettings, EngineOptions, LayerReport, head_layer, runs_anywhere
from ptq3d.engines.operators import OPERATORS
from ptq3d.errors import EngineError, OptionError, UnavailableError
from ptq3d.graphs.layers import WEIGHT_AXIS, layers

MOVES = frozenset({"Concat", "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
LOW = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
WEIGHTED = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})

unavailable = eager.unavailable
version = eager.version
build = eager.build


def compiled_for(settings: BuildSettings) -> str:
    """Nothing: its artefacts run wherever it does."""
    return runs_anywhere("reference", settings)


@dataclass(frozen=True, eq=False)
class Quantized:
    """Integers that stand for the real values (q - zero_point) * step.

    Args:
        q: int8 or uint8, any shape.
        step: () or (K,) float32.
        zero_point: () or (K,) int32.
        axis: the channel axis of a (K,) step.
        low: FP16 or BF16 where the real values are rounded to it.
    """

    q: Tensor
    step: Tensor
    zero_point: Tensor
    axis: int
    low: ir.DataType | None = None

    def real(self) -> Tensor:
        """The float32 values."""
        values: Tensor = rounded(eager.dequantize({"axis": self.axis}, self.q, self.step, self.zero_point), self.low)
        return values

    def centred(self) -> Tensor:
        """q - zero_point as float64: products of such sum exactly up to 2^53."""
        return self.q.double() - eager.along(self.axis, self.zero_point.double(), self.q.ndim)

    def alike(self, other: Quantized) -> bool:
        """Whether equal integers mean equal values in both."""
        return (
            self.step.numel() == other.step.numel() == 1
            and bool(self.step == other.step)
            and bool(self.zero_point == other.zero_point)
            and self.q.dtype == other.q.dtype
        )


def open(folder: Path, options: EngineOptions) -> ReferenceEngine:
    """The reference engine of an artefact, on the CPU in FP32.

    Raises:
        UnavailableError: another device than the CPU.
        OptionError: another precision than FP32.
    """
    if options.device.lower() not in ("auto", "cpu"):
        raise UnavailableError(f"the reference engine runs on the CPU, not on '{options.device}'.")
    if options.precision != "fp32":
        raise OptionError(f"the reference engine runs in fp32 around its integers, not in '{options.precision}'.")
    return ReferenceEngine(folder / eager.ARTEFACT, torch.device("cpu"), "fp32")


class ReferenceEngine(eager.TorchEngine):
    """The torch engine with integer layers."""

    def _finish(self, value: Any) -> Tensor:
        tensor: Tensor = _real(value)
        return tensor

    def _apply(self, node: ir.Node, inputs: list[Any]) -> Any:
        return rounded(self._computed(node, inputs), node.outputs[0].dtype)

    def _computed(self, node: ir.Node, inputs: list[Any]) -> Any:
        attributes = self._attributes[node.name]
        if node.op_type == "QuantizeLinear":
            return eager.quantize(attributes, _real(inputs[0]), *inputs[1:])
        if node.op_type == "DequantizeLinear":
            return _dequantized(attributes, *inputs)
        if is_integer(node.op_type, inputs):
            return integer_layer(node.op_type, attributes, inputs)
        if node.op_type in MOVES and _movable(inputs):
            first: Quantized = inputs[0]
            moved = OPERATORS[node.op_type](attributes, *(_integers(value) for value in inputs))
            return replace(first, q=moved.to(first.q.dtype))
        return OPERATORS[node.op_type](attributes, *(_real(value) for value in inputs))

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer; INT8 where both its inputs are dequantized integers."""
        model = self._opened()
        nodes = {str(node.name): node for node in model.graph}
        found = [
            LayerReport(layer.name, layer.op, "int8" if _fed_by_integers(nodes[layer.name]) else "fp32", layer.macs)
            for layer in layers(model)
        ]
        return (*found, *head_layer(self._head, math.prod(self._spec.window)))


def rounded(value: Any, dtype: ir.DataType | None) -> Any:
    """Real values as FP16 or BF16 holds them, in float32; integers keep theirs until they are asked for."""
    low = LOW.get(dtype) if dtype is not None else None
    if low is None:
        return value
    return replace(value, low=dtype) if isinstance(value, Quantized) else value.to(low).float()


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, Quantized) else value


def _integers(value: Any) -> Any:
    """Integers as float32 (exact), so that every operator that only moves values takes them."""
    return value.q.float() if isinstance(value, Quantized) else value


def _dequantized(attributes: Mapping[str, Any], q: Tensor, step: Tensor, zero_point: Tensor | None = None) -> Any:
    if q.dtype not in (torch.int8, torch.uint8):
        return eager.dequantize(dict(attributes), q, step, zero_point)
    zero = torch.zeros_like(step, dtype=torch.int32) if zero_point is None else zero_point.to(torch.int32)
    return Quantized(q, step.float(), zero, int(attributes.get("axis", 1)))


def _movable(inputs: list[Any]) -> bool:
    pairs = [value for value in inputs if isinstance(value, Quantized)]
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    return bool(pairs) and not tensors and all(pairs[0].alike(other) for other in pairs)


def is_integer(op: str, inputs: list[Any]) -> bool:
    """Whether a node sums integers: a weighted layer, both inputs dequantized, one step for all that an output sums."""
    left, right = inputs[0], inputs[1] if len(inputs) > 1 else None
    if op not in WEIGHTED or not isinstance(left, Quantized) or not isinstance(right, Quantized):
        return False
    of_outputs = right.step.numel() == 1 or op == "Gemm" or right.axis % right.q.ndim == WEIGHT_AXIS[op] % right.q.ndim
    return left.step.numel() == 1 and of_outputs


def integer_layer(op: str, attributes: Mapping[str, Any], inputs: list[Any]) -> Tensor:
    """A weighted layer in integers: float32(sum of (q - zero_point) x w) * (input step x weight step) + bias.

    Args:
        op: "Conv", "ConvTranspose", "MatMul" or "Gemm".
        attributes: the node's.
        inputs: Quantized activation, Quantized weight (or second activation), optional float32 bias.

    Returns:
        float32, as `ptq3d.int8.rescale` defines it. Zero padding pads with the zero-point, which is exact.

    Raises:
        EngineError: Gemm with alpha or beta other than 1.
    """
    x, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    if op == "Gemm" and (attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0):
        raise EngineError("an integer Gemm takes alpha = beta = 1. Fold them into the weights.")
    total = OPERATORS[op](attributes, x.centred(), weight.centred()).to(torch.int32).numpy()
    multiplier = (x.step * weight.step).numpy()
    axis = 1 if op in ("Conv", "ConvTranspose") else total.ndim - 1
    offset = None if bias is None else bias.numpy()
    return torch.from_numpy(int8.rescale(total, multiplier, offset, axis).astype(np.float32, copy=False))


def _fed_by_integers(node: ir.Node) -> bool:
    return all(value is not None and _leads_to_integers(value) for value in node.inputs[:2])


def _leads_to_integers(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return False
    if producer.op_type == "Concat":
        return all(piece is not None and _leads_to_integers(piece) for piece in producer.inputs)
    if producer.op_type in MOVES:
        return producer.inputs[0] is not None and _leads_to_integers(producer.inputs[0])
    return producer.op_type == "DequantizeLinear"
