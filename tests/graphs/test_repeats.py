"""Constants that repeat themselves become a Gather of the same values; all others stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ptq3d.engines import get_backend
from ptq3d.engines.base import EngineOptions
from ptq3d.graphs import repeats
from ptq3d.graphs.constants import round_added_constants
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify

ort = pytest.importorskip("onnxruntime")


def adding(path: Path, constant: np.ndarray, op: str = "Add", shape: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Path:
    """image of a shape + constant of a shape that broadcasts."""
    graph = helper.make_graph(
        [helper.make_node(op, ["image", "constant"], ["y"], name="add")],
        "adding",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(constant, "constant")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def run(path: Path, image: np.ndarray) -> np.ndarray:
    return np.asarray(ort.InferenceSession(path).run(None, {"image": image})[0])


@given(axis=st.integers(1, 4), distinct=st.integers(1, 4), seed=st.integers(0, 99), pairs=st.booleans())
@settings(max_examples=25, deadline=None)
def test_sharing_changes_no_value(axis: int, distinct: int, seed: int, pairs: bool) -> None:
    import tempfile

    rng = np.random.default_rng(seed)
    shape = [1, 2, 3, 4, 5]
    if pairs:
        table = rng.standard_normal((1, 2, 3, distinct)).astype(np.float32)
        constant = table[..., rng.integers(0, distinct, (4, 5))]
    else:
        table = rng.standard_normal([*shape[:axis], distinct, *shape[axis + 1 :]]).astype(np.float32)
        constant = np.take(table, rng.integers(0, distinct, shape[axis]), axis)
    image = rng.standard_normal(shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "LEAST_BYTES", 0)
        save_graph(simplify(load_graph(adding(Path(folder) / "n.onnx", constant))), Path(folder) / "s.onnx")
        np.testing.assert_array_equal(run(Path(folder) / "s.onnx", image), image + constant)


def test_masks_of_windows_are_stored_once(tmp_path: Path) -> None:
    """Three different masks of 40 x 60 pairs for 2 x 3 x 4 x 5 windows' worth of them: an eighth of the bytes."""
    rng = np.random.default_rng(0)
    masks = rng.standard_normal((1, 3, 1, 40, 60)).astype(np.float32)
    model = load_graph(adding(tmp_path / "n.onnx", np.zeros(1, np.float32)))
    value = model.graph.initializers["constant"]
    import onnx_ir as ir

    value.const_value = ir.tensor(np.take(masks, np.arange(70) % 3, 1), name="constant")
    value.shape = ir.Shape((1, 70, 1, 40, 60))
    assert repeats.share_repeats(model) == 1
    assert [node.op_type for node in model.graph] == ["Gather", "Add"]
    stored = sum(one.const_value.nbytes for one in model.graph.initializers.values() if one.const_value is not None)
    assert stored == masks.nbytes + 70 * 4


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_other_constants_stay(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "LEAST_BYTES", 0)
    constant = np.random.default_rng(0).standard_normal((1, 2, 3, 4, 5)).astype(np.float32)
    if op == "Mul":
        constant[:] = constant[:, :1, :1]
    model = load_graph(adding(tmp_path / "n.onnx", constant, op))
    assert repeats.share_repeats(model) == 0


def test_openvinos_file_holds_the_different_values_once(tmp_path: Path) -> None:
    """It folds a Gather of constants when it converts a graph, which would write the repeats out."""
    openvino = get_backend("openvino")
    random = np.random.default_rng(0)
    different = random.normal(size=(1, 1, 4, 32, 32)).astype(np.float32)
    mask = different[:, :, random.integers(0, 4, 64)]
    path = adding(tmp_path / "n.onnx", mask, shape=mask.shape)
    image = random.normal(size=mask.shape).astype(np.float32)
    openvino.build(path, tmp_path / "engine")
    assert (tmp_path / "engine/model.bin").stat().st_size < mask.nbytes / 10
    with openvino.open(tmp_path / "engine", EngineOptions()) as engine:
        assert np.array_equal(engine(image), image + mask)


@pytest.mark.parametrize("largest", [1.0, 1e5])
def test_large_added_constants_of_an_int8_file_are_float16_where_it_holds_them(tmp_path: Path, largest: float) -> None:
    openvino = get_backend("openvino")
    shape = (1, 1, 48, 48, 48)
    constant = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    constant[0, 0, 0, 0, 0] = largest
    model = simplify(load_graph(adding(tmp_path / "n.onnx", constant, shape=shape)))
    assert round_added_constants(model) == (largest < 65504)
    save_graph(model, tmp_path / "rounded.onnx")
    openvino.build(tmp_path / "rounded.onnx", tmp_path / "engine")
    half = constant.nbytes / 2
    assert ((tmp_path / "engine/model.bin").stat().st_size < 1.01 * half) == (largest < 65504)
    with openvino.open(tmp_path / "engine", EngineOptions()) as engine:
        found = engine(np.zeros(shape, np.float32))
    assert np.abs(found - constant).max() <= (2.0**-11 if largest < 65504 else 0)
