"""Eager PyTorch, on the CPU or on CUDA: an ONNX graph op by op in floating point; Q/DQ rounds as ONNX says."""

from __future__ import annotations

import math
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
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
    batches,
    head_layer,
    require_windows,
    runs_anywhere,
)
from ptq3d.engines.operators import NUMBERS, OPERATORS, attributes_of
from ptq3d.errors import EngineError, GraphError, OptionError, UnavailableError, line_of, numbered
from ptq3d.graphs.files import load_graph, static_input_shape
from ptq3d.graphs.layers import layers, shape_of
from ptq3d.graphs.passes import simplify
from ptq3d.head import Classifier, Head, classifier, load_head
from ptq3d.progress import Progress, silent

ARTEFACT = "model.onnx"
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARITHMETIC = threading.RLock()  # PyTorch's switches are of the whole process
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
LIMITS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def unavailable() -> str | None:
    """None: torch is a dependency of ptq3d itself."""
    return None


def version() -> str:
    """PyTorch's version."""
    return str(torch.__version__)


def compiled_for(settings: BuildSettings) -> str:
    """Nothing: its artefacts run wherever it does."""
    return runs_anywhere("torch", settings)


def build(onnx: Path, folder: Path, settings: BuildSettings = PLAIN, progress: Progress = silent) -> tuple[Path, ...]:
    """The ONNX file itself, checked to hold only operators that this engine knows.

    Raises:
        EngineError: it holds others; all of them are named.
        OptionError: a batch or a workspace.
    """
    compiled_for(settings)
    graph = simplify(load_graph(onnx)).graph
    unknown = sorted({node.op_type for node in graph} - set(OPERATORS) - {"QuantizeLinear", "DequantizeLinear"})
    if unknown:
        raise EngineError(
            f"{onnx}: the torch engine does not know {', '.join(unknown)}. Use --engine openvino or onnxruntime."
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / ARTEFACT]
    shutil.copyfile(onnx, written[0])
    for external in onnx.parent.glob(f"{onnx.name}.data"):
        written.append(folder / external.name)
        shutil.copyfile(external, written[-1])
    return tuple(written)


def open(folder: Path, options: EngineOptions) -> TorchEngine:
    """The engine of an artefact; "auto" is CUDA where there is one.

    Raises:
        UnavailableError: no such device.
        OptionError: no such precision, or not on this device.
    """
    return TorchEngine(folder / ARTEFACT, prepared_device(options, "torch"), options.precision)


def prepared_device(options: EngineOptions, engine: str) -> torch.device:
    """The device that options name, with PyTorch's threads set to theirs.

    Args:
        options: "auto" is CUDA where there is one.
        engine: for messages.

    Raises:
        UnavailableError: no such device.
        OptionError: no such precision, or not on this device.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device.lower()
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UnavailableError(
            f"PyTorch sees no CUDA device here, so '{options.device}' cannot be used. Choose --device cpu."
        )
    if name == "cuda":
        name = f"cuda:{torch.cuda.current_device()}"  # as tensors on it name it
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnavailableError(f"PyTorch has no device '{options.device}': {line_of(error)}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            f"PyTorch sees {numbered(torch.cuda.device_count(), 'CUDA device')} here, so there is no '{options.device}'."
        )
    if device.type not in ("cpu", "cuda"):
        raise UnavailableError(f"the {engine} engine runs on cpu or cuda, not on '{options.device}'.")
    able = [precision for precision in TYPES if precision != "tf32" or device.type == "cuda"]
    if options.precision not in able:
        raise OptionError(
            f"the {engine} engine runs in {', '.join(able)} on {device.type}, not in '{options.precision}'"
            f"{': processors have no TF32' if options.precision == 'tf32' else ''}."
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    return device


@contextmanager
def arithmetic(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """FP32 on CUDA as asked for, whatever PyTorch's switches say, and the same answer every time; they are put back after it.

    cuDNN's own choice is TF32. Nothing on the CPU.
    """
    if device.type != "cuda":
        yield
        return
    with ARITHMETIC, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")  # of PyTorch 2.9, which has both
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            with torch.backends.cudnn.flags(
                enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=tf32
            ):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


class TorchEngine:
    """An ONNX graph run node by node."""

    def __init__(self, path: Path, device: torch.device, precision: Precision) -> None:
        model = simplify(load_graph(path))
        self._batch, channels, x, y, z = static_input_shape(model)
        self._spec = EngineSpec(channels, (x, y, z), shape_of(model.graph.outputs[0])[1])
        self._head = load_head(path.parent) or Head.none(self._spec.features)
        self._model: ir.Model | None = model
        self._device, self._precision, self._dtype = device, precision, TYPES[precision]
        self._constants = {str(value.name): self._constant(value) for value in model.graph.initializers.values()}
        self._attributes = {node.name: attributes_of(node) for node in model.graph}
        self._numbers = {
            (node.name, place): value.const_value.numpy().reshape(-1).tolist()
            for node in model.graph
            for place, value in enumerate(node.inputs)
            if place in NUMBERS.get(node.op_type, ()) and value is not None and value.const_value is not None
        }
        self._last_use = {value.name: node.name for node in model.graph for value in node.inputs if value is not None}

    def _constant(self, value: ir.Value) -> Tensor:
        if value.const_value is None:
            raise GraphError(f"the weight '{value.name}' has no value.")
        array = value.const_value.numpy()
        if value.const_value.dtype in FLOATS:  # the engine's own type counts
            array = array.astype(np.float32)
        tensor = torch.from_numpy(array.copy()).to(self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() and tensor.ndim > 1 else tensor

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

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        self._opened()
        require_windows(windows, self._spec)
        pieces = (torch.from_numpy(window).to(self._device) for window in windows)
        return np.stack([answer.cpu().numpy() for answer in self.stream(pieces)])

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Answers to windows, which stay on the device; see `Engine`."""
        self._opened()
        for group in batches(windows, self._spec, self._batch):
            missing = [torch.zeros_like(group[0])] * (self._batch - len(group))
            try:
                with torch.inference_mode(), arithmetic(self._device, tf32=self._precision == "tf32"):
                    answers = self._run(torch.stack([*group, *missing]).to(self._dtype))
            except RuntimeError as error:
                raise EngineError(f"PyTorch failed while it ran the network: {line_of(error)}") from error
            for answer in answers[: len(group)]:
                yield answer if answer.dtype in LIMITS else answer.float()

    @property
    def beside(self) -> int:
        """As many as there are: it computes one window at a time, and nothing meanwhile."""
        return 0

    def classifier(self, head: Head) -> Classifier:
        """Head and argmax on the engine's device."""
        return classifier(head, self._device)

    def _opened(self) -> ir.Model:
        if self._model is None:
            raise EngineError("this engine is closed. Open the artefact again.")
        return self._model

    def _run(self, x: Tensor) -> Tensor:
        """Answers (n, F, X, Y, Z) to a whole batch in the engine's type."""
        graph = self._opened().graph
        values: dict[str | None, Any] = {None: None}
        values.update(self._constants)
        values[graph.inputs[0].name] = x
        for node in graph:
            inputs = [
                self._numbers.get((node.name, place), values[value.name if value is not None else None])
                for place, value in enumerate(node.inputs)
            ]
            values[node.outputs[0].name] = self._apply(node, inputs)
            for value in node.inputs:
                if value is not None and self._last_use[value.name] == node.name and value.producer() is not None:
                    values.pop(value.name, None)
        result: Tensor = self._finish(values[graph.outputs[0].name])
        return result

    def _finish(self, value: Any) -> Tensor:
        tensor: Tensor = value
        return tensor

    def _apply(self, node: ir.Node, inputs: list[Any]) -> Any:
        attributes = self._attributes[node.name]
        if node.op_type == "QuantizeLinear":
            return quantize(attributes, *inputs)
        if node.op_type == "DequantizeLinear":
            return dequantize(attributes, *inputs).to(self._dtype)
        if node.op_type == "Cast" and node.outputs[0].dtype in FLOATS:  # the engine's own type counts
            return inputs[0].to(self._dtype)
        return OPERATORS[node.op_type](attributes, *(self._as_type(value) for value in inputs))

    def _as_type(self, value: Any) -> Any:
        """Small constants (bias, norm) are kept in FP32 and join the others' type here."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if floating else value

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer; all run in the engine's floating-point type."""
        found = [LayerReport(layer.name, layer.op, self._precision, layer.macs) for layer in layers(self._opened())]
        return (*found, *head_layer(self._head, math.prod(self._spec.window)))

    def close(self) -> None:
        """Free the graph and its weights."""
        self._model = None
        self._constants = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def along(axis: int, tensor: Tensor, rank: int) -> Tensor:
    """A (K,) tensor shaped to broadcast along an axis of a tensor of that rank; a scalar stays one."""
    if tensor.numel() == 1:
        return tensor.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return tensor.reshape(shape)


def quantize(attributes: dict[str, Any], x: Tensor, step: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """QuantizeLinear: clip(round_half_even(x / step) + zero_point)."""
    axis = attributes.get("axis", 1)
    dtype = torch.uint8 if zero_point is None else zero_point.dtype
    levels = torch.round(x.float() / along(axis, step.float(), x.ndim))
    if zero_point is not None:
        levels = levels + along(axis, zero_point.float(), x.ndim)
    return levels.clamp(*LIMITS[dtype]).to(dtype)


def dequantize(attributes: dict[str, Any], q: Tensor, step: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """DequantizeLinear: (q - zero_point) * step, float32."""
    axis = attributes.get("axis", 1)
    centred = q.to(torch.int32)
    if zero_point is not None:
        centred = centred - along(axis, zero_point.to(torch.int32), q.ndim)
    return centred.float() * along(axis, step.float(), q.ndim)
