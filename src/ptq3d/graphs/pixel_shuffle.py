"""A ConvTranspose whose patches do not overlap, as a 1x1x1 convolution and a shuffle: an INT8 kernel that every runtime has.

Where kernel = stride, each input voxel makes a patch of its own, and the voxels of a patch are further channels of a convolution:

    y[k, s x + i, ...] = sum_c x[c, x, ...] W[c, k, i, ...] = patches[(k, i, ...), x, ...]

The same products and sums, bit for bit where they are integers. With channels in the order (k, i, j, l) one Transpose of
(N, K, i, j, l, X, Y, Z) puts them into their places: eight axes, which is the most that TensorRT has.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.layers import groups, shape_of
from ptq3d.graphs.passes import infer_shapes

AXES = 3  # of space, at most: more would make more than eight in the shuffle


def shuffle_pixels(model: ir.Model) -> tuple[str, ...]:
    """Turn every ConvTranspose with kernel = stride and stored weights into Conv, Reshape, Transpose, Reshape, in place.

    The Conv keeps the node's name, the shuffled tensor that of its output. Dequantized weights stay INT8, and each step stands
    there once for every voxel of a patch. Where nothing but one QuantizeLinear of one step reads the output, it and its
    DequantizeLinear go in front of the shuffle, which then moves bytes.

    Args:
        model: after `simplify`, FP32 or Q/DQ.

    Returns:
        Names of the nodes that were turned. Others are left alone: those with patches that overlap or are cut, with groups, or
        with weights that are no constants.
    """
    turned = [node for node in model.graph if node.op_type == "ConvTranspose" and _is_shuffle(node)]
    for node in turned:
        _turn(model, node)
    if turned:
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)
        infer_shapes(model)
    return tuple(str(node.name) for node in turned)


def _is_shuffle(node: ir.Node) -> bool:
    kernel = shape_of(node.inputs[1])[2:]
    strides = _numbers(node, "strides") or (1,) * len(kernel)
    more = (*_numbers(node, "pads"), *_numbers(node, "output_padding"), *_numbers(node, "output_shape"))
    plain = not any(more) and all(step == 1 for step in _numbers(node, "dilations")) and groups(node) == 1
    padding = node.attributes.get("auto_pad")
    plain = plain and (padding is None or padding.as_string() in ("NOTSET", "VALID"))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    stored = (bias is None or bias.const_value is not None) and _is_stored(node.inputs[1])
    return plain and stored and strides == kernel and len(kernel) <= AXES


def _numbers(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.as_ints())


def _is_stored(weight: ir.Value | None) -> bool:
    """Whether weights are a constant, or dequantized from one by one step, or by one for each output channel."""
    node = None if weight is None else weight.producer()
    if weight is None or node is None:
        return weight is not None and weight.const_value is not None
    if node.op_type != "DequantizeLinear" or any(one is None or one.const_value is None for one in node.inputs):
        return False
    return math.prod(shape_of(node.inputs[1])) == 1 or _axis(node) == 1


def _axis(dequantize: ir.Node) -> int:
    axis = dequantize.attributes.get("axis")
    return (1 if axis is None else axis.as_int()) % len(shape_of(dequantize.inputs[0]))


def _turn(model: ir.Model, node: ir.Node) -> None:
    old, kernel = node.outputs[0], shape_of(node.inputs[1])[2:]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    inputs = [node.inputs[0], _weight(model, node.inputs[1])]
    if bias is not None:
        inputs.append(_constant(model, bias, f"{bias.name}/patches", repeat=math.prod(kernel)))
    conv = ir.node("Conv", inputs, {"kernel_shape": [1] * len(kernel)}, name=node.name)
    name, made, replaced = str(old.name), conv.outputs[0], old
    made.name = f"{name}/patches"
    model.graph.insert_before(node, conv)
    coder = _coder(old)
    if coder is not None:
        coder[0].replace_input_with(0, made)
        made = replaced = _renamed(coder, made.name)
    readers = list(replaced.uses())
    shuffled = _shuffled(model, made, old, kernel)
    for reader, index in readers:
        reader.replace_input_with(index, shuffled)
    outputs = model.graph.outputs
    outputs[:] = [shuffled if output is replaced else output for output in outputs]
    model.graph.remove(node, safe=True)
    shuffled.name = name


def _weight(model: ir.Model, weight: ir.Value | None) -> ir.Value | None:
    """(C, K, i, j, l) as (K i j l, C, 1, 1, 1): dequantized behind the same steps, each once for every voxel of a patch."""
    dequantize = None if weight is None else weight.producer()
    if weight is None or dequantize is None:
        return None if weight is None else _constant(model, weight, f"{weight.name}/patches")
    stored, scales = dequantize.inputs[0], dequantize.inputs[1:]
    if stored is None:
        return None
    name = f"{str(stored.name).removesuffix('/q')}/patches"
    known = next((value for node in model.graph for value in node.outputs if value.name == f"{name}/dq"), None)
    if known is not None:  # several nodes share their weights
        return known
    voxels = math.prod(shape_of(stored)[2:])
    inputs = [_constant(model, stored, f"{name}/q")]
    for scale, kind in zip(scales, ("step", "zero_point"), strict=False):
        repeat = voxels if shape_of(scale) == shape_of(stored)[1:2] else 1
        inputs.append(_constant(model, scale, f"{name}/{kind}", repeat=repeat))
    fresh = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{name}/DQ")
    fresh.outputs[0].name = f"{name}/dq"
    model.graph.insert_before(dequantize, fresh)
    return fresh.outputs[0]


def _constant(model: ir.Model, value: ir.Value | None, name: str, *, repeat: int = 0) -> ir.Value:
    """Weights in the order of a 1x1x1 convolution's, or with `repeat` numbers of channels, each so many times."""
    if name not in model.graph.initializers:
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if repeat:
            array = np.repeat(array, repeat) if repeat > 1 else array
        else:
            rows = np.moveaxis(array, 0, -1)
            array = rows.reshape(-1, array.shape[0], *[1] * (array.ndim - 2))
        add_constant(model, name, array)
    return model.graph.initializers[name]


def _coder(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    """The Q and DQ of one step that are all that reads a value."""
    readers = [reader for reader, _ in value.uses()]
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or value.is_graph_output():
        return None
    behind = [reader for reader, _ in readers[0].outputs[0].uses()]
    if len(behind) != 1 or behind[0].op_type != "DequantizeLinear":
        return None
    single = all(math.prod(shape_of(scale)) == 1 for node in (readers[0], behind[0]) for scale in node.inputs[1:])
    return (readers[0], behind[0]) if single else None


def _renamed(coder: tuple[ir.Node, ir.Node], name: str) -> ir.Value:
    """What a Q and DQ behind the tensor of that name give, with the names of such."""
    for node, kind in zip(coder, ("Q", "DQ"), strict=True):
        node.name, node.outputs[0].name = f"{name}/{kind}", f"{name}/{kind.lower()}"
        node.outputs[0].shape = None
    return coder[1].outputs[0]


def _shuffled(model: ir.Model, patches: ir.Value, old: ir.Value, kernel: tuple[int, ...]) -> ir.Value:
    """(N, K i j l, X, Y, Z) as (N, K, X i, Y j, Z l), in a tensor that is still to be named."""
    name, (_, channels, *size) = str(old.name), shape_of(old)
    rank = len(kernel)
    apart = [0, channels, *kernel, *(whole // step for whole, step in zip(size, kernel, strict=True))]  # 0 keeps N
    order = [0, 1, *(axis for place in range(rank) for axis in (2 + rank + place, 2 + place))]
    shapes = [
        add_constant(model, f"{name}/{kind}", np.asarray(shape, np.int64))
        for kind, shape in (("apart", apart), ("whole", [0, channels, *size]))
    ]
    split = ir.node("Reshape", [patches, shapes[0]], name=f"{name}/Apart")
    turned = ir.node("Transpose", [split.outputs[0]], {"perm": order}, name=f"{name}/Shuffle")
    whole = ir.node("Reshape", [turned.outputs[0], shapes[1]], name=f"{name}/Whole")
    split.outputs[0].name, turned.outputs[0].name = f"{name}/apart/out", f"{name}/shuffle/out"
    whole.outputs[0].shape, whole.outputs[0].type = old.shape, old.type
    producer = patches.producer()
    if producer is not None:
        model.graph.insert_after(producer, [split, turned, whole])
    return whole.outputs[0]
