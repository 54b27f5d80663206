"""MONAI's SwinUNETR: shifted-window attention on four levels, residual convolutions on six.

Its masks of shifted windows and its position biases depend on the window alone. In an exported graph each is one Gather of a
small table by constant places (`graphs/repeats.py`): written out they would weigh 224 MB at 96^3, as much as the weights.
"""

from __future__ import annotations

from monai.networks.nets import SwinUNETR
from torch import nn

from ptq3d.errors import OptionError
from ptq3d.models import check_channels

MULTIPLE = 12  # of the first level: 3, 6, 12, 24 heads share 1, 2, 4, 8 times its width


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> nn.Module:
    """A SwinUNETR for the table: 62,191,167 parameters with 105 classes and a feature size of 48.

    Args:
        in_channels: channels of the image.
        num_classes: classes with the background.
        channels: features per level: f, f, 2f, 4f, 8f, 16f, with f a multiple of 12.
        window: does not enter the weights; its sides are multiples of 32.

    Raises:
        OptionError: widths that the network cannot have.

    Source: Hatamizadeh et al. 2022, arXiv 2201.01266; `monai.networks.nets.SwinUNETR`.
    """
    del window
    size = channels[0]
    check_channels("swinunetr", channels, (size, *(size << level for level in range(5))))
    if size % MULTIPLE:
        raise OptionError(f"swinunetr: wanted a first level of a multiple of {MULTIPLE} channels, got {size}.")
    network: nn.Module = SwinUNETR(in_channels=in_channels, out_channels=num_classes, feature_size=size)
    return network
