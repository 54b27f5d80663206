"""The seed's 3D U-Net: plain convolutions, BatchNorm and ReLU, which quantize well and fold into one another."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def double_convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Twice Conv3d k3 (no bias) + BatchNorm + ReLU; the first convolution takes `stride`."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm3d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


class Encoder(nn.Module):
    """(N, C, X, Y, Z) -> one feature map per level, finest first, each half the size of the one before it."""

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (in_channels, *channels)
        self.levels = nn.ModuleList(
            double_convolution(before, after, stride=2 if level else 1)
            for level, (before, after) in enumerate(pairwise(widths))
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of every level, for the decoder's skips."""
        features = []
        for level in self.levels:
            image = level(image)
            features.append(image)
        return features


class Decoder(nn.Module):
    """From the coarsest features back to the grid of the image, each level joined with its skip.

    Args:
        deepest: channels of the coarsest features.
        channels: channels of the levels above them, finest first.
    """

    def __init__(self, deepest: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (deepest, *reversed(channels))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(before, after, 2, stride=2) for before, after in pairwise(widths))
        self.levels = nn.ModuleList(double_convolution(2 * width, width) for width in widths[1:])

    def forward(self, deepest: Tensor, skips: list[Tensor]) -> Tensor:
        """(N, channels[0], X, Y, Z) features on the grid of the finest skip."""
        for up, level, skip in zip(self.ups, self.levels, reversed(skips), strict=True):
            deepest = level(torch.cat([skip, up(deepest)], dim=1))
        return deepest


def initialise(network: nn.Module) -> None:
    """He initialisation of every convolution, for networks whose activations are ReLU.

    With PyTorch's default, of a sixth of this variance, small organs are learnt hundreds of steps later.

    Source: He et al. 2015, arXiv 1502.01852, section 2.2.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


class UNet(nn.Module):
    """3D U-Net: 5,646,606 parameters with one input channel, 14 classes and 16-32-64-128-256 channels.

    Args:
        in_channels: channels of the image.
        num_classes: classes with the background.
        channels: features per level, finest first.

    Source: Cicek et al., 3D U-Net, MICCAI 2016; strides and widths of arXiv 2501.17343 (50.5 GMAC for 96^3).
    """

    def __init__(self, in_channels: int, num_classes: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, channels)
        self.decoder = Decoder(channels[-1], channels[:-1])
        self.head = nn.Conv3d(channels[0], num_classes, 1)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, X, Y, Z) float32 -> (N, K, X, Y, Z) float32 logits."""
        *skips, deepest = self.encoder(image)
        logits: Tensor = self.head(self.decoder(deepest, skips))
        return logits


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> UNet:
    """A U-Net for the table; fully convolutional, so `window` does not enter its weights."""
    del window
    return UNet(in_channels, num_classes, channels)
