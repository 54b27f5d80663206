"""The steps of quantization as the tests need them: what was seen of a small network, and a plan drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from networks import NETWORKS, windows
from ptq3d.engines import get_backend, load_backend
from ptq3d.engines import torch as eager
from ptq3d.engines.base import EngineOptions
from ptq3d.graphs.files import load_graph, save_graph
from ptq3d.graphs.passes import simplify
from ptq3d.quantization import planning
from ptq3d.quantization.calibration import observe, watch
from ptq3d.quantization.observation import Observations, Observer
from ptq3d.quantization.targets import TARGETS

FAST = "onnxruntime" if load_backend("onnxruntime").unavailable() is None else "openvino"
IMAGES = [window[None] for window in windows(3)]
Floats = np.ndarray


def graph(path: Path) -> ir.Model:
    """The simplified FP32 graph of a file."""
    return simplify(load_graph(path))


def observed(model: ir.Model, target: str = "openvino", images: Sequence[Floats] = IMAGES) -> Observations:
    """What calibration sees of a graph that a target may quantize whole."""
    return observe(model, planning.place(model, TARGETS[target]), images, len(images))


def observed_exactly(
    model: ir.Model, images: Sequence[Floats] = IMAGES, *, placement: planning.Placement | None = None, number: int = 0
) -> Observations:
    """The same in FP32 whatever the processor offers."""
    observer = Observer(model, placement or planning.place(model, TARGETS["openvino"]), number or len(images))
    for values in watch(model, observer.tensors, images):
        observer.see(values)
    return observer.finish()


class Watched(eager.TorchEngine):
    """The torch engine on the CPU, which keeps what every node gives."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, torch.device("cpu"), "fp32")
        self.seen: dict[str, Floats] = {}

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = {str(self._opened().graph.inputs[0].name): x.numpy()}
        return super()._run(x)

    def _apply(self, node: ir.Node, inputs: list[Any]) -> Any:
        value = super()._apply(node, inputs)
        self.seen[str(node.outputs[0].name)] = value.numpy()
        return value


def observed_by_torch(path: Path, target: str, images: Sequence[Floats] = IMAGES) -> Observations:
    """What a target's calibration sees of an FP32 file, where there is no OpenVINO to watch it with."""
    model = graph(path)
    observer = Observer(model, planning.place(model, TARGETS[target]), len(images))
    engine = Watched(path)
    for image in images:
        engine(image)
        observer.see(engine.seen)
    return observer.finish()


def planned(
    model: ir.Model,
    target: str = "openvino",
    *,
    seen: Observations | None = None,
    method: str = "max",
    keep: Sequence[str] = (),
    images: Sequence[Floats] = IMAGES,
) -> planning.Plan:
    """A target's plan, with ranges drawn from what was seen."""
    rules = TARGETS[target]
    seen = observed(model, target, images) if seen is None else seen
    placement = planning.place(model, rules, keep=keep)
    ranges = seen.ranges(placement, method=method, symmetric=rules.symmetric)
    return planning.plan(model, placement, ranges, rules)


def run(engine: str, path: Path, x: Floats) -> Floats:
    """What an engine answers to windows (n, C, X, Y, Z)."""
    backend, folder = get_backend(engine), path.with_name(f"{path.name}.{engine}")
    backend.build(path, folder)
    with backend.open(folder, EngineOptions()) as opened:
        return opened(x)


def outputs(model: ir.Model, path: Path, *, images: Sequence[Floats] = IMAGES, engine: str = FAST) -> Floats:
    """The logits of a graph, (n, K, X, Y, Z)."""
    save_graph(model, path)
    return run(engine, path, np.concatenate(images))


@cache
def example(network: str, target: str = "openvino") -> tuple[ir.Model, Observations]:
    """A network of `NETWORKS`, not to be changed, and what a target's calibration sees of it."""
    with TemporaryDirectory() as folder:
        model = graph(NETWORKS[network](Path(folder) / "n.onnx"))
    return model, observed(model, target)
