"""The memory of a program on a device: one arena for values, one block of sums, and constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptq3d.engines.triton.place import SLOTS
from ptq3d.engines.triton.program import Program
from ptq3d.engines.triton.steps import View
from ptq3d.engines.triton.views import LANES
from ptq3d.errors import EngineError

TYPES = {"int8": torch.int8, "fp16": torch.float16, "fp32": torch.float32}
GB = 1e9


class Arena:
    """A `Place` for the steps of one program.

    Args:
        program: its buffers.
        device: where they go.

    Raises:
        EngineError: the device has too little memory; the message says how much is wanted, and how much there is.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program, self._device = program, device
        self._constants: dict[int, tuple[npt.NDArray[Any], Tensor]] = {}
        self._scratch: list[Tensor] = []
        counts = [buffer.size * SLOTS if buffer.dtype == "int64" else 0 for buffer in program.buffers]
        self._starts = [0, *np.cumsum(counts).tolist()]
        require_memory(device, program.arena_bytes + 8 * self._starts[-1])
        # LANES more, since a convolution may read whole lanes of the last row
        self._bytes = torch.empty(program.arena_bytes + LANES, dtype=torch.int8, device=device)
        self._bytes.random_(-128, 128)  # tilings are timed on it: zeros take less power, and less time
        self._sums = torch.zeros(max(self._starts[-1], 1), dtype=torch.int64, device=device)

    def view(self, view: View) -> Tensor:
        """A view's values, with its shape and strides."""
        buffer = self._program.buffers[view.buffer]
        start = self._program.places[view.buffer]
        piece = self._bytes[start : start + buffer.nbytes].view(TYPES[buffer.dtype])
        return torch.as_strided(piece, view.shape, view.strides, piece.storage_offset() + view.offset)

    def constant(self, array: npt.NDArray[Any]) -> Tensor:
        """An array on the device; the same tensor for the same array."""
        kept = self._constants.get(id(array))
        if kept is None:
            kept = self._constants[id(array)] = array, torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        return kept[1]

    def sums(self, buffer: int) -> Tensor:
        """A buffer of sums, (SLOTS x N x C x 2,) int64; zero when a run starts."""
        return self._sums[self._starts[buffer] : self._starts[buffer + 1]]

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) values that nothing else writes."""
        self._scratch.append(torch.empty(count, dtype=dtype, device=self._device))
        return self._scratch[-1]

    def clear_sums(self) -> None:
        """Fill all sums with zeros."""
        if self._starts[-1]:
            self._sums.zero_()


def require_memory(device: torch.device, wanted: int) -> None:
    """Refuse what a GPU has no room for, before anything is taken.

    Raises:
        EngineError: too little memory is free.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if wanted > free:
        raise EngineError(
            f"{device} has {free / GB:.2f} of {total / GB:.2f} GB free, and the network's activations take about "
            f"{wanted / GB:.2f} GB. Build with a smaller --batch, take a smaller window, or free the GPU."
        )
