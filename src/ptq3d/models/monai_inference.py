"""What a MONAI bundle does around its network: windows in front, labels behind. Said as ours, or refused by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptq3d.errors import OptionError
from ptq3d.models.bundle_config import Config
from ptq3d.models.monai_transforms import transforms_in

log = logging.getLogger("ptq3d")
Window = tuple[int, int, int]

LABELLING = ("Activationsd", "AsDiscreted", "Invertd", "SaveImaged", "EnsureTyped", "ToTensord", "ToDeviced",
             "CastToTyped", "CopyItemsd", "DeleteItemsd", "SelectItemsd")  # fmt: skip
WHOLE = (None, "SimpleInferer", "monai.inferers.SimpleInferer")
SLIDING = ("SlidingWindowInferer", "monai.inferers.SlidingWindowInferer")
SIGMA = 0.125  # of `ptq3d.windows`, share of the window's size
MODES = ("gaussian", "constant")
DEFAULTS: Mapping[str, Any] = {
    "roi_size": None,
    "overlap": 0.25,
    "mode": "constant",
    "sigma_scale": SIGMA,
    "padding_mode": "constant",
    "cval": 0.0,
    "with_coord": False,
}
IGNORED = ("_target_", "_desc_", "sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh",
           "buffer_steps", "buffer_dim")  # fmt: skip


@dataclass(frozen=True)
class Sliding:
    """How windows slide over a volume.

    Attributes:
        window: (X, Y, Z) voxels.
        overlap: of neighbouring windows, 0..1; None where the bundle has no sliding windows.
        outside: value around volumes smaller than a window, in preprocessed units.
        blending: "gaussian" or "constant".
    """

    window: Window
    overlap: float | None = None
    outside: float = 0.0
    blending: str = "gaussian"


def sliding_of(config: Config, *, patch: Any, window: Window | None) -> Sliding:
    """What a bundle's inferer says; what ptq3d does otherwise is a warning.

    Args:
        config: with an item `inferer`, or without.
        patch: what the metadata says of the network's window.
        window: (X, Y, Z) voxels, instead of what the bundle says.

    Raises:
        OptionError: another inferer, an argument without a meaning here, or no window.
        CheckpointError: a value that needs code.
    """
    inferer = config.item("inferer")
    arguments: Mapping[str, Any] = inferer if isinstance(inferer, dict) else {"_target_": inferer}
    if arguments.get("_target_") in WHOLE:
        return Sliding(_patch(config, patch, window))
    if arguments["_target_"] not in SLIDING or not isinstance(inferer, dict):
        raise OptionError(
            f"{config.path}: the inferer is '{arguments['_target_']}', ptq3d has sliding windows only. "
            "Write a SlidingWindowInferer there."
        )
    unknown = sorted(set(arguments) - {*DEFAULTS, *IGNORED})
    if unknown:
        raise OptionError(f"{config.path}: ptq3d does not know '{unknown[0]}' of the inferer. Leave it out.")
    values = {key: config.plain(arguments.get(key, default), f"inferer::{key}") for key, default in DEFAULTS.items()}
    return _sliding(config, values, window)


def _sliding(config: Config, values: Mapping[str, Any], window: Window | None) -> Sliding:
    if values["with_coord"]:
        raise OptionError(f"{config.path}: the network takes the place of a window beside it ('with_coord').")
    if not isinstance(values["cval"], int | float):
        raise OptionError(f"{config.path}: 'cval' of the inferer is {values['cval']!r}, a number is wanted.")
    if values["mode"] not in MODES:
        raise OptionError(
            f"{config.path}: 'mode' of the inferer is {values['mode']!r}; MONAI has {' and '.join(MODES)}."
        )
    _warn(config, values)
    size = window or _roi(config, values["roi_size"])
    return Sliding(size, _overlap(config, values["overlap"]), float(values["cval"]), str(values["mode"]))


def _warn(config: Config, values: Mapping[str, Any]) -> None:
    if values["mode"] == "gaussian" and values["sigma_scale"] != SIGMA:
        log.warning(
            "%s: windows are blended by 'sigma_scale' %s there; ptq3d blends by a Gaussian of %s.",
            config.path,
            values["sigma_scale"],
            SIGMA,
        )
    if values["padding_mode"] != "constant":
        log.warning(
            "%s: volumes smaller than a window are padded by 'padding_mode' %s there, and with one value here.",
            config.path,
            values["padding_mode"],
        )


def _patch(config: Config, patch: Any, window: Window | None) -> Window:
    """The window of a network that gets whole volumes in its bundle."""
    if window is None and isinstance(patch, list) and len(patch) == 3 and all(isinstance(side, int) for side in patch):
        window = patch[0], patch[1], patch[2]
    if window is None:
        raise OptionError(f"{config.path}: nothing says the network's window. Give it: --window X Y Z.")
    log.warning("%s: no sliding windows there; ptq3d takes windows of %d x %d x %d.", config.path, *window)
    return window


def _roi(config: Config, roi: Any) -> Window:
    sides = [roi] * 3 if isinstance(roi, int) else roi
    if not isinstance(sides, list) or len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise OptionError(
            f"{config.path}: 'roi_size' of the inferer is {roi!r}, three sizes in voxels are wanted. Give them: --window X Y Z."
        )
    return sides[0], sides[1], sides[2]


def _overlap(config: Config, overlap: Any) -> float:
    shares = overlap if isinstance(overlap, list) and overlap else [overlap]
    share = shares[0]
    if shares != [share] * len(shares) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise OptionError(f"{config.path}: 'overlap' of the inferer is {overlap!r}, one share from 0 to 1 is wanted.")
    return float(share)


def require_argmax(config: Config) -> None:
    """Refuse labels that are no argmax of the logits; say which steps behind them are left out.

    Raises:
        OptionError: classes that overlap, by a sigmoid or a threshold.
        CheckpointError: a value that needs code.
    """
    if "postprocessing" not in config:
        return
    left = []
    for name, where, arguments in transforms_in(config, "postprocessing"):
        for argument, of in (("sigmoid", "Activationsd"), ("threshold", "AsDiscreted")):
            if name == of and config.plain(arguments.get(argument), f"{where}::{argument}") not in (None, False):
                raise OptionError(
                    f"{config.path}: {name} of 'postprocessing' takes '{argument}': classes that overlap. ptq3d gives each voxel the "
                    "one class of the largest logit. Choose a network with a softmax."
                )
        if name not in LABELLING:
            left.append(name)
    if left:
        log.warning("%s: steps behind the labels are left out: %s.", config.path, ", ".join(left))
