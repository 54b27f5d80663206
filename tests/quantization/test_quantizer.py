"""Laws of the whole recipe: each step can be left out, all of them together are worth it, every runtime agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from networks import NETWORKS, windows
from ptq3d.engines import get_backend
from ptq3d.errors import OptionError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import layers
from ptq3d.graphs.passes import is_quantized, simplify
from ptq3d.int8 import quantize
from ptq3d.options import QuantizeOptions
from ptq3d.quantization import equalization, planning, qdq, second_terms
from ptq3d.quantization.quantizer import Quantized, Recipe, quantize_graph
from ptq3d.quantization.rounding import Rounded
from ptq3d.quantization.targets import TARGETS
from ptq3d.quantizing import recipe_of
from quantizing import FAST, IMAGES, example, graph, observed_exactly, outputs, planned, run

CASES = [
    *((network, "openvino") for network in NETWORKS),
    *(("unet", target) for target in TARGETS if target != "openvino"),
]
TEST_IMAGES = [window[None] for window in windows(2, seed=8)]
PLAIN = Recipe(equalize=False, second_terms=0, rounding="nearest")
WITHOUT = (
    PLAIN,
    replace(PLAIN, calibration_method="max"),
    Recipe(equalize=False),
    Recipe(second_terms=0),
    Recipe(rounding="nearest"),
)


@pytest.fixture(autouse=True)
def every_layer_is_worth_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small networks of the tests hardly need it."""
    monkeypatch.setattr(second_terms, "WORTH", 0.0)
    monkeypatch.setattr(second_terms, "ENOUGH", 0.0)


@cache
def made(network: str, recipe: Recipe) -> Quantized:
    """Not to be changed."""
    return quantize_graph(*example(network, recipe.target), recipe)


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.parametrize(("network", "target"), CASES)
def test_the_input_model_is_left_as_it_is(network: str, target: str) -> None:
    before, recipe = serialized(example(network, target)[0]), Recipe(target, second_terms=1.0)
    first = serialized(made(network, recipe).model)
    assert serialized(example(network, target)[0]) == before
    assert first == serialized(
        quantize_graph(*example(network, target), recipe).model
    )  # nor does it change what was seen


def test_kept_layers_compose_with_every_step(tmp_path: Path) -> None:
    for target in TARGETS:
        result = made("unet", Recipe(target, keep=("convtranspose*", "conv_0"), second_terms=1.0))
        by_hand = {name for name, why in result.kept.items() if why == "kept by --keep"}
        assert by_hand == {"conv_0", next(name for name in result.kept if name.startswith("convtranspose"))}
        save_graph(result.model, tmp_path / "q.onnx")
        integer = qdq.integer_layers(simplify(load_graph(tmp_path / "q.onnx")))
        assert (
            integer
            == set(result.plan.layers)
            == {layer.name for layer in layers(example("unet")[0])} - set(result.kept)
        )
        assert not set(result.split) & by_hand


def test_with_nothing_but_ranges_it_is_a_plan_written(tmp_path: Path) -> None:
    for target in TARGETS:
        model, seen = graph(NETWORKS["unet"](tmp_path / "n.onnx")), example("unet", target)[1]
        plan = planned(model, target, seen=seen, method="mse")
        result = quantize_graph(model, seen, replace(PLAIN, target=target))
        assert result.plan.equals(plan)
        assert serialized(result.model) == serialized(qdq.write(model, plan))


@pytest.mark.parametrize("recipe", WITHOUT)
@pytest.mark.parametrize("network", ["unet", "meshnet"])
def test_each_step_can_be_left_out(network: str, recipe: Recipe, tmp_path: Path) -> None:
    model, result = example(network)[0], made(network, recipe)
    exact = outputs(model, tmp_path / "exact.onnx")
    found = outputs(result.model, tmp_path / "q.onnx")
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.02 * np.ptp(exact)
    operators = [node.op_type for node in result.model.graph]
    assert ("Floor" in operators) == bool(result.split)
    assert bool(result.split or result.kept) == (recipe.second_terms > 0)
    assert recipe.equalize or "Mul" not in [node.op_type for node in result.model.graph] or result.split
    original = {str(node.name): node.inputs[1].const_value.numpy() for node in model.graph if len(node.inputs) == 3}
    same = []
    for name in set(result.plan.layers) - set(result.split):
        node = next(node for node in result.model.graph if node.name == name)
        stored, step = (value.const_value.numpy() for value in node.inputs[1].producer().inputs)
        scale = next(s for w, s in result.plan.weights.items() if w == node.inputs[1].name.removesuffix("/dq"))
        assert np.array_equal(scale.step, step)
        same.append(np.array_equal(quantize(original[name], scale), stored))
    assert all(same) == (not recipe.equalize and recipe.rounding == "nearest")


@pytest.mark.parametrize("target", TARGETS)
def test_every_recipe_errs_less_than_none(target: str, tmp_path: Path) -> None:
    """On the geometric mean over the networks, mean squared errors of the logits of windows that calibration did not see."""
    gained = []
    for network in NETWORKS:
        exact = outputs(example(network, target)[0], tmp_path / "exact.onnx", images=TEST_IMAGES)
        errors = []
        for recipe in (Recipe(target), replace(PLAIN, target=target)):
            found = outputs(made(network, recipe).model, tmp_path / "q.onnx", images=TEST_IMAGES)
            errors.append(float(np.square(found - exact).mean()))
        gained.append(errors[0] / errors[1])
    assert np.exp(np.mean(np.log(gained))) < (0.5 if target == "openvino" else 0.85)


@pytest.mark.parametrize(("network", "target"), CASES)
def test_engines_agree_on_what_recipes_make(network: str, target: str, tmp_path: Path) -> None:
    require_agreement(network, Recipe(target), ("reference", "onnxruntime", "openvino"), tmp_path)


@pytest.mark.parametrize("network", ["unet", "meshnet"])
def test_engines_agree_on_second_terms(network: str, tmp_path: Path) -> None:
    require_agreement(network, Recipe(second_terms=1.0), ("reference", "openvino", "onnxruntime"), tmp_path)


def require_agreement(network: str, recipe: Recipe, engines: Sequence[str], folder: Path) -> None:
    """As in the laws of engines: apart by less than the INT8 error itself, the same labels but at ties."""
    save_graph(made(network, recipe).model, folder / "q.onnx")
    onnx.checker.check_model(str(folder / "q.onnx"), full_check=True)
    exact = outputs(example(network)[0], folder / "exact.onnx", images=TEST_IMAGES)
    available = [engine for engine in engines if get_backend(engine).unavailable() is None]
    wanted, *others = (run(engine, folder / "q.onnx", np.concatenate(TEST_IMAGES)) for engine in available)
    own_error = np.sqrt(np.mean((wanted - exact) ** 2))
    assert 0 < own_error < 0.02 * np.ptp(exact)
    for found in others:
        assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.5 * own_error
        assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.99


@pytest.mark.parametrize("network", ["unet", "meshnet", "resized"])
@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.rest == "fp16"])
def test_layers_are_mended_in_fp16_where_the_rest_is(network: str, target: str, tmp_path: Path) -> None:
    """They leave INT8, the file errs less, and engines agree on what it says."""
    recipe = recipe_of(QuantizeOptions(target=target))
    assert (recipe.high_precision_dtype, recipe.second_terms) == ("fp16", 0.4)
    assert not made(network, replace(recipe, high_precision_dtype="fp32")).mended
    mended = made(network, recipe)
    assert mended.mended
    assert not mended.split
    assert set(mended.mended) <= set(mended.kept)
    exact = outputs(example(network)[0], tmp_path / "exact.onnx", images=TEST_IMAGES)
    found, without = (
        outputs(made(network, one).model, tmp_path / "q.onnx", images=TEST_IMAGES, engine="reference")
        for one in (recipe, replace(recipe, second_terms=0.0))
    )
    assert np.square(found - exact).mean() < 0.9 * np.square(without - exact).mean()
    require_agreement(network, recipe, ("reference", "onnxruntime"), tmp_path)


@pytest.mark.parametrize(("network", "target"), CASES)
def test_what_recipes_make_is_read_back(network: str, target: str, tmp_path: Path) -> None:
    result = made(network, Recipe(target))
    save_graph(result.model, tmp_path / "q.onnx")
    written = simplify(load_graph(tmp_path / "q.onnx"))
    planned_layers = qdq.planned_layers(written)
    integer_macs = sum(layer.macs for layer in planned_layers if layer.precision == "int8")
    assert result.int8_mac_share == pytest.approx(integer_macs / sum(layer.macs for layer in planned_layers))
    assert result.int8_mac_share > 0.9 or network == "attention"
    model, plan = qdq.read(written)
    assert set(plan.layers) == set(result.plan.layers)
    assert len(plan.activations) == len(result.plan.activations)
    assert not is_quantized(model)
    again = outputs(qdq.write(model, plan), tmp_path / "again.onnx")
    wanted = run(FAST, tmp_path / "q.onnx", np.concatenate(IMAGES))
    # a value between two integers may fall to the other side where a step per channel became a multiplication
    assert np.sqrt(np.mean((again - wanted) ** 2)) < 2e-3 * np.ptp(wanted)


def folded(path: Path, target: str) -> tuple[planning.Plan, ir.Model]:
    """MeshNet with scaled channels behind ELU, where a multiplication stays, as that target's rules write its plan."""
    model = graph(NETWORKS["meshnet"](path))
    seen = observed_exactly(model)
    done = equalization.equalize(model, planning.place(model, TARGETS["openvino"]), seen.tensors)
    plan = planned(model, seen=seen.scaled(done.tensors, done.layers))
    return plan, qdq.write(model, replace(plan, target=target))


def test_a_step_for_each_channel_gives_the_integers_of_the_multiplication(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    integers: dict[str, list[np.ndarray]] = {}
    for target in ("openvino", "foreign"):
        _, model = folded(tmp_path / "n.onnx", target)
        operators = [node.op_type for node in model.graph]
        assert operators.count("Mul") == (0 if target == "openvino" else 2)
        quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear" and node.inputs[0].producer()]
        assert len(quantizers) == 2
        for node in quantizers:
            assert ("axis" in node.attributes) == (target == "openvino")
            model.graph.outputs.append(node.outputs[0])
        save_graph(model, tmp_path / "q.onnx")
        session = runtime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
        integers[target] = session.run(None, {"image": IMAGES[0]})[1:]
    for one, other in zip(integers["openvino"], integers["foreign"], strict=True):
        difference = np.abs(one.astype(int) - other.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
        assert len(np.unique(one)) > 100


def test_multiplications_are_free_for_openvino_and_left_out_for_triton() -> None:
    for target in TARGETS:
        result = made("meshnet", Recipe(target, second_terms=0))
        multiplied = [node for node in result.model.graph if node.op_type == "Mul"]
        assert bool(multiplied) == (TARGETS[target].factors and not TARGETS[target].channel_steps)
        read = {value.name for node in result.model.graph for value in node.inputs if value is not None}
        assert set(result.model.graph.initializers) <= read  # the factors went away, too


def test_steps_for_channels_mean_the_same_everywhere(tmp_path: Path) -> None:
    _, plain = folded(tmp_path / "n.onnx", "foreign")
    plan, model = folded(tmp_path / "n.onnx", "openvino")
    wanted = outputs(plain, tmp_path / "plain.onnx", engine="reference")
    save_graph(model, tmp_path / "q.onnx")
    for engine in ("reference", "openvino", "onnxruntime"):
        if get_backend(engine).unavailable() is not None:
            continue
        found = run(engine, tmp_path / "q.onnx", np.concatenate(IMAGES))
        assert np.sqrt(np.mean((found - wanted) ** 2)) < 5e-4 * np.ptp(wanted)
    _, read = qdq.read(simplify(load_graph(tmp_path / "q.onnx")))
    assert set(read.layers) == set(plan.layers)
    steps = sorted(float(scale.step) for scale in plan.activations.values())
    np.testing.assert_allclose(sorted(float(scale.step) for scale in read.activations.values()), steps, rtol=1e-6)
    assert read.weights.keys() == plan.weights.keys()
    assert all(scale.equals(plan.weights[name]) for name, scale in read.weights.items())


def test_the_command_line_and_the_library_mean_the_same_recipe() -> None:
    assert recipe_of(QuantizeOptions()) == Recipe()


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_known_from_another_recipe_are_those_that_would_be_found(network: str) -> None:
    """One store serves all recipes for a network: a layer whose grid or input differs is rounded anew."""
    model, seen = example(network)
    known = Rounded()
    name = next(layer.name for layer in layers(model))
    for recipe in (
        Recipe(),
        Recipe(second_terms=0),
        Recipe(calibration_method="max"),
        Recipe(equalize=False),
        Recipe(keep=(name,)),
    ):
        try:
            alone = quantize_graph(model, seen, recipe).model
        except OptionError:  # the only layer of its network cannot leave INT8
            continue
        assert serialized(quantize_graph(model, seen, recipe, known).model) == serialized(alone)
