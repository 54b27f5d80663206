"""Layers that multiply: in INT8 where input and weights are, in FP16 with a reason where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ptq3d.engines.triton import tails
from ptq3d.engines.triton.assembly import Assembly
from ptq3d.engines.triton.elementwise import constant_beside
from ptq3d.engines.triton.network import Network, Node, Weight
from ptq3d.engines.triton.steps import LARGEST_KERNEL, Convolve, Floats, Upsample, View
from ptq3d.engines.triton.tails import Tail
from ptq3d.engines.triton.views import as_voxels

PLAIN: tuple[tuple[str, Any], ...] = (("strides", (1, 1, 1)), ("dilations", (1, 1, 1)), ("pads", (0,) * 6))


def as_image(view: View) -> View | None:
    """An image with even rows of channels as a convolution reads it; None for others."""
    return view if len(view.shape) == 5 and view.pitch is not None else None


def convolve(assembly: Assembly, node: Node) -> None:
    """Conv: in INT8, in our FP16 kernel where it only lacks integers, else by PyTorch."""
    why, why_not = _why_float(assembly, node, axis=0), _why_not_conv(assembly.network, node)
    if why_not or (why and not _constant_but_input(assembly.network, node)):
        assembly.in_float(node, why or why_not)
        return
    weight, multiplier = _reals(assembly, node) if why else _integers(assembly, node, axis=0)
    x = assembly.as_float(node.inputs[0]) if why else assembly.view(node.inputs[0])
    x = assembly.formed(x, as_image)
    tail, bias = _tail(assembly, node, channel=1)
    epilogue = assembly.epilogue(tail, as_image)
    given = node.attributes
    strides, dilations, pads = (tuple(given.get(name, rest)) for name, rest in PLAIN)
    out = assembly.store(tail, filled=epilogue.other is None or epilogue.other.spare > 0)
    assembly.emit(Convolve(node.name, out, x, weight, multiplier, bias, strides, dilations, pads, epilogue=epilogue))
    assembly.layer(node, why)


def upsample(assembly: Assembly, node: Node) -> None:
    """ConvTranspose."""
    why = _why_float(assembly, node, axis=1) or _why_not_upsample(assembly.network, node)
    if why:
        assembly.in_float(node, why)
        return
    weight, multiplier = _integers(assembly, node, axis=1)
    x = assembly.formed(assembly.view(node.inputs[0]), as_image)
    tail, bias = _tail(assembly, node, channel=1)
    epilogue = assembly.epilogue(tail, as_image)
    out = assembly.store(tail)
    if weight.shape[2:] == (1, 1, 1):  # nothing grows: a convolution whose weights are turned
        turned = np.ascontiguousarray(weight.swapaxes(0, 1))
        assembly.emit(Convolve(node.name, out, x, turned, multiplier, bias, epilogue=epilogue))
    else:
        assembly.emit(Upsample(node.name, out, x, weight, multiplier, bias, epilogue))
    assembly.layer(node)


def linear(assembly: Assembly, node: Node) -> None:
    """MatMul and Gemm with constant weights, as a convolution of single voxels."""
    network = assembly.network
    turned = node.op == "Gemm" and bool(node.attributes.get("transB", 0))
    if node.op == "MatMul" and network.constant(node.inputs[0]) is None and network.constant(node.inputs[1]) is None:
        assembly.in_float(node, "it is a product of two activations")
        return
    why = _why_float(assembly, node, axis=0 if turned else 1) or _why_not_linear(network, node)
    if why:
        assembly.in_float(node, why)
        return
    weight, multiplier = _integers(assembly, node, axis=0 if turned else 1)
    weight = np.ascontiguousarray(weight if turned else weight.T)[:, :, None, None, None]
    rows = range(len(network.shapes[node.out]))
    x = assembly.formed(assembly.view(node.inputs[0]), as_voxels, rows)
    tail, bias = _tail(assembly, node, channel=len(rows) - 1)
    epilogue = assembly.epilogue(tail, as_voxels, rows)
    out = assembly.target(tail, as_voxels, rows)
    assembly.emit(Convolve(node.name, out, x, weight, multiplier, bias, epilogue=epilogue))
    assembly.layer(node)


def _why_float(assembly: Assembly, node: Node, *, axis: int) -> str:
    """What keeps a layer out of INT8, "" where nothing does."""
    network = assembly.network
    weight = network.weights.get(node.inputs[1])
    if network.constant(node.inputs[0]) is not None:
        return "its input is a constant"
    if assembly.view(node.inputs[0]).dtype != "int8":
        return "its input is not quantized"
    if weight is None or weight.q.dtype != np.int8:
        return "its weights are not INT8"
    if weight.zero_point.any():
        return "its weights have a zero-point"
    if weight.step.size != 1 and weight.axis % weight.q.ndim != axis:
        return "its weights do not have one step for each output channel"
    if node.input(2) and network.constant(node.inputs[2]) is None:
        return "its bias is computed"
    return ""


def _why_not_conv(network: Network, node: Node) -> str:
    if len(network.shapes[node.out]) != 5:
        return f"it is a {len(network.shapes[node.out]) - 2}D convolution"
    if node.attributes.get("group", 1) != 1:
        return "it has groups"
    if max(network.shapes[node.inputs[1]][2:]) > LARGEST_KERNEL:
        return f"its kernel is longer than {LARGEST_KERNEL}"
    return _why_padded(node)


def _why_padded(node: Node) -> str:
    padding = node.attributes.get("auto_pad", "NOTSET")
    return "" if padding in ("NOTSET", "") else f"it has auto_pad {padding}"


def _why_not_upsample(network: Network, node: Node) -> str:
    given, kernel = node.attributes, network.shapes[node.inputs[1]][2:]
    if len(kernel) != 3:
        return f"it is a {len(kernel)}D convolution"
    if tuple(given.get("strides", (1, 1, 1))) != kernel:
        return "its kernel is not its stride"
    if any(any(given.get(name, ())) for name in ("pads", "output_padding")) or given.get("group", 1) != 1:
        return "it has pads or groups"
    return "it is dilated" if any(one != 1 for one in given.get("dilations", ())) else _why_padded(node)


def _why_not_linear(network: Network, node: Node) -> str:
    if len(network.shapes[node.inputs[1]]) != 2:
        return "its weights have more than two axes"
    given = node.attributes
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        return "it has transA, alpha or beta"
    bias = network.constant(node.input(2)) if node.input(2) else None
    return (
        "" if bias is None or bias.size in (1, network.shapes[node.out][-1]) else "its bias is not one for each channel"
    )


def _integers(assembly: Assembly, node: Node, *, axis: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """The weights, and the multiplier (K,) that makes real values of sums."""
    weight: Weight = assembly.network.weights[node.inputs[1]]
    step = np.float32(assembly.view(node.inputs[0]).step)
    multiplier = np.broadcast_to(step * weight.step.reshape(-1), weight.q.shape[axis : axis + 1])
    return weight.q, np.array(multiplier, np.float32)


def _constant_but_input(network: Network, node: Node) -> bool:
    """Whether a layer's weights and bias are constants, and its input is not."""
    given = [network.constant(name) is not None for name in node.inputs if name]
    return not given[0] and all(given[1:])


def _reals(assembly: Assembly, node: Node) -> tuple[Floats, Floats]:
    """The weights of a layer in floating point, and a multiplier (K,) of 1."""
    weight = np.asarray(assembly.network.constant(node.inputs[1]), np.float32)
    return weight, np.ones(len(weight), np.float32)


def _tail(assembly: Assembly, node: Node, *, channel: int) -> tuple[Tail, Floats | None]:
    """What follows a layer, and its bias (K,): its own, or the constant that is added right behind it."""
    network, name = assembly.network, node.out
    channels = network.shapes[name][channel]
    values = network.constant(node.input(2)) if node.input(2) else None
    if values is None:
        following = network.sole_reader(name)
        added = constant_beside(assembly, following, name) if following is not None and following.op == "Add" else None
        if following is not None and added is not None and (added.axis == channel or added.values.size == 1):
            values, name = added.values, following.out
            assembly.done.add(following)
    tail = tails.follow(network, name, assembly.computed)
    bias = None if values is None else np.broadcast_to(values.astype(np.float32).reshape(-1), (channels,))
    return tail, None if bias is None else np.array(bias)
