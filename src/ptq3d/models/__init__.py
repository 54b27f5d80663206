"""The networks of the zoo, by name. Importing this loads no torch: a network's file is imported when it is built.

A new architecture is one file with a builder `(in_channels, num_classes, channels, window) -> Module` and one line in
`ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ptq3d.errors import OptionError, ShapeError, UnavailableError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Architecture:
    """What can be said of a network without building it.

    Attributes:
        builder: "module:function" of the builder, imported on use.
        paper: where the network comes from.
        channels: features per level of the published network, finest first; each level halves the one before it.
        window: (X, Y, Z) voxels the published network is trained and deployed with.
        fixed_window: the weights fit one window only (learned positions).
        levels: names of one weight (C of the level, C before it, ...) a level; a name with {level} or {above} (one less)
            stands for as many levels as there are.
        head: name of the last layer's weight (K, ...), {above} being the levels less two; None where classes are prompts.
        unused: how the names of weights begin that public checkpoints hold and inference does not read.
        prompts: highest class prompt of a network that is told its classes, 0 for all others.
        needs: libraries beside torch, all of the extra `train`.
    """

    builder: str
    paper: str
    channels: tuple[int, ...]
    window: tuple[int, int, int] = (96, 96, 96)
    fixed_window: bool = False
    levels: tuple[str, ...] = ("encoder.levels.{level}.0.weight",)
    head: str | None = "head.weight"
    unused: tuple[str, ...] = ()
    prompts: int = 0
    needs: tuple[str, ...] = ()

    def stride(self, channels: tuple[int, ...] | None = None) -> int:
        """Voxels per step of the coarsest level; every side of a window is a multiple of it."""
        return int(2 ** (len(channels or self.channels) - 1))


def _stunet(function: str, width: int) -> Architecture:
    return Architecture(
        f"ptq3d.models.stunet:{function}",
        "Huang et al., STU-Net, arXiv 2304.06716",
        (width, 2 * width, 4 * width, 8 * width, 16 * width, 16 * width),
        window=(128, 128, 128),
        levels=("conv_blocks_context.{level}.0.conv1.weight",),
        head="seg_outputs.{above}.weight",
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    "nnunet": Architecture(
        "ptq3d.models.nnunet:build",
        "Isensee et al., nnU-Net, Nature Methods 2021; the plain network of its default plan",
        (32, 64, 128, 256, 320, 320),
        levels=("encoder.stages.{level}.0.convs.0.conv.weight",),
        head="decoder.seg_layers.{above}.weight",
    ),
    "segresnet": Architecture(
        "ptq3d.models.segresnet:build",
        "Myronenko, 3D MRI brain tumor segmentation using autoencoder regularization, arXiv 1810.11654; MONAI",
        (48, 96, 192, 384),
        levels=("convInit.conv.weight", "down_layers.{level}.0.conv.weight"),
        head="conv_final.2.conv.weight",
        needs=("monai",),
    ),
    "stunet_b": _stunet("build", 32),
    "stunet_h": _stunet("build_huge", 96),
    "stunet_l": _stunet("build_large", 64),
    "stunet_s": _stunet("build", 16),
    "swinunetr": Architecture(
        "ptq3d.models.swinunetr:build",
        "Hatamizadeh et al., Swin UNETR, arXiv 2201.01266; MONAI",
        (48, 48, 96, 192, 384, 768),
        levels=(
            *(f"encoder{number}.layer.conv1.conv.weight" for number in (1, 2, 3, 4)),
            "decoder5.conv_block.conv1.conv.weight",
            "encoder10.layer.conv1.conv.weight",
        ),
        head="out.conv.conv.weight",
        needs=("monai",),
    ),
    "transunet": Architecture(
        "ptq3d.models.transunet:build",
        "Chen et al., TransUNet, arXiv 2102.04306; 3D layout of arXiv 2501.17343",
        (16, 32, 64, 128, 256),
        fixed_window=True,
    ),
    "unest": Architecture(
        "ptq3d.models.unest:build",
        "Yu et al., UNesT, arXiv 2209.14378; the whole-brain bundle of MONAI's model zoo",
        (32, 64, 128, 256, 512, 1024),
        fixed_window=True,
        levels=(
            "encoder1.layer.conv1.conv.weight",
            "encoder2.blocks.0.conv.weight",
            "encoder3.layer.conv1.conv.weight",
            "encoder4.layer.conv1.conv.weight",
            "decoder5.conv_block.conv1.conv.weight",
            "encoder10.conv.weight",
        ),
        head="out.conv.conv.weight",
        needs=("monai",),
    ),
    "unet": Architecture(
        "ptq3d.models.unet:build",
        "Cicek et al., 3D U-Net, MICCAI 2016; layout of arXiv 2501.17343",
        (16, 32, 64, 128, 256),
    ),
    "vista3d": Architecture(
        "ptq3d.models.vista3d:build",
        "He et al., VISTA3D, arXiv 2406.05285; MONAI",
        (48, 96, 192, 384, 768),
        window=(128, 128, 128),
        levels=(
            "image_encoder.encoder.conv_init.weight",
            "image_encoder.encoder.layers.{above}.downsample.weight",
        ),
        head=None,
        unused=("point_head.", "image_encoder.up_layers."),
        prompts=132,
        needs=("monai",),
    ),
}
ALIASES: Mapping[str, str] = {
    "stunet": "stunet_b",
    "swin_unetr": "swinunetr",
    "trans_unet": "transunet",
    "unet3d": "unet",
}


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
        nearest = "x".join(str(max(1, round(side / stride)) * stride) for side in (*window, *window[-1:] * 3)[:3])
        raise ShapeError(
            f"{name} halves its window {stride.bit_length() - 1} times: every side must be a positive multiple of "
            f"{stride}, the window given is {given}. Choose for example {nearest}."
        )


def check_channels(name: str, channels: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuse widths that a network cannot have, whose first one gives all others.

    Raises:
        OptionError: `channels` are not the wanted ones.
    """
    if channels != wanted:
        raise OptionError(
            f"{name}: from a first level of {wanted[0]} channels follow {wanted}, got {channels}. Give those."
        )


def require_own_window(name: str, image: tuple[int, ...], window: tuple[int, int, int]) -> None:
    """Refuse an image that is not of the size that learned positions fit.

    Args:
        name: of the network, for the message.
        image: (X, Y, Z) given.
        window: (X, Y, Z) the positions were made for.

    Raises:
        ShapeError: they differ.
    """
    if tuple(image) != window:
        given, wanted = ("x".join(map(str, size)) for size in (image, window))
        raise ShapeError(f"this {name} has learned positions for windows of {wanted} voxels, got {given}.")


def build_network(
    name: str,
    *,
    in_channels: int = 1,
    num_classes: int,
    channels: tuple[int, ...] | None = None,
    window: tuple[int, int, int] | None = None,
    classes: tuple[int, ...] | None = None,
) -> torch.nn.Module:
    """A freshly initialised network of the zoo: (N, in_channels, X, Y, Z) float32 -> (N, num_classes, X, Y, Z) logits.

    Args:
        name: a name or alias of the table.
        in_channels: channels of the image, at least 1.
        num_classes: classes with the background, at least 2.
        channels: features per level, finest first, at least two levels; the published ones where None.
        window: (X, Y, Z) voxels; only networks with learned positions depend on it. The published one where None.
        classes: prompts of the foreground classes, for a network that is told its classes; 1, 2, ... where None.

    Raises:
        OptionError: no such network, or sizes or classes it cannot have.
        ShapeError: the window does not fit the number of levels.
        UnavailableError: a library that the network is made of is not installed.
    """
    key, architecture = find_architecture(name)
    widths, size = channels or architecture.channels, window or architecture.window
    if in_channels < 1 or num_classes < 2 or len(widths) < 2 or min(widths) < 1:
        raise OptionError(
            f"{key}: wanted in_channels >= 1, num_classes >= 2 and at least two positive channels, "
            f"got in_channels={in_channels}, num_classes={num_classes}, channels={widths}."
        )
    check_window(key, size, widths)
    told: dict[str, Any] = {}
    if architecture.prompts or classes is not None:
        told["classes"] = _prompts(key, architecture.prompts, num_classes, classes)
    missing = [library for library in architecture.needs if find_spec(library) is None]
    if missing:
        raise UnavailableError(f"{key} needs {', '.join(missing)}: pip install 'ptq3d[train]'")
    module, function = architecture.builder.split(":")
    network: torch.nn.Module = getattr(import_module(module), function)(in_channels, num_classes, widths, size, **told)
    return network


def _prompts(name: str, highest: int, num_classes: int, classes: tuple[int, ...] | None) -> tuple[int, ...]:
    if not highest:
        raise OptionError(f"{name} is not told its classes: they are in its weights. Leave out --classes.")
    prompts = tuple(range(1, num_classes)) if classes is None else classes
    if len(prompts) != num_classes - 1 or len(set(prompts)) != len(prompts):
        raise OptionError(
            f"{name}: {num_classes} classes with the background want {num_classes - 1} different class prompts, got {prompts}."
        )
    if min(prompts) < 1 or max(prompts) > highest:
        raise OptionError(f"{name} knows the class prompts 1 to {highest}, got {min(prompts)} to {max(prompts)}.")
    return prompts


def read_classes(text: str | None) -> tuple[int, ...] | None:
    """Class prompts as they are written on a command line: "1,3,14" -> (1, 3, 14).

    Raises:
        OptionError: something in it is no whole number.
    """
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise OptionError(
            f"classes are whole numbers with commas between them, such as 1,3,14; got '{text}'."
        ) from error
