"""Where the engine keeps values, and what a kernel launch is: all that the kernels know of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from ptq3d.engines.triton.arithmetic import EXACT
from ptq3d.engines.triton.steps import View

Blocks = Mapping[str, int]
"""Choices of speed alone, by name; a name that is missing takes the kernel's own value."""
OWN_BLOCKS: Blocks = {}
SLOTS = 32
"""Copies of a buffer of sums: programs that add to it take turns among them."""


class Place(Protocol):
    """Memory of one device; every tensor it gives stays where it is for as long as the engine lives."""

    def view(self, view: View) -> Tensor:
        """A view's values in the arena, with the view's shape and strides."""

    def constant(self, array: npt.NDArray[Any]) -> Tensor:
        """An array on the device; the same tensor for the same array."""

    def sums(self, buffer: int) -> Tensor:
        """A buffer of sums, (SLOTS, N, C, 2) int64, all of whose copies count; the engine fills it with zeros at the start of every run."""

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) values that nothing else writes."""


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with everything that it needs; calling it allocates nothing and waits for nothing.

    Args:
        kernel: of Triton.
        grid: how many programs, along each axis.
        arguments: of the kernel, by name.
        warps: of 32 threads, in each program.
        stages: of the pipeline that loads what a loop multiplies.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int = 4
    stages: int = 3

    def __call__(self) -> None:
        """Launch it on the current stream."""
        self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages, **EXACT)

    def compile(self) -> None:
        """Compile it into Triton's cache without running it; pointers may be `triton.runtime.jit.MockTensor`."""
        options = {"num_warps": self.warps, "num_stages": self.stages, **EXACT}
        self.kernel.warmup(**self.arguments, grid=self.grid, **options)


@dataclass(frozen=True, eq=False)
class Launches:
    """Launches one after another.

    Args:
        all: in their order.
    """

    all: tuple[Launch, ...]

    def __call__(self) -> None:
        """Launch them on the current stream."""
        for launch in self.all:
            launch()
