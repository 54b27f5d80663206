"""nnU-Net's networks for inference: the plain convolutional U-Net and the one with a residual encoder, of any plan.

Weights have the names of dynamic-network-architectures, each once (`without_repeats`), so that nnU-Net's checkpoints load.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ptq3d.errors import OptionError

Sizes: TypeAlias = tuple[int, int, int]
ONE: Sizes = (1, 1, 1)
SLOPE = 0.01  # of LeakyReLU below 0
INSTANCE_NORM = partial(nn.InstanceNorm3d, eps=1e-5, affine=True)
LEAKY_RELU = partial(nn.LeakyReLU, SLOPE, inplace=True)
REPEATED = ("decoder.encoder.", ".all_modules.")


@dataclass(frozen=True)
class Layout:
    """All that a plan says of a network.

    Attributes:
        in_channels: channels of the image.
        num_classes: outputs of the last layer.
        features: per stage, finest first.
        kernels: (X, Y, Z) per stage.
        strides: (X, Y, Z) per stage; the first is (1, 1, 1).
        encoder: convolutions, or residual blocks, of each stage.
        decoder: convolutions of each stage, coarsest first, one stage fewer than the encoder.
        residual: the encoder has a stem and residual blocks.
        conv_bias: convolutions have a bias; those of a block's shortcut have none.
        norm: channels -> normalisation.
        activation: -> activation.
        activation_first: in front of the normalisation.

    Raises:
        OptionError: the stages do not fit together.
    """

    in_channels: int
    num_classes: int
    features: tuple[int, ...]
    kernels: tuple[Sizes, ...]
    strides: tuple[Sizes, ...]
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    residual: bool = False
    conv_bias: bool = True
    norm: Callable[[int], nn.Module] = INSTANCE_NORM
    activation: Callable[[], nn.Module] = LEAKY_RELU
    activation_first: bool = False

    def __post_init__(self) -> None:
        stages = len(self.features)
        lengths = (len(self.kernels), len(self.strides), len(self.encoder), len(self.decoder) + 1)
        if stages < 2 or set(lengths) != {stages} or self.strides[0] != ONE:
            raise OptionError(
                f"a network of {stages} stages needs as many kernels, strides and encoder stages and one decoder stage "
                f"fewer, at least two, the first of stride 1: got {lengths[:3]}, {len(self.decoder)}, {self.strides[0]}."
            )

    @property
    def stride(self) -> Sizes:
        """(X, Y, Z) voxels per step of the coarsest stage; every side of a window is a multiple of it."""
        x, y, z = (math.prod(sides) for sides in zip(*self.strides, strict=True))
        return x, y, z


def standard_layout(in_channels: int, num_classes: int, features: tuple[int, ...]) -> Layout:
    """nnU-Net's default 3d_fullres plan for isotropic images: two 3x3x3 convolutions a stage, each stage half the size."""
    stages = len(features)
    return Layout(
        in_channels,
        num_classes,
        features,
        kernels=((3, 3, 3),) * stages,
        strides=(ONE, *((2, 2, 2),) * (stages - 1)),
        encoder=(2,) * stages,
        decoder=(2,) * (stages - 1),
    )


class Unit(nn.Module):
    """Conv3d, normalisation, activation; (N, before, X, Y, Z) -> (N, after, X / stride, ...).

    Args:
        layout: bias, normalisation and activation.
        channels: before and after.
        kernel: (X, Y, Z), odd.
        stride: (X, Y, Z).
        active: False leaves the activation out.
    """

    def __init__(
        self, layout: Layout, channels: tuple[int, int], *, kernel: Sizes, stride: Sizes = ONE, active: bool = True
    ) -> None:
        super().__init__()
        x, y, z = ((side - 1) // 2 for side in kernel)
        self.conv = nn.Conv3d(*channels, kernel, stride, padding=(x, y, z), bias=layout.conv_bias)
        self.norm = layout.norm(channels[1])
        self.activation = layout.activation() if active else nn.Identity()
        self._swapped = layout.activation_first and active

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        first, second = (self.activation, self.norm) if self._swapped else (self.norm, self.activation)
        result: Tensor = second(first(self.conv(features)))
        return result


class Block(nn.Module):
    """Two units beside a shortcut, which averages over the stride and has a 1x1x1 convolution where channels change.

    Source: He et al. 2019, Bag of Tricks (ResNet-D).
    """

    def __init__(self, layout: Layout, channels: tuple[int, int], *, kernel: Sizes, stride: Sizes = ONE) -> None:
        super().__init__()
        self.conv1 = Unit(layout, channels, kernel=kernel, stride=stride)
        self.conv2 = Unit(layout, (channels[1], channels[1]), kernel=kernel, active=False)
        self.activation = layout.activation()
        shortcut: list[nn.Module] = [] if stride == ONE else [nn.AvgPool3d(stride, stride)]
        if channels[0] != channels[1]:
            shortcut.append(Unit(replace(layout, conv_bias=False), channels, kernel=ONE, active=False))
        self.skip = nn.Sequential(*shortcut)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.activation(self.conv2(self.conv1(features)) + self.skip(features))
        return result


def units(layout: Layout, channels: tuple[int, int], *, number: int, kernel: Sizes, stride: Sizes = ONE) -> nn.Module:
    """`number` units one after the other, named `convs`; the first takes the stride."""
    first = Unit(layout, channels, kernel=kernel, stride=stride)
    others = (Unit(layout, (channels[1], channels[1]), kernel=kernel) for _ in range(number - 1))
    return nn.Sequential(OrderedDict(convs=nn.Sequential(first, *others)))


def blocks(layout: Layout, channels: tuple[int, int], *, number: int, kernel: Sizes, stride: Sizes = ONE) -> nn.Module:
    """`number` residual blocks one after the other, named `blocks`; the first takes the stride."""
    first = Block(layout, channels, kernel=kernel, stride=stride)
    others = (Block(layout, (channels[1], channels[1]), kernel=kernel) for _ in range(number - 1))
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(first, *others)))


class Encoder(nn.Module):
    """(N, C, X, Y, Z) -> the features of every stage, finest first."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.stem: nn.Module = nn.Identity()
        stage, before = _plain_stage, layout.in_channels
        if layout.residual:
            stage, before = blocks, layout.features[0]
            self.stem = units(layout, (layout.in_channels, before), number=1, kernel=layout.kernels[0])
        widths = (before, *layout.features)
        self.stages = nn.ModuleList(
            stage(layout, channels, number=number, kernel=kernel, stride=stride)
            for channels, number, kernel, stride in zip(
                pairwise(widths), layout.encoder, layout.kernels, layout.strides, strict=True
            )
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """See the class."""
        image = self.stem(image)
        features = []
        for stage in self.stages:
            image = stage(image)
            features.append(image)
        return features


def _plain_stage(
    layout: Layout, channels: tuple[int, int], *, number: int, kernel: Sizes, stride: Sizes = ONE
) -> nn.Module:
    return nn.Sequential(units(layout, channels, number=number, kernel=kernel, stride=stride))


class Decoder(nn.Module):
    """The features of every stage -> (N, K, X, Y, Z) logits on the grid of the finest.

    `seg_layers` holds the heads of deep supervision, too, which training needs; only the last one is computed.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        widths, kernels, strides = layout.features[::-1], layout.kernels[-2::-1], layout.strides[:0:-1]
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(below, width, stride, stride, bias=layout.conv_bias)
            for (below, width), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.stages = nn.ModuleList(
            units(layout, (2 * width, width), number=number, kernel=kernel)
            for width, number, kernel in zip(widths[1:], layout.decoder, kernels, strict=True)
        )
        self.seg_layers = nn.ModuleList(nn.Conv3d(width, layout.num_classes, 1) for width in widths[1:])

    def forward(self, features: list[Tensor]) -> Tensor:
        """See the class."""
        *skips, deepest = features
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(skips), strict=True):
            deepest = stage(torch.cat([up(deepest), skip], dim=1))
        logits: Tensor = self.seg_layers[-1](deepest)
        return logits


class NnUNet(nn.Module):
    """PlainConvUNet or ResidualEncoderUNet of dynamic-network-architectures without its deep supervision.

    Source: Isensee et al., nnU-Net, Nature Methods 2021; Isensee et al., nnU-Net Revisited, MICCAI 2024.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.encoder = Encoder(layout)
        self.decoder = Decoder(layout)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, X, Y, Z) float32 -> (N, K, X, Y, Z) float32 logits."""
        logits: Tensor = self.decoder(self.encoder(image))
        return logits


def initialise(network: nn.Module) -> None:
    """He initialisation for LeakyReLU, biases 0, as nnU-Net trains from."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(layer.weight, a=SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: Sizes) -> NnUNet:
    """nnU-Net's default network for the table; fully convolutional, so `window` does not enter its weights."""
    del window
    return NnUNet(standard_layout(in_channels, num_classes, channels))


def without_repeats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of dynamic-network-architectures with each weight once.

    There a unit holds its layers by name (`conv`, `norm`) and again in a list (`all_modules`), and the decoder its encoder.
    """
    return {name: value for name, value in state.items() if not any(part in name for part in REPEATED)}
