"""Convolve and Upsample steps as launches of the kernels, for one of several tilings."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ptq3d.engines.triton.arithmetic import kind_of, one_remainder
from ptq3d.engines.triton.convolution_kernels import convolve, convolve_lines
from ptq3d.engines.triton.place import SLOTS, Launch, Place
from ptq3d.engines.triton.rows import power_of_two
from ptq3d.engines.triton.steps import LARGEST_KERNEL, Convolve, Epilogue, Triple, Upsample, View
from ptq3d.errors import EngineError

Integers = npt.NDArray[np.int8]
LARGEST_INT32 = (1 << 31) - 1
PAD_BYTES = 1 << 18  # of zeros that stand beyond the border


@dataclass(frozen=True)
class Tile:
    """How a convolution is cut into pieces.

    Args:
        mode: "tap", "line" or "all"; see the kernel.
        group: P, output voxels along z in one row of the product.
        lines: output lines along y in one program; 1 for the kernel that takes any convolution.
        rows, columns: of the product in one program; powers of two.
        run: bytes of the sum at a time.
        stages: of the pipeline that loads them.
        warps: in one program.
    """

    mode: str
    group: int
    lines: int
    rows: int
    columns: int
    run: int
    stages: int
    warps: int


@dataclass(frozen=True)
class Product:
    """A step as a matrix product, whatever it was.

    Args:
        size: of the input, in voxels.
        rows: of the product, in voxels; the output's size for a convolution.
        channels: C of the input, K of the output.
        kernel, strides, dilations, pads: of a convolution; 1 for a ConvTranspose.
        factor: of a ConvTranspose; 1 for a convolution.
    """

    size: Triple
    rows: Triple
    channels: tuple[int, int]
    kernel: Triple
    strides: Triple
    dilations: Triple
    pads: Triple
    factor: Triple

    @property
    def copies(self) -> int:
        """Output voxels of one row, for a group of one."""
        return math.prod(self.factor)

    @property
    def dense(self) -> bool:
        """Whether strides and dilations are 1, and nothing is upsampled."""
        return self.strides == self.dilations == self.factor == (1, 1, 1)


def product_of(step: Convolve | Upsample) -> Product:
    """What a step multiplies.

    Raises:
        EngineError: groups, or a kernel of more than 31 offsets along an axis.
    """
    one = (1, 1, 1)
    size = _triple(step.x.shape[2:])
    if isinstance(step, Upsample):
        channels, outputs = step.weight.shape[:2]
        return Product(size, size, (channels, outputs), one, one, one, (0, 0, 0), _triple(step.weight.shape[2:]))
    if step.groups != 1:
        raise EngineError(f"'{step.name}' is a convolution of {step.groups} groups, which has no INT8 kernel.")
    outputs, channels = step.weight.shape[:2]
    kernel = _triple(step.weight.shape[2:])
    if max(kernel) > LARGEST_KERNEL:
        raise EngineError(f"'{step.name}' has a kernel of {kernel}; the INT8 kernels take {LARGEST_KERNEL} at most.")
    rows = _triple(step.out.shape[2:])
    return Product(size, rows, (channels, outputs), kernel, step.strides, step.dilations, _triple(step.pads[:3]), one)


def _triple(values: Sequence[int]) -> Triple:
    x, y, z = values
    return x, y, z


def columns_of(product: Product, tile: Tile) -> tuple[int, int]:
    """(columns of one copy of the output channels, all columns in whole tiles)."""
    copies = tile.group * product.copies
    outputs = product.channels[1]
    padded = outputs if copies == 1 else power_of_two(outputs)
    return padded, -(-copies * padded // tile.columns) * tile.columns


def span_of(product: Product, tile: Tile) -> int:
    """Input voxels along z that a row of the product reads in one run, or kernel offsets where runs are of one offset."""
    if tile.mode == "tap":
        return product.kernel[2]
    return (tile.group - 1) * product.strides[2] + (product.kernel[2] - 1) * product.dilations[2] + 1


def run_of(product: Product, tile: Tile) -> int:
    """The bytes of a run, in whole steps of the tile."""
    span = 1 if tile.mode == "tap" else span_of(product, tile)
    offsets = product.kernel[0] * product.kernel[1] if tile.mode == "all" else 1
    return -(-offsets * span * product.channels[0] // tile.run) * tile.run


def packed(weight: Integers, product: Product, tile: Tile) -> Integers:
    """Weights in the order in which the kernels read them.

    Args:
        weight: (K, C, kx, ky, kz) of a convolution; (C, K, kx, ky, kz) of a ConvTranspose.

    Returns:
        (runs, columns, tile.run) int8; for several lines a run is followed by those of the other offsets along y.
    """
    matrix = _rows_of_runs(_as_convolution(weight, product), product, tile)
    kx, ky = (product.kernel[0], product.kernel[1]) if tile.mode != "all" else (1, 1)
    kz = product.kernel[2] if tile.mode == "tap" else 1
    pieces = matrix.reshape(matrix.shape[0], kx, ky, kz, -1, tile.run)
    order = (1, 3, 4, 2, 0, 5) if tile.lines > 1 else (1, 2, 3, 4, 0, 5)
    return np.ascontiguousarray(pieces.transpose(order)).reshape(-1, matrix.shape[0], tile.run)


def _as_convolution(weight: Integers, product: Product) -> Integers:
    """(copies, K, C, kx, ky, kz)."""
    if product.copies == 1:
        return weight[None]
    channels, outputs = weight.shape[:2]
    return weight.transpose(2, 3, 4, 1, 0).reshape(product.copies, outputs, channels, 1, 1, 1)


def _rows_of_runs(weight: Integers, product: Product, tile: Tile) -> Integers:
    """(columns, everything that a row of the product sums), with zeros where a row reads what an output does not."""
    copies, outputs, channels, kx, ky, kz = weight.shape
    padded, columns = columns_of(product, tile)
    span = span_of(product, tile)
    whole = np.zeros((copies * tile.group, padded, kx, ky, span, channels), np.int8)
    for place in range(tile.group):
        for offset in range(kz):
            at = offset if tile.mode == "tap" else place * product.strides[2] + offset * product.dilations[2]
            whole[place * copies : (place + 1) * copies, :outputs, :, :, at] = weight[..., offset].transpose(
                0, 1, 3, 4, 2
            )
    leading = {"tap": (kx, ky, span), "line": (kx, ky), "all": ()}[tile.mode]
    runs = whole.reshape(copies * tile.group * padded, *leading, -1)
    filled = np.zeros((columns, *leading, run_of(product, tile)), np.int8)
    filled[: len(runs), ..., : runs.shape[-1]] = runs
    return filled


def packed_bytes(product: Product, tile: Tile) -> int:
    """The length of `packed`."""
    offsets = (
        1
        if tile.mode == "all"
        else product.kernel[0] * product.kernel[1] * (product.kernel[2] if tile.mode == "tap" else 1)
    )
    return columns_of(product, tile)[1] * offsets * run_of(product, tile)


def has_bits(product: Product, tile: Tile) -> bool:
    """Whether a bit of an int32 is there for each offset along an axis that a program asks for."""
    return max(product.kernel[0], product.kernel[1] + tile.lines - 1, span_of(product, tile)) <= LARGEST_KERNEL


def fits(product: Product, tile: Tile) -> bool:
    """Whether a tiling can compute a step, and wastes little of it."""
    channels = product.channels[0]
    if not has_bits(product, tile) or (tile.mode != "tap" and product.dilations[2] > 1):
        return False
    if tile.lines > 1 and not (product.dense and product.kernel[1] > 1 and tile.mode != "all"):
        return False
    if tile.group > 1 and (product.copies > 1 or tile.mode == "tap" or product.kernel[2] == 1):
        return False
    if tile.mode == "line" and channels % 16:
        return False
    useful = (
        channels
        * {"tap": 1, "line": span_of(product, tile), "all": math.prod(product.kernel[:2]) * span_of(product, tile)}[
            tile.mode
        ]
    )
    return run_of(product, tile) <= max(1.4 * useful, 32) or (tile.mode == "tap" and channels < 32)


def scalars(epilogue: Epilogue, out: View) -> tuple[float, ...]:
    """(rounded step, other step, out step, low, high, last low, last high) of the kernels' epilogue."""
    other = 1.0 if epilogue.other is None else epilogue.other.step
    first, last = epilogue.activation, epilogue.last
    return epilogue.rounded or 1.0, other, out.step, first.low, first.high, last.low, last.high


def zeros(epilogue: Epilogue, out: View) -> tuple[int, int, int]:
    """What stands for 0: (where it is rounded, in the other tensor, in the output)."""
    return epilogue.rounded_zero, 0 if epilogue.other is None else epilogue.other.zero, out.zero


def flags(epilogue: Epilogue, out: View, *, biased: bool, summed: bool) -> tuple[bool | int, ...]:
    """What the kernels are compiled for: biased, kind, rounds, adds, last, integers, summed."""
    return (
        biased,
        kind_of(epilogue.activation),
        epilogue.rounded is not None,
        epilogue.other is not None,
        kind_of(epilogue.last),
        out.dtype == "int8",
        summed,
    )


def _pitch(view: View, step: Convolve | Upsample) -> int:
    if view.pitch is None:
        raise EngineError(f"'{step.name}': a tensor has no even rows; this is a mistake of the lowering.")
    return view.pitch


def constants(step: Convolve | Upsample, product: Product, tile: Tile) -> tuple[Any, ...]:
    """The compile-time arguments of the kernel, without the epilogue's."""
    other = step.epilogue.other or step.out
    pitches = [_pitch(view, step) for view in (step.x, step.out, other)]
    samples = [view.strides[0] for view in (step.x, step.out, other)]
    padded, _ = columns_of(product, tile)
    shape = (*product.size, *product.rows, *pitches, *samples, *product.channels, *product.kernel)
    kind = (tile.group, padded, span_of(product, tile), run_of(product, tile), tile.mode)
    block = (tile.rows, tile.columns, tile.run, tile.stages)
    if tile.lines > 1:
        return (*shape, *product.pads, *kind, tile.lines, *block)
    return (*shape, *product.strides, *product.dilations, *product.pads, *product.factor, *kind, *block)


def _once(step: Convolve | Upsample) -> bool:
    rounded = step.epilogue.rounded
    return one_remainder(step.out.step) and (rounded is None or one_remainder(rounded))


def even(product: Product, tile: Tile) -> bool:
    """Whether every program has all its rows and columns."""
    x, y, z = product.rows
    padded, columns = columns_of(product, tile)
    whole_rows = (
        y % tile.lines == 0 and z % tile.group == 0 and (x * y * z // (tile.lines * tile.group)) % tile.rows == 0
    )
    return whole_rows and padded == product.channels[1] and columns == tile.group * product.copies * padded


def wide(step: Convolve | Upsample, product: Product) -> bool:
    """Whether int32 cannot count the values of a sample of some tensor of a step."""
    views = [
        (step.x, product.size, 1),
        (step.out, product.rows, product.copies),
        (step.epilogue.other, product.rows, product.copies),
    ]
    return any(
        view is not None and math.prod(size) * _pitch(view, step) * by > LARGEST_INT32 for view, size, by in views
    )


def first_sums(step: Convolve | Upsample) -> npt.NDArray[np.int32]:
    """Minus the input's zero times the sum of the weights of each output channel, int32; of each kernel offset in a ConvTranspose."""
    if isinstance(step, Upsample):
        channels, outputs = step.weight.shape[:2]
        wholes = step.weight.reshape(channels, outputs, -1).sum(0, dtype=np.int64).T
    else:
        wholes = step.weight.reshape(len(step.weight), -1).sum(1, dtype=np.int64)
    return np.ascontiguousarray(-step.x.zero * wholes, np.int32).reshape(-1)


def grid_of(step: Convolve | Upsample, product: Product, tile: Tile) -> Triple:
    """Programs for (rows, columns, samples)."""
    x, y, z = product.rows
    rows = x * -(-y // tile.lines) * -(-z // tile.group)
    return -(-rows // tile.rows), columns_of(product, tile)[1] // tile.columns, step.x.shape[0]


def flattened(step: Convolve) -> Convolve:
    """A convolution with kernel and stride 1 on one long line, so that samples and lines need no tiles of their own."""
    if step.sums is not None or step.weight.shape[2:] != (1, 1, 1) or step.strides != (1, 1, 1) or any(step.pads):
        return step
    other = step.epilogue.other
    epilogue = replace(step.epilogue, other=None if other is None else _line(other))
    return replace(step, x=_line(step.x), out=_line(step.out), epilogue=epilogue)


def _line(view: View) -> View:
    pitch = view.pitch or view.channels
    shape = (1, view.channels, 1, 1, view.rows)
    total = view.rows * pitch
    return replace(view, shape=shape, strides=(total, 1, total, total, pitch))


def prepare_convolve(step: Convolve | Upsample, place: Place, tile: Tile) -> Launch:
    """The launch of a convolution.

    Raises:
        EngineError: a step that has no kernel.
    """
    weights = place.constant(packed(step.weight, product_of(step), tile))
    return launch_of(step, place, tile, weights, place.constant(first_sums(step)))


@functools.cache
def border(zero: int) -> Integers:
    """(PAD_BYTES,) int8 of an input's zero; the same array for the same zero."""
    return np.full(PAD_BYTES, zero, np.int8)


def launch_of(step: Convolve | Upsample, place: Place, tile: Tile, weights: Any, start: Any) -> Launch:
    """The launch of a convolution whose weights are packed.

    Args:
        step: its `weight` counts by its shape alone.
        place: where its tensors are.
        tile: how it is cut.
        weights: (runs, columns, tile.run) int8 on the device, as `packed` gives them.
        start: int32 on the device, as `first_sums` gives them.
    """
    step = flattened(step) if isinstance(step, Convolve) else step
    product = product_of(step)
    kernel: Any = convolve_lines if tile.lines > 1 else convolve
    out, multiplier = place.view(step.out), place.constant(step.multiplier)
    tensors = (
        place.view(step.x),
        weights,
        out,
        out if step.epilogue.other is None else place.view(step.epilogue.other),
        multiplier,
        multiplier if step.bias is None else place.constant(step.bias),
        multiplier if step.sums is None else place.sums(step.sums),
        place.constant(border(step.x.zero)) if step.x.zero else weights,
        start,
    )
    told = (
        *flags(step.epilogue, step.out, biased=step.bias is not None, summed=step.sums is not None),
        _once(step),
        even(product, tile),
        SLOTS,
        step.x.zero != 0,
        PAD_BYTES // (tile.rows * tile.run),
        wide(step, product),
    )
    values = (
        *tensors,
        *scalars(step.epilogue, step.out),
        *zeros(step.epilogue, step.out),
        *constants(step, product, tile),
        *told,
    )
    arguments = dict(zip(kernel.arg_names, values, strict=True))
    return Launch(kernel, grid_of(step, product, tile), arguments, tile.warps, tile.stages)


def simple_tile(product: Product) -> Tile:
    """A tiling that always works."""
    outputs = product.channels[1] * product.copies
    columns = min(max(power_of_two(outputs), 16), 64)
    tile = Tile("all", 1, 1, 64, columns, 32, 2, 4)
    if product.channels[0] < 16 and product.copies == 1 and has_bits(product, tile):
        return tile
    return replace(tile, mode="tap")
