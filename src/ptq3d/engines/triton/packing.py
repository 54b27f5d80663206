"""Weights in the order in which the kernels of convolutions read them, and what sums begin with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ptq3d.engines.triton.products import Product, Tile, between, columns_of, product_of, run_of, span_of
from ptq3d.engines.triton.steps import Convolve, Upsample

Weights = npt.NDArray[Any]  # int8, or floats that are multiplied in FP16


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
        return filled(filled(weight, 0, outputs), 1, channels)[None]
    weight = filled(filled(weight, 0, channels), 1, outputs)
    return weight.transpose(2, 3, 4, 1, 0).reshape(product.copies, outputs, channels, 1, 1, 1)


def filled(values: npt.NDArray[Any], axis: int, size: int) -> npt.NDArray[Any]:
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
            at = offset if tile.mode == "tap" else place * product.strides[2] + offset * between(product, tile)
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
    wholes = filled(wholes, wholes.ndim - 1, product_of(step).channels[1])
    return np.ascontiguousarray(-step.x.zero * wholes, np.int32).reshape(-1)
