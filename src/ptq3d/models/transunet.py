"""The seed's 3D TransUNet: the U-Net's stages with twelve transformer blocks on the coarsest features.

Attention is written out in matrix products and a softmax, so that an exported graph has MatMul and Softmax nodes and
no fused operator that a runtime may not know or may refuse to quantize.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ptq3d.errors import OptionError
from ptq3d.models import require_own_window
from ptq3d.models.unet import Decoder, Encoder, initialise

HEADS = 12
BLOCKS = 12
WIDENING = 3  # 768 = 3 x 256


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v for each head, then one linear layer.

    Source: Vaswani et al. 2017, section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 1 / math.sqrt(width // heads)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def _split(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, W) float32 -> (N, T, W) float32."""
        query, key, value = (self._split(part(tokens)) for part in (self.query, self.key, self.value))
        weights = torch.softmax(torch.matmul(query * self.scale, key.transpose(2, 3)), dim=-1)
        mixed: Tensor = self.out(torch.matmul(weights, value).transpose(1, 2).reshape(tokens.shape))
        return mixed


class Block(nn.Module):
    """Post-norm transformer block: LayerNorm after each residual sum, GELU between the two wide layers."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, W) float32 -> (N, T, W) float32."""
        tokens = self.norm1(tokens + self.attention(tokens))
        normed: Tensor = self.norm2(tokens + self.mlp(tokens))
        return normed


class TransUNet(nn.Module):
    """3D TransUNet: 91,588,622 parameters with 14 classes, 16-32-64-128-256 channels and a 96^3 window.

    The embedding is three times as wide as the coarsest level (768 of 256), the hidden layer twelve times (3072).

    Args:
        in_channels: channels of the image.
        num_classes: classes with the background.
        channels: features per level, finest first; the last a multiple of 4, so that twelve heads share the embedding.
        window: (X, Y, Z) voxels; the learned positions fit this window only.

    Raises:
        OptionError: the last of `channels` is no multiple of 4.

    Source: Chen et al., TransUNet, arXiv 2102.04306; widths of arXiv 2501.17343.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]
    ) -> None:
        super().__init__()
        width = WIDENING * channels[-1]
        if width % HEADS:
            raise OptionError(f"transunet: the last of its channels must be a multiple of 4, got {channels[-1]}.")
        self.window = window
        self.encoder = Encoder(in_channels, channels)
        self.embedding = nn.Conv3d(channels[-1], width, 1)
        tokens = math.prod(side >> (len(channels) - 1) for side in window)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, HEADS, 4 * width) for _ in range(BLOCKS)))
        self.decoder = Decoder(width, channels[:-1])
        self.head = nn.Conv3d(channels[0], num_classes, 1)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, X, Y, Z) float32 -> (N, K, X, Y, Z) float32 logits.

        Raises:
            ShapeError: the image is not of the size of the window.
        """
        require_own_window("transunet", image.shape[2:], self.window)
        *skips, deepest = self.encoder(image)
        embedded = self.embedding(deepest)
        tokens = self.blocks(embedded.flatten(2).transpose(1, 2) + self.positions)
        logits: Tensor = self.head(self.decoder(tokens.transpose(1, 2).reshape(embedded.shape), skips))
        return logits


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> TransUNet:
    """A TransUNet for the table."""
    return TransUNet(in_channels, num_classes, channels, window)
