"""A network as the Triton engine runs it: its steps, the buffers that they read and write, and where these lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from ptq3d.engines.triton.steps import BYTES, Step, View


@dataclass(frozen=True)
class Buffer:
    """Memory of values.

    Args:
        size: in values.
        dtype: "int8", "fp16", "fp32" or "int64".
    """

    size: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.size * BYTES[self.dtype]


@dataclass(frozen=True, eq=False)
class LayerPrecision:
    """What a multiplying layer became.

    Args:
        name: of its node.
        op: of ONNX.
        precision: "int8" or "fp16".
        macs: of one window.
        why: what keeps it out of INT8, "" where nothing does.
    """

    name: str
    op: str
    precision: str
    macs: int
    why: str = ""


@dataclass(frozen=True, eq=False)
class Program:
    """A network as steps.

    Args:
        steps: in the order in which they run.
        buffers: what they read and write.
        input: (N, C, X, Y, Z) fp32, channels first.
        output: (N, F, X, Y, Z), channels last; int8, fp16 or fp32.
        layers: every multiplying layer.
        places: byte offsets of the buffers in the arena; those of buffers that live at the same time do not overlap.
        arena_bytes: how long it is.
        notes: on what runs in FP16.
        unsigned: the file's answer is uint8, 128 more than the int8 of `output`.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    input: View
    output: View
    layers: tuple[LayerPrecision, ...]
    places: tuple[int, ...] = ()
    arena_bytes: int = 0
    notes: tuple[str, ...] = field(default=())
    unsigned: bool = False
