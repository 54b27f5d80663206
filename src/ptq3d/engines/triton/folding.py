"""Graph to graph before lowering: constants computed, Casts between floating-point types left out, GroupNormalization put back together
from what exporters make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ptq3d.engines.operators import NUMBERS, OPERATORS
from ptq3d.engines.triton.network import Array, Network, Node, Shape, Weight

FLOATING = (1, 10, 11, 16)  # ONNX's numbers of float, float16, double and bfloat16


def fold(network: Network) -> Network:
    """The graph without nodes that read constants only; integers behind a DequantizeLinear become its `weights`."""
    constants, weights, left = dict(network.constants), dict(network.weights), []
    for node in network.nodes:
        read = [name for name in node.inputs if name]
        if any(name not in constants and name not in weights for name in read) or not read:
            left.append(node)
        elif node.op == "DequantizeLinear" and node.inputs[0] in constants:
            weights[node.out] = _weight(node, constants)
        elif node.op == "QuantizeLinear":
            constants[node.out] = _quantized(node, [_real(name, constants, weights) for name in node.inputs])
        elif node.op in OPERATORS and len(node.outputs) == 1:
            constants[node.out] = _computed(node, [_real(name, constants, weights) for name in node.inputs])
        else:
            left.append(node)
    shapes = dict(network.shapes) | {name: array.shape for name, array in constants.items()}
    shapes |= {name: weight.q.shape for name, weight in weights.items()}
    return replace(network, nodes=tuple(left), constants=constants, weights=weights, shapes=shapes)


def _real(name: str, constants: Mapping[str, Array], weights: Mapping[str, Weight]) -> Array | None:
    if not name:
        return None
    return weights[name].real() if name in weights else constants[name]


def _weight(node: Node, constants: Mapping[str, Array]) -> Weight:
    q, step = constants[node.inputs[0]], constants[node.inputs[1]].astype(np.float32)
    zero = constants.get(node.input(2), np.zeros(step.shape, q.dtype))
    return Weight(q, step, zero, int(node.attributes.get("axis", 1)))


def _quantized(node: Node, inputs: list[Array | None]) -> Array:
    values, step, zero = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    values, step = np.asarray(values, np.float32), np.asarray(step, np.float32)
    zero = np.zeros(step.shape, np.uint8) if zero is None else np.asarray(zero)
    shape = [1] * values.ndim
    if step.size > 1:
        shape[int(node.attributes.get("axis", 1))] = -1
    limits = np.iinfo(zero.dtype)
    levels = np.rint(values / step.reshape(shape)) + zero.astype(np.int32).reshape(shape)
    return np.clip(levels, limits.min, limits.max).astype(zero.dtype)


def _computed(node: Node, inputs: list[Array | None]) -> Array:
    attributes = {
        key: torch.from_numpy(one.copy()) if isinstance(one, np.ndarray) else one
        for key, one in node.attributes.items()
    }
    places = NUMBERS.get(node.op, ())
    values: list[Any] = [
        None if one is None else one.reshape(-1).tolist() if place in places else torch.from_numpy(np.array(one))
        for place, one in enumerate(inputs)
    ]
    answer: Array = OPERATORS[node.op](attributes, *values).contiguous().numpy()
    return answer


def without_casts(network: Network) -> Network:
    """The graph without Casts between floating-point types, which a file with an FP16 rest has around its normalizations: a kernel
    computes in float32 whatever it reads, and what it stores is FP16 whatever the file says."""
    source: dict[str, str] = {}
    left: list[Node] = []
    for node in network.nodes:
        inputs = tuple(source.get(name, name) for name in node.inputs)
        to, integers = node.attributes.get("to"), network.quantizing(inputs[0]) if node.op == "Cast" else None
        if node.op == "Cast" and to in FLOATING and integers is None:
            source[node.out] = inputs[0]
        else:
            left.append(node if inputs == node.inputs else replace(node, inputs=inputs))
    return replace(network, nodes=tuple(left), output=source.get(network.output, network.output))


def restore_groups(network: Network) -> Network:
    """Reshape (N, groups, values), InstanceNormalization, Reshape back [, Mul, Add] as one GroupNormalization.

    Q/DQ behind the InstanceNormalization stay where they are; the Mul and Add are then left out of it.
    """
    made: dict[Node, tuple[Node, ...]] = {}
    shapes, constants = dict(network.shapes), dict(network.constants)
    for node in network.nodes:
        if node.op == "InstanceNormalization":
            _restore(network, node, made, shapes, constants)
    nodes = tuple(one for node in network.nodes for one in made.get(node, (node,)))
    return replace(network, nodes=nodes, shapes=shapes, constants=constants)


def _restore(
    network: Network,
    node: Node,
    made: dict[Node, tuple[Node, ...]],
    shapes: dict[str, Shape],
    constants: dict[str, Array],
) -> None:
    before = network.producer(node.inputs[0])
    if before is None or before.op != "Reshape" or network.sole_reader(before.out) is not node:
        return
    image, flat = network.shapes[before.inputs[0]], network.shapes[before.out]
    if len(image) != 5 or len(flat) != 3 or image[1] % flat[1] or image[0] != flat[0]:
        return
    between, back = _way_back(network, node.out)
    if back is None or network.shapes[back.out] != image:
        return
    parameters = [network.constant(name) for name in node.inputs[1:3]]
    if parameters[0] is None or parameters[1] is None:
        return
    scale, bias = (
        np.repeat(np.asarray(one, np.float32), image[1] // flat[1]) for one in (parameters[0], parameters[1])
    )
    folded: list[Node] = []
    last, out = back, node.out
    if not between:
        scale, bias, folded = _affine(network, back.out, scale, bias)
        last, out = (folded or [back])[-1], (folded or [back])[-1].out
    constants[f"{node.out}/scale"], constants[f"{node.out}/bias"] = scale, bias
    attributes = {"num_groups": flat[1], "epsilon": node.attributes.get("epsilon", 1e-5)}
    names = (before.inputs[0], f"{node.out}/scale", f"{node.out}/bias")
    made[before] = ()
    made[node] = (Node("GroupNormalization", node.name, names, (out,), attributes),)
    shapes.update(dict.fromkeys([out, *between], image))
    for one in (back, *folded):
        made[one] = ()
    if between:
        made[last] = (replace(back, op="Identity", inputs=back.inputs[:1]),)


def _way_back(network: Network, name: str) -> tuple[list[str], Node | None]:
    """The names of Q/DQ tensors between a tensor and the Reshape that alone reads it behind them, and the Reshape."""
    node = network.sole_reader(name)
    if node is None or node.op == "Reshape":
        return [], node
    if node.op != "QuantizeLinear":
        return [], None
    restored = network.sole_reader(node.out)
    if restored is None or restored.op != "DequantizeLinear":
        return [], None
    back = network.sole_reader(restored.out)
    return [node.out, restored.out], back if back is not None and back.op == "Reshape" else None


def _affine(network: Network, name: str, scale: Array, bias: Array) -> tuple[Array, Array, list[Node]]:
    """Scale and bias with the Mul and the Add of constants for each channel that follow."""
    nodes: list[Node] = []
    for op in ("Mul", "Add"):
        node = network.sole_reader(name)
        values = channel_constant(network, node, name) if node is not None and node.op == op else None
        if node is None or values is None:
            continue
        scale, bias = (scale * values, bias * values) if op == "Mul" else (scale, bias + values)
        nodes, name = [*nodes, node], node.out
    return scale, bias, nodes


def channel_constant(network: Network, node: Node, name: str) -> Array | None:
    """What a Mul or Add puts on each channel of an image (N, C, X, Y, Z): (C,) float32; None where it is not such a node."""
    other = next((one for one in node.inputs if one != name), "")
    values, shape = network.constant(other) if other else None, network.shapes[name]
    if values is None or network.shapes[node.out] != shape:
        return None
    padded = (1,) * (len(shape) - values.ndim) + values.shape
    if any(size != 1 for place, size in enumerate(padded) if place != 1):
        return None
    return np.array(np.broadcast_to(values.reshape(-1).astype(np.float32), shape[1:2]))
