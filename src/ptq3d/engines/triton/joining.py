"""Concats that cost nothing: which tensors are written straight into the channels of a concat."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ptq3d.engines.triton.network import Network, Node
from ptq3d.engines.triton.steps import UNIT, Dtype, Scale, View
from ptq3d.engines.triton.tails import MOVES
from ptq3d.engines.triton.views import canonical_order

Format = tuple[Dtype, Scale]


@dataclass(frozen=True)
class Place:
    """A part of a concat.

    Args:
        concat: the name of the whole.
        axis: along which it is joined.
        start, size: of the part.
    """

    concat: str
    axis: int
    start: int
    size: int


@dataclass(frozen=True)
class Joins:
    """Where tensors belong.

    Args:
        places: by the name of the tensor.
        formats: type and scale of each concat, by the name of the whole.
    """

    places: Mapping[str, Place]
    formats: Mapping[str, Format]


def slice_of(whole: View, place: Place) -> View:
    """The part of a whole."""
    shape = tuple(place.size if axis == place.axis else size for axis, size in enumerate(whole.shape))
    return replace(whole, offset=whole.offset + place.start * whole.strides[place.axis], shape=shape, spare=0)


def join(network: Network) -> Joins:
    """The tensors of a graph that are parts of concats along channels; the first where one is in several."""
    places: dict[str, Place] = {}
    formats: dict[str, Format] = {}
    for node in network.nodes:
        if node.op != "Concat" or any(network.producer(name) is None and name != network.input for name in node.inputs):
            continue
        formats[node.out] = concat_format(network, node)
        if parts(network, node)[0].axis == canonical_order(len(network.shapes[node.out]))[-1]:
            for name, part in zip(node.inputs, parts(network, node), strict=True):
                places.setdefault(name, part)
    return Joins(places, formats)


def parts(network: Network, node: Node) -> tuple[Place, ...]:
    """Where each input of a concat lies in it."""
    rank = len(network.shapes[node.out])
    axis = int(node.attributes["axis"]) % rank
    sizes = [network.shapes[name][axis] for name in node.inputs]
    starts = itertools.accumulate(sizes, initial=0)
    return tuple(Place(node.out, axis, start, size) for start, size in zip(starts, sizes, strict=False))


def concat_format(network: Network, node: Node) -> Format:
    """INT8 where all pieces have one scale, or where all who read it round it alike; else FP16."""
    scales = {_scale(network, name) for name in node.inputs}
    common = next(iter(scales)) if len(scales) == 1 else None
    if common is None:
        readers = network.readers(node.out)
        rounded = {network.scale_of(one) if one.op == "QuantizeLinear" else None for one in readers}
        common = next(iter(rounded)) if len(rounded) == 1 and node.out != network.output else None
    return ("fp16", UNIT) if common is None else ("int8", common)


def _scale(network: Network, name: str) -> Scale | None:
    """The scale of a dequantized tensor, also behind moves; None of others."""
    node = network.producer(name)
    if node is None:
        return None
    if node.op == "DequantizeLinear":
        return network.scale_of(node)
    if node.op == "Concat":
        dtype, scale = concat_format(network, node)
        return scale if dtype == "int8" else None
    return _scale(network, node.inputs[0]) if node.op in MOVES else None
