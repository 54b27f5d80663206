"""A small configuration of every network of the zoo, enough to have each of its parts."""

from __future__ import annotations

from typing import Any

_LEVELS = {"channels": (4, 8, 16), "num_classes": 6, "window": (16, 8, 12)}
_SIX_LEVELS = {"num_classes": 6, "window": (64, 32, 32)}
SMALL: dict[str, dict[str, Any]] = {
    "nnunet": _LEVELS,
    "segresnet": {**_LEVELS, "channels": (8, 16, 32)},
    "stunet_b": _LEVELS,
    "stunet_h": _LEVELS,
    "stunet_l": _LEVELS,
    "stunet_s": _LEVELS,
    "swinunetr": {**_SIX_LEVELS, "channels": (12, 12, 24, 48, 96, 192)},
    "transunet": _LEVELS,
    "unest": {**_SIX_LEVELS, "channels": (4, 8, 16, 32, 64, 8)},
    "unet": _LEVELS,
    "vista3d": _LEVELS,
}
NAMES = list(SMALL)
