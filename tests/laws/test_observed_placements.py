"""What one pass saw holds for every graph and every placement that is made of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from networks import NETWORKS, Builder
from ptq3d.graphs.layers import layers
from ptq3d.quantization import equalization, planning, smoothing
from ptq3d.quantization.quantizer import Recipe, quantize_graph
from ptq3d.quantization.targets import TARGETS
from quantizing import graph, observed_exactly, outputs


def skip(path: Path) -> Path:
    """Conv, Relu and a skip to a Concat, straight and through MaxPool: scaled tensors behind and in front of quantized ones."""
    b = Builder(11)
    x = b.add("Relu", b.conv("image", 1, 6))
    pooled = b.add("MaxPool", x, kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    deep = b.add("LeakyRelu", b.conv(pooled, 6, 8), alpha=0.1)
    up = b.add("ConvTranspose", deep, b.weight(8, 6, 2, 2, 2), b.weight(6), strides=[2, 2, 2])
    b.conv(b.add("Relu", b.conv(b.add("Concat", x, up, axis=1), 12, 6)), 6, 3, kernel=1)
    return b.save(path, "logits", 3)


def grouped(path: Path) -> Path:
    """A convolution of two groups, whose outputs no factor can move into, in front of a Concat."""
    b = Builder(12)
    x = b.add("Relu", b.conv("image", 1, 4))
    y = b.add("Relu", b.add("Conv", x, b.weight(6, 2, 3, 3, 3), b.weight(6), group=2, pads=[1] * 6))
    b.conv(b.add("Concat", x, y, axis=1), 10, 3)
    return b.save(path, "logits", 3)


def upsampled(path: Path) -> Path:
    """InstanceNormalization, LeakyRelu, linear Resize, convolution."""
    b = Builder(13)
    x = b.conv("image", 1, 6, stride=2)
    x = b.add("LeakyRelu", b.add("InstanceNormalization", x, b.weight(6), b.weight(6)), alpha=0.1)
    b.weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2, 2], np.float32), "scales"))
    up = b.add("Resize", x, "", "scales", mode="linear", coordinate_transformation_mode="half_pixel")
    b.conv(up, 6, 3)
    return b.save(path, "logits", 3)


def residual(path: Path) -> Path:
    """Two convolutions added: either can be the residual branch of the other."""
    b = Builder(14)
    x = b.add("Relu", b.conv("image", 1, 6))
    joined = b.add("Relu", b.add("Add", b.conv(x, 6, 6), b.conv(x, 6, 6, kernel=1)))
    b.conv(joined, 6, 3)
    return b.save(path, "logits", 3)


SHAPES: dict[str, Callable[[Path], Path]] = {
    **NETWORKS,
    "skip": skip,
    "grouped": grouped,
    "upsampled": upsampled,
    "residual": residual,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", SHAPES)
def test_ranges_of_the_scaled_graph_are_those_of_a_new_pass(network: str, target: str, tmp_path: Path) -> None:
    model, rules = graph(SHAPES[network](tmp_path / "n.onnx")), TARGETS[target]
    seen = observed_exactly(model, placement=planning.place(model, rules))
    done = equalization.equalize(model, planning.place(model, rules), seen.tensors, strength=1.0)
    seen = seen.scaled(done.tensors, done.layers)
    smooth = smoothing.smooth(model, planning.place(model, rules), seen.tensors)
    seen = seen.scaled(smooth.tensors, smooth.layers)
    placement = planning.place(model, rules)
    again = observed_exactly(model, placement=placement)
    found, wanted = (one.ranges(placement, method="max", symmetric=rules.symmetric) for one in (seen, again))
    for name, range_ in wanted.items():
        np.testing.assert_allclose(
            [found[name].low, found[name].high], [range_.low, range_.high], rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", SHAPES)
def test_any_layer_may_stay_in_floating_point(network: str, target: str, tmp_path: Path) -> None:
    model = graph(SHAPES[network](tmp_path / "n.onnx"))
    seen = observed_exactly(model, placement=planning.place(model, TARGETS[target]))
    for layer in layers(model):
        made = quantize_graph(model, seen, Recipe(target, keep=(layer.name,), rounding="nearest"))
        assert layer.name in made.kept
        assert layer.name not in made.plan.layers


def test_features_of_a_normalization_on_a_volume_are_its_last_axis(tmp_path: Path) -> None:
    """Channels-last (1, D, H, W, C) with D = C: a transformer on a volume."""
    b = Builder(15)
    x = b.conv("image", 1, 8)
    last = b.add("Transpose", x, perm=[0, 2, 3, 4, 1])
    spans = numpy_helper.from_array(np.geomspace(0.01, 10, 8).astype(np.float32), "spans")
    b.weights.append(spans)
    normal = b.add("LayerNormalization", last, "spans", b.weight(8), axis=-1)
    product = b.add("MatMul", normal, b.weight(8, 8))
    b.conv(b.add("Transpose", product, perm=[0, 4, 1, 2, 3]), 8, 3)
    model = graph(b.save(tmp_path / "n.onnx", "logits", 3))
    before = outputs(model, tmp_path / "before.onnx")
    placement = planning.place(model, TARGETS["openvino"])
    seen = observed_exactly(model)
    done = smoothing.smooth(model, placement, seen.tensors)
    (name,) = done.tensors
    assert seen.tensors[name].high[-1] > 50 * seen.tensors[name].high[0]
    factors = done.tensors[name][1]
    assert factors[0] > 1.5 * factors[-1]
    after = outputs(model, tmp_path / "after.onnx")
    assert np.abs(after - before).max() <= 1e-5 * np.ptp(before)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = graph(skip(tmp_path / "n.onnx"))
    text = ir.to_proto(model).SerializeToString(deterministic=True)
    quantize_graph(model, observed_exactly(model), Recipe())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == text
