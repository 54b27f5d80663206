"""What the Triton engine runs: a short list of fused steps, each reading and writing views of buffers in one arena.

Images are stored with their channels last (N, X, Y, Z, C), INT8 wherever the file has Q/DQ; a view keeps the
shape that ONNX knows (N, C, X, Y, Z) and says with strides where each value lies. Arithmetic is that of the reference engine:
integers bit for bit, each floating-point operation rounded to float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Dtype = Literal["int8", "fp16", "fp32"]
BYTES: Mapping[str, int] = {"int8": 1, "fp16": 2, "fp32": 4, "int64": 8}
Triple = tuple[int, int, int]
LARGEST_KERNEL = 31  # of a convolution: offsets along an axis are bits of an int32
Floats = npt.NDArray[np.float32]


class Scale(NamedTuple):
    """Which real values int8 stands for: (integer - zero) * step."""

    step: float = 1.0
    zero: int = 0


UNIT = Scale()


@dataclass(frozen=True)
class View:
    """Values of a tensor in a buffer.

    Args:
        buffer: its place in `Program.buffers`.
        offset: of the first value, in values of `dtype`.
        shape: as the graph has it: (N, C, X, Y, Z), (N, tokens, C), ...
        strides: in values, one for each axis.
        dtype: what is stored.
        step: the real value of one integer where `dtype` is int8, else 1.
        zero: the stored integer that stands for 0 where `dtype` is int8: real = (integer - zero) * step. A uint8 of the file with
            zero-point p is stored as an int8 smaller by 128, so that its zero is p - 128.
        spare: values behind the channels of each row that are nobody else's and mean nothing: a step may write them. Of fp16 they
            are finite, since the step that makes the tensor writes them.
    """

    buffer: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Dtype
    step: float = 1.0
    zero: int = 0
    spare: int = 0

    @property
    def scale(self) -> Scale:
        """Its step and zero."""
        return Scale(self.step, self.zero)

    @property
    def channel_axis(self) -> int:
        """Where its channels are: 1 of an image, the last axis of anything else."""
        return 1 if len(self.shape) == 5 else len(self.shape) - 1

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[self.channel_axis]

    @property
    def rows(self) -> int:
        """How many voxels or tokens it has, all samples together."""
        return math.prod(self.shape) // self.channels

    @property
    def pitch(self) -> int | None:
        """Values from one row to the next; None where rows are not evenly spaced, or channels do not lie side by side."""
        axis = self.channel_axis
        others = [
            (size, stride)
            for place, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True))
            if place != axis
        ]
        others = [pair for pair in others if pair[0] != 1]
        if self.channels > 1 and self.strides[axis] != 1:
            return None
        for (_, outer), (size, inner) in itertools.pairwise(others):
            if outer != size * inner:
                return None
        return others[-1][1] if others else self.channels

    def as_rows(self) -> View:
        """The same values as an image of single voxels, (rows, C, 1, 1, 1); for views with a pitch."""
        pitch = self.pitch or self.channels
        return replace(self, shape=(self.rows, self.channels, 1, 1, 1), strides=(pitch, 1, pitch, pitch, pitch))


@dataclass(frozen=True)
class Activation:
    """A function of one value.

    Args:
        kind: "none", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "sigmoid", "tanh" or "clip".
        low: the slope of "leaky_relu", the alpha of "elu", the lower bound of "clip".
        high: the upper bound of "clip".
    """

    kind: str = "none"
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Epilogue:
    """What happens to a float32 value v on its way out of a step.

        v = activation(v)
        v = (clip(round_half_even(v / rounded) + rounded_zero, -128, 127) - rounded_zero) * rounded    where `rounded` is given
        v = last(v + real(other))                                                                      where `other` is given
        out = clip(round_half_even(v / out.step) + out.zero, -128, 127)    where the step's `out` is int8, else v in its type

    Args:
        activation: the first one.
        rounded: the INT8 step of a tensor that nothing else reads, so that it is never stored.
        rounded_zero: its integer that stands for 0.
        other: the other branch of a residual sum, of the shape of `out`.
        last: the activation behind the sum.
    """

    activation: Activation = Activation()
    rounded: float | None = None
    other: View | None = None
    last: Activation = Activation()
    rounded_zero: int = 0


PLAIN_EPILOGUE = Epilogue()


@dataclass(frozen=True, eq=False)
class Step:
    """One or few kernel launches.

    Args:
        name: of the graph's node that gives it its name.
        out: what it writes.
    """

    name: str
    out: View

    @property
    def reads(self) -> tuple[View, ...]:
        """What it reads."""
        epilogue: Epilogue | None = getattr(self, "epilogue", None)
        found = [getattr(self, name, None) for name in ("x", "other", "query", "key", "value")]
        found += [epilogue.other if epilogue is not None else None, *getattr(self, "inputs", ())]
        return tuple(view for view in found if isinstance(view, View))


@dataclass(frozen=True, eq=False)
class Enter(Step):
    """Windows (N, C, X, Y, Z) float32, channels first, as int8 or fp16 channels last.

    Args:
        x: the fp32 input of the program.
    """

    x: View


@dataclass(frozen=True, eq=False)
class Convolve(Step):
    """A convolution in INT8, or in FP16 with float32 sums; an INT8 Linear is one with kernel 1 on a view `as_rows`.

    v = float32(sum of x * weight) * multiplier + bias, then the epilogue.

    Args:
        x: int8 or fp16.
        weight: (K, C / groups, kx, ky, kz), int8, or float32 that is rounded to float16, as x is.
        multiplier: (K,) float32, step of x times step of the weight; 1 in FP16.
        bias: (K,) float32 or None.
        strides, dilations: for each axis.
        pads: x, y, z before, then x, y, z behind.
        groups: of channels.
        sums: a buffer (SLOTS, N, K, 2) int64 that takes the sum of the integers of `out` and of their squares, or None.
    """

    x: View
    weight: npt.NDArray[np.int8] | Floats
    multiplier: Floats
    bias: Floats | None = None
    strides: Triple = (1, 1, 1)
    dilations: Triple = (1, 1, 1)
    pads: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    groups: int = 1
    epilogue: Epilogue = PLAIN_EPILOGUE
    sums: int | None = None


@dataclass(frozen=True, eq=False)
class Upsample(Step):
    """An INT8 ConvTranspose with kernel = stride, no pads, no groups: a matrix product whose store moves channels to voxels.

    Args:
        x: int8.
        weight: (C, K, kx, ky, kz) int8; of more than one voxel, else it is a Convolve.
        multiplier: (K,) float32.
        bias: (K,) float32 or None.
        sums: as in `Convolve`.
    """

    x: View
    weight: npt.NDArray[np.int8]
    multiplier: Floats
    bias: Floats | None = None
    epilogue: Epilogue = PLAIN_EPILOGUE
    sums: int | None = None


@dataclass(frozen=True, eq=False)
class Normalize(Step):
    """InstanceNormalization (`groups` = C) or GroupNormalization of an int8 tensor, with the epilogue.

    v = (real(x) - mean) / sqrt(variance + epsilon) * scale + bias, mean and variance of each sample and group, from exact sums.

    Args:
        x: int8.
        groups: of channels.
        scale, bias: (C,) float32.
        epsilon: added to the variance.
        sums: a buffer (SLOTS, N, C, 2) int64 with the sum of the integers of each channel, and of their squares.
        summed: whether the step that wrote `x` filled `sums`; else this one does.
    """

    x: View
    groups: int
    scale: Floats
    bias: Floats
    epsilon: float
    sums: int
    summed: bool
    epilogue: Epilogue = PLAIN_EPILOGUE


@dataclass(frozen=True, eq=False)
class NormalizeRows(Step):
    """LayerNormalization over the channels of each row, with the epilogue.

    Args:
        x: int8 or fp16.
        scale, bias: (C,) float32.
    """

    x: View
    scale: Floats
    bias: Floats
    epsilon: float
    epilogue: Epilogue = PLAIN_EPILOGUE


@dataclass(frozen=True, eq=False)
class Pointwise(Step):
    """v = real(x) * factor + offset, then the epilogue; a requantization, an activation or a sum of two tensors.

    Args:
        x: int8 or fp16.
        factor: (1,) or (C,) float32, or None for 1.
        offset: (1,), (C,) or (rows / N, C) float32, or None for 0; the last is the same for each sample.
    """

    x: View
    factor: Floats | None = None
    offset: Floats | None = None
    epilogue: Epilogue = PLAIN_EPILOGUE


@dataclass(frozen=True, eq=False)
class Pool(Step):
    """MaxPool of int8 (its scale stays), or AveragePool of int8 or fp16.

    Args:
        kind: "max" or "average".
        include_pads: an average counts padded zeros.
    """

    x: View
    kind: str
    kernel: Triple
    strides: Triple
    pads: tuple[int, int, int, int, int, int]
    include_pads: bool = False


@dataclass(frozen=True, eq=False)
class Resize(Step):
    """Nearest (asymmetric, floor) or trilinear resampling of int8 or fp16 to the size of `out`.

    Args:
        mode: "nearest" or "linear".
        align_corners: of "linear"; else half-pixel.
    """

    x: View
    mode: str
    align_corners: bool = False


@dataclass(frozen=True, eq=False)
class Attend(Step):
    """softmax(query @ key^T * scale + mask) @ value, products of FP16 and scores in float32.

    Args:
        out: (B, heads, tokens, C), any strides; int8, fp16 or fp32.
        query, key, value: (B, heads, tokens, C) fp16, channels side by side.
        scale: of the scores.
        mask: (B or 1, heads or 1, tokens or 1, tokens) float32, rounded to FP16; or None.
    """

    query: View
    key: View
    value: View
    scale: float
    mask: Floats | None = None


@dataclass(frozen=True, eq=False)
class Move(Step):
    """A copy of x into `out`, which has the same shape, type and scale; any strides.

    Args:
        zeros: the whole tensor of which `out` is a part, filled with its `zero` first; None where `out` is all of it.
    """

    x: View
    zeros: View | None = None


@dataclass(frozen=True, eq=False)
class Float(Step):
    """An operator that has no INT8 form here, by PyTorch in FP16 on real values.

    Args:
        op: of ONNX.
        attributes: its plain values.
        inputs: views, constants as arrays, or None where one is left out; in the order of ONNX.
    """

    op: str
    attributes: Mapping[str, Any]
    inputs: tuple[View | npt.NDArray[Any] | None, ...]
