"""What all tests share: the folder of real data, and where third parties warn by themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # then Triton's kernels are interpreted, which has to be asked for before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder with real volumes and networks beside the project; the test is skipped where it is missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no folder of real data and weights beside the project (../shared)")
    return SHARED


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines that tests build are cached in a folder of their own."""
    folder = tmp_path_factory.getbasetemp() / "engine-cache"
    monkeypatch.setenv("PTQ3D_CACHE", str(folder))
    return folder
