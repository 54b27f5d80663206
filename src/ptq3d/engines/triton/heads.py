"""Attention in one kernel: scores, mask, softmax and the second product without a score in memory."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from ptq3d.engines.triton.arithmetic import levels
from ptq3d.engines.triton.place import OWN_BLOCKS, Blocks, Launch, Launches, Place
from ptq3d.engines.triton.rows import power_of_two
from ptq3d.engines.triton.steps import Attend, Floats

QUERIES, KEYS = 64, 32  # of a program, and of one of its steps
MASK_ROW = 16  # values that a row of the mask is a multiple of, so that a thread loads 16 bytes


def prepare_attend(step: Attend, place: Place, *, blocks: Blocks = OWN_BLOCKS) -> Launches:
    """The launch of an attention.

    Args:
        step: its views are (B, H, tokens, C).
        place: of its values.
        blocks: "queries", "keys", "num_warps".

    Source: Dao et al. 2022, "FlashAttention", with float32 scores.
    """
    batch, heads, tokens, channels = step.query.shape
    queries = max(16, min(blocks.get("queries", QUERIES), power_of_two(tokens)))
    keys = max(16, min(blocks.get("keys", KEYS), power_of_two(step.key.shape[2])))
    mask = _mask(step.mask)
    arguments = {
        "out": place.view(step.out),
        "mask": place.view(step.out) if mask is None else place.constant(mask),
        **{name: place.view(getattr(step, name)) for name in ("query", "key", "value")},
        **{
            f"{name}_{axis}": getattr(step, name).strides[number] for name in NAMES for number, axis in enumerate("bht")
        },
        **{f"mask_{axis}": stride for axis, stride in zip("bht", _apart(mask), strict=True)},
        **{f"out_{axis}": stride for axis, stride in zip("bhtc", step.out.strides, strict=True)},
        "scale": float(step.scale),
        "out_step": float(step.out.step),
        "out_zero": step.out.zero,
        "heads": heads,
        "TOKENS": tokens,
        "READ": step.key.shape[2],
        "C": channels,
        "D": step.value.shape[3],
        "MASK_ROW": 0 if mask is None else mask.shape[-1],
        "INTEGERS": step.out.dtype == "int8",
        "QUERIES": queries,
        "KEYS": keys,
        "BLOCK_C": max(16, power_of_two(channels)),
        "BLOCK_D": max(16, power_of_two(step.value.shape[3])),
    }
    grid = -(-tokens // queries) * batch * heads  # along the axis that has room for any number
    return Launches((Launch(_attend, (grid,), arguments, blocks.get("num_warps", 4)),))


NAMES = ("query", "key", "value")


def _mask(mask: Floats | None) -> npt.NDArray[np.float16] | None:
    """A mask in FP16, its rows filled up to whole loads."""
    if mask is None:
        return None
    keys = mask.shape[-1]
    padded = np.zeros((*mask.shape[:-1], -(-keys // MASK_ROW) * MASK_ROW), np.float16)
    with np.errstate(over="ignore"):  # what lies below FP16 is minus infinity there
        padded[..., :keys] = mask
    return padded


def _apart(mask: npt.NDArray[np.float16] | None) -> tuple[int, ...]:
    """Values from one sample, head and row of a mask to the next: 0 where there is one for all."""
    if mask is None:
        return (0, 0, 0)
    return tuple(0 if size == 1 else math.prod(mask.shape[axis + 1 :]) for axis, size in enumerate(mask.shape[:3]))


@triton.jit(do_not_specialize=("out_zero",))
def _attend(
    query, key, value, mask, out, query_b, query_h, query_t, key_b, key_h, key_t, value_b, value_h, value_t,
    mask_b, mask_h, mask_t, out_b, out_h, out_t, out_c, scale, out_step, out_zero, heads,
    TOKENS: tl.constexpr, READ: tl.constexpr, C: tl.constexpr, D: tl.constexpr, MASK_ROW: tl.constexpr, INTEGERS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    row = (tl.program_id(0) % BLOCKS) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(0) // BLOCKS
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    ok = row < TOKENS
    here = query + b * query_b + h * query_h + row[:, None].to(tl.int64) * query_t + c[None, :]
    q = tl.load(here, mask=ok[:, None] & (c < C)[None, :], other=0.0)
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    mask += b * mask_b + h * mask_h
    most = tl.full((QUERIES,), -1e30, tl.float32)  # finite: minus infinity less itself is no number
    whole = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for start in tl.range(0, READ, KEYS):
        column = start + tl.arange(0, KEYS)
        there = column < READ
        at = column[:, None].to(tl.int64)
        k = tl.load(key + at * key_t + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        scores = tl.dot(q, k.T, out_dtype=tl.float32) * scale
        if MASK_ROW > 0:
            more = mask + row[:, None].to(tl.int64) * mask_t + column[None, :]
            scores += tl.load(more, mask=ok[:, None] & (column < MASK_ROW)[None, :], other=0.0).to(tl.float32)
        scores = tl.where(there[None, :], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        weight = tl.exp(scores - new[:, None])
        kept = tl.exp(most - new)
        whole = whole * kept + tl.sum(weight, axis=1)
        v = tl.load(value + at * value_t + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(weight.to(tl.float16), v, out_dtype=tl.float32)
        most = new
    mixed = mixed / whole[:, None]
    into = out + b * out_b + h * out_h + row[:, None].to(tl.int64) * out_t + d[None, :] * out_c
    if INTEGERS:
        mixed = levels(mixed, out_step, zero=out_zero)
    tl.store(into, mixed.to(out.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
