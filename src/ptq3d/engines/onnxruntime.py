"""ONNX Runtime, on the CPU or with other execution providers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
    padded,
    require_windows,
    runs_anywhere,
)
from ptq3d.engines.providers import PROVIDERS, failures, open_session
from ptq3d.errors import EngineError, UnavailableError, line_of
from ptq3d.graphs.files import load_graph, save_graph, static_input_shape
from ptq3d.graphs.layers import Layer, layers, shape_of
from ptq3d.graphs.low_precision import low_type
from ptq3d.graphs.passes import is_quantized, simplify, unsigned_activations
from ptq3d.head import Classifier, Head, classifier, load_head
from ptq3d.progress import Progress, silent

ARTEFACT = "model.onnx"
TYPED = 21  # the first opset whose QuantizeLinear has output_dtype
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

    Nothing falls back to the CPU: a provider that does not start, or a node that none of `options.providers` takes, is an error.

    Raises:
        EngineError: ONNX Runtime cannot load it, or runs a part of it elsewhere.
        UnavailableError: this machine has no such provider or device, or the file is in BF16 and the CPU is to run it.
        OptionError: a precision that the first provider does not have.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    model = simplify(load_graph(folder / ARTEFACT))
    compiles = any(PROVIDERS[name].compiles for name in options.providers if name in PROVIDERS)
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / ARTEFACT
        if compiles:
            # ONNX Runtime moves and adds Q/DQ for its CPU, and a provider's answers are then not those of the file
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        else:  # which cannot be written where a provider compiled parts of it
            settings.optimized_model_filepath = str(optimized)
        path = folder / ARTEFACT
        if "openvino" in options.providers and any(node.op_type == "Concat" for node in model.graph):
            path = Path(scratch) / "unsigned.onnx"  # as in `openvino.build`: it can misread int8 around a concat
            unsigned_activations(model)
            save_graph(model, path)
        disabled = _disabled(folder / ARTEFACT, model, options)
        session, placed = open_session(path, settings, options, quantized=is_quantized(model), disabled=disabled)
        operators = None if compiles else _executed_operators(optimized)
    return OnnxRuntimeEngine(model, session, Ran(operators, placed, options.precision), load_head(folder))


@dataclass(frozen=True)
class Ran:
    """What ONNX Runtime says of the graph that it runs.

    Args:
        operators: output tensor -> operator after its own fusions; None where a provider compiled parts of the graph, of which
            no report exists.
        placed: name of a node -> its provider; empty for the CPU alone.
        precision: of floating point where the first provider computes.
    """

    operators: Mapping[str, str] | None
    placed: Mapping[str, str]
    precision: Precision

    def floating(self, layer: str, dtype: ir.DataType | None) -> str:
        """The floating-point type of a layer: of a GPU the tensor's own, of the CPU always FP32."""
        if self.placed.get(layer, "cpu") != "cuda":
            return "fp32"
        return {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}.get(
            dtype or ir.DataType.FLOAT, "tf32" if self.precision == "tf32" else "fp32"
        )


def _disabled(path: Path, model: ir.Model, options: EngineOptions) -> list[str]:
    """The optimizers of ONNX Runtime that must not touch a file.

    Where steps are FP16 it quantizes biases with their product, which FP16 does not hold, so that answers are wrong (1.32). From
    opset 21 on it gives a QuantizeLinear that it moves an output_dtype, which it contradicts when it makes uint8 of int8: it then
    cannot load its own graph (1.32).
    """
    low = low_type(model)
    if low == ir.DataType.BFLOAT16 and (not options.providers or "cpu" in options.providers):
        raise UnavailableError(
            f"{path}: ONNX Runtime has no BF16 kernels on the CPU. Use --engine openvino, torch or reference."
        )
    moved = model.opset_imports[""] >= TYPED and any(_makes_int8(node) for node in model.graph)
    return [*([] if low is None else ["WeightBiasQuantization"]), *(["QDQPropagationTransformer"] if moved else [])]


def _makes_int8(node: ir.Node) -> bool:
    return node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.INT8


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
    """An ONNX Runtime session; windows go in and answers come out as arrays of the host, whatever the provider."""

    def __init__(self, model: ir.Model, session: Any, ran: Ran, head: Head | None) -> None:
        self._session, self._ran = session, ran
        self._layers: tuple[Layer, ...] = tuple(layers(model))
        self._model = model
        batch, channels, x, y, z = static_input_shape(model)
        self._batch = batch
        self._spec = EngineSpec(channels, (x, y, z), shape_of(model.graph.outputs[0])[1])
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
        """The CPU."""
        return torch.device("cpu")

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        self._require_open()
        require_windows(windows, self._spec)
        pieces = (windows[start : start + self._batch] for start in range(0, len(windows), self._batch))
        return np.concatenate([self._answers(piece) for piece in pieces])

    def _answers(self, piece: Windows) -> Windows:
        name = self._session.get_inputs()[0].name
        output = self._session.get_outputs()[0].name
        try:
            answers: Windows = self._session.run([output], {name: padded(piece, self._batch)})[0]
        except failures() as error:
            raise EngineError(f"ONNX Runtime failed while it ran the network: {line_of(error)}") from error
        return answers[: len(piece)]

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Answers to windows, one after the other; see `Engine`."""
        self._require_open()
        for group in batches(windows, self._spec, self._batch):
            yield from torch.from_numpy(self(torch.stack(group).numpy()))

    def _require_open(self) -> None:
        if self._session is None:
            raise EngineError("this ONNX Runtime engine is closed. Open the artefact again.")

    @property
    def beside(self) -> int:
        """As many as there are: it computes one window at a time, and nothing meanwhile."""
        return 0

    def classifier(self, head: Head) -> Classifier:
        """Head and argmax on the CPU."""
        return classifier(head, self.device)

    def layers(self) -> tuple[LayerReport, ...]:
        """Every multiplying layer; INT8 where ONNX Runtime made an integer operator of it.

        The CUDA provider has none: there Q/DQ round, and layers multiply in floating point. Of what the TensorRT and OpenVINO
        providers compile no report exists, so their layers are "unknown".
        """
        self._require_open()
        found = [LayerReport(layer.name, *self._ran_as(layer), layer.macs) for layer in self._layers]
        return (*found, *head_layer(self._head, math.prod(self._spec.window)))

    def _ran_as(self, layer: Layer) -> tuple[str, str]:
        """(operator, precision): a fused integer layer gives the tensor of the QuantizeLinear that follows it."""
        if self._ran.operators is None:
            return f"{layer.op} on {self._ran.placed.get(layer.name, 'unknown')}", "unknown"
        first = next(node.outputs[0] for node in self._model.graph if node.name == layer.name)
        floating, waiting = self._ran.floating(layer.name, first.dtype), [first]
        while waiting:
            value = waiting.pop(0)
            operator = self._ran.operators.get(str(value.name))
            if operator is not None:
                return operator, "int8" if operator.startswith("QLinear") or "Integer" in operator else floating
            waiting += [output for node, _ in value.uses() for output in node.outputs]
        return layer.op, floating

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
