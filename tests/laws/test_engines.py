"""One conformance template for every backend: the laws of `Engine`, and agreement with the engine that defines the answer.

It asks for no more than PyTorch, onnx, onnx-ir and onnxscript, so that it runs on a GPU machine as it is.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import NETWORKS, WINDOW, windows, with_batch
from ptq3d.engines import BACKENDS, latency, load_backend, reference
from ptq3d.engines.base import BuildSettings, Engine, EngineOptions, Precision, Windows, int8_mac_share
from ptq3d.errors import EngineError, InputError, ManifestError, OptionError, ShapeError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import qdq
from ptq3d.quantization.targets import TARGETS
from quantizing import observed_by_torch, planned


@dataclass(frozen=True)
class Way:
    """One way to run a network: a backend, and how it is told to."""

    backend: str
    options: EngineOptions = field(default_factory=EngineOptions)
    stand_in: bool = False

    @property
    def name(self) -> str:
        if self.stand_in:
            return f"{self.backend}{ON_A_STAND_IN}"
        told = (self.options.device, self.options.precision) if self.options != EngineOptions() else ()
        return "-".join((self.backend, *(part for part in told if part != "auto")))

    def reason_not_to(self) -> str | None:
        if self.stand_in and find_spec("onnxruntime") is None:
            return "the stand-in computes with ONNX Runtime, which is not here"
        reason = load_backend(self.backend).unavailable()
        if reason is None and self.options.device == "cuda" and not torch.cuda.is_available():
            return "PyTorch sees no NVIDIA GPU here"
        return reason


PYTORCH = ("torch", "inductor")
ON_A_STAND_IN = " on a stand-in"
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")
WAYS = {
    way.name: way
    for way in (
        *(Way(name) for name in BACKENDS if name not in (*PYTORCH, "triton")),
        Way("triton", EngineOptions(precision="fp16")),  # as which it runs what is not INT8; without a GPU interpreted
        Way("tensorrt", stand_in=True),
        *(Way(name, EngineOptions(device="cpu")) for name in PYTORCH),
        *(Way("torch", EngineOptions(device="cpu", precision=precision)) for precision in ("fp16", "bf16")),
        *(Way(name, EngineOptions(device="cuda", precision=kind)) for name in PYTORCH for kind in PRECISIONS),
    )
}
WHOLE = [name for name in WAYS if not name.startswith("torch-cpu-") or name == "torch-cpu-fp32"]
# a rounding of 2^-24, 2^-11 or 2^-8 of each factor, through the layers of these networks, as part of the largest logit
ERROR = {"fp32": 2e-5, "tf32": 0.005, "fp16": 0.005, "bf16": 0.03}
COMPILED = {("unet", ""), ("attention", ""), ("rolled", ""), ("unet", "openvino")}
SLOW = "compiling takes seconds a network: PyTorch's compiler is shown this on fewer of them"


@dataclass
class Bench:
    """Files and engines of the small networks; files and answers of the reference engine are made once."""

    root: Path
    way: Way = field(default_factory=lambda: Way("reference"))
    known: dict[tuple[str, str], Windows] = field(default_factory=dict)

    def onnx(self, network: str, target: str = "") -> Path:
        path = self.root / f"{network}{target and '_'}{target}.onnx"
        if not path.exists() and not target:
            NETWORKS[network](path)
        elif not path.exists():
            fp32 = self.onnx(network)
            model = simplify(load_graph(fp32))
            seen = observed_by_torch(fp32, target, [window[None] for window in windows(4)])
            save_graph(qdq.write(model, planned(model, target, seen=seen)), path)
        return path

    def open(self, onnx: Path, way: Way | None = None) -> Engine:
        way = way or self.way
        folder, runtime = onnx.with_suffix(f".{way.backend}"), load_backend(way.backend)
        if not folder.exists():
            files = runtime.build(onnx, folder)
            assert all(file.is_file() and file.parent == folder for file in files)
        return runtime.open(folder, way.options)

    def wanted(self, network: str, target: str = "") -> Windows:
        """What the reference engine answers to `windows(3, seed=8)`."""
        if (network, target) not in self.known:
            with self.open(self.onnx(network, target), Way("reference")) as engine:
                self.known[network, target] = engine(windows(3, seed=8))
        return self.known[network, target]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("engines"))


def at(name: str, files: Bench) -> Bench:
    """The files, run one way; the test is skipped where this machine does not have it."""
    way = WAYS[name]
    reason = way.reason_not_to()
    if reason is not None:
        pytest.skip(reason)
    return Bench(files.root, way, files.known)


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins in place of TensorRT and CUDA for the ways that are run on them."""
    given = getattr(getattr(request.node, "callspec", None), "params", {}).values()
    if any(str(value).endswith(ON_A_STAND_IN) for value in given) and find_spec("onnxruntime") is not None:
        import fake_tensorrt

        fake_tensorrt.install(monkeypatch, fake_tensorrt.Machine())


@pytest.fixture(params=WHOLE)
def bench(request: pytest.FixtureRequest, files: Bench) -> Bench:
    return at(request.param, files)


# --------------------------------------------------------------------------------------------------------- the same answer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_fp32_engines_agree_with_the_reference(network: str, way: str, files: Bench) -> None:
    bench = at(way, files)
    if bench.way.backend == "inductor" and (network, "") not in COMPILED:
        pytest.skip(SLOW)
    wanted = bench.wanted(network)
    with bench.open(bench.onnx(network)) as engine:
        found = engine(windows(3, seed=8))
    error = ERROR[bench.way.options.precision] * np.abs(wanted).max()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=error, rtol=0)
    first, second = np.sort(wanted, axis=1)[:, -1], np.sort(wanted, axis=1)[:, -2]
    clear = first - second > 2 * error
    assert clear.mean() > 0.1
    assert (found.argmax(1) == wanted.argmax(1))[clear].all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_int8_engines_agree_with_the_reference(network: str, way: str, target: str, files: Bench) -> None:
    """Same labels but at ties, and logits apart by less than the INT8 error itself: a value may fall on the other side of a step.

    Where floating point is rounded to 8 or 11 bits, by as much as that error: activations are rounded twice.
    """
    bench = at(way, files)
    if bench.way.backend == "inductor" and (network, target) not in COMPILED:
        pytest.skip(SLOW)
    if way == "openvino" and network == "rolled" and target in ("onnxruntime", "triton"):
        with pytest.raises(
            EngineError, match=r"padded AveragePool 'averagepool_\d+' of integers wrongly.*--retarget openvino"
        ):
            bench.open(bench.onnx(network, target))
        return
    if bench.way.backend == "tensorrt" and not TARGETS[target].symmetric:
        with pytest.raises(EngineError, match=r"rules of TensorRT.*--retarget tensorrt"):
            bench.open(bench.onnx(network, target))
        return
    truth, wanted = bench.wanted(network), bench.wanted(network, target)
    with bench.open(bench.onnx(network, target)) as engine:
        found = engine(windows(3, seed=8))
    span = truth.max() - truth.min()
    own_error = np.sqrt(np.mean((wanted - truth) ** 2)) / span
    between = np.sqrt(np.mean((found - wanted) ** 2)) / span
    exact = bench.way.options.precision == "fp32"
    assert 0 < own_error < 0.02
    assert between < (0.5 if exact else 1.5) * own_error
    assert (found.argmax(1) == wanted.argmax(1)).mean() > (0.99 if exact else 0.97)


def test_the_networks_have_every_operator_of_the_zoo(files: Bench) -> None:
    zoo = """Add AveragePool Concat Conv ConvTranspose Elu Gather Gelu InstanceNormalization LayerNormalization LeakyRelu MatMul
        MaxPool Mul PRelu Pad Relu Reshape Resize Slice Softmax Transpose"""
    graphs = [simplify(load_graph(files.onnx(network))).graph for network in NETWORKS]
    assert set(zoo.split()) <= {node.op_type for graph in graphs for node in graph}


# -------------------------------------------------------------------------------------------------------- windows, batches


def test_batch_equals_windows_one_by_one(bench: Bench) -> None:
    x = windows(3, seed=9)
    with bench.open(bench.onnx("meshnet")) as engine:
        together = engine(x)
        np.testing.assert_array_equal(together, np.concatenate([engine(x[i : i + 1]) for i in range(3)]))


def test_equal_input_gives_equal_answers_also_of_another_opening(bench: Bench) -> None:
    target = bench.way.backend if bench.way.backend in ("tensorrt", "triton") else "openvino"
    x, path = windows(2, seed=9), bench.onnx("meshnet", target)
    with bench.open(path) as engine:
        found = engine(x)
        np.testing.assert_array_equal(engine(x), found)
    with bench.open(path) as again:
        np.testing.assert_array_equal(again(x), found)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_stream_gives_the_same_answers_in_order(number: int, bench: Bench) -> None:
    """Each is compared while it is promised to be valid: before the next one is asked for."""
    x = windows(4, seed=12)[:number]
    with bench.open(bench.onnx("meshnet")) as engine:
        wanted = engine(x) if number else []
        seen = 0
        for answer in engine.stream(torch.from_numpy(window).to(engine.device) for window in x):
            assert answer.device == engine.device
            np.testing.assert_array_equal(answer.cpu().numpy(), wanted[seen])
            seen += 1
    assert seen == number


def test_a_file_of_batch_three_equals_one_of_batch_one(bench: Bench) -> None:
    """Five windows are a whole batch and a part of one."""
    network = "meshnet" if bench.way.backend == "inductor" else "unet"  # which is quicker to compile
    path = bench.root / f"{network}-3.onnx"
    if not path.exists():
        with_batch(NETWORKS[network](path), 3)
    x = windows(5, seed=13)
    with bench.open(bench.onnx(network)) as one, bench.open(path) as three:
        wanted, found = one(x), three(x)
        streamed = [answer.cpu().numpy().copy() for answer in three.stream(torch.from_numpy(x).to(three.device))]
        assert three.spec == one.spec
    error = ERROR[bench.way.options.precision] * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=error, rtol=0)
    np.testing.assert_array_equal(np.stack(streamed), found)


WRONG = {
    "4D": windows(1)[0],
    "float64": windows(1).astype(np.float64),
    "window": windows(1)[..., :-1],
    "channels": np.repeat(windows(1), 2, axis=1),
    "empty": windows(1)[:0],
}


def test_wrong_windows_are_refused(bench: Bench) -> None:
    with bench.open(bench.onnx("meshnet")) as engine:
        for wrong in WRONG.values():
            with pytest.raises(ShapeError, match=r"\(n, 1 x 8"):
                engine(wrong)
        for name in ("float64", "window", "channels"):
            with pytest.raises(ShapeError, match=r"\(n, 1 x 8"):
                next(iter(engine.stream(torch.from_numpy(WRONG[name]).to(engine.device))))
        engine(windows(1))  # and it still works


# ---------------------------------------------------------------------------------------------------- life, threads, devices


def test_closing_twice_is_fine_and_use_after_close_is_not(bench: Bench) -> None:
    engine = bench.open(bench.onnx("meshnet"))
    engine.close()
    engine.close()
    uses: list[Callable[[], object]] = [
        lambda: engine(windows(1)),
        lambda: list(engine.stream([torch.from_numpy(windows(1)[0])])),
        engine.layers,
    ]
    for use in uses:
        with pytest.raises(EngineError, match="closed"):
            use()


def test_two_engines_at_once_do_not_touch_each_other(bench: Bench) -> None:
    x = windows(1, seed=10)
    with bench.open(bench.onnx("unet")) as first:
        alone = first(x)
        with bench.open(bench.onnx("meshnet")) as second:
            second(x)
            np.testing.assert_array_equal(first(x), alone)
        np.testing.assert_array_equal(first(x), alone)


def test_threads_get_the_same_answers(bench: Bench) -> None:
    """One engine from several threads one after another, then two engines in two threads at once."""
    x = windows(3, seed=14)
    with bench.open(bench.onnx("meshnet")) as first, bench.open(bench.onnx("unet")) as second:
        wanted = {engine: engine(x) for engine in (first, second)}
        found: list[tuple[Engine, Windows]] = []

        def work(engine: Engine, times: int) -> None:
            found.extend((engine, engine(x)) for _ in range(times))

        for _ in range(3):
            in_threads([(work, first, 1)])
        in_threads([(work, first, 4), (work, second, 4)])
    assert len(found) == 11
    for engine, answer in found:
        np.testing.assert_array_equal(answer, wanted[engine])


def in_threads(calls: list[tuple[Callable[..., None], Engine, int]]) -> None:
    threads = [threading.Thread(target=call, args=arguments) for call, *arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    reason = load_backend(request.param).unavailable()
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def test_an_unknown_device_is_an_error_never_another_one(backend: str, files: Bench) -> None:
    with pytest.raises(InputError, match=r"cuda:77|CUDA:77"):
        files.open(files.onnx("meshnet"), Way(backend, EngineOptions(device="cuda:77")))


@pytest.mark.parametrize("precision", ["tf32", "fp64"])
def test_a_precision_that_the_processor_does_not_have_is_refused(precision: str, backend: str, files: Bench) -> None:
    options = EngineOptions(device="cpu", precision=precision)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=precision) as refused:
        files.open(files.onnx("meshnet"), Way(backend, options))
    assert "fp32" in str(refused.value)


def test_building_starts_no_process_and_tells_nobody(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> int:
        calls.append("a process or a connection")
        raise OSError

    calls: list[str] = []
    onnx = NETWORKS["unet"](tmp_path / "n.onnx")
    for module, name in ((os, "fork"), (subprocess, "Popen"), (socket, "create_connection")):
        monkeypatch.setattr(module, name, started)
    load_backend(backend).build(onnx, tmp_path / "built")
    if backend not in ("inductor", "triton"):  # which compile when they are opened, in processes of the compiler
        load_backend(backend).open(tmp_path / "built", EngineOptions())
    assert not calls


def test_an_artefact_with_a_byte_changed_is_refused(backend: str, tmp_path: Path) -> None:
    artefacts = pytest.importorskip("ptq3d.artefacts", reason="the command line's libraries are not here")
    folder = tmp_path / "engine"
    manifest = artefacts.build_artefact(NETWORKS["meshnet"](tmp_path / "n.onnx"), folder, backend)
    assert artefacts.cached_artefact(folder, "auto")[1].engine["files"] == manifest.engine["files"]
    for name in manifest.engine["files"]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes((*whole[:-9], whole[-9] ^ 1, *whole[-8:])))
        with pytest.raises(ManifestError, match=name):
            artefacts.cached_artefact(folder, "auto")
        (folder / name).write_bytes(whole)
    assert artefacts.cached_artefact(folder, backend)[0] == folder


# ----------------------------------------------------------------------------------------------------- what ran, and as what


def test_layers_report_the_same_macs_everywhere(bench: Bench) -> None:
    voxels = int(np.prod(WINDOW))
    by_hand = (
        voxels * 27 * 7 + voxels // 8 * 27 * 7 * 12 + voxels // 8 * 12 * 7 * 8 + voxels * 27 * 14 * 8 + voxels * 8 * 5
    )
    with bench.open(bench.onnx("unet")) as engine:
        reported = engine.layers()
    assert sum(layer.macs for layer in reported) == by_hand
    assert int8_mac_share(reported) == 0
    assert {layer.precision for layer in reported} == {bench.way.options.precision}


def test_latency_is_that_of_one_call(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once a look on the host; by events, which a GPU's stream meets in order, on a GPU."""
    with bench.open(bench.onnx("meshnet")) as engine:
        engine(windows(1))
        if engine.device.type != "cuda":
            ticks = iter(range(9))
            monkeypatch.setattr(latency, "perf_counter", lambda: next(ticks))
            assert latency.latency_ms(engine, windows(2)) == 1000
        else:
            one, many = (min(latency.latency_ms(engine, windows(number)) for _ in range(5)) for number in (1, 40))
            assert 0 < one < many


def integer_layers(engine: Engine) -> list[str]:
    return sorted(layer.name for layer in engine.layers() if layer.precision == "int8")


@pytest.mark.parametrize("network", ["unet", "attention"])
def test_the_reference_reports_the_layers_that_it_sums_in_integers(
    network: str, files: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[str] = []
    sums = reference.integer_layer
    monkeypatch.setattr(reference, "integer_layer", lambda op, *rest: summed.append(op) or sums(op, *rest))
    for target in ("", "openvino", "tensorrt"):
        summed.clear()
        with files.open(files.onnx(network, target), Way("reference")) as engine:
            engine(windows(1))
            assert sorted(summed) == sorted(layer.op for layer in engine.layers() if layer.precision == "int8")
            assert bool(summed) == bool(target)


@pytest.mark.parametrize("way", [name for name in WAYS if name.startswith(PYTORCH)])
def test_pytorch_rounds_but_multiplies_in_floating_point(way: str, files: Bench) -> None:
    bench = at(way, files)
    with bench.open(bench.onnx("meshnet", "openvino")) as engine:
        assert {layer.precision for layer in engine.layers()} == {bench.way.options.precision}


@pytest.mark.parametrize("network", ["unet", "meshnet"])
def test_openvino_reports_the_integer_nodes_of_its_execution_graph(network: str, files: Bench) -> None:
    openvino = pytest.importorskip("openvino")
    for target in ("", "openvino"):
        with files.open(files.onnx(network, target), Way("openvino")) as engine:
            assert int8_mac_share(engine.layers()) == (1.0 if target else 0.0)
            found = integer_layers(engine)
        folder = files.onnx(network, target).with_suffix(".openvino")
        compiled = openvino.compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        ran = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in ran]
        assert len(found) == sum(
            kind in ("Convolution", "Deconvolution") and precision in ("u8", "i8") for kind, precision in kinds
        )


@pytest.mark.parametrize("network", ["unet", "meshnet", "resized", "attention"])
def test_onnxruntime_reports_the_integer_kernels_that_it_runs(network: str, files: Bench, tmp_path: Path) -> None:
    """Its own profile of a run names every kernel."""
    onnxruntime = pytest.importorskip("onnxruntime")
    for target in ("", "onnxruntime", "openvino"):
        with files.open(files.onnx(network, target), Way("onnxruntime")) as engine:
            found = integer_layers(engine)
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        path = files.onnx(network, target).with_suffix(".onnxruntime") / "model.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session.run(None, {"image": windows(1)})
        events = json.loads(Path(session.end_profiling()).read_text())
        kernels = {
            event["name"]: event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")
        }
        integers = [
            kernel for kernel in kernels.values() if kernel in ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat")
        ]
        assert len(found) == len(integers)
        assert target or not found


def test_onnxruntime_runs_its_own_files_in_int8_where_it_has_kernels(files: Bench) -> None:
    """QLinearConv for every 3D convolution but the last, whose logits stay real; it has no integer ConvTranspose."""
    pytest.importorskip("onnxruntime")
    for network in ("unet", "meshnet", "resized"):
        with files.open(files.onnx(network, "onnxruntime"), Way("onnxruntime")) as engine:
            *inner, last = engine.layers()
            share = int8_mac_share(engine.layers())
            assert last.precision == "fp32"
            for layer in inner:
                assert layer.op == ("ConvTranspose" if layer.name.startswith("convt") else "QLinearConv")
        with files.open(files.onnx(network, "openvino"), Way("onnxruntime")) as engine:
            found = int8_mac_share(engine.layers())
            assert found == share if network == "resized" else found < share  # both targets quantize its sum


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_bf16_is_near_fp32_and_reported(name: str, files: Bench) -> None:
    reason = load_backend(name).unavailable()
    if reason is not None:
        pytest.skip(reason)
    if name == "openvino" and "BF16" not in openvino_offers():
        pytest.skip("this processor has no BF16")
    x, path = windows(1, seed=11), files.onnx("unet")
    low = Way(name, EngineOptions(device="cpu", precision="bf16"))
    with files.open(path, Way(name, EngineOptions(device="cpu"))) as exact, files.open(path, low) as rounded:
        wanted, found = exact(x), rounded(x)
        precisions = {layer.precision for layer in rounded.layers()}
    assert 0 < np.abs(found - wanted).max() < 0.05 * (wanted.max() - wanted.min())
    assert "bf16" in precisions


def openvino_offers() -> list[str]:
    import openvino

    return list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"tensorrt", "triton"}))
def test_an_engine_that_is_not_compiled_refuses_a_batch_by_its_own_name(name: str) -> None:
    backend = load_backend(name)
    assert backend.compiled_for(BuildSettings()) == ""
    with pytest.raises(OptionError, match=f"; {name} has neither"):
        backend.compiled_for(BuildSettings(batch=4))
