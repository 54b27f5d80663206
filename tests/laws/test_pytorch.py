"""Laws of what PyTorch's engines do to PyTorch: its switches are put back, its compiler compiles once and says what it lacks."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from networks import NETWORKS, windows
from ptq3d.engines import BACKENDS, choose_backend, inductor, load_backend
from ptq3d.engines import torch as eager
from ptq3d.engines.base import Engine, EngineOptions
from ptq3d.errors import EngineError, UnavailableError

GPU = torch.device("cuda", 0)  # naming one takes none


def switches() -> tuple[bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic


@pytest.fixture(params=[(False, True, False, False), (True, False, True, True)])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, ...]]:
    """PyTorch's own settings, and the opposite ones."""
    own = switches()
    turn(*request.param)
    yield switches()
    turn(*own)


def turn(matmul: bool, convolution: bool, benchmark: bool, deterministic: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolution
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.deterministic = deterministic


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_on_a_gpu_is_what_was_asked_for_and_the_switches_are_put_back(
    tf32: bool, before: tuple[bool, ...]
) -> None:
    with eager.arithmetic(GPU, tf32=tf32):
        assert switches() == (tf32, tf32, False, True)
    assert switches() == before
    with pytest.raises(KeyError), eager.arithmetic(GPU, tf32=tf32):
        raise KeyError
    assert switches() == before
    with eager.arithmetic(torch.device("cpu"), tf32=tf32):
        assert switches() == before


def test_two_threads_never_compute_in_one_another_s_arithmetic() -> None:
    seen: list[tuple[bool, bool]] = []

    def work(tf32: bool) -> None:
        for _ in range(50):
            with eager.arithmetic(GPU, tf32=tf32):
                time.sleep(0.001)  # the other thread's turn
                seen.append((tf32, torch.backends.cuda.matmul.allow_tf32))

    before = switches()
    threads = [threading.Thread(target=work, args=(tf32,)) for tf32 in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 100
    assert all(wanted == found for wanted, found in seen)
    assert switches() == before


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:x", "nothing"])
def test_devices_that_pytorch_has_elsewhere_are_refused(device: str, tmp_path: Path) -> None:
    for name in ("torch", "inductor"):
        with pytest.raises(UnavailableError, match=device):
            opened(name, tmp_path, device=device)


def opened(name: str, folder: Path, **options: Any) -> Engine:
    backend = load_backend(name)
    if not (folder / "e").exists():
        backend.build(NETWORKS["meshnet"](folder / "n.onnx"), folder / "e")
    return backend.open(folder / "e", EngineOptions(**options))


# ---------------------------------------------------------------------------------------------------------------- inductor


def test_auto_comes_to_the_compiler_only_behind_torch() -> None:
    names = list(BACKENDS)
    assert names[:4] == ["openvino", "onnxruntime", "torch", "inductor"]
    assert names[-1] == "reference"
    assert choose_backend("auto")[0] in names[:3]


def test_without_a_compiler_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "apt install g++" in str(inductor.unavailable())
    with pytest.raises(UnavailableError, match=r"on cpu: .*C\+\+ compiler"):
        opened("inductor", tmp_path)


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, wanted in ((None, str), (object(), type(None))):
        monkeypatch.setattr(inductor, "find_spec", lambda _, found=found: found)
        assert isinstance(inductor.unavailable(), wanted)
    monkeypatch.setattr(inductor, "find_spec", lambda _: None)
    assert "pip install triton" in str(inductor._missing("cuda"))


def test_what_the_compiler_says_is_an_engine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("backend='inductor' raised:\nCppCompileError: no such header\nand a page more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(EngineError, match=r"cannot compile .*CppCompileError: no such header$"):
        opened("inductor", tmp_path)


@pytest.mark.skipif(inductor.unavailable() is not None, reason=str(inductor.unavailable()))
def test_it_compiles_when_it_is_opened_and_never_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the first window, nor in another thread; and PyTorch's limit of compilations is not shared by networks."""
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1, raising=False)
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 1, raising=False)  # its name in PyTorch 2.6
    for _ in range(3):
        with opened("inductor", tmp_path, device="cpu") as engine:
            torch.compiler.set_stance("fail_on_recompile")
            try:
                engine(windows(2))
                thread = threading.Thread(target=engine, args=(windows(1),))
                thread.start()
                thread.join()
            finally:
                torch.compiler.set_stance("default")
