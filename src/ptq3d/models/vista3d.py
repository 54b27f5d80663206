"""MONAI's VISTA3D, automatic branch: its classes are prompts, fixed when it is built.

A prompt's logit is the product of the features with an embedding of the prompt. With fixed prompts that is a 1x1x1
convolution, and `split_head` takes it for the head it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.networks.nets.segresnet_ds import SegResNetDS2
from monai.networks.nets.vista3d import ClassMappingClassify
from torch import Tensor, nn

from ptq3d.errors import OptionError
from ptq3d.models import check_channels

BLOCKS = (1, 2, 2, 4, 4)
EMBEDDINGS = 512  # of the published weights, which know the prompts 1 to 132


class VISTA3D(nn.Module):
    """VISTA3D's automatic branch: 196,385,184 parameters with 48-96-192-384-768 channels, 786 MB.

    Names are those of MONAI's checkpoint; the branch for clicked points (`point_head`, `image_encoder.up_layers`) is left
    out. arXiv 2501.17343 gives 264.57 MB, a third of the published network: that one cannot be `vista3d132`, and nothing is
    said of how it differs. 28-56-112-224-448 channels come near its size and fit no public weights.

    Args:
        in_channels: channels of the image.
        channels: features per level, each twice the one before it.
        classes: prompts, different and in 1..132, in the order of the logits.

    Source: He et al. 2024, arXiv 2406.05285; `monai.networks.nets.vista3d132`.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], classes: tuple[int, ...]) -> None:
        super().__init__()
        width = channels[0]
        encoder = SegResNetDS2(
            in_channels=in_channels,
            blocks_down=BLOCKS[: len(channels)],
            norm="instance",
            out_channels=width,
            init_filters=width,
            dsdepth=1,
        )
        head = ClassMappingClassify(n_classes=EMBEDDINGS, feature_size=width, use_mlp=True)
        self.image_encoder = nn.ModuleDict({"encoder": encoder.encoder, "up_layers_auto": encoder.up_layers_auto})
        self.class_head = nn.ModuleDict(dict(head.named_children()))
        self.levels, self.mlp = tuple(encoder.up_layers_auto), tuple(head.mlp)  # the same modules, not named twice
        self.register_buffer("prompts", torch.tensor(classes), persistent=False)

    def features(self, image: Tensor) -> Tensor:
        """(N, C, X, Y, Z) float32 -> (N, channels[0], X, Y, Z), what prompts are multiplied with."""
        skips = self.image_encoder["encoder"](image)
        x = skips.pop()
        for level in self.levels:
            x = level["head"](level["blocks"](level["upsample"](x) + skips.pop()))
        features: Tensor = self.class_head["image_post_mapping"](x)
        return features

    def head(self) -> Tensor:
        """(1 + K, channels[0], 1, 1, 1) weights: zeros for the background, then an embedding for each prompt."""
        embedded = self.class_head["class_embeddings"](self.prompts)
        linear, norm, _, out = self.mlp
        hidden = norm(linear(embedded[:, None]))[:, 0]
        rows = out(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)  # a GELU written out, which an export folds
        return torch.cat([torch.zeros_like(rows[:1]), rows])[..., None, None, None]

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, X, Y, Z) float32 -> (N, 1 + K, X, Y, Z) float32 logits, the background's 0 everywhere.

        Their argmax is what MONAI's VistaPostTransform gives: background where no prompt's logit is above 0.
        """
        return F.conv3d(self.features(image), self.head())


def build(
    in_channels: int,
    num_classes: int,
    channels: tuple[int, ...],
    window: tuple[int, int, int],
    *,
    classes: tuple[int, ...],
) -> VISTA3D:
    """VISTA3D for the table.

    Raises:
        OptionError: widths that the network cannot have.
    """
    del window, num_classes
    if len(channels) > len(BLOCKS):
        raise OptionError(f"vista3d: at most {len(BLOCKS)} levels are known, got {channels}.")
    check_channels("vista3d", channels, tuple(channels[0] << level for level in range(len(channels))))
    return VISTA3D(in_channels, channels, classes)
