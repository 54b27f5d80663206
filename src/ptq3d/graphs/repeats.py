"""Constants that repeat themselves, stored once: masks of shifted windows, tables of relative positions.

A network that attends within windows adds the same few masks to hundreds of windows, and the same few position biases to
thousands of pairs of tokens. Written out at 96^3, SwinUNETR's weigh about as much as its weights.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ptq3d.graphs.constants import LEAST_BYTES, add_constant


def share_repeats(model: ir.Model) -> int:
    """Turn added constants that repeat their slices into one Gather of the different ones each, in place.

    gathered[..., i, ...] = different[..., places[i], ...], the same values bit for bit. A constant is left alone where that
    would not halve it, or where anything but Add reads it.

    Args:
        model: constants are initializers.

    Returns:
        How many constants were turned.
    """
    shared: dict[bytes, ir.Value] = {}
    turned = 0
    for value in list(model.graph.initializers.values()):
        if value.const_value is None or value.const_value.nbytes < LEAST_BYTES or not _only_added(value):
            continue
        array = value.const_value.numpy()
        found = min((_different(array, span) for span in _spans(array)), key=_bytes, default=None)
        if found is not None and 2 * _bytes(found) <= array.nbytes:
            _gather(model, value, found, shared)
            turned += 1
    return turned


_Found = tuple[NDArray[np.generic], NDArray[np.int32], int]
"""The different slices, which of them lies where, and along which axis."""


def _bytes(found: _Found) -> int:
    return found[0].nbytes + found[1].nbytes


def _only_added(value: ir.Value) -> bool:
    readers = [reader.op_type for reader, _ in value.uses()]
    return bool(readers) and all(reader == "Add" for reader in readers) and not value.is_graph_output()


def _spans(array: NDArray[np.generic]) -> list[tuple[int, int]]:
    """Each axis by itself (windows), and the last two together (pairs of tokens)."""
    spans = [(axis, axis + 1) for axis, size in enumerate(array.shape) if size > 1]
    return [*spans, (array.ndim - 2, array.ndim)] if array.ndim > 2 else spans


def _different(array: NDArray[np.generic], span: tuple[int, int]) -> _Found:
    """The different slices of an array along some axes, in the order they come."""
    first, last = span
    before, places = array.shape[:first], array.shape[first:last]
    slices = np.moveaxis(array.reshape(*before, math.prod(places), *array.shape[last:]), first, 0)
    seen: dict[bytes, int] = {}
    where = np.array([seen.setdefault(one.tobytes(), len(seen)) for one in slices], np.int32)
    kept = slices[np.unique(where, return_index=True)[1]]
    return np.moveaxis(kept, 0, first), where.reshape(places), first


def _gather(model: ir.Model, value: ir.Value, found: _Found, shared: dict[bytes, ir.Value]) -> None:
    """Replace a constant by Gather(different, places); equal places of several constants are one constant."""
    different, places, axis = found
    key = places.tobytes() + repr(places.shape).encode()
    if key not in shared:
        shared[key] = add_constant(model, f"{value.name}/places", places)
    table = add_constant(model, f"{value.name}/different", different)
    node = ir.node("Gather", [table, shared[key]], {"axis": axis}, name=f"{value.name}/gather")
    node.outputs[0].name = f"{value.name}/gathered"
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    model.graph.insert_before(model.graph[0], node)
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    model.graph.initializers.pop(str(value.name))
