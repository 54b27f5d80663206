"""Training cases in memory: read, checked and preprocessed once, by the preprocessing that deployment uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ptq3d.datasets.cases import Case, read_image, true_classes
from ptq3d.errors import IntensityError, LabelError, OptionError
from ptq3d.training.options import TrainingOptions
from ptq3d.volumes.volume import Volume

CENTRES_PER_CLASS = 20_000  # remembered window centres, evenly spread over the class: 8 bytes each


@dataclass(frozen=True, eq=False)
class TrainingCase:
    """One case on the preprocessed grid, at least a window large.

    Attributes:
        image: (C, X, Y, Z) float32.
        classes: (1, X, Y, Z) uint8, or int32 with more than 256 classes.
        centres: for each class, flat indices into (X, Y, Z) of voxels that windows are cut around.
    """

    image: Tensor
    classes: Tensor
    centres: list[Tensor]


def read_cases(options: TrainingOptions) -> list[TrainingCase]:
    """Every case, ready to cut windows from.

    Raises:
        FileError, GeometryError, IntensityError, LabelError: a case cannot be used; the message names its file.
    """
    return [read_case(case, options) for case in options.cases]


def read_case(case: Case, options: TrainingOptions) -> TrainingCase:
    """One case, read, checked and preprocessed.

    Raises:
        FileError, GeometryError, IntensityError, LabelError: the case cannot be used; the message names its file.
    """
    image = read_image(case)
    classes = true_classes(case, image.grid, options.label_map)
    if classes is None:
        raise LabelError(f"{case.where}: has no label map.")
    try:
        ready = options.preprocessing.apply(image)
    except IntensityError as error:
        raise IntensityError(f"{case.where}: {error}") from error
    target = options.preprocessing.apply_labels(Volume(classes[None], image.affine), ready.grid).data
    padded = _pad(torch.from_numpy(target if target.dtype == np.uint8 else target.astype(np.int32)), options.window, 0)
    return TrainingCase(
        _pad(torch.from_numpy(ready.data), options.window, options.preprocessing.outside),
        padded,
        _centres(padded, len(options.label_map.names)),
    )


def _pad(volume: Tensor, window: tuple[int, int, int], value: float) -> Tensor:
    """At least a window large, the padding half on either side, as deployment pads small volumes."""
    sides: list[int] = []
    for size, side in zip(reversed(volume.shape[1:]), reversed(window), strict=True):
        lack = max(0, side - size)
        sides += [lack // 2, lack - lack // 2]
    return nn.functional.pad(volume, sides, value=value).contiguous()


def _centres(classes: Tensor, count: int) -> list[Tensor]:
    flat = classes.flatten()
    found = [torch.nonzero(flat == index)[:, 0] for index in range(count)]
    return [indices[:: -(-len(indices) // CENTRES_PER_CLASS)] if len(indices) else indices for indices in found]


def split_cases(
    cases: Sequence[TrainingCase], options: TrainingOptions
) -> tuple[list[TrainingCase], list[TrainingCase]]:
    """Training and validation cases, drawn by the seed.

    Raises:
        OptionError: validation would leave no case to train on.
        LabelError: no training case has any class but the background.
    """
    count = max(1, round(options.val_fraction * len(cases))) if options.val_fraction > 0 else 0
    if count >= len(cases):
        raise OptionError(
            f"val_fraction {options.val_fraction} of {len(cases)} case(s) leaves none to train on. "
            "Give more cases, or val_fraction 0."
        )
    order = np.random.default_rng(options.seed).permutation(len(cases))
    validation, training = ([cases[index] for index in sorted(part)] for part in (order[:count], order[count:]))
    if not any(len(centres) for case in training for centres in case.centres[1:]):
        raise LabelError(
            f"no training case has a voxel of any class but {options.label_map.names[0]}. "
            "Check which values stand for which class (`--label-map`)."
        )
    return training, validation
