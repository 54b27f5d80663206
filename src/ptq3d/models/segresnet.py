"""MONAI's SegResNet: residual blocks with GroupNorm, trilinear upsampling, features added at each skip."""

from __future__ import annotations

from monai.networks.nets import SegResNet
from torch import nn

from ptq3d.errors import OptionError
from ptq3d.models import check_channels

BLOCKS = (1, 2, 2, 4, 4)  # residual blocks of each level on the way down; one of each on the way up
GROUPS = 8


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> nn.Module:
    """A SegResNet for the table: 42,290,313 parameters with 105 classes and 48-96-192-384 channels.

    48 filters and the blocks of MONAI's default are what comes to the size of arXiv 2501.17343 (169.2 of 170.44 MB).

    Args:
        in_channels: channels of the image.
        num_classes: classes with the background.
        channels: features per level, each twice the one before it; the first a multiple of 8, for GroupNorm's groups.
        window: does not enter the weights.

    Raises:
        OptionError: widths that the network cannot have.

    Source: Myronenko 2018, arXiv 1810.11654, without the autoencoder; `monai.networks.nets.SegResNet`.
    """
    del window
    first, depth = channels[0], len(channels)
    check_channels("segresnet", channels, tuple(first << level for level in range(depth)))
    if first % GROUPS or depth > len(BLOCKS):
        raise OptionError(
            f"segresnet: wanted a first level of a multiple of {GROUPS} channels and at most {len(BLOCKS)} levels, got {channels}."
        )
    network: nn.Module = SegResNet(
        spatial_dims=3,
        init_filters=first,
        in_channels=in_channels,
        out_channels=num_classes,
        blocks_down=BLOCKS[:depth],
        blocks_up=(1,) * (depth - 1),
    )
    return network
