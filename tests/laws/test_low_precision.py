"""Files whose floating-point rest is FP16 or BF16 by its own types: their graphs, their steps, and the engines that run them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from networks import NETWORKS, Builder, windows
from ptq3d.cli import main
from ptq3d.engines import BACKENDS, load_backend
from ptq3d.errors import CalibrationError, EngineError, GraphError, UnavailableError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.low_precision import full_precision, low_precision, low_type
from ptq3d.graphs.passes import QDQ, simplify
from ptq3d.graphs.split_head import head_layer_of, split_head
from ptq3d.int8 import LEAST_HALF, Scale
from ptq3d.manifest import embedded
from ptq3d.quantization import planning, qdq, second_terms
from ptq3d.quantization.quantizer import Quantized, Recipe, quantize_graph
from ptq3d.quantization.retargeting import retarget
from ptq3d.quantization.targets import TARGETS
from quantizing import example, graph, planned, run

Kind = Literal["fp16", "bf16"]
KINDS: tuple[Kind, ...] = ("fp16", "bf16")
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
X = windows(3, seed=8)
IN_FLOAT = {"InstanceNormalization", "LayerNormalization", "Cast"}
Floats = np.ndarray


@cache
def quantized(network: str, target: str, kind: Literal["fp32", "fp16", "bf16"]) -> Quantized:
    model, seen = example(network, target)
    return quantize_graph(model, seen, Recipe(target=target, high_precision_dtype=kind, second_terms=0))


def answer(model: ir.Model, path: Path, engine: str = "reference", x: Floats = X) -> Floats:
    save_graph(model, path)
    return run(engine, path, x)


@cache
def typed(network: str, source: str, kind: Literal["fp32", "fp16", "bf16"]) -> tuple[ir.Model, Floats]:
    """A network as it is ("fp32") or quantized for a target, its rest of a type, and what the reference engine answers."""
    if source == "fp32":
        model = example(network)[0].clone()
        if kind != "fp32":
            low_precision(model, kind)
    else:
        model = quantized(network, source, kind).model
    with TemporaryDirectory() as folder:
        return model, answer(model, Path(folder) / "m.onnx")


def error(found: Floats, truth: Floats) -> float:
    """Root mean square, over the span of the truth."""
    return float(np.sqrt(np.mean((found - truth) ** 2)) / np.ptp(truth))


def in_kind(values: Floats, kind: Kind) -> Floats:
    rounded: Floats = torch.from_numpy(np.array(values)).to(TORCH[kind]).float().numpy()
    return rounded


@given(st.floats(2.0**-126, 500, width=32, exclude_min=True), st.sampled_from(KINDS))
def test_a_step_becomes_the_least_number_of_the_type_that_is_no_smaller(step: float, kind: Kind) -> None:
    exact = np.asarray(step, np.float32)
    found = Scale(exact, np.asarray(0, np.int32), "int8").in_type(kind).step
    assert found.shape == ()
    assert found >= exact
    np.testing.assert_array_equal(in_kind(found, kind), found)
    if kind == "fp16" and step <= LEAST_HALF:
        assert found == LEAST_HALF
        return
    below = np.nextafter(torch.tensor(found).to(TORCH[kind]).float().numpy() * (1 - 2.0**-5), np.float32(0))
    between = torch.from_numpy(np.linspace(below, found, 2000, dtype=np.float32)).to(TORCH[kind]).float().numpy()
    assert not np.any((between >= exact) & (between < found))
    assert (found - exact) / exact <= (1 / 16 if kind == "fp16" else 2.0**-7)


def test_steps_of_fp32_stay() -> None:
    scale = Scale(np.asarray(0.1, np.float32), np.asarray(0, np.int32), "int8")
    assert scale.in_type("fp32") is scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["fp32", *TARGETS])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_tensor_has_its_type(network: str, source: str, kind: Kind, tmp_path: Path) -> None:
    """Nothing is float32 but input, output, normalizations and what ONNX has no other type for; steps are those of the plan."""
    model, _ = typed(network, source, kind)
    save_graph(model, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [ir.DataType.FLOAT] * 2
    for node in model.graph:
        types = [value.dtype for value in node.inputs if value is not None]
        floats = {
            one for one in (*types, *(value.dtype for value in node.outputs)) if one in (ir.DataType.FLOAT, LOW[kind])
        }
        if node.op_type == "Resize":
            assert node.inputs[2] is not None
            assert (types[0], node.inputs[2].dtype, node.outputs[0].dtype) == (LOW[kind], ir.DataType.FLOAT, LOW[kind])
        elif node.op_type == "Cast":
            assert floats == {ir.DataType.FLOAT, LOW[kind]}
        elif node.op_type in IN_FLOAT:
            assert floats == {ir.DataType.FLOAT}
        elif any(value.dtype in (ir.DataType.FLOAT, LOW[kind]) for value in node.outputs) or node.op_type in QDQ:
            assert floats == {LOW[kind]}
    if source == "fp32":
        return
    plan = quantized(network, source, kind).plan
    for name, scale in plan.weights.items():
        stored = next(
            value for key, value in model.graph.initializers.items() if key in (f"{name}/step", f"{name}/patches/step")
        )
        assert stored.const_value is not None
        assert set(stored.const_value.numpy().astype(np.float32).ravel()) == set(scale.step.ravel())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_with_the_steps_of_the_file(kind: Kind) -> None:
    model, seen = example("unet", "openvino")
    made = quantize_graph(
        model, seen, Recipe(equalize=False, rounding="nearest", second_terms=0, high_precision_dtype=kind)
    )
    assert low_type(model) is None  # the graph that was given is left as it is
    for name, scale in made.plan.weights.items():
        weight, stored = (
            model.graph.initializers[name].const_value,
            made.model.graph.initializers[f"{name}/q"].const_value,
        )
        assert weight is not None
        assert stored is not None
        wanted = np.clip(np.rint(weight.numpy() / scale.broadcast(weight.numpy().ndim)[0]), -127, 127)
        np.testing.assert_array_equal(stored.numpy(), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_file_errs_little_more_than_with_an_fp32_rest(network: str, target: str, kind: Kind) -> None:
    """FP16 has eight times finer steps than 8 bits, BF16 steps of their size."""
    (_, truth), (_, base), (_, found) = (
        typed(network, *of) for of in (("fp32", "fp32"), (target, "fp32"), (target, kind))
    )
    assert error(found, truth) < {"fp16": 1.1, "bf16": 2.2}[kind] * error(base, truth)
    assert (found.argmax(1) == base.argmax(1)).mean() > {"fp16": 0.985, "bf16": 0.97}[kind]


@pytest.mark.parametrize("network", NETWORKS)
def test_fp16_alone_errs_less_than_int8(network: str) -> None:
    (_, truth), (_, int8), (_, fp16) = (
        typed(network, *of) for of in (("fp32", "fp32"), ("tensorrt", "fp32"), ("fp32", "fp16"))
    )
    assert 0 < error(fp16, truth) < 0.5 * error(int8, truth)
    np.testing.assert_array_equal(fp16, in_kind(fp16, "fp16"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["fp32", "tensorrt", "openvino", "onnxruntime"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "inductor")])
def test_engines_run_such_files(backend: str, source: str, kind: Kind, tmp_path: Path) -> None:
    """Apart by less than what the types err themselves: a rounded value may fall on the other side of a step of INT8."""
    reason = load_backend(backend).unavailable()
    if reason is not None:
        pytest.skip(reason)
    for network in NETWORKS:
        _, truth = typed(network, "fp32", "fp32")
        model, wanted = typed(network, source, kind)
        path = tmp_path / f"{network}.onnx"
        save_graph(model, path)
        if (backend, source, network) == ("openvino", "onnxruntime", "rolled"):
            with pytest.raises(EngineError, match="padded AveragePool"):
                run(backend, path, X)
            continue
        if backend == "triton" and any("/channels" in node.name for node in model.graph):  # a step for each channel
            assert source == "openvino"
            with pytest.raises(EngineError, match=r"is not int8 or uint8 with one step.*--retarget triton"):
                run(backend, path, X)
            continue
        try:
            found = run(backend, path, X)
        except UnavailableError as refused:
            assert (backend, kind) == ("onnxruntime", "bf16")
            pytest.skip(str(refused))
        assert found.dtype == np.float32
        assert error(found, wanted) < 1.5 * error(wanted, truth)
        assert (found.argmax(1) == wanted.argmax(1)).mean() > {"fp16": 0.985, "bf16": 0.97}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_rounds_every_answer(kind: Kind, tmp_path: Path) -> None:
    """Each node in float32, from rounded values, to rounded values: held against PyTorch's own types."""
    b = Builder(11)
    b.add("LeakyRelu", b.conv("image", 1, 4), alpha=0.1)
    model = graph(b.save(tmp_path / "n.onnx", "logits", 4))
    weight, bias = (torch.from_numpy(numpy_helper.to_array(one).copy()).to(TORCH[kind]).float() for one in b.weights)
    low_precision(model, kind)
    found = answer(model, tmp_path / "m.onnx")
    image = torch.from_numpy(X).to(TORCH[kind]).float()
    conv = torch.nn.functional.conv3d(image, weight, bias, padding=1).to(TORCH[kind])
    wanted = torch.nn.functional.leaky_relu(conv.float(), 0.1).to(TORCH[kind]).float().numpy()
    np.testing.assert_allclose(
        found, wanted, rtol=2.0**-6, atol=1e-6
    )  # sums in another order may round to the neighbour
    assert (found == wanted).mean() > 0.99


def written_out(path: Path, spread: float) -> Path:
    """A normalization over channels in single operators, of values whose squares FP16 does not hold."""
    b = Builder(12)
    b.weights += [
        numpy_helper.from_array(np.asarray(value, kind), name)
        for name, value, kind in (("two", 2, np.float32), ("tiny", 1e-6, np.float32), ("axes", [1], np.int64))
    ]
    x = b.add("Mul", b.conv("image", 1, 6), "spread")
    b.weights.append(numpy_helper.from_array(np.asarray(spread, np.float32), "spread"))
    centred = b.add("Sub", x, b.add("ReduceMean", x, "axes", keepdims=1))
    variance = b.add("ReduceMean", b.add("Pow", centred, "two"), "axes", keepdims=1)
    x = b.add("Div", centred, b.add("Sqrt", b.add("Add", variance, "tiny")))
    b.conv(b.add("Relu", x), 6, 3, kernel=1)
    return b.save(path, "logits", 3)


@pytest.mark.parametrize("spread", [1e3, 1e-3])
def test_a_normalization_that_is_written_out_runs_in_float32(spread: float, tmp_path: Path) -> None:
    model = graph(written_out(tmp_path / "n.onnx", spread))
    truth = answer(model, tmp_path / "truth.onnx")
    low_precision(model, "fp16")
    types = {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type not in ("Cast", "Mul")}
    inside = {"ReduceMean", "Sub", "Pow", "Add", "Sqrt", "Div"}
    assert {op for op, dtype in types.items() if dtype == ir.DataType.FLOAT} == inside
    assert error(answer(model, tmp_path / "m.onnx"), truth) < 2e-3


def with_constant(path: Path, op: str, value: float, opset: int = 20) -> Path:
    b = Builder(13)
    b.weights.append(numpy_helper.from_array(np.full((1, 4, 1, 1, 1), value, np.float32), "constant"))
    x = b.add(op, b.conv("image", 1, 4), "constant")
    b.conv(b.add("Softmax", x, axis=1), 4, 3, kernel=1)
    return b.save(path, "logits", 3, opset=opset)


def test_a_mask_is_the_lowest_number_and_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    model = graph(with_constant(tmp_path / "n.onnx", "Add", -1e9))
    low_precision(model, "fp16")
    tensor = model.graph.initializers["constant"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.float16(-65504))
    with pytest.raises(GraphError, match=r"'constant' of Mul 'mul_1' holds 1e\+06, beyond fp16"):
        low_precision(graph(with_constant(tmp_path / "n.onnx", "Mul", 1e6)), "fp16")
    low_precision(graph(with_constant(tmp_path / "n.onnx", "Mul", 1e6)), "bf16")


def test_steps_that_the_type_does_not_hold_are_refused() -> None:
    model = quantized("unet", "tensorrt", "fp32").model.clone()
    with pytest.raises(GraphError, match=r"is no number of fp16.*--high-precision-dtype fp16"):
        low_precision(model, "fp16")
    model = quantized("unet", "tensorrt", "fp16").model.clone()
    with pytest.raises(GraphError, match="holds FP16 or BF16 tensors already"):
        low_precision(model, "bf16")


def test_a_range_beyond_fp16_is_refused() -> None:
    scale = Scale(np.asarray(600, np.float32), np.asarray(0, np.int32), "int8")
    plan = planning.Plan((), {"x": scale}, {}, "tensorrt")
    with pytest.raises(CalibrationError, match=r"'x' reaches 7.62e\+04, fp16 ends at 65504.*bf16"):
        planning.in_type(plan, "fp16")
    assert planning.in_type(plan, "bf16").activations["x"].step == 600


def grouped(path: Path) -> Path:
    b = Builder(14)
    x = b.add("GroupNormalization", b.conv("image", 1, 4), b.weight(4), b.weight(4), num_groups=2)
    b.conv(x, 4, 3, kernel=1)
    return b.save(path, "logits", 3, opset=21)


def test_bf16_raises_the_opset_unless_an_operator_changed_its_meaning(tmp_path: Path) -> None:
    model = graph(with_constant(tmp_path / "n.onnx", "Add", 1.0))
    low_precision(model, "bf16")
    assert model.opset_imports[""] == 22
    model = load_graph(grouped(tmp_path / "n.onnx"))
    model.opset_imports[""] = 20
    with pytest.raises(GraphError, match="GroupNormalization 'groupnormalization_1' changed what it means"):
        low_precision(model, "bf16")
    old = graph(with_constant(tmp_path / "n.onnx", "Add", 1.0, opset=17))
    low_precision(old, "fp16")
    assert old.opset_imports[""] == 17


@pytest.mark.parametrize("kind", KINDS)
def test_old_graphs_are_raised_and_keep_their_meaning(kind: Kind, tmp_path: Path) -> None:
    """Opset 13 has the axes of a ReduceMean as an attribute."""
    b = Builder(14)
    x = b.conv("image", 1, 4)
    b.conv(b.add("Sub", x, b.add("ReduceMean", x, axes=[1], keepdims=1)), 4, 3)
    old = graph(b.save(tmp_path / "n.onnx", "logits", 3, opset=13))
    wanted = answer(old, tmp_path / "old.onnx")
    written = qdq.write(old, planning.in_type(planned(old, "tensorrt"), kind))
    integers = answer(written, tmp_path / "q.onnx")
    low_precision(written, kind)
    assert written.opset_imports[""] == {"fp16": 20, "bf16": 22}[kind]
    save_graph(written, tmp_path / "low.onnx")
    onnx.checker.check_model(tmp_path / "low.onnx", full_check=True)
    assert error(answer(written, tmp_path / "low.onnx"), wanted) < {"fp16": 1.1, "bf16": 2.2}[kind] * error(
        integers, wanted
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["tensorrt", "triton"])
@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_read_back_is_written_again(network: str, target: str, kind: Kind, tmp_path: Path) -> None:
    made = quantized(network, target, kind)
    save_graph(typed(network, target, kind)[0], tmp_path / "a.onnx")
    model, plan = qdq.read(simplify(load_graph(tmp_path / "a.onnx")))
    assert low_type(model) is None
    assert not any(node.op_type == "Cast" for node in model.graph)
    assert set(plan.layers) == set(made.plan.layers)
    again = qdq.write(model, plan)
    low_precision(again, kind)
    np.testing.assert_array_equal(answer(again, tmp_path / "b.onnx"), typed(network, target, kind)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_such_a_file_is_retargeted(kind: Kind, tmp_path: Path) -> None:
    (_, truth), (low, wanted) = typed("unet", "fp32", "fp32"), typed("unet", "tensorrt", kind)
    model, plan = qdq.read(simplify(low.clone()))
    found = retarget(model, plan, TARGETS["openvino"])
    assert not found.rescaled
    assert error(answer(qdq.write(model, found.plan), tmp_path / "b.onnx"), wanted) < 1.5 * error(wanted, truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_full_precision_is_the_graph_before_but_for_rounded_weights(network: str, kind: Kind, tmp_path: Path) -> None:
    before, truth = typed(network, "fp32", "fp32")
    model, operators = typed(network, "fp32", kind)[0].clone(), [node.op_type for node in before.graph]
    assert low_type(model) == LOW[kind]
    full_precision(model)
    assert [node.op_type for node in model.graph] == operators
    assert low_type(model) is None
    assert 0 < error(answer(model, tmp_path / "b.onnx"), truth) < {"fp16": 1e-3, "bf16": 1e-2}[kind]


def headed(path: Path, ending: str) -> Path:
    b = Builder(15)
    b.conv(b.add("Relu", b.conv("image", 1, 4)), 4, 9, kernel=1)
    if ending:
        b.add(ending, b.nodes[-1].output[0], axis=1)
    return b.save(path, "logits", 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["", "Softmax"])
@pytest.mark.parametrize("coded", [False, True])
def test_a_late_head_is_still_split(coded: bool, ending: str, kind: Kind, tmp_path: Path) -> None:
    model = graph(headed(tmp_path / "n.onnx", ending))
    head = head_layer_of(model)
    if coded:
        model = qdq.write(model, planning.in_type(planned(model, "tensorrt"), kind))
    low_precision(model, kind)
    model = simplify(model)
    assert head_layer_of(model) == head
    split = split_head(model)
    assert split.head is not None
    features, whole = (
        answer(split.body, tmp_path / "b.onnx"),
        answer(split_head(model, late=False).body, tmp_path / "w.onnx"),
    )
    assert split.body.graph.outputs[0].dtype == (ir.DataType.INT8 if coded else ir.DataType.FLOAT)
    logits = np.einsum("kf,nfxyz->nkxyz", split.head.matrix(), features.astype(np.float64))
    logits += split.head.bias[:, None, None, None]
    assert np.abs(logits - whole).max() <= 2.0 ** (-11 if kind == "fp16" else -8) * np.abs(whole).max()


def test_second_terms_keep_their_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a value is computed in float32, though the value itself is of fewer bits."""
    monkeypatch.setattr(second_terms, "WORTH", 0.0)
    monkeypatch.setattr(second_terms, "ENOUGH", 0.0)
    model, seen = example("unet", "openvino")
    truth = answer(model.clone(), tmp_path / "truth.onnx")
    made = {
        (kind, share): quantize_graph(model, seen, Recipe(second_terms=share, high_precision_dtype=kind))
        for kind in ("fp32", "fp16")
        for share in (0.0, 0.2)
    }
    assert made["fp16", 0.2].split
    found = {key: error(answer(one.model, tmp_path / "m.onnx"), truth) for key, one in made.items()}
    assert found["fp16", 0.2] < 0.8 * found["fp16", 0.0]
    assert found["fp16", 0.2] < 1.3 * found["fp32", 0.2]
    floors = [node for node in made["fp16", 0.2].model.graph if node.op_type == "Floor"]
    assert {node.outputs[0].dtype for node in floors} == {ir.DataType.FLOAT}


def test_the_command_line_writes_retargets_and_inspects_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx_file, data, low = NETWORKS["unet"](tmp_path / "n.onnx"), tmp_path / "c.npy", tmp_path / "low.onnx"
    np.save(data, windows(3))
    given = ["quantize", "--onnx", str(onnx_file), "--calibration", str(data), "--target", "tensorrt", "--quiet"]
    given += ["--second-terms", "0"]
    assert main([*given, "--output", str(low)]) == 0  # the default for tensorrt
    assert main([*given, "--output", str(tmp_path / "full.onnx"), "--high_precision_dtype", "fp32"]) == 0
    manifest = embedded(load_graph(low), where=low)
    assert manifest is not None
    assert manifest.quantization["high_precision_dtype"] == "fp16"
    assert main(["inspect", str(low), "--report", str(tmp_path / "i.json")]) == 0
    facts = json.loads((tmp_path / "i.json").read_text())
    assert facts["int8_mac_share_planned"] == 1
    assert main(["quantize", "--onnx", str(low), "--retarget", "openvino", "--output", str(tmp_path / "ov.onnx")]) == 0
    assert low_type(load_graph(tmp_path / "ov.onnx")) is None
    again = ["quantize", "--onnx", str(low), "--retarget", "tensorrt", "--output", str(tmp_path / "again.onnx")]
    assert main([*again, "--high-precision-dtype", "fp16"]) == 0
    np.testing.assert_array_equal(run("reference", tmp_path / "again.onnx", X), run("reference", low, X))
    capsys.readouterr()
    full = [
        "quantize",
        "--onnx",
        str(tmp_path / "full.onnx"),
        "--retarget",
        "tensorrt",
        "--output",
        str(tmp_path / "x.onnx"),
    ]
    assert main([*full, "--high-precision-dtype", "fp16"]) == 0
    exact, rounded = (run("reference", tmp_path / name, X) for name in ("full.onnx", "x.onnx"))
    assert 0 < error(rounded, exact) < 0.01


@pytest.mark.skipif(load_backend("onnxruntime").unavailable() is not None, reason="no ONNX Runtime here")
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_recipe_for_tensorrt_is_tried_whatever_its_rest(kind: Kind, tmp_path: Path) -> None:
    """Recipes are tried in ONNX Runtime, which has no BF16 on the CPU."""
    onnx_file, data, low = NETWORKS["unet"](tmp_path / "n.onnx"), tmp_path / "c.npy", tmp_path / "low.onnx"
    np.save(data, windows(4))
    given = ["quantize", "--onnx", str(onnx_file), "--calibration", str(data), "--target", "tensorrt", "--quiet"]
    assert main([*given, "--output", str(low), "--high-precision-dtype", kind]) == 0
    manifest = embedded(load_graph(low), where=low)
    assert manifest is not None
    assert len(manifest.quantization["second_terms_tried"]) > 1
    assert low_type(load_graph(low)) == LOW[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_pytorch_computes_in_its_own_type_whatever_the_file_casts_to(network: str, kind: Kind, tmp_path: Path) -> None:
    low, full = tmp_path / "low.onnx", tmp_path / "full.onnx"
    model = quantized(network, "tensorrt", kind).model.clone()
    save_graph(model, low)
    full_precision(model)
    save_graph(model, full)
    np.testing.assert_array_equal(run("torch", low, X), run("torch", full, X))
