"""ONNX files in and out, checked, with errors that say how to mend them."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from ptq3d.errors import FileError, GraphError

OLDEST_OPSET = 13  # QuantizeLinear and DequantizeLinear take an axis from here on
EXTERNAL_DATA_BYTES = 1_900_000_000  # a protobuf message ends at 2 GiB


def load_graph(path: Path) -> ir.Model:
    """The ONNX graph in `path`, with every weight in memory.

    Args:
        path: an `.onnx` file; external data beside it is read too.

    Returns:
        A model with one image input, at least one output, and an opset of at least 13.

    Raises:
        FileError: the file is missing, empty or not an ONNX protobuf.
        GraphError: the graph is invalid or too old.
    """
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FileError(f"{path}: no such ONNX file. Export one with `ptq3d export`, or name an existing file.")
    try:
        onnx.checker.check_model(path, full_check=True)
        model = ir.load(path)
        ir.external_data.load_to_model(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise GraphError(f"{path}: not a valid ONNX graph ({reason}). Export it again.") from error
    except (DecodeError, ValueError, OSError, KeyError) as error:
        raise FileError(
            f"{path}: not a readable ONNX file ({error}). It may be truncated; export or copy it again."
        ) from error
    _check(model, path)
    return model


def _check(model: ir.Model, path: Path) -> None:
    if not model.graph.inputs or not model.graph.outputs or not list(model.graph):
        raise GraphError(f"{path}: the graph has no input, no output or no node. Is it an ONNX network at all?")
    opset = model.opset_imports.get("")
    if opset is None or opset < OLDEST_OPSET:
        raise GraphError(
            f"{path}: opset {opset} is older than {OLDEST_OPSET}, the first with per-channel quantization. "
            "Convert it with onnx.version_converter or export it again."
        )


def save_graph(model: ir.Model, path: Path) -> None:
    """Write `model` beside `path` and rename it there, so that a killed run leaves no half file.

    Weights go into `<name>.data` beside the file when they would not fit into one protobuf.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        if size > EXTERNAL_DATA_BYTES:
            ir.save(model, temporary, external_data=f"{path.name}.data")
        else:
            ir.save(model, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def image_input(model: ir.Model) -> ir.Value:
    """The one input that is not a weight: (N, C, X, Y, Z).

    Raises:
        GraphError: there are several inputs, or the input is not 5D.
    """
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    if len(inputs) != 1:
        names = ", ".join(str(value.name) for value in inputs)
        raise GraphError(
            f"one image input is wanted, the graph has {len(inputs)} ({names}). Fold the others into constants."
        )
    shape = inputs[0].shape
    if shape is None or len(shape) != 5:
        raise GraphError(
            f"input '{inputs[0].name}' must be 5D (batch, channels, X, Y, Z), it is {shape}. ptq3d deploys 3D networks only."
        )
    return inputs[0]


def static_input_shape(model: ir.Model) -> tuple[int, int, int, int, int]:
    """(N, C, X, Y, Z) of the image input; a free batch counts as 1.

    Raises:
        GraphError: a channel or spatial dimension is not a number.
    """
    value = image_input(model)
    shape = value.shape
    if shape is None:
        raise GraphError(f"input '{value.name}' has no shape.")
    sizes = [dim if isinstance(dim, int) else 0 for dim in shape]
    if 0 in sizes[1:]:
        raise GraphError(
            f"input '{value.name}' has the shape {shape}: channels and window must be numbers. Fix them with --window X Y Z."
        )
    batch, channels, x, y, z = sizes
    return batch or 1, channels, x, y, z


def resize_window(model: ir.Model, window: tuple[int, int, int]) -> None:
    """Give the image input another window, in place; only right for fully convolutional networks.

    Args:
        model: its intermediate shapes are forgotten and must be inferred anew.
        window: (X, Y, Z) in voxels.

    Raises:
        GraphError: a side of the window below 1, or an input without shape.
    """
    if min(window) < 1:
        raise GraphError(
            f"a window of {' x '.join(map(str, window))} voxels has nothing in it; every side must be 1 or more."
        )
    value = image_input(model)
    shape = value.shape
    if shape is None:
        raise GraphError(f"input '{value.name}' has no shape.")
    value.shape = ir.Shape([shape[0], shape[1], *window])
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
