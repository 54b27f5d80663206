"""Tokens in three axes and masks without an extra one: the same values from the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from networks import NETWORKS, Builder
from ptq3d.graphs.layers import parameter_count, shape_of
from ptq3d.graphs.passes import simplify
from ptq3d.graphs.tokens import shorten_tokens
from ptq3d.quantization import qdq
from quantizing import graph, outputs, planned

GRID, FEATURES = (4, 6, 5), 8
TOKENS = int(np.prod(GRID))
MOVES = {"Conv", "ConvTranspose", "Transpose", "Reshape"}


def block(path: Path, *, normalization: str = "LayerNormalization", lead: int = 1) -> Path:
    """A block as SwinUNETR's, tokens channels last in five axes: attention with a mask, a perceptron, two residuals."""
    b = Builder(7)
    shapes = {"grid": (1, *GRID, FEATURES), "row": (1, TOKENS, FEATURES)}
    shapes |= {"masked": (lead, 1, TOKENS, TOKENS), "plain": (1, TOKENS, TOKENS)}
    b.weights += [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()]
    mask = np.where(b.random.random((lead, 1, TOKENS, TOKENS)) < 0.5, np.float32(-9), np.float32(0))
    b.weights.append(numpy_helper.from_array(mask, "mask"))

    def norm(x: str) -> str:
        parameters = (b.weight(FEATURES), b.weight(FEATURES)) if normalization == "LayerNormalization" else ()
        return b.add(normalization, x, *parameters)

    x = b.add("Transpose", b.conv("image", 1, FEATURES, kernel=1, stride=2), perm=[0, 2, 3, 4, 1])
    row = b.add("Reshape", b.add("MatMul", norm(x), b.weight(FEATURES, FEATURES)), "row")
    scores = b.add("MatMul", row, b.add("Transpose", row, perm=[0, 2, 1]))
    scores = b.add("Reshape", b.add("Add", b.add("Reshape", scores, "masked"), "mask"), "plain")
    x = b.add("Add", x, b.add("Reshape", b.add("MatMul", b.add("Softmax", scores, axis=-1), row), "grid"))
    wide = b.add("Add", b.add("MatMul", norm(x), b.weight(FEATURES, 12)), b.weight(12))
    x = b.add("Add", x, b.add("MatMul", b.add("Gelu", wide), b.weight(12, FEATURES)))
    x = b.add("Transpose", x, perm=[0, 4, 1, 2, 3])
    b.add("ConvTranspose", x, b.weight(FEATURES, 3, 2, 2, 2), b.weight(3), strides=[2, 2, 2])
    return b.save(path, "logits", 3)


def untouched(path: Path, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    """Simplified in every other way."""
    with monkeypatch.context() as patched:
        patched.setattr("ptq3d.graphs.passes.shorten_tokens", lambda model: None)
        return graph(path)


def axes(model: ir.Model) -> dict[str, set[int]]:
    """Operator -> numbers of axes of what it makes."""
    found: dict[str, set[int]] = {}
    for node in model.graph:
        found.setdefault(node.op_type, set()).add(len(shape_of(node.outputs[0])))
    return found


def test_tokens_get_three_axes_and_keep_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = untouched(block(tmp_path / "n.onnx"), monkeypatch)
    after = graph(tmp_path / "n.onnx")
    wanted, found = outputs(before, tmp_path / "a.onnx"), outputs(after, tmp_path / "b.onnx")
    assert np.abs(found - wanted).max() <= 1e-6 * np.ptp(wanted)
    assert 5 in axes(before)["LayerNormalization"] & axes(before)["Gelu"] & axes(before)["Add"]
    assert all(made == {3} for operator, made in axes(after).items() if operator not in MOVES)
    reshaped = sum(node.op_type == "Reshape" for node in after.graph)
    assert reshaped <= 6  # to tokens and back, to the row and back, to the grid: not two around each of nine operators


def test_a_mask_of_one_window_set_loses_its_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = untouched(block(tmp_path / "n.onnx"), monkeypatch), graph(tmp_path / "n.onnx")
    assert (4 in axes(before)["Add"], 4 in axes(after)["Add"]) == (True, False)
    assert parameter_count(after) <= parameter_count(before) + 100  # shapes; the long mask is gone


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_without_tokens_in_five_axes_are_left_alone(name: str, tmp_path: Path) -> None:
    """Neither convolutions nor tokens in three axes; a head of products, either (it is recognized by its shape)."""
    model = graph(NETWORKS[name](tmp_path / "n.onnx"))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    shorten_tokens(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_without_a_normalization_over_features_nothing_says_that_they_are_tokens(tmp_path: Path) -> None:
    model = graph(block(tmp_path / "n.onnx", normalization="Sigmoid"))
    assert 5 in axes(model)["MatMul"] & axes(model)["Gelu"]


def test_quantized_files_keep_their_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q/DQ stand where the runtime wants them; what moves between them is not ours to change."""
    model = untouched(block(tmp_path / "n.onnx"), monkeypatch)
    written = qdq.write(model, planned(model))
    operators = [node.op_type for node in written.graph]
    again = simplify(written.clone())
    assert [node.op_type for node in again.graph] == operators


def test_what_is_quantized_afterwards_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for model in (untouched(block(tmp_path / "n.onnx"), monkeypatch), graph(tmp_path / "n.onnx")):
        exact = outputs(model, tmp_path / "a.onnx")
        made = outputs(qdq.write(model, planned(model)), tmp_path / "b.onnx")
        errors.append(float(np.square(made - exact).mean()))
    assert errors[1] <= 1.1 * errors[0]
