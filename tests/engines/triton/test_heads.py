"""Attention in one kernel equals PyTorch's on what FP16 holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq3d.engines.triton.heads import prepare_attend
from ptq3d.engines.triton.steps import Attend, View
from triton_memory import Memory

MASKS = {"none": None, "whole": (0, 1, 2, 3), "for heads": (1, 2, 3), "for samples": (0, 2, 3), "for keys": (3,)}


def packed(memory: Memory, shape: tuple[int, ...], place: int, buffer: int) -> View:
    """Query, key or value of a Linear that makes all three: (B, tokens, 3, heads, C)."""
    _, h, t, c = shape
    return View(buffer, place * h * c, shape, (t * 3 * h * c, c, 3 * h * c, 1), "fp16")


def expected(step: Attend, memory: Memory) -> torch.Tensor:
    q, k, v = (memory.view(view).cpu().double() for view in (step.query, step.key, step.value))
    scores = q @ k.transpose(-1, -2) * step.scale
    if step.mask is not None:
        scores = scores + torch.from_numpy(step.mask).half().double()
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(2, 3, 37, 16), (1, 2, 130, 24), (3, 1, 64, 64), (1, 1, 5, 7)])
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_attention(device: torch.device, shape: tuple[int, ...], mask: str, dtype: str) -> None:
    memory = Memory(device)
    b, h, t, c = shape
    buffer = memory.filled(b * t * 3 * h * c, "fp16")
    query, key, value = (packed(memory, shape, place, buffer) for place in range(3))
    order = (t * h * c, c, h * c, 1)
    step_size = float(np.float32(0.03))
    out = View(memory.filled(b * t * h * c, dtype), 0, shape, order, dtype, step_size if dtype == "int8" else 1.0)  # type: ignore[arg-type]
    values = None
    if MASKS[mask] is not None:
        axes = MASKS[mask] or ()
        sizes = tuple(size if axis in axes else 1 for axis, size in enumerate((b, h, t, t)))
        values = np.random.default_rng(0).normal(size=sizes).astype(np.float32)
        values[..., : t // 3] = -np.inf  # the first keys count nowhere
        values[..., -1] = -1e5  # minus infinity in FP16
    step = Attend("attend", out, query, key, value, 0.2, values)
    prepare_attend(step, memory, blocks={"queries": 16, "keys": 32} if t < 64 else {})()
    wanted, found = expected(step, memory), memory.view(out).cpu().double()
    if dtype == "fp16":
        assert torch.allclose(found, wanted, rtol=2e-3, atol=2e-3)
    else:
        levels = (wanted / step_size).round().clamp(-128, 127)
        assert (found - levels).abs().max() <= 1
        assert (found == levels).double().mean() > 0.97
