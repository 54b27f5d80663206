"""Outliers of single features of a LayerNormalization move into the weights that read them. Exact in real numbers, free at run time.

x, of which feature j spans max |x_j|, becomes x_j / s_j (in the normalization's own scale and bias), and row j of every weight that
reads it is multiplied by s_j:

    s_j = max |x_j|^a / max |w_j|^(1 - a)        a = 0.5
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.graphs.constants import constant_of, set_constant
from ptq3d.quantization.equalization import Equalized
from ptq3d.quantization.observation import TensorSeen
from ptq3d.quantization.planning import Placement

STRENGTH = 0.5
TINY = 1e-5
Floats = npt.NDArray[np.float32]


def smooth(
    model: ir.Model, placement: Placement, seen: Mapping[str, TensorSeen], *, strength: float = STRENGTH
) -> Equalized:
    """`model` with smoothed features, in place; no tensor has another name.

    Args:
        model: the simplified FP32 graph that was placed.
        placement: from `planning.place`.
        seen: at least the tensors of the placement, with features as their channels.
        strength: 0 leaves all spans to the activations, 1 to the weights.

    Source: Xiao et al. 2023 (SmoothQuant), eq. 4.
    """
    names = {name for group in placement.tensors if len(group) == 1 for name in group}
    tensors: dict[str, tuple[str, Floats]] = {}
    layers: dict[str, Floats] = {}
    for node in model.graph:
        name = str(node.outputs[0].name)
        if node.op_type != "LayerNormalization" or name not in names:
            continue
        readers = _readers(node)
        if readers and len(constant_of(node.inputs[1])) == len(seen[name].low):
            factors = _factors(seen[name], readers, strength)
            _divide(model, node, readers, factors)
            tensors[name] = name, factors
            layers |= {str(reader.name): factors for reader in readers}
    return Equalized(tensors, layers)


def _readers(node: ir.Node) -> list[ir.Node]:
    """The products with constant weights that read a normalization; none where anything else does, too."""
    uses = list(node.outputs[0].uses())
    constant = all(value is not None and value.const_value is not None for value in node.inputs[1:])
    plain = all(reader.op_type == "MatMul" and index == 0 and _is_matrix(reader.inputs[1]) for reader, index in uses)
    last = "axis" not in node.attributes or node.attributes["axis"].as_int() == -1
    whole = constant and plain and last and not node.outputs[0].is_graph_output()
    return [reader for reader, _ in uses] if whole else []


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _factors(seen: TensorSeen, readers: list[ir.Node], strength: float) -> Floats:
    """(C,) what the features are multiplied by, 1 in the geometric mean."""
    spans = np.maximum(np.maximum(-seen.low, seen.high), TINY)
    weights = np.max([np.abs(constant_of(reader.inputs[1])).max(1) for reader in readers], 0)
    logs = (1 - strength) * np.log(np.maximum(weights, TINY)) - strength * np.log(spans)
    factors: Floats = np.exp(logs - logs.mean()).astype(np.float32)
    return factors


def _divide(model: ir.Model, node: ir.Node, readers: list[ir.Node], factors: Floats) -> None:
    for index in range(1, len(node.inputs)):
        set_constant(model, node, index, constant_of(node.inputs[index]) * factors, suffix="smoothed")
    for reader in readers:
        set_constant(model, reader, 1, constant_of(reader.inputs[1]) / factors[:, None], suffix="smoothed")
