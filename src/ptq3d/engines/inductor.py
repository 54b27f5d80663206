"""PyTorch's compiler: the graph of the torch engine as `torch.compile` makes kernels of it, on the CPU or on CUDA."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq3d.engines import torch as eager
from ptq3d.engines.base import BuildSettings, EngineOptions, Precision, runs_anywhere
from ptq3d.errors import EngineError, UnavailableError, clipped

version = eager.version
build = eager.build


def compiled_for(settings: BuildSettings) -> str:
    """Nothing: its artefacts run wherever it does."""
    return runs_anywhere("inductor", settings)


def unavailable() -> str | None:
    """Why PyTorch can compile for no device of this machine, None where it can for one."""
    if torch.cuda.is_available() and _missing("cuda") is None:
        return None
    return _missing("cpu")


def _missing(kind: str) -> str | None:
    """What the compiler lacks for a kind of device: what makes machine code of its kernels."""
    if kind == "cuda":
        found = find_spec("triton") is not None
        return (
            None
            if found
            else "PyTorch compiles for a GPU with Triton, which is missing; mend it with: pip install triton"
        )
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)  # as PyTorch looks for it
    if shutil.which(compiler) is None:
        return f"PyTorch compiles with a C++ compiler, and there is no '{compiler}' here; mend it with: apt install g++"
    return None


def open(folder: Path, options: EngineOptions) -> InductorEngine:
    """The engine of an artefact, compiled here and run once on zeros; "auto" is CUDA where there is one.

    Compiling takes seconds to minutes; PyTorch keeps what it compiled in a cache of its own.

    Raises:
        EngineError: PyTorch cannot compile it.
        UnavailableError: no such device, or no compiler for it.
        OptionError: no such precision, or not on this device.
    """
    device = eager.prepared_device(options, "inductor")
    reason = _missing(device.type)
    if reason is not None:
        raise UnavailableError(f"engine 'inductor' is not available on {device}: {reason}")
    return InductorEngine(folder / eager.ARTEFACT, device, options.precision)


class InductorEngine(eager.TorchEngine):
    """The torch engine, compiled whole."""

    def __init__(self, path: Path, device: torch.device, precision: Precision) -> None:
        super().__init__(path, device, precision)
        shape = (self._batch, self._spec.channels, *self._spec.window)
        # 16-bit tensor cores read channels last
        self._last = device.type == "cuda" and self._dtype != torch.float32
        if self._last:
            self._constants = {name: _channels_last(value) for name, value in self._constants.items()}
        zeros = torch.zeros(shape, dtype=self._dtype, device=device)
        with _compiling(path), eager.arithmetic(device, tf32=precision == "tf32"):
            self._compiled: Callable[[Tensor], Tensor] | None = _compiled(super()._run, zeros)
            with torch.inference_mode():
                self._compiled(self._laid_out(zeros.clone()))  # made in inference mode, as the windows will be

    def _laid_out(self, x: Tensor) -> Tensor:
        return _channels_last(x) if self._last else x

    def _run(self, x: Tensor) -> Tensor:
        self._opened()
        return self._compiled(self._laid_out(x))  # type: ignore[misc]

    def close(self) -> None:
        """Free the network."""
        super().close()
        self._compiled = None


class _Network(torch.nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _compiled(run: Callable[[Tensor], Tensor], zeros: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of windows, traced once and compiled.

    Tracing gives every network code of its own: PyTorch counts recompilations by the code it compiles, and refuses the ninth.
    """
    with torch.no_grad():
        traced = torch.export.export(_Network(run), (zeros,), strict=False).module()
    compiled: Callable[[Tensor], Tensor] = torch.compile(traced, fullgraph=True, dynamic=False)
    return compiled


def _channels_last(value: Any) -> Any:
    return value.to(memory_format=torch.channels_last_3d) if value.ndim == 5 else value


@contextmanager
def _compiling(path: Path) -> Iterator[None]:
    """What PyTorch's compiler raises, as an EngineError of one line; without what it warns itself of, and of the types we choose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        try:
            yield
        except (RuntimeError, TypeError) as error:
            said = " ".join(str(error).split("\n", 2)[:2])
            raise EngineError(f"PyTorch cannot compile {path}: {clipped(said)}") from error
