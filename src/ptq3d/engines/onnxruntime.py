"""ONNX Runtime on the CPU."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
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
    Windows,
    head_layer,
    require_windows,
    runs_anywhere,
)
from ptq3d.errors import EngineError, OptionError, UnavailableError
from ptq3d.graphs.files import load_graph, save_graph, static_input_shape
from ptq3d.graphs.layers import Layer, layers, shape_of
from ptq3d.graphs.low_precision import low_type
from ptq3d.graphs.passes import simplify
from ptq3d.head import Classifier, Head, classifier, load_head
from ptq3d.progress import Progress, silent

ARTEFACT = "model.onnx"
CARRIERS = frozenset({"Transpose", "QuantizeLinear", "DequantizeLinear", "Relu"})


def unavailable() -> str | None:
    """Why ONNX Runtime cannot run here, None where it can."""
    try:
        import onnxruntime  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{error}; mend it with: pip install 'ptq3d[onnxruntime]'"
    return None


def version() -> str:
    """ONNX Runtime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def compiled_for(settings: BuildSettings) -> str:
    """Nothing: its artefacts run wherever it does."""
    return runs_anywhere("onnxruntime", settings)


def build(onnx: Path, folder: Path, settings: BuildSettings = PLAIN, progress: Progress = silent) -> tuple[Path, ...]:
    """The simplified graph as `model.onnx`.

    Raises:
        GraphError: the graph is invalid.
        OptionError: a batch or a workspace.
    """
    compiled_for(settings)
    save_graph(simplify(load_graph(onnx)), folder / ARTEFACT)
    external = folder / f"{ARTEFACT}.data"
    return (folder / ARTEFACT, external) if external.exists() else (folder / ARTEFACT,)


def open(folder: Path, options: EngineOptions) -> OnnxRuntimeEngine:
    """The engine of an artefact.

    Raises:
        EngineError: ONNX Runtime cannot load it.
        UnavailableError: another device than the CPU, or a file in BF16.
        OptionError: another precision than FP32.
    """
    import onnxruntime

    if options.device not in ("auto", "CPU", "cpu"):
        raise UnavailableError(f"the onnxruntime engine runs on the CPU, not on '{options.device}'.")
    if options.precision != "fp32":
        raise OptionError(f"the onnxruntime engine runs in fp32, not in '{options.precision}'.")
    disabled = _disabled(folder / ARTEFACT)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / ARTEFACT
        settings.optimized_model_filepath = str(optimized)
        try:
            session = onnxruntime.InferenceSession(
                folder / ARTEFACT, settings, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"ONNX Runtime cannot load {folder / ARTEFACT}: {error}") from error
        operators = _executed_operators(optimized)
    return OnnxRuntimeEngine(folder / ARTEFACT, session, operators)


def _disabled(path: Path) -> list[str]:
    """The optimizers of ONNX Runtime that must not touch a file.

    Where steps are FP16 it quantizes biases with their product, which FP16 does not hold: answers off by a third (1.32).
    """
    low = low_type(ir.load(path))
    if low == ir.DataType.BFLOAT16:
        raise UnavailableError(
            f"{path}: ONNX Runtime has no BF16 kernels on the CPU. Use --engine openvino, torch or reference."
        )
    return [] if low is None else ["WeightBiasQuantization"]


def _executed_operators(optimized: Path) -> dict[str, str]:
    """Output tensor -> operator, of the graph that ONNX Runtime runs after its own fusions.

    Its integer convolutions work on channels last: what only carries its values to the tensor of the file stands for it.
    """
    import onnx

    graph = onnx.load(str(optimized), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}

    def behind(output: str) -> str:
        node = makers[output]
        carried = node.op_type in CARRIERS and node.input[0] in makers
        found = behind(node.input[0]) if carried else node.op_type
        return found if found.startswith("QLinear") else node.op_type

    return {output: behind(output) for output in makers}


class OnnxRuntimeEngine:
    """An ONNX Runtime session on the CPU provider."""

    def __init__(self, path: Path, session: Any, operators: dict[str, str]) -> None:
        model = simplify(load_graph(path))
        self._session, self._operators = session, operators
        self._layers: tuple[Layer, ...] = tuple(layers(model))
        self._model = model
        batch, channels, x, y, z = static_input_shape(model)
        self._batch = batch
        self._spec = EngineSpec(channels, (x, y, z), shape_of(model.graph.outputs[0])[1])
        self._head = load_head(path.parent) or Head.none(self._spec.features)

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
        """The CPU."""
        return torch.device("cpu")

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        if self._session is None:
            raise EngineError("this ONNX Runtime engine is closed. Open the artefact again.")
        require_windows(windows, self._spec)
        name = self._session.get_inputs()[0].name
        output = self._session.get_outputs()[0].name
        return np.concatenate([self._session.run([output], {name: window[None]})[0] for window in windows])

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Answers to windows, one after the other; see `Engine`."""
        for window in windows:
            yield torch.from_numpy(self(window[None].numpy()))[0]

    @property
    def beside(self) -> int:
        """As many as there are: it computes one window at a time, and nothing meanwhile."""
        return 0

    def classifier(self, head: Head) -> Classifier:
        """Head and argmax on the CPU."""
        return classifier(head, self.device)

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer; INT8 where ONNX Runtime made an integer operator of it."""
        found = [LayerReport(layer.name, *self._ran_as(layer), layer.macs) for layer in self._layers]
        return (*found, *head_layer(self._head, math.prod(self._spec.window)))

    def _ran_as(self, layer: Layer) -> tuple[str, str]:
        """(operator, precision): a fused integer layer gives the tensor of the QuantizeLinear that follows it."""
        waiting = [next(node.outputs[0] for node in self._model.graph if node.name == layer.name)]
        while waiting:
            value = waiting.pop(0)
            operator = self._operators.get(str(value.name))
            if operator is not None:
                return operator, "int8" if operator.startswith("QLinear") or "Integer" in operator else "fp32"
            waiting += [output for node, _ in value.uses() for output in node.outputs]
        return layer.op, "fp32"

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
