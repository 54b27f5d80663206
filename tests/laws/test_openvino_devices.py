"""Laws of OpenVINO's other devices: a stand-in for the core says that there is a GPU or an NPU, the CPU computes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from networks import NETWORKS, windows
from ptq3d.engines import load_backend
from ptq3d.engines.base import Engine, EngineOptions
from ptq3d.errors import InputError, OptionError, UnavailableError

openvino = pytest.importorskip("openvino")
REAL = openvino.Core

# what OpenVINO's documents say of these devices: a GPU has no CPU threads, an NPU sets its streams itself; neither has BF16
DEVICES: dict[str, tuple[dict[str, str], list[str]]] = {
    "GPU": ({"NUM_STREAMS": "RW", "INFERENCE_PRECISION_HINT": "RW"}, ["FP32", "FP16", "INT8", "BIN"]),
    "NPU": ({"NUM_STREAMS": "RO", "INFERENCE_PRECISION_HINT": "RW"}, ["FP16", "INT8"]),
}


class Shown:
    """A compiled model whose device may have no execution graph to show."""

    def __init__(self, compiled: Any, graph: bool) -> None:
        self._compiled, self._graph = compiled, graph

    def create_infer_request(self) -> Any:
        return self._compiled.create_infer_request()

    def get_runtime_model(self) -> Any:
        if not self._graph:
            raise RuntimeError("not implemented")
        return self._compiled.get_runtime_model()


class Core:
    """OpenVINO's core with more devices; it keeps what they were told."""

    names: tuple[str, ...] = ("CPU", "GPU.0", "GPU.1", "NPU")
    told: dict[str, Any]

    def __init__(self) -> None:
        self._core = REAL()
        self.available_devices = list(self.names)

    def read_model(self, path: Path) -> Any:
        return self._core.read_model(path)

    def get_property(self, device: str, name: str) -> Any:
        if device == "CPU":
            return self._core.get_property(device, name)
        return DEVICES[device.split(".")[0]][0 if name == "SUPPORTED_PROPERTIES" else 1]

    def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
        Core.told = {"device": device, **settings}
        return Shown(self._core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}), device != "NPU")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    load_backend("openvino").build(NETWORKS["meshnet"](tmp_path / "n.onnx"), tmp_path / "engine")
    monkeypatch.setattr(openvino, "Core", Core)
    return tmp_path / "engine"


def opened(folder: Path, **options: Any) -> Engine:
    return load_backend("openvino").open(folder, EngineOptions(**options))


@pytest.mark.parametrize(
    ("device", "options", "told"),
    [
        ("GPU", {}, {"INFERENCE_PRECISION_HINT": "f32"}),  # whose own choice is f16
        (
            "gpu.1",
            {"precision": "fp16", "threads": 2, "streams": 2},
            {"INFERENCE_PRECISION_HINT": "f16", "NUM_STREAMS": 2},
        ),
        ("NPU", {"precision": "fp16", "threads": 2, "streams": 2}, {"INFERENCE_PRECISION_HINT": "f16"}),
        (
            "CPU",
            {"threads": 2, "streams": 2},
            {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2},
        ),
    ],
)
def test_a_device_is_told_what_it_has(device: str, options: dict[str, Any], told: dict[str, Any], folder: Path) -> None:
    with opened(folder, device=device, **options):
        found = Core.told
    assert found.pop("device") == device.upper()
    assert found.pop("PERFORMANCE_HINT") == "LATENCY"
    assert found == told


@pytest.mark.parametrize(
    ("device", "precision", "kind", "said"),
    [
        ("GPU", "bf16", UnavailableError, "'GPU' computes in fp32, fp16, not in bf16"),
        ("NPU", "fp32", UnavailableError, "'NPU' computes in fp16, not in fp32"),
        ("GPU", "tf32", OptionError, "fp32, bf16, fp16, not in 'tf32'"),
        ("GPU.2", "fp32", UnavailableError, "no device 'GPU.2' here, only: CPU, GPU.0, GPU.1, NPU"),
        ("FPGA", "fp32", UnavailableError, "no device 'FPGA'"),
    ],
)
def test_what_a_device_does_not_have_is_refused(
    device: str, precision: str, kind: type[InputError], said: str, folder: Path
) -> None:
    with pytest.raises(kind, match=said):
        opened(folder, device=device, precision=precision)


def test_one_gpu_answers_to_both_of_its_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Core, "names", ("CPU", "GPU"))
    for name in ("GPU", "GPU.0"):
        opened(folder, device=name).close()
        assert Core.told["device"] == name
    with pytest.raises(UnavailableError, match=r"GPU\.1"):
        opened(folder, device="GPU.1")


def test_a_device_without_an_execution_graph_reports_nothing_it_does_not_know(folder: Path) -> None:
    x = windows(1)
    with opened(folder, device="NPU", precision="fp16") as blind, opened(folder, device="GPU") as engine:
        np.testing.assert_array_equal(blind(x), engine(x))
        assert {layer.precision for layer in blind.layers()} == {"unknown"}
        assert {layer.precision for layer in engine.layers()} == {"fp32"}
        assert [layer.macs for layer in blind.layers()] == [layer.macs for layer in engine.layers()]


def test_labels_are_chosen_on_the_cpu_whatever_the_device(folder: Path) -> None:
    with opened(folder, device="GPU") as engine:
        features = np.random.default_rng(0).normal(size=(5000, engine.spec.features)).astype(np.float32)
        assert engine.device.type == "cpu"
        Core.told = {}
        import torch

        found = engine.classifier(engine.head)(torch.from_numpy(features)).numpy()
        assert Core.told["device"] == "CPU"
    np.testing.assert_array_equal(found, features.argmax(1))
