"""Which tensors a kernel never stores in 8 bits: those inside a fused chain, and those that only products of activations or layers in
floating point read."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from ptq3d.graphs.layers import WEIGHT_AXIS, shape_of, weight_value
from ptq3d.quantization.groups import pieces_of
from ptq3d.quantization.targets import VIEWS, Target

IMAGE_AXES = 5
BY_ROW = frozenset(
    {"Gemm", "MatMul", "LayerNormalization"}
)  # their channels are the last axis, those of an image axis 1
NORMALIZATIONS = frozenset({"InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization"})
AFFINE = frozenset({"Add", "Mul"})
TURNS = VIEWS | {"Transpose"}


def chain_ends(model: ir.Model, target: Target) -> list[ir.Value]:
    """The tensors that leave the kernels of `target.outputs`, in graph order.

    Args:
        model: a simplified FP32 graph.
        target: the one to place for.
    """
    inside: set[str | None] = set()
    found: list[ir.Value] = []
    for node in model.graph:
        if node.op_type in target.outputs and node.outputs[0].name not in inside:
            *passed, end = _chain(node, target)
            inside.update(value.name for value in passed)
            found.append(end)
    return found


def _chain(first: ir.Node, target: Target) -> list[ir.Value]:
    """The outputs of a node and of all that runs as one with it; attention turns its heads back to features as well.

    Where the limits of the integers stand for a Relu (`target.direct`), they do not with a zero-point, which the scale that a concat
    makes common to several tensors may have.
    """
    chain, last = [first.outputs[0]], first
    affine = first.op_type in WEIGHT_AXIS or first.op_type in NORMALIZATIONS or _is_affine(first, first)
    turns = is_product(first) and not target.products
    while (reader := _only_reader(chain[-1])) is not None:
        if target.direct and any(use.op_type == "Concat" for use, _ in reader.outputs[0].uses()):
            break
        further = affine and reader.op_type in target.fused and _is_further(reader, last, first)
        if not further and not _is_function(reader, target) and not (turns and reader.op_type in TURNS):
            break
        affine, last = further, reader
        chain.append(reader.outputs[0])
    return chain


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _is_function(node: ir.Node, target: Target) -> bool:
    """An activation, or factors that equalization leaves behind one."""
    if node.op_type == "Mul":
        return any(value is not None and value.const_value is not None for value in node.inputs)
    return node.op_type in target.fused and node.op_type not in AFFINE and node.op_type != "Reshape"


def _is_further(node: ir.Node, last: ir.Node, first: ir.Node) -> bool:
    """Whether a node adds to the affine map behind `first`, or gives the channels back that it had as groups."""
    return _is_affine(node, first) or (node.op_type == "Reshape" and last.op_type == "InstanceNormalization")


def _is_affine(node: ir.Node, first: ir.Node) -> bool:
    """Whether a node adds or multiplies by one constant for each channel of `first`."""
    constants = [value for value in node.inputs if value is not None and value.const_value is not None]
    if node.op_type not in AFFINE or len(constants) != 1:
        return False
    rank, shape = len(shape_of(node.outputs[0])), shape_of(constants[0])
    by_row = first.op_type in BY_ROW or (first.op_type in AFFINE and rank != IMAGE_AXES)
    channels = rank - 1 if by_row else 1
    return all(size == 1 for axis, size in enumerate(shape, rank - len(shape)) if axis != channels)


def is_product(node: ir.Node) -> bool:
    """Whether a node multiplies two activations."""
    return node.op_type in WEIGHT_AXIS and weight_value(node) is None


def product_ends(model: ir.Model, target: Target) -> frozenset[str]:
    """The tensors behind products that stay in floating point, where they are quantized if at all.

    Args:
        model: a simplified FP32 graph.
        target: the one to place for.
    """
    products = [node for node in model.graph if is_product(node)] if not target.products else []
    return frozenset(str(_chain(node, target)[-1].name) for node in products)


def read_by_products(model: ir.Model) -> set[str]:
    """The tensors that nothing but products of two activations read, straight or through operators without weights.

    Args:
        model: a simplified FP32 graph.
    """
    found: set[str] = set()

    def leads_to_product(node: ir.Node) -> bool:
        if node.op_type in WEIGHT_AXIS:
            return is_product(node)
        return all(value.name in found for value in node.outputs)

    for node in reversed(list(model.graph)):
        for value in node.outputs:
            readers = [reader for reader, _ in value.uses()]
            if readers and not value.is_graph_output() and all(map(leads_to_product, readers)):
                found.add(str(value.name))
    return found


def unrounded_uses(model: ir.Model, floating: Collection[str]) -> frozenset[tuple[str, int]]:
    """(node, input) of all that reads what no integer stands for: layers in floating point, and what moves values to these alone.

    What a concat or a move makes is read rounded by all, where anything else reads it: its pieces are.

    Args:
        model: a simplified FP32 graph.
        floating: names of the layers.
    """
    found: set[tuple[str, int]] = set()
    for node in reversed(list(model.graph)):
        output, pieces = node.outputs[0], pieces_of(node.outputs[0])
        if pieces and only_read_by(output, found):
            found.update((str(node.name), index) for index, _ in enumerate(pieces))
        elif pieces:
            found.difference_update((str(reader.name), index) for reader, index in output.uses())
        if node.name in floating:
            found.add((str(node.name), 0))
    return frozenset(found)


def only_read_by(value: ir.Value, uses: Collection[tuple[str, int]]) -> bool:
    """Whether a tensor is read, and by nothing but these."""
    readers = [(str(node.name), index) for node, index in value.uses()]
    return bool(readers) and not value.is_graph_output() and all(one in uses for one in readers)
