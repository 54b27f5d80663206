"""The Triton engine as a whole, in Triton's interpreter or on a GPU, against the reference engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized import of_the_zoo, wanted

from networks import windows
from ptq3d.engines import triton
from ptq3d.engines.base import BuildSettings, EngineOptions


@pytest.mark.parametrize("name", ["unet", "nnunet", "segresnet", "transunet"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_answers_as_the_reference_engine(device: torch.device, tmp_path: Path, name: str, batch: int) -> None:
    path = of_the_zoo(name)
    triton.build(path, tmp_path, BuildSettings(batch=batch))
    x = windows(3, shape=(1, 16, 8, 12))[: 3 if name in ("unet", "nnunet") else 1]
    with triton.open(tmp_path, EngineOptions()) as engine:
        answers = engine(x)
        again = engine(x)
        layers = engine.layers()
    expected = wanted(path, x)
    assert np.array_equal(answers, again)
    if name == "unet":
        assert np.array_equal(answers, expected)
    step = np.abs(expected).max() / 127
    assert np.mean(np.abs(answers - expected) <= 4 * step) >= 0.999
    assert np.mean(answers.argmax(1) == expected.argmax(1)) >= 0.98
    assert {layer.precision for layer in layers} <= {"int8", "fp16"}
