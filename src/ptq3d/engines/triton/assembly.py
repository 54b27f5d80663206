"""A program while it is put together: its steps and buffers so far, and where the graph's tensors lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ptq3d.engines.triton.joining import Joins, slice_of
from ptq3d.engines.triton.network import Network, Node, Shape
from ptq3d.engines.triton.program import Buffer, LayerPrecision
from ptq3d.engines.triton.steps import (
    UNIT,
    Convolve,
    Dtype,
    Epilogue,
    Float,
    Move,
    Pointwise,
    Scale,
    Step,
    Upsample,
    View,
)
from ptq3d.engines.triton.tails import Tail
from ptq3d.engines.triton.views import as_matrix, canonical_order, order_of, row_of, row_strides
from ptq3d.errors import EngineError

Form = Callable[[View], View | None]


class Assembly:
    """Steps, buffers and tensors of a network that is being lowered.

    Args:
        network: folded.
        joins: which tensors are written into a concat at once.
    """

    def __init__(self, network: Network, joins: Joins) -> None:
        self.network = network
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.done: set[Node] = set()
        self.layers: dict[Node, LayerPrecision] = {}
        self._joins = joins
        self._wholes: dict[str, View] = {}
        self._views: dict[str, View] = {}
        self._floats: dict[View, View] = {}

    def computed(self, name: str) -> bool:
        """Whether a tensor is there already."""
        return name in self._views

    def view(self, name: str) -> View:
        """Where a tensor lies."""
        return self._views[name]

    def name(self, names: Iterable[str], view: View) -> None:
        """Say that tensors lie in a view."""
        self._views.update(dict.fromkeys(names, view))

    def emit(self, step: Step) -> None:
        """Add a step behind the others."""
        self.steps.append(step)

    def buffer(self, size: int, dtype: str) -> int:
        """The number of new memory for so many values."""
        self.buffers.append(Buffer(size, dtype))
        return len(self.buffers) - 1

    def fresh(
        self,
        shape: Shape,
        dtype: Dtype,
        scale: Scale = UNIT,
        order: Sequence[int] | None = None,
        *,
        filled: bool = False,
    ) -> View:
        """A new buffer for a tensor, with rows of `row_of`; `order` of its axes is the canonical one unless given."""
        order = canonical_order(len(shape)) if order is None else order
        row, channels = row_of(shape, dtype, order, filled=filled), math.prod(shape[axis] for axis in order[-1:])
        buffer = self.buffer(math.prod(shape[axis] for axis in order[:-1]) * row, dtype)
        return View(buffer, 0, shape, row_strides(shape, order, row), dtype, *scale, row - channels)

    def copied(self, view: View, order: Sequence[int] | None = None, name: str = "copy") -> View:
        """A view's values in a new buffer."""
        out = self.fresh(view.shape, view.dtype, view.scale, order)
        self.emit(Move(name, out, view))
        return out

    def formed(self, view: View, form: Form, order: Sequence[int] | None = None) -> View:
        """A view in the form that a kernel takes, copied into a new buffer of that order first where it has no such form."""
        seen = form(view)
        return in_form(self.copied(view, order), form) if seen is None else seen

    def target(self, tail: Tail, form: Form, order: Sequence[int] | None = None) -> View:
        """Memory for what a step makes (`store`), in the form that its kernel writes."""
        return in_form(self.store(tail, order), form)

    def whole(self, concat: str) -> View:
        """The buffer of a concat whose pieces are written into it."""
        if concat not in self._wholes:
            self._wholes[concat] = self.fresh(self.network.shapes[concat], *self._joins.formats[concat])
        return self._wholes[concat]

    def joined(self, concat: str) -> bool:
        """Whether pieces of a concat were written into its buffer."""
        return concat in self._wholes

    def store(self, tail: Tail, order: Sequence[int] | None = None, *, filled: bool = False) -> View:
        """Memory for what a step makes: a part of a concat where it belongs to one and lies in that order, else its own.

        Args:
            tail: what is stored.
            order: of axes, the canonical one unless given.
            filled: the step writes whole lanes (`row_of`).
        """
        shape = self.network.shapes[tail.names[0]]
        canonical = order is None or tuple(order) == canonical_order(len(shape))
        dtype: Dtype = "fp16" if tail.dtype == "fp32" and not canonical else tail.dtype
        place = next((self._joins.places[name] for name in tail.names if name in self._joins.places), None)
        if place is not None and canonical and self._joins.formats[place.concat] == (dtype, tail.scale):
            view = slice_of(self.whole(place.concat), place)
        else:
            view = self.fresh(shape, dtype, tail.scale, order, filled=filled)
        self.name(tail.names, view)
        self.done.update(tail.nodes)
        return view

    def epilogue(self, tail: Tail, form: Form, order: Sequence[int] | None = None) -> Epilogue:
        """A tail as steps say it, the other branch of a sum in the form of the step."""
        other = self.formed(self.view(tail.other), form, order) if tail.other else None
        rounded = None if tail.rounded is None else tail.rounded.step
        zero = 0 if tail.rounded is None else tail.rounded.zero
        return Epilogue(tail.activation, rounded, other, tail.last, zero)

    def as_float(self, name: str) -> View:
        """A tensor in FP16, made once where it is INT8."""
        view = self.view(name)
        if view.dtype != "int8":
            return view
        if view not in self._floats:
            self._floats[view] = self.converted(view, self.fresh(view.shape, "fp16", order=order_of(view)), name)
        return self._floats[view]

    def converted(self, view: View, out: View, name: str) -> View:
        """Write a view in another type or scale into `out`, of the same shape."""
        if (view.dtype, view.scale) == (out.dtype, out.scale):
            self.emit(Move(name, out, view))
            return out
        order = order_of(out)
        for inner in range(1, len(order) + 1):
            source, target = as_matrix(view, order, inner), as_matrix(out, order, inner)
            if source is not None and target is not None:
                self.emit(Pointwise(name, target, source))
                return out
        dense = self.fresh(out.shape, out.dtype, out.scale, order_of(view))
        if as_matrix(view, order_of(view)) is None:
            return self.converted(self.copied(view, order), out, name)
        self.emit(Move(name, out, self.converted(view, dense, name)))
        return out

    def summed(self, view: View) -> int | None:
        """The sums that the convolution which made a view takes of it; None where none made it."""
        for place, step in enumerate(self.steps):
            if isinstance(step, (Convolve, Upsample)) and step.out == view:
                if step.sums is not None:
                    return step.sums
                sums = self.sums_of(view)
                self.steps[place] = replace(step, sums=sums)
                return sums
        return None

    def sums_of(self, view: View) -> int:
        """A new buffer (N, C, 2) for the sums of an image."""
        return self.buffer(2 * view.shape[0] * view.shape[1], "int64")

    def in_float(self, node: Node, why: str = "") -> None:
        """Leave an operator to PyTorch in FP16.

        Raises:
            EngineError: something reads more of it than its first output.
        """
        if any(self.network.readers(name) or name == self.network.output for name in node.outputs[1:]):
            raise EngineError(
                f"{node.op} '{node.name}' has several outputs that are read, of which the triton engine knows the first only. "
                "Use --engine onnxruntime, openvino or tensorrt."
            )
        inputs = tuple(self._float_input(name) for name in node.inputs)
        self.emit(Float(node.name, self.store(Tail((node.out,))), node.op, dict(node.attributes), inputs))
        if why:
            self.layer(node, why)

    def _float_input(self, name: str) -> Any:
        if not name:
            return None
        constant = self.network.constant(name)
        return self.as_float(name) if constant is None else constant

    def layer(self, node: Node, why: str = "") -> None:
        """Report a multiplying layer: INT8, or FP16 for a reason."""
        macs = multiplications(self.network, node)
        self.layers[node] = LayerPrecision(node.name, node.op, "fp16" if why else "int8", macs, why)


def in_form(view: View, form: Form) -> View:
    """A view in the form that a kernel takes.

    Raises:
        EngineError: it has no such form.
    """
    seen = form(view)
    if seen is None:
        raise EngineError(f"no kernel of the triton engine takes a tensor of {view.shape}. Use --engine tensorrt.")
    return seen


def multiplications(network: Network, node: Node) -> int:
    """Multiply-accumulates of one window: outputs x weights of each; inputs x weights of each for ConvTranspose."""
    output, first, second = (network.shapes[name] for name in (node.out, node.inputs[0], node.inputs[1]))
    if node.op == "Conv":
        return math.prod(output) * math.prod(second[1:]) // network.batch
    if node.op == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:]) // network.batch
    depth = first[-2] if node.op == "Gemm" and node.attributes.get("transA", 0) else first[-1]
    return math.prod(output) * depth // network.batch
