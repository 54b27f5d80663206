"""Normalize (InstanceNormalization, GroupNormalization) and NormalizeRows (LayerNormalization).

A group's mean and variance come from the sums of its integers and of their squares, which are exact in any order: results repeat.
The integer that stands for 0 goes away with the mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ptq3d.engines.triton.arithmetic import ZEROS, finish
from ptq3d.engines.triton.place import OWN_BLOCKS, SLOTS, Blocks, Launch, Launches, Place
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
from ptq3d.engines.triton.steps import Normalize, NormalizeRows

PROGRAMS = 1024  # that sum, about 8 for each multiprocessor
SUM_VALUES = 2048  # of a program at once: a thread of 128 keeps two sums for each of its 16
MOST_ROWS = 1 << 16  # of a program: 2^16 squares of at most 2^14 stay below 2^31


def prepare_normalize(step: Normalize, place: Place, *, blocks: Blocks = OWN_BLOCKS) -> Launches:
    """The launches of a Normalize step: sums where the step before left none, moments, values.

    `Place.sums` must be zero when the run starts.

    Args:
        step: its tensors have evenly spaced rows.
        place: of its values.
        blocks: "block_rows", "num_warps", and "programs" that sum.

    Raises:
        EngineError: a view whose rows are not evenly spaced.
    """
    other = step.epilogue.other
    views = (step.x, step.out) if other is None else (step.x, step.out, other)
    tiling = tiled(views, blocks, samples=step.x.shape[0])
    moments = _moments_arguments(step, place)
    launches = [] if step.summed else [_summing(step, place, blocks)]
    table = place.scratch(2 * step.x.shape[0] * step.x.channels, torch.float32)
    launches.append(Launch(_moments, (step.groups, step.x.shape[0]), {**moments, "table": table}))
    arguments = {
        "x": place.view(step.x),
        "out": place.view(step.out),
        "table": table,
        "x_pitch": tiling.pitches[0],
        "out_pitch": tiling.pitches[1],
        "other_pitch": tiling.pitches[-1],
        "CHANNELS": step.x.channels,
        **tiling.arguments,
        **epilogue_arguments(step.epilogue, step.out, place),
    }
    return Launches((*launches, Launch(_normalize, tiling.grid, arguments, blocks.get("num_warps", 4))))


def _moments_arguments(step: Normalize, place: Place) -> dict[str, Any]:
    """What `moments` takes."""
    channels, per_group = step.x.channels, step.x.channels // step.groups
    values = step.x.rows // step.x.shape[0] * per_group
    return {
        "sums": place.sums(step.sums),
        "scale": place.constant(np.ascontiguousarray(step.scale, np.float32)),
        "bias": place.constant(np.ascontiguousarray(step.bias, np.float32)),
        "values": values,
        "x_step": float(step.x.step),
        "epsilon": float(step.epsilon),
        "CHANNELS": channels,
        "PER_GROUP": per_group,
        "PER_BLOCK": power_of_two(per_group),
        "SLOTS": SLOTS,
    }


def _summing(step: Normalize, place: Place, blocks: Blocks) -> Launch:
    """The launch that sums the integers of each channel, and their squares."""
    samples = step.x.shape[0]
    tiling = tiled((step.x,), {}, samples=samples)
    block_rows = min(power_of_two(tiling.rows), max(1, SUM_VALUES // tiling.block_channels))
    programs = max(1, blocks.get("programs", PROGRAMS) // (samples * tiling.channel_blocks))
    turns = min(power_of_two(-(-tiling.rows // (programs * block_rows))), MOST_ROWS // block_rows)
    arguments = {
        "x": place.view(step.x),
        "sums": place.sums(step.sums),
        "x_pitch": tiling.pitches[0],
        "TURNS": turns,
        "SLOTS": SLOTS,
        "CHANNELS": step.x.channels,
        **tiling.arguments,
        "BLOCK_R": block_rows,
    }
    parts = -(-tiling.rows // (turns * block_rows))
    return Launch(_sum, (parts * tiling.channel_blocks, samples), arguments)


@triton.jit
def _sum(
    x, sums, rows, x_pitch,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, TURNS: tl.constexpr,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    start = (tl.program_id(0) // CHANNEL_BLOCKS) * BLOCK_R * TURNS
    row = tl.arange(0, BLOCK_R)
    channel = (tl.program_id(0) % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < C
    there = x + (sample * rows + start) * x_pitch + row[:, None] * x_pitch + channel[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    for turn in tl.range(0, TURNS, loop_unroll_factor=4):
        mask = (start + turn * BLOCK_R + row < rows)[:, None]
        if C % BLOCK_C != 0:
            mask = mask & exists[None, :]
        q = tl.load(there, mask=mask, other=0).to(tl.int32)
        total += q
        squares += q * q
        there += BLOCK_R * x_pitch
    slot = tl.program_id(0) % SLOTS
    into = sums + ((slot * tl.num_programs(1) + sample) * CHANNELS + channel % CHANNELS) * 2
    tl.atomic_add(into, tl.sum(total, 0).to(tl.int64), mask=exists, sem="relaxed")
    tl.atomic_add(into + 1, tl.sum(squares, 0).to(tl.int64), mask=exists, sem="relaxed")


@triton.jit
def _moments(
    sums, scale, bias, table, values, x_step, epsilon,
    CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr, PER_BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """v = q * factor + offset for the channels of a group; mean and variance in float64, so that their difference loses nothing."""
    member = tl.arange(0, PER_BLOCK)
    channel = tl.program_id(0) * PER_GROUP + member
    exists = member < PER_GROUP
    slot = tl.arange(0, SLOTS) * tl.num_programs(1) + tl.program_id(1)
    there = sums + (slot[:, None] * CHANNELS + channel[None, :]) * 2
    total = tl.sum(tl.sum(tl.load(there, mask=exists[None, :], other=0), 0), 0).to(tl.float64)
    squares = tl.sum(tl.sum(tl.load(there + 1, mask=exists[None, :], other=0), 0), 0).to(tl.float64)
    one = tl.full((1,), 1.0, tl.float64) / values
    mean = total * one
    variance = tl.maximum(squares * one - mean * mean, 0.0)
    deviation = tl.sqrt_rn(variance.to(tl.float32) * x_step * x_step + epsilon)
    factor = tl.load(scale + channel, mask=exists, other=0.0) / deviation
    offset = tl.load(bias + channel, mask=exists, other=0.0) - mean.to(tl.float32) * x_step * factor
    into = table + tl.program_id(1) * 2 * CHANNELS + channel
    tl.store(into, factor * x_step, mask=exists)
    tl.store(into + CHANNELS, offset, mask=exists)


@triton.jit(do_not_specialize=ZEROS)
def _normalize(
    x, other, out, table, rows, x_pitch, other_pitch, out_pitch,
    rounded_step, other_step, out_step, low, high, last_low, last_high,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr, LAST: tl.constexpr, ROUNDS: tl.constexpr, ADDS: tl.constexpr, INTEGERS: tl.constexpr, ONCE: tl.constexpr,
    rounded_zero, other_zero, out_zero,
):  # fmt: skip
    first, row, channel, mask = tile(rows, C, CHANNEL_BLOCKS, BLOCK_R, BLOCK_C)
    q = read(x, x_pitch, first, row, channel, mask)
    there = read(other, other_pitch, first, row, channel, mask) if ADDS else q
    of = table + tl.program_id(1) * 2 * CHANNELS + channel % CHANNELS
    factor = tl.load(of)
    offset = tl.load(of + CHANNELS)
    v = as_float(q) * factor[None, :] + offset[None, :]
    v = finish(
        v, as_float(there, other_zero), rounded_step, other_step, out_step,
        KIND, low, high, ROUNDS, ADDS, LAST, last_low, last_high, INTEGERS, ONCE, rounded_zero, 0, out_zero,
    )  # fmt: skip
    write(out, v, out_pitch, first, row, channel, mask)


def prepare_normalize_rows(step: NormalizeRows, place: Place, *, blocks: Blocks = OWN_BLOCKS) -> Launches:
    """The launch of a NormalizeRows step.

    Args:
        step: its tensors have evenly spaced rows.
        place: of its values.
        blocks: "block_rows", "num_warps".

    Raises:
        EngineError: a view whose rows are not evenly spaced.
    """
    other = step.epilogue.other or step.out
    width = power_of_two(step.x.channels)
    rows = step.x.rows
    block_rows = min(power_of_two(rows), blocks.get("block_rows", max(1, BLOCK_VALUES // width)))
    tiling = Tiling(1, rows, step.x.channels, 1, (), block_rows, width)
    arguments = {
        "x": place.view(step.x),
        "out": place.view(step.out),
        "scale": place.constant(np.ascontiguousarray(step.scale, np.float32)),
        "bias": place.constant(np.ascontiguousarray(step.bias, np.float32)),
        "x_pitch": pitch_of(step.x),
        "out_pitch": pitch_of(step.out),
        "other_pitch": pitch_of(other),
        "x_step": float(step.x.step),
        "epsilon": float(step.epsilon),
        **tiling.arguments,
        **epilogue_arguments(step.epilogue, step.out, place),
    }
    return Launches((Launch(_normalize_rows, tiling.grid, arguments, blocks.get("num_warps", 4)),))


@triton.jit(do_not_specialize=ZEROS)
def _normalize_rows(
    x, other, out, scale, bias, rows, x_pitch, other_pitch, out_pitch, x_step, epsilon,
    rounded_step, other_step, out_step, low, high, last_low, last_high,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    KIND: tl.constexpr, LAST: tl.constexpr, ROUNDS: tl.constexpr, ADDS: tl.constexpr, INTEGERS: tl.constexpr, ONCE: tl.constexpr,
    rounded_zero, other_zero, out_zero,
):  # fmt: skip
    first, row, channel, mask = tile(rows, C, CHANNEL_BLOCKS, BLOCK_R, BLOCK_C)
    q = read(x, x_pitch, first, row, channel, mask)
    there = read(other, other_pitch, first, row, channel, mask) if ADDS else q
    v = as_float(q) * x_step
    exists = channel < C
    mean = tl.sum(v, 1) / C
    v = tl.where(exists[None, :], v - mean[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(v * v, 1) / C + epsilon)
    factor = tl.load(scale + channel, mask=exists, other=0.0)
    offset = tl.load(bias + channel, mask=exists, other=0.0)
    v = v * (1.0 / deviation)[:, None] * factor[None, :] + offset[None, :]
    v = finish(
        v, as_float(there, other_zero), rounded_step, other_step, out_step,
        KIND, low, high, ROUNDS, ADDS, LAST, last_low, last_high, INTEGERS, ONCE, rounded_zero, 0, out_zero,
    )  # fmt: skip
    write(out, v, out_pitch, first, row, channel, mask)
