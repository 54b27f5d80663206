"""What happens to a tensor behind the step that makes it: activation, rounding, residual sum, and how it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ptq3d.engines.triton.network import Network, Node
from ptq3d.engines.triton.steps import UNIT, Activation, Dtype, Scale

NONE = Activation()
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
# what an int8 rounding may pass on its way up: operators that move values, or take the largest
MOVES = RESHAPES | {"Transpose", "Slice", "Pad", "Concat", "MaxPool"}


@dataclass(frozen=True)
class Tail:
    """The way of a float32 value from a step to memory; see `steps.Epilogue`.

    Args:
        names: the tensors that are stored, all with the same values.
        dtype: how.
        scale: of the integers where that is int8.
        activation, last: as in `steps.Epilogue`.
        rounded: the scale of integers that are never stored.
        other: the name of the other branch of a residual sum, "" where there is none.
        nodes: those that are done with it.
    """

    names: tuple[str, ...]
    dtype: Dtype = "fp16"
    scale: Scale = UNIT
    activation: Activation = NONE
    rounded: Scale | None = None
    other: str = ""
    last: Activation = NONE
    nodes: tuple[Node, ...] = ()


Computed = Callable[[str], bool]


def follow(network: Network, name: str, computed: Computed) -> Tail:
    """The way of a tensor that a step makes.

    Args:
        network: with the tensor's readers.
        name: the tensor.
        computed: whether a tensor exists when the step runs.
    """
    function, name, nodes = _activated(network, name)
    return _summed(network, name, computed, Tail((), activation=function, nodes=nodes))


def behind_activation(network: Network, node: Node, function: Activation, computed: Computed) -> Tail:
    """The way of what a node of that activation gives, the activation included."""
    return _summed(network, node.out, computed, Tail((), activation=function, nodes=(node,)))


def behind_sum(network: Network, node: Node, other: str) -> Tail:
    """The way of a sum, with its other branch."""
    function, name, nodes = _activated(network, node.out)
    return settle(network, name, Tail((), other=other, last=function, nodes=(node, *nodes)))


def behind_rounding(network: Network, node: Node, computed: Computed) -> Tail:
    """The way of what a QuantizeLinear reads, itself included."""
    return _rounded(network, (node,), computed, Tail(()))


def settle_rounding(network: Network, node: Node) -> Tail:
    """A QuantizeLinear that is stored as it is."""
    return _as_integers(network, (node,), Tail(()))


def _summed(network: Network, name: str, computed: Computed, tail: Tail) -> Tail:
    roundings = _roundings(network, name)
    if roundings:
        return _rounded(network, roundings, computed, tail)
    add = network.sole_reader(name)
    other = _other_branch(network, add, name, computed)
    return settle(network, name, tail) if add is None or not other else _add(network, add, other, tail)


def _rounded(network: Network, roundings: tuple[Node, ...], computed: Computed, tail: Tail) -> Tail:
    """A tensor that is rounded by all who read it; nothing of it is stored where one sum alone reads it then."""
    scale = network.scale_of(roundings[0])
    if len(roundings) == 1 and (restored := network.sole_reader(roundings[0].out)) is not None:
        add = network.sole_reader(restored.out)
        other = _other_branch(network, add, restored.out, computed)
        alike = restored.op == "DequantizeLinear" and network.scale_of(restored) == scale
        if alike and add is not None and other:
            nodes = (*tail.nodes, roundings[0], restored)
            return _add(network, add, other, replace(tail, rounded=scale, nodes=nodes))
    return _as_integers(network, roundings, tail)


def _add(network: Network, add: Node, other: str, tail: Tail) -> Tail:
    function, name, nodes = _activated(network, add.out)
    return settle(network, name, replace(tail, other=other, last=function, nodes=(*tail.nodes, add, *nodes)))


def _as_integers(network: Network, roundings: tuple[Node, ...], tail: Tail) -> Tail:
    scale = network.scale_of(roundings[0])
    read = [node for one in roundings for node in network.readers(one.out) if node.op == "DequantizeLinear"]
    restored = [node for node in read if network.scale_of(node) == scale]
    names = tuple(node.out for node in (*roundings, *restored))
    return replace(tail, names=names, dtype="int8", scale=scale, nodes=(*tail.nodes, *roundings, *restored))


def settle(network: Network, name: str, tail: Tail) -> Tail:
    """How a tensor that goes through nothing more is stored: int8 where all who read it round it alike, also behind moves."""
    roundings = _roundings(network, name)
    if roundings:
        return _as_integers(network, roundings, tail)
    scale = scale_behind_moves(network, name)
    if scale is not None:
        return replace(tail, names=(name,), dtype="int8", scale=scale)
    alone = name == network.output and not network.readers(name)
    return replace(tail, names=(name,), dtype="fp32" if alone else "fp16", scale=UNIT)


def _roundings(network: Network, name: str) -> tuple[Node, ...]:
    """The QuantizeLinear nodes that read a tensor where nothing else does and all have one scale; else none."""
    nodes = network.readers(name)
    if not nodes or name == network.output or any(node.op != "QuantizeLinear" for node in nodes):
        return ()
    return nodes if len({network.scale_of(node) for node in nodes}) == 1 else ()


def scale_behind_moves(network: Network, name: str) -> Scale | None:
    """The INT8 scale of a tensor that is only moved before it is rounded, so that it may be rounded first."""
    node = network.sole_reader(name)
    if node is None or node.op not in MOVES or len(node.outputs) != 1:
        return None
    roundings = _roundings(network, node.out)
    return network.scale_of(roundings[0]) if roundings else scale_behind_moves(network, node.out)


def _other_branch(network: Network, add: Node | None, name: str, computed: Computed) -> str:
    """The other input of an Add, where it is there and of the same shape."""
    if add is None or add.op != "Add" or add.inputs[0] == add.inputs[1]:
        return ""
    other = add.inputs[1] if add.inputs[0] == name else add.inputs[0]
    alike = network.shapes[other] == network.shapes[name] == network.shapes[add.out]
    return other if alike and computed(other) else ""


def _activated(network: Network, name: str) -> tuple[Activation, str, tuple[Node, ...]]:
    node = network.sole_reader(name)
    found = None if node is None or node.inputs[0] != name else activation_of(network, node)
    return (NONE, name, ()) if node is None or found is None else (found, node.out, (node,))


def activation_of(network: Network, node: Node) -> Activation | None:
    """The activation that a node is; None for other nodes."""
    made = ACTIVATIONS.get(node.op)
    return None if made is None else made(network, node)


def _one_number(network: Network, name: str) -> float | None:
    values = network.constant(name) if name else None
    if values is None or not values.size or (values != values.reshape(-1)[0]).any():
        return None
    return float(values.reshape(-1)[0])


def _prelu(network: Network, node: Node) -> Activation | None:
    slope = _one_number(network, node.inputs[1])
    return None if slope is None else Activation("leaky_relu", slope)


def _clip(network: Network, node: Node) -> Activation | None:
    limits = []
    for place, least in ((1, -math.inf), (2, math.inf)):
        value = _one_number(network, node.input(place)) if node.input(place) else least
        if value is None:
            return None
        limits.append(value)
    return Activation("clip", *limits)


def _slope(kind: str, name: str, default: float) -> Callable[[Network, Node], Activation]:
    return lambda _, node: Activation(kind, float(np.float32(node.attributes.get(name, default))))


def _gelu(_: Network, node: Node) -> Activation:
    return Activation("gelu_tanh" if node.attributes.get("approximate", "none") == "tanh" else "gelu")


ACTIVATIONS: Mapping[str, Any] = {
    "Relu": lambda *_: Activation("relu"),
    "LeakyRelu": _slope("leaky_relu", "alpha", 0.01),
    "PRelu": _prelu,
    "Elu": _slope("elu", "alpha", 1.0),
    "Gelu": _gelu,
    "Sigmoid": lambda *_: Activation("sigmoid"),
    "Tanh": lambda *_: Activation("tanh"),
    "Clip": _clip,
}
