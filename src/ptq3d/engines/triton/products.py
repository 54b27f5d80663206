"""Convolutions and ConvTransposes as matrix products, and how these are cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ptq3d.engines.triton.rows import pitch_of, power_of_two
from ptq3d.engines.triton.steps import BYTES, LARGEST_KERNEL, Convolve, Triple, Upsample, View
from ptq3d.engines.triton.views import LANES, lanes
from ptq3d.errors import EngineError


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
    return _read(step.x), out.channels + spare


def _read(view: View) -> int:
    """Channels in whole lanes where a row has them, whoever they belong to; else its own. In FP16 only those that are finite."""
    if view.dtype != "int8":
        return view.channels + view.spare
    pitch, wanted = pitch_of(view), lanes(view.channels)
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
    return (tile.group - 1) * product.strides[2] + (product.kernel[2] - 1) * between(product, tile) + 1


def between(product: Product, tile: Tile) -> int:
    """From one kernel offset along z to the next, in voxels of a run."""
    return 1 if tile.lines > 1 else product.dilations[2]


def run_of(product: Product, tile: Tile) -> int:
    """The values of a run, in whole steps of the tile."""
    span = 1 if tile.mode == "tap" else span_of(product, tile)
    offsets = product.kernel[0] * product.kernel[1] if tile.mode == "all" else 1
    return -(-offsets * span * product.channels[0] // tile.run) * tile.run


def rows_of(product: Product, tile: Tile) -> int:
    """Rows of the matrix product of one sample."""
    (x, y, z), (along_y, along_z) = product.rows, spacings(product, tile)
    blocks = -(-y // along_y), -(-z // along_z)  # of as many neighbours as are not one dilation apart
    return x * -(-blocks[0] // tile.lines) * along_y * -(-blocks[1] // tile.group) * along_z


def even(product: Product, tile: Tile) -> bool:
    """Whether every program has all its rows and columns."""
    padded, columns = columns_of(product, tile)
    rows = rows_of(product, tile)
    whole_rows = rows * tile.lines * tile.group == math.prod(product.rows) and rows % tile.rows == 0
    return whole_rows and padded == product.channels[1] and columns == tile.group * product.copies * padded


def has_bits(product: Product, tile: Tile) -> bool:
    """Whether a bit of an int32 is there for each offset along an axis that a program asks for."""
    return max(product.kernel[0], product.kernel[1] + tile.lines - 1, span_of(product, tile)) <= LARGEST_KERNEL


def fits(product: Product, tile: Tile) -> bool:
    """Whether a tiling can compute a step, and wastes little of it."""
    channels = product.channels[0]
    if not has_bits(product, tile) or (tile.mode != "tap" and between(product, tile) > 1):
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


def simple_tile(product: Product) -> Tile:
    """A tiling that always works."""
    outputs = product.channels[1] * product.copies
    columns = min(max(power_of_two(outputs), 16), 64)
    tile = Tile("all", 1, 1, 64, columns, 32, 2, 4)
    if product.channels[0] < 16 and product.copies == 1 and has_bits(product, tile):
        return tile
    return replace(tile, mode="tap")
