"""MONAI's SwinUNETR: shifted-window attention on four levels, residual convolutions on six.

Blocks, decoder and names are MONAI's. The way through the levels is written here, because MONAI computes the masks of shifted
windows in hundreds of operators that an export has to fold again. They depend on the window alone; in an exported graph each of
them, and each table of position biases, is one Gather of a small constant (`graphs/repeats.py`): written out they would weigh
about as much as the weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import get_window_size
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq3d.errors import OptionError
from ptq3d.models import check_channels

MULTIPLE = 12  # of the first level: 3, 6, 12, 24 heads share 1, 2, 4, 8 times its width
APART = -100.0  # added where two tokens of a shifted window are no neighbours


@lru_cache(maxsize=8)
def shift_masks(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Which tokens of a cyclically shifted window do not see each other.

    Args:
        grid: (X, Y, Z) tokens, padded to whole windows where they are not.
        window: (x, y, z) tokens of a window, T in all.
        shift: tokens that the grid was shifted by along each axis.

    Returns:
        The different masks, (M, T, T) of 0 and -100, M at most 8, and which of them each window has, (windows,).

    Source: Liu et al. 2021, Swin Transformer, section 3.2; `monai.networks.nets.swin_unetr.compute_mask`.
    """
    counts = [-(-size // side) for size, side in zip(grid, window, strict=True)]
    parts = [
        np.searchsorted([count * side - side, count * side - step], np.arange(count * side), side="right")
        for count, side, step in zip(counts, window, shift, strict=True)
    ]
    regions = parts[0][:, None, None] * 9 + parts[1][:, None] * 3 + parts[2]
    cut = regions.reshape(counts[0], window[0], counts[1], window[1], counts[2], window[2]).transpose(0, 2, 4, 1, 3, 5)
    kinds, where = np.unique(cut.reshape(np.prod(counts), -1), axis=0, return_inverse=True)
    apart = kinds[:, None, :] != kinds[:, :, None]
    return np.where(apart, np.float32(APART), np.float32(0)), where.reshape(-1)


class Stage(nn.Module):
    """One level: MONAI's blocks, every second one on shifted windows, then half the resolution.

    Args:
        layer: MONAI's `BasicLayer`, whose blocks this takes over.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.window, self.shift = layer.window_size, layer.shift_size
        self.blocks, self.downsample = layer.blocks, layer.downsample

    def forward(self, grid: Tensor) -> Tensor:
        """(N, C, X, Y, Z) -> (N, 2C, X / 2, Y / 2, Z / 2)."""
        size = tuple(grid.shape[2:])
        masks, where = shift_masks(size, *get_window_size(size, self.window, self.shift))
        mask = torch.from_numpy(masks).to(grid.device)[torch.from_numpy(where).to(grid.device)]
        x = grid.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask)
        halved: Tensor = self.downsample(x).permute(0, 4, 1, 2, 3)
        return halved


class SwinTransformer(nn.Module):
    """Patch embedding and four levels, the features of each with their channels normed.

    Args:
        peer: MONAI's own, whose parts this takes over.
    """

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.patch_embed = peer.patch_embed
        self.layers1 = nn.ModuleList([Stage(peer.layers1[0])])
        self.layers2 = nn.ModuleList([Stage(peer.layers2[0])])
        self.layers3 = nn.ModuleList([Stage(peer.layers3[0])])
        self.layers4 = nn.ModuleList([Stage(peer.layers4[0])])

    def forward(self, image: Tensor, normalize: bool = True) -> list[Tensor]:
        """(N, C, X, Y, Z) -> five feature maps, the finest with half the resolution."""
        features = [self.patch_embed(image)]
        for level in (self.layers1, self.layers2, self.layers3, self.layers4):
            features.append(level[0](features[-1]))
        return [_normed(one) for one in features] if normalize else features


def _normed(grid: Tensor) -> Tensor:
    channels_last = grid.permute(0, 2, 3, 4, 1)
    return F.layer_norm(channels_last, channels_last.shape[-1:]).permute(0, 4, 1, 2, 3)


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> nn.Module:
    """A SwinUNETR for the table: 62,191,755 parameters with 105 classes and a feature size of 48.

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
    network.swinViT = SwinTransformer(network.swinViT)
    return network
