"""Constants of a graph: read, added, replaced."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.errors import GraphError

LEAST_BYTES = 1 << 18  # a constant below a quarter of a MiB is small beside any network: nothing is done to shrink it


def constant_of(value: ir.Value | None) -> npt.NDArray[np.float32]:
    """The float32 array of a constant.

    Raises:
        GraphError: `value` is none.
    """
    if value is None or value.const_value is None:
        raise GraphError(f"'{None if value is None else value.name}' is no constant. Simplify the graph first.")
    return np.asarray(value.const_value.numpy(), np.float32)


def add_constant(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """A new initializer of that name."""
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def set_constant(model: ir.Model, node: ir.Node, index: int, array: npt.NDArray[np.float32], *, suffix: str) -> None:
    """Give one input of one node another constant; other readers of the old one keep it.

    Args:
        model: changed in place.
        node: it may end in front of input `index`.
        index: of the input.
        array: the new value.
        suffix: ends the name of the new constant, where a new one is needed.
    """
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and old.is_initializer() and len(list(old.uses())) == 1:
        old.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=old.name)
        return
    fresh = add_constant(model, f"{node.name}/{index}/{suffix}", array.astype(np.float32))
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, fresh)


def round_added_constants(model: ir.Model) -> int:
    """Round large float32 constants that are only added (position embeddings) to values that float16 holds, in place.

    A relative error of at most 2^-11, eight times below that of 8 bits; half the bytes where an engine stores float16.

    Returns:
        How many were rounded; one with a value beyond float16's range is left alone.
    """
    rounded = 0
    for value in model.graph.initializers.values():
        tensor, readers = value.const_value, [reader.op_type for reader, _ in value.uses()]
        if (
            tensor is None
            or tensor.dtype != ir.DataType.FLOAT
            or tensor.nbytes < LEAST_BYTES
            or set(readers) != {"Add"}
        ):
            continue
        array = tensor.numpy()
        if np.abs(array).max() < np.finfo(np.float16).max:
            value.const_value = ir.tensor(array.astype(np.float16).astype(np.float32), name=value.name)
            rounded += 1
    return rounded
