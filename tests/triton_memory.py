"""Memory for kernels under test: every buffer is full of random values, so that what a kernel leaves out or writes too much shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ptq3d.engines.triton.steps import Activation, Epilogue, View

TYPES = {"int8": torch.int8, "fp16": torch.float16, "fp32": torch.float32}
ACTIVATIONS = {
    "none": Activation(),
    "relu": Activation("relu"),
    "leaky_relu": Activation("leaky_relu", 0.01),
    "elu": Activation("elu", 1.0),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "sigmoid": Activation("sigmoid"),
    "tanh": Activation("tanh"),
    "clip": Activation("clip", -0.5, 0.75),
}
# what stands for 0: of symmetric int8, of uint8 behind a ReLU, of any
zeros = st.sampled_from([0, 0, -128, 127, -47])
EXACT = frozenset({"none", "relu", "leaky_relu", "clip"})


@dataclass(eq=False)
class Memory:
    """A `Place` that holds each buffer in a tensor of its own.

    Args:
        device: where.
        seed: of what fills the buffers.
    """

    device: torch.device
    seed: int = 0
    buffers: list[Tensor] = field(default_factory=list)
    summed: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def filled(self, size: int, dtype: str) -> int:
        """A new buffer of random values."""
        if dtype == "int8":
            values = torch.randint(-128, 128, (size,), generator=self._generator, dtype=torch.int8)
        else:
            values = (torch.randn(size, generator=self._generator) * 2).to(TYPES[dtype])
        self.buffers.append(values.to(self.device))
        return len(self.buffers) - 1

    def image(
        self,
        shape: tuple[int, ...],
        dtype: str = "int8",
        *,
        step: float = 1.0,
        zero: int = 0,
        around: tuple[int, int] = (0, 0),
    ) -> View:
        """A channels-last view (N, C, X, Y, Z) or (N, tokens, C) of a buffer with more channels before and behind.

        Args:
            shape: as the graph has it.
            dtype: of `View`.
            step, zero: of int8.
            around: how many channels of the buffer lie before and behind those of the view.
        """
        axis = 1 if len(shape) == 5 else len(shape) - 1
        pitch = shape[axis] + sum(around)
        lengths = [length for place, length in enumerate(shape) if place != axis]
        strides = [pitch * math.prod(lengths[place + 1 :]) for place in range(len(lengths))]
        strides.insert(axis, 1)
        buffer = self.filled(pitch * math.prod(lengths), dtype)
        scale = (float(np.float32(step)), zero) if dtype == "int8" else ()
        return View(buffer, around[0], shape, tuple(strides), dtype, *scale)  # type: ignore[arg-type]

    def view(self, view: View) -> Tensor:
        return self.buffers[view.buffer].as_strided(view.shape, view.strides, view.offset)

    def constant(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    def sums(self, buffer: int) -> Tensor:
        return self.summed[buffer]

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.device)

    def real(self, view: View) -> Tensor:
        """What the values of a view stand for, float32, on the CPU."""
        values = self.view(view).cpu().float()
        return (values - view.zero) * torch.tensor(view.step) if view.dtype == "int8" else values

    def rest(self, view: View) -> Tensor:
        """The buffer of a view with zeros in place of the view: what no kernel may change."""
        buffer = self.buffers[view.buffer].clone()
        buffer.as_strided(view.shape, view.strides, view.offset).zero_()
        return buffer.cpu()


def activated(v: Tensor, activation: Activation) -> Tensor:
    """PyTorch's own activation."""
    low, high = activation.low, activation.high
    functions = {
        "none": lambda: v,
        "relu": lambda: F.relu(v),
        "leaky_relu": lambda: F.leaky_relu(v, low),
        "elu": lambda: F.elu(v, low),
        "gelu": lambda: F.gelu(v),
        "gelu_tanh": lambda: F.gelu(v, approximate="tanh"),
        "sigmoid": lambda: torch.sigmoid(v),
        "tanh": lambda: torch.tanh(v),
        "clip": lambda: v.clamp(low, high),
    }
    return functions[activation.kind]()


def levels(v: Tensor, step: float, zero: int = 0) -> Tensor:
    """ONNX QuantizeLinear, as float32."""
    return (torch.round(v / torch.tensor(step, dtype=torch.float32)) + zero).clamp(-128, 127)


def left(v: Tensor, epilogue: Epilogue, out: View, other: Tensor | None) -> Tensor:
    """What an epilogue makes of float32 values, in the type of `out`."""
    v = activated(v, epilogue.activation)
    if epilogue.rounded is not None:
        v = levels(v, epilogue.rounded, epilogue.rounded_zero) - epilogue.rounded_zero
        v = v * torch.tensor(epilogue.rounded, dtype=torch.float32)
    if other is not None:
        v = v + other
    v = activated(v, epilogue.last)
    return levels(v, out.step, out.zero).to(torch.int8) if out.dtype == "int8" else v.to(TYPES[out.dtype])


def require_close(got: Tensor, wanted: Tensor, *, exact: bool) -> None:
    """Equal bit for bit where `exact`; else integers within one step on 99.9 % of values, and floats to the precision of their type."""
    got = got.cpu()
    if exact and got.dtype == torch.int8:
        assert torch.equal(got, wanted)
    elif got.dtype == torch.int8:
        apart = (got.int() - wanted.int()).abs()
        assert (apart <= 1).float().mean() >= 0.999, apart.max()
        assert (apart == 0).float().mean() >= 0.97
    else:
        tolerance = 1e-3 if got.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)
