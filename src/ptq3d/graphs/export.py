"""A PyTorch network as an ONNX graph, checked against the network."""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ptq3d.errors import GraphError
from ptq3d.graphs.files import load_graph
from ptq3d.graphs.passes import simplify

if TYPE_CHECKING:
    from torch.nn import Module

OPSET = 20
TOLERANCE = 1e-3


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


def export_network(network: Module, *, channels: int, window: tuple[int, int, int], seed: int = 0) -> Export:
    """A network in evaluation mode as a simplified FP32 ONNX graph of static shape.

    Args:
        network: takes (1, channels, *window) float32 and gives logits (1, K, *window).
        channels: C of the input.
        window: (X, Y, Z) in voxels.
        seed: of the random window that the export is checked with.

    Raises:
        GraphError: PyTorch cannot export it, or it does not fit the window.
    """
    import torch

    network = network.eval()
    example = torch.randn(1, channels, *window, generator=torch.Generator().manual_seed(seed))
    try:
        with torch.inference_mode():
            logits = network(example).numpy()
    except (RuntimeError, ValueError) as error:
        raise GraphError(
            f"the network does not take windows of {window} voxels with {channels} channels: {error}. "
            "Most networks want a window divisible by their total stride (16 or 32)."
        ) from error
    if logits.ndim != 5 or logits.shape[2:] != tuple(window):
        raise GraphError(
            f"the network gives {logits.shape} for windows of {window}; logits (1, K, X, Y, Z) are wanted."
        )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "network.onnx"
        _torch_export(network, example, path)
        return Export(simplify(load_graph(path)), example.numpy(), logits)


def _torch_export(network: Module, example: object, path: Path) -> None:
    import torch

    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own deprecations inside its exporter
            torch.onnx.export(
                network, (example,), str(path), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=["image"], output_names=["logits"], external_data=True,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise GraphError(f"PyTorch cannot export this network to ONNX: {str(error).splitlines()[0]}") from error
    finally:
        noisy.setLevel(level)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """max |found - wanted| / (max wanted - min wanted)."""
    span = float(np.ptp(wanted))
    return float(np.abs(found - wanted).max()) / max(span, 1e-30)
