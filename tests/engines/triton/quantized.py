"""Small Q/DQ files: networks that the project quantizes for the target triton, and graphs written node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from networks import NETWORKS, Builder, windows
from ptq3d.engines import reference
from ptq3d.engines.base import EngineOptions
from ptq3d.engines.torch import ARTEFACT
from ptq3d.graphs.batching import free_batch
from ptq3d.graphs.export import export_network
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.low_precision import low_precision
from ptq3d.graphs.passes import simplify
from ptq3d.models import build_network
from ptq3d.quantization import planning, qdq
from quantizing import observed_by_torch, planned

Rest = Literal["fp32", "fp16", "bf16"]
ZOO: dict[str, dict[str, Any]] = {
    "nnunet": {"channels": (4, 8, 16), "num_classes": 6, "window": (8, 8, 12)},
    "segresnet": {"channels": (8, 16, 32), "num_classes": 6, "window": (8, 8, 12)},
    "transunet": {"channels": (4, 8, 16), "num_classes": 6, "window": (8, 8, 12)},
    "unet": {"channels": (4, 8, 16), "num_classes": 6, "window": (8, 8, 12)},
}


def freed(path: Path) -> Path:
    """The same graph with a free first axis."""
    model = simplify(load_graph(path))
    free_batch(model)
    save_graph(model, path.with_name("free.onnx"))
    return path.with_name("free.onnx")


def wanted(path: Path, x: np.ndarray) -> np.ndarray:
    """What the reference engine answers to windows (n, C, X, Y, Z)."""
    with reference.open(path.parent, EngineOptions()) as engine:
        return engine(x)


def quantize(fp32: Path, window: tuple[int, ...], *, keep: Sequence[str] = (), rest: Rest = "fp32") -> Path:
    """A file quantized for the target triton, in a folder that engines open; its rest, and the layers of `keep`, are of that type."""
    images = [image[None] for image in windows(2, shape=(1, *window))]
    seen = observed_by_torch(fp32, "triton", images)
    model = simplify(load_graph(fp32))
    path = fp32.with_name(ARTEFACT)
    made = qdq.write(model, planning.in_type(planned(model, "triton", seen=seen, keep=keep), rest))
    if rest != "fp32":
        low_precision(made, rest)
    save_graph(made, path)
    return path


@cache
def small(name: str, *, keep: tuple[str, ...] = (), rest: Rest = "fp32") -> Path:
    """A network of `NETWORKS`, quantized."""
    return quantize(NETWORKS[name](Path(mkdtemp()) / "fp32.onnx"), (8, 12, 10), keep=keep, rest=rest)


@cache
def of_the_zoo(name: str, *, rest: Rest = "fp32") -> Path:
    """A network of the zoo with few channels, norms and biases that do something, quantized."""
    torch.manual_seed(0)
    network, window = build_network(name, **ZOO[name]).eval(), ZOO[name]["window"]
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    fp32 = Path(mkdtemp()) / "fp32.onnx"
    save_graph(export_network(network, channels=1, window=window).model, fp32)
    return quantize(fp32, window, rest=rest)


class Graph(Builder):
    """Q/DQ graphs by hand: `q` rounds a tensor, to uint8 with a zero-point where `unsigned`; weights are INT8."""

    unsigned = False

    def constant(self, *values: Any, dtype: Any = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.array(*values, dtype), f"w{len(self.weights)}"))
        return f"w{len(self.weights) - 1}"

    def q(self, x: str, step: float = 1 / 32) -> str:
        parameters = self.scale(step)
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, *parameters), *parameters)

    def scale(self, step: float) -> tuple[str, str]:
        """A step and the zero-point that goes with it: the same for the same step."""
        zero = self.constant(100 + round(1 / step) % 50, dtype=np.uint8) if self.unsigned else None
        return self.constant(step), zero or self.constant(0, dtype=np.int8)

    def integers(self, *shape: int, axis: int = 0) -> str:
        """INT8 weights behind a DequantizeLinear with a step for each channel."""
        values = self.constant(self.random.integers(-127, 128, shape), dtype=np.int8)
        fan = np.sqrt(np.prod(shape) / shape[axis])
        steps = self.constant(self.random.uniform(0.5, 1.5, shape[axis]) / 60 / fan)
        return self.add("DequantizeLinear", values, steps, axis=axis)

    def conv8(self, x: str, source: int, channels: int, kernel: int = 3, **attributes: Any) -> str:
        weight = self.integers(channels, source // attributes.get("group", 1), kernel, kernel, kernel)
        bias = self.weight(channels, spread=0.3)
        return self.add("Conv", x, weight, bias, pads=[kernel // 2] * 6, **attributes)

    def linear8(self, x: str, source: int, channels: int) -> str:
        product = self.add("MatMul", x, self.integers(source, channels, axis=1))
        return self.add("Add", product, self.weight(channels, spread=0.3))

    def reshape(self, x: str, *shape: int) -> str:
        return self.add("Reshape", x, self.constant(shape, dtype=np.int64))

    def slice(self, x: str, first: int, last: int, axis: int, step: int = 1) -> str:
        return self.add("Slice", x, *(self.constant([one], dtype=np.int64) for one in (first, last, axis, step)))

    def finished(self, classes: int) -> Path:
        path = Path(mkdtemp()) / ARTEFACT
        return self.save(path, "logits", classes, opset=21)


def written(build: Callable[[Graph], int], *, unsigned: bool = False) -> Path:
    """The file of a graph that a function writes; it gives the number of classes."""
    graph = Graph(7)
    graph.unsigned = unsigned
    return graph.finished(build(graph))


def odd(g: Graph) -> int:
    """Channels that fill no row, in whatever reads and writes rows: of INT8 layers only."""
    x = g.q(g.add("Relu", g.conv8(g.q("image", 1 / 127), 1, 5)))
    first = g.q(g.add("Relu", g.conv8(x, 5, 14)), 1 / 20)
    wide = g.add("Conv", first, g.integers(14, 14, 3, 3, 3), dilations=[1, 2, 2], pads=[1, 2, 2, 1, 2, 2])
    skip = g.q(g.add("Relu", g.add("Add", wide, first)))
    deep = g.add("MaxPool", skip, kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    deep = g.q(g.add("Relu", g.conv8(deep, 14, 19)))
    up = g.q(g.add("ConvTranspose", deep, g.integers(19, 9, 2, 2, 2, axis=1), strides=[2, 2, 2]))
    joined = g.q(g.add("Relu", g.conv8(g.add("Concat", up, skip, axis=1), 23, 30)), 1 / 40)
    g.conv8(g.slice(joined, 3, 20, 1), 17, 3)
    return 3


def of_integers(path: Path) -> Path:
    """The file without its last DequantizeLinear, as a network without its late head is."""
    model = onnx.load(path)
    zero = next(one for one in model.graph.initializer if one.name == model.graph.node[-1].input[2])
    del model.graph.node[-1]
    model.graph.output[0].name = model.graph.node[-1].output[0]
    model.graph.output[0].type.tensor_type.elem_type = zero.data_type
    onnx.save(model, path)
    return path
