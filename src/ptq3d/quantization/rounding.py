"""Weights rounded so that the layer's OUTPUT errs least, not each weight.

A layer multiplies rows x of its input (a patch for a convolution) with weights W. Rounding W to Q changes its output by
(Q - W) x, whose mean square is the quadratic form of Q - W with the Gram matrix H = E[x x^T]. Columns are rounded one after
the other; the error of each is taken up by those not rounded yet (GPTQ). H comes from calibration windows: a fixed number of
rows in all, so memory does not grow with the windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ptq3d.graphs.constants import constant_of, set_constant
from ptq3d.graphs.layers import weight_axis, weight_value
from ptq3d.int8 import LIMITS, Scale
from ptq3d.quantization.planning import Plan, input_step
from ptq3d.quantization.rows import Gram, matrix_of, weights_of

STRIDE = 32  # columns between two updates of the rest
DAMPING = 0.01
Matrix = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


class Rounded:
    """Integers that were found before, for recipes that differ in other layers only."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[npt.NDArray[np.int8], Gram]] = {}

    def levels(self, matrix: Floats, scale: Scale, gram: Gram, noise: float) -> npt.NDArray[np.int8]:
        """(K, columns) int8, from `round_columns` block by block.

        Args:
            matrix: (K, columns) float32 weights.
            scale: of them, one step or one for each of some rows.
            gram: of the rows that they multiply.
            noise: variance that quantization adds to every column.
        """
        key = hashlib.blake2b(repr((id(gram.moments), matrix.shape, noise)).encode())
        for part in (matrix, scale.step, gram.factors):
            key.update(np.ascontiguousarray(part).data)
        if key.digest() not in self._known:  # with the Gram, so that no other one gets its identity
            self._known[key.digest()] = _levels(matrix.astype(np.float64), scale, gram, noise), gram
        return self._known[key.digest()][0]


def round_weights(model: ir.Model, plan: Plan, grams: Mapping[str, Gram], rounded: Rounded | None = None) -> None:
    """Put weights that lie on the plan's INT8 grid, and biases that undo the mean error, into the FP32 graph.

    Args:
        model: the graph that was planned; changed in place.
        plan: its weights' scales.
        grams: layer -> what was seen of its input; other layers, and those that the plan keeps, are left alone. The input's
            own rounding counts as noise of variance step^2 / 12 on every column.
        rounded: of other recipes for this network, what is known of layers that are the same in both.

    Source: Frantar et al. 2023 (GPTQ); Nagel et al. 2019, section 4.2 (bias correction).
    """
    rounded = rounded or Rounded()
    for node in list(model.graph):
        name = str(node.name)
        weight = weight_value(node) if name in grams and name in plan.layers else None
        if weight is None or len(list(weight.uses())) != 1:
            continue
        exact, scale = constant_of(weight), plan.weights[str(weight.name)]
        matrix = matrix_of(node, exact)
        levels = rounded.levels(matrix, scale, grams[name], input_step(node, plan) ** 2 / 12)
        found = (levels * _steps(matrix, scale)[:, None]).astype(np.float32)
        _correct_bias(model, node, (found - matrix) @ grams[name].mean())
        set_constant(model, node, 1, weights_of(node, found, exact.shape), suffix="rounded")


def _levels(matrix: Matrix, scale: Scale, gram: Gram, noise: float) -> npt.NDArray[np.int8]:
    steps = _steps(matrix, scale)
    blocks = [
        round_columns(matrix[:, block], correlation, steps, noise=noise).astype(np.int8)
        for block, correlation in gram.correlations()
    ]
    return np.concatenate(blocks, axis=1)


def _steps(matrix: npt.NDArray[np.floating], scale: Scale) -> Matrix:
    """The step of each row, float64."""
    return np.repeat(scale.step.astype(np.float64), len(matrix) // scale.step.size)


def round_columns(matrix: Matrix, moment: npt.NDArray[np.floating], steps: Matrix, *, noise: float = 0.0) -> Matrix:
    """Integers Q that make the mean square of (Q * steps - W) x small.

    Args:
        matrix: (K, n) float64, W.
        moment: (n, n) E[x x^T], positive semidefinite.
        steps: (K,) the step of each row.
        noise: variance that quantization adds to every x.

    Returns:
        (K, n) whole numbers, -127..127, as float64.

    Source: Frantar et al. 2023, algorithm 1, columns in descending order of E[x^2].
    """
    energy = np.diag(moment).astype(np.float64) + noise
    order = np.argsort(-energy, kind="stable")
    padded = moment[np.ix_(order, order)].astype(np.float64)
    padded[np.diag_indices_from(padded)] += noise + DAMPING * max(float(energy.mean()), 1e-30)
    upper = _root_of_inverse(padded)
    upper /= np.diag(upper)[:, None].copy()
    lowest, highest = LIMITS["int8"]
    rest = np.ascontiguousarray((matrix[:, order] / steps[:, None]).T)  # (n, K): a column of W in one piece, in steps
    levels = np.empty_like(rest)
    for start in range(0, len(rest), STRIDE):
        stop = min(start + STRIDE, len(rest))
        errors = np.empty((stop - start, len(matrix)))
        for column in range(start, stop):
            levels[column] = np.clip(np.rint(rest[column]), lowest, highest)
            error = errors[column - start] = rest[column] - levels[column]
            rest[column + 1 : stop] -= upper[column, column + 1 : stop, None] * error
        rest[stop:] -= upper[start:stop, stop:].T @ errors
    result = np.empty_like(matrix)
    result[:, order] = levels.T
    return result


def _root_of_inverse(matrix: Matrix) -> Matrix:
    """Upper triangular U with U^T U = matrix^-1, for a positive definite matrix.

    The Cholesky factor of the matrix read backwards is R with matrix = R R^T, R upper triangular; U is its inverse. The inverse of
    the matrix is never made: it is slower, and not positive definite once the matrix is ill-conditioned.
    """
    backwards = torch.from_numpy(matrix).flip(0, 1)
    root = torch.linalg.cholesky(backwards).flip(0, 1)
    eye = torch.eye(len(matrix), dtype=torch.float64)
    upper: Matrix = torch.linalg.solve_triangular(root, eye, upper=True).numpy()
    return upper


def _correct_bias(model: ir.Model, node: ir.Node, shift: Matrix) -> None:
    """Take the mean error (rows of `matrix_of`) off the bias; a product without bias input keeps its shift."""
    if node.op_type == "MatMul":
        return
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    channels = constant_of(node.inputs[1]).shape[weight_axis(node)]
    mean = shift.reshape(channels, -1).mean(1)
    if bias is not None and bias.const_value is None:
        return
    current = np.zeros(channels, np.float32) if bias is None or bias.const_value is None else bias.const_value.numpy()
    if current.shape == (channels,):
        set_constant(model, node, 2, (current - mean).astype(np.float32), suffix="corrected")
