"""A PyTorch network as an ONNX graph, checked against the network."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ptq3d.errors import GraphError, line_of
from ptq3d.graphs.files import load_graph
from ptq3d.graphs.passes import simplify

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.nn import Module

OPSET = 20
TOLERANCE = 1e-3  # of the logits' range
SAME_LABELS = 0.9999  # least share of equal labels
STEPS = (1, 2, 4, 8, 16, 32)  # total strides to look for where a window does not fit
UNFIT = (RuntimeError, ValueError, AssertionError, TypeError)  # what networks raise for a window that they cannot take
TIE = 1e-5  # of the logits' range: nearer than float32 arithmetic in another order moves them


@dataclass(frozen=True)
class Export:
    """An exported graph and what was fed to the network, with its answer.

    Args:
        model: the simplified FP32 graph.
        window: (1, C, X, Y, Z) float32, random.
        logits: (1, K, X, Y, Z) float32, PyTorch's answer to it.
    """

    model: ir.Model
    window: np.ndarray
    logits: np.ndarray


def export_network(
    network: Module | ExportedProgram, *, channels: int, window: tuple[int, int, int], seed: int = 0
) -> Export:
    """A network in evaluation mode as a simplified FP32 ONNX graph of static shape.

    Args:
        network: takes (1, channels, *window) float32 and gives logits (1, K, *window); a module, a ScriptModule, or a
            program exported for this window.
        channels: C of the input.
        window: (X, Y, Z) in voxels.
        seed: of the random window that the export is checked with.

    Raises:
        GraphError: PyTorch cannot export it, or it does not fit the window.
    """
    import torch

    example = torch.randn(1, channels, *window, generator=torch.Generator().manual_seed(seed))
    try:
        answer = _answer(network, example)
    except UNFIT as error:
        raise GraphError(
            f"the network does not take windows of {window} voxels with {channels} channels: "
            f"{line_of(error, -1).rstrip('.')}. {_fitting(network, channels, window)}"
        ) from error
    if not isinstance(answer, torch.Tensor):
        raise GraphError(
            f"the network gives a {type(answer).__name__}; one tensor of logits (1, K, X, Y, Z) is wanted. "
            "Switch its deep supervision off."
        )
    logits = answer.numpy()
    if logits.ndim != 5 or logits.shape[2:] != tuple(window):
        raise GraphError(
            f"the network gives {logits.shape} for windows of {window}; logits (1, K, X, Y, Z) are wanted."
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "network.onnx"
        _torch_export(network, example, path)
        return Export(simplify(load_graph(path)), example.numpy(), logits)


def _answer(network: Module | ExportedProgram, example: Tensor) -> object:
    import torch

    with torch.inference_mode():
        return _callable(network)(example)


def _fitting(network: Module | ExportedProgram, channels: int, window: tuple[int, int, int]) -> str:
    """Which windows a network takes, found by trying: three times a step is halved exactly as often as the step is."""
    import torch

    for step in STEPS:
        try:
            answer = _answer(network, torch.zeros(1, channels, *(3 * step,) * 3))
        except UNFIT:
            continue
        if isinstance(answer, torch.Tensor) and answer.shape[2:] == (3 * step,) * 3:
            fitting = tuple(-(-max(side, 1) // step) * step for side in window)
            if fitting == tuple(window):
                return f"It takes cubes of {3 * step} voxels, though: try another --window."
            return f"It takes sides that are multiples of {step}: try --window {' '.join(map(str, fitting))}."
    tried = ", ".join(str(3 * step) for step in STEPS)
    return f"Nor does it take cubes of {tried} voxels: it may be made for one window only, or for other channels."


def _callable(network: Module | ExportedProgram) -> Callable[[Tensor], object]:
    """What answers a window; guards of a program, which are code of its file, are not compiled."""
    import torch

    return network.eval() if isinstance(network, torch.nn.Module) else network.module(check_guards=False)


def _exportable(network: Module | ExportedProgram, example: Tensor) -> Module | ExportedProgram:
    """What PyTorch's exporter takes: the operators of a script, which it cannot trace itself; all others as they are."""
    import torch

    if not isinstance(network, torch.jit.ScriptModule):
        return network
    try:
        return _operators_called(network, example)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise GraphError(
            f"PyTorch cannot turn this TorchScript into a graph: {line_of(error)}. Export the network itself to ONNX."
        ) from error


def _operators_called(script: Module, example: Tensor) -> ExportedProgram:
    """The operators on tensors that a script calls for one window, its loops and branches taken as they go for it.

    PyTorch 2.13 offers two other ways: TS2EPConverter ends at loops, the exporter of before 2.5 at lists.
    """
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    with torch.no_grad():
        graph = make_fx(lambda window: script(window), pre_dispatch=True)(example)
    for node in graph.graph.nodes:
        if node.target in (
            aten._convolution.default,
            aten._convolution.deprecated,
        ):  # of traces: flags of cuDNN at the end
            node.target, node.args = aten.convolution.default, node.args[:9]
    graph.recompile()
    return torch.export.export(graph, (example,))


def _torch_export(network: Module | ExportedProgram, example: Tensor, path: Path) -> None:
    import torch

    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own deprecations inside its exporter
            torch.onnx.export(
                _exportable(network, example), (example,), str(path), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=["image"], output_names=["logits"], external_data=True,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise GraphError(f"PyTorch cannot export this network to ONNX: {line_of(error)}") from error
    finally:
        noisy.setLevel(level)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """max |found - wanted| / (max wanted - min wanted)."""
    span = float(np.ptp(wanted))
    return float(np.abs(found - wanted).max()) / max(span, 1e-30)


def label_agreement(found: np.ndarray, wanted: np.ndarray) -> float:
    """Share of voxels whose largest logit is of the same class, among those that have one.

    A voxel whose two largest logits are nearer than `TIE` of the logits' range has none: there float32 arithmetic in another
    order chooses, and random networks have many. All that is left must agree but for 1 - `SAME_LABELS`, which takes logits a
    hundred times nearer than `TOLERANCE`.

    Args:
        found: (1, K, X, Y, Z) float32.
        wanted: (1, K, X, Y, Z) float32, the logits that are right.

    Returns:
        0..1; 1 where no voxel has a largest logit.
    """
    if wanted.shape[1] < 2:
        return 1.0
    best = np.partition(wanted, wanted.shape[1] - 2, axis=1)
    clear = best[:, -1] - best[:, -2] > TIE * float(np.ptp(wanted))
    same = found.argmax(axis=1) == wanted.argmax(axis=1)
    return float(same[clear].mean()) if clear.any() else 1.0
