"""Laws of ONNX Runtime's execution providers: what each is told, and that nothing computes where it was not asked to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from networks import NETWORKS, windows
from ptq3d.engines import load_backend, providers
from ptq3d.engines.base import EngineOptions, LayerReport
from ptq3d.engines.onnxruntime import OnnxRuntimeEngine
from ptq3d.errors import EngineError, InputError, OptionError, UnavailableError
from ptq3d.graphs.files import save_graph
from ptq3d.quantization import qdq
from quantizing import graph, planned, run

onnxruntime = pytest.importorskip("onnxruntime")
ALL = tuple(provider.name for provider in providers.PROVIDERS.values())
HERE = onnxruntime.get_available_providers()


def told(*names: str, quantized: bool = False, **options: Any) -> dict[str, providers.Settings]:
    return dict(providers.chosen(EngineOptions(providers=names, **options), ALL, quantized=quantized))


# ------------------------------------------------------------------------------------------------------- what each is told


def test_the_order_of_providers_is_kept_and_none_means_the_cpu() -> None:
    assert [*told("tensorrt", "cuda", "cpu", precision="tf32")] == [ALL[2], ALL[1], ALL[0]]
    assert [*told("cuda", "cpu")] == [ALL[1], ALL[0]]
    assert told() == {"CPUExecutionProvider": {}}


@pytest.mark.parametrize(("device", "number"), [("auto", "0"), ("cuda", "0"), ("cuda:0", "0"), ("CUDA:3", "3")])
def test_a_gpu_is_told_its_number(device: str, number: str) -> None:
    for names in (("cuda",), ("tensorrt", "cuda", "cpu")):
        found = told(*names, device=device, precision="tf32")
        assert {found[name]["device_id"] for name in found if name != "CPUExecutionProvider"} == {number}


def test_fp32_on_cuda_means_without_tf32() -> None:
    assert told("cuda")["CUDAExecutionProvider"]["use_tf32"] == "0"
    assert told("cuda", precision="tf32")["CUDAExecutionProvider"]["use_tf32"] == "1"


def test_tensorrt_is_told_its_types_and_keeps_no_files() -> None:
    for quantized in (False, True):
        for precision in ("tf32", "fp16", "bf16"):
            found = told("tensorrt", precision=precision, quantized=quantized)["TensorrtExecutionProvider"]
            enabled = {name for name in found if name.endswith("_enable")}
            wanted = {f"trt_{precision}_enable"} - {"trt_tf32_enable"} | ({"trt_int8_enable"} if quantized else set())
            assert enabled == wanted
            assert not [name for name in found if "cache" in name or "path" in name]


@pytest.mark.parametrize(("device", "name"), [("auto", "CPU"), ("cpu", "CPU"), ("gpu.1", "GPU.1"), ("NPU", "NPU")])
def test_openvino_is_told_device_and_precision_in_so_many_words(device: str, name: str) -> None:
    """Its own default may be less than FP32."""
    settings = told("openvino", device=device, threads=3)["OpenVINOExecutionProvider"]
    threads = {"INFERENCE_NUM_THREADS": 3} if name == "CPU" else {}
    assert settings["device_type"] == name
    assert json.loads(settings["load_config"]) == {name: {"INFERENCE_PRECISION_HINT": "f32", **threads}}


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("mps",), {}, "cpu, cuda, tensorrt, openvino"),
        (("cuda", "cuda"), {}, "each once"),
        (("tensorrt",), {}, "tf32, fp16, bf16, not in 'fp32'"),
        (("cuda",), {"precision": "fp16"}, "fp32, tf32, not in 'fp16'"),
        (("cpu", "cuda"), {"precision": "tf32"}, "cpu runs in fp32, not in 'tf32'"),
        (("openvino",), {"precision": "tf32"}, "fp32, bf16, fp16"),
        (("openvino",), {"precision": "fp16"}, "bf16"),
        (("cuda",), {"device": "cpu"}, "cuda:0"),
        (("cuda",), {"device": "cuda:x"}, "cuda:0"),
    ],
)
def test_what_no_provider_can_do_is_refused(names: tuple[str, ...], options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        told(*names, **options)


def test_a_provider_that_is_not_here_is_refused_with_the_line_that_brings_it() -> None:
    for name, provider in providers.PROVIDERS.items():
        others = [other for other in ALL if other != provider.name]
        with pytest.raises(UnavailableError) as refused:
            providers.chosen(EngineOptions(providers=(name,), precision=provider.precisions[0]), others)
        assert provider.install in str(refused.value)
        assert f"'{name}'" in str(refused.value)


def test_only_providers_that_can_be_named_are_offered() -> None:
    with pytest.raises(UnavailableError, match="'cuda', only cpu"):
        providers.chosen(EngineOptions(providers=("cuda",)), ["AzureExecutionProvider", "CPUExecutionProvider"])


# ----------------------------------------------------------------------------------------------------- where the nodes run


@dataclass
class Node:
    name: str
    op_type: str = "Conv"


@dataclass
class Part:
    ep_name: str
    nodes: tuple[Node, ...]

    def get_nodes(self) -> tuple[Node, ...]:
        return self.nodes


@dataclass
class Session:
    """A session's report, as ONNX Runtime 1.24 to 1.32 gives it."""

    registered: tuple[str, ...]
    parts: tuple[Part, ...]

    def get_providers(self) -> list[str]:
        return list(self.registered)

    def get_provider_graph_assignment_info(self) -> Iterator[Part]:
        return iter(self.parts)


CPU, CUDA = ALL[:2]


def test_nodes_on_the_named_providers_are_told_of() -> None:
    session = Session((CUDA, CPU), (Part(CUDA, (Node("a"), Node("b"))), Part(CPU, (Node("c"),))))
    assert providers.placement(session, ("cuda", "cpu")) == {"a": "cuda", "b": "cuda", "c": "cpu"}


def test_a_node_elsewhere_is_an_error_that_names_it() -> None:
    session = Session((CUDA, CPU), (Part(CUDA, (Node("a"),)), Part(CPU, (Node("odd", "Resize"),))))
    with pytest.raises(EngineError, match=r"Resize 'odd' on cpu.*--providers cuda cpu"):
        providers.placement(session, ("cuda",))


def test_a_provider_that_did_not_start_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="could not start cuda"):
        providers.placement(Session((CPU,), (Part(CPU, (Node("a"),)),)), ("cuda",))
    with pytest.raises(UnavailableError, match="could not start cuda"):
        providers.placement(Session((CPU,), (Part(CPU, (Node("a"),)),)), ("cuda", "cpu"))
    with pytest.raises(EngineError, match="does not say"):
        providers.placement(Session((CUDA, CPU), ()), ("cuda",))


# ---------------------------------------------------------------------------------------------------------------- for real


def opened(path: Path, *names: str, **options: Any) -> OnnxRuntimeEngine:
    backend, folder = load_backend("onnxruntime"), path.with_suffix(".engine")
    backend.build(path, folder)
    engine = backend.open(folder, EngineOptions(providers=names, **options))
    assert isinstance(engine, OnnxRuntimeEngine)
    return engine


def int8(path: Path, target: str) -> Path:
    model = graph(path)
    save_graph(qdq.write(model, planned(model, target)), path.with_name(f"{target}.onnx"))
    return path.with_name(f"{target}.onnx")


def test_the_cpu_by_name_is_the_default(tmp_path: Path) -> None:
    path, x = int8(NETWORKS["unet"](tmp_path / "n.onnx"), "onnxruntime"), windows(1)
    with opened(path) as default, opened(path, "cpu") as named:
        np.testing.assert_array_equal(named(x), default(x))
        assert named.layers() == default.layers()


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "openvino"])
def test_what_this_machine_does_not_have_never_falls_back(name: str, tmp_path: Path) -> None:
    """Whether the package lacks the provider or the machine the device."""
    device = {"openvino": "GPU.7"}.get(name, "cuda:77")
    precision = providers.PROVIDERS[name].precisions[0]
    for names in ((name,), (name, "cpu")):
        with pytest.raises(InputError, match=name):
            opened(NETWORKS["meshnet"](tmp_path / "n.onnx"), *names, device=device, precision=precision)


def test_a_broken_file_is_an_engine_error(tmp_path: Path) -> None:
    """ONNX Runtime's own exceptions are no RuntimeErrors."""
    folder = tmp_path / "e"
    load_backend("onnxruntime").build(NETWORKS["meshnet"](tmp_path / "n.onnx"), folder)
    settings = onnxruntime.SessionOptions()
    (folder / "model.onnx").write_bytes(b"no ONNX")
    with pytest.raises(EngineError, match=r"cannot load .*model\.onnx"):
        providers.open_session(folder / "model.onnx", settings, EngineOptions())


@pytest.mark.skipif("OpenVINOExecutionProvider" not in HERE, reason="no onnxruntime-openvino here")
@pytest.mark.parametrize("target", ["", "openvino", "tensorrt", "onnxruntime"])
@pytest.mark.parametrize("network", NETWORKS)
def test_openvino_as_a_provider_agrees_with_the_reference(network: str, target: str, tmp_path: Path) -> None:
    path = NETWORKS[network](tmp_path / "n.onnx")
    path = int8(path, target) if target else path
    x = windows(2, seed=8)
    wanted = run("reference", path, x)
    with opened(path, "openvino") as engine:
        found = engine(x)
        assert {layer.precision for layer in engine.layers()} == {"unknown"}
        assert all(layer.op.endswith("on openvino") for layer in engine.layers())
    if (network, target) == ("rolled", "onnxruntime"):
        pytest.xfail("OpenVINO is wrong on a padded mean of integers with a zero-point, see test_engines.py")
    assert np.abs(found - wanted).max() <= (0.01 if target else 2e-5) * np.abs(wanted).max()


@pytest.mark.skipif("OpenVINOExecutionProvider" not in HERE, reason="no onnxruntime-openvino here")
def test_openvino_as_a_provider_computes_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    x, path = windows(1), NETWORKS["unet"](tmp_path / "n.onnx")
    wanted = run("reference", path, x)
    with opened(path, "openvino", threads=1) as exact, opened(path, "openvino", precision="bf16") as rounded:
        error, more = (np.abs(engine(x) - wanted).max() / np.abs(wanted).max() for engine in (exact, rounded))
    assert error < 2e-5
    assert more < 0.03


def test_a_gpu_reports_its_own_types_and_no_integers(tmp_path: Path) -> None:
    """Its layers are those of the optimized graph; CUDA has no integer convolution, so Q/DQ stay around floating ones."""
    from ptq3d.engines.onnxruntime import Ran

    model = graph(NETWORKS["meshnet"](tmp_path / "n.onnx"))
    names = [node.name for node in model.graph if node.op_type == "Conv"]
    ran = Ran({f"{name}_out": "Conv" for name in names}, dict.fromkeys(names[1:], "cuda") | {names[0]: "cpu"}, "tf32")
    with opened(tmp_path / "n.onnx") as engine:
        engine._ran = ran
        found: tuple[LayerReport, ...] = engine.layers()
    assert [layer.precision for layer in found] == ["fp32", *["tf32"] * (len(names) - 1)]
