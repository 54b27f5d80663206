"""STU-Net: the residual U-Net that scales from 14 million to 1.4 billion parameters, under its checkpoints' names."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01


class ResidualBlock(nn.Module):
    """Conv k3 + InstanceNorm + leaky ReLU, conv k3 + InstanceNorm, the input added, leaky ReLU.

    Args:
        before: channels of the input.
        after: channels of the output.
        stride: of the first convolution.
        project: the added input passes a 1x1x1 convolution.
    """

    def __init__(self, before: int, after: int, *, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, stride=stride, padding=1)
        self.norm1 = nn.InstanceNorm3d(after, affine=True)
        self.conv2 = nn.Conv3d(after, after, 3, padding=1)
        self.norm2 = nn.InstanceNorm3d(after, affine=True)
        self.conv3 = nn.Conv3d(before, after, 1, stride=stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, X, Y, Z) -> (N, after, X / stride, ...)."""
        inner = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE)
        inner = self.norm2(self.conv2(inner))
        return F.leaky_relu(inner + (x if self.conv3 is None else self.conv3(x)), SLOPE)


def stage(before: int, after: int, depth: int, stride: int = 1) -> nn.Sequential:
    """`depth` residual blocks; the first one changes channels and resolution."""
    first = ResidualBlock(before, after, stride=stride, project=True)
    return nn.Sequential(first, *(ResidualBlock(after, after) for _ in range(depth - 1)))


class Upsample(nn.Module):
    """1x1x1 convolution, then each voxel eight times.

    The published order is the other one. Both give the same values, and this one multiplies an eighth as often.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, X, Y, Z) -> (N, after, 2X, 2Y, 2Z)."""
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="nearest")


class STUNet(nn.Module):
    """STU-Net for 105 classes: S 14.60, B 58.26, L 440.30, H 1457.33 million parameters.

    All heads for deep supervision are kept, so that public checkpoints load; only the finest one is computed.

    Args:
        in_channels: channels of the image.
        num_classes: classes with the background.
        channels: features per level, finest first.
        depth: residual blocks of each level.

    Source: Huang et al. 2023, arXiv 2304.06716; names of github.com/uni-medical/STU-Net.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: tuple[int, ...], depth: int) -> None:
        super().__init__()
        upward = tuple(pairwise(reversed(channels)))
        self.conv_blocks_context = nn.ModuleList(
            stage(before, after, depth, stride=2 if level else 1)
            for level, (before, after) in enumerate(pairwise((in_channels, *channels)))
        )
        self.upsample_layers = nn.ModuleList(Upsample(before, after) for before, after in upward)
        self.conv_blocks_localization = nn.ModuleList(stage(2 * after, after, depth) for _, after in upward)
        self.seg_outputs = nn.ModuleList(nn.Conv3d(after, num_classes, 1) for _, after in upward)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, X, Y, Z) float32 -> (N, K, X, Y, Z) float32 logits."""
        features = []
        for level in self.conv_blocks_context:
            image = level(image)
            features.append(image)
        x = features.pop()
        for up, level in zip(self.upsample_layers, self.conv_blocks_localization, strict=True):
            x = level(torch.cat([up(x), features.pop()], dim=1))
        logits: Tensor = self.seg_outputs[-1](x)
        return logits


def _initialise(layer: nn.Module) -> None:
    """He initialisation for leaky ReLU, no bias, as nnU-Net does it."""
    if isinstance(layer, nn.Conv3d):
        nn.init.kaiming_normal_(layer.weight, a=SLOPE)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> STUNet:
    """STU-Net S or B for the table: one block a level."""
    del window
    return STUNet(in_channels, num_classes, channels, 1)


def build_large(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> STUNet:
    """STU-Net L for the table: two blocks a level."""
    del window
    return STUNet(in_channels, num_classes, channels, 2)


def build_huge(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> STUNet:
    """STU-Net H for the table: three blocks a level."""
    del window
    return STUNet(in_channels, num_classes, channels, 3)
