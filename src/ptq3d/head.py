"""The head of a network: the last linear map over channels, which with argmax gives the class of a voxel. Arrays only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FILE = "head.npz"
ROWS = 4096  # voxels at a time: their logits stay near the cache
ON_DEVICE = 1 << 26  # logits at a time on a GPU, 256 MB
Classifier: TypeAlias = Callable[[Tensor], Tensor]
"""Features of voxels (V, F) float32 -> their classes (V,) uint8, int32 above 256 classes; of equal logits the first."""


@dataclass(frozen=True, eq=False)
class Head:
    """logits = weight @ features + bias, for each voxel.

    Args:
        weight: (K, F) float32; None where the features are the logits.
        bias: (K,) float32.
    """

    weight: NDArray[np.float32] | None
    bias: NDArray[np.float32]

    @classmethod
    def none(cls, classes: int) -> Head:
        """The head of an engine that gives logits."""
        return cls(None, np.zeros(classes, np.float32))

    @property
    def classes(self) -> int:
        """K."""
        return len(self.bias)

    @property
    def features(self) -> int:
        """F."""
        return self.classes if self.weight is None else self.weight.shape[1]

    def matrix(self) -> NDArray[np.float32]:
        """(K, F) float32, the identity for an engine that gives logits."""
        return np.eye(self.classes, dtype=np.float32) if self.weight is None else self.weight


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
        for part in torch.split(rows, max(ON_DEVICE // head.classes, ROWS)):
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
