"""Laws of second terms: exact in floating point, worth their price in 8 bits, never dearer than allowed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import NETWORKS, Builder
from ptq3d.graphs.constants import constant_of, set_constant
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import layers, parameter_count
from ptq3d.graphs.passes import simplify
from ptq3d.int8 import Scale, dequantize, quantize, scale_of_weight
from ptq3d.quantization import planning, qdq, quantizer, second_terms
from ptq3d.quantization.calibration import watch
from ptq3d.quantization.observation import Observations, TensorSeen
from ptq3d.quantization.quantizer import Recipe, quantize_graph
from ptq3d.quantization.second_terms import Noise
from ptq3d.quantization.targets import TARGETS
from quantizing import IMAGES, example, graph, observed_exactly, outputs, planned

IN_FRONT = {"image": "image", "Conv": "conv_0_out"} | {op: f"{op.lower()}_1_out" for op in ("Relu", "LeakyRelu", "Elu")}
PRICES = TARGETS["openvino"].mending
assert PRICES is not None
MACS = sum(layer.macs for layer in layers(example("unet")[0]))
WORK, WEIGHTS = second_terms.work(example("unet")[0], PRICES), parameter_count(example("unet")[0])


@pytest.fixture(autouse=True)
def every_noise_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small networks of the tests hardly need mending."""
    monkeypatch.setattr(second_terms, "ENOUGH", 0.0)
    monkeypatch.setattr(second_terms, "WORTH", 0.0)


def test_a_network_that_errs_little_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = [Noise(f"layer{index}", "t", 0.001**2, 1, 1, 1.0, 1.0) for index in range(9)]
    assert second_terms.choose(quiet, example("unet")[0], PRICES) != second_terms.Mended()
    monkeypatch.setattr(second_terms, "ENOUGH", 0.004**2)
    assert second_terms.choose(quiet, example("unet")[0], PRICES) == second_terms.Mended()


def test_a_layer_that_buys_less_than_its_work_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is room for it: its share of the noise must be WORTH times its share of what may be spent."""
    model = example("unet")[0]
    found = [Noise("good", "a", 0.7, 1, 1, 0.1 * WORK, WORK), Noise("poor", "b", 0.3, 1, 1, 0.1 * WORK, WORK)]
    both, good = ["good", "poor"], ["good"]
    for cost, chosen in ((0.25, {0.7: both, 0.8: good, 1.8: []}), (0.5, {0.8: both, 1.4: both, 1.6: good, 3.6: []})):
        for worth, split in chosen.items():
            monkeypatch.setattr(second_terms, "WORTH", worth)
            assert [layer.layer for layer in second_terms.choose(found, model, PRICES, cost=cost).split] == split


@pytest.fixture(scope="module")
def unet() -> ir.Model:
    return example("unet")[0]


def network(path: Path, in_front: str) -> Path:
    """`x`, which is split, is the image or comes out of a convolution or an activation; a concat reads it, too."""
    b = Builder(12)
    if in_front == "image":
        x, channels = "image", 1
    else:
        x, channels = b.conv("image", 1, 5), 5
        x = x if in_front == "Conv" else b.add(in_front, x)
    y = b.add("Relu", b.conv(x, channels, 6))
    z = b.add("Relu", b.conv(x, channels, 4, dilation=2))
    b.conv(b.add("Concat", x, y, z, axis=1), channels + 10, 3, kernel=1)
    return b.save(path, "logits", 3)


def split(
    path: Path, in_front: str, *, symmetric: bool
) -> tuple[ir.Model, Observations, list[Noise], dict[str, Scale]]:
    """(graph after the split, what was seen, the split layers, scales of the terms)."""
    model = graph(network(path, in_front))
    seen = observed_exactly(model)
    plan = planned(model, "tensorrt" if symmetric else "openvino", seen=seen)
    chosen = [noise for noise in second_terms.noises(model, plan, seen, PRICES) if noise.tensor == IN_FRONT[in_front]]
    chosen = chosen[:1] if in_front == "LeakyRelu" else chosen  # the other reader goes on with one term
    return model, seen, chosen, second_terms.split(model, chosen, seen, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("in_front", IN_FRONT)
def test_floating_point_outputs_stay_the_same(in_front: str, symmetric: bool, tmp_path: Path) -> None:
    before = outputs(graph(network(tmp_path / "n.onnx", in_front)), tmp_path / "a.onnx")
    model, _, chosen, _ = split(tmp_path / "n.onnx", in_front, symmetric=symmetric)
    assert chosen
    nodes = {str(node.name): node for node in model.graph}
    assert all(nodes[layer.layer].inputs[0].producer().op_type == "Concat" for layer in chosen)
    assert sum(node.op_type == "Floor" for node in model.graph) == 1
    after = outputs(model, tmp_path / "b.onnx")
    assert np.abs(after - before).max() <= 1e-5 * np.ptp(before)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("in_front", IN_FRONT)
def test_both_terms_lie_on_one_scale_that_clips_neither(in_front: str, symmetric: bool, tmp_path: Path) -> None:
    """h is a whole number of steps, so that 8 bits hold it exactly; r lies between 0 and K steps."""
    model, _, chosen, scales = split(tmp_path / "n.onnx", in_front, symmetric=symmetric)
    h, r = second_terms._names(chosen[0].tensor)
    scale = scales[h]
    assert scale.equals(scales[r])
    assert scale.dtype == ("int8" if symmetric else "uint8")
    step = float(scale.step)
    for values in watch(model, [h, r], IMAGES):
        np.testing.assert_allclose(dequantize(quantize(values[h], scale), scale), values[h], atol=1e-3 * step, rtol=0)
        assert -1e-3 * step <= values[r].min()
        assert values[r].max() <= second_terms.K * step * (1 + 1e-3)
        assert np.abs(dequantize(quantize(values[r], scale), scale) - values[r]).max() <= 0.501 * step


@pytest.mark.parametrize("in_front", ["image", "Elu"])
def test_the_terms_rows_are_those_of_the_split_graph(in_front: str, tmp_path: Path) -> None:
    """No second pass: rows and means of [h, r] follow from those of x."""
    model, seen, chosen, scales = split(tmp_path / "n.onnx", in_front, symmetric=False)
    found = second_terms.split_rows(seen, chosen, scales)
    placement = planning.place(model, TARGETS["openvino"])
    again = observed_exactly(model, placement=placement)
    for layer in chosen:
        rows, number = found.layers[layer.layer].some_rows(), second_terms.K
        first, second = np.split(rows, 2, 1)
        np.testing.assert_allclose(first + second / number, seen.layers[layer.layer].some_rows(), atol=1e-5)
        spread = np.abs(again.layers[layer.layer].some_rows()).max(0)
        mean, wanted = found.layers[layer.layer].mean(), again.layers[layer.layer].mean()
        assert mean.shape == wanted.shape
        assert np.abs(mean - wanted).max() <= 0.15 * spread.max()
    untouched = set(seen.layers) - {layer.layer for layer in chosen}
    assert all(found.layers[name] is seen.layers[name] for name in untouched)


def error(model: ir.Model, seen: Observations, recipe: Recipe, folder: Path) -> float:
    exact = outputs(model, folder / "exact.onnx")
    made = quantize_graph(model, seen, recipe)
    return float(np.square(outputs(made.model, folder / "q.onnx") - exact).mean())


def test_two_terms_err_several_times_less_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weights lie on their grid, so that only activations err, and every layer is split."""
    target = replace(TARGETS["openvino"], mending=replace(PRICES, float_share=0.0))
    monkeypatch.setattr(quantizer, "get_target", lambda _: target)
    model = graph(NETWORKS["meshnet"](tmp_path / "n.onnx"))
    for node in model.graph:
        if node.op_type == "Conv":
            weight = constant_of(node.inputs[1])
            scale = scale_of_weight(weight, 0)
            set_constant(model, node, 1, dequantize(quantize(weight, scale), scale), suffix="grid")
    seen = observed_exactly(model)
    one, two = (Recipe(equalize=False, second_terms=cost, calibration_method="max") for cost in (0, 100))
    assert set(quantize_graph(model, seen, two).split) == {"conv_0", "conv_2", "conv_4"}
    assert error(model, seen, two, tmp_path) < error(model, seen, one, tmp_path) / 10


@pytest.mark.parametrize("network", ["unet", "meshnet", "resized"])
def test_the_usual_price_buys_something(network: str, tmp_path: Path) -> None:
    model, seen = example(network)
    assert error(model, seen, Recipe(), tmp_path) < error(model, seen, Recipe(second_terms=0), tmp_path)


@st.composite
def noisy_layers(draw: st.DrawFn) -> list[Noise]:
    """Layers of the network MACS, WEIGHTS, WORK, with any noise and price."""
    share = st.floats(1e-4, 0.3)
    return [
        Noise(
            f"layer{i}",
            f"tensor{i}",
            draw(st.floats(1e-6, 1)),
            int(draw(share) * MACS),
            int(draw(share) * WEIGHTS) + 1,
            draw(share) * WORK,
            draw(share) * WORK,
        )
        for i in range(draw(st.integers(1, 8)))
    ]


@settings(max_examples=100, deadline=None)
@given(noisy_layers(), st.floats(0.01, 0.5))
def test_the_choice_keeps_to_its_price_and_takes_the_best_first(found: list[Noise], cost: float) -> None:
    """Two budgets, work and bytes: what is left out is not noisy enough, or what was worthier left no room for it."""
    chosen = second_terms.choose(found, example("unet")[0], PRICES, cost=cost)
    room = np.array([cost * WORK, PRICES.weights * WEIGHTS + second_terms.BYTES])
    two_terms = {noise.layer: np.array([noise.split_work, noise.weights]) / room for noise in found}
    floats = {noise.layer: np.array([noise.float_work, 3 * noise.weights]) / room for noise in found}
    spent = {noise.layer: two_terms[noise.layer] for noise in chosen.split}
    spent |= {noise.layer: floats[noise.layer] for noise in chosen.floating}
    assert len(spent) == len(chosen.split) + len(chosen.floating)
    assert (sum(spent.values(), np.zeros(2)) <= 1 + 1e-9).all()
    assert sum(noise.macs for noise in chosen.floating) <= PRICES.float_share * MACS
    least = second_terms.NEEDED * sum(noise.noise for noise in found)
    worth = {noise.layer: noise.noise / min(two_terms[noise.layer].sum(), floats[noise.layer].sum()) for noise in found}
    for noise in found:
        if noise.layer in spent:
            assert noise.noise >= least
            continue
        worthier = sum((price for name, price in spent.items() if worth[name] >= worth[noise.layer]), np.zeros(2))
        dearer = np.maximum(two_terms[noise.layer], floats[noise.layer])
        assert noise.noise < least or (worthier + dearer > 1 - 1e-9).any()


def test_nothing_is_chosen_for_next_to_no_price(unet: ir.Model) -> None:
    seen = observed_exactly(unet)
    found = second_terms.noises(unet, planned(unet, seen=seen), seen, PRICES)
    assert found
    assert second_terms.choose(found, unet, PRICES, cost=1e-9) == second_terms.Mended()


def test_noise_is_what_8_bits_do_to_the_output_of_a_layer(unet: ir.Model) -> None:
    """Of uniform rounding errors, step^2 / 12 times the squares of the weights: the estimate is a mean over sampled rows."""
    seen = observed_exactly(unet)
    plan = planned(unet, seen=seen)
    nodes = {str(node.name): node for node in unet.graph}
    for noise in second_terms.noises(unet, plan, seen, PRICES):
        weight = nodes[noise.layer].inputs[1].const_value.numpy()
        output = str(nodes[noise.layer].outputs[0].name)
        (values,) = watch(unet, [noise.tensor, output], IMAGES[:1])
        rounding = float(plan.activations[noise.tensor].step) ** 2 / 12 * float(np.square(weight).sum())
        signal = float(values[output][0].reshape(len(weight), -1).var(1).sum())
        expected = rounding * float((values[noise.tensor] != 0).mean()) / signal  # zeros are exact
        assert 1 / 3 < noise.noise / expected < 3


@pytest.mark.parametrize("name", ["unet", "meshnet", "attention"])
def test_layers_too_thin_for_two_terms_are_float_in_the_graph(name: str, tmp_path: Path) -> None:
    model, seen = example(name)
    made = quantize_graph(model, seen, Recipe(second_terms=0.5))
    save_graph(made.model, tmp_path / "q.onnx")
    integer = qdq.integer_layers(simplify(load_graph(tmp_path / "q.onnx")))
    assert made.kept
    assert set(made.kept.values()) == {"too sensitive for 8 bits"}
    assert integer == {layer.name for layer in layers(model)} - set(made.kept)
    assert set(made.split) <= integer


@pytest.mark.parametrize(("low", "high"), [(-10, 0.1), (-1, 0), (-1, 0.2), (0, 1)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_second_term_is_never_clipped(low: float, high: float, symmetric: bool) -> None:
    seen = TensorSeen(np.float32([low]), np.float32([high]), np.zeros((1, 1), np.float32))
    scale = second_terms._scale(seen, symmetric=symmetric)
    r = np.linspace(0, second_terms.K * float(scale.step), 50, dtype=np.float32)
    assert np.abs(dequantize(quantize(r, scale), scale) - r).max() <= 0.51 * scale.step


@pytest.mark.parametrize("target", ["tensorrt", "triton"])
def test_where_two_terms_are_never_worth_it_layers_leave_int8(target: str, tmp_path: Path) -> None:
    """Also those that read a concat, which second terms cannot be made of; within their share, and nothing is split."""
    model = graph(NETWORKS["unet"](tmp_path / "n.onnx"))
    prices = TARGETS[target].mending
    assert prices is not None
    assert prices.terms is None
    seen = observed_exactly(model, placement=planning.place(model, TARGETS[target]))
    plan = planned(model, target, seen=seen)
    found = second_terms.noises(model, plan, seen, prices)
    read = {node.name: node.inputs[0].producer() for node in model.graph if node.op_type == "Conv"}
    joined = {name for name, maker in read.items() if maker is not None and maker.op_type == "Concat"}
    assert joined & {noise.layer for noise in found}
    chosen = second_terms.choose(found, model, prices, cost=100, integers=len(plan.layers))
    assert chosen.floating
    assert not chosen.split
    assert sum(noise.macs for noise in chosen.floating) <= prices.float_share * sum(one.macs for one in layers(model))


def test_floating_point_costs_its_multiplications_and_what_it_reads(unet: ir.Model) -> None:
    """An image is no INT8 tensor to begin with."""
    seen = observed_exactly(unet, placement=planning.place(unet, TARGETS["triton"]))
    plan = planned(unet, "triton", seen=seen)
    prices = replace(PRICES, float_mac=3.0, float_value=50.0, terms=None)
    found = {noise.layer: noise for noise in second_terms.noises(unet, plan, seen, prices)}
    voxels = 8 * 12 * 10
    assert found["conv_0"].float_work == 3 * found["conv_0"].macs
    assert found["conv_7"].float_work == 3 * found["conv_7"].macs + 50 * 14 * voxels
