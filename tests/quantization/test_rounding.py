"""Laws of rounding: the layer's output errs less than with the nearest integers, whatever kind of layer it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import NETWORKS, Builder, windows
from ptq3d.graphs.layers import shape_of, weight_value
from ptq3d.int8 import dequantize, quantize
from ptq3d.quantization import planning, rounding, rows
from ptq3d.quantization.calibration import watch
from quantizing import graph, observed, planned

IMAGES = [window[None] for window in windows(2)]


def problem(seed: int, n: int, k: int, correlation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weights (k, n), second moments of correlated rows (n, n), steps (k,) that leave no weight to be clipped)."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(4 * n, n)) * np.sqrt(1 - correlation) + np.sqrt(correlation) * random.normal(
        size=(4 * n, 1)
    )
    weights = random.normal(size=(k, n))
    return weights, rows.T @ rows / len(rows), np.abs(weights).max(1) / 90


def losses(levels: np.ndarray, weights: np.ndarray, moment: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """(k,) mean square of what each row of weights adds to the output."""
    error = levels * steps[:, None] - weights
    return np.einsum("ki,ij,kj->k", error, moment, error)


PROBLEMS = (st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 12), st.floats(0, 0.99))


@settings(max_examples=25, deadline=None)
@given(*PROBLEMS)
def test_each_output_errs_at_most_by_half_a_step_of_what_the_later_columns_cannot_undo(
    seed: int, n: int, k: int, correlation: float
) -> None:
    """loss <= step^2 / 4 * sum_i v_i for every draw, v_i the variance of x_i that the columns rounded after it leave.

    That sum is at most the trace of the moments, with which the nearest integers may err.
    """
    weights, moment, steps = problem(seed, n, k, correlation)
    chosen = rounding.round_columns(weights, moment, steps)
    assert np.array_equal(chosen, np.rint(chosen))
    assert np.abs(chosen).max() <= 127
    damped = moment + rounding.DAMPING * np.diag(moment).mean() * np.eye(n)
    order = np.argsort(-np.diag(moment), kind="stable")
    left = [1 / np.linalg.inv(damped[np.ix_(order[i:], order[i:])])[0, 0] for i in range(n)]
    assert sum(left) <= np.trace(damped) * (1 + 1e-9)
    unclipped = np.abs(chosen).max(1) < 127
    assert unclipped.any()
    assert (losses(chosen, weights, damped, steps) <= steps**2 / 4 * sum(left) * (1 + 1e-9))[unclipped].all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.floats(0, 0.99))
def test_the_output_errs_no_more_than_with_the_nearest_integers(seed: int, n: int, correlation: float) -> None:
    """Over many rows of weights: the choice is greedy, so a single row may lose."""
    weights, moment, steps = problem(seed, n, 256, correlation)
    chosen, nearest = rounding.round_columns(weights, moment, steps), np.rint(weights / steps[:, None])
    gained = losses(chosen, weights, moment, steps).sum() / losses(nearest, weights, moment, steps).sum()
    assert gained <= (1.01 if n < 10 else 0.97)


def test_strongly_correlated_inputs_gain_most() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2000, 1)) + 0.1 * random.normal(size=(2000, 64))
    weights = random.normal(size=(32, 64))
    steps, moment = np.abs(weights).max(1) / 127, inputs.T @ inputs / 2000
    chosen, nearest = rounding.round_columns(weights, moment, steps), np.rint(weights / steps[:, None])
    assert losses(chosen, weights, moment, steps).sum() < 0.2 * losses(nearest, weights, moment, steps).sum()


def test_inputs_that_are_always_zero_round_to_the_nearest() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 5))
    steps = np.abs(weights).max(1) / 127
    chosen = rounding.round_columns(weights, np.zeros((5, 5)), steps)
    assert np.array_equal(chosen, np.rint(weights / steps[:, None]))


@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"dilation": 2}, {"kernel": 1}])
def test_patches_are_what_the_convolution_multiplies(settings: dict[str, int], tmp_path: Path) -> None:
    b = Builder(7)
    hidden = b.conv("image", 1, 4)
    x = b.conv(hidden, 4, 5, **settings)
    if settings.get("stride"):
        x = b.add("ConvTranspose", x, b.weight(5, 3, 2, 2, 2), strides=[2, 2, 2])
    else:
        x = b.add("Relu", b.conv(x, 5, 3, kernel=1))
    model = graph(b.save(tmp_path / "n.onnx", "logits", 3))
    node = [node for node in model.graph if node.op_type == "Conv"][1]
    values = np.random.default_rng(0).normal(size=(1, 4, 8, 12, 10)).astype(np.float32)
    places = np.stack([np.random.default_rng(3).integers(0, size, 50) for size in shape_of(node.outputs[0])[2:]])
    patches = rows._patches(node, values, places)
    weight = node.inputs[1].const_value.numpy()
    stride, dilation, kernel = (
        settings.get(name, value) for name, value in (("stride", 1), ("dilation", 1), ("kernel", 3))
    )
    whole = torch.nn.functional.conv3d(
        torch.from_numpy(values),
        torch.from_numpy(weight.copy()),
        stride=stride,
        dilation=dilation,
        padding=dilation * (kernel // 2),
    )[0].numpy()
    expected = whole[:, places[0], places[1], places[2]].T
    np.testing.assert_allclose(patches @ rows.matrix_of(node, weight).T, expected, atol=1e-5)


def rounded(path: Path) -> tuple[ir.Model, ir.Model, planning.Plan, Mapping[str, rows.Gram]]:
    """(FP32 model, the same with rounded weights, plan, what was seen)."""
    exact, model = graph(path), graph(path)
    seen = observed(model, images=IMAGES)
    plan = planned(model, seen=seen, method="mse")
    rounding.round_weights(model, plan, seen.layers)
    return exact, model, plan, seen.layers


def draw(sizes: Sequence[int], number: int) -> np.ndarray:
    """(axes, number) random positions."""
    return np.random.default_rng(1).integers(0, np.asarray(sizes)[:, None], (len(sizes), number))


@pytest.mark.parametrize("network", NETWORKS)
def test_each_layer_errs_less_than_with_the_nearest_weights(network: str, tmp_path: Path) -> None:
    exact, model, plan, grams = rounded(NETWORKS[network](tmp_path / "n.onnx"))
    before = {str(node.name): node for node in exact.graph}
    after = {str(node.name): node for node in model.graph}
    sources = [source for gram in grams.values() for source in gram.sources]
    seen = [{name: value.copy() for name, value in values.items()} for values in watch(exact, sources, IMAGES)]
    assert grams
    gained = []
    for name, gram in grams.items():
        weight = weight_value(before[name])
        original = weight.const_value.numpy()
        nearest = dequantize(quantize(original, plan.weights[weight.name]), plan.weights[weight.name])
        pieces = [[values[source] for source in gram.sources] for values in seen]
        inputs = np.concatenate([rows._rows(before[name], values, 2000, draw) for values in pieces])

        def error(
            candidate: np.ndarray, name: str = name, inputs: np.ndarray = inputs, original: np.ndarray = original
        ) -> float:
            difference = inputs @ rows.matrix_of(before[name], candidate - original).T
            return float(np.square(difference - difference.mean(0)).mean())

        gained.append((error(after[name].inputs[1].const_value.numpy()) + 1e-12) / (error(nearest) + 1e-12))
    assert np.exp(np.log(gained).mean()) < 0.95


@pytest.mark.parametrize("network", NETWORKS)
def test_rounded_weights_lie_on_the_grid_of_the_plan(network: str, tmp_path: Path) -> None:
    _, model, plan, grams = rounded(NETWORKS[network](tmp_path / "n.onnx"))
    for node in model.graph:
        if node.name in grams:
            weight = node.inputs[1]
            scale = plan.weights[str(weight.name)]
            values = weight.const_value.numpy()
            np.testing.assert_allclose(dequantize(quantize(values, scale), scale), values, rtol=1e-6, atol=1e-9)


def test_the_bias_takes_up_the_mean_error(tmp_path: Path) -> None:
    exact, model, _, grams = rounded(NETWORKS["meshnet"](tmp_path / "n.onnx"))
    before = {str(node.name): node for node in exact.graph}
    for node in model.graph:
        if node.name not in grams:
            continue
        old, new = before[str(node.name)], node
        shift = rows.matrix_of(node, new.inputs[1].const_value.numpy() - old.inputs[1].const_value.numpy())
        moved = new.inputs[2].const_value.numpy() - old.inputs[2].const_value.numpy()
        np.testing.assert_allclose(moved, -(shift @ grams[str(node.name)].mean()), atol=1e-6)


def test_grouped_convolutions_and_products_of_activations_are_left_to_the_nearest(tmp_path: Path) -> None:
    model = graph(NETWORKS["attention"](tmp_path / "n.onnx"))
    products = [node for node in model.graph if node.op_type == "MatMul" and weight_value(node) is None]
    assert products
    assert not any(rows.has_rows(node) for node in products)


def whole(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view keeps alive."""
    return array if array.base is None else whole(array.base)


def test_memory_of_a_gram_does_not_grow_with_the_windows(tmp_path: Path) -> None:
    model = graph(NETWORKS["unet"](tmp_path / "n.onnx"))
    node = next(node for node in model.graph if node.op_type == "Conv")
    values = np.random.default_rng(0).normal(size=(1, 1, 8, 12, 10)).astype(np.float32)
    sizes = []
    for number in (1, 4, 30):
        gram = rows.Gram.empty(node, number)
        for _ in range(number):
            gram.see([values], draw)
        assert gram.number >= min(rows.ROWS, number * 8 * 12 * 10)
        assert len(gram.some_rows()) >= rows.KEPT
        sizes.append(sum(whole(array).nbytes for array in (*gram.moments, *gram.sample)))
    assert max(sizes) < 1.25 * min(sizes)  # a window keeps a whole number of its rows


def test_a_wide_layer_keeps_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph(NETWORKS["unet"](tmp_path / "n.onnx"))
    node = next(node for node in model.graph if node.op_type == "Conv")
    values = np.random.default_rng(0).normal(size=(1, 1, 8, 12, 10)).astype(np.float32)
    monkeypatch.setattr(rows, "KEPT_VALUES", 100 * 27)
    gram = rows.Gram.empty(node, 3)
    for _ in range(3):
        gram.see([values], draw)
    assert gram.some_rows().shape == (100, 27)
    assert sum(whole(some).nbytes for some in gram.sample) == gram.some_rows().nbytes
    assert gram.number == 3 * 8 * 12 * 10  # each position once: there are no more


def test_moments_that_rounding_made_asymmetric_are_taken() -> None:
    """Sums in float32 differ by their last bits across the diagonal; an explicit inverse makes ten million times as much of it."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(400, 3)) @ random.normal(size=(3, 300)) + 1e-3 * random.normal(size=(400, 300))
    rows[:, 100:] *= 1e-3
    exact = rows.T @ rows / len(rows)
    skewed = exact + np.triu(random.normal(size=exact.shape), 1) * np.finfo(np.float32).eps * 64
    matrix, steps = random.normal(size=(5, 300)), np.full(5, 0.02)
    levels = rounding.round_columns(matrix, skewed, steps, noise=1e-9)
    nearest = np.clip(np.rint(matrix / steps[:, None]), -127, 127)

    def loss(found: np.ndarray) -> float:
        return float((((found * steps[:, None] - matrix) @ rows.T) ** 2).sum())

    assert loss(levels) < 0.2 * loss(nearest)
