"""Laws of graph simplification and of ONNX files in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from networks import NETWORKS, windows
from ptq3d.errors import FileError, GraphError, InputError
from ptq3d.graphs.export import export_network, relative_error
from ptq3d.graphs.files import load_graph, resize_window, save_graph, static_input_shape
from ptq3d.graphs.passes import simplify

ort = pytest.importorskip("onnxruntime")


def run(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path)
    return np.concatenate([session.run(None, {session.get_inputs()[0].name: w[None]})[0] for w in x])


@pytest.mark.parametrize("network", NETWORKS)
def test_simplify_keeps_the_output(network: str, tmp_path: Path) -> None:
    path = NETWORKS[network](tmp_path / "n.onnx")
    save_graph(simplify(load_graph(path)), tmp_path / "s.onnx")
    x = windows(2, seed=3)
    np.testing.assert_allclose(run(tmp_path / "s.onnx", x), run(path, x), atol=1e-5, rtol=1e-5)


def test_another_window_of_a_convolutional_network(tmp_path: Path) -> None:
    model = load_graph(NETWORKS["meshnet"](tmp_path / "n.onnx"))
    resize_window(model, (16, 10, 9))
    model = simplify(model)
    assert static_input_shape(model) == (1, 1, 16, 10, 9)
    save_graph(model, tmp_path / "w.onnx")
    assert run(tmp_path / "w.onnx", windows(1, shape=(1, 16, 10, 9))).shape == (1, 4, 16, 10, 9)


@pytest.mark.parametrize("window", [(0, 10, 9), (16, -1, 9)])
def test_a_window_with_nothing_in_it_is_refused(tmp_path: Path, window: tuple[int, int, int]) -> None:
    with pytest.raises(GraphError, match="has nothing in it"):
        resize_window(load_graph(NETWORKS["meshnet"](tmp_path / "n.onnx")), window)


def test_weights_too_many_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = NETWORKS["unet"](tmp_path / "n.onnx")
    model = simplify(load_graph(path))
    save_graph(model, tmp_path / "one.onnx")
    monkeypatch.setattr("ptq3d.graphs.files.EXTERNAL_DATA_BYTES", 0)
    save_graph(model, tmp_path / "two.onnx")
    assert (tmp_path / "two.onnx.data").is_file()
    save_graph(simplify(load_graph(tmp_path / "two.onnx")), tmp_path / "again.onnx")
    x = windows(1, seed=3)
    for name in ("two", "again"):
        np.testing.assert_array_equal(run(tmp_path / f"{name}.onnx", x), run(tmp_path / "one.onnx", x))


def test_export_equals_pytorch(tmp_path: Path) -> None:
    from torch import nn

    network = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ELU(), nn.Conv3d(6, 3, 1))
    exported = export_network(network, channels=2, window=(8, 9, 10))
    save_graph(exported.model, tmp_path / "e.onnx")
    assert relative_error(run(tmp_path / "e.onnx", exported.window), exported.logits) < 1e-5
    assert [node.op_type for node in exported.model.graph] == ["Conv", "Elu", "Conv"]


def test_a_network_that_does_not_fit_the_window_is_an_error() -> None:
    from torch import nn

    with pytest.raises(GraphError, match="logits"):
        export_network(nn.Conv3d(1, 2, 3), channels=1, window=(8, 8, 8))
    with pytest.raises(GraphError, match="channels"):
        export_network(nn.Conv3d(2, 2, 3, padding=1), channels=1, window=(8, 8, 8))


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08"], ids=["empty", "text", "stub"])
def test_what_is_no_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.onnx"):
        load_graph(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = NETWORKS["unet"](tmp_path / "n.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"half\.onnx"):
        load_graph(tmp_path / "half.onnx")


def test_missing_old_and_flat_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such ONNX file"):
        load_graph(tmp_path / "none.onnx")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 4]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)]), tmp_path / "old.onnx")
    with pytest.raises(GraphError, match="opset 11"):
        load_graph(tmp_path / "old.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "flat.onnx")
    with pytest.raises(GraphError, match="5D"):
        static_input_shape(load_graph(tmp_path / "flat.onnx"))
