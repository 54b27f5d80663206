"""Attention: two products of activations and the Softmax between them, found in the graph and lowered as one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptq3d.engines.triton.assembly import Assembly
from ptq3d.engines.triton.network import Array, Network, Node
from ptq3d.engines.triton.steps import Attend, Floats
from ptq3d.engines.triton.tails import Tail
from ptq3d.engines.triton.views import permuted


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention of a graph.

    Args:
        scores: the MatMul that makes them.
        nodes: all of its nodes but the last, which is the second MatMul.
        query, value: names of tensors (..., tokens, C).
        key: name of a tensor (..., C, tokens).
        scale: of the scores.
        mask: added to the scaled scores.
    """

    scores: Node
    nodes: tuple[Node, ...]
    query: str
    key: str
    value: str
    scale: float
    mask: Floats | None


def attentions(network: Network) -> dict[Node, Attention]:
    """Every attention whose scores stay in floating point, by its last node."""
    found = {}
    for node in network.nodes:
        if node.op == "MatMul" and (attention := _attention(network, node)) is not None:
            found[attention[0]] = attention[1]
    return found


def _attention(network: Network, scores: Node) -> tuple[Node, Attention] | None:
    """The attention whose scores a MatMul makes, and its last node."""
    if any(network.constant(name) is not None for name in scores.inputs):
        return None
    nodes, scale, mask = [scores], 1.0, None
    node = network.sole_reader(scores.out)
    while node is not None and node.op in ("Mul", "Div", "Add"):
        other = next((one for one in node.inputs if one != nodes[-1].out), "")
        values = network.constant(other)
        if values is None or network.shapes[node.out] != network.shapes[scores.out]:
            return None
        if node.op == "Add":
            mask = values.astype(np.float32) + (0 if mask is None else mask)
        elif values.size != 1 or (node.inputs[0] == other and node.op == "Div"):
            return None
        else:
            factor = _factor(node, values)
            scale, mask = scale * factor, None if mask is None else mask * np.float32(factor)
        nodes.append(node)
        node = network.sole_reader(node.out)
    return _finished(network, nodes, node, (scale, mask))


def _factor(node: Node, values: Array) -> float:
    return float(values.reshape(-1)[0]) if node.op == "Mul" else 1.0 / float(values.reshape(-1)[0])


def _finished(
    network: Network, nodes: list[Node], softmax: Node | None, told: tuple[float, Floats | None]
) -> tuple[Node, Attention] | None:
    scores = nodes[0]
    rank = len(network.shapes[scores.out])
    if softmax is None or softmax.op != "Softmax" or softmax.attributes.get("axis", -1) % rank != rank - 1:
        return None
    last = network.sole_reader(softmax.out)
    if (
        last is None
        or last.op != "MatMul"
        or last.inputs[0] != softmax.out
        or network.constant(last.inputs[1]) is not None
    ):
        return None
    query, by_query, of_query = _unscaled(network, scores.inputs[0])
    key, by_key, of_key = _unscaled(network, scores.inputs[1])
    fronts = {network.shapes[name][:-2] for name in (query, key, last.inputs[1], last.out)}
    if len(fronts) != 1 or rank < 3:
        return None
    scale, mask = told
    done = (*of_query, *of_key, *nodes, softmax)
    return last, Attention(scores, done, query, key, last.inputs[1], scale * by_query * by_key, mask)


def _unscaled(network: Network, name: str) -> tuple[str, float, tuple[Node, ...]]:
    """A tensor in front of the Mul or Div of a number that alone makes it, the factor, and that node."""
    node = network.producer(name)
    if node is None or node.op not in ("Mul", "Div") or network.sole_reader(name) is None:
        return name, 1.0, ()
    values = network.constant(node.inputs[1])
    source = node.inputs[0]
    if values is None and node.op == "Mul":
        values, source = network.constant(node.inputs[0]), node.inputs[1]
    if values is None or values.size != 1 or network.shapes[source] != network.shapes[name]:
        return name, 1.0, ()
    return source, _factor(node, values), (node,)


def attend(assembly: Assembly, node: Node, attention: Attention) -> None:
    """One step for an attention; its heads lie as the Transpose behind it wants them."""
    query, key, value = (assembly.as_float(name) for name in (attention.query, attention.key, attention.value))
    rank = len(query.shape)
    following = assembly.network.sole_reader(node.out)
    order = following.attributes.get("perm") if following is not None and following.op == "Transpose" else None
    out = assembly.store(Tail((node.out,)), order)
    turned = permuted(key, (*range(rank - 2), rank - 1, rank - 2))
    assembly.emit(Attend(node.name, out, query, turned, value, attention.scale, attention.mask))
    for layer in (attention.scores, node):
        assembly.layer(layer, "it is a product of two activations: attention runs in FP16")
