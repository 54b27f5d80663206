"""Steps that look at one value at a time: Pointwise, Enter and Move."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq3d.engines.triton.arithmetic import ZEROS, finish
from ptq3d.engines.triton.place import OWN_BLOCKS, Blocks, Launch, Launches, Place
from ptq3d.engines.triton.rows import (
    BLOCK_VALUES,
    Tiling,
    as_float,
    epilogue_arguments,
    pitch_of,
    power_of_two,
    read,
    tile,
    tiled,
    write,
)
from ptq3d.engines.triton.steps import Enter, Floats, Move, Pointwise, View
from ptq3d.errors import EngineError

NOTHING, SCALAR, OF_CHANNELS, OF_ROWS = 0, 1, 2, 3
WORDS = (torch.complex128, torch.int64, torch.int32, torch.int16)  # by size


def prepare_pointwise(step: Pointwise, place: Place, *, blocks: Blocks = OWN_BLOCKS) -> Launches:
    """The launch of a Pointwise step.

    Args:
        step: its tensors have evenly spaced rows.
        place: of its values.
        blocks: "block_rows", "num_warps".

    Raises:
        EngineError: a view whose rows are not evenly spaced; factors of another size.
    """
    other = step.epilogue.other
    views = (step.x, step.out) if other is None else (step.x, step.out, other)
    factor_kind, offset_kind = _kind(step.factor, step), _kind(step.offset, step)
    samples = step.x.shape[0] if OF_ROWS in (factor_kind, offset_kind) else 1
    tiling = tiled(views, blocks, samples=samples)
    arguments = {
        "x": place.view(step.x),
        "out": place.view(step.out),
        "factor": _factors(step.factor, factor_kind, tiling, place),
        "offset": _factors(step.offset, offset_kind, tiling, place),
        "x_pitch": tiling.pitches[0],
        "out_pitch": tiling.pitches[1],
        "other_pitch": tiling.pitches[-1],
        "x_step": float(step.x.step),
        "x_zero": step.x.zero,
        "FACTOR": factor_kind,
        "OFFSET": offset_kind,
        **tiling.arguments,
        **epilogue_arguments(step.epilogue, step.out, place),
    }
    return Launches((Launch(_pointwise, tiling.grid, arguments, blocks.get("num_warps", 4)),))


def _kind(factors: Floats | None, step: Pointwise) -> int:
    if factors is None:
        return NOTHING
    if factors.size == 1:
        return SCALAR
    if factors.shape == (step.x.channels,):
        return OF_CHANNELS
    if factors.shape == (step.x.rows // step.x.shape[0], step.x.channels):
        return OF_ROWS
    raise EngineError(
        f"'{step.name}' takes factors of shape (1,), ({step.x.channels},) or one for each value of a sample, "
        f"not {factors.shape}."
    )


def _factors(factors: Floats | None, kind: int, tiling: Tiling, place: Place) -> Tensor | None:
    if factors is None:
        return None
    values = tiling.repeated(factors) if kind == OF_CHANNELS else factors
    return place.constant(np.ascontiguousarray(values.reshape(-1), np.float32))


@triton.jit
def _factor_of(factors, start, row, channel, mask, C: tl.constexpr, BY: tl.constexpr):
    if BY == 1:
        found = tl.load(factors)
    elif BY == 2:
        found = tl.load(factors + channel, mask=channel < C, other=0.0)[None, :]
    else:
        found = tl.load(factors + start * C + row[:, None] * C + channel[None, :], mask=mask, other=0.0)
    return found


@triton.jit(do_not_specialize=ZEROS)
def _pointwise(
    x, other, out, factor, offset, rows, x_pitch, other_pitch, out_pitch, x_step,
    rounded_step, other_step, out_step, low, high, last_low, last_high,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    x_zero, FACTOR: tl.constexpr, OFFSET: tl.constexpr,
    KIND: tl.constexpr, LAST: tl.constexpr, ROUNDS: tl.constexpr, ADDS: tl.constexpr, INTEGERS: tl.constexpr, ONCE: tl.constexpr,
    rounded_zero, other_zero, out_zero,
):  # fmt: skip
    first, row, channel, mask = tile(rows, C, CHANNEL_BLOCKS, BLOCK_R, BLOCK_C)
    q = read(x, x_pitch, first, row, channel, mask)
    there = read(other, other_pitch, first, row, channel, mask) if ADDS else q
    v = as_float(q, x_zero) * x_step
    start = first - tl.program_id(1).to(tl.int64) * rows
    if FACTOR:
        v = v * _factor_of(factor, start, row, channel, mask, C, FACTOR)
    if OFFSET:
        v = v + _factor_of(offset, start, row, channel, mask, C, OFFSET)
    v = finish(
        v, as_float(there, other_zero), rounded_step, other_step, out_step,
        KIND, low, high, ROUNDS, ADDS, LAST, last_low, last_high, INTEGERS, ONCE, rounded_zero, 0, out_zero,
    )  # fmt: skip
    write(out, v, out_pitch, first, row, channel, mask)


def prepare_enter(step: Enter, place: Place, *, blocks: Blocks = OWN_BLOCKS) -> Launches:
    """The launch of an Enter step.

    Args:
        step: voxels of a channel of its `x` are evenly spaced, and so are the rows of its `out`.
        place: of its values.
        blocks: "block_rows", "num_warps".

    Raises:
        EngineError: a view whose voxels are not evenly spaced.
    """
    samples, channels = step.x.shape[:2]
    voxels = step.x.rows // samples
    block_c = power_of_two(channels)
    block_r = min(power_of_two(voxels), blocks.get("block_rows", max(1, BLOCK_VALUES // block_c)))
    arguments = {
        "x": place.view(step.x),
        "out": place.view(step.out),
        "voxels": voxels,
        "sample_stride": step.x.strides[0],
        "channel_stride": step.x.strides[1],
        "voxel_stride": _voxel_stride(step.x),
        "OUT_PITCH": pitch_of(step.out),
        "out_step": float(step.out.step),
        "C": channels,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "INTEGERS": step.out.dtype == "int8",
        "out_zero": step.out.zero,
    }
    grid = (-(-voxels // block_r), samples)
    return Launches((Launch(_enter, grid, arguments, blocks.get("num_warps", 4)),))


def _voxel_stride(view: View) -> int:
    """Values from one voxel of a channel to the next: the pitch of the view without its other axes."""
    one = View(0, 0, (1, 1, *view.shape[2:]), (0, 0, *view.strides[2:]), view.dtype)
    return pitch_of(one)


@triton.jit(do_not_specialize=ZEROS)
def _enter(
    x, out, voxels, sample_stride, channel_stride, voxel_stride, out_step, OUT_PITCH: tl.constexpr,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTEGERS: tl.constexpr,
    out_zero,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    mask = (start + row < voxels)[:, None]
    if C < BLOCK_C:
        mask = mask & (channel < C)[None, :]
    from_ = x + sample * sample_stride + start.to(tl.int64) * voxel_stride
    channels_from = channel.to(tl.int64)[None, :] * channel_stride
    v = tl.load(from_ + channels_from + row[:, None] * voxel_stride, mask=mask, other=0.0)
    v = finish(v, v, 1.0, 1.0, out_step, 0, 0.0, 0.0, False, False, 0, 0.0, 0.0, INTEGERS, out_zero=out_zero)
    write(out, v, OUT_PITCH, sample * voxels + start, row, channel, mask)


def prepare_move(step: Move, place: Place) -> Callable[[], None]:
    """The launches of a Move step: PyTorch's own copy, of words as wide as the strides allow.

    Args:
        step: any strides.
        place: of its values.
    """
    x, out = _words(place.view(step.x), place.view(step.out))
    whole = None if step.zeros is None else (place.view(step.zeros), step.zeros.zero)

    def move() -> None:
        if whole is not None:
            whole[0].fill_(whole[1])
        out.copy_(x)

    return move


def _words(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one type and shape as the same bytes in the widest words, where values lie side by side in both."""
    dense = [axis for axis in range(x.ndim) if x.stride(axis) == out.stride(axis) == 1 and x.shape[axis] > 1]
    if dense:
        x, out = x.movedim(dense[0], -1), out.movedim(dense[0], -1)
        for word in WORDS:
            if word.itemsize > x.element_size() and _fits(x, word.itemsize) and _fits(out, word.itemsize):
                return x.view(word), out.view(word)
    return x, out


def _fits(tensor: Tensor, size: int) -> bool:
    """Whether a tensor, dense along its last axis, can be read in words of that many bytes."""
    numbers = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.data_ptr() % size == 0 and all(number * tensor.element_size() % size == 0 for number in numbers)
