"""A graph in FP16 or BF16 by its own types, and back: every tensor between a Cast of the input and a Cast of the output.

A strongly typed runtime computes in the types that it reads, so nothing is left for it to choose: weights and biases are stored in
the low type, QuantizeLinear's scale has the type of its input and DequantizeLinear gives that of its scale. What sums over voxels
or channels to normalize by them stays in FP32 between Casts; so does what ONNX takes in FP32 only (the scales of a Resize).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from ptq3d.errors import GraphError
from ptq3d.graphs.constants import add_constant
from ptq3d.graphs.passes import QDQ, infer_shapes, insert_behind, is_quantized

LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NORMALIZATIONS = frozenset(
    {"InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization", "RMSNormalization"}
    | {"LpNormalization", "MeanVarianceNormalization"}
)
SUMS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "GlobalAveragePool"})
SUMS |= {"Floor"}  # no sum, but what is rounded in front of it may move it by a whole one: the terms of `second_terms`
# what a normalization that is written out does with its sums, and with the values that it sums
STEPS = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Max", "Clip"})
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Expand"})
FLOAT_INPUTS = frozenset({("Resize", 1), ("Resize", 2)})  # (operator, input): float32 whatever the others are
BOUNDS = frozenset({"Add", "Clip", "Max", "Min", "Pad", "Where"})  # a number beyond the type means "very much" there
AXES_AS_INPUT = 18
REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"]
)
# the opset in which an operator began to mean something else; what only takes more types or attributes since is not among them
CHANGED = {"RoiAlign": 16, "LpPool": 18, "Split": 18, "DFT": 20, "GridSample": 20, "GroupNormalization": 21}
GRAPHS = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
TENSOR = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


def low_precision(model: ir.Model, dtype: Literal["fp16", "bf16"]) -> None:
    """Turn every float32 tensor of a graph into FP16 or BF16, in place; its input and output stay float32.

    Normalizations, means and what is computed with them stay float32. A constant beyond the type's range becomes its largest
    number where it is added or bounds something (a mask). BF16 raises the opset to 22, the first with its convolutions.

    Args:
        model: after `simplify`, FP32 or Q/DQ with steps that the type holds exactly.
        dtype: "fp16" or "bf16".

    Raises:
        GraphError: a constant or step that the type does not hold, an operator without that type, or an opset that cannot be
            raised; the message names the node.
    """
    if low_type(model) is not None:
        raise GraphError(f"the graph holds FP16 or BF16 tensors already, {dtype} is wanted. Start from its FP32 file.")
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or any(one.type in GRAPHS for one in node.attributes.values()):
            raise GraphError(
                f"{node.op_type} '{node.name}' is not ONNX's own or holds a graph; {dtype} is not written into it."
            )
    kind = LOW[dtype]
    _raise_opset(model, 22 if dtype == "bf16" else 20 if is_quantized(model) else 0)
    wide = _wide(model)
    _Types(model, kind, dtype, wide).turn()
    infer_shapes(model)
    for node in model.graph:
        _check(node, kind, wide, model.opset_imports[""])


def full_precision(model: ir.Model) -> None:
    """The reverse: every FP16 and BF16 tensor of a graph as float32, without the Casts between them, in place."""
    low = {*LOW.values()}
    floats = {*low, ir.DataType.FLOAT}
    for value in model.graph.initializers.values():
        if value.dtype in low and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is not None and node.outputs[0].dtype in low:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        if source is not None and {source.dtype, node.outputs[0].dtype} <= floats:
            _remove_cast(model, node, source)
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.dtype in low:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    infer_shapes(model)


def low_type(model: ir.Model) -> ir.DataType | None:
    """FP16 or BF16 where a tensor of the graph is of it, None for an FP32 graph."""
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    return next((value.dtype for value in values if value.dtype in TENSOR), None)


def _remove_cast(model: ir.Model, node: ir.Node, source: ir.Value) -> None:
    old, outputs = node.outputs[0], model.graph.outputs
    for reader, index in list(old.uses()):
        reader.replace_input_with(index, source)
    if old.is_graph_output():
        if source.producer() is None:
            return
        outputs[:] = [source if output is old else output for output in outputs]
        source.name, old.name = old.name, None
    model.graph.remove(node, safe=True)


def _raise_opset(model: ir.Model, wanted: int) -> None:
    current = model.opset_imports[""]
    if current is None or current >= wanted:
        return
    changed = [node for node in model.graph if current < CHANGED.get(node.op_type, 0) <= wanted]
    if changed:
        raise GraphError(
            f"these types need ONNX opset {wanted}, the graph is of opset {current}, and {changed[0].op_type} '{changed[0].name}' "
            "changed what it means. Export it again with a later opset, or stay with fp32."
        )
    for node in model.graph:
        if current < AXES_AS_INPUT and node.op_type in REDUCTIONS and "axes" in node.attributes:
            axes = np.asarray(node.attributes.pop("axes").as_ints(), np.int64)
            node.resize_inputs(2)
            node.replace_input_with(1, add_constant(model, f"{node.name}/axes", axes))
    model.opset_imports[""] = wanted
    model.ir_version = max(model.ir_version or 0, 10)


def _wide(model: ir.Model) -> set[ir.Node]:
    """The nodes that compute in float32: normalizations, sums, and around sums what a written out normalization does.

    That is what computes with a sum (x - mean, x / deviation, variance + epsilon), and what is computed only to be summed (x^2).
    """
    wide: set[ir.Node] = set()
    sums: set[ir.Value | None] = set()
    for node in model.graph:
        given = [value for value in node.inputs if value is not None and value.const_value is None]
        if node.op_type in STEPS | VIEWS and any(value in sums for value in given):
            wide.add(node)
            sums |= set(node.outputs) if all(value in sums for value in given) else set()
        elif node.op_type in SUMS:
            wide.add(node)
            sums.update(node.outputs)
        elif node.op_type in NORMALIZATIONS:
            wide.add(node)
    for node in reversed(list(model.graph)):
        readers = [reader for value in node.outputs for reader, _ in value.uses()]
        if node.op_type in STEPS and readers and all(reader.op_type in SUMS for reader in readers):
            wide.add(node)
    return wide


class _Types:
    """Gives every float32 tensor of a graph its new type, with Casts where its readers want another one."""

    def __init__(self, model: ir.Model, kind: ir.DataType, name: str, wide: Collection[ir.Node]) -> None:
        self._model, self._kind, self._name, self._wide = model, kind, name, wide
        self._cast: dict[ir.Value, ir.Value] = {}

    def turn(self) -> None:
        """Change the whole graph."""
        graph = self._model.graph
        constants = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
        nodes = list(graph)
        made = [value for node in nodes for value in node.outputs if value.dtype == ir.DataType.FLOAT]
        values = [*(value for value in graph.inputs if value.dtype == ir.DataType.FLOAT), *made]
        for value in constants:
            self._turn_constant(value)
        for value in values:
            low = value.producer() is not None and value.producer() not in self._wide
            value.type = ir.TensorType(self._kind if low else ir.DataType.FLOAT)  # a new one: clones share theirs
            for node, index in list(value.uses()):
                if self._takes(node, index) != value.dtype:
                    node.replace_input_with(index, self._as_other(value))
        for node in nodes:
            if node.op_type == "Cast" and node.outputs[0].dtype == self._kind:
                node.attributes["to"] = ir.AttrInt64("to", int(self._kind))
        for place, value in enumerate(graph.outputs):
            if value.dtype == self._kind:
                self._end(place, value)

    def _takes(self, node: ir.Node, index: int) -> ir.DataType:
        wide = node in self._wide or (node.op_type, index) in FLOAT_INPUTS
        return ir.DataType.FLOAT if wide else self._kind

    def _as_other(self, value: ir.Value) -> ir.Value:
        """The value behind a Cast to the other one of the two types."""
        if value not in self._cast:
            to = ir.DataType.FLOAT if value.dtype == self._kind else self._kind
            name = f"{value.name}/{'fp32' if to == ir.DataType.FLOAT else self._name}"
            self._cast[value] = cast(self._model, value, to, name)
        return self._cast[value]

    def _end(self, place: int, value: ir.Value) -> None:
        """The graph's output keeps name and type."""
        name = value.name
        value.name = f"{name}/{self._name}"
        output = cast(self._model, value, ir.DataType.FLOAT, str(name))
        self._model.graph.outputs[place] = output

    def _turn_constant(self, value: ir.Value) -> None:
        uses = [(node, index) for node, index in value.uses() if self._takes(node, index) == self._kind]
        if not uses:
            return
        tensor = self._lowered(value, [node for node, _ in uses])
        if len(uses) == len(list(value.uses())):
            value.const_value, value.type = ir.tensor(tensor, name=value.name), ir.TensorType(self._kind)
            return
        fresh = add_constant(self._model, f"{value.name}/{self._name}", tensor)
        for node, index in uses:
            node.replace_input_with(index, fresh)

    def _lowered(self, value: ir.Value, readers: list[ir.Node]) -> np.ndarray:
        """A constant in the low type."""
        array = value.const_value.numpy()  # type: ignore[union-attr]
        with np.errstate(over="ignore"):
            low: np.ndarray = array.astype(self._kind.numpy())
        lost = np.isinf(low.astype(np.float32)) & np.isfinite(array)
        for coder in readers:
            self._check_steps(coder, array, low.astype(np.float32))
        if not lost.any():
            return low
        reader = next((node for node in readers if node.op_type not in BOUNDS), None)
        if reader is not None:
            largest = float(np.abs(array[lost]).max())
            raise GraphError(
                f"'{value.name}' of {reader.op_type} '{reader.name}' holds {largest:.3g}, beyond {self._name}. Choose bf16 or fp32."
            )
        end = _largest(self._kind)
        return np.where(lost, np.sign(array) * end, array).astype(self._kind.numpy())

    def _check_steps(self, node: ir.Node, steps: np.ndarray, low: np.ndarray) -> None:
        """What integers stand for must stay; where QuantizeLinear alone has steps of its own, they may move by a rounding."""
        exact = np.array_equal(low, steps) or (node.op_type == "QuantizeLinear" and bool((low > 0).all()))
        if node.op_type in QDQ and not exact:
            raise GraphError(
                f"a step of {node.op_type} '{node.name}' is no number of {self._name}. Quantize the FP32 file with "
                f"--high-precision-dtype {self._name}, which makes steps that are."
            )


def _largest(kind: ir.DataType) -> np.float32:
    """The largest number of a type: all ones below the highest exponent."""
    bits = np.uint16(0x7BFF if kind == ir.DataType.FLOAT16 else 0x7F7F)
    return np.float32(np.array([bits]).view(kind.numpy()).astype(np.float32)[0])


def cast(model: ir.Model, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    """`value` as another type, out of a new Cast behind it whose name, and whose output's, is given."""
    node = ir.node("Cast", [value], {"to": int(to)}, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(to)
    insert_behind(model, value, [node])
    return output


def _check(node: ir.Node, kind: ir.DataType, wide: Collection[ir.Node], opset: int) -> None:
    """Refuse a node that reads or gives another type than it was given.

    Raises:
        GraphError: ONNX has its operator in float32 only, or an attribute of it says float32.
    """
    schema = onnx.defs.get_schema(node.op_type, opset)
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if value is not None and value.dtype == kind and TENSOR[kind] not in formal.types:
            raise GraphError(
                f"ONNX opset {opset} has no {kind.name} for input {index} of {node.op_type} '{node.name}'. Stay with fp32."
            )
    floats = [value for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    if floats and node not in wide and node.op_type != "Cast":
        raise GraphError(f"{node.op_type} '{node.name}' gives float32, {kind.name} is wanted. Stay with fp32.")
