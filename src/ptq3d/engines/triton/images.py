"""Normalization, pooling and resampling."""

from __future__ import annotations

from functools import partial

import numpy as np

from ptq3d.engines.triton import tails
from ptq3d.engines.triton.assembly import Assembly
from ptq3d.engines.triton.layers import as_image
from ptq3d.engines.triton.network import Node, Shape
from ptq3d.engines.triton.steps import Floats, Normalize, NormalizeRows, Pool, Resize
from ptq3d.engines.triton.tails import Tail
from ptq3d.engines.triton.views import as_matrix

ONE = (1, 1, 1)


def normalize(assembly: Assembly, node: Node) -> None:
    """InstanceNormalization and GroupNormalization of an INT8 image."""
    network = assembly.network
    shape = network.shapes[node.inputs[0]]
    view = assembly.view(node.inputs[0])
    scale, bias = (_parameters(assembly, name, shape[1]) for name in node.inputs[1:3])
    if len(shape) != 5 or view.dtype != "int8" or scale is None or bias is None:
        assembly.in_float(node)
        return
    groups = shape[1] if node.op == "InstanceNormalization" else int(node.attributes["num_groups"])
    x = assembly.formed(view, as_image)
    sums = assembly.summed(x)
    summed = sums is not None
    if sums is None:
        sums = assembly.sums_of(x)
    tail = tails.follow(network, node.out, assembly.computed)
    epilogue = assembly.epilogue(tail, as_image)
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    out = assembly.store(tail)
    assembly.emit(Normalize(node.name, out, x, groups, scale, bias, epsilon, sums, summed, epilogue))


def _parameters(assembly: Assembly, name: str, channels: int) -> Floats | None:
    """(C,) float32: one for each channel, or one for each group."""
    values = assembly.network.constant(name)
    if values is None or channels % values.size:
        return None
    return np.repeat(values.reshape(-1).astype(np.float32), channels // values.size)


def normalize_rows(assembly: Assembly, node: Node) -> None:
    """LayerNormalization over the last axis."""
    network = assembly.network
    shape = network.shapes[node.inputs[0]]
    scale = network.constant(node.inputs[1])
    bias = network.constant(node.input(2)) if node.input(2) else np.zeros(shape[-1:], np.float32)
    last = node.attributes.get("axis", -1) % len(shape) == len(shape) - 1
    if not last or scale is None or bias is None or len(node.outputs) > 1:
        assembly.in_float(node)
        return
    rows = range(len(shape))
    form = partial(as_matrix, order=rows)
    x = assembly.formed(assembly.view(node.inputs[0]), form, rows)
    tail = tails.follow(network, node.out, assembly.computed)
    epilogue = assembly.epilogue(tail, form, rows)
    out = assembly.target(tail, form, rows)
    values = [np.ascontiguousarray(one.reshape(-1), np.float32) for one in (scale, bias)]
    epsilon = float(node.attributes.get("epsilon", 1e-5))
    assembly.emit(NormalizeRows(node.name, out, x, values[0], values[1], epsilon, epilogue))


def pool(assembly: Assembly, node: Node) -> None:
    """MaxPool of an INT8 image; AveragePool of any."""
    shape, given = assembly.network.shapes[node.inputs[0]], node.attributes
    view = assembly.view(node.inputs[0])
    most = node.op == "MaxPool"
    if len(shape) != 5 or not _plain_pool(assembly, node) or (most and view.dtype != "int8"):
        assembly.in_float(node)
        return
    tail = Tail((node.out,), "int8", view.scale) if most else tails.settle(assembly.network, node.out, Tail(()))
    kernel, strides, pads = (tuple(given.get(name, rest)) for name, rest in POOLS)
    include = bool(given.get("count_include_pad", 0))
    x = assembly.formed(view, as_image)
    out = assembly.store(tail)
    kind = "max" if most else "average"
    assembly.emit(Pool(node.name, out, x, kind, kernel, strides, pads, include))


POOLS = (("kernel_shape", ONE), ("strides", ONE), ("pads", (0,) * 6))


def _plain_pool(assembly: Assembly, node: Node) -> bool:
    """No dilation, no automatic pads, even pads of an average, and no window beyond the end."""
    given = node.attributes
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "") or any(one != 1 for one in given.get("dilations", ONE)):
        return False
    kernel, strides, pads = (tuple(given.get(name, rest)) for name, rest in POOLS)
    if len(kernel) != 3 or len(node.outputs) > 1 or (node.op == "AveragePool" and pads[:3] != pads[3:]):
        return False
    sizes = assembly.network.shapes[node.inputs[0]][2:]
    whole = [
        (size + pads[axis] + pads[axis + 3] - kernel[axis]) // strides[axis] + 1 for axis, size in enumerate(sizes)
    ]
    return tuple(whole) == assembly.network.shapes[node.out][2:]


def resize(assembly: Assembly, node: Node) -> None:
    """Resize of an image, nearest or linear, as PyTorch exports them."""
    before, after = (assembly.network.shapes[name] for name in (node.inputs[0], node.out))
    mode = node.attributes.get("mode", "nearest")
    corners = node.attributes.get("coordinate_transformation_mode", "half_pixel")
    nearest = mode == "nearest" and (corners == "asymmetric" or _whole(before, after))
    linear = mode == "linear" and corners in ("half_pixel", "pytorch_half_pixel", "align_corners")
    if len(before) != 5 or before[:2] != after[:2] or not (nearest or linear) or node.attributes.get("axes"):
        assembly.in_float(node)
        return
    x = assembly.formed(assembly.view(node.inputs[0]), as_image)
    kept = Tail((node.out,), x.dtype, x.scale)
    tail = kept if nearest else tails.settle(assembly.network, node.out, Tail(()))
    assembly.emit(Resize(node.name, assembly.store(tail), x, mode, corners == "align_corners"))


def _whole(before: Shape, after: Shape) -> bool:
    return all(new % old == 0 for old, new in zip(before[2:], after[2:], strict=True))
