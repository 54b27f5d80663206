"""One scale per channel without its price: the scale goes into the weights around the activation. Exact in real numbers.

A tensor x with channels of unequal span wastes the 8 bits of a per-tensor scale. Here x is replaced by x * s, s > 0 per channel,
and the weights that read it are divided by s. Where x comes from a convolution or a normalization through operators that are
positively homogeneous (ReLU, LeakyReLU, pooling, linear resizing), s moves into that layer's weights and costs nothing; behind
any other activation function (ELU, GELU) it stays one multiplication, which runtimes fuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.graphs.constants import add_constant, constant_of, set_constant
from ptq3d.graphs.layers import groups, shape_of, weight_axis
from ptq3d.graphs.passes import infer_shapes
from ptq3d.quantization.observation import TensorSeen
from ptq3d.quantization.planning import Placement

STRENGTH = 0.75
TINY = 1e-9
SMALL_EPSILON = 1e-4  # of the variance: a normalization errs by half of it at most when its input is scaled
PASSES_CHANNELS = frozenset({"MaxPool", "Identity"})
HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Identity", "Dropout"}
)
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Reader:
    """A layer that reads a tensor as its input channels `first`, `first` + 1, ..."""

    node: ir.Node
    first: int


def equalizable(model: ir.Model, placement: Placement) -> tuple[str, ...]:
    """The tensors of a placement whose channels can be scaled: several channels, read by convolutions only.

    Args:
        model: the simplified FP32 graph that was placed.
        placement: from `planning.place`.
    """
    values = _values(model)
    names = [name for group in placement.tensors for name in group]
    return tuple(
        name
        for name in names
        if shape_of(values[name])[1:2] > (1,)
        and _readers(values[name], 0) is not None
        and not _others_scaled(values[name]) & set(names)
    )


def _others_scaled(value: ir.Value) -> set[str]:
    """Further tensors that scaling `value` scales: up to the layer that takes the factors, and down to the readers."""
    found: set[str] = set()
    producer = value.producer() if _absorbing_producer(value) is not None else None
    while producer is not None and producer.op_type in HOMOGENEOUS and producer.inputs[0] is not None:
        found.add(str(producer.inputs[0].name))
        producer = producer.inputs[0].producer()
    waiting = [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Concat" or node.op_type in PASSES_CHANNELS:
                found.add(str(node.outputs[0].name))
                waiting.append(node.outputs[0])
    return found


@dataclass(frozen=True)
class Equalized:
    """What `equalize` did, so that what was seen of the old tensors holds for the new ones.

    Args:
        tensors: name before -> (name now, (C,) factor of its channels).
        layers: name of a convolution -> (C_in,) factor of its input channels.
    """

    tensors: Mapping[str, tuple[str, Floats]]
    layers: Mapping[str, Floats]


def equalize(
    model: ir.Model,
    placement: Placement,
    seen: Mapping[str, TensorSeen],
    *,
    strength: float = STRENGTH,
    multiplied: bool = True,
) -> Equalized:
    """`model` with scaled channels, in place; place it anew, since some tensors have another name.

    Args:
        model: the simplified FP32 graph that was placed.
        placement: from `planning.place`.
        seen: at least the tensors of `equalizable`.
        strength: 0 changes nothing, 1 gives every channel the whole range; between them weights and activations share the
            rounding error.
        multiplied: factors that no layer takes become a multiplication; otherwise such tensors are left as they are, and
            constants that are multiplied or added for each channel take factors as layers do.

    Source: Nagel et al. 2019 (cross-layer equalization), with the activations' measured spans; SmoothQuant (Xiao et al. 2023)
        for the strength.
    """
    wanted = set(equalizable(model, placement))
    if not multiplied:
        values = _values(model)
        wanted = {name for name in wanted if _absorbing_producer(values[name], affine=True) is not None}
    tensors: dict[str, tuple[str, Floats]] = {}
    layers: dict[str, Floats] = {}
    for group in placement.tensors:
        names = [name for name in group if name in wanted]
        if not names:
            continue
        scales = _channel_scales(
            np.concatenate([seen[name].low for name in names]),
            np.concatenate([seen[name].high for name in names]),
            np.concatenate([_importance(model, name) for name in names]),
        )
        ends = np.cumsum([len(seen[name].low) for name in names])
        for name, piece in zip(names, np.split(scales**strength, ends[:-1]), strict=True):
            factors = piece.astype(np.float32)
            for reader in _readers(_values(model)[name], 0) or ():
                inputs = layers.setdefault(str(reader.node.name), np.ones(_input_channels(reader.node), np.float32))
                inputs[reader.first : reader.first + len(factors)] *= factors
            tensors[name] = (_scale(model, name, factors, affine=not multiplied), factors)
    infer_shapes(model)
    return Equalized(tensors, layers)


def level(model: ir.Model, placement: Placement, seen: Mapping[str, TensorSeen]) -> Equalized:
    """`model` with one span for all channels that a normalization reads, in place; it takes the factors away again.

    The factors go into the weights of the convolution in front; no tensor has another name. A channel or group whose variance is
    not large beside the normalization's epsilon is left as it is, since (s x - s m) / sqrt(s^2 v + e) would change there.

    Args:
        model: the simplified FP32 graph that was placed.
        placement: from `planning.place`.
        seen: at least the tensors of the placement.
    """
    tensors: dict[str, tuple[str, Floats]] = {}
    values = _values(model)
    for name in (name for group in placement.tensors if len(group) == 1 for name in group):
        reader, source = _normalization(values[name]), values[name].producer()
        if reader is None or source is None or not _is_plain_convolution(source):
            continue
        groups_read = shape_of(reader.inputs[0])[1]
        epsilon = reader.attributes["epsilon"].as_float() if "epsilon" in reader.attributes else 1e-5
        factors = _levelling(seen[name], groups_read, epsilon)
        _scale_outputs(model, source, factors)
        tensors[name] = name, factors
    return Equalized(tensors, {})


def _normalization(value: ir.Value) -> ir.Node | None:
    """The InstanceNormalization that alone reads a tensor, straight or with groups of its channels as channels."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or len(shape_of(value)) < 3:
        return None
    node = uses[0][0]
    if node.op_type == "Reshape":
        split = shape_of(node.outputs[0])[1:2]
        whole = bool(split) and shape_of(value)[1] % split[0] == 0
        return _normalization(node.outputs[0]) if whole else None
    return node if node.op_type == "InstanceNormalization" else None


def _levelling(seen: TensorSeen, groups_read: int, epsilon: float) -> Floats:
    """(C,) factors of at least 1 that bring every group of channels to the largest span."""
    size = len(seen.low) // groups_read
    spans = np.maximum(-seen.low, seen.high).reshape(groups_read, size).max(1)
    variances = np.moveaxis(seen.values.reshape(-1, groups_read, size), 1, 0).reshape(groups_read, -1).var(1)
    large = variances * SMALL_EPSILON > epsilon
    factors = np.where(large, spans.max() / np.maximum(spans, TINY), 1.0)
    return np.repeat(factors, size).astype(np.float32)


def _input_channels(node: ir.Node) -> int:
    return shape_of(node.inputs[0])[1]


def _channel_scales(low: Floats, high: Floats, importance: Floats) -> npt.NDArray[np.float64]:
    """Scales with which every channel fills one common range, of the zero-point that costs the layers behind it least.

    A channel's rounding error behind its layer is proportional to importance / scale^2.
    """
    lows, highs = np.minimum(low, -TINY).astype(np.float64), np.maximum(high, TINY).astype(np.float64)

    def filling(below: float) -> npt.NDArray[np.float64]:
        filled: npt.NDArray[np.float64] = np.minimum(-max(below, TINY) / lows, (1 - below) / highs)
        return filled

    best = min(np.linspace(0, 0.5, 51), key=lambda below: float((importance / filling(below) ** 2).sum()))
    scales = filling(float(best))
    alive = highs - lows > 1e-6
    if not alive.any():
        return np.ones_like(scales)
    middle = np.exp(np.log(scales[alive]).mean())
    return np.where(alive, scales / middle, 1.0)


def _importance(model: ir.Model, name: str) -> Floats:
    """(C,) sum of squares of the weights that read each channel."""
    value = _values(model)[name]
    total = np.zeros(shape_of(value)[1], np.float32)
    for reader in _readers(value, 0) or ():
        weight = _input_channels_first(reader.node, constant_of(reader.node.inputs[1]))
        total += (weight[reader.first : reader.first + len(total)] ** 2).reshape(len(total), -1).sum(1)
    return total


def _readers(value: ir.Value, first: int) -> list[_Reader] | None:
    """The convolutions that read `value`, straight or through concats; None where anything else does."""
    found: list[_Reader] = []
    uses = list(value.uses())
    for node, index in uses:
        further: list[_Reader] | None = None
        if node.op_type == "Concat" and _is_channel_concat(node):
            offset = first + sum(shape_of(piece)[1] for piece in node.inputs[:index])
            further = _readers(node.outputs[0], offset)
        elif node.op_type in PASSES_CHANNELS:
            further = _readers(node.outputs[0], first)
        elif _is_plain_convolution(node) and index == 0:
            further = [_Reader(node, first)]
        if further is None:
            return None
        found += further
    return found if uses and not value.is_graph_output() else None


def _is_channel_concat(node: ir.Node) -> bool:
    return node.attributes["axis"].as_int() in (1, 1 - len(shape_of(node.outputs[0])))


def _is_plain_convolution(node: ir.Node) -> bool:
    return node.op_type in ("Conv", "ConvTranspose") and groups(node) == 1 and _is_constant(node.inputs[1])


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _scale(model: ir.Model, name: str, scales: Floats, *, affine: bool) -> str:
    """Scale the channels of a tensor; the name of the tensor that holds them now."""
    value = _values(model)[name]
    for reader in _readers(value, 0) or ():
        weight = constant_of(reader.node.inputs[1]).copy()
        view = _input_channels_first(reader.node, weight)
        view[reader.first : reader.first + len(scales)] /= scales.reshape(-1, *[1] * (weight.ndim - 1))
        set_constant(model, reader.node, 1, weight, suffix="equalized")
    source = _absorbing_producer(value, affine=affine)
    if source is None:
        return _insert_multiplication(model, value, scales)
    _scale_source(model, source, scales)
    return name


def _scale_source(model: ir.Model, source: ir.Node, scales: Floats) -> None:
    """Scale what a node of `_absorbing_producer` gives."""
    index = _affine_constant(source)
    if index is not None:
        constant = constant_of(source.inputs[index])
        set_constant(model, source, index, constant * scales.reshape(-1, 1, 1, 1), suffix="equalized")
        other = source.inputs[1 - index] if source.op_type == "Add" else None
        above = other.producer() if other is not None else None
        if above is not None:
            _scale_source(model, above, scales)
    elif source.op_type == "InstanceNormalization":
        for place in (1, 2):
            set_constant(model, source, place, constant_of(source.inputs[place]) * scales, suffix="equalized")
    else:
        _scale_outputs(model, source, scales)


def _affine_constant(node: ir.Node) -> int | None:
    """Which input of an Add or Mul of images is a constant for each channel; None where none is, or it is another operator."""
    channels = shape_of(node.outputs[0])[1:2]
    for index, value in enumerate(node.inputs if node.op_type in ("Add", "Mul") else ()):
        if _is_constant(value) and shape_of(value)[-4:] == (*channels, 1, 1, 1) and len(shape_of(node.outputs[0])) == 5:
            return index
    return None


def _input_channels_first(node: ir.Node, weight: Floats) -> Floats:
    return weight if node.op_type == "ConvTranspose" else np.swapaxes(weight, 0, 1)


def _absorbing_producer(value: ir.Value, *, affine: bool = False) -> ir.Node | None:
    """The layer whose output weights can take a positive factor of `value`'s channels, if nothing else reads on the way.

    With `affine` also an Add or Mul of a constant for each channel, the Add only if what it adds to can take it, too.
    """
    producer = value.producer()
    while producer is not None and producer.op_type in HOMOGENEOUS:
        source = producer.inputs[0]
        if source is None or len(list(source.uses())) != 1 or source.is_graph_output():
            return None
        producer = source.producer()
    if producer is None:
        return None
    index = _affine_constant(producer) if affine else None
    if index is not None:
        other = producer.inputs[1 - index]
        alone = other is not None and len(list(other.uses())) == 1 and not other.is_graph_output()
        taken = producer.op_type == "Mul" or (
            other is not None and alone and other.producer() == _absorbing_producer(other, affine=True)
        )
        return producer if taken else None
    if producer.op_type == "InstanceNormalization":
        return producer if all(_is_constant(piece) for piece in producer.inputs[1:3]) else None
    plain = _is_plain_convolution(producer) and all(_is_constant(piece) for piece in producer.inputs[2:])
    return producer if plain else None


def _scale_outputs(model: ir.Model, node: ir.Node, scales: Floats) -> None:
    weight = constant_of(node.inputs[1])
    shape = [1] * weight.ndim
    shape[weight_axis(node)] = -1
    set_constant(model, node, 1, weight * scales.reshape(shape), suffix="equalized")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        set_constant(model, node, 2, constant_of(node.inputs[2]) * scales, suffix="equalized")


def _insert_multiplication(model: ir.Model, value: ir.Value, scales: Floats) -> str:
    shape = (1, -1, *[1] * (len(shape_of(value)) - 2))
    factor = add_constant(model, f"{value.name}/channel_scales", scales.reshape(shape))
    uses = list(value.uses())
    product = ir.node("Mul", [value, factor], name=f"{value.name}/Mul")
    product.outputs[0].name = f"{value.name}/scaled"
    product.outputs[0].shape, product.outputs[0].type = (
        value.shape,
        value.type,
    )  # a concat behind it is asked for its channels
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], [product])
    else:
        model.graph.insert_after(producer, [product])
    for node, index in uses:
        node.replace_input_with(index, product.outputs[0])
    return str(product.outputs[0].name)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    values: Iterable[ir.Value] = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return {str(value.name): value for value in values}
