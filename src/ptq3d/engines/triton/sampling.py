"""Pool and Resize: each voxel of the output gathers voxels of the input, channels side by side."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from ptq3d.engines.triton.arithmetic import levels
from ptq3d.engines.triton.place import OWN_BLOCKS, Blocks, Launch, Launches, Place
from ptq3d.engines.triton.rows import BLOCK_VALUES, Tiling, as_float, channel_block, power_of_two
from ptq3d.engines.triton.steps import Pool, Resize, View
from ptq3d.errors import EngineError

UNROLLED = 32  # taps whose loads are under way at once


def prepare_pool(step: Pool, place: Place, *, blocks: Blocks = OWN_BLOCKS) -> Launches:
    """The launch of a Pool step.

    Args:
        step: its tensors have their channels side by side.
        place: of its values.
        blocks: "block_rows", "num_warps".

    Raises:
        EngineError: a view whose channels do not lie side by side; a maximum whose output has another type or scale.
    """
    if step.kind == "max" and (step.x.dtype, step.x.scale) != (step.out.dtype, step.out.scale):
        raise EngineError(
            f"'{step.name}' takes a maximum of {step.x.dtype} with step {step.x.step:g} and zero {step.x.zero}, and its output "
            f"is {step.out.dtype} with step {step.out.step:g} and zero {step.out.zero}. Give both one type and scale."
        )
    tiling = _voxels(step.out, blocks)
    arguments = {
        **_images(step.x, step.out, place),
        **tiling.arguments,
        "x_step": float(step.x.step),
        "out_step": float(step.out.step),
        "UNROLL": min(math.prod(step.kernel), UNROLLED),
        "MAX": step.kind == "max",
        "INCLUDE": step.include_pads,
        "INTEGERS": step.out.dtype == "int8",
        **{f"K{axis}": size for axis, size in zip("XYZ", step.kernel, strict=True)},
        **{f"S{axis}": stride for axis, stride in zip("XYZ", step.strides, strict=True)},
        **{f"P{axis}": pad for axis, pad in zip("XYZ", step.pads[:3], strict=True)},
    }
    return Launches((Launch(_pool, tiling.grid, arguments, blocks.get("num_warps", 4)),))


def prepare_resize(step: Resize, place: Place, *, blocks: Blocks = OWN_BLOCKS) -> Launches:
    """The launch of a Resize step.

    Args:
        step: its tensors have their channels side by side.
        place: of its values.
        blocks: "block_rows", "num_warps".

    Raises:
        EngineError: a view whose channels do not lie side by side.
    """
    if _doubles(step):
        return _prepare_doubled(step, place, blocks)
    tiling = _voxels(step.out, blocks)
    sizes = zip(step.x.shape[2:], step.out.shape[2:], strict=True)
    scales = [_scale(size, out_size, corners=step.align_corners) for size, out_size in sizes]
    arguments = {
        **_images(step.x, step.out, place),
        **tiling.arguments,
        "ratio": _ratio(step),
        "scale_x": scales[0],
        "scale_y": scales[1],
        "scale_z": scales[2],
        "LINEAR": step.mode == "linear",
        "CORNERS": step.align_corners,
        "SAME": (step.x.dtype, step.x.scale) == (step.out.dtype, step.out.scale),
    }
    return Launches((Launch(_resize, tiling.grid, arguments, blocks.get("num_warps", 4)),))


def _doubles(step: Resize) -> bool:
    """Whether each axis becomes twice as long, half-pixel."""
    doubled = all(2 * size == out for size, out in zip(step.x.shape[2:], step.out.shape[2:], strict=True))
    return doubled and step.mode == "linear" and not step.align_corners


def _prepare_doubled(step: Resize, place: Place, blocks: Blocks) -> Launches:
    """The launch of a Resize that doubles: one row for each corner between voxels, those of the border included."""
    width = channel_block(step.out.channels)
    corners = step.x.shape[0] * math.prod(size + 1 for size in step.x.shape[2:])
    block_rows = min(power_of_two(corners), max(1, blocks.get("block_rows", BLOCK_VALUES // 2 // width)))
    tiling = Tiling(1, corners, step.out.channels, 1, (), block_rows, width)
    arguments = {
        **_images(step.x, step.out, place),
        **tiling.arguments,
        "ratio": _ratio(step),
    }
    return Launches((Launch(_double, tiling.grid, arguments, blocks.get("num_warps", 4)),))


def _ratio(step: Resize) -> float:
    """Integers of the output for one of the input."""
    return float(np.float32(step.x.step) / np.float32(step.out.step))


def _scale(size: int, out_size: int, *, corners: bool) -> float:
    """Input voxels from one output voxel to the next, as float32 has it."""
    if corners:
        return float(np.float32(size - 1) / np.float32(out_size - 1)) if out_size > 1 else 0.0
    return float(np.float32(size) / np.float32(out_size))


def _voxels(out: View, blocks: Blocks) -> Tiling:
    """The output's voxels as rows."""
    width = channel_block(out.channels)
    block_rows = min(power_of_two(out.rows), max(1, blocks.get("block_rows", BLOCK_VALUES // 2 // width)))
    return Tiling(1, out.rows, out.channels, 1, (), block_rows, width)


def _images(x: View, out: View, place: Place) -> dict[str, Any]:
    """Two images, their zeros, sizes and strides."""
    for view in (x, out):
        if view.channels > 1 and view.strides[1] != 1:
            raise EngineError(
                f"a kernel takes images with their channels side by side, and this view of shape {view.shape} has "
                f"strides {view.strides}. Copy it with a Move first."
            )
    sizes = {f"{axis}_size": size for axis, size in zip("xyz", x.shape[2:], strict=True)}
    out_sizes = {f"out_{axis}_size": size for axis, size in zip("xyz", out.shape[2:], strict=True)}
    strides = {f"{axis}_stride": x.strides[place] for axis, place in zip("nxyz", (0, 2, 3, 4), strict=True)}
    out_strides = {f"out_{axis}_stride": out.strides[place] for axis, place in zip("nxyz", (0, 2, 3, 4), strict=True)}
    zeros = {"X_ZERO": x.zero, "OUT_ZERO": out.zero}
    return {"x": place.view(x), "out": place.view(out), **zeros, **sizes, **out_sizes, **strides, **out_strides}


@triton.jit
def _voxel(
    rows, out_x_size, out_y_size, out_z_size,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The output voxels of this program: n, x, y, z; channels; which values exist."""
    block = tl.program_id(0)
    row = (block // CHANNEL_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = (block % CHANNEL_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (channel < C)[None, :]
    z = row % out_z_size
    row = row // out_z_size
    y = row % out_y_size
    row = row // out_y_size
    return row // out_x_size, row % out_x_size, y, z, channel, mask


@triton.jit
def _along(place, stride):
    """How far voxels lie along an axis, int64, as a column."""
    return (place.to(tl.int64) * stride)[:, None]


@triton.jit
def _at(n, x, y, z, n_stride, x_stride, y_stride, z_stride):
    """Where voxels lie, int64, as a column."""
    return _along(n, n_stride) + _along(x, x_stride) + _along(y, y_stride) + _along(z, z_stride)


@triton.jit
def _pool(
    x, out, rows, x_size, y_size, z_size, out_x_size, out_y_size, out_z_size,
    n_stride, x_stride, y_stride, z_stride, out_n_stride, out_x_stride, out_y_stride, out_z_stride, x_step, out_step,
    KX: tl.constexpr, KY: tl.constexpr, KZ: tl.constexpr, SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr,
    PX: tl.constexpr, PY: tl.constexpr, PZ: tl.constexpr, MAX: tl.constexpr, INCLUDE: tl.constexpr,
    INTEGERS: tl.constexpr, UNROLL: tl.constexpr, X_ZERO: tl.constexpr, OUT_ZERO: tl.constexpr,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, out_x, out_y, out_z, channel, mask = _voxel(
        rows, out_x_size, out_y_size, out_z_size, C, CHANNEL_BLOCKS, BLOCK_R, BLOCK_C
    )
    count = tl.zeros((BLOCK_R,), tl.int32)
    whole: tl.constexpr = x.dtype.element_ty == tl.int8
    least: tl.constexpr = -128 if whole else float("-inf")
    missing: tl.constexpr = least if MAX else X_ZERO
    start: tl.constexpr = least if MAX else -X_ZERO * KX * KY * KZ  # every tap adds X_ZERO beside its value
    best = tl.full((BLOCK_R, BLOCK_C), start, tl.int32 if whole else tl.float32)
    for tap in tl.range(0, KX * KY * KZ, loop_unroll_factor=UNROLL):
        i = out_x * SX - PX + tap // (KY * KZ)
        j = out_y * SY - PY + tap // KZ % KY
        k = out_z * SZ - PZ + tap % KZ
        inside = (i >= 0) & (i < x_size) & (j >= 0) & (j < y_size) & (k >= 0) & (k < z_size)
        there = x + _at(n, i, j, k, n_stride, x_stride, y_stride, z_stride) + channel[None, :]
        exists = mask & inside[:, None]
        # not as `other` of the load: for a negative int8, Triton 3.6 puts -1 into three of every four values
        q = tl.where(exists, tl.load(there, mask=exists, other=0).to(best.dtype), missing)
        best = tl.maximum(best, q) if MAX else best + q
        count += inside.to(tl.int32)
    if MAX:
        q = best.to(out.dtype.element_ty)
    else:
        taps = tl.full((BLOCK_R,), KX * KY * KZ, tl.int32) if INCLUDE else tl.maximum(count, 1)
        v = best.to(tl.float32) * tl.div_rn(taps.to(tl.float32) * 0.0 + x_step, taps.to(tl.float32))[:, None]
        if INTEGERS:
            v = levels(v, out_step, zero=OUT_ZERO)
        q = v.to(out.dtype.element_ty)
    into = out + _at(n, out_x, out_y, out_z, out_n_stride, out_x_stride, out_y_stride, out_z_stride)
    tl.store(into + channel[None, :], q, mask=mask)


@triton.jit
def _between(place, size, scale, LINEAR: tl.constexpr, CORNERS: tl.constexpr):
    """The input voxels before and behind output voxels along an axis, and how far on the way to the second."""
    at = place.to(tl.float32) * scale
    if LINEAR and not CORNERS:
        at = tl.maximum((place.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    before = tl.minimum(at.to(tl.int32), size - 1)
    behind = tl.minimum(before + 1, size - 1)
    return before, behind, (at - before.to(tl.float32))[:, None]


@triton.jit
def _mixed(a, b, part):
    return tl.fma(tl.broadcast_to(part, a.shape), b - a, a)


@triton.jit
def _stored(v, dtype: tl.constexpr, zero: tl.constexpr):
    """Values in the output's steps in its type."""
    if dtype == tl.int8:  # the last bits of the sum, as in `levels`
        v = tl.minimum(tl.maximum(v, -128.0 - zero), 127.0 - zero)
        v = (v + 12582912.0).to(tl.int32, bitcast=True) + zero
    return v.to(dtype)


@triton.jit
def _line(x, n, i, j, before, behind, part, n_stride, x_stride, y_stride, z_stride, channel, mask, ZERO: tl.constexpr):
    """Values between two voxels that differ in z."""
    first = x + _at(n, i, j, before, n_stride, x_stride, y_stride, z_stride) + channel[None, :]
    second = x + _at(n, i, j, behind, n_stride, x_stride, y_stride, z_stride) + channel[None, :]
    a = tl.load(first, mask=mask, other=0)
    b = tl.load(second, mask=mask, other=0)
    return _mixed(as_float(a, ZERO), as_float(b, ZERO), part)


@triton.jit
def _resize(
    x, out, rows, x_size, y_size, z_size, out_x_size, out_y_size, out_z_size,
    n_stride, x_stride, y_stride, z_stride, out_n_stride, out_x_stride, out_y_stride, out_z_stride,
    ratio, scale_x, scale_y, scale_z,
    LINEAR: tl.constexpr, CORNERS: tl.constexpr, SAME: tl.constexpr, X_ZERO: tl.constexpr, OUT_ZERO: tl.constexpr,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, out_x, out_y, out_z, channel, mask = _voxel(
        rows, out_x_size, out_y_size, out_z_size, C, CHANNEL_BLOCKS, BLOCK_R, BLOCK_C
    )
    i, i2, part_x = _between(out_x, x_size, scale_x, LINEAR, CORNERS)
    j, j2, part_y = _between(out_y, y_size, scale_y, LINEAR, CORNERS)
    k, k2, part_z = _between(out_z, z_size, scale_z, LINEAR, CORNERS)
    if LINEAR:
        a = _line(x, n, i, j, k, k2, part_z, n_stride, x_stride, y_stride, z_stride, channel, mask, X_ZERO)
        b = _line(x, n, i, j2, k, k2, part_z, n_stride, x_stride, y_stride, z_stride, channel, mask, X_ZERO)
        near = _mixed(a, b, part_y)
        a = _line(x, n, i2, j, k, k2, part_z, n_stride, x_stride, y_stride, z_stride, channel, mask, X_ZERO)
        b = _line(x, n, i2, j2, k, k2, part_z, n_stride, x_stride, y_stride, z_stride, channel, mask, X_ZERO)
        v = _mixed(near, _mixed(a, b, part_y), part_x)
    else:
        there = x + _at(n, i, j, k, n_stride, x_stride, y_stride, z_stride) + channel[None, :]
        v = tl.load(there, mask=mask, other=0)
    if LINEAR:
        q = _stored(v * ratio, out.dtype.element_ty, OUT_ZERO)
    elif not SAME:
        q = _stored(as_float(v, X_ZERO) * ratio, out.dtype.element_ty, OUT_ZERO)
    else:
        q = v
    into = out + _at(n, out_x, out_y, out_z, out_n_stride, out_x_stride, out_y_stride, out_z_stride)
    tl.store(into + channel[None, :], q, mask=mask)


@triton.jit
def _halfway(a, b):
    """What lies a quarter and three quarters of the way from a to b."""
    way = b - a
    return tl.fma(way, 0.25, a), tl.fma(way, 0.75, a)


@triton.jit
def _four(x, along_x, y, y2, z, z2, channel, mask, ZERO: tl.constexpr):
    """The values at the corners of a square across the x axis."""
    there = x + along_x + channel[None, :]
    a = as_float(tl.load(there + y + z, mask=mask, other=0), ZERO)
    b = as_float(tl.load(there + y + z2, mask=mask, other=0), ZERO)
    c = as_float(tl.load(there + y2 + z, mask=mask, other=0), ZERO)
    d = as_float(tl.load(there + y2 + z2, mask=mask, other=0), ZERO)
    return a, b, c, d


@triton.jit
def _put_four(
    out, a, b, c, d, ratio, there, y_stride, z_stride, channel, mask, x_in, y_in, y2_in, z_in, z2_in,
    ZERO: tl.constexpr,
):  # fmt: skip
    """Store the values between the corners of a square: four voxels side by side along y and z."""
    top, top2 = _halfway(a, b)
    low, low2 = _halfway(c, d)
    v, v2 = _halfway(top, low)
    w, w2 = _halfway(top2, low2)
    dtype: tl.constexpr = out.dtype.element_ty
    into = out + there + channel[None, :]
    tl.store(into, _stored(v * ratio, dtype, ZERO), mask=mask & (x_in & y_in & z_in)[:, None])
    tl.store(into + z_stride, _stored(w * ratio, dtype, ZERO), mask=mask & (x_in & y_in & z2_in)[:, None])
    tl.store(into + y_stride, _stored(v2 * ratio, dtype, ZERO), mask=mask & (x_in & y2_in & z_in)[:, None])
    tl.store(into + y_stride + z_stride, _stored(w2 * ratio, dtype, ZERO), mask=mask & (x_in & y2_in & z2_in)[:, None])


@triton.jit
def _double(
    x, out, rows, x_size, y_size, z_size, out_x_size, out_y_size, out_z_size,
    n_stride, x_stride, y_stride, z_stride, out_n_stride, out_x_stride, out_y_stride, out_z_stride, ratio,
    X_ZERO: tl.constexpr, OUT_ZERO: tl.constexpr,
    C: tl.constexpr, CHANNEL_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, i, j, k, channel, mask = _voxel(rows, x_size + 1, y_size + 1, z_size + 1, C, CHANNEL_BLOCKS, BLOCK_R, BLOCK_C)
    along_n = _along(n, n_stride)
    x1 = along_n + _along(tl.maximum(i - 1, 0), x_stride)
    x2 = along_n + _along(tl.minimum(i, x_size - 1), x_stride)
    y1 = _along(tl.maximum(j - 1, 0), y_stride)
    y2 = _along(tl.minimum(j, y_size - 1), y_stride)
    z1 = _along(tl.maximum(k - 1, 0), z_stride)
    z2 = _along(tl.minimum(k, z_size - 1), z_stride)
    a, b, c, d = _four(x, x1, y1, y2, z1, z2, channel, mask, X_ZERO)
    e, f, g, h = _four(x, x2, y1, y2, z1, z2, channel, mask, X_ZERO)
    a, e = _halfway(a, e)
    b, f = _halfway(b, f)
    c, g = _halfway(c, g)
    d, h = _halfway(d, h)
    there = _at(n, 2 * i - 1, 2 * j - 1, 2 * k - 1, out_n_stride, out_x_stride, out_y_stride, out_z_stride)
    _put_four(
        out, a, b, c, d, ratio, there, out_y_stride, out_z_stride, channel, mask,
        i > 0, j > 0, j < y_size, k > 0, k < z_size, OUT_ZERO,
    )  # fmt: skip
    _put_four(
        out, e, f, g, h, ratio, there + out_x_stride, out_y_stride, out_z_stride, channel, mask,
        i < x_size, j > 0, j < y_size, k > 0, k < z_size, OUT_ZERO,
    )  # fmt: skip
