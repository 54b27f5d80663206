"""Laws of channel scales: exact in floating point, and worth having where channels span different ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from networks import NETWORKS, WINDOW, Builder
from ptq3d.errors import CalibrationError
from ptq3d.quantization import equalization, planning, qdq
from ptq3d.quantization.observation import TensorSeen
from ptq3d.quantization.targets import TARGETS
from quantizing import graph, observed, outputs, planned


def equalized(path: Path, strength: float = equalization.STRENGTH) -> tuple[ir.Model, tuple[str, ...]]:
    model = graph(path)
    placement = planning.place(model, TARGETS["openvino"])
    names = equalization.equalizable(model, placement)
    done = equalization.equalize(model, placement, observed(model).tensors, strength=strength)
    assert set(done.tensors) == set(names)
    return model, names


def quantized(model: ir.Model) -> ir.Model:
    return qdq.write(model, planned(model))


def uneven(path: Path, activation: str = "Relu") -> Path:
    """Two convolutions; the channels between them span from 0.03 to 30."""
    b = Builder(5)
    spans = np.geomspace(0.03, 30, 8)
    hidden = b.conv(b.add(activation, b.conv("image", 1, 8)), 8, 4)
    for index, factors in ((0, spans[:, None]), (1, spans[:, None]), (2, 1 / spans[None, :, None])):
        tensor = b.weights[index]
        values = (
            numpy_helper.to_array(tensor).reshape(*tensor.dims[:2], -1)
            if index == 2
            else numpy_helper.to_array(tensor).reshape(8, -1)
        )
        tensor.raw_data = (values * factors).astype(np.float32).tobytes()
    b.conv(b.add("Relu", hidden), 4, 3, kernel=1)
    return b.save(path, "logits", 3)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_floating_point_outputs_stay_the_same(network: str, strength: float, tmp_path: Path) -> None:
    path = NETWORKS[network](tmp_path / "n.onnx")
    before = outputs(graph(path), tmp_path / "before.onnx")
    model, _ = equalized(path, strength)
    after = outputs(model, tmp_path / "after.onnx")
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("network", ["unet", "meshnet", "resized"])
def test_it_changes_weights(network: str, tmp_path: Path) -> None:
    path = NETWORKS[network](tmp_path / "n.onnx")
    model, names = equalized(path)
    assert names
    plain = graph(path)
    changed = [
        node.name
        for node, old in zip(
            (n for n in model.graph if n.op_type == "Conv"),
            (n for n in plain.graph if n.op_type == "Conv"),
            strict=True,
        )
        if not np.array_equal(node.inputs[1].const_value.numpy(), old.inputs[1].const_value.numpy())
    ]
    assert changed


def test_homogeneous_functions_cost_nothing_others_one_multiplication(tmp_path: Path) -> None:
    def operators(path: Path) -> list[str]:
        return [node.op_type for node in equalized(path)[0].graph]

    assert "Mul" not in operators(uneven(tmp_path / "relu.onnx"))
    assert operators(uneven(tmp_path / "elu.onnx", "Elu")).count("Mul") == 1


def test_a_tensor_that_something_else_reads_is_left_alone(tmp_path: Path) -> None:
    path = NETWORKS["resized"](tmp_path / "n.onnx")
    model = graph(path)
    pooled = next(str(node.outputs[0].name) for node in model.graph if node.op_type == "MaxPool")
    assert pooled not in equalization.equalizable(model, planning.place(model, TARGETS["openvino"]))


def test_a_layer_that_stays_float_takes_its_scales_like_the_others(tmp_path: Path) -> None:
    b = Builder(10)
    x = b.add("Elu", b.conv("image", 1, 6))
    b.conv(b.add("Concat", b.conv(x, 6, 4), b.conv(x, 6, 2, kernel=1), axis=1), 6, 3, kernel=1)
    model = graph(b.save(tmp_path / "n.onnx", "logits", 3))
    before, seen = outputs(model, tmp_path / "before.onnx"), observed(model)
    placement = planning.place(model, TARGETS["openvino"], keep=("conv_2",))
    assert x in equalization.equalizable(model, placement)
    done = equalization.equalize(model, placement, seen.tensors)
    assert np.array_equal(done.layers["conv_2"], done.tensors[x][1])
    assert np.array_equal(done.layers["conv_3"], done.tensors[x][1])
    assert np.abs(outputs(model, tmp_path / "after.onnx") - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("activation", ["Relu", "Elu"])
def test_int8_errs_less_where_channels_span_different_ranges(activation: str, tmp_path: Path) -> None:
    path = uneven(tmp_path / "n.onnx", activation)
    exact = outputs(graph(path), tmp_path / "exact.onnx")

    def error(model: ir.Model, name: str) -> float:
        return float(np.square(outputs(quantized(model), tmp_path / name) - exact).mean())

    plain = error(graph(path), "plain.onnx")
    assert error(equalized(path)[0], "equalized.onnx") < 0.5 * plain


def grouped(path: Path) -> Path:
    """GroupNorm as PyTorch exports it, then a residual sum that no layer's constants can scale."""
    b = Builder(7)
    b.weights += [
        numpy_helper.from_array(np.array(sizes, np.int64), name)
        for name, sizes in {"groups": [1, 2, -1], "channels": [1, 8, *WINDOW]}.items()
    ]
    y = b.conv("image", 1, 8)
    x = b.add("InstanceNormalization", b.add("Reshape", y, "groups"), b.weight(2), b.weight(2))
    x = b.add("Mul", b.add("Reshape", x, "channels"), b.weight(8, 1, 1, 1))
    x = b.add("Relu", b.add("Add", x, b.weight(8, 1, 1, 1)))
    b.conv(b.add("LeakyRelu", b.add("Add", b.conv(x, 8, 8), y), alpha=0.1), 8, 3)
    return b.save(path, "logits", 3)


def test_where_no_factor_may_stay_constants_for_each_channel_take_them(tmp_path: Path) -> None:
    model = graph(grouped(tmp_path / "n.onnx"))
    before, operators = outputs(model, tmp_path / "before.onnx"), [node.op_type for node in model.graph]
    placement = planning.place(model, TARGETS["triton"])
    done = equalization.equalize(model, placement, observed(model, "triton").tensors, multiplied=False)
    assert list(done.tensors) == ["relu_6_out"]
    assert not np.allclose(done.tensors["relu_6_out"][1], 1, rtol=0.1)
    assert [node.op_type for node in model.graph] == operators
    assert np.abs(outputs(model, tmp_path / "after.onnx") - before).max() <= 1e-5 * np.abs(before).max()


def test_channels_that_are_always_zero_keep_the_scale_one(tmp_path: Path) -> None:
    path = uneven(tmp_path / "n.onnx")
    model = graph(path)
    placement = planning.place(model, TARGETS["openvino"])
    nothing = np.zeros(8, np.float32)
    dead = {
        name: TensorSeen(nothing, nothing, np.zeros((64, 8), np.float32)) if name.startswith("relu_1") else seen
        for name, seen in observed(model).tensors.items()
    }
    scaled = equalization.equalize(model, placement, dead, strength=1.0)
    assert set(scaled.tensors) == set(equalization.equalizable(model, placement))
    for name, (_, factors) in scaled.tensors.items():
        assert np.array_equal(factors, np.ones_like(factors)) == name.startswith("relu_1")
    before = outputs(graph(path), tmp_path / "before.onnx")
    assert np.abs(outputs(model, tmp_path / "after.onnx") - before).max() <= 1e-5 * np.abs(before).max()


def test_an_overflowing_network_is_refused_by_tensor(tmp_path: Path) -> None:
    b = Builder(6)
    x = b.add("Exp", b.add("Mul", b.conv("image", 1, 4), b.weight(1, spread=1e30)))
    b.conv(x, 4, 3, kernel=1)
    model = graph(b.save(tmp_path / "n.onnx", "logits", 3))
    with pytest.raises(CalibrationError, match=r"exp_2_out.*NaN or infinite"):
        observed(model)


def normalized(path: Path, groups: int | None = None) -> Path:
    """A convolution whose channels span from 30 to 30000, normalized one by one or in groups, and a layer that reads them."""
    b = Builder(6)
    wide = b.conv("image", 1, 8)
    factors = np.repeat(np.geomspace(30, 30000, groups or 8), 8 // (groups or 8))
    for tensor in b.weights[:2]:
        values = numpy_helper.to_array(tensor).reshape(8, -1)
        tensor.raw_data = (values * factors[:, None]).astype(np.float32).tobytes()
    constants = {"ones": np.ones(groups or 8, np.float32), "zeros": np.zeros(groups or 8, np.float32)}
    constants |= {"split": np.asarray([1, groups or 8, -1]), "whole": np.asarray([1, 8, *WINDOW])}
    b.weights += [numpy_helper.from_array(value, name) for name, value in constants.items()]
    if groups is None:
        value = b.add("InstanceNormalization", wide, "ones", "zeros")
    else:
        normal = b.add("InstanceNormalization", b.add("Reshape", wide, "split"), "ones", "zeros")
        value = b.add("Reshape", normal, "whole")
    b.conv(b.add("Relu", value), 8, 3, kernel=1)
    return b.save(path, "logits", 3)


@pytest.mark.parametrize("groups", [None, 4])
def test_a_normalization_takes_the_spans_of_its_channels_away(groups: int | None, tmp_path: Path) -> None:
    path = normalized(tmp_path / "n.onnx", groups)
    exact = outputs(graph(path), tmp_path / "exact.onnx")
    model = graph(path)
    placement, seen = planning.place(model, TARGETS["openvino"]), observed(model)
    found = equalization.level(model, placement, seen.tensors)
    ((name, (same, factors)),) = found.tensors.items()
    assert name == same
    assert factors.min() == 1.0
    assert factors.max() > 100
    assert np.abs(outputs(model, tmp_path / "levelled.onnx") - exact).max() <= 1e-4 * np.abs(exact).max()
    after = seen.tensors[name].scaled(factors)
    spans = np.maximum(-after.low, after.high).reshape(groups or 8, -1).max(1)
    assert spans.max() <= 1.001 * spans.min()


@pytest.mark.parametrize("groups", [None, 4])
def test_a_normalization_reads_int8_and_levelling_makes_it_closer(groups: int | None, tmp_path: Path) -> None:
    path = normalized(tmp_path / "n.onnx", groups)
    exact = outputs(graph(path), tmp_path / "exact.onnx")
    plain, levelled = graph(path), graph(path)
    equalization.level(levelled, planning.place(levelled, TARGETS["openvino"]), observed(levelled).tensors)
    errors = []
    for index, model in enumerate((plain, levelled)):
        written = quantized(model)
        (reader,) = (node for node in written.graph if node.op_type == "InstanceNormalization")
        source = reader.inputs[0].producer()
        source = source.inputs[0].producer() if source.op_type == "Reshape" else source
        assert source.op_type == "DequantizeLinear"
        errors.append(np.abs(outputs(written, tmp_path / f"{index}.onnx") - exact).mean())
    assert errors[1] < 0.5 * errors[0]


def test_a_channel_that_the_epsilon_hides_is_left_as_it_is() -> None:
    values = np.random.default_rng(0).normal(0, [1.0, 1e-4], (4000, 2)).astype(np.float32)
    seen = TensorSeen(values.min(0), values.max(0), values)
    assert (equalization._levelling(seen, 2, 1e-5) == 1.0).all()
    assert equalization._levelling(seen, 2, 1e-14)[1] > 1000
