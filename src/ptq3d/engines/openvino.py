"""OpenVINO on the CPU, an Intel GPU or an NPU: the default engine."""

from __future__ import annotations

import itertools
import math
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ptq3d.engines.base import (
    PLAIN,
    BuildSettings,
    EngineOptions,
    EngineSpec,
    LayerReport,
    Precision,
    Windows,
    head_layer,
    padded,
    require_windows,
    runs_anywhere,
)
from ptq3d.engines.openvino_model import (
    channels_last,
    halve_constants,
    inputs_as_constants,
    one_at_a_time,
    readable,
    sum_apart,
    tables_as_inputs,
)
from ptq3d.engines.openvino_report import reports
from ptq3d.errors import EngineError, GraphError, OptionError, UnavailableError
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.low_precision import full_precision, low_type
from ptq3d.graphs.passes import simplify, unsigned_activations
from ptq3d.head import ROWS, Classifier, Head, label_type, load_head
from ptq3d.progress import Progress, silent

# `convert_model` forks to tell Intel of each build: no patient's network should, and a fork beside busy threads can hang
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
OPTIONAL = frozenset({"INFERENCE_NUM_THREADS", "NUM_STREAMS"})  # a GPU has no CPU threads, an NPU neither
ARTEFACT = "model.xml"
SHARE = 4  # one in so many threads is for what is done with the answers of `stream`


def unavailable() -> str | None:
    """Why OpenVINO cannot run here, None where it can."""
    try:
        import openvino  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{error}; mend it with: pip install openvino"
    return None


def version() -> str:
    """OpenVINO's version."""
    import openvino

    return str(openvino.__version__)


def compiled_for(settings: BuildSettings) -> str:
    """Nothing: its artefacts run wherever it does."""
    return runs_anywhere("openvino", settings)


def build(onnx: Path, folder: Path, settings: BuildSettings = PLAIN, progress: Progress = silent) -> tuple[Path, ...]:
    """OpenVINO IR of an ONNX file: `model.xml` (graph) and `model.bin` (weights, INT8 ones as INT8).

    int8 activations around a concat become uint8 first, which is exact: OpenVINO 2026.4 can misread them as int8
    (docs/foreign-qdq.md). Constants that are gathered stay gathered: OpenVINO would write them out. Large ones of which float16
    holds every value are written as float16. A rest in FP16 or BF16 becomes FP32.

    Args:
        onnx: FP32 or Q/DQ.
        folder: where the two files go; made where missing.
        settings: a batch or a workspace is refused.
        progress: told nothing; it takes seconds.

    Raises:
        EngineError: OpenVINO refuses the graph.
        OptionError: a batch or a workspace.
    """
    import openvino

    compiled_for(settings)
    folder.mkdir(parents=True, exist_ok=True)
    model = simplify(load_graph(onnx))
    if low_type(model) is not None:
        # the arithmetic is chosen when it runs, and what finds INT8 layers expects FP32 around them
        full_precision(model)
    if any(node.op_type == "Concat" for node in model.graph):
        unsigned_activations(model)
    readable(model)
    tables = tables_as_inputs(model)
    with tempfile.TemporaryDirectory() as scratch:
        save_graph(model, Path(scratch) / onnx.name)
        with _engine_errors(f"OpenVINO cannot convert {onnx}"):
            converted = openvino.convert_model(Path(scratch) / onnx.name)
            inputs_as_constants(converted, tables)
            halve_constants(converted)
            openvino.save_model(converted, folder / ARTEFACT, compress_to_fp16=False)
    return folder / ARTEFACT, folder / "model.bin"


def open(folder: Path, options: EngineOptions) -> OpenVinoEngine:
    """The engine of an artefact.

    Raises:
        EngineError: OpenVINO cannot read or compile it.
        UnavailableError: no such device, or not with that precision.
        OptionError: a precision that OpenVINO does not have.
    """
    import openvino

    core = openvino.Core()
    device = {"AUTO": "CPU", "CPU.0": "CPU"}.get(options.device.upper(), options.device.upper())
    settings = _device_settings(core, device, options)
    with _engine_errors(f"OpenVINO cannot load {folder / ARTEFACT}"):
        model = channels_last(sum_apart(one_at_a_time(core.read_model(folder / ARTEFACT))))
        return OpenVinoEngine(model, core.compile_model(model, device, settings), load_head(folder), options)


def _device_settings(core: Any, device: str, options: EngineOptions) -> dict[str, Any]:
    """What a device is told: the precision in so many words (a GPU's own is f16), threads and streams where it has them."""
    devices = core.available_devices
    if not {device, device.removesuffix(".0")} & {*devices, *(name.split(".")[0] for name in devices)}:
        raise UnavailableError(f"OpenVINO has no device '{device}' here, only: {', '.join(devices)}.")
    settings = _settings(options)
    with _engine_errors(f"OpenVINO cannot say what its device '{device}' does"):
        properties = core.get_property(device, "SUPPORTED_PROPERTIES")
        offered = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if options.precision.upper() not in offered:
        able = ", ".join(name for name in PRECISIONS if name.upper() in offered)
        raise UnavailableError(
            f"OpenVINO's device '{device}' computes in {able}, not in {options.precision}: choose with --precision."
        )
    return {name: value for name, value in settings.items() if name not in OPTIONAL or properties.get(name) == "RW"}


def _settings(options: EngineOptions) -> dict[str, Any]:
    if options.precision not in PRECISIONS:
        raise OptionError(f"OpenVINO runs in {', '.join(PRECISIONS)}, not in '{options.precision}'.")
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[options.precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    if options.streams > 1:
        settings["NUM_STREAMS"] = options.streams
    return settings


class OpenVinoEngine:
    """A compiled network; windows go in and come out without copies beyond the result."""

    def __init__(self, model: Any, compiled: Any, head: Head | None, options: EngineOptions) -> None:
        self._model, self._compiled = model, compiled
        self._beside = max((options.threads or os.cpu_count() or 1) // SHARE, 1)
        self._requests = [
            compiled.create_infer_request() for _ in range(options.streams + 1)
        ]  # one answer is read meanwhile
        shape, output = model.input(0).get_shape(), model.output(0).get_shape()
        self._batch = int(shape[0])
        self._spec = EngineSpec(int(shape[1]), (int(shape[2]), int(shape[3]), int(shape[4])), int(output[-1]))
        self._head = head or Head.none(self._spec.features)

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
        """Tensors stay in the host's memory, whatever OpenVINO's own device is."""
        return torch.device("cpu")

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        self._require_open()
        require_windows(windows, self._spec)
        answers = []
        for start in range(0, len(windows), self._batch):
            piece = windows[start : start + self._batch]
            with _engine_errors("OpenVINO failed while it ran the network"):
                result = self._requests[0].infer({0: padded(piece, self._batch)}, share_inputs=True, share_outputs=True)
            answers.append(result[0][: len(piece)].copy())
        return np.moveaxis(answers[0] if len(answers) == 1 else np.concatenate(answers), -1, 1)

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Answers to windows, the next ones computed meanwhile; views of OpenVINO's own memory. See `Engine`."""
        self._require_open()
        running: deque[tuple[Any, Windows, int]] = deque()  # OpenVINO reads the windows where they lie
        pending = iter(windows)
        try:
            for free in itertools.cycle(self._requests):
                group = list(itertools.islice(pending, self._batch))
                if group:
                    running.append((free, self._started(free, group), len(group)))
                if running and (not group or len(running) == len(self._requests)):
                    request, _, number = running.popleft()
                    yield from self._answers(request, number)
                elif not group:
                    return
        finally:
            for request, _, _ in running:
                request.cancel()

    def _started(self, request: Any, group: Sequence[Tensor]) -> Windows:
        piece: Windows = torch.stack(list(group)).numpy() if len(group) > 1 else group[0][None].numpy()
        require_windows(piece, self._spec)
        piece = padded(piece, self._batch)
        with _engine_errors("OpenVINO failed while it ran the network"):
            request.start_async({0: piece}, share_inputs=True)
        return piece

    def _answers(self, request: Any, number: int) -> Tensor:
        """(n, F, X, Y, Z), a view of what OpenVINO wrote."""
        with _engine_errors("OpenVINO failed while it ran the network"):
            request.wait()
        return torch.from_numpy(request.get_output_tensor(0).data[:number]).movedim(-1, 1)

    @property
    def beside(self) -> int:
        """Few: OpenVINO has the cores, and threads that wait for one another after every small operation starve beside it."""
        return self._beside

    def classifier(self, head: Head) -> Classifier:
        """Head and argmax as an OpenVINO graph on the CPU."""
        return _classifier(head, self._beside)

    def _require_open(self) -> None:
        if self._compiled is None:
            raise EngineError("this OpenVINO engine is closed. Open the artefact again.")

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer with its precision in the execution graph."""
        self._require_open()
        late = head_layer(self._head, math.prod(self._spec.window))
        return (*reports(self._model, self._compiled), *late)

    def close(self) -> None:
        """Free the network."""
        self._compiled = self._model = None
        self._requests = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _classifier(head: Head, threads: int) -> Classifier:
    """Blocks of voxels through MatMul, Add and TopK; the last, shorter block is filled up."""
    import openvino
    from openvino import opset13 as ops

    rows = ops.parameter([ROWS, head.features], np.float32)
    logits = rows if head.weight is None else ops.add(ops.matmul(rows, head.weight, False, True), head.bias)
    best = ops.topk(logits, np.int32(1), 1, "max", "none")
    settings = _settings(EngineOptions("CPU", "fp32", threads))
    compiled = openvino.Core().compile_model(openvino.Model([best.output(1)], [rows]), "CPU", settings)
    request, kind = compiled.create_infer_request(), label_type(head.classes)

    def classes_of(features: Tensor) -> Tensor:
        values, found = features.contiguous().numpy(), torch.empty(len(features), dtype=kind)
        for start in range(0, len(values), ROWS):
            part = values[start : start + ROWS]
            full = (
                part
                if len(part) == ROWS
                else np.concatenate([part, np.zeros((ROWS - len(part), part.shape[1]), np.float32)])
            )
            with _engine_errors("OpenVINO failed while it chose classes"):
                best = request.infer({0: full}, share_inputs=True, share_outputs=True)[0]
            found[start : start + ROWS] = torch.from_numpy(best[: len(part), 0])
        return found

    return classes_of


def tap(
    onnx: Path, tensors: Sequence[str], windows: Iterable[Windows], *, precision: Precision = "fp32"
) -> Iterator[dict[str, Windows]]:
    """The values of inner tensors and outputs, window by window; what calibration watches.

    Args:
        onnx: an FP32 graph.
        tensors: names of tensors of that graph.
        precision: of the arithmetic; the values are float32 whatever it is.
        windows: each (1, C, X, Y, Z) float32.

    Yields:
        name -> values of that window; valid until the next one is asked for.

    Raises:
        GraphError: the graph has no such tensor.
        EngineError: OpenVINO fails.
    """
    import openvino

    core = openvino.Core()
    with _engine_errors(f"OpenVINO cannot load {onnx}"):
        model = core.read_model(onnx)
    try:
        outputs = {name for output in model.outputs for name in output.get_names()}
        model.add_outputs([name for name in tensors if name not in outputs])
    except RuntimeError as error:
        raise GraphError(f"{onnx}: a tensor to observe is missing ({error}).") from error
    with _engine_errors(f"OpenVINO cannot compile {onnx}"):
        request = core.compile_model(model, "CPU", _settings(EngineOptions("CPU", precision))).create_infer_request()
    for window in windows:
        with _engine_errors("OpenVINO failed while it calibrated the network"):
            request.infer({0: np.ascontiguousarray(window)}, share_inputs=True, share_outputs=True)
        yield {name: request.get_tensor(name).data for name in tensors}


class _engine_errors:  # noqa: N801
    """Turns OpenVINO's RuntimeError into an EngineError that says what was tried."""

    def __init__(self, tried: str) -> None:
        self.tried = tried

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from openvino import frontend

        failures = (
            RuntimeError,
            frontend.GeneralFailure,
            frontend.InitializationFailure,
            frontend.NotImplementedFailure,
            frontend.OpConversionFailure,
            frontend.OpValidationFailure,
        )
        if isinstance(error, failures):
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise EngineError(f"{self.tried}: {' '.join(lines[-2:])}") from error
