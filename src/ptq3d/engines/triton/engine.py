"""A program on a device: every step's launches, captured whole as one CUDA graph."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from ptq3d.engines.base import EngineSpec, LayerReport, Windows, batches, head_layer, require_windows
from ptq3d.engines.triton.arena import Arena
from ptq3d.engines.triton.convolution import prepare_convolve
from ptq3d.engines.triton.floats import prepare_float
from ptq3d.engines.triton.heads import prepare_attend
from ptq3d.engines.triton.keys import fix_keys
from ptq3d.engines.triton.lowering import lower
from ptq3d.engines.triton.normalization import prepare_normalize, prepare_normalize_rows
from ptq3d.engines.triton.pointwise import prepare_enter, prepare_move, prepare_pointwise
from ptq3d.engines.triton.program import Program
from ptq3d.engines.triton.sampling import prepare_pool, prepare_resize
from ptq3d.engines.triton.steps import (
    Attend,
    Convolve,
    Enter,
    Float,
    Move,
    Normalize,
    NormalizeRows,
    Pointwise,
    Pool,
    Resize,
    Step,
    Upsample,
)
from ptq3d.engines.triton.tuning import choose, times_of
from ptq3d.errors import EngineError, line_of
from ptq3d.head import Classifier, Head, classifier
from ptq3d.progress import Progress, silent

if TYPE_CHECKING:
    import onnx

Launchable = Callable[[], None]
ONE_AT_A_TIME = threading.Lock()  # in Triton's interpreter, which changes Triton's own functions while a kernel runs
PREPARE: Mapping[type[Step], Callable[..., Launchable]] = {
    Attend: prepare_attend,
    Enter: prepare_enter,
    Float: prepare_float,
    Move: prepare_move,
    Normalize: prepare_normalize,
    NormalizeRows: prepare_normalize_rows,
    Pointwise: prepare_pointwise,
    Pool: prepare_pool,
    Resize: prepare_resize,
}


class TritonEngine:
    """A Q/DQ network in INT8.

    Args:
        source: its file, or the model.
        batch: windows at a time.
        device: a CUDA device; the CPU in Triton's interpreter.
        head: what makes logits of its features; None where it gives logits.
        progress: told how many kinds of layers are measured.

    Raises:
        EngineError: an operator that it does not know, or too little memory.
    """

    def __init__(
        self,
        source: Path | onnx.ModelProto,
        *,
        batch: int,
        device: torch.device,
        head: Head | None = None,
        progress: Progress = silent,
    ) -> None:
        self.program = lower(source, batch)
        _, channels, *window = self.program.input.shape
        x, y, z = window
        self._spec = EngineSpec(channels, (x, y, z), self.program.output.shape[1])
        self._head = head or Head.none(self._spec.features)
        self._device, self._batch = device, batch
        self._arena: Arena | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        try:
            with _current(device):
                self._prepare(progress)
        except torch.OutOfMemoryError as error:
            raise EngineError(_memory_message(self.program, device, error)) from error

    def _prepare(self, progress: Progress) -> None:
        fix_keys()
        arena = self._arena = Arena(self.program, self._device)
        weighted = [step for step in self.program.steps if isinstance(step, Convolve | Upsample)]
        tiles = iter(choose(weighted, arena, self._device, progress=progress))
        self._launches: list[Launchable] = []
        for step in self.program.steps:
            if isinstance(step, Convolve | Upsample):
                self._launches.append(prepare_convolve(step, arena, next(tiles)))
            else:
                self._launches.append(PREPARE[type(step)](step, arena))
        self.static_input, self.static_output = arena.view(self.program.input), arena.view(self.program.output)
        self.static_input.zero_()
        if self._device.type == "cuda":
            self._capture(arena)

    def _capture(self, arena: Arena) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what is not compiled yet
            self._run(arena)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(arena)
        self._graph = graph

    def _run(self, arena: Arena) -> None:
        arena.clear_sums()
        for launch in self._launches:
            launch()

    def replay(self) -> None:
        """Run the network on `static_input` into `static_output`."""
        arena = self._open_arena()
        if self._graph is not None:
            self._graph.replay()
            return
        with ONE_AT_A_TIME:
            self._run(arena)

    def _open_arena(self) -> Arena:
        if self._arena is None:
            raise EngineError("this engine is closed. Open the artefact again.")
        return self._arena

    def step_times(self) -> list[tuple[Step, float]]:
        """Milliseconds of each step by itself, on whatever lies in the arena; GPUs only."""
        with _current(self._device):
            return list(zip(self.program.steps, times_of(self._launches), strict=True))

    @property
    def spec(self) -> EngineSpec:
        """The shapes it takes and gives."""
        return self._spec

    @property
    def head(self) -> Head:
        """What makes logits of its features."""
        return self._head

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def beside(self) -> int:
        """As many threads as there are: the CPU only launches."""
        return 0

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        require_windows(windows, self._spec)
        pieces = (torch.from_numpy(np.ascontiguousarray(window)).to(self._device) for window in windows)
        return np.stack([answer.cpu().numpy().copy() for answer in self.stream(pieces)])

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Answers to windows, which stay on the device; see `Engine`."""
        self._open_arena()
        for group in batches(windows, self._spec, self._batch):
            self._open_arena()
            try:
                with torch.inference_mode(), _current(self._device):
                    for place, window in enumerate(group):
                        self.static_input[place].copy_(window)
                    self.replay()
            except RuntimeError as error:
                raise EngineError(f"the GPU failed while it ran the network: {line_of(error)}") from error
            answers = self.static_output[: len(group)]
            yield from answers.view(torch.uint8) ^ 128 if self.program.unsigned else answers

    def classifier(self, head: Head) -> Classifier:
        """Head and argmax on the engine's device."""
        return classifier(head, self._device)

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer with the type in which its kernel multiplies."""
        self._open_arena()
        found = [LayerReport(layer.name, layer.op, layer.precision, layer.macs) for layer in self.program.layers]
        return (*found, *head_layer(self._head, math.prod(self._spec.window)))

    def close(self) -> None:
        """Free the arena, the weights and the graph."""
        self._graph, self._arena, self._launches = None, None, []
        self.static_input = self.static_output = torch.empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _memory_message(program: Program, device: torch.device, error: Any) -> str:
    return (
        f"{device} ran out of memory: the network's activations take {program.arena_bytes / 1e9:.2f} GB, its weights and masks "
        f"come on top ({line_of(error)}). Build with a smaller --batch, take a smaller window, or free the GPU."
    )
