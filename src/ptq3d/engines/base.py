"""What every engine and every backend is: the protocols, and the data they exchange."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from ptq3d.errors import OptionError, ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ptq3d.head import Classifier, Head
    from ptq3d.progress import Progress

Windows = npt.NDArray[np.float32]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class EngineSpec:
    """The shapes an engine takes and gives.

    Args:
        channels: C of its input.
        window: (X, Y, Z) of its input and output, in voxels.
        features: F of its output; where its head was taken off fewer than it has classes.
    """

    channels: int
    window: tuple[int, int, int]
    features: int


@dataclass(frozen=True)
class EngineOptions:
    """How to run an artefact.

    Args:
        device: the runtime's own name of it ("CPU", "cuda:0"); "auto" is the backend's first choice.
        precision: of what the graph itself does not quantize.
        threads: CPU threads, 0 for all.
        streams: windows that `Engine.stream` computes at a time, each with its share of the threads; a single window then takes
            longer, all together less. An engine that computes one at a time leaves it alone.
        providers: of ONNX Runtime, in the order in which it may give them nodes; none for its CPU.

    Raises:
        OptionError: fewer than no threads.
    """

    device: str = "auto"
    precision: Precision = "fp32"
    threads: int = 0
    streams: int = 1
    providers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise OptionError(f"--threads {self.threads}: give a number of CPU threads, or 0 for all of them.")


@dataclass(frozen=True)
class BuildSettings:
    """How to build an artefact, for runtimes that compile it for one device and one arithmetic; others are told when it is opened.

    Args:
        device: the runtime's own name of it; "auto" is the backend's first choice.
        precision: of what the graph itself does not quantize.
        batch: windows that the engine takes at a time.
        workspace_gb: GB of device memory that a layer may take while it runs; None for all there is.

    Raises:
        OptionError: a batch or workspace of nothing.
    """

    device: str = "auto"
    precision: Precision = "fp32"
    batch: int = 1
    workspace_gb: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise OptionError(f"--batch {self.batch}: an engine takes at least one window at a time.")
        if self.workspace_gb is not None and not 0 < self.workspace_gb < 1e6:
            raise OptionError(f"--workspace {self.workspace_gb}: give GB of device memory, more than 0.")


PLAIN = BuildSettings()


@dataclass(frozen=True)
class LayerReport:
    """What ran, as the runtime reports it.

    Args:
        name: the layer's name in the graph.
        op: the runtime's name of what it does.
        precision: "int8", "fp32", "tf32", "bf16", "fp16", or "unknown" where the runtime does not tell.
        macs: multiply-accumulates of one window.
    """

    name: str
    op: str
    precision: str
    macs: int


@runtime_checkable
class Engine(Protocol):
    """A network on a device. Equal input gives equal output on the same device."""

    @property
    def spec(self) -> EngineSpec:
        """The shapes it takes and gives."""

    @property
    def head(self) -> Head:
        """What makes logits of its features; `Head.none` where it gives logits."""

    @property
    def device(self) -> torch.device:
        """Where `stream` and the classifiers want their tensors."""

    def __call__(self, windows: Windows) -> Windows:
        """Features (n, F, X, Y, Z) of windows (n, C, X, Y, Z) float32: float32, or the integers that a late head reads.

        Where the head is in the graph they are the logits, always float32.

        Raises:
            ShapeError: another shape or dtype.
            EngineError: the runtime failed, or the engine is closed.
        """

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Answers to windows (C, X, Y, Z) float32 on `device`, in their order, while the next ones are computed.

        Yields:
            (F, X, Y, Z) float32, int8 or uint8 in any memory order; valid until the next one is asked for.

        Raises:
            ShapeError: another shape or dtype.
            EngineError: the runtime failed, or the engine is closed.
        """

    @property
    def beside(self) -> int:
        """How many threads PyTorch may use for what is done with the answers of `stream`; 0 for as many as it has."""

    def classifier(self, head: Head) -> Classifier:
        """Head and argmax on this runtime; `head` is the engine's own, or one that joins several engines'."""

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer with the precision in which it runs, as the runtime reports it."""

    def close(self) -> None:
        """Free the network; calling it again does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """A runtime; each is one module of this package with these functions."""

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, with the pip line that mends it; None where it can. Never raises."""

    def version(self) -> str:
        """The runtime's own version; artefacts are rebuilt when it changes."""

    def compiled_for(self, settings: BuildSettings) -> str:
        """What its artefacts are bound to, such as a GPU and an arithmetic; "" where they run wherever the runtime does.

        Raises:
            OptionError: settings that this runtime does not have.
            UnavailableError: no such device.
        """

    def build(
        self, onnx: Path, folder: Path, settings: BuildSettings = ..., progress: Progress = ...
    ) -> tuple[Path, ...]:
        """Write the artefact of `onnx` into `folder`, which is made where it is missing.

        Args:
            onnx: FP32 or Q/DQ.
            folder: where its files go.
            settings: for what to build it.
            progress: told how far it is, where the runtime says.

        Returns:
            The files it wrote.

        Raises:
            EngineError: the runtime refuses the graph.
            OptionError: settings that this runtime does not have.
        """

    def open(self, folder: Path, options: EngineOptions) -> Engine:
        """The engine of an artefact.

        Raises:
            EngineError: the runtime cannot load it.
            UnavailableError: no such device or precision.
        """


def require_windows(windows: Windows | Tensor, spec: EngineSpec) -> None:
    """Check the input of an engine.

    Raises:
        ShapeError: not (n >= 1, C, X, Y, Z) float32 of the engine's channels and window.
    """
    wanted = (spec.channels, *spec.window)
    kind = str(windows.dtype).removeprefix("torch.")
    if windows.ndim != 5 or tuple(windows.shape[1:]) != wanted or not len(windows) or kind != "float32":
        shape = " x ".join(str(size) for size in wanted)
        raise ShapeError(
            f"this engine takes windows of shape (n, {shape}) float32, it was given {tuple(windows.shape)} {kind}."
        )


def batches(windows: Iterable[Tensor], spec: EngineSpec, size: int) -> Iterator[list[Tensor]]:
    """Windows (C, X, Y, Z), so many at a time; the last group may be shorter.

    Raises:
        ShapeError: a window is not of the spec.
    """
    pending = iter(windows)
    while group := list(itertools.islice(pending, size)):
        for window in group:
            require_windows(window[None], spec)
        yield group


def padded(windows: Windows, batch: int) -> Windows:
    """Windows (n, ...) filled up with zeros to a whole batch."""
    missing = batch - len(windows)
    if not missing:
        return np.ascontiguousarray(windows)
    return np.concatenate([windows, np.zeros((missing, *windows.shape[1:]), np.float32)])


def runs_anywhere(name: str, settings: BuildSettings) -> str:
    """`Backend.compiled_for` of a runtime whose artefacts are told device and precision when they are opened.

    Raises:
        OptionError: a batch or a workspace, which only a compiled engine has.
    """
    if settings.batch != 1 or settings.workspace_gb is not None:
        raise OptionError(f"--batch and --workspace are of engines that are compiled for a GPU; {name} has neither.")
    return ""


def int8_mac_share(layers: Sequence[LayerReport]) -> float:
    """The share of multiply-accumulates that the runtime says run in INT8, 0..1; what it does not tell of counts as not."""
    total = sum(layer.macs for layer in layers)
    return sum(layer.macs for layer in layers if layer.precision == "int8") / max(total, 1)


def head_layer(head: Head, voxels: int) -> tuple[LayerReport, ...]:
    """What a late head multiplies: as in the graph, once a voxel of a window, always in FP32."""
    if head.weight is None:
        return ()
    return (LayerReport("late head", "MatMul", "fp32", head.weight.size * voxels),)
