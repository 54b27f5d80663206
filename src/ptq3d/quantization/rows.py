"""The rows that a layer multiplies with its weights (a patch for a convolution), sampled, and their moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ptq3d.graphs.constants import constant_of
from ptq3d.graphs.layers import groups, shape_of, weight_axis, weight_value

ROWS = 4096  # in all, for the moments
KEPT = 512  # of them, as they are: at most, and fewer where they are wide
KEPT_VALUES = 1 << 21  # of a layer, about
WHOLE = 1024  # columns of a layer up to which all correlations are kept
BLOCK = 512  # beyond, the columns whose correlations are kept together; a whole Gram matrix of 512 channels would take 1.5 GB
Matrix = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
Draw = Callable[[Sequence[int], int], Positions]  # (sizes, number) -> (axes, number)


@dataclass
class Gram:
    """Mean and blockwise second moments of the rows that a layer multiplies, and some of these rows.

    Args:
        node: a Conv without groups, ConvTranspose, Gemm or MatMul with constant weights.
        rows: how many a window gives.
        kept: how many are kept, of all windows together.
        blocks: of columns.
        moments: one (width, width) float32 a block, sums of x x^T as they were seen.
        total: (columns,) float64, the sum of the rows as they were seen.
        factors: (columns,) float32, what the rows are multiplied by since; the methods know of it, the sums above do not, since a
            scaled copy of them would take as much memory again.
        number: rows seen.
        sample: the kept rows of each window as they were seen, (n, columns) float32.
        windows: how many will be seen.
    """

    node: ir.Node
    rows: int
    kept: int
    blocks: list[slice]
    moments: list[Floats]
    total: Matrix
    factors: Floats
    number: int = 0
    sample: list[Floats] = field(default_factory=list)
    windows: int = 1

    @classmethod
    def empty(cls, node: ir.Node, windows: int) -> Gram:
        """Of no window yet.

        Args:
            node: the layer.
            windows: how many will be seen; `ROWS` rows are spread over them.
        """
        width = matrix_of(node, constant_of(node.inputs[1])).shape[1]
        size = width if width <= WHOLE else BLOCK
        blocks = [slice(start, min(start + size, width)) for start in range(0, width, size)]
        moments = [np.zeros((block.stop - block.start,) * 2, np.float32) for block in blocks]
        kept = min(KEPT, max(KEPT_VALUES // width, 64))
        each = max(64, -(-ROWS // max(windows, 1)))
        return cls(
            node, each, kept, blocks, moments, np.zeros(width), np.ones(width, np.float32), windows=max(windows, 1)
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that, one behind the other along the channels, are the layer's input."""
        return tuple(pieces(self.node.inputs[0])) if self.node.op_type == "Conv" else tuple(_whole(self.node.inputs[0]))

    def see(self, values: Sequence[Floats], draw: Draw) -> None:
        """Take in the layer's FP32 input of one window, as its `sources`."""
        rows = _rows(self.node, values, self.rows, draw)
        self.number += len(rows)
        self.total += rows.sum(0, dtype=np.float64)
        kept = sum(len(some) for some in self.sample)
        if kept < self.kept:
            each = max(8, -(-self.kept // self.windows))
            self.sample.append(rows[:: max(1, len(rows) // each)][: self.kept - kept].copy())
        for block, moment in zip(self.blocks, self.moments, strict=True):
            moment += rows[:, block].T @ rows[:, block]

    def mean(self) -> Matrix:
        """(columns,) the mean row."""
        mean: Matrix = self.total / max(self.number, 1) * self.factors
        return mean

    def correlations(self) -> Iterator[tuple[slice, Floats]]:
        """(columns of a block, the mean of x x^T for them)."""
        for block, moment in zip(self.blocks, self.moments, strict=True):
            factors = self.factors[block] / np.float32(max(self.number, 1)) ** np.float32(0.5)
            yield block, moment * factors[:, None] * factors

    def some_rows(self) -> Floats:
        """(n, columns) float32."""
        rows: Floats = np.concatenate(self.sample) * self.factors
        return rows

    def scaled(self, factors: Floats) -> Gram:
        """Of the layer whose input channels are multiplied by `factors` (C,)."""
        columns = np.repeat(factors, len(self.total) // len(factors))
        return replace(self, factors=self.factors * columns)


def _whole(value: ir.Value | None) -> Iterable[str]:
    if value is not None:
        yield str(value.name)


def pieces(value: ir.Value | None) -> Iterable[str]:
    """The tensors that `value` is a concatenation of, along its channels; itself where it is none."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Concat" and producer.attributes["axis"].as_int() == 1:
        for piece in producer.inputs:
            yield from pieces(piece)
    else:
        yield from _whole(value)


def has_rows(node: ir.Node) -> bool:
    """Whether `node` is such a layer; the weights of others are rounded to the nearest."""
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


def weights_of(node: ir.Node, matrix: Floats, shape: tuple[int, ...]) -> Floats:
    """The inverse of `matrix_of`."""
    if node.op_type == "ConvTranspose":
        return np.moveaxis(matrix.reshape(*shape[1:], shape[0]), -1, 0)
    axis = weight_axis(node)
    return np.moveaxis(matrix.reshape(shape[axis], *(size for i, size in enumerate(shape) if i != axis)), 0, axis)


def _rows(node: ir.Node, parts: Sequence[Floats], number: int, draw: Draw) -> Floats:
    if node.op_type == "Conv":
        places = _drawn(shape_of(node.outputs[0])[2:], number, draw)
        return np.concatenate([_patches(node, piece, places) for piece in parts], 1)
    values = parts[0]
    if node.op_type == "ConvTranspose":
        sizes = values.shape[2:]
        flat = np.ravel_multi_index(tuple(_drawn(sizes, number, draw)), sizes)
        return np.ascontiguousarray(values[0].reshape(values.shape[1], -1)[:, flat].T)
    rows: Floats = values.reshape(-1, values.shape[-1])
    spread: Floats = rows[np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(int)]
    return spread


def _drawn(sizes: Sequence[int], number: int, draw: Draw) -> Positions:
    """(axes, n) `number` drawn positions of a grid, or each of its positions once where they are no more."""
    if math.prod(sizes) <= number:
        return np.indices(sizes).reshape(len(sizes), -1)
    return draw(sizes, number)


def _patches(node: ir.Node, values: Floats, places: Positions) -> Floats:
    """(number, C * taps) what the convolution multiplies at those positions of its output, zeros outside."""
    image = values[0].reshape(values.shape[1], -1)
    sizes, output, number = values.shape[2:], shape_of(node.outputs[0])[2:], places.shape[1]
    kernel = shape_of(node.inputs[1])[2:]
    stride, dilation = _ints(node, "strides", len(sizes)), _ints(node, "dilations", len(sizes))
    begin = _begin_pads(node, sizes, output, kernel)
    flat = np.zeros((number, 1), np.int64)
    inside = np.ones((number, 1), bool)
    for axis, size in enumerate(sizes):
        position = places[axis][:, None] * stride[axis] - begin[axis] + np.arange(kernel[axis]) * dilation[axis]
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
