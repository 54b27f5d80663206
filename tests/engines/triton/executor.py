"""What the steps of a Program mean, in plain PyTorch on the CPU: slow, op by op, on one arena of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ptq3d.engines.operators import NUMBERS, OPERATORS
from ptq3d.engines.triton.memory import lifetimes, place
from ptq3d.engines.triton.products import product_of
from ptq3d.engines.triton.program import Program
from ptq3d.engines.triton.steps import (
    PLAIN_EPILOGUE,
    Activation,
    Attend,
    Convolve,
    Enter,
    Epilogue,
    Float,
    Move,
    Normalize,
    NormalizeRows,
    Pointwise,
    Pool,
    Resize,
    Step,
    Upsample,
    View,
)

TYPES = {"int8": torch.int8, "fp16": torch.float16, "fp32": torch.float32, "int64": torch.int64}


class Executor:
    """A program with its arena, which is poisoned before every run.

    Args:
        wide: FP16 tensors are kept in FP32, in an arena that is planned for it: then only the order of sums may differ.
    """

    def __init__(self, program: Program, *, wide: bool = False) -> None:
        self.types = {**TYPES, "fp16": torch.float32} if wide else TYPES
        sizes = [buffer.size * self.types[buffer.dtype].itemsize for buffer in program.buffers]
        self.places, total = place(sizes, lifetimes(program)) if wide else (program.places, program.arena_bytes)
        self.program = program
        self.random = torch.Generator().manual_seed(0)
        self.arena = torch.zeros(total, dtype=torch.uint8)

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """Real answers to (N, C, X, Y, Z) float32; integers as the file has them."""
        self.arena.random_(0, 256, generator=self.random)
        self.seen(self.program.input).copy_(torch.from_numpy(windows))
        for step in self.program.steps:
            check(step)
            RUN[type(step)](self, step)
        answer = self.seen(self.program.output).clone()
        return (answer.view(torch.uint8) ^ 128 if self.program.unsigned else answer).numpy()

    def memory(self, buffer: int) -> Tensor:
        start, values = self.places[buffer], self.program.buffers[buffer]
        dtype = self.types[values.dtype]
        return self.arena[start : start + values.size * dtype.itemsize].view(dtype)

    def seen(self, view: View) -> Tensor:
        """What a view shows, to read and to write; nothing beyond its buffer."""
        memory = self.memory(view.buffer)
        assert self.types[view.dtype] == memory.dtype
        last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        assert 0 <= view.offset <= last < len(memory)
        return memory.as_strided(view.shape, view.strides, memory.storage_offset() + view.offset)

    def real(self, view: View) -> Tensor:
        return (self.seen(view).float() - view.zero) * torch.tensor(view.step, dtype=torch.float32)

    def finish(self, v: Tensor, step: Step, epilogue: Epilogue = PLAIN_EPILOGUE) -> None:
        v = active(v, epilogue.activation)
        if epilogue.rounded is not None:
            v = levels(v, epilogue.rounded, epilogue.rounded_zero) - epilogue.rounded_zero
            v = v * torch.tensor(epilogue.rounded, dtype=torch.float32)
        if epilogue.other is not None:
            assert epilogue.other.shape == step.out.shape
            v = v + self.real(epilogue.other)
        v = active(v, epilogue.last)
        out = self.seen(step.out)
        assert out.shape == v.shape
        out.copy_(levels(v, *step.out.scale) if step.out.dtype == "int8" else v)


def levels(v: Tensor, step: float, zero: int) -> Tensor:
    return (torch.round(v / torch.tensor(step, dtype=torch.float32)) + zero).clamp(-128, 127)


def active(v: Tensor, function: Activation) -> Tensor:
    functions: dict[str, Callable[[], Tensor]] = {
        "none": lambda: v,
        "relu": lambda: v.relu(),
        "leaky_relu": lambda: torch.where(v >= 0, v, v * torch.tensor(function.low, dtype=torch.float32)),
        "elu": lambda: F.elu(v, function.low),
        "gelu": lambda: F.gelu(v),
        "gelu_tanh": lambda: F.gelu(v, approximate="tanh"),
        "sigmoid": lambda: v.sigmoid(),
        "tanh": lambda: v.tanh(),
        "clip": lambda: v.clamp(function.low, function.high),
    }
    return functions[function.kind]()


def check(step: Step) -> None:
    """What kernels rely on."""
    epilogue = getattr(step, "epilogue", None)
    views = [step.out, *step.reads]
    if isinstance(step, Convolve | Upsample | Normalize | NormalizeRows | Pointwise | Pool | Resize):
        assert all(view.pitch is not None for view in views), step
    if isinstance(step, Convolve | Upsample | Normalize | Pool | Resize):
        assert all(len(view.shape) == 5 for view in views)
    if isinstance(step, Upsample | Normalize):
        assert step.x.dtype == "int8"
    if isinstance(step, Convolve | Upsample):
        assert step.weight.dtype == {"int8": np.int8, "fp16": np.float32}[step.x.dtype]
        assert step.x.dtype == "int8" or (step.multiplier == 1).all()
        assert step.weight.flags.c_contiguous
        assert step.multiplier.shape == (step.out.shape[1],)
        assert step.bias is None or step.bias.shape == (step.out.shape[1],)
    if step.out.dtype == "fp16" and step.out.spare:  # others read it with weights of 0, and 0 times NaN is no 0
        assert isinstance(step, Convolve)
        assert product_of(step).channels[1] == step.out.channels + step.out.spare
    if isinstance(step, Pointwise | NormalizeRows | Normalize):
        assert step.x.shape == step.out.shape
        assert step.x.dtype in ("int8", "fp16")
    if isinstance(step, Move):
        assert (step.x.shape, step.x.dtype, step.x.scale) == (step.out.shape, step.out.dtype, step.out.scale)
        assert step.zeros is None or step.zeros.scale == step.out.scale
    if isinstance(step, Attend):
        assert all(view.dtype == "fp16" for view in step.reads)
        assert all(len(view.shape) == 4 for view in views)
        assert all(view.strides[3] == 1 or view.shape[3] == 1 for view in step.reads)
        scores = (*step.query.shape[:3], step.key.shape[2])
        assert step.mask is None or step.mask.shape[3] == scores[3]
        assert step.mask is None or all(size in (1, whole) for size, whole in zip(step.mask.shape, scores, strict=True))
    assert all(-128 <= view.zero <= 127 if view.dtype == "int8" else view.scale == (1, 0) for view in views)
    assert all(view.dtype != "fp32" for view in step.reads) or isinstance(step, Enter)
    assert epilogue is None or epilogue.other is None or epilogue.other.shape == step.out.shape


def enter(run: Executor, step: Enter) -> None:
    run.finish(run.seen(step.x), step)


def convolve(run: Executor, step: Convolve) -> None:
    pads = [step.pads[axis + side] for axis in (2, 1, 0) for side in (0, 3)]
    x = F.pad(centred(run, step.x), pads)
    weight = torch.from_numpy(step.weight).double()
    total = F.conv3d(x, weight, None, step.strides, 0, step.dilations, step.groups)
    rescaled(run, step, total)


def upsample(run: Executor, step: Upsample) -> None:
    weight = torch.from_numpy(step.weight).double()
    rescaled(run, step, F.conv_transpose3d(centred(run, step.x), weight, None, weight.shape[2:]))


def centred(run: Executor, view: View) -> Tensor:
    return run.seen(view).double() - view.zero


def rescaled(run: Executor, step: Convolve | Upsample, total: Tensor) -> None:
    total = total.to(torch.int32) if step.x.dtype == "int8" else total
    v = total.float() * channels(step.multiplier)
    if step.bias is not None:
        v = v + channels(step.bias)
    run.finish(v, step, step.epilogue)
    if step.sums is not None:
        summed(run, step.out, step.sums)


def channels(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[:, None, None, None]


def summed(run: Executor, view: View, sums: int) -> None:
    integers = run.seen(view).long()
    first, second = integers.sum((2, 3, 4)), integers.square().sum((2, 3, 4))
    run.memory(sums).copy_(torch.stack([first, second], -1).reshape(-1))


def normalize(run: Executor, step: Normalize) -> None:
    if not step.summed:
        summed(run, step.x, step.sums)
    n, c = step.x.shape[:2]
    values = step.x.rows // n * (c // step.groups)
    sums = run.memory(step.sums).reshape(n, step.groups, -1, 2).sum(2).double() / values
    mean = (sums[..., 0] - step.x.zero) * step.x.step
    variance = (sums[..., 1] - sums[..., 0].square()) * step.x.step**2
    by_channel = [one.repeat_interleave(c // step.groups, 1)[:, :, None, None, None] for one in (mean, variance)]
    v = (run.real(step.x) - by_channel[0].float()) / (by_channel[1] + step.epsilon).sqrt().float()
    run.finish(v * channels(step.scale) + channels(step.bias), step, step.epilogue)


def normalize_rows(run: Executor, step: NormalizeRows) -> None:
    x = run.real(step.x)
    values = [torch.from_numpy(one) for one in (step.scale, step.bias)]
    run.finish(F.layer_norm(x, x.shape[-1:], *values, step.epsilon), step, step.epilogue)


def pointwise(run: Executor, step: Pointwise) -> None:
    v = run.real(step.x).movedim(step.x.channel_axis, -1)
    if step.factor is not None:
        assert step.factor.shape in ((1,), (step.x.channels,))
        v = v * torch.from_numpy(step.factor)
    if step.offset is not None:
        rows = step.x.rows // step.x.shape[0]
        assert step.offset.shape in ((1,), (step.x.channels,), (rows, step.x.channels))
        v = (v.reshape(step.x.shape[0], rows, -1) + torch.from_numpy(step.offset)).reshape(v.shape)
    run.finish(v.movedim(-1, step.x.channel_axis), step, step.epilogue)


def pool(run: Executor, step: Pool) -> None:
    pads = [step.pads[axis + side] for axis in (2, 1, 0) for side in (0, 3)]
    if step.kind == "max":
        assert step.out.scale == step.x.scale
        x = F.pad(run.seen(step.x).float(), pads, value=-torch.inf)
        run.seen(step.out).copy_(F.max_pool3d(x, step.kernel, step.strides))
        return
    assert step.pads[:3] == step.pads[3:]
    x = run.real(step.x)
    run.finish(F.avg_pool3d(x, step.kernel, step.strides, step.pads[:3], False, step.include_pads), step)


def resize(run: Executor, step: Resize) -> None:
    size = step.out.shape[2:]
    if step.mode == "nearest":
        assert (step.out.scale, step.out.dtype) == (step.x.scale, step.x.dtype)
        run.seen(step.out).copy_(F.interpolate(run.seen(step.x).float(), size, mode="nearest"))
        return
    x = run.real(step.x)
    run.finish(F.interpolate(x, size, mode="trilinear", align_corners=step.align_corners), step)


def attend(run: Executor, step: Attend) -> None:
    query, key, value = (run.seen(view).float() for view in (step.query, step.key, step.value))
    scores = query @ key.transpose(-1, -2) * step.scale
    if step.mask is not None:
        scores = scores + torch.from_numpy(step.mask)
    run.finish(scores.softmax(-1) @ value, step)


def move(run: Executor, step: Move) -> None:
    values = run.seen(step.x).clone()
    if step.zeros is not None:
        run.seen(step.zeros).fill_(step.zeros.zero)
    run.seen(step.out).copy_(values)


def _in_float32(constant: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(constant))
    return tensor.float() if tensor.is_floating_point() else tensor


def in_float(run: Executor, step: Float) -> None:
    places = NUMBERS.get(step.op, ())
    given: list[Any] = []
    for number, one in enumerate(step.inputs):
        if isinstance(one, View):
            assert one.dtype == "fp16"
            given.append(run.seen(one).float())
        elif one is None:
            given.append(None)
        else:
            given.append(one.reshape(-1).tolist() if number in places else _in_float32(one))
    run.seen(step.out).copy_(OPERATORS[step.op](step.attributes, *given))


RUN: dict[type[Step], Callable[[Executor, Any], None]] = {
    Enter: enter,
    Convolve: convolve,
    Upsample: upsample,
    Normalize: normalize,
    NormalizeRows: normalize_rows,
    Pointwise: pointwise,
    Pool: pool,
    Resize: resize,
    Attend: attend,
    Move: move,
    Float: in_float,
}
