"""An ONNX file as a small graph with static shapes; read with the `onnx` package alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from ptq3d.engines.triton.steps import Scale
from ptq3d.errors import EngineError, GraphError, line_of

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
# operators that move integers, or take the largest
INTEGER_MOVES = frozenset(
    {
        "Concat",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
SMALL = 1024  # values: constants up to this many may be shapes


@dataclass(frozen=True, eq=False)
class Node:
    """One operator.

    Args:
        op: of ONNX.
        name: its own; made of the operator and its place where the file has none.
        inputs: names of tensors, "" where one is left out.
        outputs: names of tensors.
        attributes: plain values; tensors are arrays.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def out(self) -> str:
        """Its first output."""
        return self.outputs[0]

    def input(self, place: int) -> str:
        """The name of an input, "" where it is left out."""
        return self.inputs[place] if place < len(self.inputs) else ""


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant behind DequantizeLinear.

    Args:
        q: integers, as stored.
        step: () or (K,) float32.
        zero_point: () or (K,), of the type of `q`.
        axis: of a (K,) step.
    """

    q: Array
    step: npt.NDArray[np.float32]
    zero_point: Array
    axis: int

    def real(self) -> npt.NDArray[np.float32]:
        """(q - zero_point) * step."""
        shape = [1] * self.q.ndim
        if self.step.size > 1:
            shape[self.axis] = -1
        shape = shape if self.step.size > 1 else []
        centred = self.q.astype(np.int32) - self.zero_point.astype(np.int32).reshape(shape)
        real: npt.NDArray[np.float32] = centred.astype(np.float32) * self.step.reshape(shape)
        return real


@dataclass(frozen=True, eq=False)
class Network:
    """A graph of one input and one output.

    Args:
        nodes: in an order in which they can be computed.
        constants: arrays by name.
        weights: quantized constants by the name of their dequantized tensor.
        shapes: of every tensor, with the batch in place.
        input: name of the windows, (N, C, X, Y, Z) float32.
        output: name of the answers.
        batch: N.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    weights: Mapping[str, Weight]
    shapes: Mapping[str, Shape]
    input: str
    output: str
    batch: int

    @cached_property
    def _readers(self) -> Mapping[str, tuple[Node, ...]]:
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def _producers(self) -> Mapping[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs}

    def readers(self, name: str) -> tuple[Node, ...]:
        """The nodes that read a tensor, one twice where it reads it twice."""
        return self._readers.get(name, ())

    def sole_reader(self, name: str) -> Node | None:
        """The node that alone reads a tensor; None where there are several, or it is the answer."""
        nodes = self.readers(name)
        return nodes[0] if len(nodes) == 1 and name != self.output else None

    def producer(self, name: str) -> Node | None:
        """The node that makes a tensor; None of constants and of the input."""
        return self._producers.get(name)

    def constant(self, name: str) -> Array | None:
        """The real values of a constant; None of anything else."""
        if name in self.weights:
            return self.weights[name].real()
        return self.constants.get(name)

    def scale_of(self, node: Node) -> Scale:
        """What the int8 of a QuantizeLinear or DequantizeLinear of activations stands for; uint8 is stored smaller by 128.

        Raises:
            EngineError: it is not int8 or uint8 with one step and one zero-point.
        """
        step, zero = self.constants.get(node.input(1)), self._zero_of(node)
        if step is None or step.size != 1 or zero is None or zero.size != 1 or zero.dtype not in (np.int8, np.uint8):
            kind = "a zero-point that is computed" if zero is None else f"{zero.dtype}, {zero.size} zero-points"
            steps = "computed" if step is None else step.size
            raise EngineError(
                f"{node.op} '{node.name}' is not int8 or uint8 with one step and one zero-point ({kind}, steps: {steps}), which "
                "is all that the triton engine multiplies. Quantize the network with --target triton, or this file anew with "
                "ptq3d quantize --retarget triton."
            )
        return Scale(float(step.reshape(-1)[0]), int(zero.reshape(-1)[0]) - (128 if zero.dtype == np.uint8 else 0))

    def unsigned(self, name: str) -> bool:
        """Whether a tensor of integers is uint8 in the file."""
        node = self.quantizing(name)
        zero = None if node is None else self._zero_of(node)
        return zero is not None and zero.dtype == np.uint8

    def quantizing(self, name: str) -> Node | None:
        """The QuantizeLinear that a tensor of integers comes from, straight or moved; None of other tensors."""
        node = self.producer(name)
        while node is not None and node.op not in ("QuantizeLinear", "DequantizeLinear"):
            node = self.producer(node.inputs[0]) if node.op in INTEGER_MOVES else None
        return node if node is not None and node.op == "QuantizeLinear" else None

    def _zero_of(self, node: Node) -> Array | None:
        """The zero-point of a QuantizeLinear or DequantizeLinear, None where it is computed; 0 of its type where it is left out."""
        if node.input(2):
            return self.constants.get(node.input(2))
        if node.op == "DequantizeLinear":
            source = self.quantizing(node.inputs[0])
            return None if source is None else np.zeros((), "uint8" if self.unsigned(node.inputs[0]) else "int8")
        dtype = node.attributes.get("output_dtype", 0) or TensorProto.UINT8
        return np.zeros((), helper.tensor_dtype_to_np_dtype(dtype))


def read_network(source: Path | onnx.ModelProto, batch: int) -> Network:
    """The graph of a file or a model.

    Args:
        source: its first axis is free, or fixed.
        batch: windows at a time; puts a number in place of a free first axis.

    Raises:
        EngineError: the batch is fixed to another number.
        GraphError: the file cannot be read, has several inputs or outputs, or a shape that cannot be inferred.
    """
    model = onnx.load(source) if isinstance(source, Path) else source
    graph = model.graph
    stored = {tensor.name: _array(tensor) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise GraphError(
            f"the graph has {len(inputs)} inputs and {len(graph.output)} outputs; the triton engine wants one of each."
        )
    _require_batch(inputs[0], batch)
    nodes = tuple(_node(proto, place) for place, proto in enumerate(graph.node))
    stored.update({node.out: _constant(node) for node in nodes if node.op == "Constant"})
    shapes = _shapes(model, batch) | {name: array.shape for name, array in stored.items()}
    left = tuple(node for node in nodes if node.op != "Constant")
    missing = [node for node in left if any(name and name not in shapes for name in node.outputs)]
    if missing:
        raise GraphError(
            f"the shape of {missing[0].op} '{missing[0].name}' cannot be inferred: simplify the graph with a fixed window."
        )
    return Network(left, stored, {}, shapes, inputs[0].name, graph.output[0].name, batch)


def _require_batch(value: onnx.ValueInfoProto, batch: int) -> None:
    dims = value.type.tensor_type.shape.dim
    fixed = dims[0].dim_value if dims and dims[0].HasField("dim_value") else 0
    if fixed and fixed != batch:
        raise EngineError(
            f"the graph takes {fixed} window{'s' if fixed > 1 else ''} at a time, and {batch} were asked for: use --batch "
            f"{fixed}, or give a graph whose first axis is free."
        )


def _array(tensor: onnx.TensorProto) -> Array:
    """Its values, writable; BF16, which NumPy and the kernels do not have, as float32."""
    values = np.array(numpy_helper.to_array(tensor))
    return values.astype(np.float32) if tensor.data_type == onnx.TensorProto.BFLOAT16 else values


def _node(proto: onnx.NodeProto, place: int) -> Node:
    attributes = {one.name: _plain(helper.get_attribute_value(one)) for one in proto.attribute}
    name = proto.name or f"{proto.op_type}_{place}"
    return Node(proto.op_type, name, tuple(proto.input), tuple(proto.output), attributes)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return _array(value)
    return value if isinstance(value, (int, float, str)) else tuple(value)


def _constant(node: Node) -> Array:
    if "value" in node.attributes:
        return np.asarray(node.attributes["value"])
    ((kind, value),) = node.attributes.items()
    return np.asarray(value, np.float32 if "float" in kind else np.int64)


def _shapes(model: onnx.ModelProto, batch: int) -> dict[str, Shape]:
    """Shapes of all tensors; large constants are left out of what is inferred with, so that no file is too large."""
    slim = onnx.ModelProto()
    slim.ir_version = model.ir_version
    slim.opset_import.extend(model.opset_import)
    slim.functions.extend(model.functions)
    graph = slim.graph
    graph.name = "shapes"
    graph.node.extend(model.graph.node)
    graph.input.extend(value for value in model.graph.input)
    given = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    graph.output.extend(helper.make_empty_tensor_value_info(value.name) for value in model.graph.output)
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = batch
    try:
        inferred = shape_inference.infer_shapes(slim, strict_mode=False, data_prop=True).graph
    except shape_inference.InferenceError as error:
        raise GraphError(f"the graph is invalid: {line_of(error)}") from error
    known = [*model.graph.value_info, *model.graph.output]  # what the file says where nothing is inferred
    found = {value.name: _shape(value, batch) for value in known}
    found.update(
        {
            value.name: _shape(value, 0)
            for value in [*inferred.input, *inferred.value_info, *inferred.output]
            if _shape(value, 0) is not None
        }
    )
    return {name: shape for name, shape in found.items() if shape is not None}


def _shape(value: onnx.ValueInfoProto, batch: int) -> Shape | None:
    """The shape a file tells; a free axis is the batch, or unknown where that is 0."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    if not batch and any(not dim.HasField("dim_value") for dim in dims):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else batch for dim in dims)
