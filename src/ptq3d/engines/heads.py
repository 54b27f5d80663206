"""The head beside an engine: kept with its artefact, and turned with argmax into the class of each voxel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ptq3d.engines.base import LayerReport
from ptq3d.graphs.split_head import Head

FILE = "head.npz"
ROWS = 4096  # voxels at a time: their logits stay near the cache
Classifier: TypeAlias = Callable[[Tensor], Tensor]
"""Features of voxels (V, F) float32 -> their classes (V,) uint8, int32 above 256 classes; of equal logits the first."""


def save_head(folder: Path, head: Head) -> Path:
    """Write a head that was taken off a graph beside the engine of the rest."""
    np.savez(folder / FILE, weight=head.matrix(), bias=head.bias)
    return folder / FILE


def load_head(folder: Path) -> Head | None:
    """The head beside an engine, None where the engine gives logits."""
    path = folder / FILE
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return Head(stored["weight"], stored["bias"])


def head_layer(head: Head, voxels: int) -> tuple[LayerReport, ...]:
    """What a late head multiplies: as in the graph, once a voxel of a window, always in FP32."""
    if head.weight is None:
        return ()
    return (LayerReport("late head", "MatMul", "fp32", head.weight.size * voxels),)


def label_type(classes: int) -> torch.dtype:
    """The type of labels of so many classes."""
    return torch.uint8 if classes <= 256 else torch.int32


def classifier(head: Head, device: torch.device) -> Classifier:
    """Head and argmax in PyTorch; on the CPU in NumPy, whose argmax along rows is the faster one."""
    if device.type == "cpu":
        return _on_cpu(head)
    weight = None if head.weight is None else torch.from_numpy(head.weight).to(device)
    bias, kind = torch.from_numpy(head.bias).to(device), label_type(head.classes)

    def classes_of(rows: Tensor) -> Tensor:
        found = []
        for part in torch.split(rows, ROWS * 16):
            logits = part if weight is None else torch.addmm(bias, part, weight.T)
            found.append(logits.argmax(1).to(kind))
        return torch.cat(found)

    return classes_of


def _on_cpu(head: Head) -> Classifier:
    kind = label_type(head.classes)

    def classes_of(rows: Tensor) -> Tensor:
        values, found = rows.numpy(), torch.empty(len(rows), dtype=kind)
        for start in range(0, len(rows), ROWS):
            part = values[start : start + ROWS]
            logits = part if head.weight is None else part @ head.weight.T + head.bias
            found[start : start + ROWS] = torch.from_numpy(logits.argmax(1)).to(kind)
        return found

    return classes_of
