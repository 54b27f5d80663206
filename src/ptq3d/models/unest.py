"""UNesT: nested transformer blocks that attend within cubes of the image, and a convolutional decoder.

Parameters are named as in the bundle `wholeBrainSeg_Large_UNEST_segmentation` of MONAI's model zoo, so that its weights load.
Attention is written out in matrix products and a softmax.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution, UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

from ptq3d.errors import OptionError
from ptq3d.models import require_own_window

PATCH = 4  # voxels along the side of a token
SPLITS = (4, 2, 1)  # blocks along each side of the grid of tokens, level by level
DEPTHS = (2, 2, 8)
HEAD_WIDTH = 32
WIDENING = 4
EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention within blocks: softmax(q k^T / sqrt(d)) v for each head, then one linear layer.

    The published network lays the heads' answers side by side with the head as the fastest index, and so does this one.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases of query, key and value; slices, which an export folds, where it keeps a split."""
        weight, bias, width = self.qkv.weight, self.qkv.bias, self.qkv.in_features
        return [(weight[at : at + width], bias[at : at + width]) for at in range(0, 3 * width, width)]

    def forward(self, tokens: Tensor) -> Tensor:
        """(B blocks, T tokens, W) float32 -> (B, T, W) float32."""
        blocks, count, width = tokens.shape
        each = width // self.heads
        query, key, value = (  # three products rather than a split of one: each has a range of its own
            F.linear(tokens, weight, bias).reshape(blocks, count, self.heads, each).transpose(1, 2)
            for weight, bias in self._parts()
        )
        scores = torch.matmul(query, key.transpose(2, 3)) * (1 / math.sqrt(each))
        mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
        answer: Tensor = self.proj(mixed.permute(0, 2, 3, 1).reshape(blocks, count, width))
        return answer


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, WIDENING * width)
        self.fc2 = nn.Linear(WIDENING * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., W) float32 -> (..., W) float32."""
        hidden: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return hidden


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, W) float32 -> (B, T, W) float32."""
        tokens = tokens + self.attn(self.norm1(tokens))
        changed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return changed


class ConvPool(nn.Module):
    """From one level to the next: convolution, LayerNorm over channels, maximum of 3x3x3 with stride 2."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(before, after, 3, padding=1)
        self.norm = nn.LayerNorm(after, eps=EPSILON)

    def forward(self, grid: Tensor) -> Tensor:
        """(N, before, X, Y, Z) -> (N, after, X / 2, Y / 2, Z / 2)."""
        return F.max_pool3d(norm_channels(self.norm, self.conv(grid)), 3, stride=2, padding=1)


class NestLevel(nn.Module):
    """One level of the nested transformer: the grid in blocks, learned positions, attention within each block.

    Args:
        before: channels of the level before, None for the first level.
        width: channels of this one, a multiple of 32 or below it.
        level: 0, 1 or 2.
        block: (x, y, z) tokens of a block.
    """

    def __init__(self, before: int | None, width: int, level: int, block: tuple[int, ...]) -> None:
        super().__init__()
        self.split, self.block = SPLITS[level], block
        self.pos_embed = nn.Parameter(torch.zeros(1, self.split**3, math.prod(block), width))
        self.pool = nn.Identity() if before is None else ConvPool(before, width)
        heads = max(1, width // HEAD_WIDTH)
        self.transformer_encoder = nn.Sequential(*(TransformerLayer(width, heads) for _ in range(DEPTHS[level])))

    def forward(self, grid: Tensor) -> Tensor:
        """(N, before, X, Y, Z) -> (N, width, ...), half as large where a level comes before."""
        grid = self.pool(grid).permute(0, 2, 3, 4, 1)
        batch, width, split = grid.shape[0], grid.shape[-1], self.split
        x, y, z = self.block
        cut = grid.reshape(batch, split, x, split, y, split, z, width).permute(0, 1, 3, 5, 2, 4, 6, 7)
        placed = cut.reshape(batch, *self.pos_embed.shape[1:]) + self.pos_embed
        tokens = self.transformer_encoder(placed.flatten(0, 1))
        blocks = tokens.reshape(batch, split, split, split, x, y, z, width).permute(0, 1, 4, 2, 5, 3, 6, 7)
        whole: Tensor = blocks.reshape(grid.shape).permute(0, 4, 1, 2, 3)
        return whole


class NestTransformer(nn.Module):
    """Patch embedding, three levels, a last LayerNorm."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], window: tuple[int, int, int]) -> None:
        super().__init__()
        block = tuple(side // (PATCH * SPLITS[0]) for side in window)
        befores = (None, *widths[:-1])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(in_channels, widths[0], PATCH, stride=PATCH)})
        self.levels = nn.ModuleList(
            NestLevel(before, width, level, block)
            for level, (before, width) in enumerate(zip(befores, widths, strict=True))
        )
        self.norm = nn.LayerNorm(widths[-1], eps=EPSILON)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The normed last features, and the embedding with the features of all levels."""
        grid = self.patch_embed["proj"](image)
        features = [grid]
        for level in self.levels:
            grid = level(grid)
            features.append(grid)
        return norm_channels(self.norm, grid), features


class Widen(nn.Module):
    """A transposed convolution k2 s2 and a 1x1x1 one; the latter's weights lie as for a transposed convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.transp_conv_init = nn.ModuleDict({"conv": nn.ConvTranspose3d(before, after, 2, stride=2, bias=False)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv3d(after, after, 1, bias=False)})])

    def forward(self, grid: Tensor) -> Tensor:
        """(N, before, X, Y, Z) -> (N, after, 2X, 2Y, 2Z)."""
        return F.conv3d(self.transp_conv_init["conv"](grid), self.get_parameter("blocks.0.conv.weight").transpose(0, 1))


class UNesT(nn.Module):
    """UNesT large: 87,205,158 parameters with 133 classes, 32-64-128-256-512-1024 channels and a 96^3 window.

    Args:
        in_channels: channels of the image.
        num_classes: classes with the background.
        channels: features per level, finest first, six of them; the transformer works on the third to the fifth, whose widths
            are multiples of 32 (one head each 32 channels) or below 32.
        window: (X, Y, Z) voxels, multiples of 32; the learned positions fit this window only.

    Raises:
        OptionError: not six levels, or a width that heads cannot share.

    Source: Yu et al. 2023, arXiv 2209.14378; Zhang et al., Nested Transformer, arXiv 2105.12723.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]
    ) -> None:
        super().__init__()
        check_widths(channels)
        one, two, three, four, five, six = channels
        self.window = window
        self.nestViT = NestTransformer(in_channels, channels[2:5], window)
        self.encoder1 = UnetrBasicBlock(3, in_channels, one, 3, 1, "instance", res_block=True)
        self.encoder2 = Widen(three, two)
        self.encoder3 = UnetrBasicBlock(3, three, three, 3, 1, "instance", res_block=True)
        self.encoder4 = UnetrBasicBlock(3, four, four, 3, 1, "instance", res_block=True)
        self.decoder5 = UnetrUpBlock(3, six, five, 3, 2, "instance", res_block=True)
        self.decoder4 = UnetrUpBlock(3, five, four, 3, 2, "instance", res_block=True)
        self.decoder3 = UnetrUpBlock(3, four, three, 3, 2, "instance", res_block=True)
        self.decoder2 = UnetrUpBlock(3, three, two, 3, 2, "instance", res_block=True)
        self.decoder1 = UnetrUpBlock(3, two, one, 3, 2, "instance", res_block=True)
        self.encoder10 = Convolution(3, five, six, strides=2, adn_ordering="ADN", dropout=0.0)
        self.out = UnetOutBlock(3, one, num_classes)
        self.nestViT.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, X, Y, Z) float32 -> (N, K, X, Y, Z) float32 logits.

        Raises:
            ShapeError: the image is not of the size of the window.
        """
        require_own_window("unest", image.shape[2:], self.window)
        normed, (embedded, first, second, third) = self.nestViT(image)
        x = self.decoder5(self.encoder10(normed), third)
        x = self.decoder4(x, self.encoder4(second))
        x = self.decoder3(x, self.encoder3(first))
        x = self.decoder2(x, self.encoder2(embedded))
        logits: Tensor = self.out(self.decoder1(x, self.encoder1(image)))
        return logits


def norm_channels(norm: nn.Module, grid: Tensor) -> Tensor:
    """A LayerNorm over the channels of (N, C, X, Y, Z)."""
    normed: Tensor = norm(grid.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
    return normed


def check_widths(channels: tuple[int, ...]) -> None:
    """Refuse channels that are not six, or that heads cannot share.

    Raises:
        OptionError: as said.
    """
    if len(channels) != 6:
        raise OptionError(f"unest has six levels, got channels={channels}. Give six widths.")
    if any(width > HEAD_WIDTH and width % HEAD_WIDTH for width in channels[2:5]):
        raise OptionError(
            f"unest: the third to fifth width must be multiples of {HEAD_WIDTH} or below it, got {channels}."
        )


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    if isinstance(layer, NestLevel):
        nn.init.trunc_normal_(layer.pos_embed, std=0.02)


def build(in_channels: int, num_classes: int, channels: tuple[int, ...], window: tuple[int, int, int]) -> UNesT:
    """A UNesT for the table."""
    return UNesT(in_channels, num_classes, channels, window)
