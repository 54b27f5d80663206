"""Small data sets on disk: empty files where only names count, tiny volumes where voxels do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import nibabel
import numpy as np

from ptq3d.datasets.dataset import Dataset


def touch(root: Path, *names: str) -> Path:
    """Empty files, their folders made."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def volume(path: Path, voxels: np.ndarray) -> Path:
    """A NIfTI file of these voxels at 1 mm; fewer than three axes are laid along the first ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels.reshape(voxels.shape + (1,) * (3 - voxels.ndim)), np.eye(4)), path)
    return path


def dumped(path: Path, content: object) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def told(found: Dataset) -> list[tuple[str, str, str, str]]:
    """(name, split, image, labels) of each case, paths relative to the root."""

    def short(paths: Iterable[object]) -> str:
        return " ".join(str(Path(str(path)).relative_to(found.root)) for path in paths)

    return [(case.name, case.split, short(case.images), short(case.label_files)) for case in found.cases]


def left_out(found: Dataset) -> dict[str, str]:
    """Name of what was ignored -> reason."""
    return {item.path.name: item.reason for item in found.ignored}
