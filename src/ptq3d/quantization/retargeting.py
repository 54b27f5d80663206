"""A plan that was made for one runtime, placed for another: the scales stay, the positions and types are the target's."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ptq3d.errors import GraphError
from ptq3d.graphs.layers import WEIGHT_AXIS, weight_value
from ptq3d.int8 import Scale, scale_of_range
from ptq3d.quantization.groups import pieces_of, quantized_below
from ptq3d.quantization.planning import Placement, Plan, place, reads_int8
from ptq3d.quantization.targets import Target


@dataclass(frozen=True)
class Retargeted:
    """What `retarget` made.

    Args:
        plan: for the target.
        kept: weighted layers in floating point, with the reason.
        rescaled: tensors that got another step, of no smaller range.
        dropped: quantized tensors of the file that the target reads in floating point.
    """

    plan: Plan
    kept: Mapping[str, str]
    rescaled: tuple[str, ...]
    dropped: tuple[str, ...]


def retarget(model: ir.Model, foreign: Plan, target: Target, *, keep: Sequence[str] = ()) -> Retargeted:
    """A foreign plan as `target` wants it.

    A Q behind a concat or a move goes in front of it. A scale that the target can express is kept: the same one, or int8 as
    uint8 with a zero-point 128 higher and back, which is exact. Where it cannot (uint8 with another zero-point for a
    symmetric target; inputs of one concat with different scales), one scale takes its place that covers all their ranges.

    Args:
        model: the FP32 graph that `qdq.read` gave.
        foreign: the plan that it gave.
        target: the runtime to write for.
        keep: glob patterns of layers to leave in floating point besides those of the file.

    Raises:
        GraphError: the file has no INT8 layer.
        OptionError: no layer is left, or a pattern matches none.
    """
    if not foreign.layers:
        raise GraphError(
            "the file has no layer whose input and weights are both quantized; there is nothing to retarget."
        )
    named = [node.name for node in model.graph if node.op_type in WEIGHT_AXIS]
    floating = [glob.escape(str(name)) for name in named if name not in foreign.layers]
    rounded = [
        str(node.name) for node in model.graph if node.op_type in WEIGHT_AXIS and _reads_rounded(node, 0, foreign)
    ]
    placement = place(model, target, keep=(*floating, *keep), rounded=rounded)
    kept = {name: "as in the file" if name not in foreign.layers else why for name, why in placement.kept.items()}
    found = _scales_of_sources(model, foreign, placement)
    activations = _activations(placement, found, target)
    chosen = [node for node in model.graph if node.name in placement.layers]
    names = [str(weight.name) for node in chosen if (weight := weight_value(node)) is not None]
    weights = {name: foreign.weights[name] for name in names}
    rescaled = tuple(
        name for name, scale in activations.items() if not all(_same_values(scale, old) for old in found[name])
    )
    dropped = tuple(name for name in foreign.activations if name not in activations)
    readers = {name: uses for name, uses in placement.readers.items() if name in activations}
    return Retargeted(Plan(placement.layers, activations, weights, target.name, readers), kept, rescaled, dropped)


def _reads_rounded(node: ir.Node, index: int, foreign: Plan) -> bool:
    """Whether that input is a dequantized tensor in the file, or made of one by concats and moves."""
    value = node.inputs[index]
    if value is None or value.name is None:
        return False
    if value.name in foreign.activations:
        others = foreign.readers.get(value.name, frozenset())
        return (node.name, index) in others or reads_int8(node, index, foreign.layers, foreign.activations)
    producer = value.producer()
    return producer is not None and any(
        _reads_rounded(producer, place, foreign) for place, _ in enumerate(pieces_of(value))
    )


def _scales_of_sources(model: ir.Model, foreign: Plan, placement: Placement) -> dict[str, list[Scale]]:
    """Tensor of a placement -> the scales with which INT8 layers read it in the file, its own, or those of what it is made of."""
    found: dict[str, list[Scale]] = {}
    chosen, lone = set(placement.layers), {group[0] for group in placement.tensors if len(group) == 1}
    read = [
        value
        for node in model.graph
        if node.name in chosen
        for value in (node.inputs[:1] if weight_value(node) is not None else node.inputs[:2])
    ]
    for value in read:
        _follow(value, None, foreign, found)
    for name, scale in foreign.activations.items():
        found.setdefault(name, [scale])
    for value in read:
        if value is not None and value.name in lone - found.keys():
            found[str(value.name)] = [foreign.activations[name] for name in quantized_below(value, foreign.activations)]
    return found


def _follow(value: ir.Value | None, scale: Scale | None, foreign: Plan, found: dict[str, list[Scale]]) -> None:
    """Walk as `planning` does, and take along the scale that is nearest to the layer."""
    if value is None:
        return
    scale = scale or foreign.activations.get(str(value.name))
    if scale is not None and value.const_value is None:
        found.setdefault(str(value.name), []).append(scale)
    for piece in pieces_of(value):
        _follow(piece, scale, foreign, found)


def _activations(placement: Placement, found: Mapping[str, list[Scale]], target: Target) -> dict[str, Scale]:
    """One scale for each group of which the file knows any."""
    activations: dict[str, Scale] = {}
    for group in placement.tensors:
        known = [scale for name in group for scale in found.get(name, ())]
        symmetric = target.symmetric or bool(placement.signed & set(group))
        if known:
            scale = _common(known, symmetric=symmetric)
            activations.update(dict.fromkeys((name for name in group if name in found), scale))
    return activations


def _common(scales: Sequence[Scale], *, symmetric: bool) -> Scale:
    """The one scale itself as the target's type, where it can be expressed; otherwise one that covers all."""
    first = _expressed(scales[0], symmetric=symmetric)
    if first is not None and all(_same_values(first, scale) for scale in scales):
        return first
    ranges = [_range(scale, symmetric=symmetric) for scale in scales]
    return scale_of_range(min(low for low, _ in ranges), max(high for _, high in ranges), symmetric=symmetric)


def _expressed(scale: Scale, *, symmetric: bool) -> Scale | None:
    """The same values as int8 with zero-point 0 or as uint8; None where that type has them not."""
    if scale.axis is not None:
        return None
    dtype = "int8" if symmetric else "uint8"
    shift = {("int8", "uint8"): 128, ("uint8", "int8"): -128}.get((scale.dtype, dtype), 0)
    zero_point = scale.zero_point + shift
    return None if symmetric and zero_point.any() else Scale(scale.step, np.asarray(zero_point, np.int32), dtype)


def _same_values(one: Scale, other: Scale) -> bool:
    """Whether both stand for the same real values, each in its own type."""
    offset = {"int8": 128, "uint8": 0}
    return (
        one.axis == other.axis
        and np.array_equal(one.step, other.step)
        and np.array_equal(one.zero_point + offset[one.dtype], other.zero_point + offset[other.dtype])
    )


def _range(scale: Scale, *, symmetric: bool) -> tuple[float, float]:
    """Smallest and largest real value; without int8's -128 for a symmetric scale, whose step it would change."""
    lowest, highest = (-128, 127) if scale.dtype == "int8" else (0, 255)
    if symmetric and scale.dtype == "int8" and not scale.zero_point.any():
        lowest = -127
    low, high = (lowest - scale.zero_point) * scale.step, (highest - scale.zero_point) * scale.step
    return float(low.min()), float(high.max())
