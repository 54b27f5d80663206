"""More than 8 bits for the few activations that need them, in INT8 arithmetic: what rounding leaves becomes further channels.

A layer that reads x * W in 8 bits errs by W times the rounding error of x. Here x is written as two terms, both on the same grid,

    h = step * floor(x / step)        r = K * (x - h), between 0 and K * step
    x * W = h * W + r * (W / K)       exact in real numbers

and the layer reads [h, r] with the weights [W, W / K]: one INT8 layer of twice the input channels, with the step of x divided by
K. W / K is rounded on the grid of W: an error of half a step of W times at most K steps of x, small beside that of h * W.
The first layers of a network are narrow and their errors are amplified by all that follow, so a few percent more multiplications
buy most of what 8 bits lose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.graphs.constants import add_constant, constant_of, set_constant
from ptq3d.graphs.layers import groups, layers, parameter_count, shape_of
from ptq3d.graphs.passes import infer_shapes, insert_behind
from ptq3d.int8 import Scale, dequantize, quantize, scale_of_range
from ptq3d.quantization.observation import Observations, TensorSeen, widened
from ptq3d.quantization.planning import Plan, scale_read
from ptq3d.quantization.rows import Gram, Matrix, matrix_of
from ptq3d.quantization.targets import ACTIVATIONS, VIEWS, Prices

K = 16
ROOM = 1.5  # the step may be coarse, so the range reaches further than what calibration saw
COST = 0.2  # of the network's work, at most
NEEDED = 0.002  # of the network's whole noise; a layer with less gains nothing worth its price
WORTH = (
    0.4  # a layer's share of the noise must be that many times the share that mending it takes of the work to be spent
)
ENOUGH = 0.01**2  # noise of all layers that may remain: that of one whose output errs by 1 % of its deviation
FLOAT_WORTH = (
    2.0  # floating point takes the noise of the weights away, too: it may cost this much more than a second term
)
BYTES = 100_000  # besides: a small network is small enough
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Noise:
    """What 8 bits do to one layer, and what it would cost to do better.

    Args:
        layer: its name.
        tensor: the tensor that it reads.
        noise: mean square of its output's error over the variance of its output.
        macs: its multiplications.
        weights: their number.
        split_work: what a second term would cost, in INT8 multiplications.
        float_work: what floating point would cost.
    """

    layer: str
    tensor: str
    noise: float
    macs: int
    weights: int
    split_work: float
    float_work: float


@dataclass(frozen=True)
class Mended:
    """The layers that are sensitive enough to be mended.

    Args:
        split: these read two terms.
        floating: these leave INT8, since they are so thin that it costs less.
    """

    split: tuple[Noise, ...] = ()
    floating: tuple[Noise, ...] = ()


def noises(model: ir.Model, plan: Plan, seen: Observations, prices: Prices) -> tuple[Noise, ...]:
    """The noise of every convolution that reads one quantized tensor straight, or, where floating point mends it, several of one scale.

    Args:
        model: the FP32 graph that was planned.
        plan: with the scales of the tensors.
        seen: rows of every layer.
        prices: of the runtime.
    """
    macs = {layer.name: layer.macs for layer in layers(model)}
    images = {value.name for value in model.graph.inputs}
    found = []
    for node in model.graph:
        name = str(node.name)
        if node.op_type != "Conv" or groups(node) != 1 or name not in seen.layers or name not in plan.layers:
            continue
        source = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        scale = plan.activations.get(source) or (scale_read(node, plan) if prices.terms is None else None)
        if scale is not None:
            noise = _noise(node, seen.layers[name], scale)
            price = _price(node, macs[name], prices, is_image=source in images)
            found.append(Noise(name, source, noise, macs[name], int(np.prod(shape_of(node.inputs[1]))), *price))
    return tuple(found)


def _noise(node: ir.Node, gram: Gram, scale: Scale) -> float:
    rows, weights = gram.some_rows(), matrix_of(node, constant_of(node.inputs[1]))
    error = (dequantize(quantize(rows, scale), scale) - rows) @ weights.T
    signal = float((rows @ weights.T).var(0).sum())
    return float(np.square(error).mean(0).sum()) / max(signal, 1e-30)


def _price(node: ir.Node, macs: int, prices: Prices, *, is_image: bool) -> tuple[float, float]:
    """(of a second term, of floating point); an image is float32 already."""
    values, channels = float(np.prod(shape_of(node.inputs[0]))), shape_of(node.inputs[0])[1]
    full, lanes = macs * _padding(node.inputs[1], prices.lanes), prices.lanes[0]
    more = full * (_up(2 * channels, lanes) / _up(channels, lanes) - 1)
    split = float("inf") if prices.terms is None else more + prices.terms * values
    moved = 0.0 if is_image else prices.float_value * values
    return split, macs * prices.float_mac + moved


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _padding(weight: ir.Value | None, lanes: tuple[int, int]) -> float:
    """How much more a convolution multiplies where its channels do not fill the lanes."""
    made, read = shape_of(weight)[:2]
    return _up(read, lanes[0]) / read * _up(made, lanes[1]) / made


def work(model: ir.Model, prices: Prices) -> float:
    """What the network costs, in INT8 multiplications: its own, and the values that move."""
    moved = [
        node for node in model.graph if node.op_type not in ACTIVATIONS | VIEWS
    ]  # those run inside the layer before
    values = sum(float(np.prod(shape_of(value))) for node in moved for value in node.outputs)
    padding = {node.name: _padding(node.inputs[1], prices.lanes) for node in model.graph if node.op_type == "Conv"}
    return sum(layer.macs * padding.get(layer.name, 1.0) for layer in layers(model)) + prices.value * values


def choose(
    found: Sequence[Noise], model: ir.Model, prices: Prices, *, cost: float = COST, integers: int | None = None
) -> Mended:
    """The layers where most noise goes away for the price, each in the cheaper of the two ways.

    The price is a share of what may be spent: of work, and of bytes in proportion (a second term adds one a weight, FP32 three,
    FP16 one).

    Args:
        found: from `noises`.
        model: the graph they were found in.
        prices: of the runtime.
        cost: the share of its work that may be added.
        integers: how many layers are INT8, of which at least one stays; default: those of `found`.
    """
    integers = len(found) if integers is None else integers
    if cost <= 0:
        return Mended()
    whole_noise = sum(layer.noise for layer in found)
    least = NEEDED * whole_noise
    works, whole = cost * work(model, prices), prices.weights * parameter_count(model) + BYTES
    options = [(layer, _spent(layer, works, whole, prices.float_bytes)) for layer in found if layer.noise >= least]
    left, float_left = np.ones(2), prices.float_share * sum(layer.macs for layer in layers(model))
    remaining = whole_noise
    split: list[Noise] = []
    floating: list[Noise] = []
    for layer, (two_terms, floats) in sorted(options, key=lambda one: one[0].noise / min(one[1].sum(1)), reverse=True):
        leaves = floats.sum() < FLOAT_WORTH * two_terms.sum() and layer.macs <= float_left
        leaves = leaves and len(floating) + 1 < integers
        price = floats if leaves else two_terms
        if (price > left).any() or remaining <= ENOUGH or layer.noise < WORTH * price[0] * whole_noise:
            continue
        remaining -= layer.noise
        (floating if leaves else split).append(layer)
        left = left - price
        float_left -= layer.macs if leaves else 0
    return Mended(tuple(split), tuple(floating))


def _spent(layer: Noise, works: float, whole: float, float_bytes: int) -> Matrix:
    """((work, bytes) of a second term, the same of floating point), in shares of what may be spent."""
    floats = [layer.float_work / works, float_bytes * layer.weights / whole]
    return np.asarray([[layer.split_work / works, layer.weights / whole], floats])


def split(
    model: ir.Model, chosen: Sequence[Noise], seen: Observations, *, symmetric: bool, dtype: str = "fp32"
) -> dict[str, Scale]:
    """Let the chosen layers read two terms, in place; place the graph anew and give the terms these scales.

    Args:
        model: the FP32 graph.
        chosen: from `choose`.
        seen: extremes of their tensors.
        symmetric: whether scales are symmetric INT8.
        dtype: that holds their steps exactly; see `Scale.in_type`.

    Returns:
        name of each new tensor -> its scale.
    """
    scales: dict[str, Scale] = {}
    nodes = {str(node.name): node for node in model.graph}
    for tensor in dict.fromkeys(layer.tensor for layer in chosen):
        scale = _scale(seen.tensors[tensor], symmetric=symmetric).in_type(dtype)
        readers = [nodes[layer.layer] for layer in chosen if layer.tensor == tensor]
        joined = _insert_terms(model, readers[0].inputs[0], float(scale.step))
        for node in readers:
            node.replace_input_with(0, joined)
            weight = constant_of(node.inputs[1])
            wide = np.concatenate([weight, weight / np.float32(K)], 1)
            set_constant(model, node, 1, wide, suffix="two_terms")
            node.inputs[1].shape = ir.Shape(wide.shape)  # type: ignore[union-attr]
        scales |= dict.fromkeys(_names(tensor), scale)
    common.TopologicalSortPass()(model)
    infer_shapes(model)
    return scales


def _names(tensor: str) -> tuple[str, str]:
    return f"{tensor}/h", f"{tensor}/r"


def _scale(seen: TensorSeen, *, symmetric: bool) -> Scale:
    wide = widened(seen, ROOM)
    low, high = min(float(wide.low.min()), 0.0), float(wide.high.max())
    levels = 255 if not symmetric else 254
    return scale_of_range(low, max(high, -low * (K + 1) / (levels - K - 1)), symmetric=symmetric)  # r must fit, too


def _insert_terms(model: ir.Model, value: ir.Value | None, step: float) -> ir.Value:
    """[h, r] along the channels."""
    if value is None:
        raise ValueError("a layer without input cannot be split")
    h, r = _names(str(value.name))
    constants = {
        name: add_constant(model, f"{value.name}/two_terms/{name}", np.asarray(number, np.float32))
        for name, number in (("step", step), ("terms", K))
    }
    scaled = ir.node("Div", [value, constants["step"]], name=f"{value.name}/Div")
    floor = ir.node("Floor", [scaled.outputs[0]], name=f"{value.name}/Floor")
    first = ir.node("Mul", [floor.outputs[0], constants["step"]], name=f"{value.name}/First")
    rest = ir.node("Sub", [value, first.outputs[0]], name=f"{value.name}/Sub")
    second = ir.node("Mul", [rest.outputs[0], constants["terms"]], name=f"{value.name}/Second")
    joined = ir.node("Concat", [first.outputs[0], second.outputs[0]], {"axis": 1}, name=f"{value.name}/TwoTerms")
    for node, name in ((scaled, "scaled"), (floor, "floor"), (rest, "rest"), (joined, "two_terms")):
        node.outputs[0].name = f"{value.name}/{name}"
    first.outputs[0].name, second.outputs[0].name = h, r
    insert_behind(model, value, [scaled, floor, first, rest, second, joined])
    return joined.outputs[0]


def split_rows(seen: Observations, chosen: Sequence[Noise], scales: Mapping[str, Scale]) -> Observations:
    """What the layers of the split graph multiply: h as x was seen, r as spread evenly over its steps.

    Args:
        seen: before `split`.
        chosen: what was split.
        scales: from `split`.
    """
    grams = dict(seen.layers)
    for layer in chosen:
        step = float(scales[_names(layer.tensor)[0]].step)
        grams[layer.layer] = _two_terms(grams[layer.layer], step)
    return replace(seen, layers=grams)


def _two_terms(gram: Gram, step: float) -> Gram:
    rows = gram.some_rows()
    first = np.floor(rows / np.float32(step)) * np.float32(step)
    second = K * (rows - first)
    mean, width = second.mean(0, dtype=np.float64), len(gram.total)
    blocks = [*gram.blocks, *(slice(block.start + width, block.stop + width) for block in gram.blocks)]
    moments = [np.outer(mean[block], mean[block]) + np.diag(second[:, block].var(0)) for block in gram.blocks]
    moments = [(gram.number * moment).astype(np.float32) for moment in moments]
    before = [gram.number * correlation for _, correlation in gram.correlations()]
    total = gram.number * np.concatenate([gram.mean() - mean / K, mean])
    return replace(
        gram,
        blocks=blocks,
        moments=[*before, *moments],
        total=total,
        factors=np.ones(2 * width, np.float32),
        sample=[np.concatenate([first, second], 1)],
    )
