"""The kernels' quotients are the correctly rounded ones, in the interpreter by division, on a GPU by exact remainders."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.engines.triton.arithmetic import one_remainder

steps = st.floats(2.0**-20, 8.0, width=32)


def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c, rounded once."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(
        float(exact)
    )  # of the two neighbours and itself, the one that is nearest; ties do not come up here
    around = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
    return min(around, key=lambda value: abs(Fraction(float(value)) - exact))


def quotient(v: np.float32, step: np.float32, remainders: int) -> np.float32:
    """What `arithmetic.levels` computes on a GPU."""
    inverse = np.float32(1) / step
    found = v * inverse
    for _ in range(remainders):
        found = fma(fma(-step, found, v), inverse, found)
    return found


@settings(max_examples=25, deadline=None)
@given(steps, st.integers(0, 127), st.booleans())
def test_values_beside_a_half_step_round_as_their_quotient_does(step: float, whole: int, negative: bool) -> None:
    exact = np.float32(step)
    v = np.float32((whole + 0.5) * float(exact)) * np.float32(-1 if negative else 1)
    remainders = 1 if one_remainder(float(exact)) else 2
    for _ in range(3):
        v = np.nextafter(v, np.float32(-np.inf))
    for _ in range(7):
        assert np.rint(quotient(v, exact, remainders)) == np.rint(v / exact)
        v = np.nextafter(v, np.float32(np.inf))


def test_few_steps_need_two_remainders() -> None:
    random = np.random.default_rng(0).uniform(0.001, 1, 300).astype(np.float32)
    assert np.mean([one_remainder(float(step)) for step in random]) > 0.98
    assert one_remainder(0.125)
    assert not one_remainder(float(2.0**-100))


def test_a_gpu_rounds_every_value_as_division_does(device: torch.device) -> None:
    from ptq3d.engines.triton.pointwise import prepare_pointwise
    from ptq3d.engines.triton.steps import Pointwise
    from triton_memory import Memory

    memory = Memory(device, 0)
    for step in (0.0371, 0.0123, 1 / 3):
        shape = (1, 16, 8, 8, 8)
        x, out = memory.image(shape, "fp16"), memory.image(shape, "int8", step=step)
        prepare_pointwise(Pointwise("round", out, x), memory)()
        wanted = torch.round(memory.view(x).cpu().float() / torch.tensor(step)).clamp(-128, 127)
        assert torch.equal(memory.view(out).cpu().float(), wanted)
