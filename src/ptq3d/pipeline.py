"""The model flow around the network file: train, calibrate, and what all of its verbs share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptq3d.data import find_data, with_labels, without_labels
from ptq3d.datasets.cases import Case, read_image, read_labels
from ptq3d.datasets.dataset import Dataset
from ptq3d.datasets.label_map import LabelMap
from ptq3d.datasets.layouts import open_dataset
from ptq3d.errors import LabelError, OptionError
from ptq3d.graphs.files import load_graph, static_input_shape
from ptq3d.manifest import embedded
from ptq3d.options import CalibrateOptions, TrainOptions
from ptq3d.progress import Progress, bar, silent
from ptq3d.quantization import calibration
from ptq3d.volumes.preprocessing import PRESETS, Preprocessing

if TYPE_CHECKING:
    from ptq3d.training import TrainingResult

log = logging.getLogger("ptq3d")
DEFAULT_WINDOW = (96, 96, 96)
SEED_EPOCHS = 460  # what the seed's document trains for


@dataclass(frozen=True)
class Written:
    """What a verb wrote and found.

    Args:
        path: the file or folder.
        size_bytes: of the network in it, without the manifest.
        facts: what else there is to report, JSON-able.
    """

    path: Path
    size_bytes: int
    facts: Mapping[str, Any]


def preprocessing_of(name: str) -> Preprocessing:
    """A preset by its name, or what a TOML or JSON file says.

    Raises:
        OptionError: neither a preset nor a file.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_file():
        raise OptionError(f"preprocessing '{name}' is neither a preset ({', '.join(PRESETS)}) nor a file.")
    return Preprocessing.load(Path(name))


def class_names(label_map: Path | None, described: Iterable[str] | None, classes: int) -> tuple[str, ...]:
    """Names of a network's classes: from a label map, else as described, else BTCV's for 14, else numbers.

    Raises:
        LabelError: another number of names than of classes.
    """
    from ptq3d.datasets.btcv import BTCV_ORGANS

    if label_map is not None:
        names = LabelMap.load(label_map).names
    elif described is not None:
        names = tuple(described)
    elif classes == len(BTCV_ORGANS):
        names = BTCV_ORGANS
    else:
        names = ("background", *(f"class {index}" for index in range(1, classes)))
    if len(names) != classes:
        raise LabelError(
            f"{len(names)} class names ({', '.join(names[:3])}, ...) for a network with {classes} outputs. Give a --label-map that fits."
        )
    return names


def calibrate(options: CalibrateOptions) -> Written:
    """Volumes -> a file of calibration windows, through the preprocessing of the network.

    Raises:
        FileError: no volume, or an unreadable one.
        OptionError: nothing says how to prepare the volumes.
    """
    prepared, window = _calibration_setting(options)
    found = find_data(options.data, options.labels, split=options.split, usual=("train",), series=options.series)
    cases = list((found if options.labels is not None else without_labels(found)).cases)
    _warn_of_test_cases(cases, options.test_data or _test_sibling(options.data))
    hashes: dict[str, str] = {}
    with bar("Calibrate", quiet=options.quiet) as progress:
        windows = (
            piece[0]
            for piece in case_windows(
                cases, prepared, window, options.number, seed=options.seed, hashes=hashes, progress=progress
            )
        )
        calibration.save_windows(options.output, windows, options.number, hashes)
    facts = {"windows": options.number, "window": list(window), "cases": hashes}
    return Written(options.output, options.output.stat().st_size, facts)


def _calibration_setting(options: CalibrateOptions) -> tuple[Preprocessing, tuple[int, int, int]]:
    manifest = None
    window = options.window
    if options.onnx_path is not None:
        model = load_graph(options.onnx_path)
        manifest = embedded(model, where=options.onnx_path)
        window = static_input_shape(model)[2:]
    if options.preprocessing is not None:
        return preprocessing_of(options.preprocessing), _filled(window or DEFAULT_WINDOW)
    if manifest is None or manifest.preprocessing is None:
        raise OptionError(
            "nothing says how to prepare the volumes. Give --onnx-path of a network with a manifest, or --preprocessing btcv | FILE."
        )
    return manifest.preprocessing, _filled(window or manifest.window)


def _filled(window: tuple[int, int, int]) -> tuple[int, int, int]:
    """The same window, unless nothing is in it."""
    if min(window) < 1:
        raise OptionError(f"--window {' '.join(map(str, window))}: every side of a window must be 1 voxel or more.")
    return window


def _test_sibling(data: Path) -> Path | None:
    """test/images of a BTCV-layout folder, for a path such as train/images or test/images."""
    candidate = data.resolve().parent.parent / "test" / data.name
    return candidate if data.is_dir() and candidate.is_dir() else None


def _warn_of_test_cases(cases: Iterable[Case], test: Path | None) -> None:
    if test is None:
        return
    tested = {case.digest: case.where for case in open_dataset(test).cases}
    for case in cases:
        twin = tested.get(case.digest)
        if twin is not None:
            log.warning(
                "calibration file %s is also in the test folder (%s): figures on it are not of unseen data.",
                case.where,
                twin,
            )


def case_windows(
    cases: list[Case],
    prepared: Preprocessing,
    window: tuple[int, int, int],
    number: int,
    *,
    seed: int,
    hashes: dict[str, str],
    progress: Progress = silent,
) -> Iterator[np.ndarray]:
    """(1, C, X, Y, Z) windows, as many as asked for, spread evenly over the cases; `hashes` fills up on the way."""
    generator = np.random.default_rng(seed)
    used = cases if len(cases) <= number else [cases[i] for i in sorted(generator.permutation(len(cases))[:number])]
    done = 0
    for case, share in zip(used, calibration.shares(number, len(used)), strict=True):
        image = prepared.apply(read_image(case))
        labels = read_labels(case)
        bright = image.data[0] > image.data[0].mean()
        foreground = bright if labels is None else prepared.apply_labels(labels, image.grid).data[0] > 0
        hashes[case.name] = case.digest
        for piece in calibration.draw_windows(image.data, window, share, foreground=foreground, generator=generator):
            yield piece[None]
            done += 1
            progress(done, number)


def train(options: TrainOptions) -> TrainingResult:
    """Folders of images and labels -> `best.ckpt` and `last.ckpt`, which `export` takes.

    Raises:
        UnavailableError: the training libraries are not installed.
        InputError: the data cannot be used; said before anything is written.
    """
    from ptq3d.training import TrainingOptions
    from ptq3d.training import train as run

    found = with_labels(find_data(options.data, options.labels, split=options.split, usual=("train",)), options.labels)
    prepared = preprocessing_of(options.preprocessing)
    if options.spacing is not None:
        prepared = replace(prepared, spacing=options.spacing)
    return run(
        TrainingOptions(
            cases=found.cases,
            output_dir=options.output_dir,
            label_map=_training_map(options, found),
            preprocessing=prepared,
            architecture=options.model,
            channels=options.channels,
            window=options.window,
            batch_size=options.batch_size,
            epochs=options.num_epochs or (None if options.max_steps else SEED_EPOCHS),
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            val_fraction=options.val_fraction,
            seed=options.seed,
            accelerator=options.accelerator,
            devices=int(options.devices) if options.devices.isdigit() else options.devices,
            num_nodes=options.num_nodes,
            precision=options.precision,
            resume=options.resume,
            seed_checkpoint=options.seed_checkpoint,
            quiet=options.quiet,
        )
    )


def _training_map(options: TrainOptions, found: Dataset) -> LabelMap:
    from ptq3d.datasets.btcv import BTCV_ORGANS

    if options.label_map is not None:
        return LabelMap.load(options.label_map)
    if found.label_map is not None and options.num_classes in (None, len(found.label_map.names)):
        return found.label_map
    classes = options.num_classes or len(BTCV_ORGANS)
    return LabelMap.identity(class_names(None, None, classes))
