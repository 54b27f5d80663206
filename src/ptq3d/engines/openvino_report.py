"""What ran, as OpenVINO reports it: the multiplying operations of a model and the nodes of the execution graph that hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ptq3d.engines.base import LayerReport

REPORTED = {"u8": "int8", "i8": "int8", "f32": "fp32", "bf16": "bf16", "f16": "fp16"}


def _executed(compiled: Any) -> dict[str, tuple[str, str]] | None:
    """Name of a layer of the model -> (operation, precision) of the node of the execution graph that holds it.

    None where the device shows no such graph, as an NPU.
    """
    try:
        nodes = compiled.get_runtime_model().get_ops()
    except RuntimeError:
        return None
    executed = {}
    for node in nodes:
        info = {
            key: node.get_rt_info()[key].astype(str) for key in ("originalLayersNames", "layerType", "runtimePrecision")
        }
        for name in info["originalLayersNames"].split(","):
            executed[name] = (info["layerType"], info["runtimePrecision"])
    return executed


def reports(model: Any, compiled: Any) -> Iterator[LayerReport]:
    """Every multiplying operation of a model, with the precision in the execution graph of what it was compiled to."""
    executed = _executed(compiled)
    for operation in model.get_ordered_ops():
        macs = MACS.get(operation.get_type_name())
        if macs is None:
            continue
        name = operation.get_friendly_name()
        absent = ("not in the execution graph", "f32") if executed is not None else ("not shown", "unknown")
        kind, precision = (executed or {}).get(name, absent)
        yield LayerReport(
            name.removesuffix("/WithoutBiases"), kind, REPORTED.get(precision, precision), macs(operation)
        )


def _shape(port: Any) -> list[int]:
    return [int(size) for size in port.get_shape()]


def _forward_macs(operation: Any, weight_from: int) -> int:
    return math.prod(_shape(operation.output(0))) * math.prod(_shape(operation.input(1))[weight_from:])


def _backward_macs(operation: Any, weight_from: int) -> int:
    return math.prod(_shape(operation.input(0))) * math.prod(_shape(operation.input(1))[weight_from:])


def _product_macs(operation: Any) -> int:
    transposed = operation.get_attributes().get("transpose_a", False)
    return math.prod(_shape(operation.output(0))) * _shape(operation.input(0))[-2 if transposed else -1]


MACS: Mapping[str, Callable[[Any], int]] = {
    "Convolution": lambda operation: _forward_macs(operation, 1),
    "GroupConvolution": lambda operation: _forward_macs(operation, 2),
    "ConvolutionBackpropData": lambda operation: _backward_macs(operation, 1),
    "GroupConvolutionBackpropData": lambda operation: _backward_macs(operation, 2),
    "MatMul": _product_macs,
}
