"""Convolutions and ConvTransposes equal the reference engine's arithmetic bit for bit, however they are cut into tiles."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptq3d.engines.triton.convolution import prepare_convolve
from ptq3d.engines.triton.packing import packed
from ptq3d.engines.triton.place import SLOTS
from ptq3d.engines.triton.products import Tile, fits, product_of, simple_tile
from ptq3d.engines.triton.steps import Activation, Convolve, Epilogue, Upsample, View
from ptq3d.engines.triton.tiles import worth_trying
from ptq3d.engines.triton.views import lanes

RELU = Activation("relu")
LEAKY = Activation("leaky_relu", 0.01)


class Memory:
    """A `Place` of tensors by buffer number."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.buffers = device, dict[int, Tensor]()

    def add(self, values: Tensor) -> int:
        self.buffers[len(self.buffers)] = values.contiguous().to(self.device)
        return len(self.buffers) - 1

    def view(self, view: View) -> Tensor:
        return torch.as_strided(self.buffers[view.buffer], view.shape, view.strides, view.offset)

    def constant(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def sums(self, buffer: int) -> Tensor:
        return self.buffers[buffer]

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.device)


def image(
    memory: Memory,
    shape: tuple[int, ...],
    step: float,
    *,
    pitch: int = 0,
    at: int = 0,
    fill: int | None = None,
    zero: int = 0,
    spare: int = 0,
) -> View:
    """An int8 image in channels `at`.. of one with `pitch` channels, of which it owns `spare` more."""
    n, c, x, y, z = shape
    pitch = pitch or c
    values = torch.randint(-128, 128, (n, x, y, z, pitch), dtype=torch.int8)
    if fill is not None:
        values.fill_(fill)
    strides = (x * y * z * pitch, 1, y * z * pitch, z * pitch, pitch)
    return View(memory.add(values), at, shape, strides, "int8", step, zero, spare)


def quantized(v: Tensor, step: float, zero: int = 0) -> Tensor:
    return (torch.round(v / torch.tensor(step)) + zero).clamp(-128, 127)


def real(view: View, memory: Memory) -> Tensor:
    return (memory.view(view).cpu().float() - view.zero) * torch.tensor(view.step)


def activated(v: Tensor, activation: Activation) -> Tensor:
    return {"none": lambda v: v, "relu": torch.relu, "leaky_relu": lambda v: F.leaky_relu(v, activation.low)}[
        activation.kind
    ](v)


def expected(step: Convolve | Upsample, memory: Memory) -> Tensor:
    """What the reference engine's operations make of a step, one after another."""
    x = memory.view(step.x).cpu().double() - step.x.zero
    weight = torch.from_numpy(step.weight).double()
    if isinstance(step, Convolve):
        padded = F.pad(x, [step.pads[place] for axis in (2, 1, 0) for place in (axis, axis + 3)])
        total = F.conv3d(padded, weight, None, step.strides, 0, step.dilations)
    else:
        total = F.conv_transpose3d(x, weight, None, step.weight.shape[2:])
    along = (1, -1, 1, 1, 1)
    v = total.float() * torch.from_numpy(step.multiplier).view(along)
    if step.bias is not None:
        v = v + torch.from_numpy(step.bias).view(along)
    v = activated(v, step.epilogue.activation)
    if step.epilogue.rounded is not None:
        levels = quantized(v, step.epilogue.rounded, step.epilogue.rounded_zero) - step.epilogue.rounded_zero
        v = levels * torch.tensor(step.epilogue.rounded)
    if step.epilogue.other is not None:
        v = v + real(step.epilogue.other, memory)
    v = activated(v, step.epilogue.last)
    return quantized(v, step.out.step, step.out.zero).to(torch.int8) if step.out.dtype == "int8" else v


def weights(*shape: int) -> npt.NDArray[np.int8]:
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


def checked(step: Convolve | Upsample, memory: Memory, tile: Tile) -> None:
    wanted = expected(step, memory)
    prepare_convolve(step, memory, tile)()
    assert torch.equal(memory.view(step.out).cpu(), wanted)
    if step.sums is not None:
        integers = wanted.long()
        both = torch.stack([integers.sum((2, 3, 4)), (integers * integers).sum((2, 3, 4))], -1)
        assert torch.equal(memory.sums(step.sums).sum(0).cpu(), both)


def convolution(
    memory: Memory,
    channels: tuple[int, int],
    size: tuple[int, int, int] = (4, 5, 7),
    *,
    kernel: tuple[int, int, int] = (3, 3, 3),
    strides: tuple[int, int, int] = (1, 1, 1),
    dilations: tuple[int, int, int] = (1, 1, 1),
    samples: int = 2,
) -> Convolve:
    c, k = channels
    pads = tuple((size - 1) * dilation // 2 for size, dilation in zip(kernel, dilations, strict=True))
    out = tuple(
        (n + 2 * p - d * (s - 1) - 1) // t + 1
        for n, p, d, s, t in zip(size, pads, dilations, kernel, strides, strict=True)
    )
    generator = np.random.default_rng(1)
    return Convolve(
        "conv",
        image(memory, (samples, k, *out), 0.05, fill=77),
        image(memory, (samples, c, *size), 0.02),
        weights(k, c, *kernel),
        (generator.random(k) * 1e-3).astype(np.float32),
        generator.normal(size=k).astype(np.float32),
        strides,
        dilations,
        (*pads, *pads),
        epilogue=Epilogue(RELU),
        sums=memory.add(torch.zeros(SLOTS, samples, k, 2, dtype=torch.int64)),
    )


TILES = [
    Tile("tap", 1, 1, 64, 32, 32, 2, 4),
    Tile("line", 1, 1, 64, 32, 32, 3, 4),
    Tile("line", 2, 1, 64, 32, 64, 2, 4),
    Tile("line", 4, 1, 64, 64, 32, 2, 4),
    Tile("tap", 1, 2, 64, 32, 32, 2, 4),
    Tile("tap", 1, 4, 64, 16, 32, 2, 4),
    Tile("line", 2, 2, 64, 32, 64, 2, 4),
    Tile("line", 2, 4, 64, 64, 32, 2, 4),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("channels", [(16, 16), (64, 32)])
def test_every_tiling_gives_the_same_integers(device: torch.device, tile: Tile, channels: tuple[int, int]) -> None:
    memory = Memory(device)
    checked(convolution(memory, channels), memory, tile)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("zeros", [(-128, -128), (-37, 11), (0, -128)])
def test_any_integer_may_stand_for_zero(device: torch.device, tile: Tile, zeros: tuple[int, int]) -> None:
    memory = Memory(device)
    step = convolution(memory, (32, 16), samples=1)
    step = replace(step, x=replace(step.x, zero=zeros[0]), out=replace(step.out, zero=zeros[1]))
    checked(step, memory, tile)


def test_zeros_of_the_epilogue(device: torch.device) -> None:
    memory = Memory(device)
    step = convolution(memory, (16, 16), samples=2)
    residual = image(memory, step.out.shape, 0.03, pitch=48, at=16, zero=-77)
    epilogue = Epilogue(LEAKY, 0.04, residual, RELU, rounded_zero=-90)
    checked(replace(step, out=replace(step.out, zero=-128), epilogue=epilogue), memory, TILES[0])


@pytest.mark.parametrize("channels", [(1, 16), (2, 7), (3, 5), (7, 5), (20, 33), (48, 48)])
def test_odd_channels(device: torch.device, channels: tuple[int, int]) -> None:
    for tile in (
        Tile("tap", 1, 1, 64, 16, 32, 2, 4),
        Tile("all", 1, 1, 64, 32, 64, 2, 4),
        Tile("all", 2, 1, 64, 32, 64, 2, 4),
    ):
        for zero in (0, -128):
            memory = Memory(device)
            step = convolution(memory, channels, samples=1)
            checked(replace(step, x=replace(step.x, zero=zero)), memory, tile)


@pytest.mark.parametrize(
    ("kernel", "strides", "dilations"),
    [
        ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((1, 3, 3), (1, 2, 2), (1, 1, 1)),
        ((3, 3, 3), (1, 1, 1), (2, 1, 2)),
        ((2, 2, 2), (2, 2, 2), (1, 1, 1)),
        ((5, 1, 7), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 1, 2), (1, 2, 1)),
        ((1, 1, 1), (2, 2, 2), (1, 1, 1)),
    ],
)
def test_kernels_strides_and_dilations(
    device: torch.device, kernel: tuple[int, int, int], strides: tuple[int, int, int], dilations: tuple[int, int, int]
) -> None:
    for tile in (
        Tile("tap", 1, 1, 64, 16, 32, 2, 4),
        Tile("line", 2, 1, 64, 32, 32, 2, 4),
        Tile("all", 1, 1, 64, 16, 128, 2, 4),
    ):
        memory = Memory(device)
        step = convolution(memory, (16, 16), (5, 6, 9), kernel=kernel, strides=strides, dilations=dilations, samples=1)
        checked(step, memory, tile)


@pytest.mark.parametrize(
    ("channels", "kernel", "dilations"),
    [
        (30, (3, 3, 3), (1, 1, 16)),  # MeshNet's widest layer
        (3, (3, 3, 3), (1, 1, 16)),
        (16, (1, 1, 31), (1, 1, 1)),
        (16, (1, 31, 1), (1, 1, 1)),
        (2, (1, 2, 31), (1, 1, 1)),
    ],
)
def test_offsets_that_fill_all_bits(
    device: torch.device, channels: int, kernel: tuple[int, int, int], dilations: tuple[int, int, int]
) -> None:
    """Whether an offset lies in the image is a bit of an int32: every tiling that may be chosen has room for its offsets."""
    memory = Memory(device)
    step = convolution(memory, (channels, 16), (2, 2, 40), kernel=kernel, dilations=dilations, samples=1)
    step = replace(step, x=replace(step.x, zero=-7))
    product = product_of(step)
    for tile in (*worth_trying(product), simple_tile(product)):
        memory.sums(step.sums or 0).zero_()
        checked(step, memory, tile)


@pytest.mark.parametrize("dilations", [(1, 2, 1), (2, 1, 3), (3, 4, 2), (1, 5, 16)])
def test_dilated_convolutions_of_several_lines(device: torch.device, dilations: tuple[int, int, int]) -> None:
    """Sizes that are no multiple of anything, and one line of the last dilation less than there are dilations."""
    for tile in TILES[4:]:
        for size in ((3, 4, 21), (2, 11, 16)):
            memory = Memory(device)
            step = convolution(memory, (16, 16), size, dilations=dilations, samples=2)
            assert fits(product_of(step), tile)
            checked(replace(step, x=replace(step.x, zero=-7)), memory, tile)


@pytest.mark.parametrize("channels", [(30, 30), (3, 5), (14, 70), (19, 9)])
@pytest.mark.parametrize("added", [True, False])
def test_spare_channels_mean_nothing(device: torch.device, channels: tuple[int, int], added: bool) -> None:
    """They are read and written, whatever stands there, and count nowhere; the output's are written only where they are its own."""
    memory = Memory(device)
    step = convolution(memory, channels, (4, 6, 8))
    rows = [lanes(count) for count in channels]
    x = image(memory, step.x.shape, 0.02, pitch=rows[0], zero=-90)
    other = image(memory, step.out.shape, 0.03, pitch=rows[1], spare=rows[1] - channels[1]) if added else None
    step = replace(step, x=x, epilogue=Epilogue(LEAKY, 0.04, other, RELU))
    for spare in (rows[1] - channels[1], 0):
        out = image(memory, step.out.shape, 0.05, pitch=rows[1], zero=5, spare=spare)
        one = replace(step, out=out)
        product = product_of(one)
        assert product.channels == (rows[0], channels[1] + spare)
        for tile in (*worth_trying(product), Tile("all", 1, 1, 64, 16, 64, 2, 4)):
            memory.buffers[out.buffer].fill_(77)
            memory.sums(one.sums or 0).zero_()
            checked(one, memory, tile)
            untouched = memory.buffers[out.buffer].cpu()[..., channels[1] :]
            assert bool((untouched == 77).all()) == (spare == 0)


def test_channels_of_a_slice_are_read_in_whole_lanes_where_rows_allow_it(device: torch.device) -> None:
    memory = Memory(device)
    step = convolution(memory, (14, 16))
    for pitch, at, wanted in ((48, 0, 16), (48, 16, 16), (48, 32, 16), (48, 4, 14), (40, 16, 14), (16, 2, 14)):
        one = replace(step, x=image(memory, step.x.shape, 0.02, pitch=pitch, at=at))
        assert product_of(one).channels == (wanted, 16)
        memory.sums(step.sums or 0).zero_()
        checked(one, memory, TILES[0])


def in_fp16(memory: Memory, step: Convolve, *, out: str) -> Convolve:
    """A convolution of real values; spare channels of x are finite."""
    x, rows = step.x, lanes(step.x.channels)
    n, c, *size = x.shape
    values = torch.randn(n, *size, rows).half()
    strides = (math.prod(size) * rows, 1, size[1] * size[2] * rows, size[2] * rows, rows)
    x = View(memory.add(values), 0, x.shape, strides, "fp16", spare=rows - c)
    weight = np.random.default_rng(3).normal(size=step.weight.shape).astype(np.float32) / 20
    step = replace(step, x=x, weight=weight, multiplier=np.ones(len(weight), np.float32))
    if out != "int8":
        shape, types = (
            (*step.out.shape[:1], *step.out.shape[2:], step.out.shape[1]),
            {"fp16": torch.half, "fp32": torch.float},
        )
        buffer = memory.add(torch.full(shape, 7.0, dtype=types[out]))
        step = replace(step, sums=None, out=replace(step.out, buffer=buffer, dtype=out, step=1.0))
    return step


@pytest.mark.parametrize("out", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("channels", "kernel", "strides", "dilations"),
    [
        ((32, 16), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((30, 18), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((30, 30), (3, 3, 3), (1, 1, 1), (2, 3, 2)),
        ((1, 5), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((5, 20), (3, 1, 3), (1, 1, 2), (1, 1, 1)),
    ],
)
def test_convolutions_of_real_values(
    device: torch.device,
    channels: tuple[int, int],
    kernel: tuple[int, int, int],
    strides: tuple[int, int, int],
    dilations: tuple[int, int, int],
    out: str,
) -> None:
    """Operands in FP16, as tensor cores round nothing of, and sums in float32, whose order differs; integers within one of the right."""
    memory = Memory(device)
    step = convolution(memory, channels, (4, 6, 9), kernel=kernel, strides=strides, dilations=dilations)
    step = in_fp16(memory, step, out=out)
    wanted = expected(replace(step, weight=step.weight.astype(np.float16)), memory).double()
    product = product_of(step)
    assert product.width == 2
    assert product.channels[0] == lanes(channels[0])
    for tile in (*worth_trying(product), simple_tile(product)):
        prepare_convolve(step, memory, tile)()
        found = memory.view(step.out).cpu().double()
        if out == "int8":
            assert (found - wanted).abs().max() <= 1
            assert (found == wanted).double().mean() >= 0.999
        else:
            tolerance = {"fp16": 2**-10, "fp32": 1e-5}[out]
            assert torch.allclose(found, wanted, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("added", [True, False])
def test_a_residual_without_spare_channels_is_not_read_beyond_its_own(device: torch.device, added: bool) -> None:
    memory = Memory(device)
    step = convolution(memory, (16, 30))
    out = image(memory, step.out.shape, 0.05, pitch=32, spare=2)
    other = image(memory, step.out.shape, 0.03) if added else None
    step = replace(step, out=out, epilogue=Epilogue(RELU, other=other))
    assert product_of(step).channels == (16, 30 if added else 32)
    checked(step, memory, TILES[0])


@pytest.mark.parametrize("activation", [Activation(), RELU, LEAKY])
@pytest.mark.parametrize("dtype", ["int8", "fp32"])
def test_the_epilogue(device: torch.device, activation: Activation, dtype: str) -> None:
    memory = Memory(device)
    step = convolution(memory, (16, 16), samples=2)
    residual = image(memory, step.out.shape, 0.03, pitch=48, at=16)
    step = replace(step, bias=None, sums=None, epilogue=Epilogue(activation, 0.04, residual, RELU))
    if dtype == "fp32":
        buffer = memory.add(torch.full((2, 4, 5, 7, 16), 7.0))
        step = replace(step, out=replace(step.out, buffer=buffer, dtype="fp32", step=1.0))
    for tile in (TILES[0], TILES[2], TILES[5]):
        checked(step, memory, tile)


def test_channel_slices_leave_their_neighbours_alone(device: torch.device) -> None:
    memory = Memory(device)
    step = convolution(memory, (16, 16), samples=2)
    whole = image(memory, step.out.shape, 0.05, pitch=40, at=16, fill=77)
    step = replace(step, out=whole, x=image(memory, step.x.shape, 0.02, pitch=32, at=16))
    for tile in TILES[:6:2]:
        memory.buffers[whole.buffer].fill_(77)
        memory.sums(step.sums or 0).zero_()
        checked(step, memory, tile)
        stored = memory.buffers[whole.buffer].cpu()
        assert bool((stored[..., :16] == 77).all())
        assert bool((stored[..., 32:] == 77).all())


@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("channels", [(32, 16), (20, 7)])
def test_transposed_convolutions(device: torch.device, factor: tuple[int, int, int], channels: tuple[int, int]) -> None:
    memory = Memory(device)
    c, k = channels
    size = (3, 4, 5)
    generator = np.random.default_rng(2)
    out = tuple(n * f for n, f in zip(size, factor, strict=True))
    step = Upsample(
        "up",
        image(memory, (2, k, *out), 0.05, pitch=k + 16, at=0, fill=77),
        image(memory, (2, c, *size), 0.02),
        weights(c, k, *factor),
        (generator.random(k) * 1e-3).astype(np.float32),
        generator.normal(size=k).astype(np.float32),
        sums=memory.add(torch.zeros(SLOTS, 2, k, 2, dtype=torch.int64)),
    )
    checked(step, memory, Tile("tap", 1, 1, 64, 32, 32, 2, 4))
    memory.sums(step.sums or 0).zero_()
    checked(replace(step, x=replace(step.x, zero=-101)), memory, Tile("tap", 1, 1, 64, 32, 32, 2, 4))
    spare = lanes(k) - k
    step = replace(step, out=image(memory, (2, k, *out), 0.05, pitch=k + spare, spare=spare))
    step = replace(step, x=image(memory, (2, c, *size), 0.02, pitch=lanes(c), zero=-101))
    assert product_of(step).channels == (lanes(c), lanes(k))
    memory.sums(step.sums or 0).zero_()
    checked(step, memory, Tile("tap", 1, 1, 64, 32, 32, 2, 4))


def far_apart(memory: Memory, view: View, values: Tensor | None) -> View:
    """A view's values, or none yet, 2^25 bytes from voxel to voxel: what lies between is never touched."""
    pitch = 1 << 25
    n, _, x, y, z = view.shape
    strides = (x * y * z * pitch, 1, y * z * pitch, z * pitch, pitch)
    memory.buffers[len(memory.buffers)] = torch.empty(n * x * y * z * pitch, dtype=torch.int8, device=memory.device)
    seen = replace(view, buffer=len(memory.buffers) - 1, offset=0, strides=strides)
    memory.view(seen).copy_(torch.full(view.shape, 77) if values is None else values)
    return seen


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("which", ["x", "out", "other"])
def test_more_values_than_int32_counts(device: torch.device, which: str, samples: int) -> None:
    """In one sample, or in all samples of a convolution with kernel 1, which takes them as one line."""
    memory = Memory(device)
    size, kernel = ((3, 4, 6), (3, 3, 3)) if samples == 1 else ((2, 2, 3), (1, 1, 1))
    step = convolution(memory, (16, 16), size, kernel=kernel, samples=samples)
    step = replace(step, sums=None, epilogue=Epilogue(RELU, 0.04, image(memory, step.out.shape, 0.03), RELU))
    if which == "x":
        step = replace(step, x=far_apart(memory, step.x, memory.view(step.x)))
    elif which == "out":
        step = replace(step, out=far_apart(memory, step.out, None))
    elif step.epilogue.other is not None:
        other = far_apart(memory, step.epilogue.other, memory.view(step.epilogue.other))
        step = replace(step, epilogue=replace(step.epilogue, other=other))
    for tile in (TILES[0], TILES[1], TILES[4], TILES[6], Tile("all", 1, 1, 64, 16, 64, 2, 4)):
        if samples == 1 or tile.lines == tile.group == 1:
            checked(step, memory, tile)


def test_a_transposed_convolution_of_more_values_than_int32_counts(device: torch.device) -> None:
    memory = Memory(device)
    step = Upsample(
        "up",
        far_apart(memory, image(memory, (1, 7, 4, 4, 6), 0.05), None),
        image(memory, (1, 20, 2, 2, 3), 0.02),
        weights(20, 7, 2, 2, 2),
        np.full(7, 1e-3, np.float32),
    )
    checked(step, memory, Tile("tap", 1, 1, 64, 32, 32, 2, 4))


def test_packed_weights_hold_every_weight(device: torch.device) -> None:
    memory = Memory(device)
    step = convolution(memory, (16, 16))
    for tile in TILES:
        if fits(product_of(step), tile):
            values = packed(step.weight, product_of(step), tile)
            assert np.abs(values.astype(np.int64)).sum() == tile.group * np.abs(step.weight.astype(np.int64)).sum()
