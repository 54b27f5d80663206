"""The networks of the zoo, by name. Importing this loads no torch: a network's file is imported when it is built.

A new architecture is one file with a builder `(in_channels, num_classes, channels, window) -> Module` and one line in
`ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ptq3d.errors import OptionError, ShapeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Architecture:
    """What can be said of a network without building it.

    Attributes:
        builder: "module:function" of the builder, imported on use.
        paper: where the network comes from.
        channels: features per level of the published network, finest first.
        window: (X, Y, Z) voxels the published network is trained and deployed with.
        fixed_window: the weights fit one window only (learned positions).
    """

    builder: str
    paper: str
    channels: tuple[int, ...]
    window: tuple[int, int, int] = (96, 96, 96)
    fixed_window: bool = False

    def stride(self, channels: tuple[int, ...] | None = None) -> int:
        """Voxels per step of the coarsest level; every side of a window is a multiple of it."""
        return int(2 ** (len(channels or self.channels) - 1))


ARCHITECTURES: Mapping[str, Architecture] = {
    "transunet": Architecture(
        "ptq3d.models.transunet:build",
        "Chen et al., TransUNet, arXiv 2102.04306; 3D layout of arXiv 2501.17343",
        (16, 32, 64, 128, 256),
        fixed_window=True,
    ),
    "unet": Architecture(
        "ptq3d.models.unet:build",
        "Cicek et al., 3D U-Net, MICCAI 2016; layout of arXiv 2501.17343",
        (16, 32, 64, 128, 256),
    ),
}
ALIASES: Mapping[str, str] = {"trans_unet": "transunet", "unet3d": "unet"}


def find_architecture(name: str) -> tuple[str, Architecture]:
    """The table's own name and entry for `name`, which may be an alias; case and "-" for "_" do not matter.

    Raises:
        OptionError: there is no such network; the message lists those there are.
    """
    key = name.lower().replace("-", "_")
    key = ALIASES.get(key, key)
    if key not in ARCHITECTURES:
        names = ", ".join(sorted({*ARCHITECTURES, *ALIASES}))
        raise OptionError(f"no network is called '{name}'. Choose one of: {names}.")
    return key, ARCHITECTURES[key]


def check_window(name: str, window: tuple[int, int, int], channels: tuple[int, ...] | None = None) -> None:
    """Refuse a window that the network cannot halve at each of its levels.

    Args:
        name: a name or alias of the table.
        window: (X, Y, Z) voxels.
        channels: features per level; those of the published network where None.

    Raises:
        ShapeError: a side is no positive multiple of the stride.
        OptionError: there is no such network.
    """
    stride = find_architecture(name)[1].stride(channels)
    if len(window) != 3 or any(side < stride or side % stride for side in window):
        given = "x".join(str(side) for side in window)
        raise ShapeError(
            f"{name} halves its window {stride.bit_length() - 1} times: every side must be a positive multiple of "
            f"{stride}, the window given is {given}. Choose for example {stride * 4}x{stride * 4}x{stride * 4}."
        )


def build_network(
    name: str,
    *,
    in_channels: int = 1,
    num_classes: int,
    channels: tuple[int, ...] | None = None,
    window: tuple[int, int, int] | None = None,
) -> torch.nn.Module:
    """A freshly initialised network of the zoo: (N, in_channels, X, Y, Z) float32 -> (N, num_classes, X, Y, Z) logits.

    Args:
        name: a name or alias of the table.
        in_channels: channels of the image, at least 1.
        num_classes: classes with the background, at least 2.
        channels: features per level, finest first, at least two levels; the published ones where None.
        window: (X, Y, Z) voxels; only networks with learned positions depend on it. The published one where None.

    Raises:
        OptionError: no such network, or sizes it cannot have.
        ShapeError: the window does not fit the number of levels.
    """
    key, architecture = find_architecture(name)
    widths, size = channels or architecture.channels, window or architecture.window
    if in_channels < 1 or num_classes < 2 or len(widths) < 2 or min(widths) < 1:
        raise OptionError(
            f"{key}: wanted in_channels >= 1, num_classes >= 2 and at least two positive channels, "
            f"got in_channels={in_channels}, num_classes={num_classes}, channels={widths}."
        )
    check_window(key, size, widths)
    module, function = architecture.builder.split(":")
    network: torch.nn.Module = getattr(import_module(module), function)(in_channels, num_classes, widths, size)
    return network
