"""Weights rounded so that the layer's OUTPUT errs least, not each weight.

A layer multiplies rows x of its input (a patch for a convolution) with weights W. Rounding W to Q changes its output by
(Q - W) x, whose mean square is the quadratic form of Q - W with the Gram matrix H = E[x x^T]. Columns are rounded one after
the other; the error of each is taken up by those not rounded yet (GPTQ). H comes from calibration windows: a fixed number of
rows in all, so memory does not grow with the windows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.graphs.constants import constant_of, set_constant
from ptq3d.graphs.layers import groups, shape_of, weight_axis, weight_value
from ptq3d.int8 import LIMITS, Scale
from ptq3d.quantization.planning import Plan

ROWS = 4096
BLOCK = 1024  # columns whose correlations are kept together; a whole Gram matrix of 512 channels would take 1.5 GB
STRIDE = 128  # columns between two updates of the rest
DAMPING = 0.01
Matrix = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


class Gram:
    """Mean and blockwise second moments of the rows that a layer multiplies.

    Args:
        node: a Conv without groups, ConvTranspose, Gemm or MatMul with constant weights.
        windows: how many windows will be seen; `ROWS` rows are spread over them.
        seed: of the positions that are looked at.
    """

    def __init__(self, node: ir.Node, windows: int, *, seed: int = 0) -> None:
        self.node = node
        self._rows = max(64, -(-ROWS // max(windows, 1)))
        self._generator = np.random.default_rng(seed)
        width = matrix_of(node, constant_of(node.inputs[1])).shape[1]
        self.blocks = [slice(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]
        self.moments = [np.zeros((block.stop - block.start,) * 2, np.float32) for block in self.blocks]
        self.sum = np.zeros(width, np.float64)
        self.number = 0

    def see(self, values: Floats) -> None:
        """Take in the layer's FP32 input of one window."""
        rows = _rows(self.node, values, self._rows, self._generator)
        self.number += len(rows)
        self.sum += rows.sum(0, dtype=np.float64)
        for block, moment in zip(self.blocks, self.moments, strict=True):
            moment += rows[:, block].T @ rows[:, block]

    def mean(self) -> Matrix:
        """(width,) the mean row."""
        mean: Matrix = self.sum / max(self.number, 1)
        return mean


def has_gram(node: ir.Node) -> bool:
    """Whether the weights of `node` can be rounded this way; the others are rounded to the nearest."""
    if weight_value(node) is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return False
    transposed = node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int() != 0
    return (
        groups(node) == 1
        and not transposed
        and (node.op_type in ("Conv", "ConvTranspose") or constant_of(node.inputs[1]).ndim == 2)
    )


def matrix_of(node: ir.Node, weight: Floats) -> Floats:
    """Weights as (rows of outputs, columns of inputs); a ConvTranspose has one row for each tap of its kernel."""
    if node.op_type == "ConvTranspose":
        return np.moveaxis(weight, 0, -1).reshape(-1, weight.shape[0])
    return np.moveaxis(weight, weight_axis(node), 0).reshape(weight.shape[weight_axis(node)], -1)


def _weights_of(node: ir.Node, matrix: Floats, shape: tuple[int, ...]) -> Floats:
    """The inverse of `matrix_of`."""
    if node.op_type == "ConvTranspose":
        return np.moveaxis(matrix.reshape(*shape[1:], shape[0]), -1, 0)
    axis = weight_axis(node)
    return np.moveaxis(matrix.reshape(shape[axis], *(size for i, size in enumerate(shape) if i != axis)), 0, axis)


def _rows(node: ir.Node, values: Floats, number: int, generator: np.random.Generator) -> Floats:
    if node.op_type == "Conv":
        return _patches(node, values, number, generator)
    flat = values[0].reshape(values.shape[1], -1).T if node.op_type == "ConvTranspose" else values
    flat = flat.reshape(-1, flat.shape[-1])
    return flat[generator.integers(0, len(flat), number)]


def _patches(node: ir.Node, values: Floats, number: int, generator: np.random.Generator) -> Floats:
    """(number, C * taps) what the convolution multiplies at random positions of its output, zeros outside."""
    image = values[0].reshape(values.shape[1], -1)
    sizes, output = values.shape[2:], shape_of(node.outputs[0])[2:]
    kernel = shape_of(node.inputs[1])[2:]
    stride, dilation = _ints(node, "strides", len(sizes)), _ints(node, "dilations", len(sizes))
    begin = _begin_pads(node, sizes, output, kernel)
    flat = np.zeros((number, 1), np.int64)
    inside = np.ones((number, 1), bool)
    for axis, size in enumerate(sizes):
        position = generator.integers(0, output[axis], (number, 1)) * stride[axis] - begin[axis]
        position = position + np.arange(kernel[axis]) * dilation[axis]
        inside = (inside[:, :, None] & ((position >= 0) & (position < size))[:, None]).reshape(number, -1)
        flat = (flat[:, :, None] * size + np.clip(position, 0, size - 1)[:, None]).reshape(number, -1)
    patches = np.take(image, flat, axis=1) * inside
    return np.ascontiguousarray(np.moveaxis(patches, 0, 1)).reshape(number, -1)


def _ints(node: ir.Node, name: str, rank: int) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else (1,) * rank


def _begin_pads(
    node: ir.Node, sizes: tuple[int, ...], output: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[int, ...]:
    """Zeros in front of each axis, from `pads` or `auto_pad` (ONNX Conv-11)."""
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if automatic in ("NOTSET", ""):
        return (
            tuple(node.attributes["pads"].as_ints())[: len(sizes)] if "pads" in node.attributes else (0,) * len(sizes)
        )
    stride, dilation = _ints(node, "strides", len(sizes)), _ints(node, "dilations", len(sizes))
    reach = [(kernel[i] - 1) * dilation[i] + 1 for i in range(len(sizes))]
    total = [max(0, (output[i] - 1) * stride[i] + reach[i] - sizes[i]) for i in range(len(sizes))]
    return tuple({"SAME_UPPER": pad // 2, "SAME_LOWER": pad - pad // 2}.get(automatic, 0) for pad in total)


def round_weights(model: ir.Model, plan: Plan, grams: Mapping[str, Gram], steps: Mapping[str, float]) -> None:
    """Put weights that lie on the plan's INT8 grid, and biases that undo the mean error, into the FP32 graph.

    Args:
        model: the graph that was planned; changed in place.
        plan: its weights' scales.
        grams: layer -> what was seen of its input; other layers are left alone.
        steps: layer -> step of its INT8 input: rounding noise of variance step^2 / 12 on every column.

    Source: Frantar et al. 2023 (GPTQ); Nagel et al. 2019, section 4.2 (bias correction).
    """
    for node in list(model.graph):
        name = str(node.name)
        weight = weight_value(node) if name in grams else None
        if weight is None or len(list(weight.uses())) != 1:
            continue
        exact = constant_of(weight)
        rounded = _rounded(node, exact, plan.weights[str(weight.name)], grams[name], steps[name] ** 2 / 12)
        _correct_bias(model, node, matrix_of(node, rounded - exact) @ grams[name].mean())
        set_constant(model, node, 1, rounded, suffix="rounded")


def _rounded(node: ir.Node, weight: Floats, scale: Scale, gram: Gram, noise: float) -> Floats:
    matrix = matrix_of(node, weight).astype(np.float64)
    steps = np.repeat(scale.step.astype(np.float64), len(matrix) // scale.step.size)
    levels = np.concatenate(
        [
            round_columns(matrix[:, block], moment / max(gram.number, 1), steps, noise=noise)
            for block, moment in zip(gram.blocks, gram.moments, strict=True)
        ],
        axis=1,
    )
    return _weights_of(node, (levels * steps[:, None]).astype(np.float32), weight.shape)


def round_columns(matrix: Matrix, moment: npt.NDArray[np.floating], steps: Matrix, *, noise: float = 0.0) -> Matrix:
    """Integers Q that make the mean square of (Q * steps - W) x small.

    Args:
        matrix: (K, n) float64, W.
        moment: (n, n) E[x x^T], positive semidefinite.
        steps: (K,) the step of each row.
        noise: variance that quantization adds to every x.

    Returns:
        (K, n) whole numbers, -127..127, as float64.

    Source: Frantar et al. 2023, algorithm 1, columns in descending order of E[x^2].
    """
    energy = np.diag(moment).astype(np.float64) + noise
    order = np.argsort(-energy, kind="stable")
    padded = moment[np.ix_(order, order)].astype(np.float64)
    padded[np.diag_indices_from(padded)] += noise + DAMPING * max(float(energy.mean()), 1e-30)
    upper = np.linalg.cholesky(np.linalg.inv(padded)).T
    lowest, highest = LIMITS["int8"]
    rest, levels = matrix[:, order], np.empty_like(matrix)
    for start in range(0, len(order), STRIDE):
        stop = min(start + STRIDE, len(order))
        errors = np.empty((len(matrix), stop - start))
        for column in range(start, stop):
            levels[:, column] = np.clip(np.rint(rest[:, column] / steps), lowest, highest)
            error = (rest[:, column] - levels[:, column] * steps) / upper[column, column]
            rest[:, column + 1 : stop] -= np.outer(error, upper[column, column + 1 : stop])
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    result = np.empty_like(levels)
    result[:, order] = levels
    return result


def _correct_bias(model: ir.Model, node: ir.Node, shift: Matrix) -> None:
    """Take the mean error (rows of `matrix_of`) off the bias; a product without bias input keeps its shift."""
    if node.op_type == "MatMul":
        return
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    channels = constant_of(node.inputs[1]).shape[weight_axis(node)]
    mean = shift.reshape(channels, -1).mean(1)
    if bias is not None and bias.const_value is None:
        return
    current = np.zeros(channels, np.float32) if bias is None or bias.const_value is None else bias.const_value.numpy()
    if current.shape == (channels,):
        set_constant(model, node, 2, (current - mean).astype(np.float32), suffix="corrected")
