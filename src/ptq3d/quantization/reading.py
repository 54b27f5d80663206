"""A Plan out of anyone's Q/DQ graph: ModelOpt's, ONNX Runtime's, NNCF's, Brevitas' and ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.errors import GraphError
from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.layers import WEIGHT_AXIS, groups, shape_of, weight_axis, weight_value
from ptq3d.graphs.low_precision import full_precision, low_type
from ptq3d.graphs.passes import QDQ, infer_shapes, insert_behind
from ptq3d.int8 import Floats, Scale, dequantize
from ptq3d.quantization.groups import pieces_of, quantized_below
from ptq3d.quantization.planning import Plan, Use, reads_int8

# what ONNX saturates to; a file may hold the -128 that LIMITS of ours leaves out
ONNX_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}
ONNX_TYPES = {ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8", ir.DataType.INT32: "int32"}
INTEGER_OPERATORS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})
Stored = tuple[npt.NDArray[np.generic], Scale]  # the integers of a constant, with their scale


def read(model: ir.Model) -> tuple[ir.Model, Plan]:
    """What a Q/DQ graph means: an FP32 graph with its dequantized weights, and the plan that `qdq.write` puts back.

    A clip between Q and DQ, and steps per channel that DQ takes for one step, become Clip and Mul in front of the
    quantized tensor; a tensor quantized with two scales gets an Identity for the second. A layer with quantized weights
    whose sums cannot be integers (steps along its input channels, steps per channel of its input) is left out of the
    plan's layers: it computes in FP32 with the same dequantized values, as the file itself says. A rest in FP16 or BF16 becomes
    FP32: the same weights and steps, without the rounding of what they compute.

    Args:
        model: a simplified graph; changed in place.

    Returns:
        (`model` without Q/DQ, plan).

    Raises:
        GraphError: something cannot be kept; the message names the node.
    """
    if low_type(model) is not None:
        full_precision(model)
    for node in model.graph:
        if node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPERATORS:
            raise _refused(node, "is an integer operator; only QuantizeLinear and DequantizeLinear are read")
    asked = integer_layers(model)
    weights = _float_constants(model)
    activations = _Activations(model)
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        activations.take(node)
    _require_none_left(model)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    infer_shapes(model)
    chosen = [node for node in model.graph if node.name in asked and _can_sum(node, weights, activations.scales)]
    scales = {str(weight.name): _symmetric(node, weights) for node in chosen if (weight := weight_value(node))}
    names = tuple(str(node.name) for node in chosen)
    readers = _other_readers(model, names, activations)
    return model, Plan(names, activations.scales, scales, "foreign", readers)


def _refused(node: ir.Node, why: str) -> GraphError:
    return GraphError(f"{node.op_type} '{node.name}' {why}. Quantize the FP32 file with `ptq3d quantize` instead.")


def integer_layers(model: ir.Model) -> frozenset[str]:
    """Names of the multiplying nodes of a Q/DQ graph whose inputs are both dequantized integers."""
    return frozenset(
        str(node.name)
        for node in model.graph
        if node.op_type in WEIGHT_AXIS and all(_is_dequantized(value) for value in node.inputs[:2])
    )


def _is_dequantized(value: ir.Value | None) -> bool:
    pieces = pieces_of(value)
    if pieces:
        return all(_is_dequantized(piece) for piece in pieces)
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def integers_of(values: Floats, scale: Scale) -> npt.NDArray[np.generic]:
    """QuantizeLinear as ONNX has it: with the -128 that other people's weights may hold; never reached by ours."""
    step, zero_point = scale.broadcast(values.ndim)
    levels: npt.NDArray[np.generic] = np.clip(np.rint(values / step) + zero_point, *ONNX_LIMITS[scale.dtype])
    return levels.astype(scale.dtype)


@dataclass(frozen=True)
class _Pair:
    """A DequantizeLinear with what feeds it.

    Args:
        dequantize: the node.
        source: the FP32 tensor in front of `quantize`, or the stored integers.
        quantize: its QuantizeLinear, None behind stored integers.
        clip: a Clip of the integers between both.
    """

    dequantize: ir.Node
    source: ir.Value
    quantize: ir.Node | None
    clip: ir.Node | None

    @property
    def nodes(self) -> list[ir.Node]:
        """From the last to the first."""
        return [node for node in (self.dequantize, self.clip, self.quantize) if node is not None]


def _pair(node: ir.Node) -> _Pair:
    value = _input(node, 0)
    producer, clip, quantize = value.producer(), None, None
    if producer is not None and producer.op_type == "Clip":
        clip, value = producer, _input(producer, 0)
        producer = value.producer()
    if producer is not None and producer.op_type == "QuantizeLinear":
        quantize, value = producer, _input(producer, 0)
    if quantize is None and value.const_value is None:
        raise _refused(node, f"reads '{value.name}', which is neither stored nor made by QuantizeLinear")
    return _Pair(node, value, quantize, clip)


def _pairs_of(quantize: ir.Node) -> list[_Pair]:
    """All that dequantize the integers of a QuantizeLinear, behind a Clip if there is one."""
    direct = [node for node, _ in quantize.outputs[0].uses()]
    through = [node for clip in direct if clip.op_type == "Clip" for node, _ in clip.outputs[0].uses()]
    readers = [node for node in direct if node.op_type != "Clip"] + through
    for node in readers:
        if node.op_type != "DequantizeLinear":
            raise _refused(node, f"reads the integers of '{quantize.name}'; only Clip and DequantizeLinear may")
    if not readers:
        raise _refused(quantize, "is dequantized by nobody")
    return [_pair(node) for node in readers]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise _refused(node, f"lacks input {index}")
    return value


def _constant(node: ir.Node, index: int) -> npt.NDArray[np.generic] | None:
    """An optional constant input."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if value.const_value is None:
        raise _refused(node, f"takes '{value.name}' from the graph, a constant is wanted")
    return value.const_value.numpy()


def _scale_of(node: ir.Node) -> Scale:
    """The scale of a QuantizeLinear or DequantizeLinear; a step for each channel only where there are channels."""
    step, zero_point = _constant(node, 1), _constant(node, 2)
    block = node.attributes.get("block_size")
    if step is None or (block is not None and block.as_int()) or step.ndim > 1:
        raise _refused(node, "has steps for blocks; one step, or one for each channel, is wanted")
    dtype = _integer_type(node)
    shape = shape_of(node.inputs[0])
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 1) % max(len(shape), 1)
    single = step.ndim == 0 or (step.size == 1 and (not shape or shape[axis] != 1))
    size = () if single else step.shape
    zero = np.zeros(size, np.int32) if zero_point is None else zero_point.astype(np.int32).reshape(size)
    return Scale(step.astype(np.float32).reshape(size), zero, dtype, None if single else axis)


def _one_step(scale: Scale) -> Scale:
    """A step for each of one channel is one step."""
    if scale.step.size > 1:
        return scale
    return Scale(scale.step.reshape(()), scale.zero_point.reshape(()), scale.dtype)


def _integer_type(node: ir.Node) -> str:
    kind = (node.outputs[0] if node.op_type == "QuantizeLinear" else _input(node, 0)).dtype
    if kind not in ONNX_TYPES:
        raise _refused(node, f"is of type {None if kind is None else kind.name}; int8 and uint8 are read")
    return ONNX_TYPES[kind]


def _limits(pair: _Pair, scale: Scale) -> tuple[int, int] | None:
    """What the clip leaves of the integers, None where it leaves all."""
    if pair.clip is None:
        return None
    full = ONNX_LIMITS[scale.dtype]
    ends = (_constant(pair.clip, 1), _constant(pair.clip, 2))
    low, high = (limit if end is None else int(end.item()) for end, limit in zip(ends, full, strict=True))
    kept = (max(full[0], low), min(full[1], high))
    return None if kept == full else kept


def _float_constants(model: ir.Model) -> dict[str, Stored]:
    """Replace every dequantized constant by its FP32 values, in place; name -> (integers, scale)."""
    pairs = [_pair(node) for node in model.graph if node.op_type == "DequantizeLinear"]
    pairs = [pair for pair in pairs if pair.source.const_value is not None]
    constants = [_stored(pair) for pair in pairs]
    uses = [list(pair.dequantize.outputs[0].uses()) for pair in pairs]
    for readers in uses:
        for node, index in readers:
            node.replace_input_with(index, None)
    _remove(model, (node for pair in pairs for node in pair.nodes))
    for pair in pairs:
        if not pair.source.uses():
            model.graph.initializers.pop(str(pair.source.name), None)
    found: dict[str, Stored] = {}
    for pair, stored, readers in zip(pairs, constants, uses, strict=True):
        name = _free_name(model, pair, found, stored)
        if name not in found:
            add_constant(model, name, dequantize(*stored))  # type: ignore[arg-type]
            found[name] = stored
        for node, index in readers:
            node.replace_input_with(index, model.graph.initializers[name])
    return found


def _stored(pair: _Pair) -> Stored:
    scale = _scale_of(pair.dequantize)
    values = pair.source.const_value.numpy() if pair.source.const_value is not None else np.zeros(())
    if pair.quantize is None:
        return values, scale
    coder = _scale_of(pair.quantize)
    integers = integers_of(np.asarray(values, np.float32), coder)
    limits = _limits(pair, coder)
    return integers if limits is None else np.clip(integers, *limits), scale


def _free_name(model: ir.Model, pair: _Pair, found: Mapping[str, Stored], stored: Stored) -> str:
    """The name of the weight: the stored one's without the "/q" of ours, or a new one where others still read that."""
    integers, scale = stored
    for name in (str(pair.source.name).removesuffix("/q"), f"{pair.dequantize.name}/dequantized"):
        same = name in found and found[name][1].equals(scale) and np.array_equal(found[name][0], integers)
        if same or name not in model.graph.initializers:
            return name
    return f"{pair.dequantize.outputs[0].name}/dequantized"


def _remove(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    """Take nodes that nobody reads any more out of the graph, the last first."""
    for node in dict.fromkeys(nodes):
        if not any(value.uses() for value in node.outputs):
            model.graph.remove(node, safe=True)


class _Activations:
    """Takes Q/DQ of activations out of a graph, and keeps which tensor had which scale and who read it dequantized."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self.scales: dict[str, Scale] = {}
        self.uses: dict[str, set[Use]] = {}

    def take(self, quantize: ir.Node) -> None:
        """Remove one QuantizeLinear and what dequantizes it."""
        pairs = _pairs_of(quantize)
        for pair in pairs:
            self._connect(pair, self._planned(pair))
        _remove(self._model, (node for pair in pairs for node in pair.nodes))

    def _planned(self, pair: _Pair) -> ir.Value:
        """The FP32 tensor that carries the scale of `pair`, with Clip, Mul or Identity in front where they are needed."""
        scale = _one_step(_scale_of(pair.dequantize))
        value = self._fitted(pair, pair.source, scale)
        name = str(value.name)
        if name in self.scales and not self.scales[name].equals(scale):
            value = self._behind(pair, value, "Identity")
            name = str(value.name)
        self.scales[name] = scale
        self.uses.setdefault(name, set())
        return value

    def _fitted(self, pair: _Pair, value: ir.Value, scale: Scale) -> ir.Value:
        """`value` as `scale` has to see it so that it gives the integers of the pair."""
        if pair.quantize is None:
            return value
        coder = _one_step(_scale_of(pair.quantize))
        if scale.axis not in (None, 1) or coder.axis not in (None, 1) or scale.dtype == "int32":
            raise _refused(pair.quantize, "quantizes an activation in int32, or along another axis than its channels")
        if not np.array_equal(_flat(coder.zero_point), _flat(scale.zero_point)):
            raise _refused(pair.dequantize, f"has another zero-point than '{pair.quantize.name}'")
        if not np.array_equal(coder.step, scale.step):
            shape = (1, -1, *[1] * (len(shape_of(value)) - 2))
            factor = np.asarray(scale.step / coder.step, np.float32)
            value = self._behind(pair, value, "Mul", factor.reshape(shape) if factor.ndim else factor)
        limits = _limits(pair, scale)
        if limits is not None:
            ends = [np.asarray((end - _flat(scale.zero_point)) * scale.step, np.float32) for end in limits]
            if ends[0].size > 1:
                raise _refused(pair.quantize, "clips integers of a step for each channel")
            value = self._behind(pair, value, "Clip", *(end.reshape(()) for end in ends))
        return value

    def _behind(self, pair: _Pair, value: ir.Value, operator: str, *constants: Floats) -> ir.Value:
        """A new node that reads `value`, dequantized if the pair's QuantizeLinear did."""
        taken = {str(node.name) for node in self._model.graph}
        names = (f"{value.name}/{operator}{number}" for number in ("", *range(2, len(taken) + 3)))
        name = next(name for name in names if name not in taken)
        inputs = [add_constant(self._model, f"{name}/{place}", array) for place, array in enumerate(constants)]
        node = ir.node(operator, [value, *inputs], name=name)
        node.outputs[0].name, node.outputs[0].shape = f"{name}/out", value.shape
        node.outputs[0].type = value.type
        insert_behind(self._model, value, [node])
        used = self.uses.get(str(value.name), set())
        if pair.quantize is not None and (str(pair.quantize.name), 0) in used:
            used.add((name, 0))
        return node.outputs[0]

    def _connect(self, pair: _Pair, value: ir.Value) -> None:
        """Let whoever read the dequantized tensor read `value`, and remember them."""
        output = pair.dequantize.outputs[0]
        uses = self.uses[str(value.name)]
        for node, index in list(output.uses()):
            node.replace_input_with(index, value)
            uses.add((str(node.name), index))
        if output.is_graph_output():
            self._replace_output(pair, value, uses)

    def _replace_output(self, pair: _Pair, value: ir.Value, uses: set[Use]) -> None:
        """The graph's output keeps its name: an Identity gives it, which reads the dequantized tensor."""
        old = pair.dequantize.outputs[0]
        node = ir.node("Identity", [value], name=f"{value.name}/output")
        node.outputs[0].shape, node.outputs[0].type = old.shape, old.type
        insert_behind(self._model, value, [node])
        outputs = self._model.graph.outputs
        outputs[next(place for place, output in enumerate(outputs) if output is old)] = node.outputs[0]
        node.outputs[0].name, old.name = old.name, f"{old.name}/replaced"
        uses.add((str(node.name), 0))


def _flat(zero_point: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """One zero-point where all channels have the same."""
    return zero_point.reshape(-1)[0] if np.all(zero_point == zero_point.reshape(-1)[0]) else zero_point


def _require_none_left(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in QDQ:
            raise _refused(node, "is no pair of QuantizeLinear and DequantizeLinear")


def _can_sum(node: ir.Node, weights: Mapping[str, Stored], scales: Mapping[str, Scale]) -> bool:
    """Whether a layer's products share one step for each output channel, so that integers can be summed."""
    weight = weight_value(node)
    activations = node.inputs[:1] if weight is not None else node.inputs[:2]
    if any(scales[name].axis is not None for value in activations for name in quantized_below(value, scales)):
        return False
    if weight is None:
        return True
    if weight.name not in weights:
        raise _refused(node, f"multiplies '{weight.name}', whose integers lie behind another operator")
    axis = weights[str(weight.name)][1].axis
    return axis is None or (axis == weight_axis(node) and (node.op_type != "ConvTranspose" or groups(node) == 1))


def _symmetric(node: ir.Node, weights: Mapping[str, Stored]) -> Scale:
    """The scale of a layer's weights as int8 with zero-point 0.

    Raises:
        GraphError: their zero-points leave the 8 bits no room for that.
    """
    weight = weight_value(node)
    integers, scale = weights[str(weight.name) if weight is not None else ""]
    _, zero_point = scale.broadcast(integers.ndim)
    centred = integers.astype(np.int64) - zero_point
    if centred.min() < -128 or centred.max() > 127 or scale.dtype == "int32":
        raise _refused(node, "has weights with a zero-point that int8 without one cannot hold")
    return replace(scale, dtype="int8", zero_point=np.zeros_like(scale.zero_point))


def _other_readers(model: ir.Model, layers: tuple[str, ...], found: _Activations) -> dict[str, frozenset[Use]]:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    readers: dict[str, frozenset[Use]] = {}
    for value in values:
        name = str(value.name)
        if name not in found.scales:
            continue
        uses = {(str(node.name), index) for node, index in value.uses()}
        implied = {(str(node.name), i) for node, i in value.uses() if reads_int8(node, i, layers, found.scales)}
        asked = found.uses[name] & uses
        if implied - asked:
            raise GraphError(f"'{sorted(implied - asked)[0][0]}' reads '{name}' both as integers and as it is.")
        if asked - implied:
            readers[name] = frozenset(asked - implied)
    return readers
