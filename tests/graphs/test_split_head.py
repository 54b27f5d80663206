"""The late head: body and head together are the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from networks import Builder
from ptq3d.engines import get_backend
from ptq3d.engines.base import EngineOptions
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify
from ptq3d.graphs.split_head import Split, head_layer_of, split_head
from ptq3d.quantization import planning, qdq
from ptq3d.quantization.quantizer import HEAD, Recipe, quantize_graph
from ptq3d.quantization.targets import TARGETS
from quantizing import observed_exactly, planned

SHAPE = (1, 1, 8, 12, 10)


def wide(path: Path, *, ending: str = "", features: int = 4, classes: int = 9, bias: bool = True) -> Path:
    """A convolution and a head of more classes than features, and what may follow it."""
    b = Builder(3)
    x = b.add("Relu", b.conv("image", 1, features))
    if ending == "product":
        last = b.add("Transpose", x, perm=[0, 2, 3, 4, 1])
        product = b.add("MatMul", last, b.weight(features, classes))
        shifted = b.add("Add", b.weight(classes), product) if bias else product
        b.add("Transpose", shifted, perm=[0, 4, 1, 2, 3])
    else:
        weights = [b.weight(classes, features, 1, 1, 1), *([b.weight(classes)] if bias else [])]
        logits = b.add("Conv", x, *weights)
        if ending:
            b.add(ending, logits, **({"axis": 1} if ending == "Softmax" else {}))
    return b.save(path, "logits", classes)


def answers(model: ir.Model, folder: Path, image: np.ndarray) -> np.ndarray:
    save_graph(model, folder / "graph.onnx")
    backend = get_backend("torch")
    backend.build(folder / "graph.onnx", folder / "engine")
    with backend.open(folder / "engine", EngineOptions("cpu")) as engine:
        return engine(image)


def joined(split: Split, folder: Path, image: np.ndarray) -> np.ndarray:
    assert split.head is not None
    features = answers(split.body, folder, image).astype(np.float64)
    return np.einsum("kf,nfxyz->nkxyz", split.head.matrix(), features) + split.head.bias[:, None, None, None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ending", ["", "Softmax", "Sigmoid", "Identity", "product"])
def test_body_and_head_are_the_graph(tmp_path: Path, ending: str, bias: bool) -> None:
    model = simplify(load_graph(wide(tmp_path / "net.onnx", ending=ending, bias=bias)))
    before = [node.op_type for node in model.graph]
    split = split_head(model)
    assert [node.op_type for node in model.graph] == before
    assert split.reason == "late head: 4 features for 9 classes"
    assert split.head is not None
    assert (split.head.classes, split.head.features) == (9, 4)
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    logits, whole = joined(split, tmp_path, image), answers(model, tmp_path, image)
    if ending == "Softmax":
        logits = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ending == "Sigmoid":
        logits = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "triton"])
def test_a_quantized_body_gives_integers_and_the_head_their_meaning(tmp_path: Path, target: str) -> None:
    model = simplify(load_graph(wide(tmp_path / "net.onnx", features=6)))
    quantized = simplify(qdq.write(model, planned(model, target)))
    split = split_head(quantized)
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    whole = answers(quantized, tmp_path, image)
    features = answers(split.body, tmp_path, image)
    assert features.dtype in (np.uint8, np.int8)
    np.testing.assert_allclose(joined(split, tmp_path, image), whole, rtol=0, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("ending", "features", "classes", "reason"),
    [
        ("", 9, 9, "no fewer"),
        ("", 12, 9, "no fewer"),
        ("Relu", 4, 9, "last layer is Relu"),
        ("Tanh", 4, 9, "last layer is Tanh"),
    ],
)
def test_what_is_no_wide_linear_map_stays_whole(
    tmp_path: Path, ending: str, features: int, classes: int, reason: str
) -> None:
    model = simplify(load_graph(wide(tmp_path / "net.onnx", ending=ending, features=features, classes=classes)))
    split = split_head(model)
    assert split.head is None
    assert [node.op_type for node in split.body.graph] == [node.op_type for node in model.graph]
    assert reason in split.reason


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("ending", ["Softmax", "Sigmoid"])
def test_a_whole_graph_ends_at_its_logits_too(tmp_path: Path, ending: str, late: bool) -> None:
    """Else windows of probabilities would be blended without a late head and of logits with one."""
    net = wide(tmp_path / "net.onnx", ending=ending, features=12 if late else 4)
    split = split_head(simplify(load_graph(net)), late=late)
    assert split.head is None
    assert [node.op_type for node in split.body.graph] == ["Conv", "Relu", "Conv"]


def test_a_softmax_over_space_is_not_dropped(tmp_path: Path) -> None:
    b = Builder(4)
    logits = b.conv(b.add("Relu", b.conv("image", 1, 3)), 3, 5, kernel=1)
    b.add("Softmax", logits, axis=2)
    split = split_head(simplify(load_graph(b.save(tmp_path / "net.onnx", "logits", 5))))
    assert split.head is None


def test_a_head_that_is_all_there_is_stays(tmp_path: Path) -> None:
    b = Builder(4)
    b.conv("image", 1, 5, kernel=1)
    split = split_head(simplify(load_graph(b.save(tmp_path / "net.onnx", "logits", 5))))
    assert split.head is None
    assert "nothing but" in split.reason


@pytest.mark.parametrize("ending", ["", "Softmax", "product"])
def test_the_quantizer_leaves_a_late_head_in_floating_point(tmp_path: Path, ending: str) -> None:
    """It runs once a voxel, so INT8 would save nothing and cost its noise, and second terms double what is blended."""
    model = simplify(load_graph(wide(tmp_path / "net.onnx", ending=ending)))
    made = quantize_graph(model, observed_exactly(model), Recipe())
    head = head_layer_of(model)
    assert head is not None
    assert made.kept[head] == HEAD
    assert head not in made.plan.layers
    split = split_head(simplify(made.model))
    assert split.head is not None
    assert split.head.features == 4
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    assert answers(split.body, tmp_path, image).dtype == np.float32


def test_a_late_head_of_triton_reads_integers_though_layers_in_floating_point_do_not(tmp_path: Path) -> None:
    """It runs outside of the engine, which hands over a quarter of the bytes."""
    model = simplify(load_graph(wide(tmp_path / "net.onnx")))
    placement = planning.place(model, TARGETS["triton"])
    seen = observed_exactly(model, placement=placement)
    made = quantize_graph(model, seen, Recipe("triton", high_precision_dtype="fp16"))
    split = split_head(simplify(made.model))
    assert split.head is not None
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    assert answers(split.body, tmp_path, image).dtype == np.uint8


def test_a_wider_kernel_is_no_head(tmp_path: Path) -> None:
    b = Builder(4)
    b.conv(b.add("Relu", b.conv("image", 1, 3)), 3, 5, kernel=3)
    split = split_head(simplify(load_graph(b.save(tmp_path / "net.onnx", "logits", 5))))
    assert split.head is None
