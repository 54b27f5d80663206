"""Normalize and NormalizeRows against PyTorch's own layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq3d.engines.triton.normalization import prepare_normalize, prepare_normalize_rows
from ptq3d.engines.triton.place import SLOTS
from ptq3d.engines.triton.steps import Epilogue, Normalize, NormalizeRows, View
from triton_memory import ACTIVATIONS, Memory, left, require_close, zeros

arounds = st.sampled_from([(0, 0), (0, 0), (16, 32), (1, 2)])
where = st.fixed_dictionaries({"zero": zeros, "around": arounds})
kinds = st.sampled_from(sorted(ACTIVATIONS))


def exact_sums(q: torch.Tensor) -> torch.Tensor:
    """(N, C, 2) sums of integers and of their squares."""
    wide = q.cpu().long().flatten(2)
    return torch.stack([wide.sum(2), (wide * wide).sum(2)], 2)


def check_normalize(memory: Memory, step: Normalize, *, blocks: dict[str, int] | None = None) -> None:
    x, out, other = step.x, step.out, step.epilogue.other
    sums = exact_sums(memory.view(x))
    slots = (
        torch.randint(-99, 99, (SLOTS, *sums.shape))
        if step.summed
        else torch.zeros(SLOTS, *sums.shape, dtype=torch.int64)
    )
    if step.summed:
        slots[0] += sums - slots.sum(0)
    memory.summed[step.sums] = slots.to(memory.device)
    scale, bias = torch.from_numpy(step.scale), torch.from_numpy(step.bias)
    v = F.group_norm(memory.real(x).double(), step.groups, scale.double(), bias.double(), step.epsilon).float()
    wanted = left(v, step.epilogue, out, None if other is None else memory.real(other))
    rest = memory.rest(out)
    prepare_normalize(step, memory, blocks=blocks or {})()
    assert torch.equal(memory.sums(step.sums).sum(0).cpu(), sums)
    require_close(memory.view(out), wanted, exact=False)
    assert torch.equal(memory.rest(out), rest)


@settings(max_examples=30, deadline=None)
@given(
    st.data(),
    st.sampled_from(
        [(1, 1), (3, 3), (4, 1), (8, 8), (16, 16), (24, 8), (32, 8), (33, 33), (48, 48), (64, 64), (96, 8), (80, 5)]
    ),
    st.sampled_from([(1, 2, 3, 5), (2, 3, 4, 4), (1, 8, 9, 10)]),
)
def test_normalize_is_group_norm(
    device: torch.device, data: st.DataObject, groups: tuple[int, int], grid: tuple[int, ...]
) -> None:
    memory = Memory(device, data.draw(st.integers(0, 2**31)))
    rng = np.random.default_rng(memory.seed)
    channels, shape = groups[0], (grid[0], groups[0], *grid[1:])
    x = memory.image(shape, step=0.0371, **data.draw(where))
    out_type = data.draw(st.sampled_from(["int8", "int8", "fp16"]))
    out = memory.image(shape, out_type, step=0.0293, **data.draw(where))
    adds = data.draw(st.booleans())
    other = memory.image(shape, "int8", step=0.019, **data.draw(where)) if adds else None
    rounds = data.draw(st.sampled_from([None, 0.043])) if out_type == "int8" else None
    epilogue = Epilogue(ACTIVATIONS[data.draw(kinds)], rounds, other, ACTIVATIONS[data.draw(kinds)], data.draw(zeros))
    step = Normalize(
        "norm",
        out,
        x,
        groups[1],
        rng.uniform(0.5, 1.5, channels).astype(np.float32),
        rng.normal(0, 0.5, channels).astype(np.float32),
        1e-5,
        7,
        data.draw(st.booleans()),
        epilogue,
    )
    check_normalize(memory, step)


@pytest.mark.parametrize("groups", [32, 4])
def test_sums_of_many_programs_are_exact(device: torch.device, groups: int) -> None:
    memory = Memory(device)
    shape = (2, 32, 10, 12, 12)
    x, out = memory.image(shape, step=0.1, around=(32, 0)), memory.image(shape, step=0.02)
    memory.view(x)[:, :5] = torch.tensor([-128, 127, 0, 1, -1], dtype=torch.int8).reshape(1, 5, 1, 1, 1)
    step = Normalize("norm", out, x, groups, np.ones(32, np.float32), np.zeros(32, np.float32), 1e-5, 0, False)
    for blocks in ({}, {"programs": 7, "block_rows": 64, "num_warps": 8}):
        check_normalize(memory, step, blocks=blocks)


def test_a_constant_channel_becomes_its_bias(device: torch.device) -> None:
    memory = Memory(device)
    shape = (1, 2, 7, 7, 9)
    x, out = memory.image(shape, step=0.5), memory.image(shape, step=0.01)
    memory.view(x)[:] = torch.tensor([101, -77], dtype=torch.int8).reshape(1, 2, 1, 1, 1)
    bias = np.asarray([0.5, -0.25], np.float32)
    memory.summed[0] = torch.zeros(SLOTS, 1, 2, 2, dtype=torch.int64, device=device)
    prepare_normalize(Normalize("norm", out, x, 2, np.ones(2, np.float32), bias, 1e-5, 0, False), memory)()
    for channel, wanted in enumerate((50, -25)):
        assert (memory.view(out)[:, channel].int() - wanted).abs().max() <= 1


@settings(max_examples=25, deadline=None)
@given(
    st.data(),
    st.sampled_from([1, 3, 16, 48, 64, 96, 100, 192, 384]),
    st.sampled_from([(1, 27), (2, 8), (3, 1)]),
    st.sampled_from(["int8", "fp16"]),
)
def test_normalize_rows_is_layer_norm(
    device: torch.device, data: st.DataObject, channels: int, rows: tuple[int, int], x_type: str
) -> None:
    memory = Memory(device, data.draw(st.integers(0, 2**31)))
    rng = np.random.default_rng(memory.seed)
    shape = (*rows, channels)
    x = memory.image(shape, x_type, step=0.0371, **data.draw(where))
    out = memory.image(shape, data.draw(st.sampled_from(["int8", "fp16"])), step=0.0293, **data.draw(where))
    scale, bias = rng.uniform(0.5, 1.5, channels).astype(np.float32), rng.normal(0, 0.5, channels).astype(np.float32)
    adds = data.draw(st.booleans())
    other = memory.image(shape, "fp16", around=data.draw(arounds)) if adds else None
    epilogue = Epilogue(ACTIVATIONS[data.draw(kinds)], other=other)
    step = NormalizeRows("norm", out, x, scale, bias, 1e-5, epilogue)
    v = F.layer_norm(memory.real(x), (channels,), torch.from_numpy(scale), torch.from_numpy(bias), 1e-5)
    wanted = left(v, epilogue, out, None if other is None else memory.real(other))
    rest = memory.rest(out)
    prepare_normalize_rows(step, memory)()
    require_close(memory.view(out), wanted, exact=False)
    assert torch.equal(memory.rest(out), rest)


def test_layer_norm_over_the_channels_of_an_image(device: torch.device) -> None:
    memory = Memory(device)
    x, out = memory.image((2, 48, 3, 4, 5), step=0.05), memory.image((2, 48, 3, 4, 5), step=0.02)
    step = NormalizeRows("norm", out, x, np.ones(48, np.float32), np.zeros(48, np.float32), 1e-5)
    v = F.layer_norm(memory.real(x).movedim(1, -1), (48,)).movedim(-1, 1)
    prepare_normalize_rows(step, memory)()
    require_close(memory.view(out), left(v, Epilogue(), out, None), exact=False)


def test_the_output_may_lie_where_the_input_lies(device: torch.device) -> None:
    memory = Memory(device)
    x = memory.image((1, 16, 8, 8, 8), step=0.05)
    out = View(x.buffer, x.offset, x.shape, x.strides, "int8", 0.02)
    v = F.instance_norm(memory.real(x))
    memory.summed[0] = torch.zeros(SLOTS, 1, 16, 2, dtype=torch.int64, device=device)
    prepare_normalize(
        Normalize("norm", out, x, 16, np.ones(16, np.float32), np.zeros(16, np.float32), 1e-5, 0, False), memory
    )()
    require_close(memory.view(out), left(v, Epilogue(), out, None), exact=False)
