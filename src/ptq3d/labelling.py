"""Finished planes of features -> the label map on the grid of the file, slab by slab.

labels(v) = argmax_k head(resample_linear(features)(v)), which is argmax of linearly resampled logits: head and resampling are both linear.

Two facts make it cheap and change no label: the head runs only once a voxel, and a class that wins at all eight neighbours of a
place wins at every weighted mean of them. So features are resampled only where the neighbours' labels differ, at borders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptq3d.head import Classifier, label_type
from ptq3d.volumes.resample import Axis, parallel_axes, snapped
from ptq3d.volumes.volume import Affine, Grid, Shape, voxel_map
from ptq3d.windows import Slab, planes_at_once

CHUNK = 1 << 19  # voxels whose features are resampled at a time
Box: TypeAlias = tuple[slice, slice, slice]


def labels_on(
    target: Grid,
    slabs: Iterable[Slab],
    source: Grid,
    classify: Classifier,
    *,
    classes: int,
    cropped: bool = False,
    device: torch.device | None = None,
) -> NDArray[np.unsignedinteger]:
    """The label map on `target`.

    Args:
        target: shape and affine of the file.
        slabs: blended features on `source`, in order.
        source: the preprocessed grid.
        classify: head and argmax.
        classes: K; above 256 the result is uint16.
        cropped: `source` covers a part of the volume only: what lies outside is background, not the nearest voxel's label.
        device: of the slabs; labels leave it once, at the end. Default: the CPU.

    Returns:
        (X, Y, Z) uint8 or uint16.
    """
    shape = target[0]
    to_source = voxel_map(source[1], target[1])
    axes = parallel_axes(to_source, shape, sizes=source[0], mode="linear")
    labels = torch.zeros(shape, dtype=label_type(classes), device=device)
    if axes is None:
        _paint_oblique(labels, slabs, to_source, source[0], classify=classify, cropped=cropped)
    else:
        order = [[axis.source for axis in axes].index(source_axis) for source_axis in range(3)]
        by_source = [axes[place] for place in order]
        for part, piece in _parallel_pieces(slabs, by_source, classify):
            labels.permute(order)[part] = piece
        if cropped:
            for place, axis in enumerate(axes):
                labels.movedim(place, 0)[torch.from_numpy(~axis.inside)] = 0
    return labels.cpu().numpy().astype(np.uint8 if classes <= 256 else np.uint16, copy=False)


def labels_of(
    slabs: Iterable[Slab], shape: Shape, classify: Classifier, *, classes: int, device: torch.device | None = None
) -> NDArray[np.unsignedinteger]:
    """The label map on the grid of the slabs; see `labels_on`."""
    identity = (shape, np.eye(4))
    return labels_on(identity, slabs, identity, classify, classes=classes, device=device)


def _classified(values: Tensor, classify: Classifier, seen: Tensor | None) -> Tensor:
    """(X, Y, Z) classes of (X, Y, Z, F) features, a few planes at a time; 0 where no window looked."""
    parts = torch.split(values, planes_at_once(len(values), values.device))
    labels = torch.cat([classify(part.reshape(-1, part.shape[-1])).view(part.shape[:-1]) for part in parts])
    return labels if seen is None else labels.where(seen, 0)


def _parallel_pieces(slabs: Iterable[Slab], axes: list[Axis], classify: Classifier) -> Iterator[tuple[Box, Tensor]]:
    """Boxes of the result, its axes in the source's order, and their labels.

    Args:
        slabs: in order.
        axes: of the result, by the axis of the source they run along.
        classify: head and argmax.
    """
    done: NDArray[np.bool_] | None = None
    for slab in slabs:
        along = axes[slab.axis]
        done = np.zeros(len(along.lower), bool) if done is None else done
        last = slab.first + slab.values.shape[slab.axis] - 1
        ready = np.flatnonzero((along.upper <= last) & ~done)
        if not len(ready):
            continue
        part = slice(int(ready[0]), int(ready[-1]) + 1)
        done[part] = True
        box = [part if axis == slab.axis else slice(None) for axis in range(3)]
        yield (box[0], box[1], box[2]), _piece(slab, axes, box, classify)


def _piece(slab: Slab, axes: list[Axis], box: list[slice], classify: Classifier) -> Tensor:
    """Labels of the voxels in `box`: those of the lower neighbours, and the head's where the neighbours disagree."""
    labels = _classified(slab.values, classify, slab.seen)
    steps = [_steps(slab, axis, along, part) for axis, (along, part) in enumerate(zip(axes, box, strict=True))]
    resampled = [axis for axis in range(3) if axes[axis].weight is not None]
    result = _gathered(labels, steps)
    if not resampled:
        return result
    least, most = (_neighbours(labels, resampled, extreme) for extreme in (torch.minimum, torch.maximum))
    mixed = _gathered(least != most, steps)
    if slab.seen is not None:
        everywhere = _gathered(_neighbours(slab.seen, resampled, torch.logical_and), steps)
        result, mixed = result.where(everywhere, 0), mixed & everywhere
    rows = _rows(slab.values)
    for places in _chunks(mixed):
        parts = [step.at(place) for step, place in zip(steps, places, strict=True)]
        result[places] = classify(_interpolated(rows, parts, resampled)).to(result.dtype)
    return result


@dataclass(frozen=True)
class _Steps:
    """Voxels along one axis: (n,) index of the lower neighbour in the slab, rows to it, rows on to the upper one, its weight."""

    index: Tensor
    rows: Tensor
    onward: Tensor
    weight: Tensor

    def at(self, places: Tensor) -> _Steps:
        """Those of some voxels."""
        return _Steps(self.index[places], self.rows[places], self.onward[places], self.weight[places])


def _steps(slab: Slab, axis: int, along: Axis, part: slice) -> _Steps:
    device, stride = slab.values.device, slab.values.stride(axis) // slab.values.shape[-1]
    lower = along.lower[part] - (slab.first if axis == slab.axis else 0)
    onward = along.upper[part] - along.lower[part]
    weight = np.zeros(len(lower), np.float32) if along.weight is None else along.weight[part]
    return _Steps(*(torch.from_numpy(one).to(device) for one in (lower, lower * stride, onward * stride, weight)))


def _gathered(values: Tensor, steps: list[_Steps]) -> Tensor:
    for axis, step in enumerate(steps):
        values = values.index_select(axis, step.index)
    return values


def _neighbours(values: Tensor, axes: list[int], of_both: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A reduction over a voxel and the next ones along some axes; the last voxel of an axis is its own next."""
    for axis in axes:
        size = values.shape[axis]
        both = of_both(values.narrow(axis, 0, size - 1), values.narrow(axis, 1, size - 1))
        values = torch.cat([both, values.narrow(axis, size - 1, 1)], axis)
    return values


def _rows(values: Tensor) -> Tensor:
    """The memory of (X, Y, Z, F) as (rows, F), whatever lies between its voxels."""
    features = values.shape[-1]
    last = sum((size - 1) * stride for size, stride in zip(values.shape[:3], values.stride()[:3], strict=True))
    return values.as_strided((last // features + 1, features), (features, 1))


def _chunks(mixed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Indices of the true voxels, few enough at a time that their features stay small."""
    planes = max(CHUNK // max(mixed[0].numel(), 1), 1)
    for start in range(0, len(mixed), planes):
        found = mixed[start : start + planes].nonzero()
        found[:, 0] += start
        for chunk in torch.split(found, CHUNK):
            yield chunk.unbind(1)


def _interpolated(rows: Tensor, steps: list[_Steps], axes: list[int]) -> Tensor:
    """(V, F) features between the neighbours along `axes`, 2, 4 or 8 of them."""
    at = sum((step.rows for step in steps), torch.zeros((), dtype=torch.int64, device=rows.device))[:, None]
    share = torch.ones(at.shape, device=rows.device)
    for step in (steps[axis] for axis in axes):
        at = torch.cat([at, at + step.onward[:, None]], 1)
        share = torch.cat([share * (1 - step.weight[:, None]), share * step.weight[:, None]], 1)
    return torch.nn.functional.embedding_bag(at, rows, mode="sum", per_sample_weights=share)


def _paint_oblique(
    labels: Tensor, slabs: Iterable[Slab], to_source: Affine, shape: Shape, *, classify: Classifier, cropped: bool
) -> None:
    """Grids whose axes are not parallel: all features are held, and every voxel is resampled, a plane at a time."""
    whole, seen = _assembled(slabs, shape)
    if whole is None:
        return
    seen = _neighbours(seen, [0, 1, 2], torch.logical_and).view(-1)
    y, z = np.meshgrid(np.arange(labels.shape[1]), np.arange(labels.shape[2]), indexing="ij")
    for x, plane in enumerate(labels):
        places = to_source[:3] @ np.stack([np.full(y.size, x), y.ravel(), z.ravel(), np.ones(y.size)])
        steps = [
            _oblique_steps(place, size, stride, whole.device)
            for place, size, stride in zip(places, shape, (shape[1] * shape[2], shape[2], 1), strict=True)
        ]
        found = classify(_interpolated(whole.view(-1, whole.shape[-1]), steps, [0, 1, 2]))
        counted = seen[sum((step.rows for step in steps), torch.zeros_like(steps[0].rows))]
        if cropped:
            inside = [(place >= -0.5) & (place <= size - 0.5) for place, size in zip(places, shape, strict=True)]
            counted &= torch.from_numpy(np.logical_and.reduce(inside)).to(counted.device)
        plane.copy_(found.where(counted, 0).view(plane.shape))


def _assembled(slabs: Iterable[Slab], shape: Shape) -> tuple[Tensor | None, Tensor]:
    """Features (X, Y, Z, F) of the whole volume and where windows looked; None where none did."""
    whole, seen = None, torch.zeros(shape, dtype=torch.bool)
    for slab in slabs:
        if whole is None:
            whole = torch.zeros((*shape, slab.values.shape[-1]), device=slab.values.device)
            seen = seen.to(whole.device)
        part = (slab.axis, slab.first, slab.values.shape[slab.axis])
        whole.narrow(*part).copy_(slab.values)
        seen.narrow(*part).copy_(torch.ones_like(seen.narrow(*part)) if slab.seen is None else slab.seen)
    return whole, seen


def _oblique_steps(places: NDArray[np.float64], size: int, stride: int, device: torch.device) -> _Steps:
    places = snapped(places, size)
    lower = np.floor(places).astype(np.int64)
    onward, weight = np.minimum(lower + 1, size - 1) - lower, (places - lower).astype(np.float32)
    return _Steps(*(torch.from_numpy(one).to(device) for one in (lower, lower * stride, onward * stride, weight)))
