"""Recipes tried on the engines that they make: what the labels of a few windows say of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ptq3d.engines import BACKENDS, get_backend
from ptq3d.engines.base import Engine, EngineOptions
from ptq3d.evaluation.metrics import fidelity
from ptq3d.graphs.files import save_graph
from ptq3d.graphs.low_precision import full_precision
from ptq3d.progress import Progress, silent
from ptq3d.quantization.budget import FEWER, FewestTerms, fewest_terms
from ptq3d.quantization.observation import Observations
from ptq3d.quantization.quantizer import Quantized, Recipe, quantize_graph
from ptq3d.quantization.rounding import Rounded

if TYPE_CHECKING:
    import onnx_ir as ir

TRIED = 4  # calibration windows on which recipes are tried
COMPILED = ("tensorrt", "triton")  # for a GPU, which need not be where a network is quantized
Window = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Engines:
    """Quantizes one calibrated graph by recipes, and opens their engines.

    Args:
        model: the simplified FP32 graph; it is left as it is.
        seen: what calibration saw of it.
        target: the runtime the graphs are written for; its own engine runs them unless it is compiled for a GPU, then ONNX
            Runtime's. That has no BF16 on the CPU: a BF16 rest then runs in FP32.
        scratch: a folder for engines.
    """

    def __init__(self, model: ir.Model, seen: Observations, target: str, scratch: Path) -> None:
        own = target in BACKENDS and target not in COMPILED
        self.model, self.name = model, target if own else "onnxruntime"
        self._seen, self._scratch = seen, scratch
        self._backend, self._rounded = get_backend(self.name), Rounded()
        self._made: dict[Recipe, Quantized] = {}

    def made(self, recipe: Recipe) -> Quantized:
        """The graph of a recipe."""
        if recipe not in self._made:  # one at a time: they are large
            self._made = {recipe: quantize_graph(self.model, self._seen, recipe, self._rounded)}
        return self._made[recipe]

    @contextmanager
    def of(self, recipe: Recipe | None) -> Iterator[Engine]:
        """The engine of a recipe, or of the FP32 graph."""
        model = self.model.clone() if recipe is None else self._runnable(recipe)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            folder = Path(name)
            save_graph(model, folder / "network.onnx")
            self._backend.build(folder / "network.onnx", folder / "engine")
            with self._backend.open(folder / "engine", EngineOptions()) as engine:
                yield engine

    def _runnable(self, recipe: Recipe) -> ir.Model:
        model = self.made(recipe).model
        if self.name == "onnxruntime" and recipe.high_precision_dtype == "bf16":
            model = model.clone()
            full_precision(model)
        return model

    def labels(self, recipe: Recipe | None, windows: Sequence[Window]) -> Labels:
        """(n, X, Y, Z) classes of n windows (1, C, X, Y, Z), by the engine of a recipe or of the FP32 graph."""
        with self.of(recipe) as engine:
            return np.stack([engine(window)[0].argmax(0) for window in windows])


def tried_of(number: int) -> list[int]:
    """Which of `number` windows recipes are tried on: `TRIED` of them, evenly spread."""
    return sorted({number * index // TRIED for index in range(TRIED)})


def with_fewest_terms(
    engines: Engines, start: Recipe, windows: Sequence[Window], classes: int, *, progress: Progress = silent
) -> FewestTerms:
    """The recipe with the fewest second terms that keeps the labels of windows about as well as `start` does.

    Args:
        engines: of the network.
        start: with the most second terms that may be spent.
        windows: of the calibration, (1, C, X, Y, Z) float32 each; those of `tried_of` are looked at.
        classes: of the network, with the background.
        progress: told of each engine that was run.
    """
    most = engines.made(start)
    if not (most.split or most.mended):
        return FewestTerms(start, {})
    known: dict[object, float] = {}
    some = [windows[index] for index in tried_of(len(windows))]
    reference = engines.labels(None, some)
    progress(1, 2 + len(FEWER))

    def disagreement(recipe: Recipe) -> float:
        made = engines.made(recipe)
        layers = made.split, made.mended
        if layers not in known:
            known[layers] = 1 - fidelity(engines.labels(recipe, some), reference, classes)
        progress(1 + len(known), 2 + len(FEWER))
        return known[layers]

    return fewest_terms(start, disagreement)
