"""The case flow in one page: volume file -> preprocessing -> windows -> engine -> blend -> labels on the original grid."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from ptq3d.artefacts import cached_artefact
from ptq3d.datasets.folders import Case, find_cases
from ptq3d.datasets.label_map import LabelMap
from ptq3d.engines import get_backend
from ptq3d.engines.base import Engine, EngineOptions
from ptq3d.errors import LabelError, OptionError, ShapeError
from ptq3d.evaluation.metrics import dice_per_class
from ptq3d.manifest import Manifest, sha256
from ptq3d.options import DeployOptions
from ptq3d.pipeline import preprocessing_of
from ptq3d.progress import Progress, bar, silent
from ptq3d.volumes.files import load_image, load_labels, save_labels
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.volume import Volume, require_same_grid

log = logging.getLogger("ptq3d")
SEED_PREPROCESSING = {"unet": "btcv", "unet3d": "btcv", "transunet": "btcv"}


@dataclass(frozen=True)
class CaseResult:
    """One segmented case.

    Args:
        name: the case's.
        labels: the written label map.
        seconds: what took how long: read, preprocess, network (with blending), restore, write, total.
        dice: class name -> Dice, NaN where the class is in neither; empty without true labels.
    """

    name: str
    labels: Path
    seconds: Mapping[str, float]
    dice: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean_dice(self) -> float:
        """Over the foreground classes that are in the truth or in the answer; NaN without true labels."""
        found = [value for value in self.dice.values() if not np.isnan(value)]
        return float(np.mean(found)) if found else float("nan")


@dataclass(frozen=True)
class Deployment:
    """An engine folder with all that its cases need.

    Args:
        folder: the artefact.
        manifest: with preprocessing, labels and overlap decided.
        options: device, precision and threads of the engine.
    """

    folder: Path
    manifest: Manifest
    options: EngineOptions

    @property
    def preprocessing(self) -> Preprocessing:
        """From a volume file to what the network reads."""
        if self.manifest.preprocessing is None:
            raise OptionError(
                f"nothing says how to prepare volumes for {self.folder.name}. Give --preprocessing btcv | FILE."
            )
        return self.manifest.preprocessing

    def open(self) -> Engine:
        """The engine; a context manager."""
        return get_backend(self.manifest.engine["name"]).open(self.folder, self.options)


def prepare(
    model: Path,
    engine: str,
    options: EngineOptions,
    *,
    preprocessing: str | None,
    overlap: float | None,
    fallback: str | None = None,
) -> Deployment:
    """An engine for a model, built and cached where needed, with its manifest completed from the command line.

    Args:
        model: an engine folder or an ONNX file.
        engine: a backend's name or "auto".
        options: how to run it.
        preprocessing: preset or file that replaces the manifest's.
        overlap: replaces the manifest's.
        fallback: preset for a manifest that has no preprocessing.

    Raises:
        OptionError: no preprocessing is known, or the overlap is out of 0..1.
    """
    folder, manifest = cached_artefact(model, engine)
    chosen = preprocessing or (fallback if manifest.preprocessing is None else None)
    if chosen is not None:
        manifest = replace(manifest, preprocessing=preprocessing_of(chosen))
    if overlap is not None:
        manifest = replace(manifest, overlap=overlap)
    if not 0 <= manifest.overlap < 1:
        raise OptionError(f"--overlap {manifest.overlap}: the overlap of windows lies between 0 and below 1.")
    deployment = Deployment(folder, manifest, options)
    _ = deployment.preprocessing
    return deployment


def predict_labels(
    image: Volume, engine: Engine, manifest: Manifest, prepared: Preprocessing, *, progress: Progress = silent
) -> tuple[Volume, dict[str, float]]:
    """The label map of a volume, on its own grid.

    Args:
        image: (C, X, Y, Z) float32 as read from its file.
        engine: takes windows of the preprocessed volume.
        manifest: overlap and classes.
        prepared: the preprocessing.

    Returns:
        (labels (1, X, Y, Z) unsigned, seconds of each step).

    Raises:
        ShapeError: the volume has other channels than the network, or the engine other classes than the manifest.
    """
    import torch

    from ptq3d.windows import blend

    if image.data.shape[0] != engine.spec.channels:
        raise ShapeError(
            f"the network takes {engine.spec.channels} channels, the volume has {image.data.shape[0]}. "
            "Give it the images it was trained on."
        )
    if engine.spec.classes != manifest.classes:
        raise ShapeError(
            f"the engine gives {engine.spec.classes} classes, its manifest names {manifest.classes}. Give the right --label-map."
        )
    start = perf_counter()
    ready = prepared.apply(image)
    middle = perf_counter()
    logits = blend(
        torch.from_numpy(ready.data),
        engine,
        window=engine.spec.window,
        overlap=manifest.overlap,
        outside=prepared.outside,
        progress=progress,
    )
    blended = perf_counter()
    classes = logits.argmax(0).to(torch.uint8 if manifest.classes <= 256 else torch.int32).numpy()
    labels = prepared.restore_labels(classes.astype(np.uint8 if manifest.classes <= 256 else np.uint16), image)
    seconds = {"preprocess": middle - start, "network": blended - middle, "restore": perf_counter() - blended}
    return labels, seconds


def deploy(options: DeployOptions) -> tuple[CaseResult, ...]:
    """Segment a volume or a folder of volumes; Dice per class where labels are given.

    Raises:
        InputError: of the tree in `ptq3d.errors`, before anything is written where it can be known before.
    """
    engine_options = EngineOptions(options.device, options.precision, options.threads)
    deployment = prepare(
        options.model,
        options.engine,
        engine_options,
        preprocessing=options.preprocessing,
        overlap=options.overlap,
        fallback=SEED_PREPROCESSING.get(options.net or ""),
    )
    cases = find_cases(options.data, options.labels, required_labels=options.labels is not None)
    label_map = truth_map(options.label_map, deployment.manifest)
    warn_of_calibration_cases(deployment.manifest, cases)
    output = options.output or Path(f"segmentations-{options.model.name.removesuffix('.onnx')}")
    return deploy_cases(deployment, cases, output, label_map=label_map, quiet=options.quiet)


def truth_map(path: Path | None, manifest: Manifest) -> LabelMap:
    """From values of label files to classes of the network.

    Raises:
        LabelError: the map has another number of classes than the network.
    """
    if path is None:
        return LabelMap.identity(manifest.labels)
    label_map = LabelMap.load(path)
    if len(label_map.names) != manifest.classes:
        raise LabelError(
            f"{path} names {len(label_map.names)} classes, the network gives {manifest.classes}. Give the map of this network."
        )
    return label_map


def warn_of_calibration_cases(manifest: Manifest, cases: Iterable[Case]) -> None:
    """Say which cases the engine was calibrated on: figures on them are not of unseen data."""
    calibrated = set(manifest.quantization.get("calibration_cases", {}).values())
    if not calibrated:
        return
    for case in cases:
        if sha256(case.image) in calibrated:
            log.warning("%s was used to calibrate this engine: figures on it are not of unseen data.", case.image)


def deploy_cases(
    deployment: Deployment, cases: list[Case], output: Path, *, label_map: LabelMap, quiet: bool = False
) -> tuple[CaseResult, ...]:
    """Segment `cases` one by one into `output`/<name>.nii.gz."""
    import torch  # before the first case is timed

    if deployment.options.threads:
        torch.set_num_threads(deployment.options.threads)
    with deployment.open() as engine:
        return tuple(_deploy_case(deployment, engine, case, output, label_map=label_map, quiet=quiet) for case in cases)


def _deploy_case(
    deployment: Deployment, engine: Engine, case: Case, output: Path, *, label_map: LabelMap, quiet: bool
) -> CaseResult:
    written = output / f"{case.name}.nii.gz"
    if written.resolve() == case.image.resolve():
        raise OptionError(f"{written} is the image itself and would be overwritten. Choose another --output.")
    start = perf_counter()
    image = load_image(case.image)
    read = perf_counter() - start
    truth = true_classes(case, image, label_map)
    begin = perf_counter()
    with bar(f"Segment {case.name}", quiet=quiet) as progress:
        labels, seconds = predict_labels(
            image, engine, deployment.manifest, deployment.preprocessing, progress=progress
        )
    before_write = perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    save_labels(written, labels)
    seconds = {"read": read, **seconds, "write": perf_counter() - before_write}
    seconds["total"] = read + perf_counter() - begin
    dice = {} if truth is None else _dice(labels.data[0], truth, label_map.names)
    return CaseResult(case.name, written, seconds, dice)


def true_classes(case: Case, image: Volume, label_map: LabelMap) -> np.ndarray | None:
    """(X, Y, Z) classes of a case's label file, None where it has none.

    Raises:
        GeometryError: the label map lies on another grid than the image.
        LabelError: it holds values outside the classes.
    """
    if case.label is None:
        return None
    labels = load_labels(case.label)
    require_same_grid(image, labels, image_path=case.image, label_path=case.label)
    return label_map.apply(labels.data[0], where=case.label)


def _dice(prediction: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    values = dice_per_class(prediction, truth, len(names))
    return {name: float(value) for name, value in zip(names[1:], values, strict=True)}
