"""Tensors as rows of channels, cut into blocks, for the kernels that treat every value alike.

A program works on a block of rows times a block of channels. Where all tensors of a step are dense, rows are joined until a row is
a multiple of 64 values, so that every thread moves 16 bytes at once, whatever C is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from ptq3d.engines.triton.arithmetic import kind_of, one_remainder
from ptq3d.engines.triton.place import Blocks, Place
from ptq3d.engines.triton.steps import Epilogue, View
from ptq3d.errors import EngineError

BLOCK_VALUES = 4096  # of a program with 4 warps: two loads of 16 bytes for each thread
WIDTHS = (64, 32, 16)
WIDEST = 128


@dataclass(frozen=True)
class Tiling:
    """How the rows of a step are cut.

    Args:
        samples: the second axis of the grid.
        rows: of each sample.
        channels: of a row, `joined` times those of the tensor.
        joined: rows of the tensor in one row here.
        pitches: from one row to the next, of each tensor.
        block_rows, block_channels: of a program; powers of two.
    """

    samples: int
    rows: int
    channels: int
    joined: int
    pitches: tuple[int, ...]
    block_rows: int
    block_channels: int

    @property
    def channel_blocks(self) -> int:
        """How many blocks a row is cut into."""
        return -(-self.channels // self.block_channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs: blocks, those of one row side by side; samples."""
        return -(-self.rows // self.block_rows) * self.channel_blocks, self.samples

    @property
    def arguments(self) -> dict[str, int]:
        """What `tile` takes."""
        return {
            "rows": self.rows,
            "C": self.channels,
            "CHANNEL_BLOCKS": self.channel_blocks,
            "BLOCK_R": self.block_rows,
            "BLOCK_C": self.block_channels,
        }

    def repeated(self, factors: NDArray[Any]) -> NDArray[Any]:
        """(C,) values for the channels of joined rows."""
        return np.tile(factors, self.joined)


def tiled(views: tuple[View, ...], blocks: Blocks, *, samples: int = 1) -> Tiling:
    """A tiling of tensors of one shape.

    Args:
        views: of equal rows and channels.
        blocks: "block_rows".
        samples: that are cut each for itself.

    Raises:
        EngineError: a view whose rows are not evenly spaced.
    """
    channels, rows = views[0].channels, views[0].rows // samples
    pitches = tuple(pitch_of(view) for view in views)
    joined = _joined(rows, channels) if all(pitch == channels for pitch in pitches) else 1
    if joined > 1:
        rows, channels = rows // joined, channels * joined
        pitches = (channels,) * len(views)
    width = channel_block(channels)
    block_rows = min(power_of_two(rows), max(1, blocks.get("block_rows", BLOCK_VALUES // width)))
    return Tiling(samples, rows, channels, joined, pitches, block_rows, width)


def _joined(rows: int, channels: int) -> int:
    """How many dense rows make a row of whole blocks."""
    for width in WIDTHS:
        joined = math.lcm(channels, width) // channels
        if rows % joined == 0:
            return joined
    return 1


def channel_block(channels: int) -> int:
    """Channels of a block: a power of two that divides them where that makes pieces of 32 bytes, else one that covers them."""
    divisor = min(channels & -channels, WIDEST)
    return divisor if divisor >= 32 else min(power_of_two(channels), WIDEST)


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def pitch_of(view: View) -> int:
    """Values from one row to the next.

    Raises:
        EngineError: rows that are not evenly spaced.
    """
    pitch = view.pitch
    if pitch is None:
        raise EngineError(
            f"a kernel takes evenly spaced rows of channels, and this view of shape {view.shape} has strides "
            f"{view.strides}. Copy it with a Move first."
        )
    return pitch


def epilogue_arguments(epilogue: Epilogue, out: View, place: Place) -> dict[str, Any]:
    """What `finish` takes, with the tensor to add as `other`."""
    return {
        "other": None if epilogue.other is None else place.view(epilogue.other),
        "rounded_step": float(epilogue.rounded or 1.0),
        "other_step": 1.0 if epilogue.other is None else float(epilogue.other.step),
        "out_step": float(out.step),
        "low": float(epilogue.activation.low),
        "high": float(epilogue.activation.high),
        "last_low": float(epilogue.last.low),
        "last_high": float(epilogue.last.high),
        "KIND": kind_of(epilogue.activation),
        "LAST": kind_of(epilogue.last),
        "rounded_zero": epilogue.rounded_zero,
        "other_zero": 0 if epilogue.other is None else epilogue.other.zero,
        "out_zero": out.zero,
        "ROUNDS": epilogue.rounded is not None,
        "ADDS": epilogue.other is not None,
        "INTEGERS": out.dtype == "int8",
        "ONCE": one_remainder(out.step) and (epilogue.rounded is None or one_remainder(epilogue.rounded)),
    }


@triton.jit
def tile(rows, C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The block of this program: its first row of all samples (int64), its rows from there, its channels, what exists."""
    block = tl.program_id(0)
    start = (block // CHANNEL_BLOCKS) * BLOCK_R
    first = tl.program_id(1).to(tl.int64) * rows + start
    row = tl.arange(0, BLOCK_R)
    channel = (block % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (start + row < rows)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (channel < C)[None, :]
    return first, row, channel, mask


@triton.jit
def read(tensor, pitch, first, row, channel, mask):
    """A block of a tensor; 0 where there is nothing."""
    return tl.load(tensor + first * pitch + row[:, None] * pitch + channel[None, :], mask=mask, other=0)


@triton.jit
def write(tensor, v, pitch, first, row, channel, mask):
    """Values of a block, as `finish` gives them, in the tensor's type."""
    there = tensor + first * pitch + row[:, None] * pitch + channel[None, :]
    tl.store(there, v.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def as_float(q, zero=0):
    """int8 minus `zero`, or floating-point values, as float32; int8 by its bits, since the instruction that converts it is slow."""
    if q.dtype == tl.int8:
        return ((q.to(tl.int32) & 255) ^ 0x4B000080).to(tl.float32, bitcast=True) - (8388736.0 + zero)
    return q.to(tl.float32)
