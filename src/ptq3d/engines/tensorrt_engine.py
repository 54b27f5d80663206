"""A TensorRT engine on torch's streams and in torch's memory: nothing goes through the host."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import onnx_ir as ir
import torch
from torch import Tensor

from ptq3d.engines.base import BuildSettings, EngineSpec, LayerReport, Precision, Windows, head_layer, require_windows
from ptq3d.engines.tensorrt_layers import reports
from ptq3d.errors import EngineError, line_of
from ptq3d.graphs.files import static_input_shape
from ptq3d.graphs.layers import Layer, shape_of
from ptq3d.head import Classifier, Head, classifier

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger("ptq3d")
TYPES: Mapping[str, torch.dtype] = {  # names of tensorrt.DataType
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
}


@dataclass(frozen=True)
class Compiled:
    """What an engine was built for, and of what.

    Args:
        version: of TensorRT.
        capability: compute capability of the GPU, "9.0".
        precision: of what the graph does not quantize.
        batch: the most windows at a time.
        fixed: it takes that many, never fewer.
        shape: (C, X, Y, Z) of a window.
        features: F of its output.
        layers: (name, operator, multiply-accumulates of one window) of every multiplying layer of the graph.
    """

    version: str
    capability: str
    precision: Precision
    batch: int
    fixed: bool
    shape: tuple[int, int, int, int]
    features: int
    layers: tuple[tuple[str, str, int], ...]

    @staticmethod
    def of(
        model: ir.Model, layers: Iterable[Layer], settings: BuildSettings, *, version: str, capability: str
    ) -> Compiled:
        """The facts of a graph built by `settings` on this machine."""
        own, channels, x, y, z = static_input_shape(model)
        batch = max(own, settings.batch)  # a graph of one window or of any number says 1
        found = tuple((layer.name, layer.op, layer.macs // own) for layer in layers)
        features = shape_of(model.graph.outputs[0])[1]
        return Compiled(version, capability, settings.precision, batch, own > 1, (channels, x, y, z), features, found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> Compiled:
        """What `to_dict` gave."""
        channels, x, y, z = written["shape"]
        layers = tuple((str(name), str(op), int(macs)) for name, op, macs in written["layers"])
        plain = {name: written[name] for name in ("version", "capability", "precision", "batch", "fixed", "features")}
        return Compiled(**plain, shape=(channels, x, y, z), layers=layers)


@dataclass
class _Lane:
    """The engine for one number of windows, with the memory it reads and writes, and its CUDA graph where there is one."""

    context: trt.IExecutionContext
    windows: Tensor
    answers: Tensor
    graph: torch.cuda.CUDAGraph | None = None


class TensorRtEngine:
    """A deserialized engine. One window or a whole batch runs as a CUDA graph; what is left of a batch runs window by window.

    Everything is queued on a stream of its own, which waits for the caller's and is waited for by it: the host never waits.
    """

    def __init__(
        self, loaded: tuple[trt.Runtime, trt.ICudaEngine], facts: Compiled, device: torch.device, head: Head | None
    ) -> None:
        self._runtime: trt.Runtime | None = loaded[0]
        self._engine: trt.ICudaEngine | None = loaded[1]
        self._facts, self._device = facts, device
        channels, x, y, z = facts.shape
        self._spec = EngineSpec(channels, (x, y, z), facts.features)
        self._head = head or Head.none(facts.features)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lanes: dict[int, _Lane] = {}
        self._lane(facts.batch)

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
        """The GPU."""
        return self._device

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        self._require_open()
        require_windows(windows, self._spec)
        pieces = (torch.from_numpy(window).to(self._device) for window in windows)
        found = torch.empty((len(windows), self._spec.features, *self._spec.window))
        for index, answer in enumerate(self.stream(pieces)):
            found = found if index else found.to(answer.dtype)
            found[index].copy_(answer)
        return found.numpy()

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Answers to windows, which stay on the GPU; see `Engine`."""
        self._require_open()
        pending = iter(windows)
        while group := list(islice(pending, self._facts.batch)):
            for window in group:
                require_windows(window[None], self._spec)
            whole = self._facts.fixed or len(group) == self._facts.batch
            for piece in [group] if whole else [[window] for window in group]:
                yield from self._answers(piece)

    def _answers(self, piece: Sequence[Tensor]) -> Tensor:
        """(n, F, X, Y, Z) of n windows, in the engine's own memory."""
        self._require_open()
        try:
            lane = self._lane(self._facts.batch if self._facts.fixed else len(piece))
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                # what is left of a fixed batch computes anything
                for place, window in zip(lane.windows, piece, strict=False):
                    place.copy_(window, non_blocking=True)
                self._run(lane)
            current.wait_stream(self._stream)
            answers = lane.answers[: len(piece)]
            return answers if answers.dtype == torch.int8 else answers.float()
        except RuntimeError as error:  # CUDA's
            raise EngineError(f"the GPU failed while it ran the network: {line_of(error)}") from error

    def _run(self, lane: _Lane) -> None:
        if lane.graph is not None:
            lane.graph.replay()
        elif not lane.context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError("TensorRT failed while it ran the network.")

    @property
    def beside(self) -> int:
        """As many as there are: the network runs on the GPU."""
        return 0

    def classifier(self, head: Head) -> Classifier:
        """Head and argmax on the GPU."""
        return classifier(head, self._device)

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer with the precision and tactic that the engine inspector reports."""
        import tensorrt as trt

        inspector = self._require_open().create_engine_inspector()
        inspector.execution_context = self._lane(self._facts.batch).context
        found = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        del inspector
        return (*reports(found, self._facts.layers), *head_layer(self._head, math.prod(self._spec.window)))

    def _require_open(self) -> trt.ICudaEngine:
        if self._engine is None:
            raise EngineError("this TensorRT engine is closed. Open the artefact again.")
        return self._engine

    def _lane(self, number: int) -> _Lane:
        """The engine for `number` windows at a time, made when it is first needed."""
        if number not in self._lanes:
            with torch.cuda.device(self._device):
                try:
                    self._lanes[number] = self._new_lane(number)
                except torch.OutOfMemoryError as error:
                    raise self._out_of_memory() from error
        return self._lanes[number]

    def _new_lane(self, number: int) -> _Lane:
        engine = self._require_open()
        given, made = _input_and_output(engine)
        torch.cuda.empty_cache()  # TensorRT allocates beside PyTorch, which keeps what it freed
        context = engine.create_execution_context()
        if context is None:
            raise self._out_of_memory()
        windows = torch.zeros((number, *self._facts.shape), dtype=_type_of(engine, given), device=self._device)
        if -1 in _sizes(engine.get_tensor_shape(given)) and not context.set_input_shape(given, tuple(windows.shape)):
            raise EngineError(f"the engine does not take {number} windows at a time.")
        shape = _sizes(context.get_tensor_shape(made))
        answers = torch.zeros(shape, dtype=_type_of(engine, made), device=self._device)
        for name, tensor in ((given, windows), (made, answers)):
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise EngineError(f"the engine has no tensor '{name}'.")
        lane = _Lane(context, windows, answers)
        self._warm(lane)
        return lane

    def _warm(self, lane: _Lane) -> None:
        """Run once, which an engine must before it is captured; then capture it."""
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):  # around the capture, too: one that fails leaves its stream current
            self._run(lane)
            self._stream.synchronize()
            try:
                # other threads may allocate meanwhile
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._run(lane)
            except (RuntimeError, EngineError) as error:
                log.warning("TensorRT runs this network without a CUDA graph, which costs time: %s", line_of(error))
                return
        lane.graph = graph

    def _out_of_memory(self) -> EngineError:
        needed = self._require_open().device_memory_size_v2
        free, _ = torch.cuda.mem_get_info(self._device)
        return EngineError(
            f"the network needs {needed / 1e9:.2f} GB of device memory for activations and as much as its input and output besides; "
            f"{free / 1e9:.2f} GB are free on {self._device}. Build it for a smaller --batch, or close what else uses the GPU."
        )

    def close(self) -> None:
        """Free graphs, contexts, engine and runtime in this order; calling it again does nothing."""
        if self._engine is None:
            return
        self._stream.synchronize()
        for lane in self._lanes.values():
            lane.graph = None
        self._lanes.clear()
        self._engine = None
        self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _input_and_output(engine: trt.ICudaEngine) -> tuple[str, str]:
    """The names of the one tensor that goes in and the one that comes out."""
    import tensorrt as trt

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    made = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    if len(given) != 1 or len(made) != 1:
        raise EngineError(f"an engine of one input and one output is wanted, this one has {given} and {made}.")
    for name in (given[0], made[0]):
        layout = engine.get_tensor_format(name)
        if layout != trt.TensorFormat.LINEAR:
            raise EngineError(f"the engine's tensor '{name}' lies in memory as {layout.name}, LINEAR is wanted.")
    return given[0], made[0]


def _sizes(shape: trt.Dims) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in range(len(shape)))


def _type_of(engine: trt.ICudaEngine, name: str) -> torch.dtype:
    found = engine.get_tensor_dtype(name)
    if found.name not in TYPES:
        raise EngineError(f"the engine's tensor '{name}' is of type {found.name}, not of {', '.join(TYPES)}.")
    return TYPES[found.name]
