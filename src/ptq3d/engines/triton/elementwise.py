"""Operators on one value at a time, and sums of two tensors: Mul and Add of constants, activations, rounding, residual sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ptq3d.engines.triton import tails
from ptq3d.engines.triton.assembly import Assembly
from ptq3d.engines.triton.network import Array, Node
from ptq3d.engines.triton.steps import Floats, Pointwise, View
from ptq3d.engines.triton.tails import Tail
from ptq3d.engines.triton.views import as_matrix, as_samples, canonical_order, order_of


@dataclass(frozen=True, eq=False)
class Constant:
    """What a Mul or an Add takes beside a tensor.

    Args:
        values: (1,), (C,) or, without the batch, of the tensor's shape.
        axis: that of C; None for the others.
    """

    values: Floats
    axis: int | None

    @property
    def everywhere(self) -> bool:
        """Whether each place has its own value."""
        return self.axis is None and self.values.size > 1


def constant_beside(assembly: Assembly, node: Node, name: str) -> Constant | None:
    """The constant of a Mul or an Add with that tensor; None where it has none that can be told by channel or by place."""
    network = assembly.network
    other = next((one for one in node.inputs if one != name), "")
    values, shape = network.constant(other) if other else None, network.shapes[name]
    if values is None or network.shapes[node.out] != shape:
        return None
    values = np.asarray(values, np.float32)
    padded = (1,) * (len(shape) - values.ndim) + values.shape
    varied = [axis for axis, size in enumerate(padded) if size != 1]
    if not varied:
        return Constant(values.reshape(1), None)
    if 0 in varied:
        return None
    if len(varied) == 1:
        return Constant(values.reshape(-1), varied[0])
    return Constant(np.array(np.broadcast_to(values.reshape(padded)[0], shape[1:])), None)


def multiply(assembly: Assembly, node: Node) -> None:
    """Mul with a constant, and the Add of another one behind it."""
    name = _tensor(assembly, node)
    factor = constant_beside(assembly, node, name) if name else None
    if factor is None or factor.everywhere:
        assembly.in_float(node)
        return
    following = assembly.network.sole_reader(node.out)
    offset = None
    if following is not None and following.op == "Add":
        offset = constant_beside(assembly, following, node.out)
        if offset is not None and offset.axis not in (None, factor.axis) and factor.axis is not None:
            offset = None
    if offset is not None and following is not None:
        assembly.done.add(following)
    out = node.out if offset is None or following is None else following.out
    tail = tails.follow(assembly.network, out, assembly.computed)
    _pointwise(assembly, node.name, name, tail, (factor, offset))


def add(assembly: Assembly, node: Node) -> None:
    """Add of a constant, or of two tensors of one shape."""
    name = _tensor(assembly, node)
    network = assembly.network
    if name:
        offset = constant_beside(assembly, node, name)
        if offset is None:
            assembly.in_float(node)
        else:
            tail = tails.follow(network, node.out, assembly.computed)
            _pointwise(assembly, node.name, name, tail, (None, offset))
        return
    left, right = node.inputs
    if not network.shapes[left] == network.shapes[right] == network.shapes[node.out]:
        assembly.in_float(node)
        return
    _pointwise(assembly, node.name, left, tails.behind_sum(network, node, right))


def activate(assembly: Assembly, node: Node) -> None:
    """An activation of a tensor that is stored."""
    function = tails.activation_of(assembly.network, node)
    if function is None:
        assembly.in_float(node)
        return
    tail = tails.behind_activation(assembly.network, node, function, assembly.computed)
    _pointwise(assembly, node.name, node.inputs[0], tail)


def quantize(assembly: Assembly, node: Node) -> None:
    """QuantizeLinear of a tensor that is stored: nothing where it has that scale already."""
    view = assembly.view(node.inputs[0])
    if (view.dtype, view.scale) == ("int8", assembly.network.scale_of(node)):
        assembly.name([node.out], view)
        return
    tail = tails.behind_rounding(assembly.network, node, assembly.computed)
    _pointwise(assembly, node.name, node.inputs[0], tail)


def _tensor(assembly: Assembly, node: Node) -> str:
    """The one input that is no constant; "" where both are none."""
    found = [name for name in node.inputs if assembly.network.constant(name) is None]
    return found[0] if len(found) == 1 else ""


Pair = tuple[Constant | None, Constant | None]


def _pointwise(assembly: Assembly, title: str, name: str, tail: Tail, constants: Pair = (None, None)) -> None:
    """One step for a tensor that is stored; rows and channels as they lie in memory, a copy where they do not lie evenly."""
    view = assembly.view(name)
    axis = next((one.axis for one in constants if one is not None and one.axis is not None), None)
    everywhere = any(one is not None and one.everywhere for one in constants)
    order = _order(assembly, view, tail, axis)
    if everywhere:
        order = (0, *(one for one in order if one != 0))
    inner = 1 if axis is not None or everywhere else _inner(assembly, view, tail, order)
    form = partial(as_samples, order=order) if everywhere else partial(as_matrix, order=order, inner=inner)
    x = assembly.formed(view, form, order)
    epilogue = assembly.epilogue(tail, form, order)
    out = assembly.target(tail, form, order)
    factor, offset = (None if one is None else _arranged(one, order) for one in constants)
    assembly.emit(Pointwise(title, out, x, factor, offset, epilogue))


def _arranged(constant: Constant, order: Sequence[int]) -> Array:
    """(1,), (C,) or (rows / N, C), as the step reads it."""
    if not constant.everywhere:
        return constant.values
    turned = constant.values.transpose([axis - 1 for axis in order[1:]])
    return np.ascontiguousarray(turned.reshape(-1, turned.shape[-1]))


def _order(assembly: Assembly, view: View, tail: Tail, axis: int | None) -> tuple[int, ...]:
    """The axes as they lie in memory, the channels last."""
    rank = len(view.shape)
    canonical = canonical_order(rank)
    if tail.dtype == "fp32" and axis in (None, canonical[-1]):
        return canonical
    order = order_of(view)
    if axis is None and as_matrix(view, canonical) is not None:
        return canonical
    return order if axis is None else (*(one for one in order if one != axis), axis)


def _inner(assembly: Assembly, view: View, tail: Tail, order: tuple[int, ...]) -> int:
    """How many of the last axes count as channels, so that rows lie evenly: one, or the fewest that do without a copy."""
    if order == canonical_order(len(order)):
        return 1
    views = [view, *([assembly.view(tail.other)] if tail.other else [])]
    for inner in range(1, len(order)):
        if all(as_matrix(one, order, inner) is not None for one in views):
            return inner
    return 1
