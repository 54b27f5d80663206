"""One conformance template for every backend: the laws of `Engine`, and agreement with the engine that defines the answer."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from networks import NETWORKS, WINDOW, windows
from ptq3d.engines import BACKENDS, load_backend
from ptq3d.engines.base import Engine, EngineOptions, int8_mac_share
from ptq3d.errors import EngineError, InputError, ShapeError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import qdq
from ptq3d.quantization.targets import TARGETS
from quantizing import planned

Open = Callable[..., Engine]


def quantized(path: Path, target: str, method: str = "max") -> Path:
    model = simplify(load_graph(path))
    plan = planned(model, target, method=method, images=[window[None] for window in windows(4)])
    output = path.with_name(f"{path.stem}_{target}.onnx")
    save_graph(qdq.write(model, plan), output)
    return output


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    reason = load_backend(request.param).unavailable()
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def open_engine(tmp_path: Path) -> Open:
    def build_and_open(name: str, onnx: Path, **options: object) -> Engine:
        folder = tmp_path / f"{name}-{onnx.stem}-{len(options)}"
        runtime = load_backend(name)
        files = runtime.build(onnx, folder)
        assert all(file.is_file() and file.parent == folder for file in files)
        return runtime.open(folder, EngineOptions(**options))  # type: ignore[arg-type]

    return build_and_open


@pytest.mark.parametrize("network", NETWORKS)
def test_fp32_engines_agree_with_the_reference(network: str, backend: str, open_engine: Open, tmp_path: Path) -> None:
    onnx = NETWORKS[network](tmp_path / f"{network}.onnx")
    x = windows(2, seed=7)
    with open_engine("reference", onnx) as reference, open_engine(backend, onnx) as engine:
        wanted, found = reference(x), engine(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", NETWORKS)
def test_int8_engines_agree_with_the_reference(
    network: str, target: str, backend: str, open_engine: Open, tmp_path: Path
) -> None:
    """Same labels but at ties, and logits apart by less than the INT8 error itself: a value may fall on the other side of a step."""
    fp32 = NETWORKS[network](tmp_path / f"{network}.onnx")
    int8 = quantized(fp32, target)
    x = windows(3, seed=8)
    with (
        open_engine("reference", fp32) as exact,
        open_engine("reference", int8) as reference,
        open_engine(backend, int8) as engine,
    ):
        truth, wanted, found = exact(x), reference(x), engine(x)
    span = truth.max() - truth.min()
    own_error = np.sqrt(np.mean((wanted - truth) ** 2)) / span
    between = np.sqrt(np.mean((found - wanted) ** 2)) / span
    assert 0 < own_error < 0.02
    assert between < 0.5 * own_error
    assert (found.argmax(1) == wanted.argmax(1)).mean() > 0.99


def test_openvino_runs_every_layer_in_int8_and_says_so(open_engine: Open, tmp_path: Path) -> None:
    for network in ("unet", "meshnet"):
        fp32 = NETWORKS[network](tmp_path / f"{network}.onnx")
        with open_engine("openvino", quantized(fp32, "openvino")) as engine:
            assert int8_mac_share(engine.layers()) == 1.0
        with open_engine("openvino", fp32) as engine:
            assert int8_mac_share(engine.layers()) == 0.0


def test_onnxruntime_runs_its_own_files_in_int8_where_it_has_kernels(open_engine: Open, tmp_path: Path) -> None:
    """QLinearConv for every 3D convolution but the last, whose logits stay real; it has no integer ConvTranspose."""
    pytest.importorskip("onnxruntime")
    for network in ("unet", "meshnet", "resized"):
        fp32 = NETWORKS[network](tmp_path / f"{network}.onnx")
        with open_engine("onnxruntime", quantized(fp32, "onnxruntime")) as engine:
            *inner, last = engine.layers()
            share = int8_mac_share(engine.layers())
            assert last.precision == "fp32"
            for layer in inner:
                assert layer.op == ("ConvTranspose" if layer.name.startswith("convt") else "QLinearConv")
        with open_engine("onnxruntime", quantized(fp32, "openvino")) as engine:
            found = int8_mac_share(engine.layers())
            assert found == share if network == "resized" else found < share  # both targets quantize its sum


def test_layers_report_the_same_macs_everywhere(backend: str, open_engine: Open, tmp_path: Path) -> None:
    onnx = NETWORKS["unet"](tmp_path / "unet.onnx")
    voxels = int(np.prod(WINDOW))
    by_hand = (
        voxels * 27 * 7 + voxels // 8 * 27 * 7 * 12 + voxels // 8 * 12 * 7 * 8 + voxels * 27 * 14 * 8 + voxels * 8 * 5
    )
    with open_engine(backend, onnx) as engine:
        assert sum(layer.macs for layer in engine.layers()) == by_hand


def test_batch_equals_windows_one_by_one(backend: str, open_engine: Open, tmp_path: Path) -> None:
    x = windows(3, seed=9)
    with open_engine(backend, NETWORKS["unet"](tmp_path / "unet.onnx")) as engine:
        together = engine(x)
        np.testing.assert_array_equal(together, np.concatenate([engine(x[i : i + 1]) for i in range(3)]))
        np.testing.assert_array_equal(together, engine(x))


def test_two_engines_at_once_do_not_touch_each_other(backend: str, open_engine: Open, tmp_path: Path) -> None:
    x = windows(1, seed=10)
    with open_engine(backend, NETWORKS["unet"](tmp_path / "unet.onnx")) as first:
        alone = first(x)
        with open_engine(backend, NETWORKS["meshnet"](tmp_path / "meshnet.onnx")) as second:
            second(x)
            np.testing.assert_array_equal(first(x), alone)
        np.testing.assert_array_equal(first(x), alone)


@pytest.mark.parametrize(
    "wrong",
    [
        windows(1)[0],
        windows(1).astype(np.float64),
        windows(1)[..., :-1],
        np.repeat(windows(1), 2, axis=1),
        windows(1)[:0],
    ],
    ids=["4D", "float64", "window", "channels", "empty"],
)
def test_wrong_windows_are_refused(wrong: np.ndarray, backend: str, open_engine: Open, tmp_path: Path) -> None:
    with (
        open_engine(backend, NETWORKS["meshnet"](tmp_path / "meshnet.onnx")) as engine,
        pytest.raises(ShapeError, match=r"\(n, 1 x 8"),
    ):
        engine(wrong)


def test_closing_twice_is_fine_and_use_after_close_is_not(backend: str, open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine(backend, NETWORKS["meshnet"](tmp_path / "meshnet.onnx"))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine(windows(1))


def test_an_unknown_device_is_an_error_never_another_one(backend: str, open_engine: Open, tmp_path: Path) -> None:
    onnx = NETWORKS["meshnet"](tmp_path / "meshnet.onnx")
    with pytest.raises(InputError, match=r"cuda:7|CUDA:7"):
        open_engine(backend, onnx, device="cuda:7")


def test_building_starts_no_process_and_tells_nobody(
    backend: str, open_engine: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> int:
        calls.append("a process or a connection")
        raise OSError

    calls: list[str] = []
    for module, name in ((os, "fork"), (subprocess, "Popen"), (socket, "create_connection")):
        monkeypatch.setattr(module, name, started)
    open_engine(backend, NETWORKS["unet"](tmp_path / "n.onnx"))
    assert not calls


def test_bf16_is_near_fp32_and_reported(open_engine: Open, tmp_path: Path) -> None:
    onnx = NETWORKS["unet"](tmp_path / "unet.onnx")
    x = windows(1, seed=11)
    for name in ("torch", "openvino"):
        with open_engine(name, onnx) as exact, open_engine(name, onnx, precision="bf16") as rounded:
            wanted, found = exact(x), rounded(x)
            precisions = {layer.precision for layer in rounded.layers()}
        assert np.abs(found - wanted).max() < 0.05 * (wanted.max() - wanted.min())
        if name == "torch":
            assert precisions == {"bf16"}
            assert np.abs(found - wanted).max() > 0
