"""Pointwise, Enter and Move against plain torch formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.engines.triton.pointwise import prepare_enter, prepare_move, prepare_pointwise
from ptq3d.engines.triton.steps import Activation, Enter, Epilogue, Move, Pointwise, View
from ptq3d.errors import EngineError
from triton_memory import ACTIVATIONS, EXACT, Memory, left, levels, require_close, zeros

Around = tuple[int, int]
arounds = st.sampled_from([(0, 0), (0, 0), (16, 32), (1, 2)])
dtypes = st.sampled_from(["int8", "fp16"])


def test_the_interpreter_or_a_gpu_runs_the_kernels(device: torch.device) -> None:
    import triton

    assert device.type == "cuda" or triton.knobs.runtime.interpret


def check_pointwise(memory: Memory, step: Pointwise, *, exact: bool) -> None:
    x, out, other = step.x, step.out, step.epilogue.other
    v = memory.real(x)
    for factors, multiplies in ((step.factor, True), (step.offset, False)):
        if factors is not None:
            there = torch.from_numpy(factors)
            if there.ndim == 1 and len(there) > 1:
                there = there.reshape([-1 if axis == x.channel_axis else 1 for axis in range(len(x.shape))])
            elif there.ndim == 2:  # (rows of a sample, C)
                there = there.reshape(*x.shape[2:], -1).movedim(-1, 0) if len(x.shape) == 5 else there
            v = v * there if multiplies else v + there
    wanted = left(v, step.epilogue, out, None if other is None else memory.real(other))
    rest, before = memory.rest(out), memory.view(x).clone()
    run = prepare_pointwise(step, memory)
    run()
    require_close(memory.view(out), wanted, exact=exact)
    assert torch.equal(memory.rest(out), rest)
    assert torch.equal(memory.view(x), before)
    first = memory.view(out).clone()
    run()
    assert torch.equal(memory.view(out), first)


@settings(max_examples=30, deadline=None)
@given(
    st.data(),
    st.sampled_from([1, 3, 4, 8, 16, 24, 32, 33, 48, 64, 96, 130]),
    st.sampled_from([(1, 2, 3, 5), (2, 3, 4, 4), (2, 1, 1, 1), (1, 4, 4, 8)]),
)
def test_pointwise_is_multiply_add_and_epilogue(
    device: torch.device, data: st.DataObject, channels: int, grid: tuple[int, ...]
) -> None:
    memory = Memory(device, data.draw(st.integers(0, 2**31)))
    rng = np.random.default_rng(memory.seed)
    shape = (grid[0], channels, *grid[1:])
    where = st.fixed_dictionaries({"zero": zeros, "around": arounds})
    x = memory.image(shape, data.draw(dtypes), step=0.0371, **data.draw(where))
    out_type = data.draw(st.sampled_from(["int8", "int8", "fp16", "fp32"]))
    out = memory.image(shape, out_type, step=0.0293, **data.draw(where))
    adds = data.draw(st.booleans())
    other = memory.image(shape, data.draw(dtypes), step=0.019, **data.draw(where)) if adds else None
    sizes = {"none": None, "one": (1,), "channels": (channels,), "rows": (int(np.prod(grid[1:])), channels)}
    factor = sizes[data.draw(st.sampled_from(["none", "one", "channels"]))]
    offset = sizes[data.draw(st.sampled_from(["none", "one", "channels", "rows"]))]
    kinds = sorted(EXACT)
    epilogue = Epilogue(
        ACTIVATIONS[data.draw(st.sampled_from(kinds))],
        data.draw(st.sampled_from([None, float(np.float32(0.043))])),
        other,
        ACTIVATIONS[data.draw(st.sampled_from(kinds))],
        data.draw(zeros),
    )
    step = Pointwise(
        "sum",
        out,
        x,
        None if factor is None else rng.uniform(0.5, 1.5, factor).astype(np.float32),
        None if offset is None else rng.normal(0, 0.5, offset).astype(np.float32),
        epilogue,
    )
    check_pointwise(memory, step, exact=True)


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
@pytest.mark.parametrize("x_type", ["int8", "fp16"])
def test_every_activation(device: torch.device, kind: str, x_type: str) -> None:
    memory = Memory(device, len(kind))
    x = memory.image((2, 40, 5, 6, 7), x_type, step=0.031)
    for out_type in ("int8", "fp16"):
        out = memory.image((2, 40, 5, 6, 7), out_type, step=0.021, around=(8, 0))
        step = Pointwise("activation", out, x, epilogue=Epilogue(ACTIVATIONS[kind]))
        check_pointwise(memory, step, exact=kind in EXACT)


def test_tokens_take_a_position_each(device: torch.device) -> None:
    memory = Memory(device)
    x, out = memory.image((2, 27, 48), step=0.02), memory.image((2, 27, 48), step=0.03)
    positions = np.random.default_rng(0).normal(0, 1, (27, 48)).astype(np.float32)
    check_pointwise(memory, Pointwise("position", out, x, offset=positions), exact=True)


@pytest.mark.parametrize(
    "blocks", [{"block_rows": 1}, {"block_rows": 8, "num_warps": 1}, {"block_rows": 256, "num_warps": 8}]
)
def test_blocks_change_no_value(device: torch.device, blocks: dict[str, int]) -> None:
    memory = Memory(device)
    x, out = memory.image((1, 16, 4, 4, 5), step=0.02), memory.image((1, 16, 4, 4, 5), step=0.03)
    step = Pointwise("relu", out, x, epilogue=Epilogue(Activation("relu")))
    wanted = left(memory.real(x), step.epilogue, out, None)
    prepare_pointwise(step, memory, blocks=blocks)()
    require_close(memory.view(out), wanted, exact=True)


def test_what_no_kernel_takes_is_refused(device: torch.device) -> None:
    memory = Memory(device)
    x, out = memory.image((1, 4, 4, 4, 4)), memory.image((1, 4, 4, 4, 4))
    with pytest.raises(EngineError, match=r"'wrong' takes factors of shape \(1,\), \(4,\)"):
        prepare_pointwise(Pointwise("wrong", out, x, np.ones(3, np.float32)), memory)
    crop = View(x.buffer, 0, (1, 4, 2, 2, 2), x.strides, "int8")
    with pytest.raises(EngineError, match="evenly spaced rows"):
        prepare_pointwise(Pointwise("crop", memory.image((1, 4, 2, 2, 2)), crop), memory)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("out_type", "around"), [("int8", (0, 0)), ("int8", (3, 12)), ("fp16", (0, 0))])
def test_enter_turns_channels_last_and_rounds(
    device: torch.device, channels: int, out_type: str, around: Around
) -> None:
    memory = Memory(device, channels)
    shape = (2, channels, 7, 9, 11)
    strides = (channels * 693, 693, 99, 11, 1)
    x = View(memory.filled(2 * channels * 693, "fp32"), 0, shape, strides, "fp32")
    out = memory.image(shape, out_type, step=0.0313, zero=19 * channels, around=around)
    wanted = left(memory.real(x), Epilogue(), out, None)
    rest = memory.rest(out)
    prepare_enter(Enter("image", out, x), memory)()
    assert torch.equal(memory.view(out).cpu(), wanted)
    assert torch.equal(memory.rest(out), rest)


@pytest.mark.parametrize("zero", [0, -128, 53])
def test_enter_rounds_ties_to_even_and_saturates(device: torch.device, zero: int) -> None:
    memory = Memory(device)
    values = torch.cat([torch.arange(-600, 600) / 4, torch.tensor([torch.inf, -torch.inf, 3e38, -3e38])])
    x = View(
        memory.filled(len(values), "fp32"), 0, (1, 1, len(values), 1, 1), (len(values), len(values), 1, 1, 1), "fp32"
    )
    memory.view(x).copy_(values.reshape(x.shape))
    out = memory.image(x.shape, step=0.5, zero=zero)
    with np.errstate(over="ignore"):
        prepare_enter(Enter("image", out, x), memory)()
    assert torch.equal(memory.view(out).cpu().flatten(), levels(values, 0.5, zero).to(torch.int8))


@settings(max_examples=25, deadline=None)
@given(st.floats(2.0**-20, 8.0, width=32), st.integers(-6, 6), zeros)
def test_enter_rounds_the_quotient_as_division_makes_it(
    device: torch.device, step: float, ulps: int, zero: int
) -> None:
    memory = Memory(device)
    middles = ((torch.arange(-130, 130).double() - zero + 0.5) * step).float()
    values = (middles.view(torch.int32) + ulps).view(torch.float32)
    x = View(memory.filled(260, "fp32"), 0, (1, 1, 260, 1, 1), (260, 260, 1, 1, 1), "fp32")
    memory.view(x).copy_(values.reshape(x.shape))
    out = memory.image(x.shape, step=step, zero=zero)
    prepare_enter(Enter("image", out, x), memory)()
    assert torch.equal(memory.view(out).cpu().flatten(), levels(values, step, zero).to(torch.int8))


@settings(max_examples=25, deadline=None)
@given(
    st.data(),
    st.lists(st.sampled_from([1, 2, 3, 4, 16]), min_size=2, max_size=5),
    st.sampled_from(["int8", "fp16", "fp32"]),
)
def test_move_copies_any_strides(device: torch.device, data: st.DataObject, shape: list[int], dtype: str) -> None:
    memory = Memory(device, data.draw(st.integers(0, 2**31)))
    x, out = (_anywhere(memory, data, tuple(shape), dtype) for _ in range(2))
    wanted, rest = memory.view(x).clone(), memory.rest(out)
    prepare_move(Move("turn", out, x), memory)()
    assert torch.equal(memory.view(out), wanted)
    assert torch.equal(memory.rest(out), rest)


def _anywhere(memory: Memory, data: st.DataObject, shape: tuple[int, ...], dtype: str) -> View:
    """A view whose axes lie in any order in a larger buffer."""
    order = data.draw(st.permutations(range(len(shape))))
    lengths = [shape[axis] + data.draw(st.sampled_from([0, 0, 1, 16])) for axis in order]
    strides = [0] * len(shape)
    for place, axis in enumerate(order):
        strides[axis] = int(np.prod(lengths[place + 1 :], dtype=int))
    offset = data.draw(st.sampled_from([0, 1, 16]))
    buffer = memory.filled(int(np.prod(lengths)) + offset, dtype)
    return View(buffer, offset, shape, tuple(strides), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "zero"), [(16, 0), (33, -128)])
def test_move_fills_the_rest_with_zeros(device: torch.device, channels: int, zero: int) -> None:
    memory = Memory(device)
    whole = memory.image((1, channels, 6, 6, 6), zero=zero)
    strides = whole.strides
    part = replace(whole, offset=strides[2] + strides[3] + strides[4], shape=(1, channels, 4, 4, 4))
    x = memory.image(part.shape)
    prepare_move(Move("pad", part, x, zeros=whole), memory)()
    assert torch.equal(memory.view(part), memory.view(x))
    memory.view(part).fill_(zero)
    assert (memory.view(whole) == zero).all()
