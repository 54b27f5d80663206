"""Laws of placement and of the Q/DQ graphs that are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from networks import NETWORKS, WINDOW, Builder, windows
from ptq3d.engines import get_backend
from ptq3d.engines.base import EngineOptions, int8_mac_share
from ptq3d.errors import CalibrationError, GraphError, OptionError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import layers, weight_value
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import planning, qdq
from ptq3d.quantization.retargeting import retarget
from ptq3d.quantization.targets import ACTIVATIONS, TARGETS
from quantizing import graph, observed, planned, run


def write(path: Path, target: str = "openvino", keep: tuple[str, ...] = ()) -> tuple[planning.Plan, onnx.ModelProto]:
    model = simplify(load_graph(path))
    plan = planned(model, target, keep=keep, images=[w[None] for w in windows(2)])
    output = path.with_name("q.onnx")
    save_graph(qdq.write(model, plan), output)
    onnx.checker.check_model(str(output), full_check=True)
    return plan, onnx.load(output)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_weighted_layer_is_fed_by_integers(network: str, target: str, tmp_path: Path) -> None:
    plan, _ = write(NETWORKS[network](tmp_path / "n.onnx"), target)
    written = simplify(load_graph(tmp_path / "q.onnx"))
    rules = TARGETS[target]
    wanted = {
        layer.name for layer in layers(written) if layer.op in rules.operators and (layer.weight or rules.products)
    }
    assert qdq.integer_layers(written) == set(plan.layers) == wanted


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_stored_as_int8_and_nothing_else_is_kept(network: str, tmp_path: Path) -> None:
    _, written = write(NETWORKS[network](tmp_path / "n.onnx"))
    large = [one for one in written.graph.initializer if len(one.dims) > 1 and np.prod(one.dims) > 8]  # beside slopes
    assert large
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.INT8}


def test_batch_normalization_is_folded(tmp_path: Path) -> None:
    _, written = write(NETWORKS["unet"](tmp_path / "n.onnx"))
    assert "BatchNormalization" not in {node.op_type for node in written.graph.node}


def test_the_inputs_of_a_concat_share_one_scale(tmp_path: Path) -> None:
    plan, written = write(NETWORKS["unet"](tmp_path / "n.onnx"))
    concat = next(node for node in written.graph.node if node.op_type == "Concat")
    scales = [plan.activations[name.removesuffix("/dq")] for name in concat.input]
    assert len(scales) == 2
    assert scales[0].equals(scales[1])


def test_targets_have_their_own_types(tmp_path: Path) -> None:
    network = NETWORKS["meshnet"](tmp_path / "n.onnx")
    openvino, _ = write(network, "openvino")
    assert {scale.dtype for scale in openvino.activations.values()} == {"uint8"}
    assert any(scale.zero_point != 0 for scale in openvino.activations.values())  # ELU goes below zero
    tensorrt, _ = write(network, "tensorrt")
    assert {scale.dtype for scale in tensorrt.activations.values()} == {"int8"}
    assert all(not scale.zero_point.any() for scale in tensorrt.activations.values())


def test_kept_layers_stay_in_floating_point(tmp_path: Path) -> None:
    network = NETWORKS["unet"](tmp_path / "n.onnx")
    names = [layer.name for layer in layers(simplify(load_graph(network)))]
    plan, _ = write(network, keep=(names[0], "convtranspose*"))
    assert set(plan.layers) == {name for name in names[1:] if not name.startswith("convtranspose")}
    assert qdq.integer_layers(simplify(load_graph(tmp_path / "q.onnx"))) == set(plan.layers)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no_such_layer.*The layers are: conv"):
        write(NETWORKS["unet"](tmp_path / "n.onnx"), keep=("no_such_layer",))
    with pytest.raises(OptionError, match="no layer is left"):
        write(NETWORKS["unet"](tmp_path / "n.onnx"), keep=("*",))


def test_a_quantized_graph_is_refused(tmp_path: Path) -> None:
    write(NETWORKS["meshnet"](tmp_path / "n.onnx"))
    model = simplify(load_graph(tmp_path / "q.onnx"))
    with pytest.raises(GraphError, match="already"):
        qdq.write(model, planning.Plan((), {}, {}, "openvino"))


def test_nan_in_a_calibration_window_is_refused(tmp_path: Path) -> None:
    model = simplify(load_graph(NETWORKS["meshnet"](tmp_path / "n.onnx")))
    bad = windows(1)
    bad[0, 0, 1, 2, 3] = np.nan
    with pytest.raises(CalibrationError, match="window 1: 1 values are NaN"):
        observed(model, images=[bad])


def residual(path: Path) -> Path:
    """A block as in every residual network: relu(conv(relu(conv(x))) + x), x out of a relu."""
    b = Builder(8)
    x = b.add("Relu", b.conv("image", 1, 6))
    deep = b.conv(b.add("Relu", b.conv(x, 6, 6)), 6, 6)
    y = b.add("Relu", b.add("Add", deep, x))
    b.conv(y, 6, 3, kernel=1)
    return b.save(path, "logits", 3)


@pytest.mark.parametrize("target", TARGETS)
def test_the_residual_branch_of_an_add(target: str, tmp_path: Path) -> None:
    plan, written = write(residual(tmp_path / "n.onnx"), target)
    (add,) = [node for node in written.graph.node if node.op_type == "Add"]
    behind_dq = [name.endswith("/dq") for name in add.input]
    assert (
        behind_dq
        == {
            "openvino": [True, True],  # it adds inside the convolution only what both are INT8
            "tensorrt": [False, True],  # the other one is the sum of the convolution, which TensorRT adds it to
            "onnxruntime": [True, True],
            "triton": [True, True],
        }[target]
    )
    assert ("add_5", 1) in plan.readers.get("relu_1_out", frozenset()) or target == "openvino"


def test_triton_keeps_every_tensor_between_the_layers_in_int8(tmp_path: Path) -> None:
    """Only what a kernel fuses (an activation behind its layer) and the logits are read or left in floating point."""
    for network in ("unet", "resized"):
        _, written = write(NETWORKS[network](tmp_path / "n.onnx"), "triton")
        makers = {output: node for node in written.graph.node for output in node.output}
        for node in written.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            for name in node.input:
                maker = makers.get(name)
                moved = maker is not None and maker.op_type in ("Concat", "MaxPool")
                assert maker is None or moved or maker.op_type == "DequantizeLinear" or node.op_type in ACTIVATIONS


@pytest.mark.parametrize(("network", "activation"), [("unet", "Relu"), ("meshnet", "Elu")])
def test_triton_uses_all_levels_and_fuses_activations(network: str, activation: str, tmp_path: Path) -> None:
    """Also in front of a concat, whose inputs share a scale: its kernels store any zero-point behind any activation."""
    plan, written = write(NETWORKS[network](tmp_path / "n.onnx"), "triton")
    assert {scale.dtype for scale in plan.activations.values()} == {"uint8"}
    makers = {output: node.op_type for node in written.graph.node for output in node.output}
    functions = [node for node in written.graph.node if node.op_type == activation]
    assert functions
    for node in functions:
        assert makers[node.input[0]] != "DequantizeLinear"
        assert plan.activations[node.output[0]].zero_point < 128


def quantized_tensors(path: Path, target: str = "triton") -> set[str]:
    _, written = write(path, target)
    return {node.input[0] for node in written.graph.node if node.op_type == "QuantizeLinear"}


def grouped_normalization(path: Path, offset: tuple[int, ...] = (8, 1, 1, 1)) -> Path:
    """GroupNorm as PyTorch exports it, and its activation."""
    b = Builder(21)
    b.weights += [
        numpy_helper.from_array(np.array(sizes, np.int64), name)
        for name, sizes in {"groups": [1, 2, -1], "channels": [1, 8, *WINDOW]}.items()
    ]
    x = b.add("Reshape", b.conv("image", 1, 8), "groups")
    x = b.add("InstanceNormalization", x, b.weight(2), b.weight(2))
    x = b.add("Mul", b.add("Reshape", x, "channels"), b.weight(8, 1, 1, 1))
    b.conv(b.add("Relu", b.add("Add", x, b.weight(*offset))), 8, 3)
    return b.save(path, "logits", 3)


def test_triton_quantizes_a_group_normalization_behind_its_activation(tmp_path: Path) -> None:
    found = quantized_tensors(grouped_normalization(tmp_path / "n.onnx"))
    assert found == {"image", "conv_0_out", "relu_6_out"}


def test_triton_adds_a_whole_image_apart(tmp_path: Path) -> None:
    """What is no constant for each channel is no bias of a kernel."""
    found = quantized_tensors(grouped_normalization(tmp_path / "n.onnx", (8, *WINDOW)))
    assert {"mul_4_out", "relu_6_out"} <= found


def encoder(path: Path) -> Path:
    """A transformer block with projections: 2 heads of 4 features on 4 x 6 x 5 tokens, padded and cut as windows of Swin are."""
    b = Builder(22)
    tokens, features = 4 * 6 * 5, 8
    b.weights += [
        numpy_helper.from_array(np.array(sizes, np.int64), name)
        for name, sizes in {
            "flat": [1, features, tokens],
            "heads": [1, tokens, 2, features // 2],
            "joined": [1, tokens, features],
            "pads": [0, 0, 0, 0, 4, 0],
            "zero": [0],
            "end": [tokens],
            "axis": [1],
            "grid": [1, features, 4, 6, 5],
        }.items()
    ]
    b.weights.append(numpy_helper.from_array(np.float32(0.5), "half"))

    def linear(x: str, outputs: int = features, inputs: int = features) -> str:
        return b.add("Add", b.add("MatMul", x, b.weight(inputs, outputs)), b.weight(outputs))

    x = b.conv("image", 1, features, kernel=1, stride=2)
    t = b.add("Transpose", b.add("Reshape", x, "flat"), perm=[0, 2, 1])
    y = b.add("LayerNormalization", t, b.weight(features), b.weight(features))
    y = b.add("Slice", b.add("Pad", y, "pads"), "zero", "end", "axis")
    q, k, v = (b.add("Transpose", b.add("Reshape", linear(y), "heads"), perm=[0, 2, 1, 3]) for _ in range(3))
    scores = b.add("MatMul", b.add("Mul", q, "half"), b.add("Transpose", k, perm=[0, 1, 3, 2]))
    attended = b.add("MatMul", b.add("Softmax", scores, axis=-1), v)
    t = b.add("Add", t, linear(b.add("Reshape", b.add("Transpose", attended, perm=[0, 2, 1, 3]), "joined")))
    t = b.add("Gelu", linear(t))
    back = b.add("Reshape", b.add("Transpose", t, perm=[0, 2, 1]), "grid")
    b.add("ConvTranspose", back, b.weight(features, 3, 2, 2, 2), b.weight(3), strides=[2, 2, 2])
    return b.save(path, "logits", 3)


def test_triton_leaves_attention_in_floating_point(tmp_path: Path) -> None:
    """What it reads comes as it leaves its layers, its answer is quantized as the next layer reads it, a Linear behind its bias."""
    plan, written = write(encoder(tmp_path / "n.onnx"), "triton")
    makers = {output: node.op_type for node in written.graph.node for output in node.output}
    found = [node.input[0] for node in written.graph.node if node.op_type == "QuantizeLinear"]
    made = sorted(makers.get(name, "the image") for name in found)
    assert made == ["Add", "Add", "Conv", "Gelu", "LayerNormalization", "Reshape", "Slice", "the image"]
    products = {layer.name for layer in layers(graph(tmp_path / "n.onnx")) if layer.weight is None}
    assert len(products) == 2
    assert not products & set(plan.layers)
    kept = planning.place(graph(tmp_path / "n.onnx"), TARGETS["triton"]).kept
    assert kept == dict.fromkeys(products, "triton multiplies two activations in floating point")


def test_triton_pads_and_cuts_integers(tmp_path: Path) -> None:
    plan, written = write(encoder(tmp_path / "n.onnx"), "triton")
    whole, cut = [
        plan.activations[node.output[0]]
        for node in written.graph.node
        if node.op_type in ("LayerNormalization", "Slice")
    ]
    assert whole.equals(cut)


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_attention_of_other_targets_is_retargeted_to_triton(target: str, tmp_path: Path) -> None:
    write(encoder(tmp_path / "n.onnx"), target)
    model, plan = qdq.read(simplify(load_graph(tmp_path / "q.onnx")))
    found = retarget(model, plan, TARGETS["triton"])
    written = qdq.write(model, found.plan)
    assert qdq.integer_layers(written) == set(found.plan.layers)
    assert len(found.plan.layers) == len(plan.layers) - 2


def upwards(path: Path, activation: str) -> Path:
    b = Builder(9)
    x = b.add(activation, b.conv("image", 1, 16, stride=2))
    x = b.add("Relu", b.add("ConvTranspose", x, b.weight(16, 16, 2, 2, 2), b.weight(16), strides=[2, 2, 2]))
    b.conv(x, 16, 3, kernel=1)
    return b.save(path, "logits", 3)


@pytest.mark.parametrize(("activation", "dtype"), [("LeakyRelu", "int8"), ("Elu", "int8"), ("Relu", "uint8")])
def test_a_transposed_convolution_reads_no_zero_point(activation: str, dtype: str, tmp_path: Path) -> None:
    """Openvino runs it in floating point otherwise; behind a Relu all 8 bits count upwards."""
    plan, _ = write(upwards(tmp_path / "n.onnx", activation), "openvino")
    scale = plan.activations[f"{activation.lower()}_1_out"]
    assert (scale.dtype, int(scale.zero_point)) == (dtype, 0)
    openvino = get_backend("openvino")
    openvino.build(tmp_path / "q.onnx", tmp_path / "engine")
    with openvino.open(tmp_path / "engine", EngineOptions()) as engine:
        assert int8_mac_share(engine.layers()) == 1.0


def test_products_of_activations_read_no_zero_points(tmp_path: Path) -> None:
    model = graph(NETWORKS["attention"](tmp_path / "n.onnx"))
    plan = planned(model)
    products = [node for node in model.graph if node.op_type == "MatMul" and weight_value(node) is None]
    assert len(products) == 2
    scales = {
        name: plan.activations[name] for node in products for value in node.inputs for name in planning._sources(value)
    }
    assert all(int(scale.zero_point) == 0 for scale in scales.values())
    assert sorted(scale.dtype for scale in scales.values()) == ["int8", "int8", "int8", "uint8"]  # q, k, v; softmax


@pytest.mark.parametrize("target", TARGETS)
def test_only_files_for_tensorrt_are_given_kernel_shapes(target: str, tmp_path: Path) -> None:
    """Files for other runtimes keep the bytes they have always had."""
    _, written = write(NETWORKS["meshnet"](tmp_path / "net.onnx"), target)
    named = [{one.name for one in node.attribute} for node in written.graph.node if node.op_type == "Conv"]
    assert {"kernel_shape" in names for names in named} == {target == "tensorrt"}


@pytest.mark.parametrize("opset", [20, 21, 22])
def test_onnx_runtime_loads_files_for_tensorrt_of_any_opset(opset: int, tmp_path: Path) -> None:
    """A ConvTranspose written as a convolution and a shuffle is what it moves Q/DQ around."""
    pytest.importorskip("onnxruntime")
    path = NETWORKS["unet"](tmp_path / "n.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = opset
    onnx.save(model, path)
    write(path, "tensorrt")
    found, wanted = (run(engine, tmp_path / "q.onnx", windows(2)) for engine in ("onnxruntime", "reference"))
    assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.98
