"""What stops the Triton engine is said in one sentence, with the way to mend it; no GPU is needed to show it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantized import Graph, freed, small, written

from networks import NETWORKS, windows, with_batch
from ptq3d.cli import main
from ptq3d.engines import triton
from ptq3d.engines.base import BuildSettings, EngineOptions
from ptq3d.engines.triton import arena, engine
from ptq3d.errors import EngineError, OptionError, UnavailableError

PIP = r"pip install 'ptq3d\[triton\]'"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU of PyTorch's own telling."""

    def of(capability: tuple[int, int] = (9, 0), count: int = 1, *, free: float = 80e9) -> None:
        told: dict[str, Any] = {
            "init": lambda: None,
            "current_device": lambda: 0,
            "device_count": lambda: count,
            "get_device_capability": lambda _: capability,
            "get_device_name": lambda _: "NVIDIA T4",
            "mem_get_info": lambda _: (free, 80e9),
            "memory_reserved": lambda _: 0,
            "memory_allocated": lambda _: 0,
        }
        monkeypatch.setattr(triton, "_interpreted", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        for name, function in told.items():
            monkeypatch.setattr(torch.cuda, name, function)

    return of


def test_without_triton_the_package_imports_and_says_what_to_install() -> None:
    code = (
        "import sys\nfrom importlib.machinery import PathFinder\nfound = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name.split('.')[0] == 'triton' else found(name, *rest)\n"
        "import ptq3d.engines.triton as backend\nprint(backend.unavailable())\n"
        "from ptq3d.engines import choose_backend\ntry: choose_backend('triton')\n"
        "except Exception as error: print(type(error).__name__)\nprint('triton' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "src"), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    said, error, loaded = done.stdout.splitlines()
    assert said == "Triton is not installed; mend it with: pip install 'ptq3d[triton]'"
    assert (error, loaded) == ("UnavailableError", "False")


def test_an_old_or_a_broken_triton_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton as runtime

    monkeypatch.setattr(runtime, "__version__", "3.2.0")
    assert "Triton 3.2.0 is too old, 3.6 or newer is wanted" in str(triton.unavailable())
    monkeypatch.setattr(triton, "find_spec", lambda _: "found")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in str(triton.unavailable())


def test_pytorch_without_cuda(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    assert triton.unavailable() is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(triton.unavailable())


def test_a_driver_that_is_too_old(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update.")

    machine()
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = str(triton.unavailable())
    assert (
        "for CUDA 12.8 cannot use a GPU here: The NVIDIA driver on your system is too old (found version 11040)."
        in reason
    )
    assert "\n" not in reason


def test_a_gpu_without_what_triton_compiles_for(machine: Callable[..., None]) -> None:
    machine((7, 5))
    said = r"NVIDIA T4 has compute capability 7\.5; .* 8\.0 \(A100\).*--engine tensorrt"
    with pytest.raises(UnavailableError, match=said):
        triton._device("cuda:0")
    assert "7.5" in str(triton.unavailable())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cpu", "runs on NVIDIA GPUs, not on 'cpu'"),
        ("mps", "runs on NVIDIA GPUs, not on 'mps'"),
        ("cuda:7", "sees 1 CUDA device here, so there is no 'cuda:7'"),
        ("GPU", "no device 'GPU'"),
    ],
)
def test_a_device_that_is_none(name: str, said: str, machine: Callable[..., None]) -> None:
    machine()
    with pytest.raises(UnavailableError, match=said):
        triton._device(name)
    assert triton._device("auto") == triton._device("CUDA") == torch.device("cuda", 0)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_precision_that_it_does_not_have(precision: Any) -> None:
    with pytest.raises(OptionError, match=f"not in '{precision}'. Give --precision fp16"):
        triton.compiled_for(BuildSettings(precision=precision))
    with pytest.raises(OptionError, match=f"not in '{precision}'. Give --precision fp16"):
        triton.open(Path("nowhere"), EngineOptions(precision=precision))


def test_a_workspace_has_no_meaning() -> None:
    with pytest.raises(OptionError, match="--workspace is of engines that choose among algorithms"):
        triton.compiled_for(BuildSettings(workspace_gb=1.0))


def test_what_does_not_fit_is_refused_with_the_estimate(machine: Callable[..., None]) -> None:
    machine(free=1e9)
    arena.require_memory(torch.device("cuda", 0), 10**9)
    with pytest.raises(EngineError, match=r"1\.00 of 80\.00 GB free, .* about 2\.00 GB\. Build with a smaller --batch"):
        arena.require_memory(torch.device("cuda", 0), 2 * 10**9)


def test_memory_that_runs_out_while_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine, "prepare_convolve", full)
    with pytest.raises(
        EngineError, match=r"cpu ran out of memory: .* GB, .*Tried to allocate 2\.00 GiB.*smaller --batch"
    ):
        engine.TritonEngine(small("unet"), batch=1, device=torch.device("cpu"))


def test_an_operator_that_it_does_not_know_is_named(tmp_path: Path) -> None:
    path = tmp_path / "unknown.onnx"
    model = onnx.load(small("meshnet"))
    node = next(node for node in model.graph.node if node.op_type.endswith("lu"))
    node.op_type, node.name = "Acosh", "strange"
    del node.attribute[:]
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"does not know Acosh 'strange'\. Use --engine"):
        triton.build(path, tmp_path / "built")
    assert not list((tmp_path / "built").iterdir())


def test_integers_of_another_target_are_refused_with_the_way_to_write_them_anew(tmp_path: Path) -> None:
    def build(graph: Graph) -> int:
        parameters = (graph.constant(0.02), graph.constant(128, dtype=np.uint16))
        rounded = graph.add("DequantizeLinear", graph.add("QuantizeLinear", "image", *parameters), *parameters)
        graph.conv8(rounded, 1, 3)
        return 3

    with pytest.raises(EngineError, match=r"Linear '\S+' is not int8 or uint8 .*uint16.*--retarget triton"):
        triton.build(written(build), tmp_path)


def test_a_graph_that_fixes_its_batch(tmp_path: Path) -> None:
    three = with_batch(NETWORKS["meshnet"](tmp_path / "three.onnx"), 3)
    with pytest.raises(
        EngineError, match=r"three\.onnx takes 3 windows at a time, and 2 were asked for: leave --batch out"
    ):
        triton.build(three, tmp_path / "built", BuildSettings(batch=2))
    assert [path.name for path in triton.build(three, tmp_path / "built")] == ["model.onnx", "triton.json"]


def test_a_network_that_mixes_windows_takes_one_at_a_time(tmp_path: Path) -> None:
    def build(graph: Graph) -> int:
        turned = graph.add("Transpose", graph.conv8(graph.q("image"), 1, 3), perm=[1, 0, 2, 3, 4])
        graph.add("Transpose", graph.add("Relu", turned), perm=[1, 0, 2, 3, 4])
        return 3

    path = written(build)
    with pytest.raises(EngineError, match=r"Transpose .* on the first axis.* use --batch 1"):
        triton.build(path, tmp_path / "built", BuildSettings(batch=2))


def test_a_closed_engine_says_so() -> None:
    opened = engine.TritonEngine(freed(small("meshnet")), batch=2, device=torch.device("cpu"))
    opened.close()
    uses: tuple[Callable[[], object], ...] = (opened.replay, opened.layers, lambda: opened(windows(1)))
    for use in uses:
        with pytest.raises(EngineError, match="closed"):
            use()


def test_inspect_and_compare_say_why_it_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect"]) == 0
    assert "available, version 3." in _line(capsys, "triton")
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    assert main(["inspect"]) == 0
    assert "Triton is not installed" in _line(capsys, "triton")
    net = NETWORKS["meshnet"](tmp_path / "net.onnx")
    assert main(["compare", str(net), f"{net}@triton", "--data", str(tmp_path), "--preprocessing", "btcv"]) == 2
    assert "engine 'triton' is not available: Triton is not installed" in " ".join(capsys.readouterr().err.split())


def _line(capsys: pytest.CaptureFixture[str], start: str) -> str:
    shown = capsys.readouterr().out
    return " ".join(shown[shown.index(start) :].split())
