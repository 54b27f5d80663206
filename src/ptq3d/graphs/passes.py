"""Graph to graph: the simplifications that come before quantization. Exact up to float rounding."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ptq3d.errors import GraphError
from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.layers import groups, shape_of
from ptq3d.graphs.repeats import share_repeats
from ptq3d.graphs.tokens import shorten_tokens

FOLD_LIMIT_BYTES = 1 << 31
QDQ = ("QuantizeLinear", "DequantizeLinear")


def simplify(model: ir.Model) -> ir.Model:
    """The graph with constants and BatchNormalization folded, repeats stored once, nodes named and shapes known.

    Args:
        model: static channels and window. It is changed in place. A Q/DQ graph keeps its nodes.

    Returns:
        `model`; its output is the same up to float rounding.

    Raises:
        GraphError: a shape cannot be inferred, which means the graph is invalid.

    Source: BatchNormalization-15: y = (x - mean) / sqrt(var + epsilon) * scale + bias, an affine map per channel.
    """
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    for noisy in ("onnx_ir", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    optimizer.optimize_ir(
        model, input_size_limit=FOLD_LIMIT_BYTES, output_size_limit=FOLD_LIMIT_BYTES, should_fold=_may_fold
    )
    rewriter.rewrite(
        model,
        pattern_rewrite_rules=[
            rules.fuse_batchnorm_into_conv_rule,
            rules.fuse_batchnorm_into_conv_transpose_rule,
            rules.fuse_batchnorm_into_gemm_rule,
        ],
    )
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if not is_quantized(model):
        infer_shapes(model)
        shorten_tokens(model)
    share_repeats(model)
    infer_shapes(model)
    name_nodes(model)
    _check_channels(model)
    return model


def _check_channels(model: ir.Model) -> None:
    """ONNX's own shape inference takes a convolution whose weights are of other channels than its input."""
    for node in model.graph:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        x, weight = shape_of(node.inputs[0]), shape_of(node.inputs[1])
        wanted = weight[1] * groups(node) if node.op_type == "Conv" else weight[0]
        if x[1] != wanted:
            raise GraphError(
                f"the ONNX graph is invalid: {node.op_type} '{node.name}' reads {x[1]} channels, its weights take {wanted}. "
                "Export it with the number of channels it was trained on."
            )


def _may_fold(node: ir.Node) -> bool | None:
    """Never Q and DQ; always constants of a shape, which masks begin with; the optimizer's rules for the rest."""
    return {"ConstantOfShape": True, **dict.fromkeys(QDQ, False)}.get(node.op_type)


def is_quantized(model: ir.Model) -> bool:
    """Whether the graph holds QuantizeLinear or DequantizeLinear nodes."""
    return any(node.op_type in QDQ for node in model.graph)


def infer_shapes(model: ir.Model) -> None:
    """Give every tensor of `model` its shape and type, in place.

    Raises:
        GraphError: a tensor's shape cannot be inferred.
    """
    common.ShapeInferencePass(strict_mode=True, data_prop=True)(model)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None and value.name:
                raise GraphError(
                    f"the ONNX graph is invalid: the shape of '{value.name}' ({node.op_type} '{node.name}') cannot be inferred. "
                    "Check it with onnx.checker.check_model(..., full_check=True), or export it again."
                )


def name_nodes(model: ir.Model) -> None:
    """Give every node a unique name, in place: its own, or its operator and position."""
    seen: set[str] = set()
    for position, node in enumerate(model.graph):
        name = node.name or f"{node.op_type}_{position}"
        if name in seen:
            name = f"{name}_{position}"
        node.name = name
        seen.add(name)


def insert_behind(model: ir.Model, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put `nodes` right behind the producer of `value`, in place; in front of everything where it is an input."""
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], nodes)
    else:
        model.graph.insert_after(producer, nodes)


def unsigned_activations(model: ir.Model) -> int:
    """Turn int8 activations into uint8 with a zero-point 128 higher, in place: the same real values, bit for bit.

    Left alone: weights, integers that anything but DequantizeLinear reads, and the right factors of products, whose
    runtimes want them signed.

    Returns:
        How many tensors were turned.

    Source: ONNX QuantizeLinear-21: saturate(round(x / step) + zero_point), -128..127 for int8 and 0..255 for uint8.
    """
    turned = [node for node in model.graph if node.op_type == "QuantizeLinear" and _may_be_unsigned(node)]
    for node in turned:
        old = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
        zero_point = np.zeros((), np.int16) if old is None else old.numpy().astype(np.int16)
        fresh = add_constant(
            model, f"{node.name or node.outputs[0].name}/unsigned", (zero_point + 128).astype(np.uint8)
        )
        for pair in (node, *(reader for reader, _ in node.outputs[0].uses())):
            pair.resize_inputs(3)
            pair.replace_input_with(2, fresh)
        node.outputs[0].dtype = ir.DataType.UINT8
        node.attributes.pop("output_dtype", None)
    return len(turned)


def _may_be_unsigned(node: ir.Node) -> bool:
    value, integers = node.inputs[0], node.outputs[0]
    readers = [reader for reader, _ in integers.uses()]
    if value is None or value.const_value is not None or integers.dtype != ir.DataType.INT8:
        return False
    factors = [use for reader in readers for use in reader.outputs[0].uses()]
    return all(reader.op_type == "DequantizeLinear" for reader in readers) and not any(
        reader.op_type in ("MatMul", "Transpose") for reader, _ in factors
    )


def write_kernel_shapes(model: ir.Model) -> None:
    """Give every convolution its kernel_shape, in place: TensorRT 10.3 does not infer it of weights that are dequantized.

    Source: ONNX Conv-11 and ConvTranspose-11: where it is missing, it is that of the weights.
    """
    for node in model.graph:
        sides = shape_of(node.inputs[1])[2:] if node.op_type in ("Conv", "ConvTranspose") else ()
        if sides and "kernel_shape" not in node.attributes:
            node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", sides)
