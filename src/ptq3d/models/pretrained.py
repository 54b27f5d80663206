"""A network with its weights, and what its source says about how it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptq3d.volumes.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Pretrained:
    """What every source of weights gives; None where it does not say.

    Attributes:
        network: (1, in_channels, X, Y, Z) float32 -> (1, K, X, Y, Z) float32 logits, in evaluation mode on the CPU; a module
            (a ScriptModule is one) or a program exported for one window.
        name: of the architecture, for file names and the manifest.
        in_channels: channels of the image.
        files: what the weights were read from; their hashes go into the manifest.
        window: (X, Y, Z) voxels.
        labels: names of the K classes, the background first.
        preprocessing: what its images go through.
        overlap: of neighbouring windows, 0..1.
        blending: how windows are placed and weighed, see `Manifest`.
    """

    network: nn.Module | ExportedProgram
    name: str
    in_channels: int
    files: tuple[Path, ...]
    window: tuple[int, int, int] | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    overlap: float | None = None
    blending: str = "gaussian"
