"""Arithmetic of strides: what a reshape, a transpose or a slice makes of a view, without a copy where none is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ptq3d.engines.triton.network import Shape
from ptq3d.engines.triton.steps import View

IMAGE_ORDER = (0, 2, 3, 4, 1)
WIDEST = 4096  # channels that axes may be joined to
LANES = 16  # values of an image that a thread moves at once, or in two


def canonical_order(rank: int) -> tuple[int, ...]:
    """The axes from the outermost in memory to the innermost: channels last of an image, as they are of anything else."""
    return IMAGE_ORDER if rank == 5 else tuple(range(rank))


def lanes(channels: int) -> int:
    """C, and what fills a row of an image up, so that rows start where a thread can move 16 bytes, or all of a shorter row."""
    return -(-channels // LANES) * LANES if channels > LANES else 1 << max(0, channels - 1).bit_length()


def row_of(shape: Shape, dtype: str, order: Sequence[int], *, filled: bool = False) -> int:
    """Values from one row of a new tensor to the next: `lanes` of an image with its channels last, no more than needed of others.

    Args:
        shape, dtype, order: of the tensor, the last axis of `order` innermost.
        filled: what makes the tensor writes whole lanes; without that, FP16 images have rows of no more than needed, too.
    """
    channels = shape[order[-1]] if shape else 1
    full = dtype == "int8" or (dtype == "fp16" and filled)
    return lanes(channels) if full and tuple(order) == IMAGE_ORDER else channels


def row_strides(shape: Shape, order: Sequence[int], row: int) -> tuple[int, ...]:
    """Strides of a tensor whose innermost axis, the last of `order`, takes `row` values."""
    strides, size = [1] * len(shape), row
    for axis in reversed(order[:-1]):
        strides[axis], size = size, size * shape[axis]
    return tuple(strides)


def order_of(view: View) -> tuple[int, ...]:
    """The axes of a view from the outermost in memory to the innermost; those of one value come first."""
    axes = range(len(view.shape))
    return tuple(sorted(axes, key=lambda axis: (view.shape[axis] != 1, -view.strides[axis], axis)))


def moved(view: View, move: Callable[[Tensor], Tensor]) -> View:
    """What a function of PyTorch that only changes strides makes of a view."""
    span = view.offset + 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    base = torch.empty(span, device="meta").as_strided(view.shape, view.strides, view.offset)
    seen = move(base)
    shape, strides = tuple(seen.shape), tuple(seen.stride())
    return replace(view, offset=int(seen.storage_offset()), shape=shape, strides=strides, spare=0)


def permuted(view: View, order: Sequence[int]) -> View:
    """Transposed; exact also where PyTorch would choose other strides."""
    shape, strides = (tuple(values[axis] for axis in order) for values in (view.shape, view.strides))
    return replace(view, shape=shape, strides=strides, spare=0)


def reshaped(view: View, shape: Shape) -> View | None:
    """The same values in another shape; None where that takes a copy."""
    if view.shape == shape:
        return view
    try:
        return moved(view, lambda values: values.view(shape))
    except RuntimeError:
        return None


def as_matrix(view: View, order: Sequence[int], inner: int = 1) -> View | None:
    """(rows, C): axes in that order, the last `inner` of them as channels; None where rows are not evenly spaced."""
    seen = permuted(view, order)
    cut = len(order) - inner
    shape = (math.prod(seen.shape[:cut]), math.prod(seen.shape[cut:]))
    matrix = reshaped(seen, shape) if inner == 1 or shape[1] <= WIDEST else None
    return matrix if matrix is not None and matrix.pitch is not None else None


def as_samples(view: View, order: Sequence[int]) -> View | None:
    """(N, rows, C): axes in that order, the first and the last for themselves; None where rows are not evenly spaced."""
    seen = permuted(view, order)
    cube = reshaped(seen, (seen.shape[0], math.prod(seen.shape[1:-1]), seen.shape[-1]))
    return cube if cube is not None and cube.pitch is not None else None


def as_voxels(view: View) -> View | None:
    """A tensor (..., C) as an image of single voxels (rows, C, 1, 1, 1); None where rows are not evenly spaced."""
    matrix = as_matrix(view, range(len(view.shape)))
    return None if matrix is None else matrix.as_rows()
