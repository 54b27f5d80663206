"""Deployment: engines for models, cases read, segmented and written beside one another."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from ptq3d.artefacts import cached_artefact
from ptq3d.data import find_data, judged_by
from ptq3d.datasets.cases import Case, read_grid, read_image, true_classes
from ptq3d.datasets.label_map import LabelMap
from ptq3d.engines import get_backend
from ptq3d.engines.base import BuildSettings, Engine, EngineOptions
from ptq3d.engines.joined import Ensemble, Mirrored
from ptq3d.errors import EngineError, OptionError, Ptq3dError
from ptq3d.evaluation.metrics import dice_per_class
from ptq3d.manifest import Manifest
from ptq3d.memory import peak_memory_bytes, resident_bytes
from ptq3d.options import CaseOptions, DeployOptions
from ptq3d.pipeline import preprocessing_of
from ptq3d.predict import Answer, Prepared, estimated_bytes, predict_labels, prepared_case, require_memory
from ptq3d.progress import bar
from ptq3d.volumes.files import volume_suffix
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.writing import Writing

STREAMS = 2  # windows in the network at a time, so that one goes on while the other's answer is blended
log = logging.getLogger("ptq3d")
SEED_PREPROCESSING = {"unet": "btcv", "unet3d": "btcv", "transunet": "btcv"}


@dataclass(frozen=True)
class CaseResult:
    """One case, segmented or not.

    Args:
        name: the case's.
        labels: the label map; written unless there is an error.
        image: file or series that was segmented.
        seconds: what took how long: read, preprocess, network (waiting for it), stitch (blending, head, argmax, the way back to
            the file's grid), write, and total, their sum. Steps of neighbouring cases run beside one another. A GPU works through
            a queue, so that what the network takes there is waited for in stitch.
        windows: that the network saw.
        peak_memory_bytes: the most this process held until the case was written.
        dice: class name -> Dice, NaN where the class is in neither; empty without true labels.
        error: what ended this case; the others went on.
    """

    name: str
    labels: Path
    image: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    windows: int = 0
    peak_memory_bytes: int = 0
    dice: Mapping[str, float] = field(default_factory=dict)
    error: Ptq3dError | None = None

    @property
    def windows_per_second(self) -> float:
        """Windows over the seconds of network and stitching."""
        return self.windows / (self.seconds["network"] + self.seconds["stitch"]) if self.windows else 0.0

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
        tta: axes along which windows are mirrored.
        others: whose logits are averaged with these.
    """

    folder: Path
    manifest: Manifest
    options: EngineOptions
    tta: str = ""
    others: tuple[Deployment, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        """From a volume file to what the network reads."""
        if self.manifest.preprocessing is None:
            raise OptionError(
                f"nothing says how to prepare volumes for {self.folder.name}. Give --preprocessing btcv | FILE."
            )
        return self.manifest.preprocessing

    def open(self, streams: int = 1) -> Engine:
        """The engine, of all networks and mirrored windows where there are some; a context manager."""
        engine = get_backend(self.manifest.engine["name"]).open(self.folder, replace(self.options, streams=streams))
        if self.others:
            engine = Ensemble([engine, *(other.open(streams) for other in self.others)])
        return Mirrored(engine, self.tta) if self.tta else engine


def prepare(
    model: Path,
    engine: str,
    options: EngineOptions,
    *,
    preprocessing: str | None,
    overlap: float | None,
    fallback: str | None = None,
    late_head: bool = True,
) -> Deployment:
    """An engine for a model, built and cached where needed, with its manifest completed from the command line.

    Args:
        model: an engine folder or an ONNX file.
        engine: a backend's name or "auto".
        options: how to run it.
        preprocessing: preset or file that replaces the manifest's.
        overlap: replaces the manifest's.
        fallback: preset for a manifest that has no preprocessing.
        late_head: False wants the network whole.

    Raises:
        OptionError: no preprocessing is known, or the overlap is out of 0..1.
    """
    settings = BuildSettings(options.device, options.precision)
    folder, manifest = cached_artefact(model, engine, late_head=late_head, settings=settings)
    if options.providers and manifest.engine["name"] != "onnxruntime":
        raise OptionError(f"--providers are ONNX Runtime's; {model} runs on {manifest.engine['name']}.")
    chosen = preprocessing or (fallback if manifest.preprocessing is None else None)
    if preprocessing is not None and manifest.preprocessing not in (None, preprocessing_of(preprocessing)):
        log.warning(
            "--preprocessing %s replaces what %s says of how volumes are prepared for it.", preprocessing, model
        )
    if chosen is not None:
        manifest = replace(manifest, preprocessing=preprocessing_of(chosen))
    if overlap is not None:
        manifest = replace(manifest, overlap=overlap)
    if not 0 <= manifest.overlap < 1:
        raise OptionError(f"--overlap {manifest.overlap}: the overlap of windows lies between 0 and below 1.")
    deployment = Deployment(folder, manifest, options)
    _ = deployment.preprocessing
    return deployment


def deploy(options: DeployOptions) -> tuple[CaseResult, ...]:
    """Segment a volume or a folder of volumes; Dice per class where labels are given.

    Raises:
        InputError: of the tree in `ptq3d.errors`, before anything is written where it can be known before.
    """
    if not set(options.tta) <= set("xyz") or len(set(options.tta)) != len(options.tta):
        raise OptionError(f"--tta {options.tta}: name axes of the network's input to mirror, such as x or xyz.")
    first, *others = (_prepared(model, options) for model in (options.model, *options.ensemble))
    deployment = replace(first, tta=options.tta, others=tuple(others))
    _require_alike(deployment, options.ensemble)
    found = find_data(options.data, options.labels, split=options.split, series=options.series)
    cases, label_map = judged_by(found, deployment.manifest, labels=options.labels, label_map=options.label_map)
    warn_of_calibration_cases(deployment.manifest, cases)
    if options.output is not None and (options.output.is_file() or volume_suffix(options.output.name)):
        raise OptionError(
            f"--output {options.output}: wanted a folder; label maps are written into it under the names of their cases."
        )
    output = options.output or Path(f"segmentations-{options.model.name.removesuffix('.onnx')}")
    writing = Writing(output, options.output_type, deployment.manifest.labels, _algorithm(deployment.manifest))
    for case in found.cases:  # with all labels that lie in the data, also those that are of other classes
        writing.require_possible(case)
    plan = CaseOptions(restore=options.restore, crop=options.crop, skip_empty=options.skip_empty)
    limit = None if options.max_memory is None else round(options.max_memory * 1e9)
    return deploy_cases(
        deployment, cases, writing, label_map=label_map, options=plan, max_memory_bytes=limit, quiet=options.quiet
    )


def _algorithm(manifest: Manifest) -> str:
    """Who makes the labels, in the words of a DICOM object."""
    from ptq3d.version import __version__

    return f"ptq3d {__version__} {manifest.network} {manifest.engine['name']}"


def _prepared(model: Path, options: DeployOptions) -> Deployment:
    return prepare(
        model,
        options.engine,
        EngineOptions(options.device, options.precision, options.threads, providers=options.providers),
        preprocessing=options.preprocessing,
        overlap=options.overlap,
        fallback=SEED_PREPROCESSING.get(options.net or ""),
        late_head=options.late_head,
    )


def _require_alike(deployment: Deployment, models: Iterable[Path]) -> None:
    """Refuse to average networks that see other voxels or mean other classes."""
    own = deployment.manifest
    for model, other in zip(models, deployment.others, strict=True):
        for what in ("labels", "window", "overlap", "preprocessing"):
            if getattr(other.manifest, what) != getattr(own, what):
                raise OptionError(
                    f"--ensemble {model}: its manifest has another '{what}' than the model. Average networks of one training only."
                )


def warn_of_calibration_cases(manifest: Manifest, cases: Iterable[Case]) -> None:
    """Say which cases the engine was calibrated on: figures on them are not of unseen data."""
    calibrated = set(manifest.quantization.get("calibration_cases", {}).values())
    if not calibrated:
        return
    for case in cases:
        if case.digest in calibrated:
            log.warning("%s was used to calibrate this engine: figures on it are not of unseen data.", case.where)


def deploy_cases(
    deployment: Deployment,
    cases: list[Case],
    writing: Writing,
    *,
    label_map: LabelMap,
    options: CaseOptions | None = None,
    max_memory_bytes: int | None = None,
    quiet: bool = False,
) -> tuple[CaseResult, ...]:
    """Segment `cases` and write their labels: the next is read and the last is written while one is in the network.

    With one thread the steps follow one another.

    Returns:
        One a case, in order. A case that cannot be read, segmented or written has its error; the others go on.

    Raises:
        OptionError: a volume would need more memory than allowed, or an image would be overwritten; nothing is segmented then.
    """
    import torch  # before the first case is timed

    for case in cases:
        writing.require_possible(case)
    if deployment.options.threads:
        torch.set_num_threads(deployment.options.threads)
    flow = _Flow(deployment, writing, label_map, options or CaseOptions(), quiet)
    beside = deployment.options.threads != 1
    with (
        deployment.open(streams=STREAMS if beside else 1) as engine,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
    ):
        if max_memory_bytes is not None:
            _require_memory(deployment, engine, cases, max_memory_bytes)
        results: list[Future[CaseResult]] = []
        ahead = reader.submit(flow.read, cases[0]) if cases else None
        for index, case in enumerate(cases):
            read = (ahead or reader.submit(flow.read, case)).result()
            following = cases[index + 1] if index + 1 < len(cases) else None
            ahead = reader.submit(flow.read, following) if beside and following is not None else None
            results.append(writer.submit(flow.write, flow.segment(read, engine)))
            if not beside:
                results[-1].result()
        return tuple(result.result() for result in results)


def _require_memory(deployment: Deployment, engine: Engine, cases: list[Case], limit: int) -> None:
    """Compare what each case needs, by its header, with what is allowed; the engine has to have run to show its own."""
    engine(np.zeros((1, engine.spec.channels, *engine.spec.window), np.float32))
    needed = {}
    for case in cases:
        with suppress(Ptq3dError):  # the case will end with it, the others go on
            grid = read_grid(case)
            needed[case.name] = estimated_bytes(grid, engine, deployment.manifest, deployment.preprocessing)
    require_memory(needed, limit, resident_bytes(), ahead=deployment.options.threads != 1)


@dataclass(frozen=True)
class _Case:
    """A case on its way, or what ended it."""

    case: Case
    seconds: Mapping[str, float] = field(default_factory=dict)
    prepared: Prepared | None = None
    truth: np.ndarray | None = None
    answer: Answer | None = None
    error: Ptq3dError | None = None


@dataclass(frozen=True)
class _Flow:
    """The three steps of a case; each passes on what an earlier one failed with."""

    deployment: Deployment
    writing: Writing
    label_map: LabelMap
    options: CaseOptions
    quiet: bool

    def read(self, case: Case) -> _Case:
        """From the file to what the network sees."""
        try:
            start = perf_counter()
            image = read_image(case)
            read = perf_counter() - start
            prepared = prepared_case(image, self.deployment.preprocessing, self.options)
            truth = true_classes(case, image.grid, self.label_map)
        except (Ptq3dError, MemoryError) as error:
            return _Case(case, error=_ended(error))
        return _Case(case, {"read": read, "preprocess": prepared.seconds}, prepared, truth)

    def segment(self, found: _Case, engine: Engine) -> _Case:
        """From what the network sees to labels on the file's grid; the volume is let go."""
        if found.prepared is None:
            return found
        try:
            with bar(f"Segment {found.case.name}", quiet=self.quiet) as progress:
                answer = predict_labels(
                    found.prepared,
                    engine,
                    self.deployment.manifest,
                    self.deployment.preprocessing,
                    self.options,
                    progress=progress,
                )
        except (Ptq3dError, MemoryError, RuntimeError) as error:
            return replace(found, prepared=None, error=_ended(error))
        return replace(found, prepared=None, answer=answer, seconds={**found.seconds, **answer.seconds})

    def write(self, found: _Case) -> CaseResult:
        """From labels to their file, whole or not at all, and Dice where the truth is known."""
        path = self.writing.path_of(found.case)
        if found.answer is None:
            return CaseResult(found.case.name, path, found.case.where, found.seconds, error=found.error)
        start = perf_counter()
        try:
            self.writing.write(found.case, found.answer.labels)
        except (Ptq3dError, MemoryError) as error:
            return CaseResult(found.case.name, path, found.case.where, found.seconds, error=_ended(error))
        seconds = {**found.seconds, "write": perf_counter() - start}
        seconds["total"] = sum(seconds.values())
        peak = peak_memory_bytes()
        truth, labels = found.truth, found.answer.labels.data[0]
        dice = {} if truth is None else _dice(labels, truth, self.label_map.names)
        return CaseResult(found.case.name, path, found.case.where, seconds, found.answer.windows, peak, dice)


def _ended(error: Ptq3dError | MemoryError | RuntimeError) -> Ptq3dError:
    """What ended a case; PyTorch says by a RuntimeError that memory is missing, any other goes on as the fault it is."""
    if isinstance(error, Ptq3dError):
        return error
    if isinstance(error, RuntimeError) and "memory" not in str(error):
        raise error
    return EngineError(f"the machine has too little memory for this case ({error}). Bound it with --max-memory.")


def _dice(prediction: np.ndarray, truth: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    values = dice_per_class(prediction, truth, len(names))
    return {name: float(value) for name, value in zip(names[1:], values, strict=True)}
