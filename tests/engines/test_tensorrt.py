"""The life of a TensorRT engine on a stand-in of its binding: what is called in which order, what is said when something fails, and
that everything is freed."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fake_tensorrt
from fake_tensorrt import Machine
from networks import NETWORKS, windows
from ptq3d.engines import get_backend, tensorrt
from ptq3d.engines.base import BuildSettings, EngineOptions, int8_mac_share
from ptq3d.engines.tensorrt_layers import reports
from ptq3d.errors import EngineError, OptionError, ShapeError, UnavailableError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.layers import layers
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import qdq
from quantizing import planned

PARTS = ["OnnxParser", "INetworkDefinition", "IBuilderConfig", "Builder"]  # of a build, in the order in which they go


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    found = Machine()
    monkeypatch.setenv("PTQ3D_CACHE", str(tmp_path / "cache"))
    fake_tensorrt.install(monkeypatch, found)
    return found


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return NETWORKS["unet"](tmp_path / "unet.onnx")


@pytest.fixture
def quantized(onnx: Path) -> Path:
    model = simplify(load_graph(onnx))
    plan = planned(model, "tensorrt", method="max", images=[window[None] for window in windows(2)])
    path = onnx.with_name("int8.onnx")
    save_graph(qdq.write(model, plan), path)
    return path


Build = Callable[..., Path]


@pytest.fixture
def built(machine: Machine, tmp_path: Path) -> Build:
    def make(path: Path, **settings: object) -> Path:
        folder = tmp_path / f"{path.stem}-{len(settings)}"
        tensorrt.build(path, folder, BuildSettings(**settings))  # type: ignore[arg-type]
        return folder

    return make


def test_it_is_available_and_bound_to_the_gpu(machine: Machine) -> None:
    assert tensorrt.unavailable() is None
    assert get_backend("tensorrt").version() == machine.version
    settings = BuildSettings(precision="fp16", batch=4, workspace_gb=2.5)
    assert tensorrt.compiled_for(settings) == "NVIDIA Stand-in sm 9.0 fp16 batch 4 2.5 GB"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False),
            "no NVIDIA GPU, or its driver is older",
        ),
        (lambda patch: patch.setattr(torch.version, "cuda", None), "built without CUDA"),
        (lambda patch: patch.setitem(__import__("sys").modules, "tensorrt", None), r"pip install 'ptq3d\[tensorrt\]'"),
        (lambda patch: patch.setattr(__import__("tensorrt"), "__version__", "10.2.0.post1"), "not one of 10.3 to 11"),
        (lambda patch: patch.setattr(__import__("tensorrt"), "__version__", "12.0.1"), "not one of 10.3 to 11"),
    ],
    ids=["driver", "torch", "package", "older", "newer"],
)
def test_why_it_is_not_available(
    spoil: Callable[[pytest.MonkeyPatch], None], said: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises(UnavailableError, match=said):
        get_backend("tensorrt")


def test_a_build_is_strongly_typed_without_tf32_and_everything_is_freed(
    machine: Machine, onnx: Path, built: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="ptq3d"):
        folder = built(onnx, workspace_gb=0.5)
    gc.collect()
    begun = [call for call in machine.calls if not call.startswith("free")]
    assert begun == [
        "empty cache",
        "network 2",
        "parse",
        "clear TF32",
        "WORKSPACE 500000000",
        "timings of 0 bytes",
        "build",
    ]
    assert machine.freed() == PARTS
    assert {path.name for path in folder.iterdir()} == {"engine.plan", "tensorrt.json"}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "TensorRT: building"),
        ("WARNING", "TensorRT: a weight is subnormal"),
    ]


def test_tf32_only_where_it_is_asked_for(machine: Machine, onnx: Path, built: Build) -> None:
    built(onnx, precision="tf32")
    assert "clear TF32" not in machine.calls


def test_timings_are_kept_for_the_next_build(machine: Machine, onnx: Path, built: Build, tmp_path: Path) -> None:
    built(onnx)
    built(onnx)
    machine.faults.add("timings")
    built(onnx)
    said = [call for call in machine.calls if call.startswith("timings")]
    assert said == [
        "timings of 0 bytes",
        "timings of 4 bytes",
        "timings of 8 bytes refused",
        "timings of 0 bytes",
    ]
    assert [path.suffix for path in (tmp_path / "cache/tensorrt").iterdir()] == [".timings"]


def test_timings_that_cannot_be_kept_cost_no_engine(
    machine: Machine, onnx: Path, built: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    assert (built(onnx) / "engine.plan").is_file()
    assert "cannot be kept for the next build" in caplog.text


def test_what_ran_is_read_between_bare_control_characters_and_tf32_is_told() -> None:
    layer = '{"Name": "m", "LayerType": "conv", "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]", "Weights": {"Type": "Float"}, '
    said = f'{{"Layers": [{layer} "TacticName": "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32"}}]}}'
    assert [one.precision for one in reports(said, [("a", "Conv", 1), ("b", "Conv", 1)])] == ["tf32", "tf32"]


def test_a_driver_that_is_too_old_is_named(machine: Machine, onnx: Path, built: Build, tmp_path: Path) -> None:
    """Then the bindings raise a TypeError that says nothing, and TensorRT logs why."""
    folder = built(onnx)
    machine.faults.add("driver")
    said = r"CUDA initialization failure with error: 35\. TensorRT 10\.16\.1\.11 may want a newer driver"
    with pytest.raises(EngineError, match=f"cannot build unet.onnx: .*{said}"):
        tensorrt.build(onnx, tmp_path / "other")
    with pytest.raises(EngineError, match=f"cannot load it: .*{said}"):
        tensorrt.open(folder, EngineOptions())


def test_misused_bindings_are_our_fault(
    machine: Machine, onnx: Path, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__import__("tensorrt").Builder, "create_network", lambda builder: None)
    with pytest.raises(TypeError):
        built(onnx)


def test_rules_are_those_of_the_version_that_is_here(
    machine: Machine, onnx: Path, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list = []
    monkeypatch.setattr(tensorrt, "violations", lambda model, version: seen.append(version) or ())
    built(onnx)
    assert seen == [(10, 16)]


def test_an_engine_whose_tensors_are_blocked_is_refused(
    machine: Machine, onnx: Path, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt.open(built(onnx), EngineOptions()).close()
    monkeypatch.setattr(tensorrt, "_lay_out_plainly", lambda network: None)
    with pytest.raises(EngineError, match="'image' lies in memory as CDHW32, LINEAR is wanted"):
        tensorrt.open(built(onnx), EngineOptions())


def test_what_cuda_says_while_it_runs_is_an_error_of_the_engine(machine: Machine, onnx: Path, built: Build) -> None:
    with tensorrt.open(built(onnx), EngineOptions()) as engine:
        machine.faults.add("running")
        with pytest.raises(
            EngineError, match=r"while it ran the network: CUDA error: an illegal memory access was encountered$"
        ):
            engine(windows(1))


def test_progress_goes_up_to_the_end(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    told: list[float] = []
    tensorrt.build(onnx, tmp_path / "engine", progress=lambda done, total: told.append(done / total))
    assert told == [0.125, 0.25, 0.375, 0.5, 0.5, 1.0]


def test_the_bar_can_stop_a_build(machine: Machine, onnx: Path, tmp_path: Path) -> None:
    monitor = tensorrt._monitor(lambda done, total: None)
    monitor.stopped = True
    model = simplify(load_graph(onnx))
    with pytest.raises(EngineError, match="the build was stopped"):
        tensorrt._serialized(onnx, model, BuildSettings(), torch.device("cpu"), monitor)
    assert not (tmp_path / "cache/tensorrt").exists()
    gc.collect()
    assert machine.freed() == PARTS


def test_an_interrupt_stops_the_thread_that_builds(
    machine: Machine, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python hears Ctrl-C while it waits for the thread; the thread is told and waited for."""

    class Future:
        def result(self) -> bytes:
            raise KeyboardInterrupt

    class Pool(tensorrt.ThreadPoolExecutor):
        def submit(self, work: Callable[..., bytes], *args: object) -> Future:  # type: ignore[override]
            stopped.append(args[-1])
            return Future()

    stopped: list = []
    monkeypatch.setattr(tensorrt, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        tensorrt.build(onnx, tmp_path / "engine")
    assert stopped[0].stopped
    assert not list((tmp_path / "engine").iterdir())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("parser", r"Resize 'resize_3': only three dimensions are resized; the model is of a newer IR"),
        ("no kernel", r"no kernel for conv_4 \+ elu_5: leave that layer in floating point with ptq3d quantize --keep"),
        ("build memory", r"OutOfMemory \(requested 4096 bytes\) .*smaller --batch or --workspace"),
        ("no profile", "a profile of 1 to 2 windows"),
    ],
)
def test_a_build_that_fails_says_why_and_leaves_nothing(
    fault: str, said: str, machine: Machine, onnx: Path, built: Build, tmp_path: Path
) -> None:
    machine.faults.add(fault)
    with pytest.raises(EngineError, match=said):
        built(onnx, batch=2)
    assert not list((tmp_path / f"{onnx.stem}-1").iterdir())
    gc.collect()
    assert {"OnnxParser", "INetworkDefinition", "Builder"} <= set(machine.freed())


def test_a_graph_that_breaks_rules_is_refused_before_anything_is_built(
    machine: Machine, onnx: Path, built: Build
) -> None:
    model = simplify(load_graph(onnx))
    plan = planned(model, "openvino", images=[window[None] for window in windows(2)])
    save_graph(qdq.write(model, plan), onnx.with_name("u8.onnx"))
    with pytest.raises(EngineError, match="--retarget tensorrt"):
        built(onnx.with_name("u8.onnx"))
    assert machine.calls == []


def test_an_engine_runs_once_is_captured_and_then_replayed(machine: Machine, onnx: Path, built: Build) -> None:
    folder = built(onnx)
    machine.calls.clear()
    x = torch.from_numpy(windows(3))
    with tensorrt.open(folder, EngineOptions()) as engine:
        assert [call for call in machine.calls if call != "empty cache"] == ["execute", "synchronize", "capture"]
        machine.calls.clear()
        list(engine.stream(x))
        assert machine.calls == ["wait", "replay", "wait"] * 3  # our stream for the caller's, and the caller's for ours


@pytest.mark.parametrize("fault", ["capture", "refused capture"])
def test_a_network_that_cannot_be_captured_runs_without_and_says_so(
    fault: str, machine: Machine, onnx: Path, built: Build, caplog: pytest.LogCaptureFixture
) -> None:
    folder, x = built(onnx), windows(2)
    with tensorrt.open(folder, EngineOptions()) as engine:
        wanted = engine(x)
    machine.faults.add(fault)
    with tensorrt.open(folder, EngineOptions()) as engine:
        machine.calls.clear()
        np.testing.assert_array_equal(engine(x), wanted)
    assert machine.calls.count("execute") == 2
    assert "without a CUDA graph" in caplog.text


def test_closing_frees_graph_context_engine_and_runtime_in_this_order(
    machine: Machine, onnx: Path, built: Build
) -> None:
    engine = tensorrt.open(built(onnx, batch=2), EngineOptions())
    engine(windows(3))
    engine.layers()
    gc.collect()
    machine.calls.clear()
    engine.close()
    gc.collect()
    assert machine.calls[0] == "synchronize"
    assert machine.freed() == ["graph", "graph", *["IExecutionContext"] * 2, "ICudaEngine", "Runtime"]
    machine.calls.clear()
    engine.close()
    assert machine.calls == []
    with pytest.raises(EngineError, match="closed"):
        engine(windows(1))
    with pytest.raises(EngineError, match="closed"):
        list(engine.stream(torch.from_numpy(windows(1))))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("deserialize", "Serialization assertion failed"),
        ("context memory", r"5.00 GB of device memory .* 2.00 GB are free"),
        ("input memory", r"5.00 GB of device memory .* 2.00 GB are free"),
        ("execute", "failed while it ran"),
        ("address", "has no tensor 'image'"),
    ],
)
def test_an_engine_that_cannot_be_opened_says_why_and_is_freed(
    fault: str, said: str, machine: Machine, onnx: Path, built: Build
) -> None:
    folder = built(onnx)
    machine.faults.add(fault)
    machine.calls.clear()
    with pytest.raises(EngineError, match=said):
        tensorrt.open(folder, EngineOptions())
    gc.collect()
    assert "Runtime" in machine.freed()
    assert ("ICudaEngine" in machine.freed()) == (fault != "deserialize")


def test_another_gpu_version_device_or_precision_is_refused(machine: Machine, onnx: Path, built: Build) -> None:
    folder = built(onnx)
    with pytest.raises(UnavailableError, match=r"'cuda:2' here\. The NVIDIA GPUs are: cuda:0, cuda:1"):
        tensorrt.open(folder, EngineOptions("cuda:2"))
    with pytest.raises(UnavailableError, match="no device 'GPU'"):
        tensorrt.build(onnx, folder, BuildSettings("GPU"))
    with pytest.raises(OptionError, match="--precision fp32, not for fp16"):
        tensorrt.open(folder, EngineOptions(precision="fp16"))
    machine.capability = (8, 0)
    with pytest.raises(EngineError, match=r"compute capability 9\.0, this machine has 8\.0"):
        tensorrt.open(folder, EngineOptions())


def test_another_version_is_refused(
    machine: Machine, onnx: Path, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(onnx)
    monkeypatch.setattr(__import__("tensorrt"), "__version__", "11.4.0.106")
    with pytest.raises(EngineError, match=r"TensorRT 10\.16\.1\.11, this machine has 11\.4\.0\.106"):
        tensorrt.open(folder, EngineOptions())


def test_another_card_of_the_same_kind_is_told(
    machine: Machine, onnx: Path, built: Build, caplog: pytest.LogCaptureFixture
) -> None:
    folder = built(onnx)
    machine.name = "NVIDIA Stand-in 2"
    tensorrt.open(folder, EngineOptions()).close()
    assert "was built on NVIDIA Stand-in; on NVIDIA Stand-in 2" in caplog.text


def test_a_batch_gives_every_window_its_answer_and_the_rest_runs_alone(
    machine: Machine, onnx: Path, built: Build
) -> None:
    x = windows(7, seed=3)
    with tensorrt.open(built(onnx), EngineOptions()) as engine:
        wanted = engine(x)
    with tensorrt.open(built(onnx, batch=3), EngineOptions()) as engine:
        machine.calls.clear()
        found = engine(x)
        assert machine.calls.count("replay") == 2 + 1
        assert [call for call in machine.calls if call.startswith("shape")] == ["shape 1"]
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
        with pytest.raises(ShapeError):
            engine(x[:, :, :-1])


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_the_report_says_what_the_inspector_says(
    version: str, machine: Machine, onnx: Path, quantized: Path, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.version = version
    monkeypatch.setattr(__import__("tensorrt"), "__version__", version)
    model = simplify(load_graph(quantized))
    with tensorrt.open(built(quantized), EngineOptions()) as engine:
        found = engine.layers()
    assert [(one.name, one.macs) for one in found] == [(one.name, one.macs) for one in layers(model)]
    asked = {layer.name: layer.precision for layer in qdq.planned_layers(model)}
    assert {one.name: one.precision for one in found} == {
        name: "int8" if kind == "int8" else "fp32" for name, kind in asked.items()
    }
    assert "i8i8" in next(one.op for one in found if one.precision == "int8")
    with tensorrt.open(built(onnx), EngineOptions()) as engine:
        assert int8_mac_share(engine.layers()) == 0


def test_the_facts_of_an_artefact_hold_no_path(machine: Machine, onnx: Path, built: Build) -> None:
    written = json.loads((built(onnx) / "tensorrt.json").read_text())
    assert set(written) == {
        "version", "capability", "precision", "batch", "fixed", "shape", "features", "layers", "device",
    }  # fmt: skip
    assert str(onnx.parent) not in json.dumps(written)
