"""Convolve and Upsample steps as launches of the kernels, for one of several tilings."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ptq3d.engines.triton.arithmetic import kind_of, one_remainder
from ptq3d.engines.triton.convolution_kernels import convolve, convolve_lines
from ptq3d.engines.triton.packing import filled, first_sums, packed
from ptq3d.engines.triton.place import SLOTS, Launch, Place
from ptq3d.engines.triton.products import Product, Tile, columns_of, even, product_of, rows_of, run_of, span_of
from ptq3d.engines.triton.rows import pitch_of
from ptq3d.engines.triton.steps import Convolve, Epilogue, Triple, Upsample, View

LARGEST_INT32 = (1 << 31) - 1
PAD_BYTES = 1 << 18  # of zeros that stand beyond the border


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


def constants(step: Convolve | Upsample, product: Product, tile: Tile) -> tuple[Any, ...]:
    """The compile-time arguments of the kernel, without the epilogue's."""
    other = step.epilogue.other or step.out
    pitches = [pitch_of(view) for view in (step.x, step.out, other)]
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


def wide(step: Convolve | Upsample, product: Product) -> bool:
    """Whether int32 cannot count the values of a sample of some tensor of a step."""
    views = [
        (step.x, product.size, 1),
        (step.out, product.rows, product.copies),
        (step.epilogue.other, product.rows, product.copies),
    ]
    return any(view is not None and math.prod(size) * pitch_of(view) * by > LARGEST_INT32 for view, size, by in views)


def grid_of(step: Convolve | Upsample, product: Product, tile: Tile) -> Triple:
    """Programs for (rows, columns, samples)."""
    return -(-rows_of(product, tile) // tile.rows), columns_of(product, tile)[1] // tile.columns, step.x.shape[0]


def flattened(step: Convolve) -> Convolve:
    """A convolution with kernel and stride 1 on one long line, so that samples and lines need no tiles of their own."""
    if step.sums is not None or step.weight.shape[2:] != (1, 1, 1) or step.strides != (1, 1, 1) or any(step.pads):
        return step
    other = step.epilogue.other
    epilogue = replace(step.epilogue, other=None if other is None else _line(other))
    return replace(step, x=_line(step.x), out=_line(step.out), epilogue=epilogue)


def _line(view: View) -> View:
    pitch = pitch_of(view)
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
        None if one is None else place.constant(filled(one, 0, product.channels[1]))
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
