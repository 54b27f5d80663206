"""The Triton engine as a whole, in Triton's interpreter or on a GPU, against the reference engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized import ZOO, Graph, odd, of_integers, of_the_zoo, wanted, written

from networks import windows
from ptq3d.engines import triton
from ptq3d.engines.base import BuildSettings, EngineOptions


# three windows are a whole batch of two, and a part of one
@pytest.mark.parametrize(
    ("name", "batch", "number"), [("unet", 2, 3), ("nnunet", 1, 2), ("segresnet", 1, 1), ("transunet", 1, 1)]
)
def test_a_network_answers_as_the_reference_engine(
    device: torch.device, tmp_path: Path, name: str, batch: int, number: int
) -> None:
    path = of_the_zoo(name)
    triton.build(path, tmp_path, BuildSettings(batch=batch))
    x = windows(number, shape=(1, *ZOO[name]["window"]))
    with triton.open(tmp_path, EngineOptions()) as engine:
        answers = engine(x)
        again = engine(x[:1])
        layers = engine.layers()
    expected = wanted(path, x)
    assert np.array_equal(answers[:1], again)
    if name == "unet":
        assert np.array_equal(answers, expected)
    step = np.abs(expected).max() / 127
    assert np.mean(np.abs(answers - expected) <= 4 * step) >= 0.999
    assert np.mean(answers.argmax(1) == expected.argmax(1)) >= 0.98
    assert {layer.precision for layer in layers} <= {"int8", "fp16"}


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 0), (np.uint8, 77), (np.int8, -5)])
def test_integers_come_in_the_type_of_the_file(
    device: torch.device, tmp_path: Path, dtype: type[np.generic], zero: int
) -> None:
    def rounded(g: Graph) -> int:
        scale = g.constant(1 / 60), g.constant(zero, dtype=dtype)
        x = g.add("LeakyRelu", g.q("image"), alpha=0.25)
        g.add("DequantizeLinear", g.add("QuantizeLinear", x, *scale), *scale)
        return 1

    path, x = of_integers(written(rounded, unsigned=True)), windows(3)
    triton.build(path, tmp_path, BuildSettings(batch=2))
    with triton.open(tmp_path, EngineOptions()) as engine:
        answers = engine(x)
    assert answers.dtype == dtype
    np.testing.assert_array_equal(answers, wanted(path, x))


def test_a_convolution_without_an_int8_kernel_runs_in_fp16_and_says_so(device: torch.device, tmp_path: Path) -> None:
    def build(graph: Graph) -> int:
        first = graph.q(graph.add("Relu", graph.conv8(graph.q("image"), 1, 8)))
        graph.conv8(graph.q(graph.add("Relu", graph.conv8(first, 8, 8, group=4))), 8, 3)
        return 3

    path = written(build)
    triton.build(path, tmp_path)
    x = windows(1)
    with triton.open(tmp_path, EngineOptions()) as engine:
        answers, layers = engine(x), engine.layers()
    assert [layer.precision for layer in layers] == ["int8", "fp16", "int8"]
    expected = wanted(path, x)
    assert np.mean(np.abs(answers - expected) <= 4 * np.abs(expected).max() / 127) >= 0.999


def test_a_transposed_convolution_of_single_voxels(device: torch.device, tmp_path: Path) -> None:
    def build(graph: Graph) -> int:
        first = graph.q(graph.add("Relu", graph.conv8(graph.q("image"), 1, 6)))
        up = graph.add("ConvTranspose", first, graph.integers(6, 6, 1, 1, 1, axis=1))
        graph.conv8(graph.q(up), 6, 3)
        return 3

    path, x = written(build), windows(2)
    triton.build(path, tmp_path, BuildSettings(batch=2))
    with triton.open(tmp_path, EngineOptions()) as engine:
        answers, layers = engine(x), engine.layers()
    assert {layer.precision for layer in layers} == {"int8"}
    np.testing.assert_array_equal(answers, wanted(path, x))


def test_channels_that_fill_no_row(device: torch.device, tmp_path: Path) -> None:
    path, x = written(odd, unsigned=True), windows(2)
    triton.build(path, tmp_path, BuildSettings(batch=2))
    with triton.open(tmp_path, EngineOptions()) as engine:
        answers, layers = engine(x), engine.layers()
    assert {layer.precision for layer in layers} == {"int8"}
    np.testing.assert_allclose(answers, wanted(path, x), rtol=0, atol=1e-6)
