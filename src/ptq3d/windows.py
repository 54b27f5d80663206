"""Cover a volume with overlapping windows and blend what a network says of each, slab by slab.

Equal to MONAI's `sliding_window_inference(sigma_scale=0.125, padding_mode="constant")` in both its modes, or to nnU-Net's
predictor. Windows are visited along one axis, so that planes which no later window sees leave at once: what is held is one window thick.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ptq3d.errors import OptionError, ShapeError

Size: TypeAlias = tuple[int, int, int]
Stream: TypeAlias = Callable[[Iterable[Tensor]], Iterator[Tensor]]
"""Windows (C, X, Y, Z) float32 -> answers (F, X, Y, Z) float32, uint8 or int8 on the same voxels, one for one, in order."""
Box: TypeAlias = tuple[slice, slice, slice]

SIGMA = 0.125  # standard deviation of the Gaussian, share of the window's size
SMALLEST_IMPORTANCE = 1e-3
BLENDINGS = ("gaussian", "constant", "nnunet")
ANSWERS = (torch.float32, torch.uint8, torch.int8)


def window_starts(shape: Size, window: Size, overlap: float) -> list[Size]:
    """First voxels of the windows that cover a volume, the last axis running fastest.

    Args:
        shape: (X, Y, Z) in voxels. An axis shorter than the window counts as padded to it: its only start is 0.
        window: (X, Y, Z) in voxels.
        overlap: share of the window that neighbours have in common, 0 <= overlap < 1.

    Raises:
        OptionError: a window that is not three numbers above 0, or an overlap outside [0, 1).

    Source: equal to MONAI dense_patch_slices with _get_scan_interval.
    """
    require_windowing(window, overlap)
    xs, ys, zs = (_starts(max(size, width), width, overlap) for size, width in zip(shape, window, strict=True))
    return list(itertools.product(xs, ys, zs))


def even_starts(shape: Size, window: Size, overlap: float) -> list[Size]:
    """First voxels of windows spread evenly over a volume, as few as overlap at least so much; the last axis running fastest.

    Args:
        shape: see `window_starts`.
        window: see `window_starts`.
        overlap: see `window_starts`.

    Raises:
        OptionError: see `window_starts`.

    Source: equal to nnU-Net compute_steps_for_sliding_window with tile_step_size = 1 - overlap.
    """
    require_windowing(window, overlap)
    xs, ys, zs = (
        _even(max(size, width) - width, width * (1 - overlap)) for size, width in zip(shape, window, strict=True)
    )
    return list(itertools.product(xs, ys, zs))


def _even(last: int, step: float) -> list[int]:
    number = math.ceil(last / step)
    return [round(last / number * index) for index in range(number + 1)] if number else [0]


def require_windowing(window: Size, overlap: float) -> None:
    """Refuse windows that cannot cover anything.

    Raises:
        OptionError: a window that is not three numbers above 0, or an overlap outside [0, 1).
    """
    if len(window) != 3 or min(window) < 1:
        raise OptionError(f"a window is three sizes in voxels above 0, got {tuple(window)}.")
    if not 0.0 <= overlap < 1.0:
        raise OptionError(f"the overlap of windows must be at least 0 and below 1, got {overlap}.")


def _starts(size: int, width: int, overlap: float) -> list[int]:
    step = max(int(width * (1.0 - overlap)), 1)
    return [min(start, size - width) for start in range(0, size - width + step, step)]


def gaussian_importance(window: Size) -> Tensor:
    """The weight of each voxel of a window when windows are blended.

    w(x, y, z) = max(g(x) g(y) g(z), 1e-3, or the smallest product if that is larger),
    g(i) = exp(-(i - (n - 1) / 2)^2 / (2 (n / 8)^2))

    Args:
        window: (X, Y, Z) in voxels.

    Returns:
        (X, Y, Z) float32, at most 1.

    Source: equal to MONAI compute_importance_map(mode="gaussian", sigma_scale=0.125).
    """
    x, y, z = (_gaussian(width) for width in window)
    importance = x[:, None, None] * y[:, None] * z
    return importance.clamp_(min=max(float(importance.min()), SMALLEST_IMPORTANCE))


def _gaussian(width: int) -> Tensor:
    middle = (width - 1) / 2.0
    places = torch.arange(-middle, middle + 1.0, dtype=torch.float32)
    return torch.exp(places**2 / (-2.0 * (SIGMA * width) ** 2))


def nnunet_importance(window: Size) -> Tensor:
    """nnU-Net's weight of each voxel of a window: a Gaussian around voxel n // 2, cut at 4 standard deviations, at most 1.

    Args:
        window: (X, Y, Z) in voxels.

    Returns:
        (X, Y, Z) float32; where the Gaussian is cut, its smallest value elsewhere.

    Source: equal to nnU-Net compute_gaussian(sigma_scale=1/8) up to its factor; it rounds to float16.
    """
    from scipy.ndimage import gaussian_filter1d

    sides = [gaussian_filter1d(np.eye(width)[width // 2], SIGMA * width, mode="constant") for width in window]
    x, y, z = (torch.from_numpy(side / side.max()) for side in sides)
    importance = x[:, None, None] * y[:, None] * z
    return importance.clamp_(min=float(importance[importance > 0].min())).float()


def importance_of(window: Size, blending: str) -> Tensor:
    """(X, Y, Z) float32 weights of the voxels of a window, by the name of a blending."""
    if blending == "constant":
        return torch.ones(window)
    return nnunet_importance(window) if blending == "nnunet" else gaussian_importance(window)


@dataclass(frozen=True)
class Slab:
    """Finished planes: everything along two axes, a few places along the third.

    Args:
        axis: of X, Y, Z, the one along which they are few.
        first: place of the first plane along it.
        values: (X, Y, Z, F) float32, the blended answers, channels last; valid until the next slab is asked for. From the
            second slab on it starts with the last plane of the slab before, so that a caller can interpolate between them.
        seen: (X, Y, Z) bool, False where every window was left out; None where none was.
    """

    axis: int
    first: int
    values: Tensor
    seen: Tensor | None


@dataclass(frozen=True)
class Windowing:
    """How windows cover a volume.

    Args:
        window: (X, Y, Z) in voxels.
        overlap: share of the window that neighbours have in common, 0 <= overlap < 1.
        outside: value around volumes smaller than the window, in the unit of the image.
        axis: of X, Y, Z, along which windows are visited and planes leave.
        skip_empty: leave out windows of a single value, which hold only padding or air.
        blending: "gaussian" and "constant" place and weigh windows as MONAI's modes of these names do, "nnunet" as nnU-Net does.

    Raises:
        OptionError: see `window_starts`; an unknown blending.
    """

    window: Size
    overlap: float = 0.5
    outside: float = 0.0
    axis: int = 0
    skip_empty: bool = False
    blending: str = "gaussian"

    def __post_init__(self) -> None:
        require_windowing(self.window, self.overlap)
        if self.blending not in BLENDINGS:
            raise OptionError(f"no blending '{self.blending}'. Choose one of: {', '.join(BLENDINGS)}.")

    def starts(self, shape: Size) -> list[Size]:
        """First voxels of the windows on a volume, those along `axis` in order."""
        place = even_starts if self.blending == "nnunet" else window_starts
        return sorted(place(shape, self.window, self.overlap), key=lambda start: start[self.axis])


def blend(
    image: Tensor, stream: Stream, windowing: Windowing, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """The weighted mean of a network's answers over all windows that see a voxel.

    answer(v) = sum_w importance(v - start_w) network(window_w)(v - start_w) / sum_w importance(v - start_w)

    Args:
        image: (C, X, Y, Z) float32. Axes shorter than the window are padded half before, half after, and cropped again.
        stream: the network.
        windowing: where the windows are.
        progress: called with (windows done, windows in all) after every answer.

    Returns:
        (F, X, Y, Z) float32; F is what `stream` gives. 0 where every window was left out.

    Raises:
        ShapeError: `image` is not (C, X, Y, Z) float32, or `stream` changes the shape of the windows.

    Source: equal to MONAI sliding_window_inference, bit for bit along axis 0 where the network's answers are; to nnU-Net's predictor
        where it blends in float32.
    """
    whole = torch.empty(0)
    for slab in slabs(image, stream, windowing, progress=progress):
        if not whole.numel():
            whole = torch.zeros((slab.values.shape[-1], *image.shape[1:]), device=image.device)
        whole.narrow(1 + slab.axis, slab.first, slab.values.shape[slab.axis]).copy_(slab.values.movedim(-1, 0))
    return whole


def slabs(
    image: Tensor, stream: Stream, windowing: Windowing, *, progress: Callable[[int, int], None] | None = None
) -> Iterator[Slab]:
    """`blend` in pieces along `windowing.axis`, each as soon as no later window sees it.

    Args:
        image: see `blend`.
        stream: see `blend`.
        windowing: see `blend`.
        progress: see `blend`.

    Yields:
        Slabs in order, which cover the volume; none where every window was left out.

    Raises:
        ShapeError: see `blend`.
    """
    if image.ndim != 4 or image.numel() == 0 or image.dtype != torch.float32:
        raise ShapeError(f"an image to blend must be (C, X, Y, Z) float32, got {tuple(image.shape)} {image.dtype}.")
    padded, inside = _padded(image, windowing)
    shape: Size = (padded.shape[1], padded.shape[2], padded.shape[3])
    boxes = [_box(start, windowing.window) for start in windowing.starts(shape)]
    if windowing.skip_empty:
        boxes = [box for box in boxes if padded[:, *box].amin() != padded[:, *box].amax()]
    blended: _Blended | None = None
    answers = stream(padded[:, *box].contiguous() for box in boxes)
    for done, (box, answer) in enumerate(zip(boxes, answers, strict=True), 1):
        _require_answer(answer, windowing.window)
        if blended is None:
            blended = _Blended(shape, windowing, features=len(answer), device=image.device)
        yield from blended.finished(box[windowing.axis].start, inside)
        blended.add(box, answer)
        if progress is not None:
            progress(done, len(boxes))
    if blended is not None:
        yield from blended.finished(shape[windowing.axis], inside)


class _Blended:
    """Sums of answers and of their weights over one window's thickness, and the last finished plane in front of it.

    Args:
        shape: (X, Y, Z) of the padded volume.
        windowing: thickness, axis.
        features: F.
        device: of the sums.
    """

    def __init__(self, shape: Size, windowing: Windowing, *, features: int, device: torch.device) -> None:
        self._axis, self._skipped = windowing.axis, windowing.skip_empty
        self._importance = importance_of(windowing.window, windowing.blending).to(device)
        thick = list(shape)
        thick[self._axis] = windowing.window[self._axis] + 1
        self._sums = torch.zeros((*thick, features), device=device)
        self._at_once = planes_at_once(windowing.window[0], device)
        self._weights = torch.zeros(thick, device=device)
        self._first = 0  # place in the volume of plane 1 of the sums

    def add(self, box: Box, answer: Tensor) -> None:
        """sums += answer * importance, rounded twice as MONAI does."""
        x, y, z = (
            slice(part.start - self._first + 1, part.stop - self._first + 1) if axis == self._axis else part
            for axis, part in enumerate(box)
        )
        self._weights[x, y, z] += self._importance
        sums, planes = self._sums[x, y, z], answer.movedim(0, -1)
        product = torch.empty_like(sums[: self._at_once], memory_format=torch.contiguous_format)
        for first in range(0, len(sums), self._at_once):
            part = slice(first, first + self._at_once)
            total = sums[part]
            total += torch.mul(planes[part], self._importance[part, ..., None], out=product[: len(total)])

    def finished(self, end: int, inside: Box) -> Iterator[Slab]:
        """The planes in front of `end`, which then leave; cropped to the volume without its padding."""
        while self._first < end:
            number = min(
                end - self._first, self._weights.shape[self._axis] - 1
            )  # fewer than all behind skipped windows
            sums, weights = (tensor.narrow(self._axis, 1, number) for tensor in (self._sums, self._weights))
            sums /= weights.where(weights > 0, 1.0)[..., None]
            yield self._slab(number, inside)
            for tensor in (self._sums, self._weights):
                _shift(tensor, self._axis, number, self._at_once)
            self._first += number

    def _slab(self, number: int, inside: Box) -> Slab:
        carried = min(self._first, 1)
        values, weights = (
            tensor.narrow(self._axis, 1 - carried, number + carried) for tensor in (self._sums, self._weights)
        )
        crop = tuple(
            slice(None) if axis == self._axis and part.stop > size else part
            for axis, (part, size) in enumerate(zip(inside, weights.shape, strict=True))
        )
        seen = weights[crop] > 0 if self._skipped else None
        return Slab(self._axis, self._first - carried, values[crop], seen)


def _shift(tensor: Tensor, axis: int, number: int, at_once: int) -> None:
    """Planes move `number` places to the front, in place and so many at a time; zeros follow."""
    kept = tensor.shape[axis] - number
    at_once = min(at_once, number)  # what is read in one go must not be written before
    for place in range(0, kept, at_once):
        length = min(at_once, kept - place)
        tensor.narrow(axis, place, length).copy_(tensor.narrow(axis, place + number, length))
    tensor.narrow(axis, kept, number).zero_()


def planes_at_once(planes: int, device: torch.device) -> int:
    """How many planes to work on at a time: one where products should stay in the cache, all where launches cost more than memory."""
    return 1 if device.type == "cpu" else planes


def _box(start: Size, window: Size) -> Box:
    x, y, z = (slice(first, first + width) for first, width in zip(start, window, strict=True))
    return x, y, z


def _padded(image: Tensor, windowing: Windowing) -> tuple[Tensor, Box]:
    """The image with no axis shorter than the window, and where in it the image lies."""
    missing = [max(width - size, 0) for width, size in zip(windowing.window, image.shape[1:], strict=True)]
    before = [lack // 2 for lack in missing]
    x, y, z = (slice(first, first + size) for first, size in zip(before, image.shape[1:], strict=True))
    if not any(missing):
        return image, (x, y, z)
    padding = [side for lack in reversed(missing) for side in (lack // 2, lack - lack // 2)]
    return torch.nn.functional.pad(image, padding, value=windowing.outside), (x, y, z)


def _require_answer(answer: Tensor, window: Size) -> None:
    if answer.ndim != 4 or not answer.numel() or tuple(answer.shape[1:]) != tuple(window):
        raise ShapeError(
            f"the network was given windows of {tuple(window)} voxels and must answer (F, X, Y, Z) on the same voxels, "
            f"got {tuple(answer.shape)}."
        )
    if answer.dtype not in ANSWERS:
        raise ShapeError(f"the network must answer float32, uint8 or int8, got {answer.dtype}.")
