"""Kernels run on the GPU where there is one, else in Triton's interpreter, which tests/conftest.py asks for."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cpu" if interpreted or not torch.cuda.is_available() else "cuda")
