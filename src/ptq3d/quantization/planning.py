"""Which tensors become INT8, and with which scale: from graph, target and observed ranges to a Plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from ptq3d.errors import CalibrationError, OptionError
from ptq3d.graphs.layers import WEIGHT_AXIS, groups, layers, shape_of, weight_axis, weight_value
from ptq3d.int8 import Scale, scale_of_range, scale_of_weight
from ptq3d.quantization.fusing import (
    chain_ends,
    is_product,
    only_read_by,
    product_ends,
    read_by_products,
    unrounded_uses,
)
from ptq3d.quantization.groups import Groups, pieces_of, share_steps
from ptq3d.quantization.observers import Range
from ptq3d.quantization.targets import MOVES, Target

LARGEST_HALF = 65504.0
RECTIFIED = frozenset({"Relu", "Sigmoid", "Softmax"})
Use = tuple[str, int]  # (name of a node, index of its input)


@dataclass(frozen=True)
class Placement:
    """Where Q/DQ go, before any scale is known.

    Args:
        layers: names of the nodes that run in INT8, in graph order.
        kept: names of the weighted nodes that stay in floating point, with the reason.
        tensors: activation tensors to quantize; those of one inner tuple share one scale (inputs of one concat).
        signed: tensors that must be symmetric int8 whatever their range.
        readers: as in `Plan`.
    """

    layers: tuple[str, ...]
    kept: Mapping[str, str]
    tensors: tuple[tuple[str, ...], ...]
    signed: frozenset[str]
    readers: Mapping[str, frozenset[Use]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The whole numerical meaning of a Q/DQ graph; all that `qdq.write` needs and `qdq.read` gives back.

    Args:
        layers: names of the nodes that run in INT8.
        activations: tensor name -> scale.
        weights: weight name -> scale per output channel.
        target: the runtime whose placement rules were followed, "foreign" where a file was read.
        readers: tensor -> (node, input) that read it dequantized besides the INT8 layers and the concats and moves in
            front of them, which always do.
    """

    layers: tuple[str, ...]
    activations: Mapping[str, Scale]
    weights: Mapping[str, Scale]
    target: str
    readers: Mapping[str, frozenset[Use]] = field(default_factory=dict)

    def equals(self, other: Plan) -> bool:
        """Whether both give the same graph the same meaning; the target they were made for does not count."""
        return (
            set(self.layers) == set(other.layers)
            and dict(self.readers) == dict(other.readers)
            and _equal_scales(self.activations, other.activations)
            and _equal_scales(self.weights, other.weights)
        )


def _equal_scales(one: Mapping[str, Scale], other: Mapping[str, Scale]) -> bool:
    return one.keys() == other.keys() and all(scale.equals(other[name]) for name, scale in one.items())


def reads_int8(
    node: ir.Node, index: int, chosen: Collection[str], planned: Collection[str], sinks: Collection[Use] = ()
) -> bool:
    """Whether this use leads to an INT8 layer: directly, or through concats and moves.

    Args:
        node: the reader.
        index: of the input that it reads with.
        chosen: names of the INT8 layers.
        planned: names of the quantized tensors; what leads to one of them is quantized anew there.
        sinks: further uses that count as such a layer.
    """
    if (node.name, index) in sinks:
        return True
    if node.name in chosen:
        return index == 0 or (index == 1 and weight_value(node) is None)
    if node.op_type != "Concat" and not (node.op_type in MOVES and index == 0):
        return False
    output = node.outputs[0]
    return output.name not in planned and any(reads_int8(*use, chosen, planned, sinks) for use in output.uses())


def place(model: ir.Model, target: Target, *, keep: Sequence[str] = (), rounded: Collection[str] = ()) -> Placement:
    """The Q/DQ positions that suit a target.

    Args:
        model: a simplified FP32 graph.
        target: the runtime to place for.
        keep: glob patterns of node names that stay in floating point.
        rounded: of these, the names that read what INT8 layers would; the others read real values where the target says so (`Target.rest`).

    Raises:
        OptionError: a pattern matches no weighted node, or nothing is left to quantize.
    """
    nodes = [node for node in model.graph if node.op_type in WEIGHT_AXIS]
    _check_patterns(nodes, keep)
    kept = {str(node.name): why for node in nodes if (why := _why_float(node, target, keep))}
    chosen = [node for node in nodes if node.name not in kept]
    if not chosen:
        raise OptionError(
            "no layer is left to quantize: every Conv, ConvTranspose, Gemm and MatMul is kept in floating point."
        )
    shared, ends = Groups(), product_ends(model, target)
    signed: set[str] = set()
    for node in chosen:
        left = list(_sources(node.inputs[0], ends, every=target.direct))
        shared.join(left)
        if (is_product(node) or node.op_type in target.unshifted) and not _is_rectified(node.inputs[0]):
            signed.update(left)
        if is_product(node):
            right = list(_sources(node.inputs[1], ends, every=target.direct))
            shared.join(right)
            signed.update(right)
    names = tuple(str(node.name) for node in chosen)
    mends = bool(target.outputs) and target.mending is not None
    mended = [name for name in kept if mends and _is_kept(name, keep) and name not in rounded]
    real = unrounded_uses(model, mended)
    read = _read_uses(model, names, target)
    signed.update(name for value in read.values() for name in _sources(value))
    residual = _residual_uses(model, names) if target.residual else _sum_uses(model, names, target)
    for branch in (*_inner_tensors(model, (*names, *mended), target, real), *(residual | read).values()):
        shared.join(list(_sources(branch, ends)))
    share_steps(model, shared, target)
    tensors = shared.tuples()
    signed = {name for group in tensors if signed & set(group) for name in group}
    planned = {name for group in tensors for name in group}
    sinks = {*residual, *read, *_readers_of_sums(model, residual)}
    others = _other_readers(model, names, planned, None if target.outputs else sinks)
    readers = {name: rest for name, uses in others.items() if (rest := uses - real)}
    return Placement(names, kept, tensors, frozenset(signed), readers)


def _residual_uses(model: ir.Model, chosen: Collection[str]) -> dict[Use, ir.Value]:
    """(Add, input) -> the tensor it reads there, where the other input comes out of an INT8 layer."""
    found: dict[Use, ir.Value] = {}
    for node in model.graph:
        if node.op_type != "Add":
            continue
        producers = [_producer(value) for value in node.inputs]
        weighted = [producer is not None and producer.op_type in WEIGHT_AXIS for producer in producers]
        branch = 1 if weighted[0] else 0  # whatever is kept, so that no placement needs more tensors than the whole one
        layer, value = producers[1 - branch], node.inputs[branch]
        if layer is not None and layer.name in chosen and value is not None and any(_sources(value)):
            found[str(node.name), branch] = value
    return found


def _sum_uses(model: ir.Model, chosen: Collection[str], target: Target) -> dict[Use, ir.Value]:
    """(Add, input) -> what it reads there, for both inputs of an Add that an INT8 layer of `target.sums` can take in."""
    found: dict[Use, ir.Value] = {}
    for node in model.graph:
        producers = [_producer(value) for value in node.inputs] if node.op_type == "Add" else []
        made = [one for one in producers if one is not None and one.name in chosen and one.op_type in target.sums]
        if made and all(value is not None and any(_sources(value)) for value in node.inputs):
            found |= {(str(node.name), index): value for index, value in enumerate(node.inputs) if value is not None}
    return found


def _readers_of_sums(model: ir.Model, residual: Collection[Use]) -> Iterable[Use]:
    """Who reads the sum of an INT8 layer and its other branch: it leaves the layer in 8 bits only."""
    sums = {name for name, _ in residual}
    return [
        (str(reader.name), index)
        for node in model.graph
        if node.name in sums
        for reader, index in node.outputs[0].uses()
    ]


def _read_uses(model: ir.Model, chosen: Collection[str], target: Target) -> dict[Use, ir.Value]:
    """(operator, 0) -> what an operator that reads INT8 gets of INT8 layers: of one, or of a sum of theirs, straight or through moves."""
    made: set[str | None] = set()
    found: dict[Use, ir.Value] = {}
    for node in model.graph:
        moved = node.inputs[:1] if node.op_type in MOVES else node.inputs if node.op_type == "Add" else ()
        if node.name in chosen or any(value is not None and value.name in made for value in moved):
            made.add(node.outputs[0].name)
        value = node.inputs[0] if node.op_type in target.reads else None
        if value is not None and value.name in made:
            found[str(node.name), 0] = value
    return found


def _is_rectified(value: ir.Value | None) -> bool:
    """Whether a value is never below 0, so that its scale has no zero-point anyway."""
    pieces, producer = pieces_of(value), _producer(value)
    return all(map(_is_rectified, pieces)) if pieces else producer is not None and producer.op_type in RECTIFIED


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _inner_tensors(model: ir.Model, weighted: Collection[str], target: Target, real: Collection[Use]) -> list[ir.Value]:
    """Outputs that the target wants quantized: behind a layer of `weighted`, in front of any, and read by more than `real`."""
    nodes = list(model.graph) if target.outputs else []
    behind: set[str | None] = set()
    for node in nodes:
        if node.name in weighted or any(value is not None and value.name in behind for value in node.inputs):
            behind.update(value.name for value in node.outputs)
    ahead: set[str | None] = set()
    for node in reversed(nodes):
        if node.op_type in WEIGHT_AXIS or any(value.name in ahead for value in node.outputs):
            ahead.update(value.name for value in node.inputs if value is not None)
    attended = frozenset() if target.products else read_by_products(model)
    return [
        value
        for value in chain_ends(model, target)
        if value.name in behind
        and value.name in ahead
        and value.name not in attended
        and not only_read_by(value, real)
        and value.dtype == ir.DataType.FLOAT
        and value.const_value is None
    ]


def _other_readers(
    model: ir.Model, chosen: Collection[str], planned: Collection[str], sinks: Collection[Use] | None
) -> dict[str, frozenset[Use]]:
    """Who reads quantized tensors besides INT8 layers: whatever leads to `sinks`, or everything where they are None."""
    readers: dict[str, frozenset[Use]] = {}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.name not in planned or reads_int8(node, index, chosen, planned):
                continue
            if sinks is None or reads_int8(node, index, (), planned, sinks):
                name = str(value.name)
                readers[name] = readers.get(name, frozenset()) | {(str(node.name), index)}
    return readers


def _check_patterns(nodes: Iterable[ir.Node], keep: Sequence[str]) -> None:
    names = [str(node.name) for node in nodes]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(f"--keep '{pattern}' matches no weighted layer. The layers are: {', '.join(names)}.")


def _why_float(node: ir.Node, target: Target, keep: Sequence[str]) -> str | None:
    if _is_kept(str(node.name), keep):
        return "kept by --keep"
    if node.op_type not in target.operators:
        return f"{target.name} has no INT8 {node.op_type}"
    if is_product(node) and not target.products:
        return f"{target.name} multiplies two activations in floating point"
    if node.op_type == "ConvTranspose" and groups(node) > 1:
        return f"{target.name} has no grouped INT8 ConvTranspose"
    if groups(node) > 1 and any(channels % target.group_multiple for channels in _of_a_group(node)):
        return f"{target.name} has INT8 groups of multiples of {target.group_multiple} channels only"
    if node.op_type == "Gemm" and weight_value(node) is None:
        return "its weights are no constant"
    if weight_value(node) is not None and node.inputs[0] is not None and node.inputs[0].const_value is not None:
        return "both inputs are constants"
    return None


def _is_kept(name: str, keep: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in keep)


def _of_a_group(node: ir.Node) -> tuple[int, int]:
    """The channels that a group of a convolution reads, and those that it makes."""
    return shape_of(node.inputs[0])[1] // groups(node), shape_of(node.outputs[0])[1] // groups(node)


def _sources(value: ir.Value | None, ends: Collection[str] = (), *, every: bool = False) -> Iterable[str]:
    """The tensors to quantize so that `value` is INT8: itself, or what a concat or a mere move makes it of, but for `ends`.

    With `every` also those on the way.
    """
    if value is None or value.const_value is not None:
        return
    pieces = () if value.name in ends else pieces_of(value)
    for piece in pieces:
        yield from _sources(piece, ends, every=every)
    if every or not pieces:
        yield str(value.name)


def plan(
    model: ir.Model,
    placement: Placement,
    ranges: Mapping[str, Range],
    target: Target,
    *,
    given: Mapping[str, Scale] | None = None,
) -> Plan:
    """Scales for a placement.

    Args:
        model: the graph that was placed.
        placement: from `place`.
        ranges: one for each tensor of the placement without a given scale.
        target: the one that was placed for.
        given: scales that are known already, for all tensors of a group or none.
    """
    given, activations = given or {}, dict[str, Scale]()
    for group in placement.tensors:
        known = {name: given[name] for name in group if name in given}
        activations |= known or _group_scales(group, placement, ranges, target)
    wanted = set(placement.layers)
    weights: dict[str, Scale] = {}
    for node in model.graph:
        weight = weight_value(node) if node.name in wanted else None
        if weight is not None and weight.const_value is not None:
            weights[str(weight.name)] = scale_of_weight(weight.const_value.numpy(), weight_axis(node))
    return Plan(placement.layers, activations, weights, target.name, placement.readers)


def _group_scales(
    group: Sequence[str], placement: Placement, ranges: Mapping[str, Range], target: Target
) -> dict[str, Scale]:
    low = min(ranges[name].low for name in group)
    high = max(ranges[name].high for name in group)
    symmetric = target.symmetric or bool(placement.signed & set(group))
    return dict.fromkeys(group, scale_of_range(low, high, symmetric=symmetric))


def in_type(plan: Plan, dtype: str) -> Plan:
    """The plan with steps that a floating-point type holds exactly, each the least that is no smaller; see `Scale.in_type`.

    Args:
        plan: for an FP32 graph.
        dtype: of the floating-point rest of the file: "fp32", "fp16" or "bf16".

    Raises:
        CalibrationError: a tensor whose range reaches beyond that type.
    """
    return replace(plan, activations=_in_type(plan.activations, dtype), weights=_in_type(plan.weights, dtype))


def _in_type(scales: Mapping[str, Scale], dtype: str) -> dict[str, Scale]:
    for name, scale in scales.items():
        largest = float(scale.step.max()) * 127
        if dtype == "fp16" and largest > LARGEST_HALF:
            raise CalibrationError(
                f"tensor '{name}' reaches {largest:.3g}, fp16 ends at {LARGEST_HALF:.0f}. Choose --high-precision-dtype bf16 or fp32."
            )
    return {name: scale.in_type(dtype) for name, scale in scales.items()}


def input_step(node: ir.Node, plan: Plan) -> float:
    """The INT8 step of a planned layer's input, 0 where it is a constant."""
    return max((float(plan.activations[name].step) for name in _sources(node.inputs[0], plan.activations)), default=0.0)


def scale_read(node: ir.Node, plan: Plan) -> Scale | None:
    """The scale of a planned layer's input, through concats and moves; None where it has several, or is no quantized tensor."""
    found = [plan.activations.get(name) for name in _sources(node.inputs[0], plan.activations)]
    first = found[0] if found else None
    alike = first is not None and all(one is not None and one.equals(first) for one in found)
    return first if alike else None


def int8_mac_share(model: ir.Model, plan: Plan) -> float:
    """The share of multiply-accumulates that the plan gives to INT8, 0..1; the runtime's own report may differ."""
    all_layers = layers(model)
    total = sum(layer.macs for layer in all_layers)
    return sum(layer.macs for layer in all_layers if layer.name in set(plan.layers)) / max(total, 1)
