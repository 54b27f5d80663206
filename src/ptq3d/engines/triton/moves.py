"""Operators that only move values: new strides where they suffice, a copy where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ptq3d.engines.triton.assembly import Assembly
from ptq3d.engines.triton.folding import FLOATING
from ptq3d.engines.triton.joining import parts, slice_of
from ptq3d.engines.triton.network import Network, Node
from ptq3d.engines.triton.steps import UNIT, Move, Scale, View
from ptq3d.engines.triton.tails import scale_behind_moves
from ptq3d.engines.triton.views import canonical_order, moved, order_of, permuted, reshaped
from ptq3d.errors import EngineError


def alias(assembly: Assembly, node: Node) -> None:
    """Identity, and a Cast between floating-point types."""
    if node.op == "Cast" and node.attributes.get("to", 1) not in FLOATING:
        assembly.in_float(node)
    else:
        assembly.name([node.out], assembly.view(node.inputs[0]))


def dequantize(assembly: Assembly, node: Node) -> None:
    """DequantizeLinear of activations: their view says the scale."""
    view = assembly.view(node.inputs[0])
    step, zero = assembly.network.scale_of(node)
    assembly.name([node.out], replace(view, step=step, zero=zero) if view.dtype == "int8" else view)


def reshape(assembly: Assembly, node: Node) -> None:
    """Reshape, Flatten, Squeeze and Unsqueeze."""
    shape = assembly.network.shapes[node.out]
    order = range(len(assembly.network.shapes[node.inputs[0]]))
    view = assembly.formed(assembly.view(node.inputs[0]), lambda seen: reshaped(seen, shape), order)
    assembly.name([node.out], view)


def transpose(assembly: Assembly, node: Node) -> None:
    """Transpose."""
    view = assembly.view(node.inputs[0])
    order = node.attributes.get("perm") or tuple(reversed(range(len(view.shape))))
    assembly.name([node.out], permuted(view, order))


def cut(assembly: Assembly, node: Node) -> None:
    """Slice with positive steps."""
    view = assembly.view(node.inputs[0])
    numbers = [one for name in node.inputs[1:] if (one := _numbers(assembly, name)) is not None]
    if len(numbers) < len(node.inputs) - 1 or (len(numbers) > 3 and min(numbers[3]) < 1):
        assembly.in_float(node)
        return
    starts, ends = numbers[:2]
    axes = numbers[2] if len(numbers) > 2 else range(len(starts))
    steps = numbers[3] if len(numbers) > 3 else [1] * len(starts)
    chosen = [slice(None)] * len(view.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        chosen[axis] = slice(start, end, step)
    assembly.name([node.out], moved(view, lambda values: values[tuple(chosen)]))


def gather(assembly: Assembly, node: Node) -> None:
    """Gather of one place along an axis."""
    index = assembly.network.constant(node.inputs[1])
    view = assembly.view(node.inputs[0])
    axis = int(node.attributes.get("axis", 0)) % len(view.shape)
    if index is None or index.size != 1:
        assembly.in_float(node)
        return
    place = int(index.reshape(-1)[0]) % view.shape[axis]

    def taken(values: Tensor) -> Tensor:
        return values.narrow(axis, place, 1) if index.ndim else values.select(axis, place)

    shape = assembly.network.shapes[node.out]
    one = moved(view, taken)
    assembly.name([node.out], assembly.formed(one, lambda seen: reshaped(seen, shape), range(len(one.shape))))


def split(assembly: Assembly, node: Node) -> None:
    """Split."""
    view = assembly.view(node.inputs[0])
    axis = int(node.attributes.get("axis", 0)) % len(view.shape)
    sizes = [assembly.network.shapes[name][axis] for name in node.outputs]
    for name, start, size in zip(node.outputs, itertools.accumulate(sizes, initial=0), sizes, strict=False):
        offset = view.offset + start * view.strides[axis]
        shape = tuple(size if place == axis else old for place, old in enumerate(view.shape))
        assembly.name([name], replace(view, offset=offset, shape=shape, spare=0))


def pad(assembly: Assembly, node: Node) -> None:
    """Pad with zeros.

    Raises:
        EngineError: integers padded with another number than their zero-point.
    """
    view = assembly.view(node.inputs[0])
    pads = _numbers(assembly, node.inputs[1])
    axes = _numbers(assembly, node.input(3)) if node.input(3) else list(range(len(view.shape)))
    plain = node.attributes.get("mode", "constant") == "constant" and _puts_zero(assembly.network, node, view)
    if pads is None or axes is None or not plain or min(pads) < 0:
        assembly.in_float(node)
        return
    before = [0] * len(view.shape)
    for axis, size in zip(axes, pads, strict=False):
        before[axis] = size
    whole = assembly.fresh(assembly.network.shapes[node.out], view.dtype, view.scale, order_of(view))
    offset = sum(size * stride for size, stride in zip(before, whole.strides, strict=True))
    assembly.emit(Move(node.name, replace(whole, offset=offset, shape=view.shape), view, zeros=whole))
    assembly.name([node.out], whole)


def _puts_zero(network: Network, node: Node, view: View) -> bool:
    """Whether a Pad of constants puts what stands for 0 around a tensor: 0 around real values, the zero-point around integers."""
    value = network.constant(node.input(2)) if node.input(2) else np.zeros(())
    if network.quantizing(node.inputs[0]) is None:
        return value is not None and not value.any()
    wanted = view.zero + (128 if network.unsigned(node.inputs[0]) else 0)
    if value is None or (value != wanted).any():
        raise EngineError(
            f"Pad '{node.name}' puts another number than the zero-point {wanted} around integers, which the triton engine does "
            "not. Quantize the network with --target triton."
        )
    return True


def _numbers(assembly: Assembly, name: str) -> list[int] | None:
    values = assembly.network.constant(name)
    return None if values is None else [int(value) for value in values.reshape(-1)]


def concat(assembly: Assembly, node: Node) -> None:
    """Concat: pieces that were written where they belong stay there, the others are copied."""
    if any(assembly.network.constant(name) is not None for name in node.inputs):
        assembly.in_float(node)
        return
    views = [assembly.view(name) for name in node.inputs]
    whole = assembly.whole(node.out) if assembly.joined(node.out) else _whole(assembly, node, views)
    for name, view, place in zip(node.inputs, views, parts(assembly.network, node), strict=True):
        piece = slice_of(whole, place)
        if view != piece:
            assembly.converted(view, piece, f"{node.name}/{name}")
    assembly.name([node.out], whole)


def _whole(assembly: Assembly, node: Node, views: Sequence[View]) -> View:
    """Memory for a concat in the order of its first piece; INT8 where all pieces are alike, or it is only moved and rounded."""
    scales = {view.scale if view.dtype == "int8" else None for view in views}
    scale = next(iter(scales)) if len(scales) == 1 else None
    if scale is None:
        scale = _rounded(assembly, node)
    shape = assembly.network.shapes[node.out]
    order = order_of(views[0]) if min(views[0].shape) > 1 else _order_of_all(views, len(shape))
    return assembly.fresh(shape, "fp16" if scale is None else "int8", scale or UNIT, order)


def _rounded(assembly: Assembly, node: Node) -> Scale | None:
    readers = assembly.network.readers(node.out)
    scales = {assembly.network.scale_of(one) if one.op == "QuantizeLinear" else None for one in readers}
    alone = next(iter(scales)) if len(scales) == 1 and node.out != assembly.network.output else None
    return alone if alone is not None else scale_behind_moves(assembly.network, node.out)


def _order_of_all(views: Sequence[View], rank: int) -> tuple[int, ...]:
    """The order of the widest piece, since axes of one value tell none; the canonical one where all have such."""
    widest = max(views, key=lambda view: sum(size > 1 for size in view.shape))
    many = sum(size > 1 for size in widest.shape) >= rank - 1
    return order_of(widest) if many else canonical_order(rank)
