"""Where ptq3d keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PTQ3D_CACHE, or ptq3d in the user's cache folder."""
    if "PTQ3D_CACHE" in os.environ:
        return Path(os.environ["PTQ3D_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptq3d"
