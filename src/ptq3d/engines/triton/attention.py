"""Attention: two products of activations and the Softmax between them, found in the graph and lowered as one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ptq3d.engines.triton import tails
from ptq3d.engines.triton.assembly import Assembly
from ptq3d.engines.triton.network import Array, Network, Node, Shape
from ptq3d.engines.triton.steps import Attend, Floats, View
from ptq3d.engines.triton.tails import Tail
from ptq3d.engines.triton.views import permuted, reshaped

FOUR = 4  # axes that the kernel knows: samples, heads, tokens, channels


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


def _four(view: View) -> View | None:
    """(..., tokens, C) as (B, heads, tokens, C); None where that takes a copy."""
    *front, heads, tokens, channels = view.shape
    return reshaped(view, (math.prod(front), heads, tokens, channels))


def _heads(view: View) -> View | None:
    """The same with channels side by side."""
    seen = _four(view)
    return seen if seen is not None and (seen.strides[3] == 1 or seen.shape[3] == 1) else None


def _mask(mask: Floats | None, front: Shape, keys: int) -> Floats | None:
    """A mask that broadcasts to (*front, tokens, keys), with four axes, the last of them whole."""
    if mask is None:
        return None
    mask = np.array(np.broadcast_to(mask, (*mask.shape[:-1], keys)))
    mask = mask.reshape((1,) * (len(front) + 2 - mask.ndim) + mask.shape)
    if len(front) <= FOUR - 2:
        return mask.reshape((1,) * (FOUR - mask.ndim) + mask.shape)
    whole = np.broadcast_to(mask, (*front, *mask.shape[-2:]))
    return np.array(whole).reshape(-1, front[-1], *mask.shape[-2:])


def attend(assembly: Assembly, node: Node, attention: Attention) -> None:
    """One step for an attention; its heads lie as the Transpose behind it wants them."""
    views = [assembly.as_float(name) for name in (attention.query, attention.key, attention.value)]
    rank, front = len(views[0].shape), views[0].shape[:-2]
    views[1] = permuted(views[1], (*range(rank - 2), rank - 1, rank - 2))
    query, key, value = (assembly.formed(view, _heads, range(rank)) for view in views)
    following = assembly.network.sole_reader(node.out)
    order = following.attributes.get("perm") if following is not None and following.op == "Transpose" else None
    tail = tails.settle(assembly.network, node.out, Tail(()))
    out = assembly.target(tail, _four, order if rank <= FOUR else range(rank))
    assembly.emit(
        Attend(node.name, out, query, key, value, attention.scale, _mask(attention.mask, front, key.shape[2]))
    )
    for layer in (attention.scores, node):
        assembly.layer(layer, "it is a product of two activations: attention runs in FP16")
