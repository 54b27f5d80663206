"""Laws of rounding: the layer's output errs less than with the nearest integers, whatever kind of layer it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import NETWORKS, Builder, windows
from ptq3d.graphs.files import load_graph
from ptq3d.graphs.layers import weight_value
from ptq3d.graphs.passes import simplify
from ptq3d.int8 import dequantize, quantize
from ptq3d.quantization import planning, rounding
from ptq3d.quantization.calibration import collect_ranges, watch
from ptq3d.quantization.targets import TARGETS

IMAGES = [window[None] for window in windows(2)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 12), st.floats(0, 0.99))
def test_the_output_errs_no_more_than_with_the_nearest_integers(seed: int, n: int, k: int, correlation: float) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(4 * n, n)) * np.sqrt(1 - correlation) + np.sqrt(correlation) * random.normal(
        size=(4 * n, 1)
    )
    weights = random.normal(size=(k, n))
    steps = np.abs(weights).max(1) / 127
    moment = rows.T @ rows / len(rows)

    def loss(levels: np.ndarray) -> float:
        error = levels * steps[:, None] - weights
        return float(np.einsum("ki,ij,kj->", error, moment, error))

    chosen = rounding.round_columns(weights, moment, steps)
    assert np.array_equal(chosen, np.rint(chosen))
    assert np.abs(chosen).max() <= 127
    assert np.abs(chosen * steps[:, None] - weights).max() <= 200 * steps.max()
    # greedy, hence not always better on a handful of weights; never much worse
    assert loss(chosen) <= 1.25 * loss(np.rint(weights / steps[:, None])) + 1e-12


def test_strongly_correlated_inputs_gain_most() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(2000, 1)) + 0.1 * random.normal(size=(2000, 64))
    weights = random.normal(size=(32, 64))
    steps, moment = np.abs(weights).max(1) / 127, rows.T @ rows / 2000

    def loss(levels: np.ndarray) -> float:
        error = levels * steps[:, None] - weights
        return float(np.einsum("ki,ij,kj->", error, moment, error))

    assert loss(rounding.round_columns(weights, moment, steps)) < 0.2 * loss(np.rint(weights / steps[:, None]))


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
    model = simplify(load_graph(b.save(tmp_path / "n.onnx", "logits", 3)))
    node = [node for node in model.graph if node.op_type == "Conv"][1]
    values = np.random.default_rng(0).normal(size=(1, 4, 8, 12, 10)).astype(np.float32)
    rows = rounding._patches(node, values, 50, np.random.default_rng(3))
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
    random, position = np.random.default_rng(3), []
    for size in whole.shape[1:]:
        position.append(random.integers(0, size, (50, 1))[:, 0])
    expected = whole[:, position[0], position[1], position[2]].T
    np.testing.assert_allclose(rows @ rounding.matrix_of(node, weight).T, expected, atol=1e-5)


def rounded(path: Path) -> tuple[ir.Model, ir.Model, planning.Plan, dict[str, rounding.Gram]]:
    """(FP32 model, the same with rounded weights, plan, what was seen)."""
    exact, model = simplify(load_graph(path)), simplify(load_graph(path))
    placement = planning.place(model, TARGETS["openvino"])
    grams = {
        str(node.name): rounding.Gram(node, 2)
        for node in model.graph
        if node.name in placement.layers and rounding.has_gram(node)
    }
    tensors = [name for group in placement.tensors for name in group]
    ranges = collect_ranges(model, tensors, IMAGES, method="mse", symmetric=False, grams=list(grams.values()))
    plan = planning.plan(model, placement, ranges, TARGETS["openvino"])
    rounding.round_weights(model, plan, grams, dict.fromkeys(grams, 0.0))
    return exact, model, plan, grams


@pytest.mark.parametrize("network", NETWORKS)
def test_each_layer_errs_less_than_with_the_nearest_weights(network: str, tmp_path: Path) -> None:
    exact, model, plan, grams = rounded(NETWORKS[network](tmp_path / "n.onnx"))
    before = {str(node.name): node for node in exact.graph}
    after = {str(node.name): node for node in model.graph}
    sources = [str(gram.node.inputs[0].name) for gram in grams.values()]
    seen = [{name: value.copy() for name, value in values.items()} for values in watch(exact, sources, IMAGES)]
    assert grams
    gained = []
    for name in grams:
        weight = weight_value(before[name])
        original = weight.const_value.numpy()
        nearest = dequantize(quantize(original, plan.weights[weight.name]), plan.weights[weight.name])
        rows = np.concatenate(
            [
                rounding._rows(before[name], values[str(before[name].inputs[0].name)], 2000, np.random.default_rng(1))
                for values in seen
            ]
        )

        def error(
            candidate: np.ndarray, name: str = name, rows: np.ndarray = rows, original: np.ndarray = original
        ) -> float:
            difference = rows @ rounding.matrix_of(before[name], candidate - original).T
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
        shift = rounding.matrix_of(node, new.inputs[1].const_value.numpy() - old.inputs[1].const_value.numpy())
        moved = new.inputs[2].const_value.numpy() - old.inputs[2].const_value.numpy()
        np.testing.assert_allclose(moved, -(shift @ grams[str(node.name)].mean()), atol=1e-6)


def test_grouped_convolutions_and_products_of_activations_are_left_to_the_nearest(tmp_path: Path) -> None:
    model = simplify(load_graph(NETWORKS["attention"](tmp_path / "n.onnx")))
    products = [node for node in model.graph if node.op_type == "MatMul" and weight_value(node) is None]
    assert products
    assert not any(rounding.has_gram(node) for node in products)


def test_memory_of_a_gram_does_not_grow_with_the_windows(tmp_path: Path) -> None:
    model = simplify(load_graph(NETWORKS["unet"](tmp_path / "n.onnx")))
    node = next(node for node in model.graph if node.op_type == "Conv")
    values = np.random.default_rng(0).normal(size=(1, 1, 8, 12, 10)).astype(np.float32)
    sizes = set()
    for number in (1, 30):
        gram = rounding.Gram(node, number)
        for _ in range(number):
            gram.see(values)
        sizes.add(sum(moment.nbytes for moment in gram.moments))
    assert len(sizes) == 1
