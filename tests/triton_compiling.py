"""Kernels compiled for a GPU that need not be there: `python triton_compiling.py 16 96` prints, for
those numbers of channels, which instructions of each touch memory, as JSON; 0 stands for convolutions of more values than int32 counts.

Triton's interpreter and its compiler exclude each other in one process; so tests run this file in a process of its own.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq3d.engines.triton.convolution import prepare_convolve
from ptq3d.engines.triton.heads import prepare_attend
from ptq3d.engines.triton.normalization import prepare_normalize, prepare_normalize_rows
from ptq3d.engines.triton.place import Launch
from ptq3d.engines.triton.pointwise import prepare_enter, prepare_pointwise
from ptq3d.engines.triton.products import Tile
from ptq3d.engines.triton.sampling import prepare_pool, prepare_resize
from ptq3d.engines.triton.steps import (
    Activation,
    Attend,
    Convolve,
    Enter,
    Epilogue,
    Normalize,
    NormalizeRows,
    Pointwise,
    Pool,
    Resize,
    View,
)

TYPES = {"int8": torch.int8, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {torch.int8: "*i8", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
MEMORY = re.compile(r"\b(?:ld|st|atom|red)\.(?:global|shared)[.\w]*")


class Nowhere:
    """A `Place` of tensors without memory."""

    def view(self, view: View) -> Tensor:
        return torch.empty_strided(view.shape, view.strides, dtype=TYPES[view.dtype], device="meta")

    def constant(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to("meta")

    def sums(self, buffer: int) -> Tensor:
        return torch.empty((1,), dtype=torch.int64, device="meta")

    def scratch(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")


def image(channels: int, size: int, dtype: str = "int8", *, pitch: int | None = None, step: float = 0.03) -> View:
    """A channels-last view of a cube."""
    pitch = pitch or channels
    strides = (size**3 * pitch, 1, size**2 * pitch, size * pitch, pitch)
    scale = (step, -128) if dtype == "int8" else ()
    return View(0, 0, (1, channels, size, size, size), strides, dtype, *scale)  # type: ignore[arg-type]


def compiled(launch: Launch) -> Any:
    """A launch as Triton compiles it on the spot, for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[(place,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def launches(channel_counts: Iterable[int]) -> dict[str, Launch]:
    """One launch of each kernel and kind of tensor, by name."""
    place, found = Nowhere(), {}
    relu = Epilogue(Activation("leaky_relu", 0.01))
    for channels in channel_counts:
        x, out, half = image(channels, 64), image(channels, 64, step=0.02), image(channels, 64, "fp16")
        wide, other = image(channels, 64, pitch=2 * channels), image(channels, 64, step=0.04)
        ones = np.ones(channels, np.float32)
        adding = Epilogue(other=other, last=Activation("relu"))
        steps = {
            "pointwise": Pointwise("", out, x, epilogue=relu),
            "pointwise sliced": Pointwise("", wide, x, epilogue=relu),
            "pointwise added": Pointwise("", out, x, ones, ones, adding),
            "pointwise from fp16": Pointwise("", out, half),
        }
        found |= {f"{name} {channels}": prepare_pointwise(step, place).all[0] for name, step in steps.items()}
        norm = prepare_normalize(Normalize("", out, x, channels, ones, ones, 1e-5, 0, False, relu), place).all
        found |= {f"sum {channels}": norm[0], f"normalize {channels}": norm[-1]}
        group = prepare_normalize(Normalize("", wide, x, 2, ones, ones, 1e-5, 0, True, relu), place).all
        found |= {f"moments {channels}": group[0], f"normalize groups sliced {channels}": group[-1]}
        rows = NormalizeRows("", out.as_rows(), x.as_rows(), ones, ones, 1e-5)
        found[f"normalize rows {channels}"] = prepare_normalize_rows(rows, place).all[0]
        small = image(channels, 32)
        for kind in ("max", "average"):
            pool = Pool("", image(channels, 32), x, kind, (2, 2, 2), (2, 2, 2), (0,) * 6)
            found[f"pool {kind} {channels}"] = prepare_pool(pool, place).all[0]
        for mode in ("nearest", "linear"):
            found[f"resize {mode} {channels}"] = prepare_resize(Resize("", x, small, mode), place).all[0]
    heads = View(0, 0, (343, 3, 343, 16), (49392, 16, 144, 1), "fp16")
    mask = np.zeros((1, 3, 343, 343), np.float32)
    found["attend"] = prepare_attend(Attend("", heads, heads, heads, heads, 0.25, mask), place).all[0]
    for channels in (1, 4):
        strides = (channels * 64**3, 64**3, 64**2, 64, 1)
        first = View(0, 0, (1, channels, 64, 64, 64), strides, "fp32")
        found[f"enter {channels}"] = prepare_enter(Enter("", image(channels, 64), first), place).all[0]
    return found


def wide_convolutions() -> dict[str, Launch]:
    """Convolutions whose tensors have more values than int32 counts, by their tiling."""
    x, ones = image(16, 1024), np.ones(16, np.float32)
    step = Convolve("", x, x, np.ones((16, 16, 3, 3, 3), np.int8), ones, pads=(1,) * 6, epilogue=Epilogue(other=x))
    tiles = [
        Tile("all", 1, 1, 64, 16, 64, 2, 4),
        Tile("tap", 1, 1, 64, 16, 32, 2, 4),
        Tile("line", 2, 1, 64, 32, 64, 2, 4),
    ]
    tiles += [Tile("tap", 1, 2, 64, 16, 32, 2, 4), Tile("line", 2, 2, 64, 32, 64, 2, 4)]
    return {f"{tile.mode} {tile.lines}": prepare_convolve(step, Nowhere(), tile) for tile in tiles}


if __name__ == "__main__":
    channels = [int(word) for word in sys.argv[1:]]
    found = wide_convolutions() if channels == [0] else launches(channels)
    kernels = {name: compiled(launch) for name, launch in found.items()}
    counts = {name: collections.Counter(MEMORY.findall(kernel.asm["ptx"])) for name, kernel in kernels.items()}
    sys.stdout.write(json.dumps(counts))
