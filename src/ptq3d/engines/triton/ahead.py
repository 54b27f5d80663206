"""Compile kernels into Triton's cache, in a process of its own, so that several do it at a time.

    python -m ptq3d.engines.triton.ahead JOBS

JOBS is a file that `tuning.compile_ahead` wrote: pickled pairs of a step and a tile, whose weights count by their shapes alone.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import MockTensor

from ptq3d.engines.triton.arena import TYPES
from ptq3d.engines.triton.convolution import launch_of
from ptq3d.engines.triton.keys import fix_keys
from ptq3d.engines.triton.steps import BYTES, View


class Blueprint:
    """A `Place` without memory: what it gives has a type and an alignment only."""

    def view(self, view: View) -> Any:
        """A pointer to the view's first value, in a buffer that is aligned as all are."""
        pointer, address = MockTensor(TYPES[view.dtype]), view.offset * BYTES[view.dtype]
        pointer.data_ptr = lambda: address  # Triton compiles anew for an address that 16 does not divide
        return pointer

    def constant(self, array: npt.NDArray[Any]) -> Any:
        """A pointer of the array's type."""
        return MockTensor(torch.from_numpy(array[:0].copy()).dtype)

    def sums(self, buffer: int) -> Any:  # noqa: ARG002
        """A pointer to int64."""
        return MockTensor(torch.int64)

    def scratch(self, count: int, dtype: torch.dtype) -> Any:  # noqa: ARG002
        """A pointer of that type."""
        return MockTensor(dtype)


def main() -> None:
    """Compile every job; one that does not compile is left to whoever launches it."""
    fix_keys()
    for step, tile in pickle.loads(Path(sys.argv[1]).read_bytes()):
        try:
            launch_of(step, Blueprint(), tile, MockTensor(TYPES[step.x.dtype]), MockTensor(torch.int32)).compile()
        except OutOfResources:
            continue


if __name__ == "__main__":
    main()
