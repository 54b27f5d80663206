"""Pool and Resize against PyTorch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ptq3d.engines.triton.sampling import prepare_pool, prepare_resize
from ptq3d.engines.triton.steps import Epilogue, Pool, Resize, View
from ptq3d.errors import EngineError
from triton_memory import Memory, left, require_close, zeros

arounds = st.sampled_from([(0, 0), (0, 0), (16, 32), (1, 2)])
channel_counts = st.sampled_from([1, 3, 8, 16, 33, 48, 64])
triples = st.tuples(*[st.integers(1, 3)] * 3)


def pooled(x: torch.Tensor, step: Pool) -> torch.Tensor:
    """PyTorch's pooling; uneven pads by padding first."""
    before, behind = step.pads[:3], step.pads[3:]
    order = [pad for axis in (2, 1, 0) for pad in (before[axis], behind[axis])]
    if step.kind == "max":
        return F.max_pool3d(F.pad(x, order, value=-torch.inf), step.kernel, step.strides)
    ones = F.pad(torch.ones_like(x), order, value=1.0 if step.include_pads else 0.0)
    return F.avg_pool3d(F.pad(x, order), step.kernel, step.strides) / F.avg_pool3d(ones, step.kernel, step.strides)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(["max", "average"]), channel_counts, triples, triples, st.integers(1, 2))
def test_pool(
    device: torch.device,
    data: st.DataObject,
    kind: str,
    channels: int,
    kernel: tuple[int, int, int],
    strides: tuple[int, int, int],
    samples: int,
) -> None:
    memory = Memory(device, data.draw(st.integers(0, 2**31)))
    size = data.draw(st.tuples(*[st.integers(3, 7)] * 3))
    pads = tuple(data.draw(st.integers(0, length // 2)) for length in (*kernel, *kernel))
    x = memory.image(
        (samples, channels, *size),
        data.draw(st.sampled_from(["int8", "fp16"])),
        step=0.031,
        zero=data.draw(zeros),
        around=data.draw(arounds),
    )
    out_size = [
        (n + p + q - k) // s + 1 for n, p, q, k, s in zip(size, pads[:3], pads[3:], kernel, strides, strict=True)
    ]
    out_type = x.dtype if kind == "max" else data.draw(st.sampled_from(["int8", "fp16"]))
    scale = {"step": 0.031, "zero": x.zero} if kind == "max" else {"step": 0.017, "zero": data.draw(zeros)}
    out = memory.image((samples, channels, *out_size), out_type, **scale, around=data.draw(arounds))
    step = Pool("pool", out, x, kind, kernel, strides, pads, data.draw(st.booleans()))
    wanted = left(pooled(memory.real(x), step), Epilogue(), out, None)
    rest = memory.rest(out)
    prepare_pool(step, memory)()
    require_close(memory.view(out), wanted, exact=kind == "max")
    assert torch.equal(memory.rest(out), rest)


def test_an_average_over_the_whole_image(device: torch.device) -> None:
    memory = Memory(device)
    x, out = memory.image((2, 48, 6, 5, 4), step=0.031, zero=-128), memory.image((2, 48, 1, 1, 1), step=0.002, zero=99)
    step = Pool("pool", out, x, "average", (6, 5, 4), (1, 1, 1), (0,) * 6)
    prepare_pool(step, memory)()
    require_close(
        memory.view(out), left(memory.real(x).mean((2, 3, 4), keepdim=True), Epilogue(), out, None), exact=False
    )


def test_a_crop_is_pooled_where_it_lies(device: torch.device) -> None:
    memory = Memory(device)
    whole = memory.image((1, 16, 6, 6, 6))
    x = View(whole.buffer, whole.strides[2], (1, 16, 4, 4, 4), whole.strides, "int8")
    out = memory.image((1, 16, 2, 2, 2))
    prepare_pool(Pool("pool", out, x, "max", (2, 2, 2), (2, 2, 2), (0,) * 6), memory)()
    assert torch.equal(memory.view(out).cpu(), F.max_pool3d(memory.real(x), 2).to(torch.int8))


@settings(max_examples=30, deadline=None)
@given(
    st.data(),
    channel_counts,
    st.sampled_from([("nearest", False), ("linear", False), ("linear", True)]),
    st.integers(1, 2),
)
def test_resize(device: torch.device, data: st.DataObject, channels: int, way: tuple[str, bool], samples: int) -> None:
    memory = Memory(device, data.draw(st.integers(0, 2**31)))
    mode, corners = way
    size = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    doubled = tuple(2 * n for n in size)
    out_size = data.draw(st.one_of(st.just(doubled), st.tuples(*[st.integers(1, 9)] * 3)))
    assume(max(out_size) * channels < 400)
    x = memory.image(
        (samples, channels, *size),
        data.draw(st.sampled_from(["int8", "fp16"])),
        step=0.031,
        zero=data.draw(zeros),
        around=data.draw(arounds),
    )
    out = memory.image(
        (samples, channels, *out_size),
        data.draw(st.sampled_from(["int8", "fp16"])),
        step=data.draw(st.sampled_from([0.031, 0.027])),
        zero=data.draw(st.sampled_from([0, x.zero, 31])),
        around=data.draw(arounds),
    )
    torch_way = {"mode": "trilinear", "align_corners": corners} if mode == "linear" else {"mode": "nearest"}
    v = F.interpolate(memory.real(x), out_size, **torch_way)
    wanted, rest = left(v, Epilogue(), out, None), memory.rest(out)
    prepare_resize(Resize("resize", out, x, mode, corners), memory)()
    got = memory.view(out).cpu()
    if mode == "nearest":
        require_close(got, wanted, exact=x.scale == out.scale)
    elif out.dtype == "int8":  # weights of quarters make ties, which the last bit of a float32 decides
        assert (got.int() - wanted.int()).abs().max() <= 1
        assert torch.equal(got[~ties(v / out.step)], wanted[~ties(v / out.step)])
    else:
        require_close(got, wanted, exact=False)
    assert torch.equal(memory.rest(out), rest)


def ties(levels: torch.Tensor) -> torch.Tensor:
    """Where values lie so close to the middle between two integers that rounding may go either way."""
    return ((levels - levels.floor()) - 0.5).abs() < 1e-3


@pytest.mark.parametrize("channels", [1, 16, 48])
def test_doubling_rounds_what_is_exact(device: torch.device, channels: int) -> None:
    memory = Memory(device, channels)
    x, out = (
        memory.image((2, channels, 3, 4, 5), zero=-9),
        memory.image((2, channels, 6, 8, 10), zero=-9, around=(16, 0)),
    )
    exact = F.interpolate(memory.real(x).double(), scale_factor=2, mode="trilinear")  # multiples of 1/64
    rest = memory.rest(out)
    prepare_resize(Resize("resize", out, x, "linear"), memory)()
    assert torch.equal(memory.view(out).cpu(), (torch.round(exact) - 9).to(torch.int8))
    assert torch.equal(memory.rest(out), rest)


def test_what_no_kernel_takes_is_refused(device: torch.device) -> None:
    memory = Memory(device)
    x, out = memory.image((1, 4, 4, 4, 4), step=0.1), memory.image((1, 4, 2, 2, 2), step=0.2)
    with pytest.raises(EngineError, match=r"'pool' takes a maximum of int8 with step 0\.1"):
        prepare_pool(Pool("pool", out, x, "max", (2, 2, 2), (2, 2, 2), (0,) * 6), memory)
    first = View(x.buffer, 0, (1, 4, 4, 4, 4), (256, 64, 16, 4, 1), "int8")
    with pytest.raises(EngineError, match="channels side by side"):
        prepare_resize(Resize("resize", out, first, "nearest"), memory)
