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
from ptq3d.engines.triton.steps import BYTES, LARGEST_KERNEL, Convolve, Epilogue, Triple, Upsample, View
from ptq3d.engines.triton.views import LANES, lanes
from ptq3d.errors import EngineError

Weights = npt.NDArray[Any]  # int8, or floats that are multiplied in FP16
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
        run: values of the sum at a time.
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
        channels: C of the input, K of the output, and spare ones whose weights are 0 where their rows have such.
        kernel, strides, dilations, pads: of a convolution; 1 for a ConvTranspose.
        factor: of a ConvTranspose; 1 for a convolution.
        width: bytes of a value.
    """

    size: Triple
    rows: Triple
    channels: tuple[int, int]
    kernel: Triple
    strides: Triple
    dilations: Triple
    pads: Triple
    factor: Triple
    width: int

    @property
    def copies(self) -> int:
        """Output voxels of one row, for a group of one."""
        return math.prod(self.factor)

    @property
    def unstrided(self) -> bool:
        """Whether neighbours of the output read neighbours of the input: strides are 1, and nothing is upsampled."""
        return self.strides == self.factor == (1, 1, 1)


def product_of(step: Convolve | Upsample) -> Product:
    """What a step multiplies.

    Raises:
        EngineError: groups, or a kernel of more than 31 offsets along an axis.
    """
    one = (1, 1, 1)
    size = _triple(step.x.shape[2:])
    if isinstance(step, Upsample):
        factor = _triple(step.weight.shape[2:])
        return Product(size, size, _channels(step), one, one, one, (0, 0, 0), factor, BYTES["int8"])
    if step.groups != 1:
        raise EngineError(f"'{step.name}' is a convolution of {step.groups} groups, which has no kernel.")
    kernel = _triple(step.weight.shape[2:])
    if max(kernel) > LARGEST_KERNEL:
        raise EngineError(f"'{step.name}' has a kernel of {kernel}; the kernels take {LARGEST_KERNEL} at most.")
    rows = _triple(step.out.shape[2:])
    pads, width = _triple(step.pads[:3]), BYTES[step.x.dtype]
    return Product(size, rows, _channels(step), kernel, step.strides, step.dilations, pads, one, width)


def _channels(step: Convolve | Upsample) -> tuple[int, int]:
    """How many channels of each row a step reads and writes; all of an FP16 row, which others rely on."""
    out, other = step.out, step.epilogue.other
    spare = out.spare if other is None or other.spare >= out.spare else 0
    return _read(step.x, step), out.channels + spare


def _read(view: View, step: Convolve | Upsample) -> int:
    """Channels in whole lanes where a row has them, whoever they belong to; else its own. In FP16 only those that are finite."""
    if view.dtype != "int8":
        return view.channels + view.spare
    pitch, wanted = _pitch(view, step), lanes(view.channels)
    unit, first = min(wanted, LANES), view.offset % pitch
    return wanted if first % unit == pitch % unit == 0 and first + wanted <= pitch else view.channels


def _triple(values: Sequence[int]) -> Triple:
    x, y, z = values
    return x, y, z


def columns_of(product: Product, tile: Tile) -> tuple[int, int]:
    """(columns of one copy of the output channels, all columns in whole tiles)."""
    copies = tile.group * product.copies
    outputs = product.channels[1]
    padded = outputs if copies == 1 else power_of_two(outputs)
    return padded, -(-copies * padded // tile.columns) * tile.columns


def spacings(product: Product, tile: Tile) -> tuple[int, int]:
    """Voxels along y and z from one line of a program, or voxel of a row, to the next: the dilation in the kernel of several lines."""
    return product.dilations[1:] if tile.lines > 1 else (1, 1)


def span_of(product: Product, tile: Tile) -> int:
    """Input voxels along z that a row of the product reads in one run, or kernel offsets where runs are of one offset."""
    if tile.mode == "tap":
        return product.kernel[2]
    return (tile.group - 1) * product.strides[2] + (product.kernel[2] - 1) * _between(product, tile) + 1


def _between(product: Product, tile: Tile) -> int:
    """From one kernel offset along z to the next, in voxels of a run."""
    return 1 if tile.lines > 1 else product.dilations[2]


def run_of(product: Product, tile: Tile) -> int:
    """The values of a run, in whole steps of the tile."""
    span = 1 if tile.mode == "tap" else span_of(product, tile)
    offsets = product.kernel[0] * product.kernel[1] if tile.mode == "all" else 1
    return -(-offsets * span * product.channels[0] // tile.run) * tile.run


def packed(weight: Weights, product: Product, tile: Tile) -> Weights:
    """Weights in the order in which the kernels read them.

    Args:
        weight: (K, C, kx, ky, kz) of a convolution; (C, K, kx, ky, kz) of a ConvTranspose; those of spare channels are 0.

    Returns:
        (runs, columns, tile.run) int8, or float16 of floats; for several lines a run is followed by those of the other offsets along y.
    """
    weight = weight if weight.dtype == np.int8 else weight.astype(np.float16)
    matrix = _rows_of_runs(_as_convolution(weight, product), product, tile)
    kx, ky = (product.kernel[0], product.kernel[1]) if tile.mode != "all" else (1, 1)
    kz = product.kernel[2] if tile.mode == "tap" else 1
    pieces = matrix.reshape(matrix.shape[0], kx, ky, kz, -1, tile.run)
    order = (1, 3, 4, 2, 0, 5) if tile.lines > 1 else (1, 2, 3, 4, 0, 5)
    return np.ascontiguousarray(pieces.transpose(order)).reshape(-1, matrix.shape[0], tile.run)


def _as_convolution(weight: Weights, product: Product) -> Weights:
    """(copies, K, C, kx, ky, kz)."""
    channels, outputs = product.channels
    if product.copies == 1:
        return _filled(_filled(weight, 0, outputs), 1, channels)[None]
    weight = _filled(_filled(weight, 0, channels), 1, outputs)
    return weight.transpose(2, 3, 4, 1, 0).reshape(product.copies, outputs, channels, 1, 1, 1)


def _filled(values: npt.NDArray[Any], axis: int, size: int) -> npt.NDArray[Any]:
    """An array with zeros behind it, `size` long; itself where it is."""
    missing = size - values.shape[axis]
    return np.pad(values, [(0, missing if place == axis else 0) for place in range(values.ndim)]) if missing else values


def _rows_of_runs(weight: Weights, product: Product, tile: Tile) -> Weights:
    """(columns, everything that a row of the product sums), with zeros where a row reads what an output does not."""
    copies, outputs, channels, kx, ky, kz = weight.shape
    padded, columns = columns_of(product, tile)
    span = span_of(product, tile)
    whole = np.zeros((copies * tile.group, padded, kx, ky, span, channels), weight.dtype)
    for place in range(tile.group):
        for offset in range(kz):
            at = offset if tile.mode == "tap" else place * product.strides[2] + offset * _between(product, tile)
            whole[place * copies : (place + 1) * copies, :outputs, :, :, at] = weight[..., offset].transpose(
                0, 1, 3, 4, 2
            )
    leading = {"tap": (kx, ky, span), "line": (kx, ky), "all": ()}[tile.mode]
    runs = whole.reshape(copies * tile.group * padded, *leading, -1)
    filled = np.zeros((columns, *leading, run_of(product, tile)), weight.dtype)
    filled[: len(runs), ..., : runs.shape[-1]] = runs
    return filled


def packed_size(product: Product, tile: Tile) -> int:
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
    if not has_bits(product, tile) or (tile.mode != "tap" and _between(product, tile) > 1):
        return False
    if tile.lines > 1 and not (product.unstrided and product.kernel[1] > 1 and tile.mode != "all"):
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


def flags(epilogue: Epilogue, out: View, *, biased: bool, summed: int) -> tuple[bool | int, ...]:
    """What the kernels are compiled for: biased, kind, rounds, adds, last, integers, summed (how many channels)."""
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
        return (*shape, *product.dilations, *product.pads, *kind, tile.lines, *block)
    return (*shape, *product.strides, *product.dilations, *product.pads, *product.factor, *kind, *block)


def _once(step: Convolve | Upsample) -> bool:
    rounded = step.epilogue.rounded
    return one_remainder(step.out.step) and (rounded is None or one_remainder(rounded))


def even(product: Product, tile: Tile) -> bool:
    """Whether every program has all its rows and columns."""
    padded, columns = columns_of(product, tile)
    rows = rows_of(product, tile)
    whole_rows = rows * tile.lines * tile.group == math.prod(product.rows) and rows % tile.rows == 0
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
    """Minus the input's zero times the sum of the weights of each output channel, int32; of each kernel offset in a ConvTranspose.

    Those of spare channels are 0. Where the input's zero is 0, nothing reads them.
    """
    if step.x.zero == 0:
        return np.zeros(1, np.int32)
    if isinstance(step, Upsample):
        channels, outputs = step.weight.shape[:2]
        wholes = step.weight.reshape(channels, outputs, -1).sum(0, dtype=np.int64).T
    else:
        wholes = step.weight.reshape(len(step.weight), -1).sum(1, dtype=np.int64)
    wholes = _filled(wholes, wholes.ndim - 1, product_of(step).channels[1])
    return np.ascontiguousarray(-step.x.zero * wholes, np.int32).reshape(-1)


def grid_of(step: Convolve | Upsample, product: Product, tile: Tile) -> Triple:
    """Programs for (rows, columns, samples)."""
    return -(-rows_of(product, tile) // tile.rows), columns_of(product, tile)[1] // tile.columns, step.x.shape[0]


def rows_of(product: Product, tile: Tile) -> int:
    """Rows of the matrix product of one sample."""
    (x, y, z), (along_y, along_z) = product.rows, spacings(product, tile)
    blocks = -(-y // along_y), -(-z // along_z)  # of as many neighbours as are not one dilation apart
    return x * -(-blocks[0] // tile.lines) * along_y * -(-blocks[1] // tile.group) * along_z


def flattened(step: Convolve) -> Convolve:
    """A convolution with kernel and stride 1 on one long line, so that samples and lines need no tiles of their own."""
    if step.sums is not None or step.weight.shape[2:] != (1, 1, 1) or step.strides != (1, 1, 1) or any(step.pads):
        return step
    other = step.epilogue.other
    epilogue = replace(step.epilogue, other=None if other is None else _line(other, step))
    return replace(step, x=_line(step.x, step), out=_line(step.out, step), epilogue=epilogue)


def _line(view: View, step: Convolve) -> View:
    pitch = _pitch(view, step)
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
def border(zero: int) -> npt.NDArray[np.int8]:
    """(PAD_BYTES,) int8 of an input's zero; the same array for the same zero."""
    return np.full(PAD_BYTES, zero, np.int8)


def launch_of(step: Convolve | Upsample, place: Place, tile: Tile, weights: Any, start: Any) -> Launch:
    """The launch of a convolution whose weights are packed.

    Args:
        step: its `weight` counts by its shape alone.
        place: where its tensors are.
        tile: how it is cut.
        weights: (runs, columns, tile.run) on the device, as `packed` gives them.
        start: int32 on the device, as `first_sums` gives them.
    """
    step = flattened(step) if isinstance(step, Convolve) else step
    product = product_of(step)
    kernel: Any = convolve_lines if tile.lines > 1 else convolve
    out = place.view(step.out)
    multiplier, bias = (
        None if one is None else place.constant(_filled(one, 0, product.channels[1]))
        for one in (step.multiplier, step.bias)
    )
    tensors = (
        place.view(step.x),
        weights,
        out,
        out if step.epilogue.other is None else place.view(step.epilogue.other),
        multiplier,
        multiplier if bias is None else bias,
        multiplier if step.sums is None else place.sums(step.sums),
        place.constant(border(step.x.zero)) if step.x.zero else weights,
        start,
    )
    told = (
        *flags(
            step.epilogue, step.out, biased=bias is not None, summed=step.out.channels if step.sums is not None else 0
        ),
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
