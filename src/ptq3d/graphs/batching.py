"""A graph of one window as a graph of any number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from ptq3d.errors import GraphError
from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.files import image_input
from ptq3d.graphs.layers import shape_of
from ptq3d.graphs.passes import infer_shapes

BATCH = "batch"
# operators that mix what lies along axes they are told; those that take the last one where they are told none
REDUCED = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
ALONG = ("ArgMax", "ArgMin", "CumSum", "MeanVarianceNormalization", *(f"Reduce{kind}" for kind in REDUCED))
ALONG_LAST = ("Hardmax", "LayerNormalization", "LogSoftmax", "LpNormalization", "RMSNormalization", "Softmax", "TopK")


def free_batch(model: ir.Model) -> None:
    """Let a graph take any number of windows, in place: the first axis of its input and output is free.

    Every tensor made of the input must carry the windows along its first axis and never mix them; Reshapes get a 0 there, which
    keeps the size. A graph whose batch is free already stays as it is.

    Args:
        model: simplified, of one window.

    Raises:
        GraphError: an operator moves, splits or fixes the first axis; it is named.

    Source: ONNX Reshape-5: a 0 in the shape copies the input's size.
    """
    value = image_input(model)
    shape = value.shape
    if shape is None or not isinstance(shape[0], int):
        return
    if shape[0] != 1:
        raise GraphError(f"the graph takes {shape[0]} windows at a time; give one that takes 1, or a free number.")
    made = {value.name}
    for node in model.graph:
        if any(one is not None and one.name in made for one in node.inputs):
            _follow(model, node, made)
            made.update(one.name for one in node.outputs)
    value.shape = ir.Shape([BATCH, *shape[1:]])
    for node in model.graph:
        for output in node.outputs:
            if output.name in made and output.shape is not None:
                output.shape = ir.Shape([BATCH, *output.shape[1:]])
    infer_shapes(model)


def _follow(model: ir.Model, node: ir.Node, made: set[str | None]) -> None:
    """Check one operator that reads windows; mend it where it is a Reshape."""
    if any(shape_of(one)[:1] != (1,) for one in (*node.outputs, *_read(node, made))):
        raise _fixed(node, "puts something else on the first axis")
    if not KEEPS.get(node.op_type, _always)(node, made):
        raise _fixed(node, "moves or fixes the first axis")
    if node.op_type == "Reshape":
        target = _constant(node, 1)
        if target is None:
            raise _fixed(node, "has no constant shape")
        size = np.concatenate([[0], target[1:]]).astype(np.int64)
        node.replace_input_with(1, add_constant(model, f"{node.name}/any_batch", size))
        node.attributes.pop("allowzero", None)  # with which a 0 would be a size
    if node.op_type == "Resize" and _constant(node, 3) is not None:
        _scale_instead(model, node)


def _scale_instead(model: ir.Model, node: ir.Node) -> None:
    """Sizes name the number of windows, factors do not."""
    old, new = (np.asarray(shape_of(one), np.float32) for one in (node.inputs[0], node.outputs[0]))
    factors = new / old
    if node.attributes.get("axes") is not None or (np.floor(old * factors) != new).any():
        raise _fixed(node, "resizes to sizes that no factor gives")
    node.resize_inputs(3)
    node.replace_input_with(2, add_constant(model, f"{node.name}/factors", factors))


def _fixed(node: ir.Node, why: str) -> GraphError:
    return GraphError(f"{node.op_type} '{node.name}' {why}, so the network takes one window at a time: use --batch 1.")


def _read(node: ir.Node, made: set[str | None]) -> list[ir.Value]:
    return [one for one in node.inputs if one is not None and one.name in made]


def _always(node: ir.Node, made: set[str | None]) -> bool:
    return True


def _all_made(node: ir.Node, made: set[str | None]) -> bool:
    """A concat: a constant piece has one window only."""
    return _away(node, made) and len(_read(node, made)) == len(node.inputs)


def _away(node: ir.Node, made: set[str | None]) -> bool:
    """The operator works along axes that are given, none of which is the first."""
    given = node.attributes.get("axis") or node.attributes.get("axes")
    found = _constant(node, {"Slice": 3}.get(node.op_type, 1)) if given is None else None
    axes = [given.as_int()] if given is not None and given.type == ir.AttributeType.INT else []
    if given is not None and given.type == ir.AttributeType.INTS:
        axes = list(given.as_ints())
    axes += [] if found is None else [int(one) for one in found.reshape(-1)]
    rank = len(shape_of(node.inputs[0]))
    return bool(axes) and all(axis % rank for axis in axes)


def _told_away(node: ir.Node, made: set[str | None]) -> bool:
    return "axis" in node.attributes and _away(node, made)


def _last_or_away(node: ir.Node, made: set[str | None]) -> bool:
    return "axis" not in node.attributes or _away(node, made)


def _unsqueezed(node: ir.Node, made: set[str | None]) -> bool:
    axes, rank = _constant(node, 1), len(shape_of(node.outputs[0]))
    return axes is not None and all(int(axis) % rank for axis in axes)


def _transposed(node: ir.Node, made: set[str | None]) -> bool:
    order = node.attributes.get("perm")
    return order is not None and next(iter(order.as_ints())) == 0


def _unpadded(node: ir.Node, made: set[str | None]) -> bool:
    pads = _constant(node, 1)
    return pads is not None and len(node.inputs) < 4 and not pads[0] and not pads[len(pads) // 2]


def _factor(node: ir.Node, made: set[str | None]) -> bool:
    """A product: rows of windows are on the left; with weights of two axes, or of as many windows on the right."""
    left, right = node.inputs[0], node.inputs[1]
    own = left is not None and left.name in made
    return own and (len(shape_of(right)) == 2 or (right is not None and right.name in made))


def _never(node: ir.Node, made: set[str | None]) -> bool:
    return False


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


# operators that do not simply work on every window for itself
KEEPS: Mapping[str, Callable[[ir.Node, set[str | None]], bool]] = {
    "Concat": _all_made,
    "Expand": _never,
    "Flatten": lambda node, _: "axis" not in node.attributes or node.attributes["axis"].as_int() == 1,
    "Gather": _told_away,
    "Gemm": lambda node, _: "transA" not in node.attributes or node.attributes["transA"].as_int() == 0,
    "MatMul": _factor,
    "Pad": _unpadded,
    "Slice": _away,
    "Split": _told_away,
    "Squeeze": _away,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
    **dict.fromkeys(ALONG, _away),
    **dict.fromkeys(ALONG_LAST, _last_or_away),
}
