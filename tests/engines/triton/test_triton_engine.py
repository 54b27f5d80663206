"""The Triton engine as a whole, in Triton's interpreter or on a GPU, against the reference engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized import ZOO, of_the_zoo, wanted

from networks import windows
from ptq3d.engines import triton
from ptq3d.engines.base import BuildSettings, EngineOptions


# three windows are a whole batch of two, and a part of one
@pytest.mark.parametrize(
    ("name", "batch", "number"), [("unet", 2, 3), ("nnunet", 1, 2), ("segresnet", 1, 1), ("transunet", 1, 1)]
)
def test_a_network_answers_as_the_reference_engine(
    device: torch.device, tmp_path: Path, name: str, batch: int, number: int
) -> None:
    path = of_the_zoo(name)
    triton.build(path, tmp_path, BuildSettings(batch=batch))
    x = windows(number, shape=(1, *ZOO[name]["window"]))
    with triton.open(tmp_path, EngineOptions()) as engine:
        answers = engine(x)
        again = engine(x[:1])
        layers = engine.layers()
    expected = wanted(path, x)
    assert np.array_equal(answers[:1], again)
    if name == "unet":
        assert np.array_equal(answers, expected)
    step = np.abs(expected).max() / 127
    assert np.mean(np.abs(answers - expected) <= 4 * step) >= 0.999
    assert np.mean(answers.argmax(1) == expected.argmax(1)) >= 0.98
    assert {layer.precision for layer in layers} <= {"int8", "fp16"}
