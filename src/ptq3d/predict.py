"""The case flow in one page: volume -> preprocessing -> windows -> engine -> blend -> head, argmax, the file's grid, slab by slab."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ptq3d.engines.base import Engine, EngineSpec
from ptq3d.errors import OptionError, ShapeError
from ptq3d.manifest import Manifest
from ptq3d.options import CaseOptions
from ptq3d.progress import Progress, silent
from ptq3d.volumes.cropping import box_of, crop, surround
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.resample import parallel_axes, resample_onto
from ptq3d.volumes.volume import Grid, Shape, Volume, voxel_map

if TYPE_CHECKING:
    from torch import Tensor

    from ptq3d.windows import Windowing

READING_BYTES = 20  # a voxel: the file's bytes, its array, float64 where it has a slope, float32, what is not finite
LABELLING_BYTES = 300_000_000  # features and logits of the voxels whose labels are made at a time, and their indices


@dataclass(frozen=True)
class Prepared:
    """A volume as the network sees it, and where its labels go.

    Args:
        image: (C, X, Y, Z) float32, preprocessed; cropped where `cropped`.
        target: the file's grid.
        cropped: labels outside `image` are background.
        seconds: what preparing it took.
    """

    image: Volume
    target: Grid
    cropped: bool
    seconds: float


@dataclass(frozen=True)
class Answer:
    """The labels of one volume.

    Args:
        labels: (1, X, Y, Z) uint8 or uint16 on the file's grid.
        windows: that the network saw.
        seconds: network (waiting for its answers) and stitch (blending, head, argmax, the way back to the file's grid). A GPU's
            answers are queued, not waited for: its time is in stitch.
    """

    labels: Volume
    windows: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def prepared_case(image: Volume, preprocessing: Preprocessing, options: CaseOptions) -> Prepared:
    """Preprocess a volume, which may crop it, and crop it where asked.

    Raises:
        InputError: see `Preprocessing.apply`.
    """
    start = perf_counter()
    ready, cropped = preprocessing.apply(image), preprocessing.crop != "none"
    if options.crop == "foreground":
        ready, cropped = crop_foreground(ready), True
    return Prepared(ready, image.grid, cropped, perf_counter() - start)


def crop_foreground(image: Volume) -> Volume:
    """The box of all voxels above the image's lowest value (air after a CT window, the background of a skull-stripped MR).

    Args:
        image: (C, X, Y, Z) float32, preprocessed.

    Returns:
        A view; the image itself where all its voxels have one value.
    """
    return crop(image, box_of((image.data > image.data.min(axis=(1, 2, 3), keepdims=True)).any(axis=0)))


def windowing_of(shape: Shape, spec: EngineSpec, manifest: Manifest, *, outside: float, skip_empty: bool) -> Windowing:
    """Windows along the axis that holds the least at a time: the one that is the most windows long."""
    from ptq3d.windows import Windowing

    axis = max(range(3), key=lambda one: (shape[one] / spec.window[one], -one))
    return Windowing(spec.window, manifest.overlap, outside, axis, skip_empty, manifest.blending)


def predict_labels(
    prepared: Prepared,
    engine: Engine,
    manifest: Manifest,
    preprocessing: Preprocessing,
    options: CaseOptions,
    *,
    progress: Progress = silent,
) -> Answer:
    """The label map of a volume, on its file's grid.

    Args:
        prepared: the volume.
        engine: takes windows of it.
        manifest: overlap and classes.
        preprocessing: what it was prepared with.
        options: how labels come back, and which windows are left out.

    Raises:
        ShapeError: the volume has other channels than the network, or the engine other classes than the manifest.
        EngineError: the runtime failed.
    """
    import torch

    from ptq3d.labelling import labels_of, labels_on
    from ptq3d.windows import slabs

    require_fitting(prepared.image.data.shape[0], engine, manifest)
    start = perf_counter()
    windowing = windowing_of(
        prepared.image.shape, engine.spec, manifest, outside=preprocessing.outside, skip_empty=options.skip_empty
    )
    stream = _Timed(engine)
    image = torch.from_numpy(np.ascontiguousarray(prepared.image.data)).to(engine.device)
    planes = slabs(image, stream, windowing, progress=progress)
    classify, source = engine.classifier(engine.head), prepared.image.grid
    classes, device = manifest.classes, engine.device
    with _torch_threads(engine.beside):
        if options.restore == "logits":
            target, cropped = prepared.target, prepared.cropped
            labels = labels_on(target, planes, source, classify, classes=classes, cropped=cropped, device=device)
        else:
            found = labels_of(planes, source[0], classify, classes=classes, device=device)
            labels = _restored(Volume(found[None], prepared.image.affine), prepared, preprocessing)
    seconds = {"network": stream.seconds, "stitch": perf_counter() - start - stream.seconds}
    return Answer(Volume(labels[None], prepared.target[1]), stream.windows, seconds)


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """PyTorch with so many threads; 0 leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _restored(labels: Volume, prepared: Prepared, preprocessing: Preprocessing) -> np.ndarray:
    """Labels by nearest neighbour on the file's grid; those outside a crop are background."""
    restored: np.ndarray
    if prepared.cropped:
        restored = resample_onto(surround(labels), *prepared.target, mode="nearest").data[0]
    else:
        restored = preprocessing.restore_labels(labels.data[0], prepared.target).data[0]
    return restored


class _Timed:
    """An engine's stream that counts its windows and the seconds for which its answers were waited for."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.seconds, self.windows = engine, 0.0, 0

    def __call__(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        answers = self._engine.stream(windows)
        while True:
            start = perf_counter()
            answer = next(answers, None)
            self.seconds += perf_counter() - start
            if answer is None:
                return
            self.windows += 1
            yield answer


def require_fitting(channels: int, engine: Engine, manifest: Manifest) -> None:
    """Refuse volumes that an engine cannot take, and engines that do not give what their manifest says.

    Raises:
        ShapeError: see above.
    """
    if channels != engine.spec.channels:
        raise ShapeError(
            f"the network takes {engine.spec.channels} channels, the volume has {channels}. Give it the images it was trained on."
        )
    if engine.head.classes != manifest.classes:
        raise ShapeError(
            f"the engine gives {engine.head.classes} classes, its manifest names {manifest.classes}. Give the right --label-map."
        )


@dataclass(frozen=True)
class Needed:
    """What one volume adds to the memory of a process whose engine has run already, in bytes; upper bounds.

    Args:
        reading: the file, its array, float32, the preprocessed volume.
        segmenting: the preprocessed volume, sums of one window's thickness, labels and what makes them.
    """

    reading: int
    segmenting: int


def estimated_bytes(target: Grid, engine: Engine, manifest: Manifest, preprocessing: Preprocessing) -> Needed:
    """The memory that a volume needs, by its header.

    Args:
        target: the file's grid.
        engine: of the network.
        manifest: overlap.
        preprocessing: gives the grid of the windows.
    """
    shape, affine = preprocessing.grid(target)
    spec, voxels = engine.spec, math.prod(target[0])
    windowing = windowing_of(shape, spec, manifest, outside=0.0, skip_empty=False)
    padded = [max(size, width) for size, width in zip(shape, spec.window, strict=True)]
    image = 4 * spec.channels * math.prod(padded)
    thick = spec.window[windowing.axis] + 1
    sums = 4 * (spec.features + 1) * math.prod(padded) // padded[windowing.axis] * thick
    labelling = 4 * voxels * min(thick, shape[windowing.axis]) // shape[windowing.axis] + LABELLING_BYTES
    if parallel_axes(voxel_map(affine, target[1]), target[0], sizes=shape, mode="linear") is None:
        labelling += (4 * spec.features + 2) * math.prod(shape)
    copies = 1 if preprocessing.resampling == "linear" else 3  # a matrix product reads a transposed copy
    return Needed(READING_BYTES * voxels * spec.channels + copies * image, image + sums + 2 * voxels + labelling)


def require_memory(needed: Mapping[str, Needed], limit: int, resident: int, *, ahead: bool) -> None:
    """Refuse volumes that would need more memory than allowed.

    Args:
        needed: case -> what it adds, in the order of the cases.
        limit: of the process, in bytes.
        resident: what it holds already, in bytes.
        ahead: the next volume is read while one is segmented.

    Raises:
        OptionError: names the first such case with its estimate.
    """
    following = [one.reading if ahead else 0 for one in needed.values()][1:]
    for (name, one), read in zip(needed.items(), [*following, 0], strict=False):
        adds = max(one.reading, one.segmenting + read)
        if resident + adds > limit:
            beside = " and reading the next one beside it" if read else ""
            raise OptionError(
                f"{name} would need about {(resident + adds) / 1e9:.2f} GB (engine and libraries {resident / 1e9:.2f} GB, the volume"
                f"{beside} {adds / 1e9:.2f} GB), more than --max-memory {limit / 1e9:g}. Nothing was segmented. "
                f"Raise the limit, {'give --threads 1, ' if read else ''}or give a smaller volume."
            )
